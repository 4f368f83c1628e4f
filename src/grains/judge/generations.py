"""What is scored: tables of steering_generation.py, and the examples that they are from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from grains import data, runs, splits
from grains.data import Example
from grains.errors import UserError
from grains.judge.metrics import Objects
from grains.settings import DataSettings
from grains.steering import BASE

TEXT = ("id", "question", "configuration", "method", "base", "steered", "reference")
COLUMNS = ("prompt", *TEXT, "alpha")
# Setting -> role of its split, in the order in which the splits are searched for questions.
SPLITS = {"test_split": "test", "validation_split": "validation", "split": "steering"}


def read(path: Path) -> pd.DataFrame:
    """The table, a row per prompt, configuration and draw.

    Raises UserError if it cannot be read, or is not what steering_generation.py writes.
    """
    expected = "give a table that steering_generation.py or steering_generation_vlm.py wrote"
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as a CSV ({str(error).splitlines()[0]}); {expected}"
        ) from error
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise UserError(
            f"'{path}': column{'s' * (len(missing) > 1)} {', '.join(missing)} missing, "
            f"found {', '.join(table.columns)}; {expected}"
        )
    table[list(TEXT)] = table[list(TEXT)].fillna("")
    table = table[(table[list(TEXT)] != "").any(axis=1)]  # a spreadsheet may leave an empty row
    if not len(table):
        raise UserError(f"'{path}' has no rows; {expected}")
    if "draw" not in table:  # written before several texts could be drawn for a prompt
        table = table.assign(draw=0)
    for column in ("prompt", "alpha", "draw"):
        numbers = pd.to_numeric(table[column], errors="coerce")
        if not np.isfinite(numbers).all():
            raise UserError(f"'{path}', column {column}: expected finite numbers; {expected}")
        table = table.assign(**{column: numbers if column == "alpha" else numbers.astype(int)})
    if (
        table.duplicated(["prompt", "configuration", "draw"]).any()
        or table.groupby(["prompt", "draw"]).base.nunique().gt(1).any()
        or table.groupby("prompt").id.nunique().gt(1).any()
    ):
        raise UserError(
            f"'{path}' holds several runs: a prompt has more than one base text, or a "
            "configuration twice; give the table of one run"
        )
    return table


def manifest_of(path: Path) -> dict:
    """The manifest beside a table; {} where there is none."""
    manifest = path.with_suffix(".manifest.json")
    return runs.read_json(manifest) if manifest.is_file() else {}


def source_of(
    path: Path, name: str | None = None, place: str | None = None, split: str | None = None
) -> DataSettings:
    """The data set of a table and its splits: as given, otherwise as the manifest beside it says.

    split: holds all questions; but where it is that of the run's steering examples, the questions
        are in the run's own splits.
    Raises UserError if neither names a data set.
    """
    known = manifest_of(path).get("data")
    known = known if isinstance(known, dict) else {}
    name = name or known.get("name")
    if not isinstance(name, str):
        raise UserError(
            f"no manifest beside '{path}' says which data set the generations are from: "
            "give dataset_name (and dataset_path)"
        )
    if name != known.get("name"):
        known = {}
    recorded = {key: value for key, value in known.items() if isinstance(value, str)}
    place = place or recorded.get("path")
    as_recorded = split is None or split == recorded.get("split")
    test, validation, steering = (recorded.get(key) if as_recorded else split for key in SPLITS)
    return DataSettings(name, place, split=steering, validation_split=validation, test_split=test)


def find_examples(
    generations: pd.DataFrame, source: DataSettings, path: Path
) -> tuple[dict[str, Example], Objects]:
    """The examples by their ids, and all objects that are in the pictures of their splits.

    source: the split of its test questions is searched, and the others where some are not in it.
    path: of the table, for messages.
    Raises UserError if an example is missing, or asks something else than the table says.
    """
    wanted = set(generations.id)
    examples: dict[str, Example] = {}
    names: set[str] = set()
    # Roles often share a split, which is searched once.
    roles = {
        getattr(source, setting) or data.default_split(source.name, role): role
        for setting, role in SPLITS.items()
    }
    for role in roles.values():
        rows, origin = splits.rows_of(source, role)
        for index in range(len(rows)):
            example = data.read(rows, origin, index)
            names.update(example.objects or ())
            if example.id in wanted:
                # Whether there is a picture counts here; its bytes need not stay in memory.
                image = None if example.image is None else data.StoredPicture(rows, index)
                examples.setdefault(example.id, replace(example, image=image))
        if len(examples) == len(wanted):
            break
    missing = sorted(wanted - set(examples))
    advice = "give dataset_name, dataset_path and split as they were for the generations"
    if missing:
        raise UserError(
            f"{len(missing)} of {len(wanted)} examples of '{path}' are not "
            f"in data set '{source.name}' ({', '.join(missing[:3])}); {advice}"
        )
    for row in generations.itertuples():
        example = examples[row.id]
        if _plain(row.question) != _plain(example.question) or _plain(row.reference) != _plain(
            example.chosen
        ):
            raise UserError(
                f"example {row.id} of '{path}' has another question or "
                f"answer in data set '{source.name}'; {advice}"
            )
    return examples, Objects(names)


def _plain(text: str) -> str:
    return " ".join(text.split())


def texts(generations: pd.DataFrame) -> pd.DataFrame:
    """What is scored: a row per prompt, configuration and draw, the base texts first."""
    base = generations.drop_duplicates(["prompt", "draw"]).assign(
        configuration=BASE.label,
        method=BASE.method,
        alpha=BASE.alpha,
        text=lambda table: table.base,
    )
    steered = generations.assign(text=generations.steered)
    return pd.concat([base, steered], ignore_index=True)[
        ["prompt", "id", "configuration", "method", "alpha", "draw", "text"]
    ]


def manifest(
    path: Path,
    source: DataSettings,
    examples: dict[str, Example],
    objects: Objects,
    judge: dict | None,
    prompts: Sequence[str],
) -> dict:
    """All that the scores of a table depend on. judge: its identity; prompts: what it is asked."""
    known = [[example.references, example.objects] for example in examples.values()]
    return {
        "stage": "score_generations",
        "generations": {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "model": manifest_of(path).get("model"),
        "data": {
            "name": source.name,
            "path": source.path,
            "split": source.split,
            "fingerprint": data.fingerprint(list(examples.values())),
            "known": runs.digest([known, objects.forms]),
        },
        "judge": judge and judge | {"prompts": runs.digest(prompts)},
        "versions": runs.versions(),
    }
