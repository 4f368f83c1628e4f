"""A run that is killed at any moment goes on where it was, and ends with the files of a run that
was not; so does one that several processes share."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from filelock import Timeout
from helpers import tiny
from helpers.command_line import SRC, arguments_of, stage1_flags

from grains import runs
from grains.errors import UserError

pytest_plugins = ("helpers.command_line",)

SAMPLES, PROMPTS = 4, 4
STAGES = {
    "token_ablation": SAMPLES,
    "steering_mc": 4,
    "steering_generation": PROMPTS,
}  # their units


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.write_jsonl(
        tmp_path_factory.mktemp("data") / "questions.jsonl", tiny.question_rows()
    )


@pytest.fixture(scope="module")
def script(model, questions, stage1):
    """name of a script, folder of its outputs -> the script and its arguments."""

    def arguments(name: str, folder: Path) -> list:
        if name == "token_ablation":
            return stage1_script(model, questions, folder)
        kept = ("model_name", "dataset_name", "dataset_path", "num_samples", "top_k")
        given = stage1_flags(model, questions, folder)
        given = {flag: given[flag] for flag in kept} | {
            "num_validation": 6,
            "methods": ["gradient", "random"],
            "alphas": 0.1,
            "hidden_states_path": stage1 / "states_pos.safetensors",
            "steering_vectors_dir": folder / "vectors",
            "output_dir": folder,
            "batch_tokens": 800,  # several batches
        }
        if name == "steering_generation":
            given |= {"layer_idxs": 1, "num_prompts": PROMPTS, "max_new_tokens": 24}
            given |= {"temperature": 0.8, "batch_tokens": 80}
        return [f"{name}.py", *arguments_of(given)]

    return arguments


def stage1_script(model: Path, questions: Path, folder: Path) -> list:
    flags = stage1_flags(model, questions, folder, num_samples=SAMPLES, ig_steps=6)
    return ["token_ablation.py", *arguments_of(flags)]


@pytest.fixture(scope="module")
def stage1(commands, model, questions, tmp_path_factory):
    """The folder of a stage 1 that was not interrupted."""
    folder = tmp_path_factory.mktemp("stage1")
    commands.run(*stage1_script(model, questions, folder)).ok()
    return folder


@pytest.fixture(scope="module")
def whole(commands, script, stage1, tmp_path_factory):
    """name of a script -> the files of a run that was not interrupted."""
    made = {"token_ablation": contents(stage1)}

    def run(name: str) -> dict[str, bytes]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            commands.run(*script(name, folder)).ok()
            made[name] = contents(folder)
        return made[name]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The outputs in a folder; parts, locks and files that are being written are none."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and ".parts" not in str(path)
        and path.suffix != ".lock"
        and not path.name.startswith(".")
    }


def wait_for_parts(folder: Path, count: int, process) -> None:
    while process.running() and len(list(folder.glob("*.parts/0*"))) < count:
        time.sleep(0.002)


@pytest.mark.parametrize(
    "name, kills",
    [
        # After the manifest of the parts, after each part, and after each of the outputs.
        ("token_ablation", [1, *[2] * SAMPLES, 2, 3, 4, 5]),
        # The two vectors are written before the first part.
        ("steering_mc", [2, 3, 2, 2, 2, 2, 3, 4, 5]),
        ("steering_generation", [*[2] * (PROMPTS + 1), 3]),
    ],
)
def test_killed_after_a_write(commands, script, whole, tmp_path, name, kills):
    for count in kills:
        result = commands.run(*script(name, tmp_path), die_after=count)
        assert result.code == -signal.SIGKILL, result
        assert contents(tmp_path).items() <= whole(name).items()  # what is there is whole
    commands.run(*script(name, tmp_path)).ok()
    assert contents(tmp_path) == whole(name)
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.lock"))


# The phases of a run, as its files show them.
START, PARTS, MERGE, END = range(4)


def opened(folder: Path) -> list[int] | None:
    """What changes when a process opens the run in a folder."""
    with suppress(FileNotFoundError):
        return [path.stat().st_mtime_ns for path in folder.glob("*.parts/manifest.json")]


def phase(folder: Path, units: int, before: list[int]) -> int:
    """How far a process is, when it found `opened(folder) == before`."""
    if list(folder.glob("*.manifest.json")):
        return END
    if opened(folder) == before:
        return START
    return MERGE if len(list(folder.glob("*.parts/0*"))) == units else PARTS


@pytest.mark.parametrize("name", ["token_ablation", "steering_generation"])
def test_killed_at_random_moments(commands, script, whole, tmp_path, name):
    """SIGKILL in every phase of a run, each time in what the last one left.

    Of the two ways to make units: one after the other, which steering_mc shares, and together.
    """
    folder, kept, units = tmp_path / "run", tmp_path / "kept", STAGES[name]
    process, begins = commands.start(*script(name, folder)), {}
    while process.running():
        begins.setdefault(phase(folder, units, []), time.monotonic())
    edges = [*(begins[number] for number in (START, PARTS, MERGE, END)), time.monotonic()]
    lasts = [end - begin for begin, end in pairwise(edges)]
    chance = random.Random(name)

    def killed_in(wanted: int, share: float) -> bool:
        """Whether the kill fell in that phase, in a share of its time; else all is put back."""
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        before = opened(folder)
        last = lasts[START if phase(folder, units, before) == wanted else wanted]
        process = commands.start(*script(name, folder))
        while process.running() and phase(folder, units, before) < wanted:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, share * last))
        if process.running():
            process.kill()
        hit = process.wait().code == -signal.SIGKILL and phase(folder, units, before) == wanted
        if not hit:
            shutil.rmtree(folder)
            shutil.copytree(kept, folder)
        shutil.rmtree(kept)
        return hit

    shutil.rmtree(folder)
    folder.mkdir()
    for wanted in (START, PARTS, PARTS, MERGE, MERGE, END):
        # What is left of a phase may be shorter than it was in a whole run: ever sooner.
        assert any(killed_in(wanted, 0.9**attempt) for attempt in range(50))
        assert contents(folder).items() <= whole(name).items()  # what is there is whole
    commands.run(*script(name, folder)).ok()
    assert contents(folder) == whole(name)
    assert not [
        path
        for path in folder.iterdir()
        if path.name.startswith(".") or path.suffix in (".parts", ".lock")
    ]


def test_finished_parts_are_not_done_again(commands, script, tmp_path):
    commands.run(*script("token_ablation", tmp_path), die_after=3)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parts/0*")}
    assert len(times) == 2
    commands.run(*script("token_ablation", tmp_path), die_after=2)
    assert (
        times.items()
        < {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parts/0*")}.items()
    )


def test_interrupted(commands, script, whole, tmp_path):
    process = commands.start(*script("token_ablation", tmp_path))
    wait_for_parts(tmp_path, 1, process)
    process.kill(signal.SIGINT)
    result = process.wait()
    assert result.code == 130 and "Traceback" not in result.err
    assert "run the same command again to go on" in result.err.splitlines()[-1]
    commands.run(*script("token_ablation", tmp_path)).ok()
    assert contents(tmp_path) == whole("token_ablation")


def test_overwriting_is_taken_up_again(commands, script, whole, tmp_path):
    commands.run(*script("token_ablation", tmp_path), "--seed", 1).ok()
    again = [*script("token_ablation", tmp_path), "--overwrite"]
    commands.run(*again, die_after=3)
    assert len(list(tmp_path.glob("*.parts/0*"))) == 2
    assert "2/4" in commands.run(*again).ok().err.strip().split("\r")[0]
    assert contents(tmp_path) == whole("token_ablation")


@pytest.mark.parametrize("name", STAGES)
def test_the_seed_decides(commands, script, whole, tmp_path, name):
    """Another gives other files; that the same gives the same, the other tests of this file see."""
    commands.run(*script(name, tmp_path), "--seed", 1).ok()
    other = contents(tmp_path).values()
    assert not any(
        content in other for path, content in whole(name).items() if path.endswith(".csv")
    )


# --- several processes ---


@pytest.mark.parametrize("name", STAGES)
def test_two_processes(commands, script, whole, tmp_path, name):
    for _ in range(2):
        first, second = [
            process.wait().ok() for process in commands.together(*script(name, tmp_path))
        ]
        assert contents(tmp_path) == whole(name)
        assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.lock"))
    assert "nothing to do" in first.out and not second.out


def test_two_processes_take_up_what_one_began(commands, script, whole, tmp_path):
    commands.run(*script("token_ablation", tmp_path), die_after=3)
    for process in commands.together(*script("token_ablation", tmp_path)):
        process.wait().ok()
    assert contents(tmp_path) == whole("token_ablation")


def test_two_processes_are_refused_as_one(commands, script, whole, tmp_path):
    commands.run(*script("token_ablation", tmp_path)).ok()
    first, second = [
        process.wait()
        for process in commands.together(*script("token_ablation", tmp_path), "--seed", 1)
    ]
    assert "other settings" in first.error()
    assert second.code == 1 and not second.err
    assert contents(tmp_path) == whole("token_ablation")


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_dies(commands, script, whole, tmp_path, killed):
    processes = commands.together(*script("token_ablation", tmp_path), "--ig_steps", 40)
    wait_for_parts(tmp_path, 1, processes[killed])
    processes[killed].kill()
    other = processes[1 - killed].wait()
    assert other.code == 1 and "Traceback" not in other.err
    assert "another process of this run has stopped" in other.err
    assert "run the same command again" in other.err
    commands.run(*script("token_ablation", tmp_path), "--ig_steps", 40).ok()


def test_accelerate_launch(commands, script, whole, tmp_path):
    """Its --cpu starts a single process, whatever --num_processes says; --multi_gpu starts all,
    and they find that there is no GPU."""
    arguments = [str(item) for item in script("token_ablation", tmp_path)]
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            str(commands.free_port()),
            *arguments,
        ],
        cwd=SRC,
        env=commands.environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{SAMPLES // 2}/{SAMPLES // 2}" in ended.stderr  # the other half is the other's
    assert contents(tmp_path) == whole("token_ablation")


def test_the_cause_of_an_output_that_is_locked_is_kept(tmp_path):
    """--debug shows it."""
    first = runs.Run([tmp_path / "a.csv"], {"a": 1})
    with pytest.raises(UserError, match=r"another run is writing .*a.csv'") as error:
        runs.Run([tmp_path / "a.csv"], {"a": 1})
    assert isinstance(error.value.__cause__, Timeout)
    (tmp_path / "a.csv").touch()
    first.finish()  # and releases the lock
