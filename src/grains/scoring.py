"""Log-likelihoods of choices, for the base model and many steering configurations.

All choices of a question are packed behind its prompt, and several questions make a batch. The
base model's hidden states are kept at each layer where a configuration begins to steer, so that the
configuration computes only the layers above it (all, where a replay must start at the first). The
positions that all prompts of a batch begin with (a system prompt, shots) are computed once for each
configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from grains import positions
from grains.calls import Calls
from grains.columns import Targets
from grains.lm import LanguageModel
from grains.logprobs import ResponseScorer, targets
from grains.packing import pack
from grains.prompts import Encoded
from grains.replay import (
    Capture,
    capture_pack,
    closed,
    collate,
    divided,
    keys_and_values,
    replay,
    with_caches,
)
from grains.settings import SCORES
from grains.steering import Configuration, Gate, TowerSteering, steer, steered


def batches(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of examples that are computed together, grouped by length.

    A group times its longest length is at most max_tokens, unless it is a single example. The
    groups depend only on the lengths and max_tokens, so that a resumed run makes the same ones.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if groups and (len(groups[-1]) + 1) * lengths[index] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


# Rows of a batch are questions times configurations. With fewer questions of more similar length,
# less of the batch is padding. A group of questions is a unit of a resumable run: whoever changes
# this share must raise the version.
QUESTIONS_SHARE = 4

# If all prompts of a batch begin with so many positions, these are computed once for all.
SHARED = 8


def question_batches(encoded: list[Encoded], max_tokens: int) -> list[list[int]]:
    """Indices of questions that are scored together (see `batches` and QUESTIONS_SHARE)."""
    return batches([item.packed_length for item in encoded], max_tokens // QUESTIONS_SHARE)


@torch.inference_mode()
def score(
    lm: LanguageModel, encoded: list[Encoded], configurations: list[Configuration], max_tokens: int
) -> list[np.ndarray]:
    """log P of every choice in nats, summed over its tokens, base and steered.

    encoded: the questions of one batch (see `question_batches`).
    max_tokens: the number of positions computed at a time.
    Returns for each question an array (1 + configurations, choices), the base model first.
    """
    has_picture = any(item.image.any() for item in encoded)
    towers: dict[TowerSteering | None, list[int]] = {None: []}
    for index, configuration in enumerate(configurations):
        towers.setdefault(configuration.tower if has_picture else None, []).append(index)
    scores = [np.empty((1 + len(configurations), len(item.responses))) for item in encoded]
    for tower, members in towers.items():
        with steered(lm, {}, tower=tower):  # what enters the decoder differs
            own = [configurations[index] for index in members]
            parts = _score(lm, encoded, own, max_tokens)
        rows = [1 + index for index in members]
        for all_rows, part in zip(scores, parts, strict=True):
            all_rows[rows] = part[1:]
            if tower is None:
                all_rows[0] = part[0]
    return scores


def _score(
    lm: LanguageModel, encoded: list[Encoded], configurations: list[Configuration], max_tokens: int
) -> list[np.ndarray]:
    """`score` for configurations that leave the vision tower as it is now."""
    batch, read = packed_batch(lm, encoded)
    groups: dict[tuple[tuple[int, ...], Gate | None, str], list[int]] = {}
    for index, configuration in enumerate(configurations):
        layers = tuple(sorted(configuration.layers))
        alike = layers, configuration.gate, configuration.positions
        groups.setdefault(alike, []).append(index)

    starts = {layers[0] for layers, _, _ in groups}
    where = {words: _where(words, batch, encoded) for _, _, words in groups}
    parts = _parts(lm, batch, encoded, [*where.values()])
    final = _base(lm, parts, starts)
    read = read.behind(parts[-1].captured.start)
    scores: list[Tensor] = [torch.empty(0)] * (1 + len(configurations))
    scores[0] = read(final[None])[0]

    questions, length = parts[-1].captured.embeds.shape[:2]
    at_a_time = max(1, max_tokens // (questions * length))
    for (layers, gate, words), members in groups.items():
        passes = -(-len(members) // at_a_time)
        for share in (members[start::passes] for start in range(passes)):
            vectors = {
                layer: torch.stack([configurations[i].vectors[layer] for i in share])
                for layer in layers
            }
            values = _steered(lm, parts, vectors, gate, where[words], read)
            for index, value in zip(share, values, strict=True):
                scores[1 + index] = value
    stacked = torch.stack(scores)
    sizes = [len(item.responses) for item in encoded]
    return [by_choice.double().numpy() for by_choice in stacked.split(sizes, dim=1)]


def score_all(
    lm: LanguageModel, encoded: list[Encoded], configurations: list[Configuration], max_tokens: int
) -> list[np.ndarray]:
    """`score` for any number of questions, in their order."""
    scores: dict[int, np.ndarray] = {}
    for members in question_batches(encoded, max_tokens):
        batch = [encoded[index] for index in members]
        values = score(lm, batch, configurations, max_tokens)
        scores.update(zip(members, values, strict=True))
    return [scores[index] for index in range(len(encoded))]


def read_states(
    lm: LanguageModel,
    encoded: list[Encoded],
    read: Callable[[int, slice, Tensor], None],
    stop: int | None = None,
) -> None:
    """The base model's hidden states of one batch, responses packed behind their prompts.

    read: called with each layer below `stop` (None: all), the positions that are computed, and
        their states behind the layer: (Q, T, D), padded on the right; (1, T, D) of positions that
        all prompts begin with.
    """
    batch, _ = packed_batch(lm, encoded)

    def after(part: _Part, layer: int, states: Tensor) -> None:
        read(layer, part.positions, states)

    _replay(lm, _parts(lm, batch, encoded, []), after, stop)


def packed_batch(lm: LanguageModel, encoded: list[Encoded]) -> tuple[Capture, ResponseScorer]:
    """Examples as one batch, responses packed behind their prompts, and the scorer of these."""
    packs = [pack(item.sequences(without_last=True)) for item in encoded]
    batch = collate(
        [capture_pack(lm, item.inputs, packed) for item, packed in zip(encoded, packs, strict=True)]
    )
    return batch, ResponseScorer(
        lm,
        [
            targets(packed, len(item.prompt_ids), item.responses)
            for item, packed in zip(encoded, packs, strict=True)
        ],
    )


# --- the layers, for positions that all questions have in common and for the others ---


@dataclass(frozen=True)
class _Part:
    """Positions of a batch that are computed together, each part before the next.

    captured: Q questions, or one row for all where they are alike.
    kept: layer -> (Q, T, D) the base model's output where a configuration begins to steer.
    """

    captured: Capture
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> slice:
        start, length = self.captured.start, self.captured.embeds.shape[1]
        return slice(start, start + length)


def _where(words: str, batch: Capture, encoded: list[Encoded]) -> Tensor | None:
    """(Q, T) bool, the steered positions; None: all (see `positions.of_batch`)."""
    where = positions.of_batch(words, encoded, batch.embeds.shape[1])
    return None if where is None else where.to(batch.embeds.device)


def _parts(
    lm: LanguageModel, batch: Capture, encoded: list[Encoded], where: list[Tensor | None]
) -> list[_Part]:
    """The batch; or what all its prompts begin with, if that is long enough, and the rest.

    where: the steered positions of each kind of configuration.
    """
    # The last position of a prompt predicts, so it is in the rest.
    most = min(len(item.prompt_ids) for item in encoded) - 1
    first = 0
    if lm.keeps_prefix and len(encoded) > 1 and most >= SHARED:
        by_position = [batch.embeds, *batch.calls.added.values()]
        by_position += [part[..., None] for part in where if part is not None]
        alike = torch.stack(
            [(values == values[:1]).all(-1).all(0)[:most] for values in by_position]
        ).all(0)
        first = closed(batch.calls, int(alike.long().cumprod(0).sum()))
    if first < SHARED:
        return [_Part(batch)]
    return [_Part(part) for part in divided(lm, batch, first)]


def _base(lm: LanguageModel, parts: list[_Part], starts: set[int]) -> Tensor:
    """The base model's last hidden states (Q, T, D) of the last part; keeps those at `starts`."""

    def keep(part: _Part, layer: int, states: Tensor) -> None:
        if layer in starts:
            part.kept[layer] = states

    return _replay(lm, parts, keep)


