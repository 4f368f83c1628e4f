"""Decoding token by token: rows enter a running batch, and leave it when their text ends.

Each row is a prompt under a configuration. Keys and values lie in tensors that are allocated ahead,
all rows with their last token in the same column, as if they were padded on the left: so that the
model's own masks hold, whatever its layers attend to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from grains import positions
from grains.lm import LanguageModel
from grains.sampling import Choice, end_tokens
from grains.steering import Configuration, steered

# Columns that are allocated beyond those that the rows will need, so that they rarely move.
SPARE = 32
# The keys and values of so many tokens of a prompt are kept, for prompts of the same configuration
# that begin alike: by so many tokens at least. Of the positions of the batch, this share is kept.
KEPT, SHARED, KEPT_SHARE = 512, 4, 4
# A prompt is computed with others if the batch then holds so many positions at most.
PROMPT_POSITIONS = 512

# Vectors and gates of a batch, as `steering.steered` takes them.
Steering = tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]] | None]


@dataclass(eq=False)
class Row:
    """One text that is being written.

    prompt_ids: the P tokens of the prompt. image: (P,) bool, those of a picture.
    configuration: how prompt and text are steered.
    choice: chooses the tokens. limit: the number of new tokens at most.
    stop: texts that end it. name: whatever the caller knows it by.
    new: the tokens written so far. text: what they say, without a text that ended it.
    ended: '' while it is written, then eos (an end token), stop or length.
    """

    prompt_ids: list[int]
    configuration: Configuration
    choice: Choice
    limit: int
    stop: tuple[str, ...] = ()
    name: Any = None
    image: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    new: list[int] = field(default_factory=list)
    ended: str = ""

    def __post_init__(self) -> None:
        if not len(self.image):
            self.image = torch.zeros(len(self.prompt_ids), dtype=torch.bool)

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and the text."""
        return len(self.prompt_ids) + len(self.new)


@dataclass(frozen=True, eq=False)
class Step:
    """One more token of a row. logits: (V,), from which it was chosen."""

    row: Row
    token: int
    logits: Tensor


