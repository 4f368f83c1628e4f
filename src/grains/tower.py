"""The vision tower of an image-text model: where its layers are, and their states for a picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from grains import vision
from grains.calls import first_tensor, record
from grains.errors import UserError
from grains.lm import LanguageModel, kept_with_model

BLANK = Image.new("RGB", (224, 224), (128, 128, 128))  # a picture that shows where the layers are


@kept_with_model
def layers(lm: LanguageModel) -> tuple[nn.Module, ...]:
    """The Lv layers that a picture passes through before the decoder, in their order.

    They are the list of modules that the forward calls one after the other on a picture: of several
    the longest, and none that is inside another. Raises UserError if there is none.
    """
    if lm.processor is None:
        raise UserError(f"{lm.name} reads text only, so it has no vision tower to steer")
    decoder = {*lm.layers.modules(), lm.layers}
    lists = [
        module
        for module in lm.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and module not in decoder
    ]
    called: list[nn.Module] = []
    with _hooked([layer for members in lists for layer in members], called.append):
        _read(lm, BLANK)
    seen: set[nn.Module] = set()
    towers: list[tuple[nn.Module, ...]] = []
    for members in lists:  # the outer ones come first
        own = {*members}
        if members not in seen and [layer for layer in called if layer in own] == [*members]:
            towers.append((*members,))
            seen |= {*members.modules()}
    if not towers:
        raise UserError(
            f"{lm.name}: its forward does not call the layers of a vision tower one after the "
            "other on a picture; its tower cannot be steered"
        )
    return max(towers, key=len)


def states(lm: LanguageModel, picture: Image.Image) -> tuple[Tensor, Tensor]:
    """The outputs of the tower's layers for a picture, in fp32 on the CPU.

    Returns the states (Lv, T, Dv) of the T patches, the mean over the tiles that the picture is cut
    into, and the median length of a patch's state in each layer, (Lv,). A tower that takes patches
    without rows of pictures (Qwen) has as many as the picture is large: T is 1, their mean.
    Raises UserError as `layers` does, and for layers of different sizes.
    """
    read: list[Tensor] = []

    def note(output: Tensor) -> None:
        read.append(output.detach().float().cpu())

    with _hooked(layers(lm), lambda module: None, note):
        _read(lm, picture)
    if len({output.shape for output in read}) > 1:
        raise UserError(
            f"{lm.name}: the layers of its vision tower have states of different sizes; its tower "
            "cannot be steered"
        )
    outputs = torch.stack(read)
    norms = outputs.norm(dim=-1).flatten(1).median(dim=1).values
    if outputs.dim() == 3:  # (Lv, patches, Dv)
        return outputs.mean(dim=1, keepdim=True), norms
    return outputs.flatten(1, -3).mean(dim=1), norms


def _read(lm: LanguageModel, picture: Image.Image) -> None:
    """The tower's own forward on a picture; the decoder computes nothing."""
    record(lm, vision.model_inputs(lm, [vision.placeholder(lm)], [picture]))


@contextmanager
def _hooked(
    modules: Sequence[nn.Module],
    called: Callable[[nn.Module], None],
    returned: Callable[[Tensor], None] = lambda output: None,
) -> Iterator[None]:
    """Say which of the modules was called, and what it returned, within the block."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        called(module)
        returned(first_tensor(output))

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
