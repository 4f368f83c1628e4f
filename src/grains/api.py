"""The method in a few calls, without a file in between: attribute, fit, score, generate.

Inside `with vectors.apply(lm, alpha):` all of them see the steered model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from tqdm import tqdm

from grains import attribution, generation, manifests, prompts, scoring, stage1, vectors
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.models import load
from grains.prompts import Encoded
from grains.settings import (
    ABLATION_METHODS,
    METHODS,
    MODES,
    AblationSettings,
    AttributionSettings,
    DataSettings,
)
from grains.states import StatesInMemory
from grains.steering import SteeringVectors

__all__ = ["attribute", "fit", "generate", "load", "score"]

Pair = Example | tuple[str, str, str]


@dataclass(frozen=True)
class TokenAttribution:
    """How far each token of a prompt pushes the model to the preferred answer.

    tokens: the P tokens; scores: (P,), positive towards the preferred answer.
    completeness_error: |sum of the scores - (f(x) - f(b))| as a share of |f(x) - f(b)|; NaN for a
    method that is not complete. image: (P,) bool, which tokens are a picture's.
    """

    tokens: list[str]
    scores: np.ndarray
    completeness_error: float
    image: np.ndarray


def attribute(
    lm: LanguageModel,
    prompt: str,
    chosen: str,
    rejected: str,
    *,
    image: Any = None,
    style: str = "qa",
    settings: AttributionSettings | None = None,
    batch_tokens: int = AblationSettings.batch_tokens,
    seed: int = 0,
) -> TokenAttribution:
    """Attribute log P(chosen) - log P(rejected) to the prompt's tokens (paper, section 3.1).

    image: a PIL picture or the path of one, for an image-text model. style: qa, chat or plain.
    settings: how; by default Integrated Gradients, refined until they are complete to 5 %.
    batch_tokens: positions computed at a time. seed: of smoothgrad's noise.
    Raises UserError for an empty text, or one longer than the model's context.
    """
    settings = settings or AttributionSettings()
    if settings.objective != "contrastive":
        raise UserError(
            f"objective '{settings.objective}' gives scores for each answer: attribute compares "
            "two answers, so give 'contrastive'"
        )
    encoded = prompts.encode(lm, _example(0, (prompt, chosen, rejected), image), style)
    noise = torch.Generator().manual_seed(seed)
    (result,) = attribution.attribute(lm, encoded, settings, batch_tokens, noise)
    return TokenAttribution(
        lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids),
        result.scores,
        result.relative_error,
        encoded.image.numpy(),
    )


def fit(
    lm: LanguageModel,
    pairs: Iterable[Pair],
    method: str = "mean",
    *,
    mode: str = "pos",
    settings: AblationSettings | None = None,
) -> SteeringVectors:
    """One steering vector a layer from preference pairs (paper, section 3.2).

    pairs: (prompt, preferred answer, dispreferred answer), or `Example`s with their choices.
    method: mean or pca of the shifts that ablating the top tokens makes; gradient, caa, repe and
        the controls random, shuffled and rand_tokens (see `grains.vectors.make`).
    mode: of mean and pca: pos, or both = pos - neg.
    settings: how tokens are attributed and ablated, the prompt style, the seed.
    Raises UserError for no pairs, an unknown method, or a text that the model cannot take.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}': expected {', '.join(METHODS)}")
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}': expected {' or '.join(MODES)}")
    examples = [_example(number, pair) for number, pair in enumerate(pairs)]
    if not examples:
        raise UserError("vectors are made from preference pairs, found none")
    tops = ("pos", "neg") if mode == "both" and method in ABLATION_METHODS else ("pos",)
    tops = ("rand",) if method == "rand_tokens" else tops
    settings = replace(settings or AblationSettings(), tops=tops)
    ablates = method in (*ABLATION_METHODS, "rand_tokens")

    tensors = []
    for unit, example in enumerate(tqdm(examples, desc=f"{method} vectors", unit="pair")):
        encoded = prompts.encode(lm, example, settings.prompt_style)
        tensors.append(
            stage1.one_example(lm, encoded, settings, unit, {})[0]
            if ablates
            else stage1.plain_tensors(lm, encoded, settings)
        )
    info = manifests.stage1(lm, examples, DataSettings("in memory", None, len(examples)), settings)
    states = {top: StatesInMemory(tensors, top, info) for top in tops}
    states.setdefault("pos", states[tops[0]])  # what selections have alike is read of this one
    return vectors.make(states, method, mode, settings.seed)


def score(
    lm: LanguageModel,
    prompt: str,
    answers: Sequence[str],
    *,
    image: Any = None,
    style: str = "qa",
    batch_tokens: int = AblationSettings.batch_tokens,
) -> np.ndarray:
    """(answers,) log P of each answer to a prompt, in nats, summed over its tokens."""
    example = replace(_example(0, (prompt, "", ""), image), choices=tuple(answers))
    encoded = prompts.encode(lm, example, style)
    return scoring.score(lm, [encoded], [], batch_tokens)[0][0]


@overload
def generate(lm: LanguageModel, prompt: str, **options: Any) -> str: ...
@overload
def generate(lm: LanguageModel, prompt: Sequence[str], **options: Any) -> list[str]: ...
def generate(
    lm: LanguageModel,
    prompt: str | Sequence[str],
    *,
    image: Any = None,
    style: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> str | list[str]:
    """What the model answers to a prompt, or to each of several.

    style: by default chat where the model has a chat template, else qa. temperature: 0 is greedy.
    """
    style = style or ("chat" if lm.tokenizer.chat_template else "qa")
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    encoded: list[Encoded] = [
        prompts.encode(lm, replace(_example(number, (text, "", ""), image), choices=()), style)
        for number, text in enumerate(texts)
    ]
    (answers,) = generation.generate(lm, encoded, [], max_new_tokens, temperature, seed)
    return answers[0] if isinstance(prompt, str) else answers


def _example(number: int, pair: Pair, image: Any = None) -> Example:
    if isinstance(pair, Example):
        return pair.pair()
    if len(pair) != 3 or not all(isinstance(text, str) for text in pair):
        raise UserError(
            f"pair {number}: expected three texts (prompt, preferred answer, dispreferred "
            f"answer), found {pair!r}"
        )
    prompt, *choices = pair
    return Example(f"pair {number}", prompt, tuple(choices), 0, image=image)
