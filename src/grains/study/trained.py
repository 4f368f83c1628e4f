"""Steering vectors trained on the preference pairs, with penalties for what else they change.

The vectors of the method `gradient` are one step of an ascent on the pairs' objective. Here the
ascent goes on, at all steered layers jointly, as in BiPO (Cao et al. 2024, arXiv 2406.00045),
behind a gate (`grains.study.gates`), with a margin as the loss and with penalties. On a batch of
pairs, of texts, of questions and of answers, the loss is

    - PAIR_WEIGHT/2 (log sigmoid(margin per token / 1.5) + log sigmoid(summed margin / 24))
    + TEXT_WEIGHT max(0, rise of a text's negative log-likelihood per token)
    + KL of the choice between a question's answers from the base model's, per token and summed
    + weight max(0, rise of an answer's negative log-likelihood per token - allowed)

where a margin is log P(y+) - log P(y-). The answers are what the base model itself writes to
the prompts of the pairs, where the gate is open: without this penalty the vectors raise the
margins by breaking the language of answers. `AIMS` has the weight, what is allowed, and whether
the token that ends an answer is one of its tokens. Answers are sampled, because a small model's
greedy answers repeat themselves. Text and question penalties use vectors scaled by HELD_AT.
Every step leaves out layers drawn at random (dropout), as 50 pairs are quickly overfitted. Several
runs may be averaged, which cancels effects of the order of examples. The paper has no such vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import kl_div, logsigmoid
from tqdm import tqdm

from grains import positions
from grains.calls import Calls
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.logprobs import ResponseScorer
from grains.prompts import Encoded
from grains.replay import replay
from grains.scoring import batches, packed_batch
from grains.steering import Gate, steer
from grains.study.lora import fitting

PAIR_WEIGHT, TEXT_WEIGHT, QUESTION_WEIGHT = 2.2, 3.0, 1.0
PAIRS, TEXTS, QUESTIONS, ANSWERS = 10, 3, 12, 10  # of a step
# Units of the margins, five times their standard deviation over a small model's questions: with
# smaller ones, pairs that are right already have no gradient, and test questions gain less.
TOKEN_UNIT, SUM_UNIT = 1.5, 24.0
CHOICE_UNIT = 0.3  # temperature of the choice by log-likelihoods per token


class Aim(NamedTuple):
    """How vectors are trained to let the model's own answers change, or stay as they are.

    allowed: nats per token that an answer may lose for free. weight: of what it loses beyond them.
    epochs: over the pairs. learning_rate: of the first step; it falls to 0.
    runs: averaged; each has its own order of examples and its own dropout.
    ends: whether the token that ends an answer is one of its tokens, so that vectors do not make
        answers go on where the base model's end.
    """

    allowed: float
    weight: float
    epochs: int
    learning_rate: float
    runs: int
    ends: bool


# For the same change of answers, small steps gain more, and one long run more than the mean of
# four of a quarter of its length (docs/trials.md).
AIMS = {
    "change": Aim(1.2, 1.0, 5, 4e-4, runs=4, ends=False),
    "keep": Aim(0.05, 3.0, 32, 2e-4, runs=1, ends=True),
}
DROPPED = 0.5  # probability that a layer is left out in a step, where there are many layers
HELD_AT = 1.5  # scale of the vectors in the text and question penalties, a margin of safety


def recipe(aim: Aim) -> dict:
    """All that trained vectors depend on beside their examples."""
    return {
        "epochs": aim.epochs,
        "learning_rate": aim.learning_rate,
        "weights": [PAIR_WEIGHT, TEXT_WEIGHT, QUESTION_WEIGHT, aim.weight],
        "sizes": [PAIRS, TEXTS, QUESTIONS, ANSWERS],
        "units": [TOKEN_UNIT, SUM_UNIT, CHOICE_UNIT],
        "allowed": aim.allowed,
        "dropped": DROPPED,
        "held_at": HELD_AT,
        "runs": aim.runs,
        **({"ends": True} if aim.ends else {}),  # which older vectors do not name
    }


def trainer(
    lm: LanguageModel,
    pairs: list[Encoded],
    texts: list[Encoded],
    questions: list[Encoded],
    answers: list[Encoded],
    norms: Tensor,
    gate: Gate,
    layers: list[int],
    aim: Aim,
    seed: int = 0,
    max_tokens: int = 2048,
    where: str = "all",
) -> Callable[[int], Tensor]:
    """Prepare the training of one vector a layer, in `aim.runs` runs; the model stays as it is.

    pairs: examples with two responses, the preferred one first. texts: see `costs.continuation`.
    questions: each with the same number of answers; which is right does not matter.
    answers: prompts with an answer sampled from the model itself, one response each.
    norms: (L,) median ||h_l||, the unit of each layer's vector in training.
    gate: scales the vectors at each position, in training as later.
    layers: those that are steered. aim: one of `AIMS`. max_tokens: positions computed at a time,
        which changes no more than rounding. where: the positions that are steered, in training as
        later (see `grains.settings.parse_positions`).
    Returns a function from the number of a run to (L, D), zero at layers that are not steered. The
    mean of all runs has strength 1 in absolute units. A run depends on its number alone, not on
    the process or the order. Raises UserError if pairs, texts, questions or answers are missing;
    so does the function if the loss becomes NaN or infinite.
    """
    for name, items in (
        ("pairs", pairs),
        ("texts", texts),
        ("questions", questions),
        ("answers", answers),
    ):
        if not items:
            raise UserError(
                f"training vectors needs pairs, texts, questions and answers, found no {name}"
            )
    kinds = (pairs, texts, questions, answers)
    remaining = replace(lm, memory=lm.memory - sum(_kept_bytes(lm, items) for items in kinds))
    fits = [fitting(remaining, items, max_tokens) for items in kinds]
    width, checkpointed = min(width for width, _ in fits), any(flag for _, flag in fits)
    terms = [
        _Term(lm, min(layers), width, where, *settings)
        for settings in (
            (pairs, PAIRS, PAIR_WEIGHT, 1.0, pair_losses),
            (texts, TEXTS, TEXT_WEIGHT, HELD_AT, text_losses),
            (questions, QUESTIONS, QUESTION_WEIGHT, HELD_AT, question_losses),
            (answers, ANSWERS, aim.weight, 1.0, partial(answer_losses, allowed=aim.allowed)),
        )
    ]
    generator = torch.Generator().manual_seed(seed)
    plans = [
        _plan(terms, len(layers), aim.epochs * len(terms[0].groups), generator)
        for _ in range(aim.runs)
    ]
    row = {layer: index for index, layer in enumerate(layers)}

    def run(index: int) -> Tensor:
        vectors = torch.zeros(len(layers), lm.hidden_size, requires_grad=True)
        optimizer = torch.optim.Adam([vectors], lr=aim.learning_rate, betas=(0.9, 0.95))

        def after(stretch: Tensor, part: Tensor | None, layer: int, states: Tensor) -> Tensor:
            if layer not in row:
                return states
            vector = stretch[row[layer]] * norms[layer] * vectors[row[layer]]
            return steer(states, vector, gate.at(layer), part)

        plan = plans[index]
        bar = tqdm(
            plan, desc=f"training vectors, run {index + 1} of {aim.runs}", unit="step", leave=False
        )
        for step, (kept, groups) in enumerate(bar):
            optimizer.param_groups[0]["lr"] = aim.learning_rate * (1 - step / len(plan))
            total = sum(
                term.backward(group, checkpointed, vectors, partial(after, term.stretch * kept))
                for term, group in zip(terms, groups, strict=True)
            )
            if not math.isfinite(total):
                raise UserError(
                    f"the loss of the vectors became {total} in step {step + 1}: give dtype float32"
                )
            optimizer.step()
            optimizer.zero_grad()
        trained = torch.zeros(len(lm.layers), lm.hidden_size)
        trained[layers] = norms[layers, None] * vectors.detach()
        return trained

    return run


def _plan(
    terms: list[_Term], layers: int, steps: int, generator: torch.Generator
) -> list[tuple[Tensor, list[_Group]]]:
    """For every step of a run: the factor of each layer, and a group of items for each term."""
    queues = [term.queue(generator) for term in terms]
    return [(dropout(layers, generator), [next(queue) for queue in queues]) for _ in range(steps)]


def dropout(layers: int, generator: torch.Generator) -> Tensor:
    """(layers,) factors of the vectors in a step: 0 or more than 1, with mean 1.

    The fewer layers there are, the fewer are left out; a single layer never is.
    """
    share = DROPPED * (1 - 1 / layers)
    return (torch.rand(layers, generator=generator) >= share) / (1 - share)


def pair_losses(values: Tensor, base: Tensor, lengths: Tensor) -> Tensor:
    """(n,) from (n, 2) log-likelihoods of y+ and y-, steered and base, and their tokens (n, 2)."""
    chosen, rejected = (values / lengths).unbind(dim=1)
    return (
        -(
            logsigmoid((chosen - rejected) / TOKEN_UNIT)
            + logsigmoid((values[:, 0] - values[:, 1]) / SUM_UNIT)
        )
        / 2
    )


def text_losses(values: Tensor, base: Tensor, lengths: Tensor) -> Tensor:
    """(n,) rise of a text's negative log-likelihood (n, 1) over the base's, per token, or 0."""
    return ((base - values) / lengths)[:, 0].clamp_min(0)


def answer_losses(values: Tensor, base: Tensor, lengths: Tensor, allowed: float) -> Tensor:
    """(n,) rise of an answer's negative log-likelihood (n, 1), per token, beyond the allowed."""
    return (((base - values) / lengths)[:, 0] - allowed).clamp_min(0)


