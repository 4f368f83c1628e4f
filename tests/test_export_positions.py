"""Exports that steer at some positions: the folder's own code against our scores and texts."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import vlm_models
from helpers.decoding import text_of
from helpers.loading import load_in_this_process
from helpers.reference import example, no_hooks, words

import grains
from grains import export
from grains.errors import UserError
from grains.export import card, folders, plan
from grains.prompts import encode
from grains.settings import PromptSettings
from grains.steering import SteeringVectors

PLAIN = PromptSettings("plain")
PROMPTS = ["Why is glass", "The keeper wrote down the weather every"]
ANSWERS = [" solid", " a slow liquid"]
WORDS = ["prompt", "response", "last", "1:3", "-2:", ":-1"]


def vectors(lm):
    generator = torch.Generator().manual_seed(1)
    shape = len(lm.layers), lm.hidden_size
    norms = 40 * torch.rand(shape[0], generator=generator) + 40
    info = {"method": "gradient", "mode": "pos"}
    return SteeringVectors(torch.randn(shape, generator=generator), norms, info)


def written(lm, folder, positions):
    """The folder's model, by the code that lies in it, without the check of `export.write`."""
    folder.mkdir()
    folders.write_hf(plan.make(lm, vectors(lm), "hf", 0.5, [1, 2], "relative", positions), folder)
    spec = importlib.util.spec_from_file_location("steered", folder / folders.CODE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SteeredModel.from_pretrained(folder).eval()


def padded(lm, rows, side):
    inputs = [{"input_ids": torch.tensor([row])} for row in rows]
    ids = [item["input_ids"][0] for item in inputs]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=5, padding_side=side),
        "attention_mask": pad(
            [torch.ones_like(row) for row in ids], batch_first=True, padding_side=side
        ),
    }


@torch.no_grad()
@pytest.mark.parametrize("word", WORDS)
def test_a_folder_scores_and_writes_as_we_do(make_tiny, tmp_path, word):
    lm = make_tiny("llama")
    model = written(lm, tmp_path / "out", word)
    assert no_hooks(lm)
    steering = vectors(lm).at(0.5, [1, 2], positions=word)
    asked = [encode(lm, example(text, *ANSWERS), PLAIN) for text in PROMPTS]
    prompts = [item.prompt_ids for item in asked]

    # Scores of answers: rows of several lengths, padded on either side; one prompt's length, all's.
    base, expected = (
        np.concatenate([grains.score(lm, p, ANSWERS, style=PLAIN, steering=s) for p in PROMPTS])
        for s in (None, steering)
    )
    rows = [(item.prompt_ids, response) for item in asked for response in item.responses]
    lengths = torch.tensor([len(p) for p, _ in rows])
    for side in ("right", "left"):
        inputs = padded(lm, [p + a for p, a in rows], side)
        logits = model(**inputs, prompt_length=lengths).logits.log_softmax(-1)
        found = []
        for row, mask, (p, a) in zip(logits, inputs["attention_mask"], rows, strict=True):
            own = row[mask.bool()][len(p) - 1 : -1]
            found.append(own.gather(1, torch.tensor(a)[:, None]).sum().item())
        assert found == pytest.approx(expected, abs=2e-4)
    assert abs(expected - base).max() > 0.01

    # Greedy texts: prompts padded on the left, with a cache and without, alone and as beams.
    texts = [
        grains.generate(lm, p, style=PLAIN, max_new_tokens=8, steering=steering) for p in PROMPTS
    ]
    plain = [grains.generate(lm, p, style=PLAIN, max_new_tokens=8) for p in PROMPTS]
    assert texts != plain
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 5}
    inputs = padded(lm, prompts, "left")
    width = inputs["input_ids"].shape[1]
    for more in ({}, {"use_cache": False}):
        output = model.generate(**inputs, **options, **more)
        assert [text_of(lm, row[width:].tolist()) for row in output] == texts
    alone = torch.tensor([prompts[0]])
    output = model.generate(alone, **options)
    assert text_of(lm, output[0, len(prompts[0]) :].tolist()) == texts[0]

    # A cache of one's own, the prompt's length given at every step.
    past, ids, new = None, alone, []
    for _ in range(8):
        out = model(ids, past_key_values=past, use_cache=True, prompt_length=len(prompts[0]))
        past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(ids.item())
    assert text_of(lm, new) == texts[0]


