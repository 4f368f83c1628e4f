"""The name of every file that the scripts write, and that a later one looks for.

A name says what was run: the data, the model and the settings, those alone that differ from the
defaults. Paths are relative to the working folder.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from grains.settings import LAYER_MODES, AblationSettings, DataSettings, GridSettings, StudySettings

LONGEST = 150  # characters of a name before what its endings add; file systems take 255


def slug(name: str) -> str:
    """A model or data set name as part of a file name: the last part of a path or hub id."""
    return Path(name.rstrip("/")).name.replace(" ", "-")


def stem(parts: Iterable[str | None]) -> str:
    """Parts joined as the beginning of a file name; where it is too long, a digest for its end."""
    whole = "_".join(part for part in parts if part)
    if len(whole.encode()) <= LONGEST:
        return whole
    digest = hashlib.sha256(whole.encode()).hexdigest()[:12]
    return whole.encode()[: LONGEST - 13].decode(errors="ignore") + f"_{digest}"


def differing(settings: Any, default: Any, labels: dict[str, str]) -> list[str]:
    """'label-value' for each labelled field in which dataclasses differ."""
    found = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in labels and value != getattr(default, field.name):
            written = "+".join(map(_word, value)) if isinstance(value, tuple) else _word(value)
            found.append(f"{labels[field.name]}-{written}")
    return found


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _attribution(ablation: AblationSettings) -> list[str]:
    """The settings of stage 1: the paper's own always, the others where they are not the default.

    The selections (tops) are not among them: each has a file of its own.
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


@dataclass(frozen=True)
class Names:
    """The files of the stages for one model, data set and settings of stage 1.

    kind: llm or vlm, the folder under data/ and results/. model: its name as given.
    """

    kind: str
    model: str
    data: DataSettings
    ablation: AblationSettings
    default_split: str

    def attributions(self) -> Path:
        """CSV of stage 1."""
        folder = Path("results", self.kind, "token_attribution")
        return folder / f"{self._stage1()}.csv"

    def states(self, tops: Sequence[str], given: str | None = None) -> dict[str, Path]:
        """Hidden-states file of each selection; `given` takes the place of the default name."""
        if given and len(tops) == 1:
            return {tops[0]: Path(given)}
        folder = Path("data", self.kind, "hidden_states")
        base = Path(given or folder / f"{self._stage1()}.safetensors")
        return {top: base.with_name(f"{base.stem}_{top}{base.suffix}") for top in tops}

    def vectors(
        self, states: Path, method: str, mode: str, folder: str | Path | None = None
    ) -> Path:
        """Steering vectors that a method makes of a hidden-states file."""
        folder = Path(folder or Path("data", self.kind, "steering_vectors"))
        return _vectors(folder, states, method, mode, self.ablation.seed)

    def multiple_choice(
        self, grid: GridSettings, default: GridSettings, score: str, folder: str | None = None
    ) -> dict[str, Path]:
        """What steering_mc.py writes: the grid, every question, the chosen configuration."""
        base = Path(folder or Path("results", self.kind, "steering"))
        own = self._evaluation(grid, default, [f"by-{score}" if score != "token" else None])
        return {
            "grid": base / f"{own}_grid.csv",
            "questions": base / f"{own}_questions.csv",
            "chosen": base / f"{own}_chosen.json",
        }

    def chosen(self, folder: str | None = None) -> list[Path]:
        """The configurations that steering_mc.py chose with these settings of stage 1."""
        base = Path(folder or Path("results", self.kind, "steering"))
        return self._there(base, "_chosen.json")

    def generations(
        self,
        grid: GridSettings,
        default: GridSettings,
        decoding: Sequence[str],
        folder: str | None = None,
    ) -> Path:
        """CSV of steering_generation.py. decoding: what differs from its defaults."""
        base = Path(folder or Path("results", self.kind, "steering_generation"))
        return base / f"{self._evaluation(grid, default, decoding)}.csv"

    def all_generations(self, folder: str | None = None) -> list[Path]:
        """Tables of steering_generation.py that are there for these settings of stage 1."""
        base = Path(folder or Path("results", self.kind, "steering_generation"))
        return self._there(base, ".csv")

    def _there(self, folder: Path, ending: str) -> list[Path]:
        """The files of all evaluations of this stage 1: behind its part the layer mode follows."""
        begin = glob.escape(stem(self._shared()))
        return sorted(
            path for mode in LAYER_MODES for path in folder.glob(f"{begin}_{mode}_*{ending}")
        )

    def _stage1(self) -> str:
        return stem(
            [
                slug(self.data.name),
                slug(self.model),
                self.data.split or self.default_split,
                f"n{self.data.num_samples}",
                f"seed{self.ablation.seed}",
                self.ablation.prompt_style,
                *_attribution(self.ablation),
            ]
        )

    def _shared(self) -> list[str]:
        """What the names of all evaluations of one stage 1 begin with."""
        return [
            slug(self.data.name),
            slug(self.model),
            f"n{self.data.num_samples}",
            f"seed{self.ablation.seed}",
            self.ablation.prompt_style,
            *_attribution(self.ablation),
        ]

    def _evaluation(
        self, grid: GridSettings, default: GridSettings, more: Sequence[str | None]
    ) -> str:
        return stem([*self._shared(), *grid_parts(grid, default), *_splits(self.data), *more])


