"""Quantised weights: a model is what its dequantised weights say, gradients included."""

from __future__ import annotations

import importlib.util
import json

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


def assert_alike(lm, reference):
    """Log-likelihoods and gradients of two models."""
    item = prompts.encode(lm, PAIR)
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

    assert_alike(lm, models.wrap("plain", plain, lm.tokenizer))
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


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed",
)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8"])
def test_a_checkpoint_of_compressed_tensors(scheme, tmp_path):
    """What its own package unpacks; where it would round what passes through, that is left out."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = families.tiny_model("llama", **SIZES | {"intermediate_size": 256})
    linear = {"weights": preset_name_to_scheme(scheme, ["Linear"])}
    config = QuantizationConfig(config_groups=linear, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if how := getattr(module, "quantization_scheme", None):
            size = how.weights.group_size or module.in_features
            groups = module.weight.unflatten(1, (-1, size))
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), how.weights)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)

    lm = models.load(str(tmp_path), "float32", "cpu")
    compressor.decompress_model(model)
    plain = families.tiny_model("llama", **SIZES | {"intermediate_size": 256})
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.data = model.get_submodule(name).weight.data
    assert_alike(lm, models.wrap("plain", plain, lm.tokenizer))


ORDER = {"gptq": [*range(8)], "awq": [0, 2, 4, 6, 1, 3, 5, 7]}


class FourBit(nn.Module):
    """A linear layer as GPTQ's and AWQ's packages keep it: numbers of 4 bits, eight in an int32.

    GPTQ: eight rows of the input in one number; zeros less one. AWQ: eight columns of the output,
    in another order. Both: a scale and a zero for each group of inputs. `dense` is what they say.
    """

    GROUP = 32

    def __init__(self, plain, method):
        super().__init__()
        self.method, self.less = method, int(method == "gptq")
        self.in_features, self.out_features = plain.in_features, plain.out_features
        groups = plain.weight.detach().T.unflatten(0, (-1, self.GROUP))  # (G, group, out)
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low) / 14
        zeros = (-low / scales).round().clamp(1, 14)
        whole = (groups / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
        self.dense = ((whole - zeros[:, None]) * scales[:, None]).flatten(0, 1).T
        whole = whole.flatten(0, 1).int()
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", self.packed(whole, 0 if method == "gptq" else 1))
        self.register_buffer("qzeros", self.packed(zeros.int() - self.less, 1))

    def packed(self, whole, dimension):
        eight = whole.unflatten(dimension, (-1, 8)).movedim(dimension + 1, -1).long()
        shifts = torch.tensor([4 * place for place in range(8)])
        number = (eight[..., ORDER[self.method]] << shifts).sum(-1)
        return torch.where(number >= 2**31, number - 2**32, number).int()

    def unpacked(self, number, dimension):
        shifts = torch.tensor([4 * place for place in range(8)])
        eight = torch.empty(*number.shape, 8, dtype=torch.int)
        eight[..., ORDER[self.method]] = (number[..., None] >> shifts).int() & 15
        return eight.movedim(-1, dimension + 1).flatten(dimension, dimension + 1)

    def forward(self, states):
        whole = self.unpacked(self.qweight, 0 if self.method == "gptq" else 1)
        zeros = self.unpacked(self.qzeros, 1) + self.less
        groups = whole.unflatten(0, (-1, self.GROUP)) - zeros[:, None]
        return states @ (groups * self.scales[:, None]).flatten(0, 1)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_layers_that_keep_four_bits_as_gptq_and_awq_do(method):
    model, plain = (families.tiny_model("llama", **SIZES) for _ in range(2))
    model.config.quantization_config = {"quant_method": method, "bits": 4}
    for name, module in plain.model.named_modules():
        if isinstance(module, nn.Linear):
            packed = FourBit(module, method)
            model.model.set_submodule(name, packed)
            module.weight.data = packed.dense
    lm = models.wrap("packed", model, tiny.byte_tokenizer())
    assert lm.quantization == f"{method} 4-bit"
    assert (lm.packs, lm.keeps_prefix, lm.own_head) == (True, True, False)
    assert_alike(lm, models.wrap("plain", plain, lm.tokenizer))


@pytest.mark.parametrize(
    ("method", "package"),
    [("gptq", "optimum"), ("awq", "gptqmodel"), ("compressed-tensors", "compressed-tensors")],
)
def test_a_checkpoint_whose_package_is_missing(method, package, tmp_path):
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    families.tiny_model("llama", **SIZES).save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "config_groups": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"pip install {package}$") as error:
        models.load(str(tmp_path), "float32", "cpu")
    assert "\n" not in str(error.value)


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
