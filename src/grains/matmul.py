"""Faster gradients of fp32 models: on the way back, products of numbers rounded to bfloat16.

torch calls this float32 matmul precision "medium". Its own setting is global, acts on the way
forward too, and does nothing on most CPUs. It pays where bfloat16 has instructions of its own
(AVX512-BF16, AMX, GPUs): on a CPU a product then takes half the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from grains.cpu import OneDnnLinear
from grains.quantized import is_plain


@contextmanager
def rounded_gradients(layers: nn.Module) -> Iterator[None]:
    """Within the block frozen fp32 linear layers multiply gradients in bfloat16.

    Gradients and weights are rounded, sums inside a product are fp32, and its result is rounded.
    Everything else stays fp32: all values, gradients between layers, norms, attention, and experts
    that are stacked in one tensor. The model's own weights are not touched; their copies in
    bfloat16, half as large, are kept as long as the model. The block is not for several threads.
    """
    changed = []
    try:
        for module in filter(_fits, layers.modules()):
            changed.append(module)
            module.forward = partial(_Product.apply, module)
        yield
    finally:
        for module in changed:
            del module.forward  # an attribute of its own, in front of its class's


def _fits(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or type(module) not in (nn.Linear, OneDnnLinear):
        return False  # a family's own kind of layer may do more
    weight = module.weight
    return (
        is_plain(weight)
        and weight.dtype == torch.float32
        and "forward" not in vars(module)  # accelerate keeps its weights elsewhere
        and not weight.requires_grad
    )


class _Product(torch.autograd.Function):
    """A linear layer of fp32 states (..., in), as fp32 (..., out)."""

    @staticmethod
    def forward(ctx: FunctionCtx, module: nn.Linear, states: Tensor) -> Tensor:
        ctx.save_for_backward(_rounded(module))
        return type(module).forward(module, states)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[None, Tensor]:
        (weight,) = ctx.saved_tensors
        return None, (grad.bfloat16() @ weight).float()


# Layer -> its weight in bfloat16, and what tells whether the weight is still the same.
_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


def _rounded(module: nn.Linear) -> Tensor:
    state = (module.weight.data_ptr(), module.weight._version)
    kept = _KEPT.get(module)
    if kept is None or kept[0] != state:
        kept = _KEPT[module] = (state, module.weight.detach().bfloat16())
    return kept[1]
