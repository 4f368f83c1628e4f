"""A user's mistake is one line that says what was expected, what was found and what to do; the
exit status is not zero, there is no traceback, and earlier results stay as they are."""

from __future__ import annotations

import json
import shutil
import time

import pandas as pd
import pytest
import torch
from helpers import tiny
from helpers.command_line import arguments_of, stage1_flags
from helpers.families import mounted_disk

from grains.errors import UserError
from steering_generation import chosen_grid

pytest_plugins = ("helpers.command_line",)

SAMPLES, LAYERS = 4, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("models") / "tiny", layers=LAYERS)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return tiny.write_jsonl(
        tmp_path_factory.mktemp("data") / "questions.jsonl", tiny.question_rows()
    )


@pytest.fixture(scope="module")
def stage1(commands, model, questions):
    """Starts stage 1 with outputs in a folder; further flags come last, so that they count."""

    def run(folder, *more, start=False, **options):
        begin = commands.start if start else commands.run
        words = arguments_of(stage1_flags(model, questions, folder))
        return begin("token_ablation.py", *words, *more, **options)

    return run


@pytest.fixture(scope="module")
def stage2(commands, model, questions, done):
    """Starts stage 2 (or 3) on the finished stage 1."""

    def run(folder, *more, script="steering_mc.py", **options):
        flags = {
            "model_name": model,
            "dataset_name": "questions",
            "dataset_path": questions,
            "num_samples": SAMPLES,
            "num_validation": 4,
            "methods": ["mean", "random"],
            "alphas": 0.1,
            "layer_idxs": 1,
            "hidden_states_path": done / "states_pos.safetensors",
            "hidden_states_neg_path": done / "states_neg.safetensors",
            "steering_vectors_dir": folder / "vectors",
            "output_dir": folder / "results",
        }
        return commands.run(script, *arguments_of(flags), *more, **options)

    return run


@pytest.fixture(scope="module")
def done(stage1, tmp_path_factory):
    """The folder of a finished stage 1."""
    folder = tmp_path_factory.mktemp("done")
    stage1(folder).ok()
    return folder


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- model ---


@pytest.mark.parametrize(
    "name, expected",
    [
        ("/nowhere/model", ["/nowhere/model", "does not exist", "smollm2-135m-instruct"]),
        ("no such model", ["no such model", "hub id or a local folder"]),
    ],
)
def test_unknown_model(stage1, tmp_path, name, expected):
    message = stage1(tmp_path, "--model_name", name).error()
    assert all(part in message for part in expected)