def written(lm: LanguageModel, row: Row) -> str:
    """What a row says so far, up to the text that ended it; special tokens left out."""
    text = lm.tokenizer.decode(row.new, skip_special_tokens=True)
    places = [place for stop in row.stop if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def text_of(lm: LanguageModel, row: Row) -> str:
    """What a row says, as `written`, without outer spaces."""
    return written(lm, row).strip()


def take(lm: LanguageModel, row: Row, token: int, ends: Collection[int]) -> None:
    """Add a token to a row, and note whether and how that ends it. ends: the end tokens."""
    row.new.append(token)
    if token in ends:
        row.ended = "eos"
    elif row.stop and any(
        stop in lm.tokenizer.decode(row.new, skip_special_tokens=True) for stop in row.stop
    ):
        row.ended = "stop"
    elif len(row.new) >= row.limit:
        row.ended = "length"


def where_steered(rows: Sequence[Row], lengths: Sequence[int], width: int) -> Tensor | None:
    """Which of the last positions of rows are steered (see `positions.newest`)."""
    words = [row.configuration.positions for row in rows]
    return positions.newest(words, [row.image for row in rows], lengths, width)


def by_row(configurations: Sequence[Configuration]) -> Steering:
    """Vectors and gates of R rows, each under its configuration.

    Returns layer -> vectors (R, 1, D), zero for a row that is not steered there; and layer ->
    gates, (R, 1, D) and (R, 1, 1), None if no configuration is gated. A row without a gate has an
    open one: a bias of infinity.
    """
    layers = sorted({layer for item in configurations for layer in item.layers})
    is_gated = any(item.gate for item in configurations)
    vectors, gates = {}, {}
    for layer in layers:
        given = [item.vectors.get(layer) for item in configurations]
        zero = torch.zeros_like(next(vector for vector in given if vector is not None))
        rows = [zero if vector is None else vector for vector in given]
        vectors[layer] = torch.stack(rows)[:, None]
        if is_gated:
            open_gate = zero, torch.tensor(torch.inf)
            pairs = [
                item.gate.at(layer) if item.gate and vector is not None else open_gate
                for item, vector in zip(configurations, given, strict=True)
            ]
            weights, biases = zip(*pairs, strict=True)
            gates[layer] = torch.stack(weights)[:, None], torch.stack(biases)[:, None, None]
    return vectors, gates if is_gated else None


class Decoder:
    """Writes the texts of many rows together.

    Rows are submitted at any time and enter in their order, as soon as the batch has room. A row's
    text is the one that it gets alone, up to rounding.

    max_positions: rows times the tokens of the longest, at most; a single row may be longer.
    max_rows: rows of the batch at most; None: as many as fit.
    """

    def __init__(self, lm: LanguageModel, max_positions: int, max_rows: int | None = None):
        self.lm, self.max_positions, self.max_rows = lm, max_positions, max_rows
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self.ends = frozenset(end_tokens(lm))
        self.store = _Store(len(lm.layers))
        takes = signature(lm.model.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers 5.24
        # id of a configuration -> it, how a prompt of it begins, and the keys and values of that.
        self.kept: dict[int, tuple[Configuration, list[int], list[tuple[Tensor, Tensor]]]] = {}
        self._steering: Steering | None = None  # of the active rows, made when it is needed

    def submit(self, row: Row) -> None:
        """Let a row wait for a place in the batch."""
        self.waiting.append(row)

    @torch.inference_mode()
    def cancel(self, row: Row) -> None:
        """Take a row out, wherever it is."""
        if row in self.active:
            self._remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)

    @property
    def idle(self) -> bool:
        """Whether no row is left."""
        return not self.active and not self.waiting

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """A token more: of the rows that enter if there are any, otherwise of all in the batch."""
        entering = self._entering()
        if entering:
            return [step for rows in self._groups(entering) for step in self._enter(rows)]
        if not self.active:
            return []
        self._make_room(more=1)
        self.store.end += 1
        ids = torch.tensor([[row.new[-1]] for row in self.active], device=self.lm.device)
        if self._steering is None:
            self._steering = by_row([row.configuration for row in self.active])
        logits = self._forward(0, ids, self._steering)
        return self._choose(list(self.active), logits)

    def _entering(self) -> list[Row]:
        """The waiting rows that fit beside the active ones, in their order."""
        longest = max((_final(row) for row in self.active), default=0)
        entering: list[Row] = []
        while self.waiting:
            rows = len(self.active) + len(entering) + 1
            longest = max(longest, _final(self.waiting[0]))
            full = rows * longest > self.max_positions or rows > (self.max_rows or rows)
            if rows > 1 and full:
                break
            entering.append(self.waiting.popleft())
        return entering

    def _groups(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows that are computed together; first a row of each configuration of which none is kept.

        What is kept of these counts for the others: they are grouped when the first are computed.
        """
        first: dict[int, Row] = {}
        if self.lm.packs:  # otherwise keys may depend on the length of the whole prompt
            for row in rows:
                if not self._shared(row):
                    first.setdefault(id(row.configuration), row)
        leaders = [*first.values()]
        for some in (leaders, [row for row in rows if row not in leaders]):
            group: list[Row] = []
            for row in sorted(some, key=self._computed):
                if group and (len(group) + 1) * self._computed(row) > PROMPT_POSITIONS:
                    yield group
                    group = []
                group.append(row)
            if group:
                yield group

    def _shared(self, row: Row) -> int:
        """How many tokens of a row's prompt have keys and values that are kept."""
        if id(row.configuration) not in self.kept or row.configuration.positions != "all":
            return 0
        _, kept, _ = self.kept[id(row.configuration)]
        pairs = zip(row.prompt_ids[:-1], kept, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return shared if shared >= SHARED else 0

    def _computed(self, row: Row) -> int:
        return len(row.prompt_ids) - self._shared(row)

    def _enter(self, rows: list[Row]) -> list[Step]:
        """Compute the prompts of rows that enter, and choose their first tokens."""
        first, store = len(self.active), self.store
        width = max(map(self._computed, rows))
        longest = max(row.length for row in rows)
        # The tokens of all rows end in one column: it must be far enough to the right.
        self._make_room(rows, longest)
        store.move(first, max(0, longest - store.end))
        for slot, row in enumerate(rows, first):
            if shared := self._shared(row):
                kept = self.kept[id(row.configuration)][2]
                store.put(slot, store.end - row.length, kept, shared)
        self.active += rows
        self._steering = None
        pad = self.lm.replacement_id("pad")
        ids = torch.tensor(
            [[pad] * (width - row.length) + row.prompt_ids[-width:] for row in rows],
            device=self.lm.device,
        )
        logits = self._forward(first, ids, by_row([row.configuration for row in rows]))
        for slot, row in enumerate(rows, first):
            if self.lm.packs and not self._shared(row):
                self._keep(slot, row)
        return self._choose(rows, logits)

    def _keep(self, slot: int, row: Row) -> None:
        """Keep how a row's prompt begins, and forget the oldest if that is too much."""
        self.kept.pop(id(row.configuration), None)
        ids = row.prompt_ids[:KEPT]
        kept = self.store.copy(slot, self.store.end - row.length, len(ids))
        self.kept[id(row.configuration)] = row.configuration, ids, kept
        while sum(len(ids) for _, ids, _ in self.kept.values()) > self.max_positions // KEPT_SHARE:
            self.kept.pop(next(iter(self.kept)))

    def _make_room(self, entering: Sequence[Row] = (), least: int = 0, more: int = 0) -> None:
        """Room for rows that enter with `least` columns at most, or for more columns of all."""
        final = max(map(_final, [*self.active, *entering]))
        rows = len(self.active) + len(entering)
        # The last token of a row is not in the store before the row's next one is computed.
        used = max((row.length - 1 for row in self.active), default=0)
        slots = max(rows, min(2 * self.store.slots, self.max_positions // final))
        self.store.fit(len(self.active), rows, used, used + more, least, slots, final)

    def _forward(self, first: int, ids: Tensor, steering: Steering) -> Tensor:
        """Logits (R, V) behind the last tokens of the rows from `first` on.

        ids: (R, W) their last tokens, padded on the left; what is before lies in the store.
        """
        width, device = ids.shape[1], ids.device
        rows = self.active[first : first + len(ids)]
        lengths = torch.tensor([[row.length] for row in rows], device=device)
        longest = int(lengths.max())
        inputs = {
            "input_ids": ids,
            "attention_mask": (torch.arange(longest, 0, -1, device=device) <= lengths).long(),
            self.cache_name: self.store.view(first, len(rows), longest, width),
        }
        if self.takes_positions:
            back = torch.arange(width, 0, -1, device=device)
            inputs["position_ids"] = (lengths - back).clamp_min(0)
        part = where_steered(rows, [row.length for row in rows], width)
        vectors, gates = steering

        def where(count: int) -> Tensor | None:
            # Some layers may compute the last position alone.
            return None if part is None else part[:, -count:]

        with steered(self.lm, vectors, gates, where), grouped_attention(self.lm):
            return self.lm.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _choose(self, rows: list[Row], logits: Tensor) -> list[Step]:
        """Choose the next token of rows from their logits (R, V); those that end leave."""
        likeliest = logits.argmax(-1).tolist()
        steps = []
        for row, own, token in zip(rows, logits, likeliest, strict=True):
            if not row.choice.is_greedy:
                token = row.choice.token(own, row.prompt_ids + row.new)
            take(self.lm, row, token, self.ends)
            steps.append(Step(row, token, own))
        for row in rows:
            if row.ended:
                self._remove(row)
        return steps

    def _remove(self, row: Row) -> None:
        """Take a row out of the batch: the last one takes its slot."""
        slot = self.active.index(row)
        last = self.active.pop()
        if last is not row:
            self.active[slot] = last
            self.store.replace(slot, len(self.active), last.length - 1)
        self._steering = None


def _final(row: Row) -> int:
    """The tokens that a row has at most."""
    return len(row.prompt_ids) + row.limit


class _Store:
    """Keys and values of all layers: (slots, heads, columns, size of a head) each.

    Row r is in slot r; its tokens end before the column `end`, where those of all rows end.
    """

    def __init__(self, layers: int):
        self.layers = [_Columns(self) for _ in range(layers)]
        self.cache = Cache(layers=[*self.layers])
        self.slots = self.capacity = self.end = 0
        self.first = self.rows = self.begin = self.written = 0  # what a forward sees

    def view(self, first: int, rows: int, longest: int, width: int) -> Cache:
        """The cache for a forward of the last `width` tokens of some rows, of `longest` at most."""
        self.first, self.rows = first, rows
        self.begin, self.written = self.end - longest, self.end - width
        return self.cache

    def fit(
        self, active: int, rows: int, used: int, more: int, least: int, slots: int, final: int
    ) -> None:
        """Have room for some rows and the columns that they will need next.

        active: the rows that are there, of `used` columns. rows: with those that enter.
        more: the columns of the active ones then. least: those of the ones that enter.
        slots, final: rows and columns to allocate for, if that must be.
        """
        if not active:
            self.end = 0
        if rows <= self.slots and max(self.end + more - used, least) <= self.capacity:
            return
        needed = max(more, least)
        if rows <= self.slots and needed + SPARE // 2 <= self.capacity:
            self._arrange(active, used, None)
        else:
            self.slots, self.capacity = slots, min(final, 2 * needed) + SPARE
            self._arrange(active, used, (self.slots, self.capacity))
        self.end = used

    def _arrange(self, rows: int, used: int, size: tuple[int, int] | None) -> None:
        """Move the used columns to the left; into new tensors, if slots and columns are given."""
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                if old is None:
                    continue
                kept = old[:rows, :, self.end - used : self.end]
                if size is None:
                    old[:rows, :, :used] = kept.clone()
                else:
                    new = old.new_zeros(size[0], old.shape[1], size[1], old.shape[3])
                    new[:rows, :, :used] = kept
                    setattr(layer, name, new)

    def move(self, rows: int, columns: int) -> None:
        """Move all tokens of the first rows to the right."""
        for layer in self.layers if rows and columns else ():
            for tensor in (layer.keys, layer.values):
                tensor[:rows, :, columns : self.end + columns] = tensor[
                    :rows, :, : self.end
                ].clone()
        self.end += columns

    def copy(self, slot: int, begin: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """The keys and values (heads, length, size) of a row's columns from `begin` on."""
        place = slice(begin, begin + length)
        return [
            (layer.keys[slot, :, place].clone(), layer.values[slot, :, place].clone())
            for layer in self.layers
        ]

    def put(self, slot: int, begin: int, kept: list[tuple[Tensor, Tensor]], length: int) -> None:
        """Put the first `length` tokens of what `copy` gave into the columns from `begin` on."""
        place = slice(begin, begin + length)
        for layer, (keys, values) in zip(self.layers, kept, strict=True):
            layer.keys[slot, :, place] = keys[:, :length]
            layer.values[slot, :, place] = values[:, :length]

    def replace(self, slot: int, source: int, length: int) -> None:
        """Put the `length` tokens of another slot into this one."""
        place = slice(self.end - length, self.end)
        for layer in self.layers:
            layer.keys[slot, :, place] = layer.keys[source, :, place]
            layer.values[slot, :, place] = layer.values[source, :, place]


class _Columns(CacheLayerMixin):
    """One layer's keys and values as transformers' attention takes them, of the rows in view."""

    is_sliding = False

    def __init__(self, store: _Store):
        super().__init__()
        self.store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        store = self.store
        # Zeros: what is masked is multiplied by zero, and must be finite.
        self.keys, self.values = (
            states.new_zeros(store.slots, states.shape[1], store.capacity, states.shape[3])
            for states in (key_states, value_states)
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        store = self.store
        rows = slice(store.first, store.first + store.rows)
        seen = []
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            kept[rows, :, store.written : store.end] = states
            seen.append(kept[rows, :, store.begin : store.end])
        return seen[0], seen[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.end - self.store.begin, 0

    def get_seq_length(self) -> int:
        return self.store.written - self.store.begin

    def get_max_length(self) -> int:
        return -1


# --- attention ---

GROUPED = "grains_grouped"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa` without a copy of the keys and values for each group of heads.

    Several heads of queries share a head of keys: here they are more queries of that head.
    """
    rows, heads, width, size = query.shape
    shared = key.shape[1]
    groups = heads // shared
    if (
        groups == 1
        or attention_mask is None
        or attention_mask.shape[1] != 1
        or kwargs.get("position_bias") is not None
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
    output = scaled_dot_product_attention(
        query.reshape(rows, shared, groups * width, size),
        key,
        value,
        attn_mask=attention_mask.repeat(1, 1, groups, 1),
        scale=scaling,
    )
    output = output.view(rows, heads, width, -1).transpose(1, 2)
    return output.contiguous(), None


AttentionInterface.register(GROUPED, _attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped_attention(lm: LanguageModel) -> Iterator[None]:
    """A model with `sdpa` attention attends by groups of heads within the block."""
    config = lm.model.config.get_text_config()
    before = config._attn_implementation
    try:
        if before == "sdpa":
            config._attn_implementation = GROUPED
        yield
    finally:
        config._attn_implementation = before