def _vectors(folder: Path, states: Path, method: str, mode: str, seed: int) -> Path:
    drawn = f"seed{seed}" if method == "random" else None
    return folder / f"{stem([states.stem, method, drawn, mode])}.safetensors"


def _splits(data: DataSettings) -> list[str]:
    return differing(
        data,
        DataSettings(""),
        {
            "split": "split",
            "validation_split": "validation",
            "test_split": "test",
            "evaluate_on": "on",
            "num_validation": "validation",
            "num_test": "test",
        },
    )


def grid_parts(grid: GridSettings, default: GridSettings) -> list[str]:
    return [
        grid.layer_mode,
        "+".join(grid.layers),
        *differing(
            grid,
            default,
            {"methods": "methods", "modes": "mode", "alphas": "alphas", "units": "units"},
        ),
    ]


@dataclass(frozen=True)
class ExperimentNames:
    """The files of an experiment.

    Methods, strengths, budgets and seeds are not among the names: experiments that differ in these
    share what they attribute, train and score, and the tables are those of the last.

    kind: llm or vlm. model: its name as given. folder: of the tables, and of `parts`.
    vectors_folder: of the vectors that methods make (None: `parts`).
    stage: experiment, or ablations for those that an ablation study compares.
    """

    kind: str
    model: str
    settings: StudySettings
    folder: str | None = None
    vectors_folder: str | None = None
    stage: str = "experiment"

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
        return {name: self._beside(f"_{name}.csv") for name in ("grid", "front", "generations")}

    def ablations(self) -> Path:
        """The table that compares experiments, named after the one with no setting changed."""
        return self._beside("_ablations.csv")

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

    def trained(self) -> Path:
        return self.folder / f"{self.stem}_trained.safetensors"

    def lora(self, objective: str) -> Path:
        return self.folder / f"{self.stem}_lora_{objective}.safetensors"

    def scores(self, items: str, digest: str) -> Path:
        """Log-likelihoods of some items. digest: of the manifest and the configurations."""
        return self.folder / f"{self.stem}_{items}_scores_{digest}.safetensors"

    def all_scores(self, items: str) -> list[Path]:
        """Log-likelihoods of these items that are there."""
        begin = glob.escape(f"{self.stem}_{items}_scores_")
        return sorted(self.folder.glob(f"{begin}*.safetensors"))

    def answers(self, split: str, digest: str) -> Path:
        """Free answers to the questions of a split. digest: of their manifest."""
        return self.folder / f"{self.stem}_{split}_answers_{digest}.csv"


def experiment_stem(model: str, settings: StudySettings) -> str:
    """What the names of an experiment's files begin with."""
    first = settings.sources[0]
    return stem(
        [
            "+".join(slug(source.name) for source in settings.sources),
            slug(model),
            f"n{first.num_samples}",
            settings.ablation.prompt_style,
            *_attribution(settings.ablation),
            settings.grid.layer_mode,
            "+".join(settings.grid.layers),
            *differing(
                settings,
                StudySettings((), (), AblationSettings(), GridSettings(())),
                {"max_new_tokens": "new-tokens"},
            ),
            *_splits(first),
        ]
    )