def change_weights(model, folder, change):
    """A copy of the model whose weights are changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_are_nan(stage1, model, tmp_path):
    broken = change_weights(
        model,
        tmp_path / "nan",
        lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan),
    )
    message = stage1(tmp_path, "--model_name", broken).error()
    assert "NaN" in message and "float32" in message


def test_weights_that_are_missing(stage1, model, tmp_path):
    broken = change_weights(
        model, tmp_path / "some", lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight")
    )
    message = stage1(tmp_path, "--model_name", broken).error()
    assert "model.layers.1.mlp.up_proj.weight" in message and "make it" in message


def test_weights_cut_short(stage1, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "short")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = stage1(tmp_path, "--model_name", broken).error()
    assert str(broken) in message and "local folder" in message


# --- data ---


def test_unknown_dataset(stage1, tmp_path, commands, model):
    message = commands.run(
        "token_ablation.py", "--model_name", model, "--dataset_name", "trivia"
    ).error()
    assert "unknown data set 'trivia'" in message and "truthfulqa" in message
    assert "dataset_path" in message
    message = stage1(tmp_path, "--dataset_path", tmp_path / "nowhere.jsonl").error()
    assert "nowhere.jsonl' does not exist" in message


def test_unknown_column(stage1, tmp_path):
    rows = [{"question": "Is it?", "chosen": "Yes", "worse": "No"}]
    path = tiny.write_jsonl(tmp_path / "columns.jsonl", rows)
    message = stage1(tmp_path, "--dataset_path", path).error()
    assert "column rejected missing" in message and "found question, chosen, worse" in message
    message = stage1(tmp_path, "--dataset_name", "truthfulqa", "--dataset_path", path).error()
    assert "columns choices, label missing" in message and str(path) in message


def test_unknown_split(stage1, tmp_path, questions):
    message = stage1(tmp_path, "--split", "dev").error()
    assert "split 'dev'" in message and "split" in message
    rows = [row | {"split": "train"} for row in tiny.question_rows()]
    path = tiny.write_jsonl(tmp_path / "split.jsonl", rows)
    message = stage1(tmp_path, "--dataset_path", path, "--split", "dev").error()
    assert "no split 'dev'" in message and "found train" in message


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"question": " "}, "an empty question"),
        ({"question": None}, "an empty question"),
        ({"choices": ["No", " "]}, "an empty answer"),
        ({"choices": None}, "an empty choices"),
        ({"choices": ["No"]}, "a single answer"),
        ({"label": 2}, "label 2 does not name one of 2 choices"),
        ({"choices": ["No", "\u0001\u0002"]}, "tokenizes to nothing"),
        ({"question": "Why? " * 200}, "more than the 256"),
    ],
)
def test_bad_row(stage1, tmp_path, row, expected):
    good = tiny.question_rows()[:3]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [good[0], good[1] | row, good[2]])
    message = stage1(tmp_path, "--dataset_path", path).error()
    assert expected in message
    assert "row 2" in message or "example " in message
    assert not (tmp_path / "tokens.csv").exists()


def test_csv(stage1, tmp_path):
    """A whole table is read; one that is cut short or is none gives the line and the file."""
    rows = [row | {"choices": json.dumps(row["choices"])} for row in tiny.question_rows(6)]
    path = tmp_path / "rows.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    whole = path.read_text()
    stage1(tmp_path, "--dataset_path", path).ok()
    before = contents(tmp_path)

    path.write_text(whole[: whole.rindex('""')])
    message = stage1(tmp_path, "--dataset_path", path).error()
    assert str(path) in message and "whole" in message
    path.write_text(whole.replace("[", ""))
    message = stage1(tmp_path, "--dataset_path", path).error()
    assert f"{path}, row " in message and "expected a list" in message
    path.write_bytes(b"\x00\xff\xfe" * 50)
    assert str(path) in stage1(tmp_path, "--dataset_path", path).error()
    del before[path]
    assert before.items() <= contents(tmp_path).items()


def test_more_tokens_than_the_prompt_has(stage1, tmp_path):
    result = stage1(tmp_path, "--top_k", 500).ok()
    warnings = [line for line in result.out.splitlines() if "warning" in line]
    assert len(warnings) == 1 and f"{SAMPLES} prompts have fewer" in warnings[0]
    table = pd.read_csv(tmp_path / "tokens.csv")
    assert (table.k < 500).all()
    assert [len(json.loads(item)[0]) for item in table.selected_positions] == table.k.tolist()


# --- hidden states and layers ---


def test_layer_that_does_not_exist(stage2, tmp_path):
    message = stage2(tmp_path, "--layer_idxs", 1, LAYERS).error()
    assert f"layer {LAYERS} does not exist" in message and f"0 to {LAYERS - 1}" in message
    assert "expected whole numbers" in stage2(tmp_path, "--layer_idxs", "last").error()
    assert not contents(tmp_path)


def test_states_of_another_model(stage2, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=1, layers=LAYERS)
    message = stage2(tmp_path, "--model_name", other).error()
    assert "of another model" in message and str(other) in message


def test_states_of_different_runs(stage1, stage2, tmp_path):
    stage1(tmp_path, "--seed", 1, "--top", "neg").ok()
    message = stage2(
        tmp_path, "--mode", "both", "--hidden_states_neg_path", tmp_path / "states.safetensors"
    ).error()
    assert "different runs" in message and "seed" in message


def test_methods_that_need_an_ablation_where_there_is_none(stage1, stage2, tmp_path):
    stage1(tmp_path, "--grad_method", "none").ok()
    flags = ("--grad_method", "none", "--hidden_states_path", tmp_path / "states.safetensors")
    before = contents(tmp_path)
    message = stage2(tmp_path, *flags, "--mode", "both").error()
    assert "without ablation" in message and "mean" in message
    assert contents(tmp_path) == before
    stage2(tmp_path, *flags, "--methods", "gradient", "caa").ok()


def test_states_of_the_other_selection(stage2, done, tmp_path):
    """Taken for pos - neg, one file given twice would be a vector of zeros."""
    pos, neg = done / "states_pos.safetensors", done / "states_neg.safetensors"
    message = stage2(tmp_path, "--hidden_states_path", neg).error()
    assert str(neg) in message and "holds the 'neg' hidden states" in message
    message = stage2(tmp_path, "--mode", "both", "--hidden_states_neg_path", pos).error()
    assert str(pos) in message and "expected the 'neg' ones" in message
    assert not contents(tmp_path)


def test_vectors_of_zeros_are_named(stage1, stage2, tmp_path):
    """Where k is not exceeded, pos and neg ablate the same tokens, and v_pos - v_neg is zero."""
    stage1(tmp_path, "--top_k", 500).ok()
    states = [
        flag
        for top, name in (("pos", "path"), ("neg", "neg_path"))
        for flag in (f"--hidden_states_{name}", tmp_path / f"states_{top}.safetensors")
    ]
    out = stage2(tmp_path, *states, "--mode", "pos", "both").ok().out
    assert out.count("note: ") == 1 and "note: mean both is a vector of zeros" in out


def test_states_that_are_missing_or_damaged(stage2, done, tmp_path):
    message = stage2(tmp_path, "--hidden_states_path", tmp_path / "none.safetensors").error()
    assert "do not exist" in message and "token_ablation.py" in message
    whole = (done / "states_pos.safetensors").read_bytes()
    short = tmp_path / "short.safetensors"
    for content in (whole[:-100], whole[:50], b"", b"no such format" * 9):
        short.write_bytes(content)
        message = stage2(tmp_path, "--hidden_states_path", short).error()
        assert str(short) in message and "make it again" in message
    message = stage2(tmp_path, "--hidden_states_path", done / "tokens.csv").error()
    assert "tokens.csv" in message


def test_no_configuration_chosen_yet(stage2, commands, model, questions, done, tmp_path):
    message = commands.run(
        "steering_generation.py",
        "--model_name",
        model,
        "--dataset_name",
        "questions",
        "--dataset_path",
        questions,
        "--chosen_path",
        tmp_path / "chosen.json",
    ).error()
    assert "no configuration is chosen yet" in message and "steering_mc.py" in message


CHOSEN = {
    "configuration": "mean pos @ 1 x 0.1",
    "method": "mean",
    "mode": "pos",
    "layers": [0, 1],
    "alpha": 0.1,
    "alpha_units": "relative",
    "chosen_on": "validation",
    "controls": ["random"],
}


def test_a_chosen_configuration_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(CHOSEN))
    grid = chosen_grid(path)
    assert (grid.methods, grid.modes, grid.layers) == (("mean", "random"), ("pos",), ("0-1",))
    assert (grid.alphas, grid.units, grid.layer_mode) == ((0.1,), "relative", "joint")
    path.write_text(json.dumps(CHOSEN | {"method": "gradient", "mode": "", "controls": []}))
    assert chosen_grid(path).methods == ("gradient",)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("method", value) for value in ("base", "trained", ["mean"], None, 5)),
        *(("mode", value) for value in ("", "neg", None, ["pos"])),
        *(("layers", value) for value in ("all", [], [1.0], [True], [1, 1], [2, 1], [-1], None)),
        *(("alpha", value) for value in (float("nan"), float("inf"), 10**400, "0.1", True, None)),
        *(("alpha_units", value) for value in ("relativ", None, ["relative"])),
        *(("controls", value) for value in ("random", ["mean"], [["random"]], None)),
    ],
)
def test_a_chosen_configuration_that_was_changed(tmp_path, name, value):
    """Unknown words would steer by something else under the chosen one's label."""
    path = tmp_path / "chosen.json"
    path.write_text(json.dumps(CHOSEN | {name: value}))
    with pytest.raises(UserError, match="was it changed") as error:
        chosen_grid(path)
    assert str(error.value).startswith(f"'{path}', {name}: expected")


