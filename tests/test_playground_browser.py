"""The playground as a process of its own, in a real browser, as wide as a laptop and as a phone.

What is seen is compared with the library alone; every address that the page or the server asks for
is recorded: they are all this machine's.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from helpers import browser as driver
from helpers import tiny
from helpers.command_line import SRC
from PIL import Image

pytest.importorskip("gradio")

import grains
from grains import models
from grains.steering import SteeringVectors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (driver.CHROMIUM and driver.DRIVER),
        reason="needs chromium and chromedriver (Debian: apt-get install chromium-driver)",
    ),
]

WIDTHS = {"laptop": 1280, "phone": 390}
TINY, SHAPES, SMOLLM2 = range(3)  # the tabs
ARROW_LEFT = "\ue012"  # the key, as WebDriver writes it
# Runs the script, and writes a line for each address that it connects to or looks up.
WATCHED = """
import runpy, sys
out = open(sys.argv.pop(1), "a", buffering=1)
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(args[-1] if event == "socket.connect" else args[0], file=out)
sys.addaudithook(note)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("playground")
    tiny.save_model(folder / "tiny", max_position_embeddings=512)
    return folder


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    command = ["-c", WATCHED, folder / "asked", "playground.py", "--port", port, "--num_pairs", 4]
    command += ["--model_names", folder / "tiny", "shapes-vlm", "smollm2-135m-instruct"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=SRC, env=environment, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        assert process.poll() is None, (folder / "log").read_text()
        try:
            urllib.request.urlopen(url, timeout=30).close()
            break
        except OSError:
            time.sleep(0.2)
    yield url
    assert list(folder.glob("grains-playground-*"))
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not list(folder.glob("grains-playground-*"))  # what was uploaded is gone
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def chromium(folder):
    with driver.chromium(folder / "downloads") as page:
        yield page


@pytest.fixture(params=WIDTHS)
def page(request, chromium, address):
    """The page, newly opened; nothing may be on the console at the end, or come from elsewhere."""
    chromium.size(WIDTHS[request.param])
    chromium.open(address)
    chromium.until("return !!document.querySelector('#run-0')")
    yield chromium
    chromium.until("return document.documentElement.scrollWidth <= window.innerWidth", seconds=5)
    assert chromium.console() == []
    outside = [
        url
        for url in chromium.requested()
        if not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))
    ]
    assert outside == []


def tab(page, number):
    page.until("return !!document.querySelectorAll('button[role=tab]')[arguments[0]]", number)
    page.run("document.querySelectorAll('button[role=tab]')[arguments[0]].click()", number)
    page.until("return !!document.querySelector(arguments[0])?.offsetParent", f"#run-{number}")


def write(page, name, number, text):
    page.type(f"#{name}-{number} textarea, #{name}-{number} input", text)


def ask(page, number, prompt, chosen, rejected):
    for name, text in (("prompt", prompt), ("Preferred", chosen), ("Dispreferred", rejected)):
        write(page, name, number, text)
    page.click(f"#run-{number}")


def shown(page, number, selector="svg", name="curve"):
    return page.until(
        "return document.querySelector(arguments[0])?.textContent",
        f"#{name}-{number} {selector}",
        seconds=120,
    )


def both(page, number):
    """The base text and the steered one."""
    return page.run(
        "return [...document.querySelectorAll(arguments[0])].map(p => p.textContent)",
        f"#answers-{number} p[dir]",
    )


def slide(page, number, keys):
    page.type(f"#strength-{number} input[type=range]", keys, clear=False)


def margin(page, number=TINY):
    said = page.run(
        "return document.querySelector(arguments[0]).getAttribute('aria-label')",
        f"#curve-{number} svg",
    )
    said = said.replace("\N{MINUS SIGN}", "-")
    value, at = re.fullmatch(r"margin (\S+) at strength (\S+)", said).groups()
    return float(value), float(at)


@pytest.fixture(scope="module")
def lm(folder):
    return models.load(str(folder / "tiny"))


