"""Reading the tables of the stages, and saying which cell is not what its column says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from grains.errors import UserError
from grains.settings import SCORES


class Kind(NamedTuple):
    """A kind of table: the script that writes it, and the columns that the report reads."""

    script: str
    text: tuple[str, ...]
    numbers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()  # numbers too, read where they are


def _per_score(*names: str) -> tuple[str, ...]:
    return tuple(name.format(score) for score in SCORES for name in names)


KINDS = {
    "attribution": Kind(
        "token_ablation.py",
        (
            "id",
            "top",
            "question",
            "chosen",
            "rejected",
            "selected_positions",
            "tokens",
            "attributions",
        ),
        ("f", "f_ablated", "k", "completeness_error_relative_worst", "gradients_computed"),
    ),
    "grid": Kind(
        "steering_mc.py",
        ("configuration", "method", "mode", "layers", "part"),
        (
            "alpha",
            "questions",
            *_per_score("accuracy_{}", "accuracy_{}_low", "accuracy_{}_high", "p_value_{}"),
        ),
        (
            "perplexity_increase",
            "varied_increase",
            "answers_increase",
            "unrelated_accuracy",
            "repetition",
            "words",
            *_per_score("margin_{}"),
        ),
    ),
    "questions": Kind("steering_mc.py", ("configuration", "part", "id", *_per_score("correct_{}"))),
    "front": Kind(
        "experiment.py",
        ("dataset", "method", "mode", "is_control", "score", "limit", "configuration", "seeds"),
        (
            "max_ppl_increase",
            "accuracy",
            "accuracy_low",
            "accuracy_high",
            "base_accuracy",
            "gain",
            "gain_low",
            "gain_high",
            "p_value",
            "perplexity_increase",
            "unrelated_change",
            "unrelated_change_low",
            "unrelated_change_high",
        ),
        ("varied_increase", "answers_increase", "repetition"),
    ),
    "generation": Kind(
        "steering_generation.py",
        ("prompt", "id", "question", "configuration", "base", "steered", "reference"),
    ),
}


def read_table(path: Path, name: str) -> pd.DataFrame:
    """A table of a kind; text stays text, so that an answer 'None' or '1.0' is one.

    Raises UserError, naming the file and the column, where it is not what its name says.
    """
    kind = KINDS[name]
    again = f"was it cut short or changed? make it again with {kind.script}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a CSV ({error}): {again}") from error
    missing = [column for column in (*kind.text, *kind.numbers) if column not in table]
    if missing:
        raise UserError(
            f"'{path}': column{'s' * (len(missing) > 1)} {', '.join(missing)} missing, "
            f"found {', '.join(table.columns)}; {again}"
        )
    if table.empty:
        raise UserError(f"'{path}' has no rows: {again}")
    for column in (*kind.numbers, *(name for name in kind.optional if name in table)):
        try:
            table[column] = pd.to_numeric(table[column])  # an empty cell is a NaN
        except ValueError as error:
            raise UserError(
                f"'{path}', column {column}: expected numbers ({error}); {again}"
            ) from error
    return table


def from_json(path: Path, column: str, cell: str):
    try:
        return json.loads(cell)
    except ValueError as error:
        raise UserError(
            f"'{path}', column {column}: expected a JSON list, found '{cell[:40]}'"
        ) from error
