"""What steering costs: does the model still predict ordinary text and answer easy questions?

Both are measured as steered at inference, by replay above the base pass: at every position, unless
some are chosen. A passage counts as the response to its first token.
Passages and unrelated questions are split into train, validation and test: vectors and gates are
trained on the first, strengths and configurations are chosen on the second, and costs are reported
on test only.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import scipy

from grains import data
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded, encode
from grains.settings import PromptSettings

NEUTRAL = data.PACKAGED / "neutral_text.jsonl"
VARIED = data.PACKAGED / "varied_text.jsonl"
UNRELATED = data.PACKAGED / "unrelated.jsonl"
UNRELATED_TRAINING = data.PACKAGED / "unrelated_training.jsonl"
# The split of a passage by its number modulo 8. Of the unrelated questions the even ones are for
# validation, the odd ones for test; those for training have a file of their own.
PASSAGES = {"training": (2, 3, 4, 6, 7), "validation": (0,), "test": (1, 5)}


def neutral_texts(path: Path = NEUTRAL) -> list[str]:
    """The embedded passages of ordinary prose, or of other kinds (`VARIED`)."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def unrelated_examples(path: Path = UNRELATED) -> list[Example]:
    """The embedded easy questions of four choices, in the order of the file."""
    rows, source = data.load("unrelated", "train", str(path))
    return [data.read(rows, source, index) for index in range(len(rows))]


@cache
def passages(lm: LanguageModel, split: str, path: Path = NEUTRAL) -> list[Encoded]:
    """The passages of a file in a split (training, validation or test)."""
    return [
        continuation(lm, text)
        for index, text in enumerate(neutral_texts(path))
        if index % 8 in PASSAGES[split]
    ]


@cache
def unrelated_questions(lm: LanguageModel, split: str) -> list[Encoded]:
    """The unrelated questions in a split (training, validation or test)."""
    examples = (
        unrelated_examples(UNRELATED_TRAINING)
        if split == "training"
        else unrelated_examples()[("validation", "test").index(split) :: 2]
    )
    return [encode(lm, example, "qa") for example in examples]


def training_passages(lm: LanguageModel) -> list[Encoded]:
    """The passages of prose and of other kinds that gates and vectors are trained on."""
    return passages(lm, "training") + passages(lm, "training", VARIED)


def may_stay(items: list[Encoded]) -> list[Encoded]:
    """Texts that are no mistake where the steered positions name nothing in them."""
    return [replace(item, may_stay=True) for item in items]


def gate_background(
    lm: LanguageModel, pairs: list[Example], prompt: PromptSettings
) -> list[Encoded]:
    """The text that a gate is fitted to stay shut on, all of it for training, so that it reports no
    cost: passages, questions in their own style and in that of the pairs, and the pairs' questions
    without their context.

    pairs: the steering examples. prompt: how these are asked.
    """
    questions = unrelated_questions(lm, "training")
    alike = [encode(lm, item.example, prompt) for item in questions[1::2]]
    bare = [encode(lm, replace(pair, context=""), prompt) for pair in pairs if pair.context]
    return [*training_passages(lm), *questions[::2], *alike, *bare]


def perplexity_of(encoded: list[Encoded], scores: list[np.ndarray]) -> np.ndarray:
    """(1 + C,) perplexities of texts (see `continuation`) from what `score` gives of them."""
    total = sum(scores, np.zeros_like(scores[0]))
    return np.exp(-total[:, 0] / sum(len(item.responses[0]) for item in encoded))


def perplexity_rise(encoded: list[Encoded], scores: list[np.ndarray]) -> np.ndarray:
    """(1 + C,) rises of the perplexity of texts over the base model's, 0.05 for +5 %."""
    perplexity = perplexity_of(encoded, scores)
    return perplexity / perplexity[0] - 1


def perplexity_bound(encoded: list[Encoded], scores: list[np.ndarray]) -> np.ndarray:
    """(1 + C,) upper bound of the rise of perplexity over the base model's, 0.05 for +5 %.

    The upper end of a one-sided 95 % interval (Student's t) of the rise of the loss per token over
    texts, each weighted by its tokens: a bound for other texts of the same kind.
    """
    tokens = np.array([len(item.responses[0]) for item in encoded])
    losses = -np.stack([values[:, 0] for values in scores])  # (texts, 1 + C)
    rises = (losses - losses[:, :1]).sum(axis=0) / tokens.sum()
    residuals = losses - losses[:, :1] - rises * tokens[:, None]
    count = len(tokens)
    error = np.sqrt((residuals**2).sum(axis=0) * count / (count - 1)) / tokens.sum()
    return np.expm1(rises + scipy.stats.t.ppf(0.95, count - 1) * error)


def accuracy_of(leads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """(1 + C,) accuracies on questions, in sum and per token, from what `margins` gives of them."""
    return {kind: (lead > 0).mean(axis=0) for kind, lead in leads.items()}


def continuation(lm: LanguageModel, text: str) -> Encoded:
    """A text as the response to its first token, so that `score` gives its log-likelihood."""
    whole = encode(lm, Example(repr(text[:40]), text, (), 0), "plain")
    first, *rest = whole.prompt_ids
    if not rest:
        raise UserError(
            f"text {text!r} is a single token, so nothing is predicted: use longer texts"
        )
    return Encoded(
        whole.example,
        lm.tokenizer.decode([first]),
        {key: value[:, :1] for key, value in whole.inputs.items()},
        [rest],
        whole.content[:1],
        whole.words[:1],
        whole.image[:1],
    )