def test_a_question_is_run_and_the_strength_slid(page, lm, folder):
    question, chosen, rejected = tiny.QUESTIONS[6]
    page.click("#more-0 button")
    page.until("return !!document.querySelector('#reach-0 input')?.offsetParent")
    write(page, "reach", TINY, "0.5")
    page.until("return document.querySelector('#strength-0 input[type=range]').max === '0.5'")
    ask(page, TINY, question, chosen, rejected)
    shown(page, TINY)
    words = page.run("return document.querySelector('#words-0 .g-words').textContent")
    assert question in words
    scored = grains.attribute(lm, question, chosen, rejected, style="chat")
    said = page.run("return document.querySelector('#words-0').textContent")
    assert f"completeness error {100 * scored.completeness_error:.1f}" in said
    assert both(page, TINY)[0] == grains.generate(lm, question, max_new_tokens=32)
    before = margin(page)
    slide(page, TINY, ARROW_LEFT * 30)
    page.until("return document.querySelector('#strength-0 input[type=range]').value < -0.2")
    for part in ("curve", "answers"):  # the mark, and then the text
        page.until(
            "const value = Number(document.querySelector('#strength-0 input[type=range]').value);"
            "return document.querySelector(arguments[0]).textContent.includes("
            "arguments[1] + Number(Math.abs(value).toPrecision(4)))",
            f"#{part}-0",
            "\N{MINUS SIGN}",
        )
    page.until("return document.querySelector('#status-0').textContent.trim() === ''")
    after = margin(page)
    assert after[1] < before[1] and after[0] != before[0]
    # The vectors are those that the page offers for download.
    (folder / "downloads").mkdir(exist_ok=True)
    for old in (folder / "downloads").iterdir():
        old.unlink()
    page.click("#other-0 button")
    page.until("return !!document.querySelector('#download-0')?.offsetParent")
    page.click("#download-0")
    for _ in range(100):
        if files := list((folder / "downloads").glob("gradient*.safetensors")):
            break
        time.sleep(0.1)
    vectors = SteeringVectors.load(files[0])
    expected = vectors.at(after[1], ["0-2"])
    scores = [
        grains.score(lm, question, [chosen, rejected], style="chat", steering=item)
        for item in (None, expected)
    ]
    assert after[0] == pytest.approx(np.subtract(*scores[1]), abs=0.3)
    assert abs(np.subtract(*scores[0]) - np.subtract(*scores[1])) > 0.5
    assert both(page, TINY)[1] == grains.generate(
        lm, question, max_new_tokens=32, steering=expected
    )


@pytest.mark.parametrize(
    "texts, line",
    [
        (("", "a", "b"), "the prompt is empty: write one"),
        (("x", " ", "b"), "the preferred answer is empty: write one"),
        (("x", "a", "a "), "the two answers are the same: write two that differ"),
    ],
)
def test_a_mistake_is_a_line_and_nothing_is_lost(page, texts, line):
    ask(page, TINY, *texts)
    assert shown(page, TINY, "[role=alert]", "status") == line
    assert "Then: the base" in page.run("return document.querySelector('#answers-0').textContent")
    kept = page.run("return document.querySelector('#Dispreferred-0 textarea').value")
    assert kept == texts[2]


def test_layers_that_do_not_exist(page):
    page.click("#more-0 button")
    page.until("return !!document.querySelector('#layers-0 textarea')?.offsetParent")
    write(page, "layers", TINY, "2-9")
    page.click("#run-0")
    assert "does not exist" in shown(page, TINY, "[role=alert]", "status")


def choose(page, text, number=TINY):
    """Another source of the vectors."""
    page.click(f"#other-{number} button")
    page.until("return !!document.querySelector(arguments[0])?.offsetParent", f"#source-{number}")
    pick(page, text, number)


def pick(page, text, number=TINY):
    page.run(
        "[...document.querySelectorAll(`#source-${arguments[0]} label`)]"
        ".find(label => label.innerText.trim() === arguments[1]).click()",
        number,
        text,
    )
    page.until(
        "return document.querySelector(`#source-${arguments[0]} label.selected`)"
        "?.innerText.trim() === arguments[1]",
        number,
        text,
    )


