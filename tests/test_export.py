"""Exports: what they hold, how it is read back, and what they refuse to write."""

import json
import sys
import types
from dataclasses import replace

import interop
import numpy as np
import pytest
import torch
from helpers.loading import load_in_this_process
from helpers.reference import hooked, no_hooks, own_logits
from safetensors.torch import load_file

from grains import export, gguf_files, models
from grains.errors import UserError
from grains.export import card, files, folders, plan
from grains.export.objects import keep_norm
from grains.export.plan import TEXT
from grains.export.write import WRITERS
from grains.steering import Gate, SteeringVectors

LAYERS = [1, 3]


def vectors(lm, seed=1, **more):
    generator = torch.Generator().manual_seed(seed)
    shape = len(lm.layers), lm.hidden_size
    norms = 8 * torch.rand(shape[0], generator=generator) + 8
    info = {"method": "gradient", "mode": "pos", "data": {"name": "mine", "num_samples": 9}}
    return SteeringVectors(torch.randn(shape, generator=generator), norms, info, **more)


def adding(lm, added):
    """Plain hooks: the outputs of layers plus a vector each."""
    return hooked({lm.layers[k]: lambda h, v=v: h + v for k, v in added.items()})


def logits(lm, block):
    with block:
        return own_logits(lm, lm.tokenizer(TEXT).input_ids)


@pytest.mark.parametrize(
    "to", ["gguf", "peft", "lm-eval", "hf-bias", pytest.param("hf", marks=pytest.mark.slow)]
)
def test_what_is_written_is_what_is_steered(make_tiny, tmp_path, to):
    lm = make_tiny("llama")
    v = vectors(lm)
    lm.tokenizer([TEXT], truncation=True, max_length=3, padding="max_length")
    check = export.write(lm, v, to, tmp_path / "out", 0.2, LAYERS)
    if to.startswith("hf"):  # whose readers would cut and pad, too
        tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
        assert tokenizer["truncation"] is None and tokenizer["padding"] is None
    assert no_hooks(lm) and not lm.model._buffers
    added = v.scaled(0.2, LAYERS)
    base = own_logits(lm, lm.tokenizer(TEXT).input_ids)
    alone = logits(lm, adding(lm, added))
    steered = logits(lm, v.apply(lm, 0.2, LAYERS))
    kept = to == "hf"
    assert check.written[0] < 2e-4 < 0.01 < check.effect[1]
    assert check.effect[0] == pytest.approx((steered - base).abs().max().item(), abs=1e-4)
    expected = 0 if kept else (alone - steered).abs().max().item()
    assert check.lost[0] == pytest.approx(expected, abs=1e-4)
    assert kept or check.lost[0] > 0.01
    page = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: tiny-llama" in page and "mine, 9 steering pairs" in page


