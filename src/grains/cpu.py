"""CPU speed-ups: oneDNN matrix products on AMD, freed memory kept mapped.

torch multiplies fp32 matrices with MKL, which uses AVX-512 on Intel's processors only. oneDNN,
which comes with torch too, uses it on AMD's as well and is more than twice as fast there
(benchmarks/RESULTS.md). Both compute in fp32: results differ by rounding only.
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

from grains.quantized import is_plain

# oneDNN compiles a kernel for every new number of rows, in about 0.6 ms, and takes 0.015 ms or more
# for a product. With fewer inputs than these MKL multiplies hundreds of rows in less.
FEWEST_INPUTS = 64

Product = Callable[..., Tensor]  # (states, weight, bias or None) -> states W^T + b


class OneDnnLinear(nn.Linear):
    """A linear layer that uses oneDNN while its weights are frozen, in fp32 and on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states W^T + b: by oneDNN for frozen fp32 weights on a CPU, otherwise by torch.

    states: (..., in); weight: (out, in); bias: (out,). Returns (..., out). With oneDNN the result
    can be differentiated with respect to the states, once.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    is_fp32 = states.dtype == weight.dtype == torch.float32
    if trained or not is_fp32 or weight.device.type != "cpu":
        return functional.linear(states, weight, bias)
    if not (torch.is_grad_enabled() and states.requires_grad):
        return _onednn(states, weight, bias)
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
    """The function that multiplies states by this linear layer's weights."""
    return product if isinstance(module, OneDnnLinear) else functional.linear


def use_onednn(model: nn.Module) -> None:
    """Let oneDNN multiply a model's frozen fp32 linear layers where it is faster: on some
    processors, and not those of few inputs."""
    if is_faster():
        for module in model.modules():
            if type(module) is not nn.Linear or module.in_features < FEWEST_INPUTS:
                continue
            if is_plain(module.weight):
                module.__class__ = OneDnnLinear


def is_faster() -> bool:
    """Whether oneDNN beats MKL here: on AMD processors with AVX-512, which MKL does not use."""
    if platform.system() != "Linux" or not torch.backends.mkldnn.is_available():
        return False
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    )


# mallopt's parameters: the size from which glibc maps a block of its own, and how much free memory
# at the end of the heap it keeps.
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Keep freed memory in this process, for the next tensors of that size.

    By default glibc returns large blocks to the system at once. Clearing new ones took two fifths
    of the time of decoding and a tenth of that of scoring.
    """
    for size in (2**30, 2**25):  # older versions of glibc accept 2**25 at most
        if _glibc("mallopt", M_MMAP_THRESHOLD, size):
            _glibc("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)
            return


def return_freed_memory() -> None:
    """Return free memory to the system, now and whenever a block of 1 MiB or more is freed.

    For use when memory is scarce: kept memory becomes fragmented. With a limit of 2 GiB, a prompt
    of 2,900 tokens took 3.4 GiB while freed memory was kept.
    """
    _glibc("mallopt", M_MMAP_THRESHOLD, 2**20)
    _glibc("mallopt", M_TRIM_THRESHOLD, 2**17)
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> int:
    """Call a function of glibc; returns its result, or 0 where glibc is not the C library."""
    with suppress(OSError, AttributeError):
        return getattr(ctypes.CDLL("libc.so.6"), function)(*arguments)
    return 0
