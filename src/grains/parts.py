"""Where a decoder's parts are: found from what the forward calls, not from names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grains.errors import UserError
from grains.lm import execution_device

TOKENS = 7  # of the text that shows the parts: more than any model has streams


@dataclass(frozen=True)
class Parts:
    """The decoder's layers, and the norm: what follows them before the head.

    width, layer_outputs, streams: see `LanguageModel`.
    """

    layers: nn.ModuleList
    norm: nn.Module
    width: int
    layer_outputs: int
    streams: tuple[int, int] | None


def find_parts(model: PreTrainedModel, name: str) -> Parts:
    """The parts of a model's decoder.

    The model's forward runs on a few tokens. The layers are the list of modules that it calls one
    after the other, as many as the config says if there is such a list, with hidden states. What
    it calls between the last of them and the head is the norm.
    Raises UserError if there is no such list.
    """
    config = model.config.get_text_config()
    if config.num_hidden_layers < 1:
        raise UserError(
            f"{name}: its config says {config.num_hidden_layers} layers, expected at least one"
        )
    calls: list[tuple[nn.Module, Any, Any]] = []  # in the order in which they return
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: calls.append(
                (module, args or tuple(kwargs.values()), output)
            ),
            with_kwargs=True,
        )
        for module in model.modules()
    ]
    device = execution_device(model.get_input_embeddings())
    ids = torch.full((1, TOKENS), int(getattr(config, "vocab_size", 8)) // 2, device=device)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()

    order = {id(module): place for place, (module, _, _) in enumerate(calls)}
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    # Some count what is inside a layer; of lists of any other length the outermost is taken.
    lists.sort(key=lambda layers: len(layers) != config.num_hidden_layers)
    for layers in lists:
        places = [order.get(id(layer), -1) for layer in layers]
        if len(layers) < 2 or min(places) < 0 or places != sorted(places):
            continue
        shape = _shape(calls[places[0]])
        streams = _streams(shape) if len(layers) == config.num_hidden_layers else None
        if len(shape) == 3 or streams:
            output = calls[places[0]][2]
            layer_outputs = len(output) if isinstance(output, (tuple, list)) else 0
            width = shape[-1] * (streams[1] if streams else 1)
            norm = _between(calls, places[-1], model)
            return Parts(layers, norm, width, layer_outputs, streams)
    raise UserError(
        f"{name}: {type(model).__name__} does not call {config.num_hidden_layers} decoder layers "
        "one after the other on the hidden states of a text; this architecture is not supported"
    )


def _shape(call: tuple[nn.Module, Any, Any]) -> tuple[int, ...]:
    """Of the first tensor that a module was called with: three sizes of hidden states (B, T, D);
    none if it is no such tensor. call: module, arguments, output."""
    _, args, _ = call
    first = args[0] if args else None
    return tuple(first.shape) if isinstance(first, Tensor) and first.is_floating_point() else ()


def _streams(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The dimension and the number of the hidden states that a token has side by side, in the shape
    of what a layer is called with for one row of TOKENS; None if there is a single one."""
    *sizes, _ = shape or (0,)
    others = [place for place, size in enumerate(sizes) if size not in (1, TOKENS)]
    if len(sizes) != 3 or len(others) != 1 or sizes.count(1) != 1:
        return None
    return others[0], sizes[others[0]]


def _between(
    calls: list[tuple[nn.Module, Any, Any]], last_layer: int, model: PreTrainedModel
) -> nn.Module:
    """The outermost modules that are called after the last layer, before the head."""
    head = model.get_output_embeddings()
    after = []
    for module, _, _ in calls[last_layer + 1 :]:
        if module is head:
            break
        after.append(module)
    # A module returns after those inside it, and what holds the layers returns after the norm.
    layer = calls[last_layer][0]
    after = [module for module in after if layer not in set(module.modules())]
    inner = {id(child) for module in after for child in module.modules() if child is not module}
    modules = [module for module in after if id(module) not in inner]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
