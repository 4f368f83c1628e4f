"""Stage 3 as a command: what acts on the choice of a token, what ends a text, and several draws."""

import json

import pandas as pd
import pytest
import torch
from helpers import tiny

from grains import models

pytest_plugins = ("helpers.command_line",)

PENALTIES = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}


@pytest.fixture(scope="module")
def written(commands, tmp_path_factory):
    """Runs stage 3 with flags -> its result, its table, its manifest."""
    folder = tmp_path_factory.mktemp("stage3")
    tiny.save_model(folder / "model")
    config = json.loads((folder / "model/generation_config.json").read_text()) | PENALTIES
    (folder / "model/generation_config.json").write_text(json.dumps(config))
    tiny.write_jsonl(folder / "questions.jsonl", tiny.question_rows())
    common = ["--model_name", folder / "model", "--dataset_name", "questions"]
    common += ["--dataset_path", folder / "questions.jsonl", "--num_samples", 2, "--top_k", 3]
    states = folder / "states.safetensors"
    first = ["--ig_steps", 2, "--output_path_meta", folder / "tokens.csv"]
    commands.run("token_ablation.py", *common, *first, "--output_path_hidden", states).ok()
    common += ["--hidden_states_path", folder / "states_pos.safetensors", "--num_validation", 4]
    common += ["--methods", "random", "caa", "--alphas", 0.3, "--num_prompts", 3]
    common += ["--steering_vectors_dir", folder / "vectors"]

    def run(name, *flags):
        output = folder / name
        result = commands.run("steering_generation.py", *common, "--output_dir", output, *flags)
        tables = [pd.read_csv(path, keep_default_na=False) for path in output.glob("*.csv")]
        manifests = [json.loads(path.read_text()) for path in output.glob("*.manifest.json")]
        return result, *tables, *manifests

    return run, folder / "model"


def own(lm, question, **settings):
    """What transformers' own decoding of the prompt alone gives."""
    text = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = lm.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    ids = lm.model.generate(**inputs, do_sample=False, max_new_tokens=12, **settings)
    new = ids[0, inputs.input_ids.shape[1] :]
    return lm.tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)


def test_the_models_own_settings_act_if_asked_for(written):
    run, folder = written
    lm = models.load(str(folder))
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    texts = {}
    for name, settings, acts in (("greedy", neutral, {}), ("model", {}, PENALTIES)):
        result, table, manifest = run(
            name, "--generation_config", name, "--max_new_tokens", 12, "--batch_tokens", 40
        )
        result.ok()
        assert manifest["decoding"]["acts"] == acts and manifest["temperature"] == 0
        said = "repetition_penalty 1.5" if acts else "nothing else acts"
        assert said in result.out
        for row in table.itertuples():
            text, tokens = own(lm, row.question, **settings)
            assert row.base == text
            assert row.base_ended == ("length" if tokens == 12 else "eos")
        texts[name] = table.steered.tolist()
        assert table.changed.any() and set(table.draw) == {0} and len(table) == 6
    assert texts["greedy"] != texts["model"]


def test_draws_and_stop_texts(written):
    run, _ = written
    flags = ["--temperature", 0.9, "--num_return", 3, "--max_new_tokens", 10, "--seed", 0]
    result, table, manifest = run("drawn", *flags)
    result.ok()
    assert len(table) == 3 * 2 * 3 and manifest["decoding"]["num_return"] == 3
    assert table.groupby(["prompt", "draw"]).base.nunique().eq(1).all()
    assert table.base.nunique() == 9 and list(table.draw[:3]) == [0, 1, 2]
    _, small, _ = run("drawn_in_small_batches", *flags, "--batch_tokens", 10)
    columns = ["prompt", "configuration", "draw", "base", "steered", "steered_ended"]
    pd.testing.assert_frame_equal(table[columns], small[columns])

    stop = table.base[0][len(table.base[0]) // 2]
    result, cut, manifest = run("stopped", *flags, "--stop", stop, "never there")
    result.ok()
    assert manifest["decoding"]["stop"] == [stop, "never there"]
    for before, after in zip(table.itertuples(), cut.itertuples(), strict=True):
        assert after.steered == before.steered.partition(stop)[0].strip()
        assert (after.steered_ended == "stop") == (stop in before.steered)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_new_tokens", 300], "max_new_tokens 300: expected 1 to 256"),
        (["--num_return", 2], "num_return 2: without a temperature"),
        (["--temperature", "1e-9"], "temperature 1e-09: expected 0"),
        (["--top_p", 3], "top_p 3.0: expected more than 0"),
        (["--stop", "a", ""], "stop: an empty text"),
    ],
)
def test_settings_that_are_refused(written, flags, message):
    run, _ = written
    result, *files = run("refused", *flags)
    assert message in result.error() and not files


def test_a_huge_limit_is_refused_by_the_flag(written):
    run, _ = written
    result, *_ = run("refused", "--max_new_tokens", 10**23)
    assert result.code == 2 and "expected a whole number from 1 to" in result.err


def test_no_global_random_numbers_are_used(written):
    """What is drawn elsewhere in the process changes nothing."""
    _, folder = written
    lm, drawn = models.load(str(folder)), []
    import grains

    for seed in (1, 2):
        torch.manual_seed(seed)
        drawn.append(grains.generate(lm, "Why?", temperature=1.0, max_new_tokens=6, num_return=2))
    assert drawn[0] == drawn[1] and len({*drawn[0]}) == 2
