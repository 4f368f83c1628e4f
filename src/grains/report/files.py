"""The files of the report: finding results, and what their manifests say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grains import data, runs
from grains.errors import UserError
from grains.settings import NO_ATTRIBUTION, SCORES, TARGET_SCORES

FOLDERS = {"token_attribution": "attribution", "steering_generation": "generation"}
STAGES = {
    "token_ablation": "attribution",
    "steering_generation": "generation",
    "harness": "harness",
}
EVALUATION = re.compile("_(grid|questions|front)$")


@dataclass
class Section:
    """The files of one model on one data set. evaluations: stem -> its tables by kind."""

    model: str
    data: str
    attributions: list[Path] = field(default_factory=list)
    evaluations: dict[Path, dict[str, Path]] = field(default_factory=dict)
    generations: list[Path] = field(default_factory=list)
    harness: list[Path] = field(default_factory=list)

    def tables(self) -> list[Path]:
        return [
            *self.attributions,
            *(path for files in self.evaluations.values() for path in files.values()),
            *self.generations,
            *self.harness,
        ]


def find(folders: list[Path]) -> list[Section]:
    """The results in folders, a section for each model and data set, or experiment.

    Of an experiment's many stage-1 tables the first of each data set is taken.
    Raises UserError for a folder without any.
    """
    sections: dict[tuple[str, str], Section] = {}
    seen: set[Path] = set()
    shown: set[tuple] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UserError(
                f"'{folder}' is not a folder: give one with results, such as results/llm"
            )
        tables = [(kind_of(path), path) for path in sorted(folder.rglob("*.csv"))]
        if not any(kind not in (None, "questions") for kind, _ in tables):
            raise UserError(
                f"'{folder}' holds no results: expected token_attribution/*.csv, "
                "*_grid.csv, *_front.csv or steering_generation/*.csv; run "
                "token_ablation.py and steering_mc.py first (bash "
                "scripts/llm/run_token_ablation.sh, bash scripts/llm/run_steering_mc.sh"
                "), or give another folder"
            )
        for kind, path in tables:
            if kind is None or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            stem = stem_of(path)
            manifest = manifest_of(path)
            model, name = subject(manifest)
            key = (model or "", name or stem.name)
            if manifest.get("parts"):  # of an experiment, which lie in that folder
                key = ("", manifest["parts"].removesuffix("_parts"))
            if path.parent.name.endswith("_parts"):  # of an experiment, many times alike
                key = ("", path.parent.name.removesuffix("_parts"))
                if (key, name) in shown:
                    continue
                shown.add((key, name))
            section = sections.setdefault(key, Section(*key))
            if kind == "attribution":
                section.attributions.append(path)
            elif kind == "generation":
                section.generations.append(path)
            elif kind == "harness":
                section.harness.append(path)
            else:
                section.evaluations.setdefault(stem, {})[kind] = path
    return list(sections.values())


def demo_files(folders: list[Path]) -> list[Path]:
    """What a demo measured and drew: the files of the folders named demo."""
    return sorted(
        {
            path.resolve()
            for folder in folders
            for path in folder.rglob("demo/*")
            if path.suffix in (".csv", ".png")
        }
    )


def kind_of(path: Path) -> str | None:
    """attribution, grid, questions, front, generation or harness; None for no such table."""
    if ending := EVALUATION.search(path.stem):
        return ending[1]
    manifest = manifest_of(path)
    if (manifest.get("settings") or {}).get("grad_method") == NO_ATTRIBUTION:
        return None  # nothing was attributed
    if manifest.get("stage") == "harness" and path.stem.endswith("_samples"):
        return None  # every example of the table beside it
    return FOLDERS.get(path.parent.name) or STAGES.get(manifest.get("stage") or "")


def stem_of(path: Path) -> Path:
    """What the files of one evaluation have in common."""
    return path.with_name(EVALUATION.sub("", path.stem))


def chosen_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_chosen.json")


# What a manifest holds, as far as the report reads it; anything may be missing or null.
MANIFEST = {
    "stage": str,
    "parts": str,
    "model": (dict, str),
    "data": (dict, str),
    "settings": dict,
    "flags": dict,
    "versions": dict,
    "seed": int,
}
MODEL = {"model": str}
DATA = {"name": str, "path": str, "split": str, "num_samples": int, "ids": list}
FLAGS = {"score": str, "seed": int}
JSON_NAMES = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}


def manifest_of(path: Path) -> dict:
    """The manifest beside a table, or {}. That of a grid goes for its whole evaluation.

    Raises UserError where it is not what the stages write.
    """
    for name in (f"{path.stem}.manifest.json", f"{stem_of(path).name}_grid.manifest.json"):
        if (file := path.with_name(name)).is_file():
            manifest = runs.read_json(file)
            _check(file, manifest, MANIFEST)
            for key, types in (("model", MODEL), ("data", DATA), ("flags", FLAGS)):
                if isinstance(manifest.get(key), dict):
                    _check(file, manifest[key], types, f"{key}.")
            score = (manifest.get("flags") or {}).get("score")
            known = (*SCORES, *TARGET_SCORES)
            if score not in (None, *known):
                raise UserError(
                    f"'{file}', flags.score: expected one of {', '.join(known)}, found {score}; "
                    "was it changed?"
                )
            return manifest
    return {}


def _check(file: Path, content: dict, types: dict, place: str = "") -> None:
    for key, expected in types.items():
        value = content.get(key)
        if value is not None and (not isinstance(value, expected) or isinstance(value, bool)):
            kinds = expected if isinstance(expected, tuple) else (expected,)
            expected_kinds = " or ".join(JSON_NAMES[kind] for kind in kinds)
            raise UserError(
                f"'{file}', {place}{key}: expected {expected_kinds}, "
                f"found {str(value)[:40]}; was it changed?"
            )


def chosen_configuration(stem: Path) -> str | None:
    """The label of the configuration that an evaluation chose; None where none is chosen."""
    path = chosen_path(stem)
    if not path.is_file():
        return None
    label = runs.read_json(path).get("configuration")
    if not isinstance(label, str):
        raise UserError(
            f"'{path}', configuration: expected a text, found {str(label)[:40]}; was it changed?"
        )
    return label


def subject(manifest: dict) -> tuple[str | None, str | None]:
    """Model and data set of a manifest."""
    fields = [(manifest.get("model"), "model"), (manifest.get("data"), "name")]
    model, name = (field.get(key) if isinstance(field, dict) else field for field, key in fields)
    return model, name


def examples_of(manifest: dict) -> dict[str, data.Example]:
    """The examples of a stage-1 run by id, read again from where its manifest says.

    Raises UserError if they cannot be read, or are others than in the run.
    """
    given, seed = manifest.get("data"), manifest.get("seed")
    if not isinstance(given, dict) or seed is None or None in map(given.get, ("ids", "name")):
        raise UserError("no manifest says where they are")
    split = given.get("split") or data.default_split(given["name"], "steering")
    rows, source = data.load(given["name"], split, given.get("path"))
    examples = data.examples(rows, source, seed, given.get("num_samples"))
    if [example.id for example in examples] != given["ids"]:
        raise UserError(f"{source.path} has other examples now than in this run")
    return {example.id: example for example in examples}


TERMS = {
    "model": "Model",
    "data": "Data",
    "settings": "Attribution",
    "flags": "",
    "versions": "Versions",
}
LEFT_OUT = (
    "ids",
    "questions",
    "fingerprint",
    "validation",
    "test",
    "all",
    "prompts",
    "weights",
    "weights_sum",
    "config",
    "tokenizer",
    "chat_template",
    "pictures",
    "batch_tokens",
)


def what_was_run(manifests: list[dict], examples: str, seeds: list) -> list[tuple[str, dict]]:
    """Terms and what they were, by name, as far as the manifests say; each thing stands once.

    examples: the numbers of examples, as text; seeds: of the evaluations.
    """
    lines: list[tuple[str, dict]] = []
    for key, term in TERMS.items():
        for manifest in manifests:
            given = manifest.get(key) or {}
            values: dict[str, Any] = {"model": None, "name": None, "split": None}  # come first
            values |= given if isinstance(given, dict) else {key: given}
            if "num_samples" in values and not values.get("split"):
                values["split"] = data.default_split(values["name"], "steering")
            if key == "flags":
                term = (manifest.get("stage") or "steering").replace("_", " ").capitalize()
                seeds = [*seeds, manifest.get("seed", values.get("seed"))]
            lines.append(
                (
                    term,
                    {
                        name.replace("_", " "): as_text(value)
                        for name, value in values.items()
                        if value is not None and name not in LEFT_OUT
                    },
                )
            )
    known = sorted({str(seed) for seed in seeds if seed is not None})
    lines += [
        (term, {"": text})
        for term, text in (("Examples", examples), ("Seed", ", ".join(known)))
        if text
    ]
    distinct = [line for index, line in enumerate(lines) if line[1] and line not in lines[:index]]
    return [
        (term, pairs)
        for term, pairs in distinct  # a line that says less than another one is left out
        if not any(term == title and pairs.items() < more.items() for title, more in distinct)
    ]


def as_text(value: object) -> str:
    """A value of a manifest; a list as its items."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
