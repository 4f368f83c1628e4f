"""Quantised weights: a model is what its dequantised weights say, gradients included."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import families, tiny
from torch import nn
from transformers import AutoModelForCausalLM

from grains import models, prompts, quantized
from grains.attribution import PromptFunction
from grains.data import Example
from grains.errors import UserError
from grains.scoring import score

PAIR = Example("a", "Is glass a slow liquid?", ("No, it is not", "Yes"), 0)
INSTALLED = pytest.mark.parametrize(
    "quantize",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
            ),
        )
        for name, package in quantized.PACKAGES.items()
    ],
)
SIZES = {"vocab_size": 420, "hidden_size": 128, "intermediate_size": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    path = tmp_path_factory.mktemp("quantized") / "tiny"
    families.tiny_model("llama", **SIZES).save_pretrained(path)
    tiny.byte_tokenizer().save_pretrained(path)
    return str(path)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """(out, in) in fp32, by the packages' own functions."""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.dequantize() if hasattr(weight, "qdata") else weight.detach()


@INSTALLED
def test_values_and_gradients_are_those_of_the_dequantised_weights(folder, quantize):
    lm = models.load(folder, "float32", "cpu", quantize=quantize)
    assert (lm.packs, lm.keeps_prefix, lm.own_head) == (True, True, False)
    layer = lm.layers[0].mlp.down_proj
    assert not quantized.is_plain(layer.weight)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    changed = 0
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            own = dequantized(lm.model.get_submodule(name).weight)
            changed += not torch.equal(own, module.weight)
            module.weight.data = own
    assert changed == 7 * len(lm.layers)

    item = prompts.encode(lm, PAIR)
    reference = models.wrap("plain", plain, lm.tokenizer)
    # Sums in another order, nothing else; weights this large multiply it.
    torch.testing.assert_close(
        torch.tensor(score(lm, [item], [], 2048)[0]),
        torch.tensor(score(reference, [item], [], 2048)[0]),
        rtol=1e-4,
        atol=1e-3,
    )
    gradients = []
    for each in (lm, reference):
        function = PromptFunction(each, item, [1.0, -1.0], 2048)
        gradients.append(function.values_and_grads(function.prompt[None])[1])
    apart = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert apart < 1e-3
    original = models.load(folder, "float32", "cpu")
    assert lm.identity()["weights"] != original.identity()["weights"]


@INSTALLED
def test_a_checkpoint_that_is_quantised_already(folder, quantize, tmp_path):
    asked = models.load(folder, "float32", "cpu", quantize=quantize)
    asked.model.save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    lm = models.load(str(tmp_path), "float32", "cpu")
    assert lm.quantization == asked.quantization != ""
    assert lm.identity() | {"model": ""} == asked.identity() | {"model": ""}
    with pytest.raises(UserError, match="quantised already"):
        models.load(str(tmp_path), "float32", "cpu", quantize=quantize)


@pytest.mark.parametrize(("quantize", "package"), quantized.PACKAGES.items())
def test_a_missing_package_is_named(folder, quantize, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {package}"):
        models.load(folder, "float32", "cpu", quantize=quantize)


class Packed(nn.Module):
    """A linear layer whose weights are whole numbers and a scale, as packages keep them.

    severed: its values are right, but no gradient reaches the input.
    """

    def __init__(self, plain, severed):
        super().__init__()
        self.severed = severed
        self.scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("packed", (plain.weight.detach() / self.scale).round().char())

    def forward(self, states):
        states = states.detach() if self.severed else states
        return states @ (self.packed * self.scale).T


def test_layers_that_lose_the_gradient_are_refused():
    model = families.tiny_model("llama", **SIZES)
    model.config.quantization_config = {"quant_method": "own", "bits": 8}
    for layer in model.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj, severed=False)
    assert models.wrap("packed", model, tiny.byte_tokenizer()).quantization == "own 8-bit"
    model.model.layers[0].mlp.down_proj.severed = True
    with pytest.raises(UserError, match=r"gradients .* \(own 8-bit, Packed\)"):
        models.wrap("severed", model, tiny.byte_tokenizer())
