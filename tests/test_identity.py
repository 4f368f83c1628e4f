"""A run is known by what it is made of: other weights, templates or pictures are another run."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers import tiny
from helpers.command_line import arguments_of, stage1_flags
from safetensors.torch import load_file, save_file

from grains import manifests

pytest_plugins = ("helpers.command_line",)
SAMPLES = 4


@pytest.fixture
def model(tmp_path):
    return tiny.save_model(tmp_path / "model")


def stage1_in(commands, folder):
    """Runs stage 1 with the model of a folder; its outputs lie in the folder too."""
    questions = tiny.write_jsonl(folder / "questions.jsonl", tiny.question_rows())

    def run(*more, **options):
        changes = {"top_k": 2, "ig_steps": 2, "prompt_style": "chat"}
        flags = stage1_flags(folder / "model", questions, folder / "out", **changes)
        return commands.run("token_ablation.py", *arguments_of(flags), *more, **options)

    return run


@pytest.fixture
def stage1(commands, model, tmp_path):
    return stage1_in(commands, tmp_path)


@pytest.fixture(scope="module")
def killed(commands, tmp_path_factory):
    """A stage 1 that was killed, and its folder."""
    folder = tmp_path_factory.mktemp("killed")
    tiny.save_model(folder / "model")
    run = stage1_in(commands, folder)
    assert run(die_after=3).code != 0
    return run, folder


def change_one_weight(model):
    """As a LoRA adapter merged into the same folder does: no norm, no size, one matrix."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def change_template(model):
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|bot|>", "<|bot|> "))


def change_config(model):
    path = model / "config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
        )
    )


def change_tokenizer(model):
    """Two words change places: no size differs."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))


def test_the_tokenizers_last_call_does_not_make_another_model(make_tiny):
    lm = make_tiny("llama")
    before = manifests.model(lm)
    lm.tokenizer(["it is"], truncation=True, max_length=1, padding="max_length")
    assert "LongestFirst" in lm.tokenizer.backend_tokenizer.to_str()
    assert manifests.model(lm) == before


CHANGES = {
    "weights": change_one_weight,
    "chat_template": change_template,
    "config": change_config,
    "tokenizer": change_tokenizer,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_model_that_changed_between_kill_and_resume_is_another(killed, what):
    run, folder = killed
    parts = sorted((folder / "out" / "tokens.parts").iterdir())
    assert len(parts) > 1
    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    CHANGES[what](folder / "model")
    message = run().error()
    for path, content in before.items():
        path.write_bytes(content)
    assert "other settings" in message and what in message
    assert sorted((folder / "out" / "tokens.parts").iterdir()) == parts


def test_a_finished_run_of_another_model_is_not_done(stage1, commands, model, tmp_path):
    stage1().ok()
    assert "nothing to do" in stage1().ok().out
    change_one_weight(model)
    assert "weights" in stage1().error()
    states = tmp_path / "out" / "states_pos.safetensors"
    message = commands.run(
        "steering_mc.py",
        "--model_name",
        model,
        "--dataset_name",
        "q",
        "--dataset_path",
        tmp_path / "questions.jsonl",
        "--num_samples",
        SAMPLES,
        "--hidden_states_path",
        states,
        "--methods",
        "mean",
        "--num_validation",
        4,
        "--output_dir",
        tmp_path / "mc",
    ).error()
    assert "another model" in message


def test_an_output_that_another_run_replaced_is_noticed(stage1, tmp_path):
    stage1().ok()
    other = tmp_path / "out" / "other.csv"
    stage1("--output_path_meta", other, "--seed", 1, "--overwrite").ok()  # the same states
    message = stage1().error()
    assert "states_pos.safetensors" in message and "changed or replaced" in message
    assert "nothing to do" in stage1("--output_path_meta", other, "--seed", 1).ok().out


def test_two_runs_that_share_an_output_do_not_run_at_once(stage1, tmp_path):
    from filelock import FileLock

    states = tmp_path / "out" / "states_neg.safetensors"
    states.parent.mkdir()
    with FileLock(states.with_suffix(".lock")):
        message = stage1().error()
    assert "another run is writing" in message and states.name in message
    stage1().ok()
    assert not list(states.parent.glob("*.lock"))


def test_two_outputs_with_one_path_are_refused(stage1, tmp_path):
    same = tmp_path / "out" / "same"
    message = stage1(
        "--top", "pos", "--output_path_meta", same, "--output_path_hidden", same
    ).error()
    assert "two outputs have one path" in message and not same.exists()


def test_a_folder_of_the_users_own_is_kept(stage1, tmp_path):
    own = tmp_path / "out" / "tokens.parts"
    own.mkdir(parents=True)
    (own / "mine.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        assert "no folder of unfinished results" in stage1(*more).error()
        assert (own / "mine.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_to_is_named(stage1):
    """Such a folder is no sign of another run."""
    message = stage1("--output_path_meta", "/proc/x.csv").error()
    assert "'/proc' cannot be written" in message


def test_damaged_parts_are_made_again(stage1, tmp_path):
    """One that was cut short, and one that is another unit's."""
    whole = tmp_path / "whole"
    stage1().ok()
    shutil.move(tmp_path / "out", whole)
    assert stage1(die_after=5).code != 0
    first, second, third = sorted((tmp_path / "out" / "tokens.parts").glob("0*"))[:3]
    damaged = [first.read_bytes()[:-100], third.read_bytes()]
    assert damaged[1] != second.read_bytes()
    for path, content in zip((first, second), damaged, strict=True):
        path.write_bytes(content)
    stage1().ok()
    for path in whole.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("value", ["-1", "1" + "0" * 23, "1.5", "x"])
def test_a_seed_out_of_range_is_one_line(stage1, value):
    result = stage1("--seed", value)
    assert result.code == 2 and "--seed" in result.err and "Traceback" not in result.err