def test_a_folder_is_replaced_only_if_it_is_ours(make_tiny, tmp_path):
    lm = make_tiny("llama")
    v, to = vectors(lm), "lm-eval"
    export.write(lm, v, to, tmp_path / "out", 0.2, LAYERS)
    assert export.write(lm, v, to, tmp_path / "out", 0.2, LAYERS) is None
    with pytest.raises(UserError, match="is from other settings"):
        export.write(lm, v, to, tmp_path / "out", 0.3, LAYERS)
    assert export.write(lm, v, to, tmp_path / "out", 0.3, LAYERS, overwrite=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not written by these scripts"):
        export.write(lm, v, to, tmp_path / "out", 0.2, LAYERS, overwrite=True)


def test_the_files_hold_these_layers(make_tiny, tmp_path):
    lm = make_tiny("llama")
    v = vectors(lm)
    added = v.scaled(0.2, LAYERS)
    for to in ("gguf", "peft", "lm-eval"):
        export.write(lm, v, to, tmp_path / to, 0.2, LAYERS)
    directions = export.read_gguf(lm, tmp_path / "gguf" / "vectors.gguf")
    for layer in range(4):
        expected = added.get(layer, torch.zeros(lm.hidden_size))
        assert torch.equal(directions.scaled(1.0)[layer], expected)
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {key: value.shape for key, value in adapter.items()} == {
        f"base_model.model.model.layers.{layer}.mlp.down_proj.beft_bias": (1, lm.hidden_size)
        for layer in LAYERS
    }
    steer = torch.load(tmp_path / "lm-eval" / "steer.pt", weights_only=True)
    assert [*steer] == ["layers.1", "layers.3"]
    assert torch.equal(steer["layers.3"]["steering_vector"][0], added[3])


def test_the_card_says_what_was_measured(make_tiny, tmp_path):
    lm = make_tiny("llama")
    v = vectors(lm)
    columns = "configuration,method,layers,alpha,alpha_units,part,questions,accuracy_token,"
    columns += "accuracy_token_low,accuracy_token_high,perplexity_increase"
    rows = ["base,base,,0,relative,test,80,0.4,0.3,0.5,"]
    rows += [
        f"x,gradient,1 3,{alpha},relative,{part},80,{accuracy},0.45,0.65,0.05"
        for alpha, part, accuracy in [
            (0.2, "validation", 0.9),
            (0.2, "test", 0.55),
            (0.3, "test", 1),
        ]
    ]
    (tmp_path / "grid.csv").write_text("\n".join([columns, *rows]))
    measured = card.measured(tmp_path / "grid.csv", plan.make(lm, v, "hf", 0.2, LAYERS))
    assert measured == {
        "questions": 80,
        "accuracy per token": "55.0% [45.0%, 65.0%]",
        "accuracy per token, base": "40.0% [30.0%, 50.0%]",
        "rise of perplexity of prose": "+5.0%",
    }
    export.write(lm, v, "lm-eval", tmp_path / "out", 0.2, LAYERS, measured=measured, licence="mit")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| measured: accuracy per token | 55.0% [45.0%, 65.0%] |" in page
    assert "license: mit" in page
    with pytest.raises(UserError, match=r"has no row of gradient pos @ 1 x 0\.2"):
        card.measured(tmp_path / "grid.csv", plan.make(lm, v, "hf", 0.2, [1]))
    (tmp_path / "grid.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no columns alpha"):
        card.measured(tmp_path / "grid.csv", plan.make(lm, v, "hf", 0.2, [1]))


def test_gates_go_into_a_folder_with_code_alone(make_tiny, tmp_path, monkeypatch):
    lm = make_tiny("llama")
    load_in_this_process(monkeypatch)
    generator = torch.Generator().manual_seed(3)
    weights = 5 * torch.randn(4, lm.hidden_size, generator=generator)
    v = vectors(lm, gate=Gate(weights, torch.tensor([0.0, 0.5, torch.nan, -0.5])))
    check = export.write(lm, v, "hf", tmp_path / "hf", 0.2, LAYERS)
    assert check.written[0] < 2e-4 and check.effect[1] > 0.01
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["steering"] == {
        "modules": "model.layers",
        "layers": LAYERS,
        "gated": True,
        "positions": "all",
    }
    open_gate = replace(v, gate=Gate(0 * weights, torch.full((4,), 50.0)))
    with v.apply(lm, 0.2, LAYERS):
        gated = own_logits(lm, [5, 6, 7])
    with open_gate.apply(lm, 0.2, LAYERS):
        assert (own_logits(lm, [5, 6, 7]) - gated).abs().max() > 0.01
    for to in ("gguf", "peft", "lm-eval", "hf-bias", "gguf-bias"):
        with pytest.raises(UserError, match=f"behind gates, which '{to}' cannot hold"):
            export.write(lm, v, to, tmp_path / to, 0.2, LAYERS)
        assert not (tmp_path / to).exists()


def test_what_a_client_would_not_use_is_refused(make_tiny, tmp_path):
    llama, gemma = make_tiny("llama"), make_tiny("gemma3")
    with pytest.raises(UserError, match="cannot steer behind block 0"):
        export.write(llama, vectors(llama), "gguf", tmp_path / "a", 0.2)
    with pytest.raises(UserError, match="adds nothing at these layers"):
        export.write(llama, vectors(llama), "gguf", tmp_path / "a", 0.0, [1])
    with pytest.raises(UserError, match="has no mlp_bias"):
        export.write(gemma, vectors(gemma), "hf-bias", tmp_path / "a", 0.2)
    # Gemma norms what down_proj returns: a bias of it is not what the layer adds.
    with pytest.raises(UserError, match="changes the logits otherwise"):
        export.write(gemma, vectors(gemma), "peft", tmp_path / "a", 0.2)
    with pytest.raises(UserError, match="is no GGUF file"):
        export.write(llama, vectors(llama), "gguf-bias", tmp_path / "a", 0.2)
    short = SteeringVectors(torch.ones(3, llama.hidden_size), torch.ones(3), {})
    with pytest.raises(UserError, match="vectors are for 3 layers"):
        export.write(llama, short, "lm-eval", tmp_path / "a", 0.2)
    assert not (tmp_path / "a").exists() and no_hooks(gemma)


def test_a_shifted_layer_is_no_export(make_tiny, tmp_path, monkeypatch):
    lm = make_tiny("llama")

    def shifted(planned, folder):
        added = {layer - 1: vector for layer, vector in planned.added.items()}
        files.write_lm_eval(replace(planned, added=added), folder)

    monkeypatch.setitem(WRITERS, "lm-eval", shifted)
    with pytest.raises(UserError, match="changes the logits otherwise"):
        export.write(lm, vectors(lm), "lm-eval", tmp_path / "out", 0.2, LAYERS)
    assert not (tmp_path / "out").exists()


def test_arrays_of_others(make_tiny, tmp_path):
    lm = make_tiny("llama")
    rows = np.random.default_rng(0).standard_normal((4, lm.hidden_size)).astype(np.float32)
    np.save(tmp_path / "all.npy", rows)
    np.savez(tmp_path / "some.npz", layer_1=rows[1], layer_3=rows[3])
    np.save(tmp_path / "alone.npy", rows[2])
    every = export.read_arrays(lm, tmp_path / "all.npy")
    assert np.array_equal(every.scaled(1.0)[2].numpy(), rows[2])
    assert np.array_equal(every.scaled(2.0, units="absolute")[2].numpy(), 2 * rows[2])
    some = export.read_arrays(lm, tmp_path / "some.npz")
    assert [layer for layer in range(4) if some.vectors[layer].any()] == [1, 3]
    one = export.read_arrays(lm, tmp_path / "alone.npy", layer=2)
    assert np.array_equal(one.vectors[2].numpy(), rows[2]) and not one.vectors[1].any()
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "wide.npy", np.ones((4, 3)))
    for name, why in [
        ("objects.npy", "cannot be read as NumPy's arrays"),
        ("wide.npy", "has 3 values"),
        ("alone.npy", "say of which"),
        ("missing.npy", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=why):
            export.read_arrays(lm, tmp_path / name)
    with pytest.raises(UserError, match="it does not begin as a GGUF file does"):
        export.read_gguf(lm, tmp_path / "all.npy")


def test_biases_in_the_embedded_gguf_file(smollm2, tmp_path, monkeypatch):
    """SmolLM2's Q4_1 file with biases: its other tensors are as they were.

    A vocabulary takes a second to read: compared is what was read while it was written."""
    read = {}

    def noted(path, own=gguf_files.reader_of):
        read[path.name] = own(path)
        return read[path.name]

    monkeypatch.setattr(gguf_files, "reader_of", noted)
    monkeypatch.setattr(folders, "reader_of", noted)
    v = vectors(smollm2)
    check = export.write(smollm2, v, "gguf-bias", tmp_path / "out", 0.2, ["0-29"])
    assert check.written[0] < 2e-4 and check.effect[1] > 0.01
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")
    source, written = (
        {item.name: item for item in read[name].tensors}
        for name in (models.embedded_file().name, folders.MODEL_GGUF)
    )
    file = np.memmap(tmp_path / "out" / folders.MODEL_GGUF, mode="r")
    assert np.array_equal(file, read[folders.MODEL_GGUF].data)
    assert written.keys() - source.keys() == {f"blk.{n}.ffn_down.bias" for n in range(30)}
    for name, item in source.items():
        assert written[name].tensor_type == item.tensor_type
        assert np.array_equal(written[name].data, item.data)


def test_equal_logits_show_no_mistake_only_if_mistakes_would_differ():
    """What `make interop` says of a program's logits."""
    ours = np.array([[0.0, 1.0], [2.0, 3.0]])
    shifted, without_norm = ours + np.array([[0, 0], [0, 5e-4]]), ours + 0.1
    wrong = {"a shifted layer": shifted, "a lost norm": without_norm}
    assert interop.verdict(ours + 1e-4, ours, wrong) == []
    assert interop.verdict(without_norm, ours, {}) == ["differs by 0.1"]
    assert interop.verdict(shifted, ours, wrong) == [
        "differs by 0.0005",
        "is equal to a shifted layer too",
    ]
    nothing = np.full((2, 2), np.nan)  # words for which a program gives no value
    assert interop.verdict(nothing, ours, {}) == ["differs by nan"]


def test_objects_of_others(make_tiny, monkeypatch):
    """Their classes by their fields alone: the real ones are in `make interop`."""
    lm = make_tiny("llama")
    v = vectors(lm)
    for module, name in (("repeng", "ControlVector"), ("steering_vectors", "SteeringVector")):
        made = types.SimpleNamespace(**{name: lambda **fields: types.SimpleNamespace(**fields)})
        monkeypatch.setitem(sys.modules, module, made)
    control = export.to_repeng(lm, v, 0.2, LAYERS)
    added = v.scaled(0.2, LAYERS)
    assert control.model_type == "llama" and [*control.directions] == LAYERS
    assert np.array_equal(control.directions[3], added[3].numpy())
    theirs = export.to_steering_vectors(lm, v, 0.2, LAYERS)
    assert theirs.layer_type == "decoder_block"
    back = export.from_steering_vectors(lm, theirs)
    assert torch.equal(back.scaled(1.0, LAYERS)[1], added[1]) and not back.vectors[0].any()
    theirs.layer_type = "mlp"
    with pytest.raises(UserError, match="only those of decoder_block"):
        export.from_steering_vectors(lm, theirs)
    ids = lm.tokenizer(TEXT).input_ids
    kept = {lm.layers[k]: lambda h, w=w: h + keep_norm(h, w) for k, w in added.items()}
    with hooked(kept):
        found = own_logits(lm, ids)
    assert (found - logits(lm, v.apply(lm, 0.2, LAYERS))).abs().max() < 2e-4
