"""Quantised weights: asked for at loading, or of a checkpoint that is quantised already.

Weights alone are quantised here, never what passes through the layers: f stays a smooth function of
the embeddings, and its gradients are those of the quantised model.
"""

from __future__ import annotations

import importlib.util
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from grains.errors import UserError
from grains.settings import QUANTIZE

PACKAGES = {"int8": "torchao", "int4": "bitsandbytes"}


def config_of(quantize: str, dtype: torch.dtype) -> QuantizationConfigMixin:
    """How transformers is asked to quantise linear layers as it loads them.

    quantize: int8 (a scale for each row; torchao) or int4 (NF4, a scale for each 64 weights;
        bitsandbytes). dtype: what the layers compute in.
    Raises UserError for another word, and if the package is missing.
    """
    if quantize not in QUANTIZE:
        raise UserError(f"unknown quantize '{quantize}': expected {' or '.join(QUANTIZE)}")
    package = PACKAGES[quantize]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"quantize {quantize} needs the package {package}: pip install {package}")
    if quantize == "int4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def method(config: PretrainedConfig) -> str:
    """What the weights are quantised by, such as 'bitsandbytes 4-bit'; '' if they are not."""
    used = getattr(config, "quantization_config", None)
    if used is None:
        return ""
    values: dict[str, Any] = used if isinstance(used, dict) else used.to_dict()
    name = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    for bits in (4, 8):
        if values.get(f"load_in_{bits}bit") or values.get("bits") == bits:
            return f"{name} {bits}-bit"
    kind = getattr(used, "quant_type", None)
    return f"{name} {type(kind).__name__}" if name == "torchao" else str(name)


def unpacked(config: PretrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is given for a checkpoint that is quantised already.

    compressed-tensors unpacks its weights at the first call of the model, and until then its layers
    have none: they are unpacked at loading.
    """
    used = getattr(config, "quantization_config", None)
    if isinstance(used, dict) and used.get("quant_method") == "compressed-tensors":
        config.quantization_config = used | {"dequantize": True}
        return {"config": config}
    return {}


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary matrix of numbers, not a package's own kind of tensor."""
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype.is_floating_point


def holds_packed(module: nn.Module) -> bool:
    """Whether a module without others in it holds a matrix that is no ordinary one."""
    held = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return not any(module.children()) and any(not is_plain(each) for each in held if each.dim() > 1)


def values_of(weight: Tensor) -> Tensor:
    """A weight as an ordinary tensor: of a package's own kind, the values that it stands for."""
    if type(weight) not in (Tensor, nn.Parameter) and weight.dtype.is_floating_point:
        return weight.dequantize()
    return weight


def storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The memory that a tensor lies in; a package's own kind of tensor holds several others."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.untyped_storage()]
    names, _ = tensor.__tensor_flatten__()
    return [storage for name in names for storage in storages(getattr(tensor, name))]


def round_weights_alone(model: PreTrainedModel) -> None:
    """Let layers compute what their weights say, alike with and without gradients.

    compressed-tensors would round what passes through some, so that f had steps and no gradient.

    bitsandbytes 0.50.2, on processors with AVX512-BF16, packs the weights of a 4-bit layer anew at
    the first call without gradients; from then on it computes in bfloat16, and gives no gradient
    and no error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
