"""A run outlives what ends it: a kill before any one of its file operations, a disk that is full,
Ctrl-C while it is still importing. (Kills of the real stages: test_resume.py.)"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
from helpers.command_line import SRC, interruptible
from helpers.families import mounted_disk

from grains import runs

pytest_plugins = ("helpers.command_line",)

# A run of three units of 16 KiB without a model. content: what it writes; space: what it says it
# needs; dies: before which of its file operations the process kills itself (0: before none).
RUN = """
import os, signal, sys
from pathlib import Path
import torch
from grains import runs
from grains.cli import entry

folder, (content, space, dies) = Path(sys.argv[1]), map(int, sys.argv[2:5])
table, states = folder / "table.csv", folder / "states.safetensors"


def main():
    run = runs.Run([table, states], {"content": content}, "--overwrite" in sys.argv, space)
    if run.finished:
        return
    for unit in run.todo(3, "units"):
        run.save(unit, {"states": torch.full((4096,), 10.0 * content + unit)},
                 [{"unit": unit, "content": content}])
    if run.all_done():
        runs.write_stacked(states, {"states": "states"},
                           lambda: (tensors for tensors, _ in run.units(3)), 3, {})
        runs.write_rows(table, (rows for _, rows in run.units(3)))
    run.finish()


def before_each(event, arguments):
    global dies
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir"):
        dies -= 1
        if not dies:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(before_each)
