"""Which examples steer, choose and test: three sets that share no question."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grains import data
from grains.data import Example, Source
from grains.errors import UserError
from grains.settings import DataSettings

if TYPE_CHECKING:  # it takes a second to import, which a mistake in a flag need not wait for
    from datasets import Dataset


def rows_of(settings: DataSettings, role: str) -> tuple[Dataset, Source]:
    """The rows that steering, validation or test examples come from, and how they are read."""
    setting = "split" if role == "steering" else f"{role}_split"
    wanted = getattr(settings, setting)
    split = wanted or data.default_split(settings.name, role)
    rows, source = data.load(settings.name, split, settings.path)
    if (
        wanted
        and settings.path
        and not Path(settings.path).is_dir()
        and "split" not in rows.column_names
    ):
        raise UserError(
            f"'{settings.path}' has no split '{wanted}': it has no column 'split'; "
            f"leave out {setting}, or add that column"
        )
    return rows, source


def steering_examples(settings: DataSettings, seed: int) -> list[Example]:
    """The examples that vectors are made from, drawn by the seed; fewer where there are fewer."""
    rows, source = rows_of(settings, "steering")
    return data.examples(rows, source, seed, settings.num_samples)


def evaluation_examples(
    settings: DataSettings, seed: int, steering: dict
) -> dict[str, list[Example]]:
    """The questions of each split, by its name; the steering examples are in none but 'all'.

    steering: ids and questions of the steering examples, as stage 1 keeps them.
    Raises UserError if no validation or no test questions are left.
    """
    if settings.evaluate_on == "all":
        every: dict[str, Example] = {}
        for role in data.ROLES:  # often the same split: each question counts once
            rows, source = rows_of(settings, role)
            every |= {example.id: example for example in data.examples(rows, source, seed)}
        return {"all": list(every.values())}
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