@pytest.mark.parametrize(
    "content", ["[]", "{}", "5", "null", "[" * 100_000], ids=lambda text: text[:6]
)
def test_a_file_that_is_no_chosen_configuration(tmp_path, content):
    path = tmp_path / "chosen.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"chosen\.json"):
        chosen_grid(path)


def test_controls_alone_are_refused_before_they_are_scored(stage2, tmp_path):
    message = stage2(tmp_path, "--methods", "random", "shuffled").error()
    assert "--methods random shuffled: all are controls" in message and not contents(tmp_path)


def test_more_new_tokens_than_the_context(stage2, tmp_path):
    """A text that never ends, by a model that ends none."""
    message = stage2(
        tmp_path, "--max_new_tokens", 2**31 - 1, script="steering_generation.py"
    ).error()
    assert "max_new_tokens 2147483647: expected 1 to 256" in message and not contents(tmp_path)


def test_no_questions_left(stage2, tmp_path):
    message = stage2(tmp_path, "--num_validation", 500).error()
    assert "0 test questions are left" in message and "num_validation" in message


# --- outputs ---


def test_folder_that_cannot_be_written(stage1, stage2, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    message = stage1(file / "below").error()
    assert str(file) in message and "give other output paths" in message
    message = stage2(tmp_path, "--output_dir", file / "below").error()
    assert str(file) in message
    message = stage2(tmp_path, "--steering_vectors_dir", file / "below").error()
    assert str(file) in message
    assert file.read_text() == "mine"


def test_other_flags_are_refused(stage1, stage2, done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "done")
    before = contents(folder)
    message = stage1(folder, "--seed", 1).error()
    assert "other settings" in message and "seed: 0 instead of 1" in message
    assert "overwrite" in message and contents(folder) == before
    assert "nothing to do" in stage1(folder).ok().out and contents(folder) == before
    stage1(folder, "--seed", 1, "--overwrite").ok()
    after = contents(folder)
    assert after.keys() == before.keys()
    assert all(after[path] != before[path] for path in before)

    stage2(tmp_path).ok()
    before = contents(tmp_path)
    message = stage2(tmp_path, "--batch_tokens", 512).error()
    assert "batch_tokens: 2048 instead of 512" in message and contents(tmp_path) == before
    stage2(tmp_path, "--alphas", 0.2).ok()  # is in the names: a run beside the first
    after = contents(tmp_path)
    assert len(after) > len(before) and after.items() >= before.items()
    stage2(tmp_path, "--batch_tokens", 512, "--overwrite").ok()
    assert contents(tmp_path).keys() == after.keys()


def test_files_of_somebody_else_are_kept(stage1, stage2, questions, tmp_path):
    """--overwrite replaces what these scripts wrote, and nothing else."""
    mine = tmp_path / "tokens.csv"
    mine.write_text("my own")
    for more in ((), ("--overwrite",)):
        message = stage1(tmp_path, *more).error()
        assert f"'{mine}'" in message and "move it away" in message
        assert contents(tmp_path) == {mine: b"my own"}
    message = stage1(tmp_path, "--output_path_meta", questions, "--overwrite").error()
    assert f"'{questions}', which this run reads" in message

    mine = tmp_path / "vectors" / "states_pos_mean_pos.safetensors"
    mine.parent.mkdir()
    mine.write_text("my own")
    for more in ((), ("--overwrite",)):
        message = stage2(tmp_path, *more).error()
        assert f"'{mine}' was not written by these scripts" in message
        assert mine.read_text() == "my own"


def test_vectors_of_another_run_are_kept(stage1, stage2, done, tmp_path):
    """Their file is named after that of the hidden states, and another run's may have its name."""
    stage2(tmp_path).ok()
    before = contents(tmp_path / "vectors")
    assert [path.name for path in before] == [
        "states_pos_mean_pos.safetensors",
        "states_pos_random_seed0.safetensors",
    ]
    other = tmp_path / "other"
    stage1(
        other, "--top", "pos", "--top_k", 2, "--output_path_hidden", other / "states_pos.st"
    ).ok()
    again = ["--hidden_states_path", other / "states_pos.st", "--output_dir", other / "results"]
    message = stage2(tmp_path, *again).error()
    assert "states_pos_mean_pos" in message and "from another run (settings.top_k: 3" in message
    assert contents(tmp_path / "vectors") == before
    stage2(tmp_path, *again, "--overwrite").ok()
    after = contents(tmp_path / "vectors")
    assert after.keys() == before.keys()
    assert not any(after[path] == before[path] for path in before)
    assert "from another run" in stage2(tmp_path).error()  # finished, but its vectors are gone

    shutil.rmtree(tmp_path / "vectors")
    assert "nothing to do" in stage2(tmp_path).ok().out  # and the vectors are written again
    assert contents(tmp_path / "vectors") == before


def test_damaged_manifest(stage1, done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "done")
    manifest = folder / "tokens.manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    before = contents(folder)
    message = stage1(folder).error()
    assert str(manifest) in message and "cut short" in message and contents(folder) == before
    stage1(folder, "--overwrite").ok()
    assert json.loads(manifest.read_text())["seed"] == 0


def test_an_output_that_was_removed_is_made_again(stage1, done, tmp_path):
    folder = shutil.copytree(done, tmp_path / "done")
    (folder / "states_neg.safetensors").unlink()
    stage1(folder).ok()
    assert {path.name: content for path, content in contents(folder).items()} == {
        path.name: content for path, content in contents(done).items()
    }


def test_two_runs_at_once(stage1, tmp_path):
    first = stage1(tmp_path, "--ig_steps", 200, start=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("tokens.parts/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    message = stage1(tmp_path, "--ig_steps", 200).error()
    assert "another run is writing" in message
    assert "wait for it" in message
    first.wait().ok()
    assert not list(tmp_path.glob("*.lock")) and not list(tmp_path.glob("*.parts"))


def test_file_too_large(stage1, done, tmp_path):
    """No file may grow beyond a limit: the same as a disk that is full in the middle of one."""
    folder = shutil.copytree(done, tmp_path / "done")
    before = contents(folder)
    message = stage1(
        folder,
        "--seed",
        1,
        "--output_path_meta",
        folder / "other.csv",
        "--output_path_hidden",
        folder / "other.safetensors",
        largest_file=6000,
    ).error()
    assert "could not be written" in message and "free some space" in message
    assert before.items() <= contents(folder).items()
    assert not (folder / "other.csv").exists() and not list(folder.rglob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path / "disk", "64k") as folder:
        yield folder


def test_full_disk(stage1, small_disk):
    """Refused at the start; or, if the space goes later, ended and taken up again."""
    mine = small_disk / "mine"
    mine.write_bytes(b"x" * 1000)
    message = stage1(small_disk, "--num_samples", 20).error()
    assert "MiB free, the run needs" in message and mine.read_bytes() == b"x" * 1000

    filling = small_disk / "filling"
    with open(filling, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(filling.stat().st_size - 3 * 4096)
    message = stage1(small_disk, "--num_samples", 1).error()
    assert "free" in message and str(small_disk) in message
    filling.unlink()
    stage1(small_disk, "--num_samples", 1).ok()
    assert mine.read_bytes() == b"x" * 1000