def question_losses(values: Tensor, base: Tensor, lengths: Tensor) -> Tensor:
    """(n,) KL of the choice between the answers (n, C) from the base model's."""
    per_token = kl_div(
        (values / lengths / CHOICE_UNIT).log_softmax(1),
        (base / lengths / CHOICE_UNIT).log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    summed = kl_div(
        values.log_softmax(1), base.log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    return per_token + summed


@dataclass(frozen=True)
class _Batch:
    """Items that are computed together.

    states: (n, T, D) base output of the first steered layer, which no vector changes.
    calls: what the layers are called with. read: gives the log-likelihoods.
    base: (n, C) the base model's log-likelihoods; lengths: (n, C) the responses' tokens.
    where: (n, T) bool, the steered positions; None: all.
    """

    states: Tensor
    calls: Calls
    read: ResponseScorer
    base: Tensor
    lengths: Tensor
    where: Tensor | None


_Group = list[_Batch]


def _kept_bytes(lm: LanguageModel, items: list[Encoded]) -> int:
    """About the size of the states and masks of items, which are kept for all steps."""
    position = lm.hidden_size * lm.dtype.itemsize
    return sum(item.length * (position + item.length) for item in items)


class _Term:
    """A term of the loss: the items it is computed on, in groups of similar length.

    The base model computes every item once; a step replays the layers above `first`.
    first: the first steered layer. width: positions computed at a time. where: the steered ones
    (see `grains.settings.parse_positions`). size: items of a group.
    stretch: scale of the vectors in this loss.
    """

    def __init__(
        self,
        lm: LanguageModel,
        first: int,
        width: int,
        where: str,
        items: list[Encoded],
        size: int,
        weight: float,
        stretch: float,
        losses: Callable[[Tensor, Tensor, Tensor], Tensor],
    ):
        self.lm, self.first, self.weight, self.losses = lm, first, weight, losses
        self.stretch, self.where = stretch, where
        order = sorted(range(len(items)), key=lambda index: items[index].length)
        members = [
            [items[index] for index in order[start : start + size]]
            for start in range(0, len(order), size)
        ]
        self.groups = [
            [
                self._computed([group[index] for index in batch])
                for batch in batches([item.length for item in group], width)
            ]
            for group in members
        ]

    @torch.no_grad()
    def _computed(self, items: list[Encoded]) -> _Batch:
        captured, read = packed_batch(self.lm, items)
        states = replay(self.lm, captured.embeds, captured.calls, stop=self.first + 1)
        final = replay(self.lm, states, captured.calls, start=self.first + 1)
        lengths = torch.tensor([list(map(len, item.responses)) for item in items])
        base = read(final[None]).view(lengths.shape)
        where = positions.of_batch(self.where, items, states.shape[1])
        where = None if where is None else where.to(states.device)
        return _Batch(states, captured.calls, read, base, lengths, where)

    def backward(
        self,
        group: _Group,
        checkpointed: bool,
        vectors: Tensor,
        after: Callable[[Tensor | None, int, Tensor], Tensor],
    ) -> float:
        """Add the gradient of a group's weighted mean loss to the vectors'; returns the loss.

        after: what steers the positions of a batch; it and checkpointed: see `replay`.
        """
        total, count = 0.0, sum(len(batch.base) for batch in group)
        for batch in group:
            steers = partial(after, batch.where)
            final = replay(
                self.lm,
                steers(self.first, batch.states),
                batch.calls,
                start=self.first + 1,
                after=steers,
                checkpointed=checkpointed,
            )
            values = batch.read(final[None]).view(batch.base.shape)
            losses = self.losses(values, batch.base, batch.lengths)
            loss = self.weight * losses.sum() / count
            total += loss.item()
            if loss != 0:  # a penalty of zero has no gradient
                loss.backward(inputs=[vectors])
        return total

    def queue(self, generator: torch.Generator) -> Iterator[_Group]:
        """The groups, endlessly, in a new random order each time."""
        while True:
            for index in torch.randperm(len(self.groups), generator=generator):
                yield self.groups[index]
