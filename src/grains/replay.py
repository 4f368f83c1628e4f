"""Capture one forward of the decoder, replay it from any layer.

The model's own forward runs once on an example. It records what each decoder layer is called with
(mask, rotary embeddings, ...) and the embeddings that enter layer 0. Afterwards the decoder is a
loop over its layers, which can start at any layer and from any hidden states. Attribution,
ablation, scoring and steering need nothing else, and nothing here depends on the model family.

The responses to a prompt are packed behind it as a trie. What several sequences share (the prompt,
and the first words of answers that begin alike) is computed once. A token sees only the tokens on
its own path through the trie.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from grains import cpu, experts
from grains.calls import Calls, SingleSequence, map_tensors, record, states_of
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.logprobs import LOGIT_ROWS, VOCABULARY_SLICE
from grains.packing import Pack
from grains.quantized import storages

# Keyword arguments of layers that hold one number per position, which packing reorders (beside the
# mask and the rotary embeddings). A model whose layers take any other tensor per position is
# refused: how to reorder it would be a guess.
POSITION_KEYS = ("position_ids", "cache_position")
# The names by which families hand a layer its cache of keys and values (transformers 5.24: cache).
CACHE_KEYS = ("past_key_values", "past_key_value", "layer_past", "cache")


@dataclass(frozen=True)
class Capture:
    """What the decoder's layers were called with, for a batch of B sequences of T positions.

    embeds: (B, T, D) the hidden states that enter layer 0.
    calls: what each layer is called with beside them.
    lengths: (B,) the number of positions of each sequence; padding follows on the right.
    start: how many positions come before the T, of which only keys and values are kept (see
        `without_prefix`).
    """

    embeds: Tensor
    calls: Calls
    lengths: Tensor
    start: int = 0


def capture(lm: LanguageModel, inputs: dict) -> Capture:
    """Record one forward of the model.

    inputs: what the model's forward takes (input_ids, attention_mask, pixel_values, ...), B rows.
    Raises UserError if a layer is not called.
    """
    embeds, calls = record(lm, inputs)
    return Capture(embeds, calls, torch.full((embeds.shape[0],), embeds.shape[1]))


def capture_pack(lm: LanguageModel, prompt: dict, packed: Pack) -> Capture:
    """Capture a packed trie whose sequences all begin with the prompt.

    The model's own forward runs on all T nodes as one sequence, which gives every node's embedding.
    Masks and rotary embeddings are then taken at each node's true position (its depth), and the
    masks are restricted to the node's own path.

    A model whose sequences cannot be packed (`LanguageModel.packs`) is captured on each sequence on
    its own; its hidden states have the layout of the trie all the same.

    prompt: the model's inputs for the prompt alone (one row), pictures included.
    packed: the trie of T nodes, all sequences in one row.
    Returns a `Capture` with B = 1. Raises UserError if a layer takes a tensor that cannot be
    reordered.
    """
    if not lm.packs:
        return _capture_apart(lm, prompt, packed)
    extra = packed.tokens[prompt["input_ids"].shape[1] :].tolist()
    linear = capture(lm, extend(prompt, extra, lm.marks_prompts))
    if len(packed.paths) == 1:
        return linear
    length = linear.embeds.shape[1]
    device = linear.embeds.device
    depth, same_path = packed.depth.to(device), packed.same_path.to(device)

    def change(key: str, value: Tensor) -> Tensor:
        positions = depth.to(value.device)
        if key == "attention_mask":
            return _narrow(value, positions, same_path.to(value.device), lm.name)
        return _at_positions(key, value, positions, length, lm.name)

    layers = map_tensors(linear.calls.layers, change)
    causal = _narrow(_causal(length, device), depth, same_path, lm.name)
    calls = Calls(_fill_masks(layers, causal), linear.calls.added)
    return Capture(linear.embeds, calls, linear.lengths)


def _at_positions(key: str, value: Tensor, positions: Tensor, length: int, name: str) -> Tensor:
    """What a layer takes for each of `length` positions, at some of them (n,); no mask."""
    if key == "position_embeddings" and value.shape[-2] == length:
        return value.index_select(-2, positions)
    if key in POSITION_KEYS and value.shape[-1] == length:
        return value.index_select(-1, positions)
    raise UserError(
        f"{name}: its layers take a tensor '{key}' of shape {tuple(value.shape)} that "
        "cannot be replayed for packed sequences; this model is not supported"
    )


def _capture_apart(lm: LanguageModel, prompt: dict, packed: Pack) -> Capture:
    """The sequences of a trie captured one by one, their hidden states laid out as the trie's."""
    seen = torch.zeros(len(packed), dtype=torch.bool)
    sequences, rows = [], []
    for path in packed.paths:
        ids = packed.tokens[path][prompt["input_ids"].shape[1] :].tolist()
        alone = capture(lm, extend(prompt, ids, lm.marks_prompts))
        owned = ~seen[path]
        seen[path] = True
        rows.append(alone.embeds[0, owned])
        sequences.append(SingleSequence(0, path, owned, alone.calls.layers, alone.calls.added))
    # A trie numbers its nodes in the order in which the sequences bring them.
    embeds = torch.cat(rows)[None]
    return Capture(embeds, Calls([], sequences=sequences), torch.tensor([len(packed)]))


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def _fill_masks(kwargs: list[dict], mask: Tensor) -> list[dict]:
    """Give `mask` to the layers that were called without one: they attend causally."""
    return [
        layer | {"attention_mask": mask} if layer.get("attention_mask") is None else layer
        for layer in kwargs
    ]


