"""The names of all files that the scripts write, and that later scripts look for.

A name says what was run: the data, the model, the paper's settings, and the other settings that
differ from their defaults. Paths are relative to the working folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grains.settings import (
    LAYER_MODES,
    STUDY_DEFAULT,
    AblationSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
    StudySettings,
)

LONGEST_NAME = 200  # bytes of a name without its endings; file systems allow 255 with them


def slug(name: str) -> str:
    """A model or data set in a file name: the last component of its path or hub id."""
    return Path(name.rstrip("/")).name.replace(" ", "-")


def stem(parts: Iterable[str | None], longest: int = LONGEST_NAME) -> str:
    """The beginning of a file name, parts joined by _; if it is too long, a digest ends it."""
    whole = "_".join(part for part in parts if part)
    if len(whole.encode()) <= longest:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return whole.encode()[: longest - 13].decode(errors="ignore") + f"_{digest}"


def differing(settings: Any, default: Any, labels: dict[str, str]) -> list[str]:
    """'label-value' for each field in which two dataclasses of one kind differ.

    labels: field -> its label; other fields are ignored.
    """
    parts = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in labels and value != getattr(default, field.name):
            written = "+".join(map(_word, value)) if isinstance(value, tuple) else _word(value)
            parts.append(f"{labels[field.name]}-{written}")
    return parts


def _word(value: str | float | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _attribution(ablation: AblationSettings) -> list[str]:
    """Stage 1's settings: the paper's own always, others if they are not at their default.

    The selections (tops) are left out: each has a file of its own.
    """
    settings = ablation.attribution
    return [
        settings.objective,
        settings.grad_method,
        f"k{ablation.top_k}",
        *differing(
            settings,
            type(settings)(),
            {
                "baseline": "baseline",
                "image_baseline": "image-baseline",
                "attribute": "attribute",
                "ig_steps": "steps",
                "tolerance": "tolerance",
                "max_points": "points",
                "experts": "experts",
                "matmul_precision": "matmul",
            },
        ),
        *differing(
            ablation,
            type(ablation)(),
            {
                "ablate": "ablate",
                "replacement": "replacement",
                "image_replacement": "image-replacement",
            },
        ),
    ]


def _prompt(prompt: PromptSettings) -> list[str]:
    """The style, and of what else is changed the digests: texts are too long for names."""
    return [
        prompt.style,
        *(
            f"{name.replace('_', '-')}-{_short(value)}"
            for name, value in prompt.changed().items()
            if name != "shots"  # they are drawn when a script runs
        ),
    ]


def _short(value: Any) -> str:
    if isinstance(value, (bool, int)) or value == "":
        return str(value) or "none"
    if isinstance(value, str) and re.fullmatch(r"[\w-]{1,16}", value):
        return value
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Names:
    """The files of all stages for a model, a data set and settings of stage 1.

    kind: llm or vlm, the folder under data/ and results/. model: the name that the user gave.
    default_split: the data set's split of steering examples (see `data.default_split`).
    """

    kind: str
    model: str
    data: DataSettings
    ablation: AblationSettings
    default_split: str

    def attributions(self) -> Path:
        """The CSV of stage 1."""
        folder = Path("results", self.kind, "token_attribution")
        return folder / f"{self._stage1()}.csv"

    def states(self, tops: Sequence[str], path: str | None = None) -> dict[str, Path]:
        """Selection -> its file of hidden states.

        path: replaces the default name; with several selections, each is appended to it.
        """
        if path and len(tops) == 1:
            return {tops[0]: Path(path)}
        folder = Path("data", self.kind, "hidden_states")
        base = Path(path or folder / f"{self._stage1()}.safetensors")
        return {top: base.with_name(f"{base.stem}_{top}{base.suffix}") for top in tops}

    def vectors(
        self,
        states: Path,
        method: str,
        mode: str,
        folder: str | Path | None = None,
        gate: bool = False,
    ) -> Path:
        """The steering vectors that a method makes from a file of hidden states.

        gate: whether a gate is with them.
        """
        folder = Path(folder or Path("data", self.kind, "steering_vectors"))
        plain = _vectors(folder, states, method, mode, self.ablation.seed)
        return plain.with_stem(f"{plain.stem}_gated") if gate else plain

    def multiple_choice(
        self,
        grid: GridSettings,
        default: GridSettings,
        score: str,
        folder: str | None = None,
        budget: float | None = None,
    ) -> dict[str, Path]:
        """The files of steering_mc.py: the grid, every question, the chosen configuration.

        default: the grid of the script's default flags. score: the one that chooses. budget: the
            rise of perplexity within which it chooses, if that is measured.
        """
        base = Path(folder or Path("results", self.kind, "steering"))
        more = [
            f"by-{score}" if score != "token" else None,
            f"budget-{budget:g}" if budget is not None else None,
        ]
        own = self._evaluation(grid, default, more)
        return {
            "grid": base / f"{own}_grid.csv",
            "questions": base / f"{own}_questions.csv",
            "chosen": base / f"{own}_chosen.json",
        }

    def chosen(self, folder: str | None = None) -> list[Path]:
        """The existing files of configurations that steering_mc.py chose for these settings."""
        base = Path(folder or Path("results", self.kind, "steering"))
        return self._existing(base, "_chosen.json")

    def generations(
        self,
        grid: GridSettings,
        default: GridSettings,
        decoding: Sequence[str],
        folder: str | None = None,
    ) -> Path:
        """The CSV of steering_generation.py. decoding: its decoding flags that are not default."""
        base = Path(folder or Path("results", self.kind, "steering_generation"))
        return base / f"{self._evaluation(grid, default, decoding)}.csv"

    def all_generations(self, folder: str | None = None) -> list[Path]:
        """The existing CSVs of steering_generation.py for these settings of stage 1."""
        base = Path(folder or Path("results", self.kind, "steering_generation"))
        return self._existing(base, ".csv")

    def _existing(self, folder: Path, ending: str) -> list[Path]:
        """The files of all evaluations of this stage 1, in whose names the layer mode is next."""
        beginning = glob.escape(stem(self._shared(), LONGEST_NAME // 2))
        return sorted(
            path for mode in LAYER_MODES for path in folder.glob(f"{beginning}_{mode}_*{ending}")
        )

    def _stage1(self) -> str:
        return stem(
            [
                slug(self.data.name),
                slug(self.model),
                self.data.split or self.default_split,
                f"n{self.data.num_samples}",
                f"seed{self.ablation.seed}",
                *_prompt(self.ablation.prompt),
                *_attribution(self.ablation),
            ]
        )

    def _shared(self) -> list[str]:
        """The parts with which the names of all evaluations of this stage 1 begin."""
        return [
            slug(self.data.name),
            slug(self.model),
            f"n{self.data.num_samples}",
            f"seed{self.ablation.seed}",
            *_prompt(self.ablation.prompt),
            *_attribution(self.ablation),
            *([f"split-{self.data.split}"] if self.data.split else []),
        ]

    def _evaluation(
        self, grid: GridSettings, default: GridSettings, more: Sequence[str | None]
    ) -> str:
        # The shared part is shortened by itself: all files that begin with it are looked for.
        own = [*grid_parts(grid, default), *_splits(self.data), *more]
        return "_".join([stem(self._shared(), LONGEST_NAME // 2), stem(own, LONGEST_NAME // 2)])


def _vectors(folder: Path, states: Path, method: str, mode: str, seed: int) -> Path:
    drawn = f"seed{seed}" if method in ("random", "shared_random", "rotated") else None
    return folder / f"{stem([states.stem, method, drawn, mode])}.safetensors"


def _splits(data: DataSettings) -> list[str]:
    return differing(
        data,
        DataSettings(""),
        {
            "validation_split": "validation-split",
            "test_split": "test-split",
            "evaluate_on": "on",
            "num_validation": "validation",
            "num_test": "test",
        },
    )


def grid_parts(grid: GridSettings, default: GridSettings) -> list[str]:
    """The layers always, the rest of a grid if it differs from the default one."""
    return [
        grid.layer_mode,
        "+".join(grid.layers),
        *differing(
            grid,
            default,
            {
                "methods": "methods",
                "modes": "mode",
                "alphas": "alphas",
                "units": "units",
                "positions": "positions",
                "gate": "gate",
            },
        ),
    ]


@dataclass(frozen=True)
class ExperimentNames:
    """The files of an experiment.

    Methods, strengths, budgets and seeds are in the names of the tables alone: experiments that
    differ in these share what they attribute, train and score.

    kind: llm or vlm. model: its name as given. folder: of the tables, and of `parts`.
    vectors_folder: of the vectors that methods make (None: `parts`).
    stage: experiment, or ablations for those that an ablation study compares.
    default: what the script tries by default, which the names of tables do not say.
    """

    kind: str
    model: str
    settings: StudySettings
    folder: str | None = None
    vectors_folder: str | None = None
    stage: str = "experiment"
    default: StudySettings = STUDY_DEFAULT

    @property
    def stem(self) -> str:
        return experiment_stem(self.model, self.settings)

    def _beside(self, ending: str) -> Path:
        folder = Path(self.folder or Path("results", self.kind, self.stage))
        return folder / (self.stem + ending)

    @property
    def parts(self) -> Path:
        """The folder of what an experiment makes on the way to its tables."""
        return self._beside("_parts")

    def tables(self) -> dict[str, Path]:
        """The tables of an experiment."""
        return {name: self._table(name) for name in ("grid", "front", "generations")}

    def ablations(self, changes: Sequence[str] = ()) -> Path:
        """The table that compares experiments, named after the one with no setting changed.

        changes: what is changed, if that is not what is changed by default.
        """
        return self._table("ablations", f"change-{_short([*changes])}" if changes else None)

    def _table(self, name: str, more: str | None = None) -> Path:
        tried = [*tried_parts(self.settings, self.default), more]
        whole = stem([self.stem, *tried])
        return self._beside("").with_name(f"{whole}_{name}.csv")

    def study(self, dataset: str, seed: int) -> StudyNames:
        """The files of one data set and seed."""
        vectors = Path(self.vectors_folder) if self.vectors_folder else self.parts
        return StudyNames(self.parts, vectors, dataset, seed)


@dataclass(frozen=True)
class StudyNames:
    """The files of one data set and seed of an experiment."""

    folder: Path
    vectors_folder: Path
    dataset: str
    seed: int

    @property
    def stem(self) -> str:
        return f"{slug(self.dataset)}_seed{self.seed}"

    def attributions(self) -> Path:
        """CSV of stage 1."""
        return self.folder / f"{self.stem}.csv"

    def states(self, tops: Sequence[str]) -> dict[str, Path]:
        """Hidden-states file of each selection."""
        return {top: self.folder / f"{self.stem}_{top}.safetensors" for top in tops}

    def vectors(self, method: str, mode: str) -> Path:
        """Steering vectors that a method makes of the hidden states."""
        states = self.states(["pos"])["pos"]
        return _vectors(self.vectors_folder, states, method, mode, self.seed)

    def gate(self) -> Path:
        return self.folder / f"{self.stem}_gate.safetensors"

    def trained(self, positions: str = "all", own_answers: str = STUDY_DEFAULT.own_answers) -> Path:
        at = "" if positions == "all" else f"_{slug(positions)}"
        how = "" if own_answers == STUDY_DEFAULT.own_answers else f"_{own_answers}"
        return self.folder / f"{self.stem}_trained{how}{at}.safetensors"

    def lora(self, objective: str) -> Path:
        return self.folder / f"{self.stem}_lora_{objective}.safetensors"

    def scores(self, items: str, digest: str) -> Path:
        """Log-likelihoods of some items. digest: of the manifest and the configurations."""
        return self.folder / f"{self.stem}_{items}_scores_{digest}.safetensors"

    def all_scores(self, items: str) -> list[Path]:
        """Existing files of these items' log-likelihoods."""
        begin = glob.escape(f"{self.stem}_{items}_scores_")
        return sorted(self.folder.glob(f"{begin}*.safetensors"))

    def answers(self, split: str, digest: str) -> Path:
        """Free answers to the questions of a split. digest: of their manifest."""
        return self.folder / f"{self.stem}_{split}_answers_{digest}.csv"


