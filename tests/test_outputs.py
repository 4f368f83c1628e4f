"""The outputs of a run: what they may replace, what lies beside them, and what they may be called.

Runs without a model, in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from grains import runs
from grains.errors import UserError


def do(outputs, manifest=None, overwrite=False, **options) -> bool:
    """A run of one unit, each output a table that names the manifest's `content`."""
    manifest = manifest or {"content": 0}

    def write(units):
        for path in outputs:
            runs.write_table(path, pd.DataFrame([manifest]))

    return runs.resume(
        outputs, manifest, 1, lambda unit: ({}, []), write, "unit", overwrite, **options
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- what a run may replace ---


def test_only_what_these_scripts_wrote_is_replaced(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    assert do([first, second])
    assert not do([first, second])
    assert do([first, second], {"content": 1}, overwrite=True)
    assert second.read_text() == '"content"\n1\n'

    mine = tmp_path / "mine.csv"  # beside a manifest that does not name it
    mine.write_text("mine")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"mine\.csv' was not written by these scripts"):
        do([first, mine], {"content": 2}, overwrite=True)
    assert files(tmp_path) == before


def test_a_table_in_another_folder_than_the_manifest_is_not_taken_for_our_own(tmp_path):
    """A manifest names its outputs without their folder."""
    do([tmp_path / "a.csv", tmp_path / "b.csv"])
    mine = tmp_path / "mine" / "b.csv"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(UserError, match="was not written by these scripts"):
        do([tmp_path / "a.csv", mine], {"content": 1}, overwrite=True)
    assert mine.read_text() == "mine"


def test_weights_of_a_model_are_not_replaced(tmp_path):
    weights = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, weights, {"format": "pt"})
    before = files(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="move it away"):
            do([tmp_path / "a.csv", weights], overwrite=overwrite)
    assert files(tmp_path) == before
    runs.write_tensors(weights, {"w": torch.ones(2)}, {"stage": "token_ablation"})
    assert do([tmp_path / "a.csv", weights], overwrite=True)


def test_a_manifest_of_somebody_else_is_kept(tmp_path):
    mine = tmp_path / "a.manifest.json"
    mine.write_text('{"name": "a web app"}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"a\.manifest\.json' was not|other settings"):
            do([tmp_path / "a.csv"], overwrite=overwrite)
    assert files(tmp_path) == {mine.name: b'{"name": "a web app"}'}


@pytest.mark.parametrize(
    "content", ["[]", "5", "null", '"x"', "{", "[" * 100_000], ids=lambda text: text[:6]
)
@pytest.mark.parametrize("beside", ["a.manifest.json", "a.parts/manifest.json"])
def test_a_damaged_manifest_is_one_line_and_overwriting_mends_it(tmp_path, beside, content):
    do([tmp_path / "a.csv"])
    whole = files(tmp_path)
    (tmp_path / "a.parts").mkdir()
    if "/" in beside:
        (tmp_path / "a.manifest.json").unlink()
    (tmp_path / beside).write_text(content)
    with pytest.raises(UserError, match=r"JSON object|cannot be read") as error:
        do([tmp_path / "a.csv"])
    assert str(tmp_path / beside) in str(error.value) and len(str(error.value)) < 400
    assert do([tmp_path / "a.csv"], overwrite=True)
    assert files(tmp_path) == whole


def test_folders_where_files_are_due(tmp_path):
    (tmp_path / "a.manifest.json").mkdir()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"a\.manifest\.json' is a folder"):
            do([tmp_path / "a.csv"], overwrite=overwrite)
    (tmp_path / "b.parts").write_text("mine")
    with pytest.raises(UserError, match=r"b\.parts' is no folder of unfinished results"):
        do([tmp_path / "b.csv"], overwrite=True)
    assert (tmp_path / "b.parts").read_text() == "mine"


@pytest.mark.parametrize("path", [".", "/", "..", "", "/tmp"])
def test_a_path_that_is_a_folder(path):
    with pytest.raises(UserError, match="is a folder: give the path of a file"):
        do([Path(path)])