def _narrow(mask: Tensor, depth: Tensor, same_path: Tensor, name: str) -> Tensor:
    """The mask (B, 1, T, T) at the nodes' positions, closed between nodes that share no path.

    depth: (T,), same_path: (T, T), of the `Pack`. name: of the model, for errors.
    """
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        raise UserError(
            f"{name}: an attention mask of shape {tuple(mask.shape)} cannot be "
            "packed; load the model with sdpa or eager attention"
        )
    mask = mask.index_select(-2, depth).index_select(-1, depth)
    if mask.dtype == torch.bool:
        return mask & same_path
    return mask.masked_fill(~same_path, torch.finfo(mask.dtype).min)


class _Noted:
    """Stands for a layer's cache, and notes the keys and values (1, heads, T, d) it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.given.append((keys.detach(), values.detach()))
        return keys, values


class _Kept:
    """Stands for a layer's cache that holds what comes before; it never changes.

    The rows of a batch share the keys and values (c, heads, m, d): the first R / c rows those of
    the first, and so on. A layer may be replayed any number of times.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.before = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        joined_keys, joined_values = (
            torch.cat([_for_rows(kept, len(new)), new], dim=-2)
            for kept, new in zip(self.before, (keys, values), strict=True)
        )
        return joined_keys, joined_values


