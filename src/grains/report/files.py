"""The files of the report: finding results, reading their tables, what their manifests say."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from grains import data, runs
from grains.errors import UserError

FOLDERS = {"token_attribution": "attribution", "steering_generation": "generation"}
STAGES = {"token_ablation": "attribution", "steering_generation": "generation"}
EVALUATION = re.compile("_(grid|questions|front)$")


@dataclass
class Section:
    """The files of one model on one data set. evaluations: stem -> its tables by kind."""

    model: str
    data: str
    attributions: list[Path] = field(default_factory=list)
    evaluations: dict[Path, dict[str, Path]] = field(default_factory=dict)
    generations: list[Path] = field(default_factory=list)

    def tables(self) -> list[Path]:
        return [
            *self.attributions,
            *(path for files in self.evaluations.values() for path in files.values()),
            *self.generations,
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
        found = [(kind_of(path), path) for path in sorted(folder.rglob("*.csv"))]
        if not any(kind not in (None, "questions") for kind, _ in found):
            raise UserError(
                f"'{folder}' holds no results: expected token_attribution/*.csv, "
                "*_grid.csv, *_front.csv or steering_generation/*.csv; run "
                "token_ablation.py and steering_mc.py first (bash "
                "scripts/llm/run_token_ablation.sh, bash scripts/llm/run_steering_mc.sh"
                "), or give another folder"
            )
        for kind, path in found:
            if kind is None or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            stem = stem_of(path)
            model, name = subject(manifest_of(path))
            key = (model or "", name or stem.name)
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
    if found := EVALUATION.search(path.stem):
        return found[1]
    return FOLDERS.get(path.parent.name) or STAGES.get(manifest_of(path).get("stage"))


def stem_of(path: Path) -> Path:
    """What the files of one evaluation have in common."""
    return path.with_name(EVALUATION.sub("", path.stem))


def chosen_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_chosen.json")


def manifest_of(path: Path) -> dict:
    """The manifest beside a table, or {}. That of a grid goes for its whole evaluation."""
    for name in (f"{path.stem}.manifest.json", f"{stem_of(path).name}_grid.manifest.json"):
        if (file := path.with_name(name)).is_file():
            return read_object(file)
    return {}


def read_object(path: Path) -> dict:
    content = runs.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"'{path}': expected a JSON object; was it changed?")
    return content


def subject(manifest: dict) -> tuple[str | None, str | None]:
    """Model and data set of a manifest."""
    parts = [(manifest.get("model"), "model"), (manifest.get("data"), "name")]
    return tuple(part.get(key) if isinstance(part, dict) else part for part, key in parts)


def examples_of(manifest: dict) -> dict[str, data.Example]:
    """The examples of a stage-1 run by id, read again from where its manifest says.

    Raises UserError if they cannot be read, or are others than in the run.
    """
    given = manifest.get("data")
    if not isinstance(given, dict) or "ids" not in given:
        raise UserError("no manifest says where they are")
    split = given["split"] or data.default_split(given["name"], "steering")
    rows, source = data.load(given["name"], split, given["path"])
    found = data.examples(rows, source, manifest["seed"], given["num_samples"])
    if [example.id for example in found] != given["ids"]:
        raise UserError(f"{source.path} has other examples now than in this run")
    return {example.id: example for example in found}


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
    "final_norm_sum",
    "batch_tokens",
)


def what_was_run(manifests: list[dict], examples: str, seeds: list) -> list[tuple[str, dict]]:
    """Terms and what they were, by name, as far as the manifests say; each thing once."""
    lines: list[tuple[str, dict]] = []
    for key, term in TERMS.items():
        for manifest in manifests:
            given = manifest.get(key) or {}
            values = {"model": None, "name": None, "split": None}  # come first
            values |= given if isinstance(given, dict) else {key: given}
            if "num_samples" in values and not values.get("split"):
                values["split"] = data.default_split(values["name"], "steering")
            if key == "flags":
                term = manifest.get("stage", "steering").replace("_", " ").capitalize()
                seeds = [*seeds, manifest.get("seed", values.get("seed"))]
            lines.append(
                (
                    term,
                    {
                        name.replace("_", " "): " ".join(map(str, np.atleast_1d(value)))
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
    told = [line for index, line in enumerate(lines) if line[1] and line not in lines[:index]]
    return [
        (term, pairs)
        for term, pairs in told  # what another manifest tells and more is enough
        if not any(term == other and pairs.items() < more.items() for other, more in told)
    ]
