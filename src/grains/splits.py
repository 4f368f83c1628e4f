"""The steering, validation and test examples: three sets that share no question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grains import data
from grains.data import Example, Source
from grains.errors import UserError
from grains.settings import DataSettings

if TYPE_CHECKING:  # takes a second to import, and scripts check their flags before that
    from datasets import Dataset


def rows_of(settings: DataSettings, role: str) -> tuple[Dataset, Source]:
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


def evaluation_examples(
    settings: DataSettings, seed: int, steering: dict
) -> dict[str, list[Example]]:
    """Split -> its questions: validation and test, or 'all' (see `DataSettings.evaluate_on`).

    Steering examples are in neither validation nor test, only in 'all'.
    steering: the ids and questions of the steering examples, from the manifest of stage 1.
    Raises UserError if no validation or no test questions remain.
    """
    if settings.evaluate_on == "all":
        by_id: dict[str, Example] = {}
        for role in data.ROLES:  # roles often share a split: each question counts once
            rows, source = rows_of(settings, role)
            by_id |= {example.id: example for example in data.examples(rows, source, seed)}
        return {"all": list(by_id.values())}
    used = {*steering["ids"], *steering["questions"]}
    rows, source = rows_of(settings, "validation")
    validation = data.examples(rows, source, seed, settings.num_validation, frozenset(used))
    used |= {example.id for example in validation} | set(map(data.question_key, validation))
    rows, source = rows_of(settings, "test")
    test = data.examples(rows, source, seed, settings.num_test, frozenset(used))
    if not validation or not test:
        raise UserError(
            f"{len(validation)} validation and {len(test)} test questions are left beside the "
            "steering examples: use a smaller num_validation, fewer num_samples, more data, "
            "or evaluate_on all"
        )
    return {"validation": validation, "test": test}
