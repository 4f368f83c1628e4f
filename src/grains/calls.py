"""What a model's forward calls its decoder layers with: recorded, and the layers left idle."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grains.errors import UserError
from grains.experts import Experts
from grains.lm import LanguageModel

# What layers are called with for a cache: replaced by these, as a replay keeps none.
NO_CACHE = {
    "past_key_values": None,
    "past_key_value": None,
    "layer_past": None,
    "cache_params": None,
    "cache": None,
    "use_cache": False,
}


@dataclass(frozen=True)
class SingleSequence:
    """One sequence of a trie on its own, for a model whose sequences cannot be packed.

    sample: the capture's row that it belongs to. nodes: (T_s,) its nodes in that row.
    owned: (T_s,) bool, the nodes that no sequence before it has.
    layers, added: as those of `Calls`, for this sequence.
    """

    sample: int
    nodes: Tensor
    owned: Tensor
    layers: list[dict]
    added: dict[int, Tensor]


@dataclass(frozen=True)
class Calls:
    """What the decoder's layers are called with, for B sequences of T positions.

    layers: the keyword arguments of each layer; layers of the same kind share their objects.
    added: layer -> (B, T, D) what the model itself adds to the hidden states before that layer
        (Qwen3-VL's picture features); most models add nothing.
    sequences: if the model cannot take packed sequences, each of them on its own; `layers` and
        `added` are empty then.
    samples: (R,) the sample of each row of hidden states; None if all are of one.
    experts: what its routers choose, where that is kept (B = 1).
    """

    layers: list[dict]
    added: dict[int, Tensor] = field(default_factory=dict)
    sequences: list[SingleSequence] = field(default_factory=list)
    samples: Tensor | None = None
    experts: Experts | None = None

    @property
    def hand_on(self) -> bool:
        """Whether layers fill what those above them read: a mapping, empty as long as they idle."""
        values = (value for layer in self.layers for value in layer.values())
        return any(isinstance(value, MutableMapping) and not value for value in values)

    def rows(self, index: Tensor) -> Calls:
        """The calls for R rows of hidden states; row r is of sequence index[r], (R,)."""
        if self.sequences:
            return Calls([], {}, self.sequences, index)
        return Calls(
            map_tensors(self.layers, lambda _, value: _rows(value, index)),
            {layer: _rows(value, index) for layer, value in self.added.items()},
        )


def _rows(value: Tensor, index: Tensor) -> Tensor:
    """A layer's argument (B, ...) for R rows of the sequences index (R,): (R, ...), or as it is
    if B = 1."""
    return value if value.shape[0] == 1 else value[index.to(value.device)]


def map_tensors(layers: list[dict], change: Callable[[str, Tensor], Tensor]) -> list[dict]:
    """Replace every tensor by `change(name, tensor)`, computed once for each distinct tensor."""
    done: dict[int, Tensor] = {}

    def apply(key: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(apply(key, item) for item in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in done:
            done[id(value)] = change(key, value)
        return done[id(value)]

    return [{key: apply(key, value) for key, value in layer.items()} for layer in layers]


def first_tensor(output: Any) -> Tensor:
    """What a module returns, or the first item of it: some layers return a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, tensor: Tensor) -> Any:
    """What a module returned, with another tensor in the place of `first_tensor`."""
    return (tensor, *output[1:]) if isinstance(output, (tuple, list)) else tensor


def states_of(lm: LanguageModel, output: Any) -> Tensor:
    """The hidden states (B, T, D) in what a layer returned."""
    return lm.joined(first_tensor(output))


def with_states(lm: LanguageModel, output: Any, states: Tensor) -> Any:
    """What a layer returned, with other hidden states (B, T, D) in it."""
    return with_first(output, lm.side_by_side(states))


def _as_returned(lm: LanguageModel, states: Tensor) -> Any:
    """Hidden states, in a layer's own layout, as a layer of this model returns them."""
    return (states, *[None] * (lm.layer_outputs - 1)) if lm.layer_outputs else states


