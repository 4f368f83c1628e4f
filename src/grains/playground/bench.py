"""What the page computes: a question's attribution, vectors, answers and dose-response."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grains import api
from grains.api import TokenAttribution
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import AblationSettings, PromptSettings
from grains.steering import Configuration, SteeringVectors

STRENGTHS = 11  # of a dose-response, from the strongest against the vectors to the strongest along
LARGEST_FILE = 16 * 2**20  # bytes of a picture


@dataclass(frozen=True)
class Question:
    """A prompt with its two answers. image: the path of its picture, None without one.

    Raises UserError for a text that is missing, answers that are the same, and a picture's file of
    more than LARGEST_FILE bytes.
    """

    prompt: str
    chosen: str
    rejected: str
    image: str | None = None

    def __post_init__(self) -> None:
        texts = self.prompt, self.chosen, self.rejected
        names = "prompt", "preferred answer", "dispreferred answer"
        for name, text in zip(names, texts, strict=True):
            if not text.strip():
                raise UserError(f"the {name} is empty: write one")
        if self.chosen.strip() == self.rejected.strip():
            raise UserError("the two answers are the same: write two that differ")
        if self.image and (size := Path(self.image).stat().st_size) > LARGEST_FILE:
            raise UserError(
                f"the picture's file has {size / 2**20:.0f} MiB: give one of at most "
                f"{LARGEST_FILE // 2**20} MiB"
            )


@dataclass(frozen=True)
class Steering:
    """How the page steers. layers: as text, such as '8-24'; units: see `SteeringVectors.scaled`."""

    vectors: SteeringVectors
    layers: str
    units: str

    def at(self, alpha: float | None) -> Configuration:
        """Raises UserError for a missing strength, and as `SteeringVectors.at`."""
        if alpha is None:
            raise UserError("no strength is given: choose one")
        return self.vectors.at(alpha, self.layers.replace(",", " ").split(), self.units)


@dataclass(frozen=True)
class Curve:
    """The margin log P(chosen) - log P(rejected) over the strength, both (STRENGTHS,); in nats."""

    alphas: np.ndarray
    margins: np.ndarray

    def at(self, alpha: float) -> float:
        """The margin at a strength, on the straight lines between those that were computed."""
        return float(np.interp(alpha, self.alphas, self.margins))


@dataclass(frozen=True)
class Bench:
    """A model, and what its part of the page begins with.

    style: of all prompts. pairs: the built-in ones, which vectors can be made from.
    shown: questions to begin with. method: of the first vectors. layers, strength: of the first
    steering; reach: the slider's largest strength.
    """

    lm: LanguageModel
    style: str
    pairs: Sequence[Example]
    shown: Sequence[Example]
    method: str
    layers: str
    strength: float
    reach: float

    def attribute(self, question: Question) -> TokenAttribution:
        """See `api.attribute`."""
        return api.attribute(
            self.lm,
            question.prompt,
            question.chosen,
            question.rejected,
            image=question.image,
            style=self.style,
        )

    def fit(self, pairs: Iterable[Example | tuple[str, str, str]], method: str) -> SteeringVectors:
        """See `api.fit`."""
        settings = AblationSettings(prompt=PromptSettings(self.style))
        return api.fit(self.lm, pairs, method, settings=settings)

    def load(self, path: str | None) -> SteeringVectors:
        """Vectors from a file. Raises UserError for another file, and vectors of another model."""
        if path is None:
            raise UserError("no file is given: choose one that save or a script wrote")
        vectors = SteeringVectors.load(path)
        vectors.check_model(self.lm)
        return vectors

    def answers(
        self, question: Question, steering: Steering, alpha: float, tokens: int
    ) -> Iterator[list[str]]:
        """The base model's answer and the steered one as they are written (see `api.stream`)."""
        return api.stream(
            self.lm,
            question.prompt,
            [steering.at(alpha)],
            image=question.image,
            style=self.style,
            max_new_tokens=tokens,
            keep_thoughts=True,
        )

    def response(self, question: Question, steering: Steering, reach: float | None) -> Curve:
        """The dose-response from -reach to reach, in a batch. Raises UserError for a bad reach."""
        if reach is None or not 0 < reach < math.inf:
            raise UserError(f"the largest strength is {reach}: give a number above 0")
        alphas = np.linspace(-reach, reach, STRENGTHS)
        scores = api.score(
            self.lm,
            question.prompt,
            [question.chosen, question.rejected],
            image=question.image,
            style=self.style,
            steering=[steering.at(float(alpha)) for alpha in alphas],
        )
        return Curve(alphas, scores[:, 0] - scores[:, 1])


def table_pairs(rows: Iterable[Sequence]) -> list[tuple[str, str, str]]:
    """The pairs of a table's rows; empty rows are left out.

    Raises UserError for a row that lacks a text, and for a table without pairs.
    """
    pairs = []
    for number, row in enumerate(rows, start=1):
        texts = [str(cell or "").strip() for cell in row]
        if not any(texts):
            continue
        if not all(texts):
            raise UserError(
                f"pair {number}: a text is missing; give a prompt, a preferred answer and a "
                "dispreferred answer"
            )
        pairs.append((texts[0], texts[1], texts[2]))
    if not pairs:
        raise UserError("the table has no pair: write a prompt and two answers in a row")
    return pairs
