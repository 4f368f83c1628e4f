"""The report in a real browser: nothing on the console, every picture there, nothing wider than a
phone, words that can be read on their colours; light and dark."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path

import pytest

from grains.report import figures
from grains.settings import METHODS

pytest_plugins = ("helpers.everything",)

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--window-size=1400,1000",
    "--virtual-time-budget=20000",
    "--dump-dom",
]
PHONE, LAPTOP = 390, 1280
# Chromium has no window as narrow as a phone, so the page is looked at in frames.
PROBE = """<!doctype html><meta charset="utf-8"><body>
<iframe src="PAGE" width="390" height="800"></iframe>
<iframe src="PAGE" width="1280" height="800"></iframe>
<pre id="found"></pre>
<script>
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const colours = element => {
    const style = view.getComputedStyle(element);
    return [style.color, style.backgroundColor];
  };
  const wide = [...page.querySelectorAll("body *")].filter(element =>
    element.getBoundingClientRect().right > frame.clientWidth + 1 && !element.closest(".scroll"));
  return {
    width: page.documentElement.clientWidth, needed: page.documentElement.scrollWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 200)),
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    pictures: [...page.images].map(image => [image.naturalWidth, image.clientWidth,
                                             image.currentSrc]),
    ground: colours(page.body),
    texts: [...page.querySelectorAll(".words span[title], .soft, dt, ins, del, a, .interval")]
      .map(element => [element.className || element.tagName, ...colours(element)]),
  };
}
window.addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(look);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script></body>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM.exists(),
        reason="needs Chromium as /usr/bin/chromium (Debian: apt-get install chromium)",
    ),
]


def look(page: Path, folder: Path, dark: bool) -> tuple[dict, dict, list[str]]:
    """What the probe finds on a phone and on a laptop, and the lines on the console."""
    probe = page.with_name("probe.html")
    probe.write_text(PROBE.replace("PAGE", page.name), encoding="utf-8")
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={folder / f'profile-{dark}'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen and seen[1], done.stderr[-2000:]
    phone, laptop = json.loads(html.unescape(seen[1]))
    return phone, laptop, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page(everything):
    _, output, text, _ = everything
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return output


@pytest.fixture(scope="module", params=["light", "dark"])
def seen(request, page, tmp_path_factory):
    return request.param, *look(page, tmp_path_factory.mktemp("chromium"), request.param == "dark")


def test_nothing_on_the_console(seen):
    assert seen[3] == []


def test_every_picture_loads_in_its_theme(seen, page):
    theme, *views, _ = seen
    whole = page.read_text()
    dark = set(re.findall(r'srcset="([^"]+)"', whole))
    light = {
        source
        for source, kind in re.findall(
            r'(?:</?picture>|media="[^"]*" srcset="[^"]*">)\s*<img src="([^"]+)"()', whole
        )
    }
    for view in views:
        assert view["dark"] == (theme == "dark")
        assert len(view["pictures"]) == len(light) >= 6
        for natural, shown, source in view["pictures"]:
            assert natural > 500 and shown > 300
            assert source in light | dark
        themed = [source for *_, source in view["pictures"] if source in dark]
        assert len(themed) == (len(dark) if theme == "dark" else 0)


def test_nothing_is_wider_than_the_screen(seen):
    for view, width in zip(seen[1:3], (PHONE, LAPTOP), strict=True):
        assert width - 20 <= view["width"] <= width
        assert view["needed"] == view["width"]
        assert view["wide"] == []


def test_every_text_stands_out_from_its_ground(seen):
    for view in seen[1:3]:
        ink, ground = map(rgba, view["ground"])
        assert contrast(ink[:3], ground[:3]) > 12
        assert len(view["texts"]) > 50
        for name, colour, behind in view["texts"]:
            *over, alpha = rgba(behind)
            mixed = [alpha * a + (1 - alpha) * b for a, b in zip(over, ground[:3], strict=True)]
            assert contrast(rgba(colour)[:3], mixed) >= 4.5, (name, colour, behind)


def rgba(colour: str) -> list[float]:
    """'rgb(1, 2, 3)' or 'rgba(1, 2, 3, 0.4)' -> four numbers."""
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return numbers if len(numbers) == 4 else [*numbers, 1.0]


def contrast(one, two) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour):
        shares = [c / 255 for c in colour]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ground", ["#ffffff", "#15171a"])
def test_every_method_stands_out_from_the_ground(ground):
    """3:1, as WCAG asks of what is drawn."""
    behind = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
    for method in [*METHODS, "lora"]:
        colour = figures.look(method)[0]
        assert contrast([int(colour[i : i + 2], 16) for i in (1, 3, 5)], behind) >= 3, method


def test_the_probe_sees_faults(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<html><meta name="viewport" content="width=device-width"><body>'
        '<p style="width: 800px" id="wide">x</p><img src="data:image/png;base64,AAAA">'
        '<script>console.error("oh no")</script></body></html>'
    )
    phone, laptop, console = look(bad, tmp_path, dark=False)
    assert any("oh no" in line for line in console)
    assert phone["needed"] > phone["width"] and "wide" in phone["wide"][0]
    assert laptop["needed"] == laptop["width"] and laptop["wide"] == []
    assert phone["pictures"][0][0] == 0
    assert contrast((255, 255, 255), (0, 0, 0)) == 21
    assert round(contrast((0x76,) * 3, (255,) * 3), 2) == 4.54
