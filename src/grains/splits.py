"""The steering, validation and test examples: three sets that share no question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from grains import data
from grains.data import Example, Source
from grains.errors import UserError
from grains.files import Rows
from grains.settings import DataSettings, PromptSettings, Shot


def rows_of(settings: DataSettings, role: str) -> tuple[Rows, Source]:
    """The rows that examples with a role in `data.ROLES` come from, and how they are read.

    Raises UserError for a split that the data does not have.
    """
    setting = "split" if role == "steering" else f"{role}_split"
    named = getattr(settings, setting)
    split = named or data.default_split(settings.name, role)
    rows, source = data.load(settings.name, split, settings.path)
    if (
        named
        and settings.path
        and not Path(settings.path).is_dir()
        and "split" not in rows.column_names
    ):
        raise UserError(
            f"'{settings.path}' has no split '{named}': it has no column 'split'; "
            f"leave out {setting}, or add that column"
        )
    return rows, source


def steering_examples(settings: DataSettings, seed: int) -> list[Example]:
    """The `num_samples` examples that vectors are made from, drawn by the seed; all if fewer."""
    rows, source = rows_of(settings, "steering")
    return data.examples(rows, source, seed, settings.num_samples)


def with_shots(
    prompt: PromptSettings, settings: DataSettings, seed: int, steering: Iterable[str]
) -> PromptSettings:
    """The settings with the shots drawn that they ask for: other examples of the steering split.

    steering: the keys of the steering examples' questions.
    Raises UserError if too few are left, and for pictures and conversations, which are no shots.
    """
    if not prompt.num_shots:
        return prompt
    rows, source = rows_of(settings, "steering")
    drawn = data.examples(rows, source, seed, prompt.num_shots, frozenset(steering))
    if len(drawn) < prompt.num_shots:
        raise UserError(
            f"shots: {prompt.num_shots} asked for, {len(drawn)} are left beside the steering "
            "examples: use fewer, fewer num_samples or more data"
        )
    if any(example.turns or example.image is not None for example in drawn):
        raise UserError(
            "shots are questions with answers in text: data with pictures or conversations has "
            "none; give a preamble"
        )
    shots = tuple(
        Shot(e.question, e.chosen, e.context, e.choices, data.question_key(e)) for e in drawn
    )
    return replace(prompt, shots=shots)


def evaluation_examples(
    settings: DataSettings, seed: int, steering: dict, shots: Iterable[str] = ()
) -> dict[str, list[Example]]:
    """Split -> its questions: validation and test, or 'all' (see `DataSettings.evaluate_on`).

    Steering examples are in neither validation nor test, only in 'all'; nor do these two share a
    prompt with them or with each other.
    steering: the keys of the steering examples' questions, from the manifest of stage 1.
    shots: the keys of questions that stand in prompts with their answers; they are never asked.
    Raises UserError if no validation or no test questions remain.
    """
    if settings.evaluate_on == "all":
        by_content: dict[tuple[str, str], Example] = {}
        for role in data.ROLES:  # roles often share a split: each question counts once
            rows, source = rows_of(settings, role)
            for example in data.examples(rows, source, seed, exclude=frozenset(shots)):
                content = data.question_key(example), data.answers_digest(example)
                by_content.setdefault(content, example)
        return {"all": list(by_content.values())}
    used = {*steering["questions"], *shots}
    rows, source = rows_of(settings, "validation")
    validation = data.examples(rows, source, seed, settings.num_validation, frozenset(used))
    used |= set(map(data.question_key, validation))
    rows, source = rows_of(settings, "test")
    test = data.examples(rows, source, seed, settings.num_test, frozenset(used))
    if not validation or not test:
        every = data.examples(rows, source, seed)
        shared = sum(data.question_key(example) in used for example in every)
        raise UserError(
            f"{len(validation)} validation and {len(test)} test questions are left beside the "
            f"steering examples ({shared} of {len(every)} examples share a prompt with steering "
            "or validation examples): use a smaller num_validation, fewer num_samples, more data "
            "or more prompts, or evaluate_on all"
        )
    return {"validation": validation, "test": test}