def test_vectors_of_the_question_and_of_files(page, lm, folder):
    choose(page, "the question above")
    page.click("#make-0")
    page.until("return document.querySelector('#made-0').textContent.includes('Made.')")
    page.until(
        "return document.querySelector('#about-0').textContent.includes(arguments[0])",
        "Vectors: gradient, 1 pair; 3 layers.",
    )

    pick(page, "a file")
    page.until("return !!document.querySelector('#file-0 input[type=file]')")
    wrong = torch.ones(4, 16)
    SteeringVectors(wrong, torch.ones(4), {}).save(folder / "others.safetensors")
    (folder / "none.safetensors").write_text("no vectors")
    right = SteeringVectors(torch.eye(3, 32), torch.full((3,), 6.0), {"method": "caa"})
    right.save(folder / "right.safetensors")
    for name, words in (
        ("others", "4 layers of size 16"),
        ("none", "none.safetensors"),
        ("right", "Made."),
    ):
        page.type("#file-0 input[type=file]", str(folder / f"{name}.safetensors"), clear=False)
        page.until(
            "return document.querySelector('#file-0').innerText.includes(arguments[0])", name[:4]
        )
        page.click("#make-0")
        page.until(
            "return document.querySelector('#made-0').textContent.includes(arguments[0])", words
        )
        page.run("document.querySelector('#file-0 button[aria-label=\"Clear\"]')?.click()")
        page.until("return !!document.querySelector('#file-0 input[type=file]')")
    page.until("return document.querySelector('#about-0').textContent.includes('Vectors: caa')")


def test_a_picture(page, folder):
    tab(page, SHAPES)
    page.run(
        "window.seen = []; new MutationObserver(() => window.seen.push("
        "document.querySelector('#answers-1 p[dir]')?.textContent))"
        ".observe(document.body, {childList: true, subtree: true, characterData: true})"
    )
    page.click(f"#run-{SHAPES}")
    shown(page, SHAPES)
    patches, drawn = page.run(
        "const of = selector => [...document.querySelectorAll(`#words-1 .g-picture ${selector}`)];"
        "return [of('i').map(i => i.getBoundingClientRect()).map(box => [box.width, box.height]),"
        " of('img').map(i => [i.naturalWidth, i.clientWidth, i.clientHeight])]"
    )
    assert drawn[0][0] == 64
    # The patches of a view cover the picture.
    areas = sum(width * height for width, height in patches) / (drawn[0][1] * drawn[0][2])
    assert areas == pytest.approx(round(areas), abs=0.05) and round(areas) >= 1
    base, steered = both(page, SHAPES)
    assert base.startswith("a ") and steered.startswith("a ")
    seen = page.run("return [...new Set(window.seen)].filter(Boolean)")
    assert len(seen) > 2 and seen[-1] == base and all(base.startswith(text) for text in seen)

    broken = folder / "broken.png"
    broken.write_bytes(b"no picture")
    noise = np.random.default_rng(0).integers(0, 256, (2700, 2700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large.png")
    for path, line in ((broken, "cannot be read"), (folder / "large.png", "give one of at most")):
        page.type("#picture-1 input[type=file]", str(path), clear=False)
        page.until(
            "return [...document.querySelectorAll('#picture-1 img')]"
            ".some(image => image.src.endsWith(arguments[0]))",
            path.name,
        )
        page.click(f"#run-{SHAPES}")
        page.until(
            "return document.querySelector('#status-1').textContent.includes(arguments[0])", line
        )


@pytest.mark.parametrize("page", ["laptop"], indirect=True)
def test_the_embedded_model(page):
    tab(page, SMOLLM2)
    page.click(f"#run-{SMOLLM2}")
    shown(page, SMOLLM2)
    words = page.run("return document.querySelector('#words-2 .g-words').textContent")
    assert words.endswith("What is the home country of sushi?")
    assert both(page, SMOLLM2)[0] == "The home country of sushi is Japan."


def test_the_server_asks_nobody(address, folder):
    """Last: everything above was asked for."""
    asked = set((folder / "asked").read_text().splitlines())
    outside = {line for line in asked if not re.search(r"127\.0\.0\.1|localhost|^None$", line)}
    assert outside == set()
