"""Reading the tables of the stages, and naming the cell that is not what its column says.

People open these tables in spreadsheets and in pandas, and save them again. What such a save
changes without changing the meaning is read as before: TRUE for True, 1.0 for layer 1, an empty
last row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from grains.errors import UserError
from grains.settings import SCORES

# --- what a column holds: cells as text -> values; ValueError says what was expected ---

Column = Callable[[pd.Series], pd.Series]


def any_text(cells: pd.Series) -> pd.Series:
    """Any text, also none: an answer 'None' or '1.0' stays one."""
    return cells


def label(cells: pd.Series) -> pd.Series:
    """Text that every row has."""
    _require(cells.str.strip() != "", cells, "a text")
    return cells


def score(cells: pd.Series) -> pd.Series:
    """How log-likelihoods are compared: token or sum."""
    _require(cells.isin(SCORES), cells, " or ".join(SCORES))
    return cells


def layers(cells: pd.Series) -> pd.Series:
    """Whole numbers with spaces between, or none; 1.0 is 1."""
    _require(
        cells.str.fullmatch(r"\s*(\d+(\.0+)?(\s+\d+(\.0+)?)*\s*)?"), cells, "layers such as 0 1 2"
    )
    return cells.map(lambda cell: " ".join(str(int(float(layer))) for layer in cell.split()))


def number(cells: pd.Series) -> pd.Series:
    """A finite number in every row."""
    values = pd.to_numeric(cells, errors="coerce")
    _require(np.isfinite(values), cells, "a finite number")
    return values


def measure(cells: pd.Series) -> pd.Series:
    """A number, NaN where it was not measured; a perplexity may be infinite."""
    values = pd.to_numeric(cells, errors="coerce")
    _require(values.notna() | cells.str.strip().str.lower().isin(["", "nan"]), cells, "a number")
    return values


def truth(cells: pd.Series) -> pd.Series:
    """True or False, in capitals too; 1 and 0 stand for them."""
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    values = cells.str.strip().str.lower().map(words)
    _require(values.notna(), cells, "True or False")
    return values.astype(bool)


def _require(fits: pd.Series, cells: pd.Series, expected: str) -> None:
    if not fits.all():
        row = fits.idxmin()
        raise ValueError(f"row {row + 1}: expected {expected}, found '{cells[row][:40]}'")


# --- the tables ---


class Kind(NamedTuple):
    """A kind of table: the script that writes it, its columns, and those that it may lack.

    key: columns that no two rows have alike, of those that exist.
    """

    script: str
    columns: dict[str, Column]
    optional: dict[str, Column]
    key: tuple[str, ...] = ()


def _each(column: Column, *names: str) -> dict[str, Column]:
    """The same kind of column under several names; '{}' in one stands for each score."""
    return {name.format(score): column for score in SCORES for name in names}


KINDS = {
    "attribution": Kind(
        "token_ablation.py",
        _each(label, "id", "top")
        | _each(any_text, "question", "chosen", "rejected")
        | _each(any_text, "selected_positions", "tokens", "attributions")
        | _each(number, "f", "f_ablated", "k", "gradients_computed")
        | _each(measure, "completeness_error_relative_worst"),
        _each(any_text, "image_positions", "image_boxes")
        | _each(measure, "positive_share_image", "negative_share_image"),
        ("id", "top"),
    ),
    "grid": Kind(
        "steering_mc.py",
        _each(label, "configuration", "method", "part")
        | _each(any_text, "mode")
        | _each(layers, "layers")
        | _each(number, "alpha", "questions")
        | _each(number, "accuracy_{}", "accuracy_{}_low", "accuracy_{}_high", "p_value_{}"),
        _each(label, "dataset", "evaluated_on", "seed")
        | _each(truth, "includes_steering_examples")
        | _each(measure, "perplexity_increase", "varied_increase", "answers_increase")
        | _each(measure, "unrelated_accuracy", "repetition", "words", "margin_{}"),
        ("configuration", "part", "seed", "dataset", "evaluated_on"),
    ),
    "questions": Kind(
        "steering_mc.py",
        _each(label, "configuration", "part", "id") | _each(truth, "correct_{}"),
        {},
    ),
    "front": Kind(
        "experiment.py",
        _each(label, "dataset", "method", "limit", "configuration", "seeds")
        | _each(any_text, "mode")
        | _each(truth, "is_control")
        | _each(score, "score")
        | _each(number, "max_ppl_increase", "accuracy", "base_accuracy", "gain", "p_value")
        | _each(measure, "accuracy_low", "accuracy_high", "gain_low", "gain_high")
        | _each(measure, "perplexity_increase", "unrelated_change")
        | _each(measure, "unrelated_change_low", "unrelated_change_high"),
        _each(label, "evaluated_on")
        | _each(measure, "varied_increase", "answers_increase", "repetition")
        | _each(measure, "repetition_change", "repetition_change_low", "repetition_change_high"),
        ("dataset", "evaluated_on", "method", "mode", "score", "limit", "max_ppl_increase"),
    ),
    "generation": Kind(
        "steering_generation.py",
        _each(label, "prompt", "id", "configuration")
        | _each(any_text, "question", "base", "steered", "reference"),
        {},
        ("prompt", "configuration", "draw"),
    ),
    "harness": Kind(
        "harness.py",
        _each(label, "task", "metric", "configuration")
        | _each(any_text, "filter")
        | _each(number, "examples", "value", "seconds", "better", "worse")
        | _each(measure, "change", "change_low", "change_high", "p_value"),
        {},
        ("task", "filter", "metric", "configuration"),
    ),
}


def read_table(path: Path, kind: str) -> pd.DataFrame:
    """A table of a kind of `KINDS`, its columns read as that says; further ones stay text.

    Raises UserError, naming the file, the column and the row, where it is not what its name says.
    """
    script, columns, optional, key = KINDS[kind]
    again = f"was it cut short or changed? make it again with {script}"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False).fillna("")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a CSV ({error}): {again}") from error
    missing = [column for column in columns if column not in table]
    if missing:
        raise UserError(
            f"'{path}': column{'s' * (len(missing) > 1)} {', '.join(missing)} missing, "
            f"found {', '.join(table.columns)}; {again}"
        )
    table = table[(table != "").any(axis=1)]  # a spreadsheet may leave an empty row at the end
    if table.empty:
        raise UserError(f"'{path}' has no rows: {again}")
    for column, read in (columns | optional).items():
        if column in table:
            try:
                table = table.assign(**{column: read(table[column])})
            except ValueError as error:
                raise UserError(f"'{path}', column {column}, {error}; {again}") from error
    own = [column for column in key if column in table]
    repeated = table.duplicated(own) if own else pd.Series(False)
    if repeated.any():
        row = ", ".join(map(str, table.loc[repeated.idxmax(), own]))
        raise UserError(f"'{path}' holds {row} more than once: give the table of one run")
    return table


# --- cells that hold JSON ---


def from_json(where: str, cell: str, fits: Callable[[Any], bool], expected: str) -> Any:
    """The content of a cell. where: its file, column and example.

    Raises UserError if it is no JSON, or something that does not fit.
    """
    try:
        content = json.loads(cell)
        valid = fits(content)
    except (ValueError, RecursionError, OverflowError):
        valid = False
    if not valid:
        raise UserError(f"{where}: expected {expected}, found '{cell[:40]}'; was it changed?")
    return content


def are(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether something is a list of such things."""
    return lambda content: isinstance(content, list) and all(map(kind, content))


def is_text(content: Any) -> bool:
    return isinstance(content, str)


def is_finite(content: Any) -> bool:
    return type(content) in (int, float) and math.isfinite(content)


def is_below(count: int) -> Callable[[Any], bool]:
    """Whether something is a position among so many."""
    return lambda content: type(content) is int and 0 <= content < count


def is_box(content: Any) -> bool:
    """Four edges in pixels, or None for what shows no part of the picture."""
    return content is None or (are(is_finite)(content) and len(content) == 4)
