"""What computing on a CPU is slow without: products by oneDNN on AMD, memory that stays mapped.

torch multiplies fp32 matrices with MKL, which leaves AVX-512 to Intel's processors; oneDNN, which
comes with torch too, does not, and is more than twice as fast on AMD's (benchmarks/RESULTS.md). It
computes in fp32 all the same: the results differ by rounding alone.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable
from torch.nn import functional


Product = Callable[..., Tensor]  # (states, weight, bias or None) -> states W^T + b


class OneDnnLinear(nn.Linear):
    """A linear layer that is multiplied by oneDNN while it is frozen, in fp32 and on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states W^T + b by oneDNN, differentiable once by the states; else by torch."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    is_fp32 = states.dtype == weight.dtype == torch.float32
    if trained or not is_fp32 or weight.device.type != "cpu":
        return functional.linear(states, weight, bias)
    return _Product.apply(states, weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(states, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(grad, weight.t(), None), None, None


def _onednn(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def product_of(module: nn.Module) -> Product:
    """What multiplies a linear layer's weights: (states, weight, bias) -> the product."""
    return product if isinstance(module, OneDnnLinear) else functional.linear


def use_onednn(model: nn.Module) -> None:
    """Have a model's frozen fp32 layers multiplied by oneDNN where that is faster."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDnnLinear


def is_faster() -> bool:
    """Whether the processor is one whose AVX-512 MKL does not use."""
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    )


# mallopt's numbers for from what size on a block is the system's own, and how much that is free at
# the end of the heap is kept.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Have this process keep what is freed, for the next tensors of that size.

    By default glibc gives large blocks back at once, and to have the system clear new ones took two
    fifths of the time of decoding and a tenth of that of scoring.
    """
    for size in (2**30, 2**25):  # the second is the most that older ones take
        if _glibc("mallopt", M_MMAP_THRESHOLD, size):
            _glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)
            return


def return_freed_memory() -> None:
    """Have this process return what is free, and blocks from 1 MiB on that are freed later.

    For where memory is scarce: what is kept has holes that little fits into. Of a budget of 2 GiB
    a prompt of 2,900 tokens then took 3.4.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, 2**20)
    _glibc("mallopt", M_TRIM_THRESHOLD, 2**17)
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> int:
    """What a function of the C library gives; 0 on another system or with another library."""
    with suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
    return 0
