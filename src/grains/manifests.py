"""Manifests: everything that the results of a stage depend on.

A run whose manifest differs never resumes or replaces another run's files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from grains import data, rendering, runs
from grains.data import Example
from grains.lm import LanguageModel
from grains.settings import (
    AblationSettings,
    AttributionSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
)
from grains.states import States


def stage1(
    lm: LanguageModel,
    examples: list[Example],
    source: DataSettings,
    settings: AblationSettings,
    counts: Mapping[str, int],
) -> dict:
    """The manifest of attributions and hidden states. counts: see `prompts.tally`."""
    fields = dataclasses.asdict(settings)
    del fields["prompt"], fields["attribution"]
    return {
        "stage": "token_ablation",
        "model": model(lm),
        "data": {
            "name": source.name,
            "path": source.path,
            "split": source.split,
            "num_samples": source.num_samples,
            "fingerprint": data.fingerprint(examples),
            "pictures": data.pictures_digest(examples),
            "ids": [example.id for example in examples],
            "questions": [data.question_key(example) for example in examples],
        },
        "settings": attribution(settings.attribution)
        | {name: value for name, value in fields.items() if name not in ("tops", "seed")}
        | prompt(lm, settings.prompt, counts),
        "seed": settings.seed,
        "versions": runs.versions(),
    }


def attribution(settings: AttributionSettings) -> dict:
    """All settings of an attribution, but those that older files lack while they are as then."""
    fields = dataclasses.asdict(settings)
    if settings.matmul_precision == AttributionSettings.matmul_precision:
        del fields["matmul_precision"]
    return fields


def evaluation(
    stage: str,
    lm: LanguageModel,
    states: States,
    source: DataSettings,
    settings: AblationSettings,
    grid: GridSettings,
    splits: dict[str, list[Example]],
    counts: Mapping[str, int],
) -> dict:
    """The manifest of multiple choice or generation.

    states: the hidden states that the vectors are made from. splits: split -> its examples.
    counts: see `prompts.tally`.
    """
    return {
        "stage": stage,
        "model": model(lm),
        "hidden_states": {
            "settings": states.info["settings"],
            "seed": states.info["seed"],
            "examples": states.info["data"]["fingerprint"],
        },
        "data": {
            "name": source.name,
            "path": source.path,
            "split": source.split,
            "validation_split": source.validation_split,
            "test_split": source.test_split,
            **{split: data.fingerprint(examples) for split, examples in splits.items()},
            "pictures": data.pictures_digest([e for some in splits.values() for e in some]),
        },
        "flags": {
            "methods": list(grid.methods),
            "mode": list(grid.modes),
            "layer_idxs": list(grid.layers),
            "layer_mode": grid.layer_mode,
            "alphas": list(grid.alphas),
            "alpha_units": grid.units,
            "evaluate_on": source.evaluate_on,
            **prompt(lm, settings.prompt, counts),
            "batch_tokens": settings.batch_tokens,
            "seed": settings.seed,
            # Not among the flags of older files, which steered all positions.
            **({"positions": grid.positions} if grid.positions != "all" else {}),
            **({"gate": True} if grid.gate else {}),
        },
        "versions": runs.versions(),
    }


def prompt(lm: LanguageModel, settings: PromptSettings, counts: Mapping[str, int]) -> dict:
    """How prompts are written: the style, and under `prompt` what is not at its default.

    default_system: the system prompt that the chat template writes by itself. answers_after: what
    stands before an answer, where the template puts answers elsewhere than it lets the model begin.
    counts: see `prompts.tally`.
    """
    more = settings.changed() | dict(counts)
    if settings.style == "chat":
        written = "" if settings.system is not None else rendering.default_system(lm, settings)
        more |= {"default_system": written} if written else {}
        start = rendering.answers_after(lm, settings)
        more |= {"answers_after": start} if start else {}
    return {"prompt_style": settings.style} | ({"prompt": more} if more else {})


def model(lm: LanguageModel) -> dict:
    """Name, weights, precision, config, tokenizer and template: all that a model's results need."""
    config = json.loads(lm.model.config.to_json_string())
    for name in ("_name_or_path", "transformers_version"):  # versions stand by themselves
        config.pop(name, None)
    lm.forget_padding()
    tokenizer = (
        lm.tokenizer.backend_tokenizer.to_str()
        if lm.tokenizer.is_fast
        else sorted(lm.tokenizer.get_vocab().items())
    )
    template = (lm.processor or lm.tokenizer).chat_template
    return lm.identity() | {
        "dtype": str(lm.dtype).removeprefix("torch."),
        **({"quantization": lm.quantization} if lm.quantization else {}),
        "config": runs.digest(config),
        "tokenizer": runs.digest(tokenizer),
        "chat_template": runs.digest(template),
    }