def _for_rows(kept: Tensor, rows: int) -> Tensor:
    """(c, ...) -> (rows, ...), each item for rows / c rows; not copied if there is a single one."""
    return kept[:, None].expand(-1, rows // len(kept), -1, -1, -1).flatten(0, 1)


def without_prefix(lm: LanguageModel, captured: Capture, first: int) -> Capture:
    """The capture of the positions from `first` on, if nothing before them ever changes.

    The keys and values of the positions before are computed once and stand in the layers' cache.
    Where an earlier position sees a later one (in a picture, for some families), the capture begins
    where none does. It begins at 0 for a model without such a cache (`LanguageModel.keeps_prefix`).

    captured: B = 1, T positions. Returns a `Capture` of T - `start` positions.
    """
    first = closed(captured.calls, first) if lm.keeps_prefix else 0
    if not first:
        return captured
    before, behind = divided(lm, captured, first)
    with torch.no_grad():
        caches = keys_and_values(lm, before.embeds, before.calls)
    return replace(behind, calls=with_caches(lm, behind.calls, caches))


def divided(lm: LanguageModel, captured: Capture, first: int) -> tuple[Capture, Capture]:
    """A capture as those of its first `first` positions and of the rest.

    captured: T positions of B rows, whose first ones are alike, and none of these sees a later one
    (see `closed`). The first have a single row. The rest needs their keys and values (see
    `keys_and_values`, `with_caches`).
    """
    length = captured.embeds.shape[1]
    causal = _causal(length, captured.embeds.device)
    filled = replace(captured.calls, layers=_fill_masks(captured.calls.layers, causal))
    row = filled.rows(torch.zeros(1, dtype=torch.long))
    before = Capture(
        captured.embeds[:1, :first], _between(lm, row, 0, first, length), torch.tensor([first])
    )
    calls = _between(lm, filled, first, length, length)
    return before, Capture(captured.embeds[:, first:], calls, captured.lengths - first, first)


def keys_and_values(
    lm: LanguageModel,
    states: Tensor,
    calls: Calls,
    start: int = 0,
    after: Callable[[int, Tensor], Tensor | None] | None = None,
    stop: int | None = None,
) -> list:
    """Caches for each layer from `start` to stop-1 of positions that come first; None for others.

    states, calls, start, after, stop: as `replay` takes them, of c rows. The caches serve any
    number of rows for each of the c (see `with_caches`).
    Raises UserError if a layer does not give its cache its keys and values.
    """
    noted = [_Noted() for _ in lm.layers]
    replay(lm, states, with_caches(lm, calls, noted), start, stop, after)
    if any(len(note.given) != 1 for note in noted[start:stop]):
        raise UserError(f"{lm.name}: its layers do not keep keys and values in their cache")
    kept = [_Kept(*note.given[0]) for note in noted[start:stop]]
    return [None] * start + kept + [None] * (len(noted) - start - len(kept))


def with_caches(lm: LanguageModel, calls: Calls, caches: list) -> Calls:
    """The calls with a cache for each layer."""
    layers = []
    for layer, cache in zip(calls.layers, caches, strict=True):
        name = next((key for key in CACHE_KEYS if key in layer), None)
        if name is None:
            raise UserError(f"{lm.name}: its layers take no cache of keys and values")
        layers.append(layer | {name: cache})
    return replace(calls, layers=layers)


def closed(calls: Calls, first: int) -> int:
    """The largest number of positions, at most `first`, of which none sees a later one."""
    masks = {
        id(mask): mask
        for layer in calls.layers
        if isinstance(mask := layer.get("attention_mask"), Tensor)
    }
    for mask in masks.values():
        if mask.dim() != 4:
            return 0
        rows = mask[..., :first, :]
        seen = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min / 2
        columns = torch.arange(seen.shape[-1], device=seen.device)
        last = (seen * columns).amax((0, 1, 3)).cummax(0).values
        closed = (last <= columns[:first]).nonzero()
        first = int(closed[-1]) + 1 if len(closed) else 0
        if not first:
            break
    return first


def _between(lm: LanguageModel, calls: Calls, start: int, stop: int, length: int) -> Calls:
    """The calls for positions start to stop-1 of `length`."""

    def change(key: str, value: Tensor) -> Tensor:
        if key == "attention_mask":
            return value[..., start:stop, :stop]
        positions = torch.arange(start, stop, device=value.device)
        return _at_positions(key, value, positions, length, lm.name)

    added = {layer: states[:, start:stop] for layer, states in calls.added.items()}
    return Calls(map_tensors(calls.layers, change), added)


def extend(prompt: dict, tokens: list[int], marked: bool = False) -> dict:
    """The model's inputs for a prompt (one row) followed by more text tokens.

    marked: see `LanguageModel.marks_prompts`.
    """
    ids = prompt["input_ids"]
    more = torch.tensor([tokens], dtype=ids.dtype, device=ids.device)
    inputs = dict(prompt, input_ids=torch.cat([ids, more], dim=1))
    for key, value in prompt.items():
        if key != "input_ids" and isinstance(value, Tensor) and value.shape == ids.shape:
            fill = torch.ones if key == "attention_mask" else torch.zeros
            inputs[key] = torch.cat(
                [value, fill(more.shape, dtype=value.dtype, device=value.device)], dim=1
            )
    if marked:
        inputs["token_type_ids"] = torch.cat([torch.zeros_like(ids), torch.ones_like(more)], dim=1)
    return inputs


def collate(captures: list[Capture]) -> Capture:
    """Join captures of one row each into a batch, padded on the right.

    A padding position sees only itself, and no other position sees it. So the scores of an example
    do not depend on the rest of its batch.
    """
    if len(captures) == 1:
        return captures[0]
    lengths = torch.cat([item.lengths for item in captures])
    longest = int(lengths.max())
    if captures[0].calls.sequences:
        embeds = torch.cat(
            [pad(item.embeds, (0, 0, 0, longest - item.embeds.shape[1])) for item in captures]
        )
        sequences = [
            replace(sequence, sample=sample)
            for sample, item in enumerate(captures)
            for sequence in item.calls.sequences
        ]
        samples = torch.arange(len(captures))
        return Capture(embeds, Calls([], sequences=sequences, samples=samples), lengths)
    layers = [
        _fill_masks(item.calls.layers, _causal(item.embeds.shape[1], item.embeds.device))
        for item in captures
    ]

    def pad_at(value: Tensor, dim: int) -> Tensor:
        shape = list(value.shape)
        shape[dim] = longest - shape[dim]
        return torch.cat([value, value.new_zeros(shape)], dim=dim) if shape[dim] else value

    def pad_mask(value: Tensor) -> Tensor:
        length = value.shape[-1]
        is_bool = value.dtype == torch.bool
        wide = value.new_full(
            (*value.shape[:-2], longest, longest),
            False if is_bool else torch.finfo(value.dtype).min,
        )
        wide[..., :length, :length] = value
        padding = torch.arange(length, longest, device=value.device)
        wide[..., padding, padding] = True if is_bool else 0.0
        return wide

    joined: dict[tuple[int, ...], Tensor] = {}

    def join(key: str, values: tuple) -> Any:
        first = values[0]
        if isinstance(first, (tuple, list)):
            return type(first)(join(key, items) for items in zip(*values, strict=True))
        if not isinstance(first, Tensor):
            return first
        identity = tuple(map(id, values))
        if identity not in joined:
            if key == "attention_mask":
                padded = [pad_mask(value) for value in values]
            else:
                padded = [
                    pad_at(value, -2 if key == "position_embeddings" else -1) for value in values
                ]
            joined[identity] = torch.cat(padded)
        return joined[identity]

    joined_layers = [
        {key: join(key, tuple(layer[key] for layer in same)) for key in same[0]}
        for same in zip(*layers, strict=True)
    ]
    added = {
        layer: torch.cat(
            [
                pad_at(item.calls.added.get(layer, torch.zeros_like(item.embeds)), -2)
                for item in captures
            ]
        )
        for layer in sorted({layer for item in captures for layer in item.calls.added})
    }
    embeds = torch.cat([pad_at(item.embeds, -2) for item in captures])
    return Capture(embeds, Calls(joined_layers, added), lengths)


def replay(
    lm: LanguageModel,
    hidden_states: Tensor,
    calls: Calls,
    start: int = 0,
    stop: int | None = None,
    after: Callable[[int, Tensor], Tensor | None] | None = None,
    checkpointed: bool = False,
) -> Tensor:
    """Run decoder layers start to stop-1 on hidden states.

    hidden_states: (R, T, D) the input of layer `start`. Where `LanguageModel.resumes` is False, the
        layers below must last have been replayed with these calls for the same rows.
    calls: what the layers are called with for R rows (see `Calls.rows`); if all rows are of one
        sequence, what was captured for that sequence alone.
    stop: the first layer that is not run; None runs all.
    after: called as after(layer, output) after each layer. If it returns a tensor, that replaces
        the output. This is where states are read and steered.
    checkpointed: keep only each layer's input for the backward pass, which then computes the layer
        again: a third more work, a small part of the memory.
    Returns the output (R, T, D) of layer stop-1, before the final norm.
    """
    for index in range(start, len(lm.layers) if stop is None else stop):
        layer = partial(_layer, lm, index, calls)
        if checkpointed:
            # A layer that stops early when it is computed again would keep what accelerate fetched
            # from the disk for the modules that it was in.
            with set_checkpoint_early_stop(not _fetched(lm.layers[index])):
                hidden_states = checkpoint(layer, hidden_states, use_reentrant=False)
        else:
            hidden_states = layer(hidden_states)
        if after is not None:
            changed = after(index, hidden_states)
            hidden_states = hidden_states if changed is None else changed
    return hidden_states


def _fetched(layer: torch.nn.Module) -> bool:
    """Whether accelerate fetches the weights of a layer when they are needed."""
    return any(hasattr(module, "_hf_hook") for module in layer.modules())


def _layer(lm: LanguageModel, index: int, calls: Calls, states: Tensor) -> Tensor:
    """The output of one layer, (R, T, D) -> (R, T, D)."""
    layer = lm.layers[index]
    if not calls.sequences:
        if index in calls.added:
            states = states + calls.added[index]
        with _routing(calls, index, 0, states.shape[1]):
            return states_of(lm, layer(lm.side_by_side(states), **calls.layers[index]))
    output = torch.zeros_like(states)
    for place, sequence in enumerate(calls.sequences):
        rows = torch.arange(len(states))
        if calls.samples is not None:
            rows = rows[calls.samples.cpu() == sequence.sample]
        nodes = sequence.nodes.to(states.device)
        own = sequence.owned.to(states.device)
        for some in rows.split(len(rows) if lm.batches else 1):
            entering = states[some[:, None].to(states.device), nodes]
            if index in sequence.added:
                entering = entering + sequence.added[index]
            with _routing(calls, index, place, len(nodes)):
                left = states_of(lm, layer(lm.side_by_side(entering), **sequence.layers[index]))
            output[some[:, None].to(states.device), nodes[own]] = left[:, own]
    return output


def _routing(calls: Calls, layer: int, sequence: int, tokens: int) -> AbstractContextManager[Any]:
    return calls.experts.routing(layer, sequence, tokens) if calls.experts else nullcontext()


def with_fixed_experts(lm: LanguageModel, captured: Capture) -> Capture:
    """The capture whose routers choose for any hidden states what they choose for its own.

    captured: B = 1. Raises UserError for a model whose layers choose among no experts.
    """
    noted = experts.Experts(experts.counts(lm.model.config))
    calls = replace(captured.calls, experts=noted)
    if noted.counts:
        with torch.no_grad():
            replay(lm, captured.embeds, calls)
    if not noted.chosen:
        raise UserError(
            f"{lm.name}: its layers choose among no experts that could be fixed; leave out "
            "ig_experts fixed"
        )
    noted.noting = False
    return replace(captured, calls=calls)


# What a gradient keeps of every layer is many times what a forward holds, and products of a few
# hundred positions are as fast as those of thousands: its batches are this much smaller, except
# those of small models, which keep less than so many bytes.
GRADIENT_SHARE, GRADIENT_BYTES = 5, 2**28


def gradient_rows(
    lm: LanguageModel, captured: Capture, max_tokens: int | None = None
) -> tuple[int, bool]:
    """How many rows of a capture (B = 1) can be replayed with gradients at a time.

    max_tokens: the number of positions that are computed at a time without gradients; None: as many
        as fit.
    What one row keeps for the backward pass is measured on the first layer, attention weights
    included where they are kept; the other layers are assumed to keep as much.
    Returns the number of rows that fit in `lm.memory` (and in a share of max_tokens), at least 1,
    and whether their layers must be checkpointed to fit.
    """
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held.update((storage.data_ptr(), storage.nbytes()) for storage in storages(tensor))
        # Not the tensor itself: an output that its own node keeps is never freed.
        return tensor.detach()

    row = captured.embeds[:1].detach().requires_grad_()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = _layer(lm, 0, captured.calls, row)
    weights = {
        storage.data_ptr() for weight in lm.layers[0].parameters() for storage in storages(weight)
    }
    one_layer = sum(size for address, size in held.items() if address not in weights)
    # The rest holds a slice of the logits, twice, and what one layer's backward pass needs.
    free = lm.memory - 2 * LOGIT_ROWS * VOCABULARY_SLICE * torch.float32.itemsize
    one_row = (len(lm.layers) + 1) * one_layer
    rows = int(free // one_row)
    checkpointed = rows < 1
    if checkpointed:
        if lm.device.type == "cpu":
            cpu.return_freed_memory()
        rows = max(1, int(free // (2 * one_layer + len(lm.layers) * output.nbytes)))
    if max_tokens is not None:
        at_most = max_tokens // captured.embeds.shape[1]
        small = min(at_most, GRADIENT_BYTES // one_row)
        rows = max(1, min(rows, max(at_most // GRADIENT_SHARE, small)))
    return rows, checkpointed