@torch.no_grad()
def test_what_cannot_be_known_is_refused(make_tiny, tmp_path):
    lm = make_tiny("llama")
    model = written(lm, tmp_path / "out", "4:6")
    ids = torch.tensor([words(6)])
    with pytest.raises(ValueError, match="where the prompt ends is not known"):
        model(ids)
    with pytest.raises(ValueError, match="where the prompt ends is not known"):
        model.model(ids)  # not through the forward that knows
    with pytest.raises(ValueError, match="'4:6' name nothing in a prompt"):
        model(ids, prompt_length=3)
    with pytest.raises(ValueError, match="expected an attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6).bool(), prompt_length=5)
    with pytest.raises(ValueError, match="expected an attention_mask"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", do_sample=False)
    model(ids, prompt_length=5)
    with pytest.raises(ValueError, match="is not known"):  # nothing is left of the last forward
        model(ids)
    v = vectors(lm)
    for to in ("gguf", "peft", "lm-eval", "hf-bias", "gguf-bias"):
        with pytest.raises(UserError, match=f"positions 'last' cannot be held by '{to}'"):
            export.write(lm, v, to, tmp_path / to, 0.2, [1], positions="last")
    for word, why in [("first", "expected all, prompt"), ("image", "reads no pictures")]:
        with pytest.raises(UserError, match=why):
            export.write(lm, v, "hf", tmp_path / "hf", 0.2, [1], positions=word)
    assert not (tmp_path / "hf").exists()


def test_what_was_written_is_loaded_and_compared(make_tiny, tmp_path, monkeypatch):
    """Through AutoModelForCausalLM; a slice behind the text's end too."""
    load_in_this_process(monkeypatch)
    lm, out = make_tiny("llama"), tmp_path / "out"
    found = export.write(lm, vectors(lm), "hf", out, 0.5, [1, 2], positions="40:42")
    assert found.written[0] < 2e-4 < 0.001 < found.effect[1]
    page = (out / "README.md").read_text()
    assert "gradient pos @ 1-2 x 0.5 (relative, positions 40:42)" in page
    assert "give it `prompt_length`" in page
    with pytest.raises(UserError, match="is from other settings"):
        export.write(lm, vectors(lm), "hf", out, 0.5, [1, 2], positions="last")


def test_the_card_takes_the_row_of_these_positions(make_tiny, tmp_path):
    lm = make_tiny("llama")
    columns = "configuration,method,layers,alpha,part,questions,accuracy_token,"
    columns += "accuracy_token_low,accuracy_token_high"
    rows = ["base,base,,0,test,80,0.4,0.3,0.5"]
    for at, accuracy in [("", 0.5), (" (last)", 0.6), (" (-2:)", 0.7)]:
        rows.append(f"gradient pos @ 1 x 0.2{at},gradient,1,0.2,test,80,{accuracy},0.4,0.8")
    (tmp_path / "grid.csv").write_text("\n".join([columns, *rows]))
    for positions, accuracy in [("all", "50.0%"), ("last", "60.0%"), ("-2:", "70.0%")]:
        planned = plan.make(lm, vectors(lm), "hf", 0.2, [1], "relative", positions)
        known = card.measured(tmp_path / "grid.csv", planned)
        assert known["accuracy per token"] == f"{accuracy} [40.0%, 80.0%]"
    planned = plan.make(lm, vectors(lm), "hf", 0.2, [1], "relative", "prompt")
    with pytest.raises(UserError, match=r"no row of gradient pos @ 1 x 0\.2 \(relative, positions"):
        card.measured(tmp_path / "grid.csv", planned)


@torch.no_grad()
@pytest.mark.parametrize("word", ["image", "last"])
def test_a_folder_of_a_model_that_reads_pictures(tmp_path, word):
    lm = vlm_models.make("llava-next")
    model = written(lm, tmp_path / "out", word)
    steering = vectors(lm).at(0.5, [1, 2], positions=word)
    picture, texts = vlm_models.picture(60, 40), ("A dog, I think", "Two red cups")
    item = encode(lm, replace(example("What is it?", *texts), image=picture), "qa")
    expected, base = (
        grains.score(lm, "What is it?", texts, image=picture, steering=s) for s in (steering, None)
    )
    assert abs(expected - base).max() > 0.01
    length = len(item.prompt_ids)
    for response, value in zip(item.responses, expected, strict=True):
        ids = torch.tensor([item.prompt_ids + response])
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "prompt_length": length}
        own = model(**item.inputs | more).logits[0, length - 1 : -1].log_softmax(-1)
        found = own.gather(1, torch.tensor(response)[:, None]).sum().item()
        assert found == pytest.approx(value, abs=2e-4)
    free = encode(lm, replace(example("What is it?"), image=picture), "qa", free=True)
    output = model.generate(**free.inputs, max_new_tokens=6, do_sample=False)
    said = grains.generate(
        lm, "What is it?", image=picture, style="qa", max_new_tokens=6, steering=steering
    )
    assert text_of(lm, output[0, len(free.prompt_ids) :].tolist()) == said
    if word == "image":
        with pytest.raises(ValueError, match="'image' name nothing in a prompt"):
            model(torch.tensor([words(5)]))


def test_a_folder_that_reads_pictures_is_loaded_again(tmp_path, monkeypatch):
    """Through AutoModelForImageTextToText, on a picture; its processor lies in it."""
    load_in_this_process(monkeypatch)
    lm, out = vlm_models.make("llava-next"), tmp_path / "out"
    found = export.write(lm, vectors(lm), "hf", out, 0.5, [1, 2], positions="image")
    assert found.written[0] < 2e-4 < 0.001 < found.effect[1]
    assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
    assert (out / "processor_config.json").is_file() and not lm.model._buffers