def _replay(
    lm: LanguageModel,
    parts: list[_Part],
    after: Callable[[_Part, int, Tensor], None],
    stop: int | None = None,
) -> Tensor:
    """The states (Q, T, D) of the last part that leave the last layer below `stop` (None: all).

    after: called as after(part, layer, output) after each layer of each part.
    """
    calls = parts[-1].captured.calls
    for part in parts[:-1]:
        own = part.captured
        caches = keys_and_values(lm, own.embeds, own.calls, after=partial(after, part), stop=stop)
        calls = with_caches(lm, calls, caches)
    embeds = parts[-1].captured.embeds
    return replay(lm, embeds, calls, stop=stop, after=partial(after, parts[-1]))


def _steered(
    lm: LanguageModel,
    parts: list[_Part],
    vectors: dict[int, Tensor],
    gate: Gate | None,
    where: Tensor | None,
    read: ResponseScorer,
) -> Tensor:
    """Scores (c, choices of all Q questions) of c configurations that steer the same layers.

    vectors: layer -> (c, D), layers in ascending order.
    where: (Q, T) bool, the steered positions; None: all.
    """
    first = next(iter(vectors))
    gates = {layer: gate.at(layer) if gate else None for layer in vectors}
    count = len(vectors[first])
    if first == len(lm.layers) - 1:
        part = parts[-1]
        scored = None if where is None else where[:, part.positions][read.rows, read.nodes]
        vector = vectors[first][:, None]
        return read(part.kept[first], lambda picked: steer(picked, vector, gates[first], scored))

    start = first + 1 if lm.resumes else 0

    def above(part: _Part) -> tuple[Tensor, Calls, Callable[[int, Tensor], Tensor | None]]:
        """What enters layer `start`, (c Q, T, D), and its replay."""
        questions = len(part.captured.embeds)
        own = None if where is None else where[:questions, part.positions]
        by_row_where = None if own is None else own.repeat(count, 1)
        by_row = {
            layer: vector.repeat_interleave(questions, 0)[:, None]
            for layer, vector in vectors.items()
            if layer >= start
        }
        if lm.resumes:
            states, vector = part.kept[first], vectors[first][:, None, None]
            entering = steer(states, vector, gates[first], own).flatten(0, 1)
        else:
            entering = part.captured.embeds.repeat(count, 1, 1)
        rows = torch.arange(questions, device=entering.device).repeat(count)
        return (
            entering,
            part.captured.calls.rows(rows),
            lambda layer, h: (
                steer(h, by_row[layer], gates[layer], by_row_where) if layer in by_row else None
            ),
        )

    states, calls, after = above(parts[-1])
    for part in parts[:-1]:
        before, its_calls, steers = above(part)
        caches = keys_and_values(lm, before, its_calls, start, steers)
        calls = with_caches(lm, calls, caches)
    final = replay(lm, states, calls, start=start, after=after)
    return read(final.unflatten(0, (count, -1)))


