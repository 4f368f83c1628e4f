"""What computing on a CPU is slow without: products by oneDNN on AMD, memory that stays mapped.

torch multiplies fp32 matrices with MKL, which leaves AVX-512 to Intel's processors; oneDNN, which
comes with torch too, does not, and is more than twice as fast on others (`make bench`). It computes
in fp32 all the same: the results differ by rounding alone.
"""

from __future__ import annotations

import ctypes
import platform
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


class Linear(nn.Linear):
    """A linear layer that is multiplied by oneDNN, frozen as a model's are here."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(input)
        return _Product.apply(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """x W^T + b for fp32 on a CPU, differentiable by x alone."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(weight)
        return _onednn(states, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return _onednn(grad, weight.t(), None), None, None


def _onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def linear_of(module: nn.Module):
    """(states, weight, bias) -> states W^T + b, by what `module` is multiplied by; not
    differentiable."""
    return _onednn if isinstance(module, Linear) else functional.linear


def use_onednn(model: nn.Module) -> bool:
    """Have a model's fp32 layers multiplied by oneDNN where that is faster; whether it is."""
    if not is_faster():
        return False
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear and (weight.dtype, weight.device.type) == (torch.float32,
                                                                                "cpu"):
            module.__class__ = Linear
    return True


def is_faster() -> bool:
    """Whether the processor is one whose AVX-512 MKL does not use."""
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    return (torch.backends.cpu.get_cpu_capability() == "AVX512"
            and "AuthenticAMD" in Path("/proc/cpuinfo").read_text())


# mallopt's numbers for when glibc asks the system for a block of its own, and returns free memory.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Have this process keep what is freed, for the next tensors of that size.

    By default glibc gives large blocks back at once, and to have the system clear new ones took two
    fifths of the time of decoding and a tenth of that of scoring.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**30)
    _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Have this process return what is freed from 1 MiB on to the system, where memory is scarce.

    What is kept otherwise has holes that little fits into: of a budget of 2 GiB a prompt of 2,900
    tokens then took 3.4.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**20)


def _mallopt(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):  # another system, another C library
        ctypes.CDLL("libc.so.6").mallopt(option, value)
