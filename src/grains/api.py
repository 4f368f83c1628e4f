"""The method in a few function calls, without files: attribute, fit, score, generate, stream.

Inside a `with vectors.apply(lm, alpha):` block all of them use the steered model. See docs/api.md.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import numpy as np
import torch
from tqdm import tqdm

from grains import (
    attribution,
    generation,
    manifests,
    of_model,
    prompts,
    scoring,
    stage1,
    thinking,
    vectors,
    vision,
)
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.models import load
from grains.prompts import Encoded
from grains.settings import (
    METHODS,
    MODES,
    NEED_ABLATION,
    NEED_GRADIENTS,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    DecodingSettings,
    PromptSettings,
    selections,
)
from grains.states import StatesInMemory
from grains.steering import Configuration, SteeringVectors

__all__ = ["attribute", "fit", "generate", "load", "score", "stream"]

AT_A_TIME = 64  # pairs that are encoded at a time, pictures included

Pair = Example | tuple[str, str, str]


@dataclass(frozen=True)
class TokenAttribution:
    """How much each token of a prompt pushes the model to the preferred answer.

    tokens: the P tokens, as the tokenizer writes them.
    scores: (P,) in nats, positive towards the preferred answer.
    completeness_error: |sum of the scores - (f(x) - f(b))| as a share of |f(x) - f(b)|; NaN for
        smoothgrad and vanilla, which have no completeness.
    image: (P,) bool, which tokens are of the picture.
    boxes: what of the picture each of these tokens shows, in pixels of the upright picture: x0, y0,
        x1, y1 from the upper left corner; None for a token that shows nothing of it, or where it is
        not known.
    """

    tokens: list[str]
    scores: np.ndarray
    completeness_error: float
    image: np.ndarray
    boxes: list[vision.Box | None]


def attribute(
    lm: LanguageModel,
    prompt: str,
    chosen: str,
    rejected: str,
    *,
    image: Any = None,
    style: str | PromptSettings = "qa",
    settings: AttributionSettings | None = None,
    batch_tokens: int = AblationSettings.batch_tokens,
    seed: int = 0,
) -> TokenAttribution:
    """Attribute log P(chosen) - log P(rejected) to the prompt's tokens (paper, section 3.1).

    image: a PIL image or a path, for an image-text model.
    style: qa, chat or plain (see `grains.rendering.render`), or all settings of a prompt.
    settings: by default Integrated Gradients, refined until the completeness error is at most 5 %
        or 200 gradients are computed.
    batch_tokens: the number of positions computed at a time.
    seed: of smoothgrad's noise.
    Raises UserError for another objective than contrastive, an empty text, a text longer than the
    model's context, and a picture that the model cannot take.
    """
    settings = settings or AttributionSettings()
    if settings.objective != "contrastive":
        raise UserError(
            f"objective '{settings.objective}' scores each answer on its own, but attribute "
            "compares two answers: give 'contrastive'"
        )
    encoded = prompts.encode(lm, _example(0, (prompt, chosen, rejected), image), style)
    _warn(prompts.tally([encoded]))
    noise = torch.Generator().manual_seed(seed)
    (result,) = attribution.attribute(lm, encoded, settings, batch_tokens, noise)
    return TokenAttribution(
        lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids),
        result.scores,
        result.relative_error,
        encoded.image.numpy(),
        prompts.boxes(lm, encoded),
    )


def fit(
    lm: LanguageModel,
    pairs: Iterable[Pair],
    method: str = "mean",
    *,
    mode: str = "pos",
    settings: AblationSettings | None = None,
) -> SteeringVectors:
    """One steering vector per layer from preference pairs (paper, sections 3.1 and 3.2).

    pairs: N times (prompt, preferred answer, dispreferred answer), or `Example`s.
    method: mean or pca (the paper's), gradient, caa, repe, icv, iti, nl_iti, vti, or a
        control: random, shared_random, rotated, rand_tokens, shuffled (see `grains.vectors.make`).
    mode: for mean and pca: pos, or both (pos minus neg).
    settings: attribution, ablation, prompt style and seed. `tops` is set by method and mode.
    Raises UserError for an unknown method or mode, no pairs, and a pair that the model cannot take.
    """
    if method not in METHODS:
        raise UserError(f"unknown method '{method}': expected {', '.join(METHODS)}")
    if mode not in MODES:
        raise UserError(f"unknown mode '{mode}': expected {' or '.join(MODES)}")
    examples = [_example(number, pair) for number, pair in enumerate(pairs)]
    if not examples:
        raise UserError("no pairs are given: vectors are made from preference pairs")
    tops = selections([method], [mode])
    settings = replace(settings or AblationSettings(), tops=tops)
    counts = Counter[str]()

    def encode(example: Example) -> Encoded:
        encoded = prompts.encode(lm, example, settings.prompt)
        counts.update(prompts.tally([encoded]))
        return encoded

    bar = tqdm(examples, desc=f"{method} vectors", unit="pair")
    if method in NEED_ABLATION:
        tensors = [
            stage1.one_example(lm, encode(example), settings, unit, {})[0]
            for unit, example in enumerate(bar)
        ]
    else:
        tensors = []
        for start in range(0, len(examples), AT_A_TIME):  # not all pictures at once
            group = examples[start : start + AT_A_TIME]
            encoded = list(map(encode, group))
            if method in NEED_GRADIENTS:
                tensors += [item for item, _ in stage1.plain(lm, encoded, settings)]
            else:
                tensors += stage1.states_alone(lm, encoded, settings)
            bar.update(len(group))
        bar.close()
    info = manifests.stage1(
        lm, examples, DataSettings("in memory", None, len(examples)), settings, counts
    )
    _warn(counts)
    states = {top: StatesInMemory(tensors, top, info) for top in tops}
    states.setdefault("pos", states[tops[0]])  # for what all selections have in common

    def from_model(method: str) -> vectors.FromModel:
        return of_model.make(lm, examples, settings.prompt, settings.seed, method)

    return vectors.make(states, method, mode, settings.seed, from_model)


def score(
    lm: LanguageModel,
    prompt: str,
    answers: Sequence[str],
    *,
    image: Any = None,
    style: str | PromptSettings = "qa",
    steering: Configuration | Sequence[Configuration] | None = None,
    batch_tokens: int = AblationSettings.batch_tokens,
) -> np.ndarray:
    """log P of each answer to a prompt, in nats, summed over its tokens: (answers,).

    steering: `SteeringVectors.at(...)`, which may name positions; None: the model as it is. Of
        several, computed in one batch, the result is (configurations, answers).
    image, style, batch_tokens: see `attribute`.
    Raises UserError for an empty text, and as `attribute` for texts and pictures.
    """
    if isinstance(answers, str) or not answers:
        raise UserError(f"answers: expected a list of texts, found {answers!r}")
    example = replace(_example(0, (prompt, "", ""), image), choices=tuple(answers))
    encoded = prompts.encode(lm, example, style)
    _warn(prompts.tally([encoded]))
    if steering is None or isinstance(steering, Configuration):
        configurations = [steering] if steering else []
        return scoring.score(lm, [encoded], configurations, batch_tokens)[0][-1]
    return scoring.score(lm, [encoded], [*steering], batch_tokens)[0][1:]


@overload
def generate(
    lm: LanguageModel,
    prompt: str,
    *,
    image: Any = ...,
    style: str | PromptSettings | None = ...,
    max_new_tokens: int = ...,
    temperature: float | None = ...,
    top_p: float | None = ...,
    num_return: None = ...,
    stop: Sequence[str] = ...,
    generation_config: str = ...,
    seed: int = ...,
    steering: Configuration | None = ...,
    keep_thoughts: bool = ...,
) -> str: ...
@overload
def generate(
    lm: LanguageModel,
    prompt: list[str] | tuple[str, ...],
    *,
    image: Any = ...,
    style: str | PromptSettings | None = ...,
    max_new_tokens: int = ...,
    temperature: float | None = ...,
    top_p: float | None = ...,
    num_return: None = ...,
    stop: Sequence[str] = ...,
    generation_config: str = ...,
    seed: int = ...,
    steering: Configuration | None = ...,
    keep_thoughts: bool = ...,
) -> list[str]: ...
@overload
def generate(
    lm: LanguageModel,
    prompt: str | Sequence[str],
    *,
    image: Any = ...,
    style: str | PromptSettings | None = ...,
    max_new_tokens: int = ...,
    temperature: float | None = ...,
    top_p: float | None = ...,
    num_return: int,
    stop: Sequence[str] = ...,
    generation_config: str = ...,
    seed: int = ...,
    steering: Configuration | None = ...,
    keep_thoughts: bool = ...,
) -> list: ...
def generate(
    lm: LanguageModel,
    prompt: str | Sequence[str],
    *,
    image: Any = None,
    style: str | PromptSettings | None = None,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_p: float | None = None,
    num_return: int | None = None,
    stop: Sequence[str] = (),
    generation_config: str = "greedy",
    seed: int = 0,
    steering: Configuration | None = None,
    keep_thoughts: bool = False,
) -> str | list:
    """The model's answer to a prompt, or a list of its answers to several.

    image: a PIL image or a path, shown with every prompt.
    style: qa, chat or plain; by default chat if the model has a chat template, else qa.
    max_new_tokens: the length of an answer at most.
    temperature, top_p, generation_config, stop, seed: see `grains.settings.DecodingSettings`; by
        default the likeliest token is taken and nothing else acts.
    num_return: draw so many answers to each prompt; they take the place of its answer, as a list.
    keep_thoughts: give the whole text where the chat template has thoughts (see
        `grains.thinking.thoughts`), and not the answer after them alone.
    steering: see `score`.
    Raises UserError as `attribute` for texts and pictures, and for settings that cannot be.
    """
    settings = DecodingSettings(
        generation_config,
        temperature,
        top_p,
        1 if num_return is None else num_return,
        (stop,) if isinstance(stop, str) else tuple(stop),
        seed,
    )
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    asked, encoded = _asked(lm, texts, image, style)
    if not encoded:
        return []
    _warn(prompts.tally(encoded))
    configurations = [steering] if steering else []
    answers: list = generation.generate(lm, encoded, configurations, max_new_tokens, settings)[-1]
    if not keep_thoughts and (marks := thinking.thoughts(lm, asked)):
        split = [marks.split(text) for text in answers]
        answers = [answer for _, answer in split]
        if note := thinking.cut_off(split):
            warnings.warn(note, stacklevel=2)
    if num_return is not None:
        starts = range(0, len(answers), num_return)
        answers = [answers[start : start + num_return] for start in starts]
    return answers[0] if isinstance(prompt, str) else answers


def stream(
    lm: LanguageModel,
    prompt: str,
    steering: Sequence[Configuration] = (),
    *,
    image: Any = None,
    style: str | PromptSettings | None = None,
    max_new_tokens: int = 64,
    keep_thoughts: bool = False,
) -> Iterator[list[str]]:
    """The model's answer to a prompt, and its answers steered in some ways, as they are written.

    Yields 1 + len(steering) texts after every step of their common batch, the base model's first.
    The last are those of `generate`, greedy; before an answer begins, its text is empty.
    image, style, max_new_tokens, keep_thoughts: see `generate`. Raises UserError as that does.
    """
    asked, (encoded,) = _asked(lm, [prompt], image, style)
    _warn(prompts.tally([encoded]))
    written = generation.stream(lm, encoded, steering, max_new_tokens)
    marks = None if keep_thoughts else thinking.thoughts(lm, asked)
    if marks is None:
        yield from written
        return
    texts: list[str] = []
    for texts in written:
        yield [marks.so_far(text)[1] for text in texts]
    split = [marks.split(text) for text in texts]
    if note := thinking.cut_off(split):
        warnings.warn(note, stacklevel=2)
    yield [answer for _, answer in split]


def _asked(
    lm: LanguageModel, texts: list[str], image: Any, style: str | PromptSettings | None
) -> tuple[PromptSettings, list[Encoded]]:
    """How free answers to texts are asked for, and the prompts that do."""
    style = style or ("chat" if lm.tokenizer.chat_template else "qa")
    asked = PromptSettings(style) if isinstance(style, str) else style
    examples = [
        replace(_example(number, (text, "", ""), image), choices=())
        for number, text in enumerate(texts)
    ]
    return asked, [prompts.encode(lm, example, asked, free=True) for example in examples]


def _warn(counts: Counter[str]) -> None:
    for line in prompts.notes(counts):
        warnings.warn(line, stacklevel=3)


def _example(number: int, pair: Pair, image: Any = None) -> Example:
    if isinstance(pair, Example):
        return pair.pair()
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 3
        or not all(isinstance(text, str) for text in pair)
    ):
        raise UserError(
            f"pair {number + 1}: expected three texts (prompt, preferred answer, dispreferred "
            f"answer), found {pair!r}"
        )
    prompt, *choices = pair
    return Example(f"pair {number + 1}", prompt, tuple(choices), 0, image=image)