def test_a_lock_file_of_somebody_else_is_kept(tmp_path):
    """poetry.csv would be locked by poetry.lock."""
    mine = tmp_path / "poetry.lock"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"poetry\.lock' was not written by these scripts"):
        do([tmp_path / "poetry.csv"], overwrite=True)
    with pytest.raises(UserError, match=r"poetry\.lock' was not written by these scripts"):
        runs.write_shared(tmp_path / "poetry.st", {}, {})
    assert mine.read_text() == "mine"


def test_outputs_of_one_stem_share_a_lock(tmp_path):
    assert do([tmp_path / "x.csv", tmp_path / "x.tsv"])
    assert sorted(files(tmp_path)) == ["x.csv", "x.manifest.json", "x.tsv"]


@pytest.mark.parametrize("name", ["a.csv", "a.manifest.json", "a.parts"])
def test_two_outputs_with_one_path(tmp_path, name):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="two outputs have one path"):
        do([tmp_path / "a.csv", tmp_path / "link" / name])


def test_an_output_is_no_input(tmp_path):
    """Neither the same file, by whatever name, nor one in a folder that is read as data."""
    data = tmp_path / "data" / "a.csv"
    data.parent.mkdir()
    do([data])  # our own, which --overwrite would replace
    (tmp_path / "link.csv").symlink_to(data)
    os.link(data, tmp_path / "hard.csv")
    for output in (data, tmp_path / "link.csv", tmp_path / "hard.csv"):
        with pytest.raises(UserError, match="which this run reads"):
            do([output], overwrite=True, inputs=[None, data])
    with pytest.raises(UserError, match=r"lies in .*, which this run reads"):
        do([data.parent / "new" / "b.csv"], inputs=[str(data.parent)])
    assert do([tmp_path / "b.csv"], inputs=["hub/id", data.parent])


# --- names ---