entry.run(main)
"""


@pytest.fixture(scope="module")
def run(server_with, tmp_path_factory):
    """Runs RUN in a folder."""
    commands = server_with(library="runs")
    script = tmp_path_factory.mktemp("script") / "run.py"
    script.write_text(RUN)

    def start(folder, content, *more, space=0, dies=0, **options):
        return commands.run(script, folder, content, space, dies, *more, **options)

    return start


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """content -> the files of a run that was not interrupted."""
    made = []
    for content in range(2):
        folder = tmp_path_factory.mktemp("whole")
        run(folder, content).ok()
        made.append(files(folder))
    return made


@pytest.fixture(scope="module")
def begun(run, tmp_path_factory):
    """The files of a run of content 0 that was killed after its second unit."""
    folder = tmp_path_factory.mktemp("begun")
    run(folder, 0, die_after=3)
    assert len(list(folder.glob("table.parts/0*"))) == 2
    return files(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """The files in a folder, and the folders (None); names without the number of a process."""
    folders = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()]
    return {
        re.sub(r"\.\d+\.", ".", name): data
        for name, data in (files(folder) | dict.fromkeys(folders)).items()
    }


def put(content: dict[str, bytes], folder: Path) -> Path:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def check_whole(there: dict[str, bytes], whole: list[dict[str, bytes]]) -> None:
    """Every output is one run's or the other's, and a manifest stands beside its own outputs."""
    for name in ("table.csv", "states.safetensors"):
        assert there.get(name) in (None, whole[0][name], whole[1][name])
    if "table.manifest.json" in there:
        assert any(made.items() <= there.items() for made in whole)


@pytest.fixture(scope="module")
def seen():
    """Flags of a run -> the states of its folder after which the rest was tried."""
    return defaultdict(list)


@pytest.mark.parametrize("begin", ["nothing", "parts", "outputs"])
def test_killed_before_any_file_operation(run, whole, begun, seen, tmp_path, begin):
    """In an empty folder, and where another run's parts or outputs are overwritten.

    What comes after a kill is tried once where several of a command leave the same files: those
    before reading, and where the same is left to do.
    """
    before = {"nothing": {}, "parts": begun, "outputs": whole[0]}[begin]
    flags = ["--overwrite"] if before else []
    chance = random.Random(begin)
    left = seen[tuple(flags)]
    for dies in count(1):
        folder = put(before, tmp_path / f"{dies}")
        result = run(folder, 1, *flags, dies=dies)
        if result.code != -signal.SIGKILL:
            break
        check_whole(files(folder), whole)
        if (state := snapshot(folder)) in left:
            continue
        left.append(state)
        other = put(files(folder), tmp_path / f"{dies}-other")

        # The same command, perhaps killed once more, ends with its outputs and nothing else.
        if not len(left) % 3:
            run(folder, 1, *flags, dies=chance.randint(1, dies))
        run(folder, 1, *flags).ok()
        assert files(folder) == whole[1]
        # Another command is refused, or ends with its own.
        if not len(left) % 2:
            content, *more = chance.choice([(0,), (0, "--overwrite"), (1,)])
            if run(other, content, *more).code == 0:
                assert files(other) == whole[content]
            check_whole(files(other), whole)
    result.ok()
    assert dies > 30 and len(left) > 20


def test_a_process_that_outlives_its_run(run, whole, begun, tmp_path):
    """It still writes parts, of other settings, into the folder of the run that came after."""
    run(tmp_path, 1, die_after=2)
    put({name: data for name, data in begun.items() if "/0" in name}, tmp_path)
    run(tmp_path, 1).ok()
    assert files(tmp_path) == whole[1]


# --- a full disk ---


@pytest.fixture
def disk(tmp_path):
    with mounted_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def leave_free(disk: Path, pages: int) -> None:
    space = os.statvfs(disk)
    (disk / "filling").write_bytes(b"x" * ((space.f_bavail - pages) * space.f_frsize))


def test_disk_that_is_full_at_any_time(run, whole, disk):
    """One line, no half file; once there is space the same command goes on."""
    left = []
    for pages in count():
        leave_free(disk, pages)
        result = run(disk / "run", 1)
        if result.code == 0:
            break
        message = result.error()
        assert f"'{disk / 'run'}" in message and "free some space" in message
        there = files(disk / "run") if (disk / "run").exists() else {}
        assert not [name for name in there if name.endswith(".tmp")]
        check_whole(there, whole)
        (disk / "filling").unlink()
        if there not in left:
            left.append(there)
            run(disk / "run", 1).ok()
            assert files(disk / "run") == whole[1]
        shutil.rmtree(disk / "run", ignore_errors=True)
    assert pages > 25  # the units and the outputs alone are 2 x 3 x 4 pages


def test_space_for_one_run_is_enough_to_go_on(run, whole, disk):
    space = 2 * 3 * 4 * 4096
    leave_free(disk, 34)
    run(disk / "run", 1, space=space, die_after=4)  # the marker and the parts
    assert os.statvfs(disk).f_bavail * 4096 < space
    run(disk / "run", 1, space=space).ok()
    assert files(disk / "run") == whole[1]


# --- Ctrl-C ---


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot see what is imported")
@pytest.mark.parametrize(
    "script, library",
    [
        ("token_ablation.py", "_multiarray_umath"),
        ("steering_mc_vlm.py", "libtorch_cpu"),
        ("steering_generation.py", "libtorch_python"),
    ],
)  # numpy's, among the first; ...; among the last
def test_interrupted_while_it_imports(commands, tmp_path, script, library):
    process = subprocess.Popen(
        [sys.executable, SRC / script, "--model_name", "/nowhere"],
        env=commands.environment,
        cwd=tmp_path,
        preexec_fn=interruptible,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and library not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and not out
    assert len(err.strip().splitlines()) == 1 and err.strip().startswith("interrupted: ")


def test_a_table_with_any_text_reads_back(tmp_path):
    texts = ["a\rb", "\r", "a,b", 'say "x"', "a\nb", "a\r\nb", "", "1.5", "ü 😀"]
    rows = [{"text": text, "number": index + 0.5} for index, text in enumerate(texts)]
    runs.write_table(tmp_path / "a.csv", pd.DataFrame(rows))
    runs.write_rows(tmp_path / "b.csv", ([row] for row in rows))
    for name in ("a.csv", "b.csv"):
        found = pd.read_csv(tmp_path / name, keep_default_na=False)
        assert found.text.tolist() == texts and found.number.tolist() == [
            row["number"] for row in rows
        ]