def tried_parts(settings: StudySettings, default: StudySettings) -> list[str]:
    """What an experiment tries and chooses by, where that differs from the default."""
    grid = {"methods": "methods", "modes": "mode", "alphas": "alphas", "units": "units"}
    study = {
        "seeds": "seeds",
        "budgets": "budgets",
        "strengths_at": "strengths-at",
        "max_unrelated_loss": "unrelated-loss",
        "gated": "gated",
        "train_vectors": "train-vectors",
        "own_answers": "own-answers",
        "lora": "lora",
        "num_generations": "generations",
    }
    return [
        *differing(settings.grid, default.grid, grid | {"positions": "positions"}),
        *differing(settings, default, study),
    ]


def experiment_stem(model: str, settings: StudySettings) -> str:
    """What the names of an experiment's files begin with."""
    first = settings.sources[0]
    return stem(
        [
            "+".join(slug(source.name) for source in settings.sources),
            slug(model),
            first.split,
            f"n{first.num_samples}",
            *_prompt(settings.ablation.prompt),
            *_attribution(settings.ablation),
            settings.grid.layer_mode,
            "+".join(settings.grid.layers),
            *differing(settings, STUDY_DEFAULT, {"max_new_tokens": "new-tokens"}),
            *_splits(first),
        ]
    )