def margins(encoded: list[Encoded], scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """How far the preferred choice leads the best other one, (questions, 1 + configurations).

    scores: for each question the array that `score` returns.
    Returns two tables in nats: of log-likelihoods in sum ("sum") and per token ("token"). A
    question is answered right if its margin is above 0.
    """
    by_score: dict[str, list] = {score: [] for score in SCORES}
    for item, rows in zip(encoded, scores, strict=True):
        sizes = np.array([len(response) for response in item.responses])
        example = item.example
        for score, leads in by_score.items():
            lengths = sizes if score == "token" else None
            leads.append(
                [correct(row, example.label, lengths, example.also_right)[1] for row in rows]
            )
    return {score: np.array(leads) for score, leads in by_score.items()}


def target_scores(encoded: list[Encoded], scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """TruthfulQA's scores, (questions, 1 + configurations) each: margins "mc1", masses "mc2".

    scores: for each question the array that `score` returns.
    Empty unless every question says which of its choices are right.
    """
    asked = [(item.example.label, item.example.targets) for item in encoded]
    margins: list[list[float]] = []
    masses: list[list[float]] = []
    for (label, known), rows in zip(asked, scores, strict=True):
        if known is None:
            return {}
        margins.append([mc1(row, label, known) for row in rows])
        masses.append([mc2(row, known) for row in rows])
    return {"mc1": np.array(margins), "mc2": np.array(masses)} if asked else {}


def mc1(log_likelihoods: np.ndarray, label: int, targets: Targets) -> float:
    """TruthfulQA's MC1: the margin, in nats, of the right choice over the best of the others.

    log_likelihoods: (choices,) summed over tokens. The question is answered right if the margin is
    above 0. Lin et al. 2022 (arXiv 2109.07958), section 3.
    """
    others = [index for index in targets.mc1 if index != label]
    return float(log_likelihoods[label] - log_likelihoods[others].max())


def mc2(log_likelihoods: np.ndarray, targets: Targets) -> float:
    """TruthfulQA's MC2: the share, 0 to 1, of the choices' probability that the right ones have.

    log_likelihoods: (choices,) summed over tokens.
    """
    compared = log_likelihoods[list(targets.mc2)]
    masses = np.exp(compared - compared.max())
    is_right = np.isin(targets.mc2, targets.right)
    return float(masses[is_right].sum() / masses.sum())


def correct(
    log_likelihoods: np.ndarray,
    label: int,
    lengths: np.ndarray | None = None,
    also_right: Sequence[int] = (),
) -> tuple[bool, float]:
    """Whether the preferred choice scores strictly highest, and its margin in nats.

    log_likelihoods: (choices,) summed over tokens. label: the preferred choice.
    lengths: (choices,) numbers of tokens, to compare per token; None compares the sums.
    also_right: other right choices, which the preferred one need not lead.
    """
    values = log_likelihoods if lengths is None else log_likelihoods / lengths
    margin = values[label] - np.delete(values, [label, *also_right]).max()
    return bool(margin > 0), float(margin)