@pytest.mark.parametrize("suffix", [".csv", ""])
@pytest.mark.parametrize("letter", ["n", "ü"])
def test_a_name_that_is_too_long_is_refused_before_the_computing(tmp_path, letter, suffix):
    def path(length: int) -> Path:
        return tmp_path / (letter * ((length - len(suffix)) // len(letter.encode())) + suffix)

    def never(unit):
        raise AssertionError("computed")

    longest = None
    for length in range(255, 200, -1):
        try:
            do([path(length)])
            longest = length
            break
        except UserError as error:
            assert "too long: give one of at most" in str(error)
            room = int(str(error).split()[-2])
            with pytest.raises(UserError, match="too long"):
                runs.resume([path(length)], {}, 1, never, never, "")
    assert longest is not None and longest - len(letter.encode()) < room <= longest
    assert len(files(tmp_path)) == 2


def test_a_folder_whose_name_is_too_long(tmp_path):
    with pytest.raises(UserError, match=r"the name 'nnn.* is too long"):
        do([tmp_path / ("n" * 300) / "a.csv"])


# --- what a kill leaves ---


def a_process_that_ended() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_what_killed_runs_were_writing_is_removed(tmp_path):
    """The outputs', the manifest's and the vectors'; what a living process writes stays."""
    ended, living = a_process_that_ended(), os.getppid()
    vectors = tmp_path / "vectors" / "v.st"
    vectors.parent.mkdir()
    for path in (tmp_path / "a.csv", tmp_path / "a.manifest.json", vectors):
        path.with_name(f".{path.name}.{ended}.tmp").write_text("half")
    own = vectors.with_name(f".v.st.{living}.tmp")
    own.write_text("half")
    do([tmp_path / "a.csv"], shared={vectors: ({"v": torch.ones(2)}, {"stage": "s"})})
    assert sorted(files(tmp_path)) == [
        "a.csv",
        "a.manifest.json",
        str(own.relative_to(tmp_path)),
        "vectors/v.st",
    ]


def test_folders_that_killed_runs_were_filling_are_removed(tmp_path):
    path, process = tmp_path / "model", a_process_that_ended()
    for name in (".model.{}.tmp", ".model.{}.tmp2", ".models.{}.tmp"):
        folder = tmp_path / name.format(process)
        folder.mkdir()
        (folder / "half").write_text("half")
    runs.write_folder(path, {"stage": "s"}, lambda folder: (folder / "a").write_text("whole"))
    assert sorted(files(tmp_path)) == [
        f".model.{process}.tmp2/half",
        f".models.{process}.tmp/half",
        "model/a",
        "model/grains.json",
    ]


# --- files that several runs make alike ---


def test_shared_files(tmp_path):
    path, info = tmp_path / "v.st", {"stage": "s", "seed": 1}
    runs.write_shared(path, {"v": torch.ones(3)}, info)
    before = files(tmp_path)
    assert list(before) == ["v.st"]
    # The same, also but for rounding: kept as it is.
    runs.write_shared(path, {"v": torch.ones(3) + 1e-6}, info, overwrite=True)
    assert files(tmp_path) == before
    with pytest.raises(UserError, match=r"from another run \(seed: 1 instead of 2\)"):
        runs.write_shared(path, {"v": torch.ones(3)}, info | {"seed": 2})
    with pytest.raises(UserError, match=r"from another run \(other values\)"):
        runs.write_shared(path, {"v": torch.ones(3) + 1}, info)
    with pytest.raises(UserError, match="was not written by these scripts"):
        runs.write_shared(path, {"v": torch.ones(3)}, {"stage": "t"}, overwrite=True)
    assert files(tmp_path) == before
    runs.write_shared(path, {"v": torch.ones(4)}, info | {"seed": 2}, overwrite=True)
    tensors, found = runs.read_tensors(path)
    assert tensors["v"].tolist() == [1] * 4 and found["seed"] == 2


def test_shared_files_gain_what_was_not_made(tmp_path):
    """NaN is what a run has not made; what was there stays as it was."""
    path, info, none = tmp_path / "v.st", {"stage": "s"}, torch.nan
    runs.write_shared(path, {"v": torch.tensor([1.0, none, none])}, info)
    runs.write_shared(path, {"v": torch.tensor([1.0001, 2.0, none])}, info)
    assert runs.read_tensors(path)[0]["v"].nan_to_num(0).tolist() == [1, 2, 0]
    before = files(tmp_path)
    runs.write_shared(path, {"v": torch.tensor([none, 2.0, none])}, info)
    assert files(tmp_path) == before
    with pytest.raises(UserError, match=r"from another run \(other values\)"):
        runs.write_shared(path, {"v": torch.tensor([none, 3.0, 4.0])}, info)
    assert files(tmp_path) == before


@pytest.mark.parametrize("content", [b"", b"mine", b"\x08" + b"\0" * 7 + b"{}      "])
def test_a_shared_file_does_not_replace_what_is_not_ours(tmp_path, content):
    path = tmp_path / "v.st"
    path.write_bytes(content)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="was not written by these scripts"):
            runs.write_shared(path, {"v": torch.ones(3)}, {"stage": "s"}, overwrite)
    assert path.read_bytes() == content


def test_the_same_content_gives_the_same_file(tmp_path):
    """safetensors writes several entries of metadata in a new order at every save; we have one."""
    info = {"model": "m", "method": "caa", "seed": 0, "layers": "0-1", "units": "relative"}
    tensors = {"vectors": torch.ones(2, 3), "norms": torch.ones(2)}
    for number in range(10):
        runs.write_tensors(tmp_path / f"{number}", tensors, info)
    assert len(set(files(tmp_path).values())) == 1


# --- words ---


def test_what_differs_is_said_flags_first_and_in_few_words():
    run = {
        "stage": "s",
        "data": {"ids": [f"question {i}" for i in range(50)], "fingerprint": "a"},
        "flags": {"alphas": [0.1]},
        "model": {"weights": "a"},
        "seed": 0,
        "top": "t" * 300,
    }
    other = json.loads(json.dumps(run))
    other["data"]["ids"] = [f"question {i}" for i in range(1, 41)]
    other["data"]["fingerprint"] = "b"
    other["flags"]["alphas"] = [0.2]
    other["model"]["weights"] = "b"
    other["seed"] = 1
    other["top"] = "u" * 300
    assert runs.differences(run, other) == [
        "flags.alphas: [0.2] instead of [0.1]",
        "seed: 1 instead of 0",
        f"top: {'u' * 80}... instead of {'t' * 80}...",
        "data.fingerprint: b instead of a",
        "data.ids: 40 instead of 50",
        "model.weights: b instead of a",
    ]
    other["data"]["ids"] = [*run["data"]["ids"][:-2], "x", "y"]
    assert "data.ids: 2 of 50 are others" in runs.differences(run, other)