@contextmanager
def substituted(modules: dict[nn.Module, Callable]) -> Iterator[None]:
    """Modules compute something else within the block."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, forward in modules.items():
            module.forward = forward
        yield
    finally:
        for module, own in before:
            if own is None:
                del module.forward
            else:
                module.forward = own


def record(lm: LanguageModel, inputs: dict) -> tuple[Tensor, Calls]:
    """One forward of the model whose layers and head compute nothing.

    inputs: what the model's forward takes (input_ids, attention_mask, pixel_values, ...), B rows.
    Returns the hidden states (B, T, D) that enter layer 0, and the `Calls`.
    Raises UserError if a layer is not called, and if the model cannot take a picture.
    """
    entered: dict[int, Tensor] = {}
    layers: list[dict] = [{} for _ in lm.layers]

    def idle(index: int, signature: inspect.Signature) -> Callable:
        rest = {p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD}

        def forward(*args: Any, **kwargs: Any) -> Any:
            # By name, as some families give by position what others give by name.
            _, states, *more = signature.bind(None, *args, **kwargs).arguments.items()
            given: dict[str, Any] = {}
            for name, value in more:
                given |= value if name in rest else {name: value}
            layers[index] = given | {k: v for k, v in NO_CACHE.items() if k in given}
            entered[index] = states[1]
            # Zeros: what enters the next layer is then what the model itself adds before it.
            output = torch.zeros_like(states[1])
            return _as_returned(lm, output)

        return forward

    def one_logit(hidden_states: Tensor) -> Tensor:
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1)

    # Of every kind of layer once: most models have one kind, and many layers.
    kinds = {type(layer): layer for layer in lm.layers}
    signatures = {kind: inspect.signature(type(layer).forward) for kind, layer in kinds.items()}
    substitutes: dict[nn.Module, Callable] = {
        layer: idle(index, signatures[type(layer)]) for index, layer in enumerate(lm.layers)
    }
    with torch.no_grad(), substituted(substitutes | {lm.head: one_logit}):
        try:
            # Of all positions: some layers compute those alone whose logits are asked for.
            lm.model(**inputs, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "pixel_values" not in inputs:
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{lm.name}: its own forward fails on a picture ({reason}); is the picture very "
                "small? take the example out"
            ) from error
    if any(_takes(layer, entered.get(0)) for layer in layers):
        raise UserError(
            f"{lm.name}: its layers also take the embeddings of the words, beside hidden states; "
            "not supported"
        )
    missing = [index for index in range(len(lm.layers)) if index not in entered]
    if missing:
        raise UserError(f"{lm.name}: its forward does not call decoder layers {missing}")
    added = {
        index: lm.joined(states) for index, states in entered.items() if index and states.any()
    }
    return lm.joined(entered[0]).detach(), Calls(layers, added)


def _takes(layer: dict, embeds: Tensor | None) -> bool:
    """Whether a layer was called with the embeddings beside its hidden states."""
    return embeds is not None and any(
        isinstance(value, Tensor)
        and value.shape == embeds.shape
        and value.dtype == embeds.dtype
        and torch.equal(value, embeds)
        for value in layer.values()
    )


def own_logits(
    lm: LanguageModel, states: Tensor, head: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Logits (n, V) in fp32 by the model's own forward behind its layers, from (n, D) states.

    The layers are idle and the last of them returns the states, so that all that the model does to
    its logits is done: caps, scales, layers behind the norm. Differentiable.
    head: computes in the place of the model's own.
    """

    def idle(index: int) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            is_last = index == len(lm.layers) - 1
            output = lm.side_by_side(states[None]) if is_last else hidden_states
            return _as_returned(lm, output)

        return forward

    ids = torch.full((1, len(states)), lm.replacement_id(), device=lm.device)
    substitutes: dict[nn.Module, Callable] = {
        layer: idle(index) for index, layer in enumerate(lm.layers)
    }
    with substituted(substitutes | ({lm.head: head} if head else {})):
        output = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return output.logits[0].float()
