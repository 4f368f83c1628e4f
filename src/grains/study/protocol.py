"""The experiment's protocol: configurations are chosen on validation and reported on test.

For every data set and seed: steering, validation and test questions that share none; vectors of
every method from the steering examples; strengths that cost certain rises of perplexity; the best
configuration within each budget on validation; its gain on test, also on the other data sets.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from grains import runs, stage1
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.names import ExperimentNames
from grains.settings import TRAINED_METHODS, StudySettings
from grains.steering import Configuration, Direction
from grains.study import costs, learned, pareto, strengths, study
from grains.study.evaluate import evaluate, free_answers, scores_of
from grains.study.lora import LoraDirection
from grains.study.study import Study

# Columns by which a file is known as a table that may be replaced.
FRONT_COLUMNS = ("dataset", "evaluated_on", "limit", "score")
COLUMNS = {
    "grid": ("dataset", "evaluated_on", "configuration", "part"),
    "front": FRONT_COLUMNS,
    "generations": ("configuration", "text"),
}


def run(
    lm: LanguageModel,
    settings: StudySettings,
    names: ExperimentNames,
    overwrite: bool = False,
    attributed: stage1.Known | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, pd.DataFrame]:
    """Do the experiment; what is finished is kept in the folder of parts.

    attributed, say: see `study.begin`.
    Returns the tables by their names: grid (every configuration), front (the gain by budget and
    constraint) and generations (free answers).
    """
    for name, path in names.tables().items():
        check_table(path, COLUMNS[name])
    attributed = {} if attributed is None else attributed  # examples that several seeds steer by
    grids, chosen_and_tested, generations = [], [], []
    for seed in settings.seeds:
        studies = []
        for source in settings.sources:
            files = names.study(source.name, seed)
            begun = study.begin(lm, settings, source, seed, files, overwrite, attributed, say)
            studies.append(
                replace(begun, directions=[*begun.directions, *learned.learn(lm, begun)])
            )
        for current in studies:
            configurations = with_strengths(lm, current)
            validated, _ = evaluate(lm, current, current, "validation", configurations)
            chosen = pareto.choose(validated, settings.budgets, settings.max_unrelated_loss)
            labels = {*chosen.configuration}
            configurations = [item for item in configurations if item.label in labels]

            tested, questions = evaluate(lm, current, current, "test", configurations)
            answers = free_answers(lm, current, "test", configurations)
            written = answers.groupby("configuration")[["repetition", "words"]].mean()
            tested = tested.merge(written, on="configuration")
            columns = [*pareto.COSTS]
            by_label = tested.set_index("configuration")[columns]
            chosen[columns] = by_label.loc[chosen.configuration].to_numpy()
            grids += [validated, tested]
            chosen_and_tested.append((chosen, questions))
            generations.append(answers)

            unknown = dict.fromkeys(pareto.ANSWER_COSTS, np.nan)
            for target in studies:
                if target is not current:
                    grid, questions = evaluate(lm, current, target, "test", configurations)
                    grids.append(grid)
                    chosen_and_tested.append((chosen.assign(**unknown), questions))
    return {
        "grid": pd.concat(grids),
        "front": pareto.front(chosen_and_tested),
        "generations": pd.concat(generations),
    }


def check_table(path: Path, columns: Iterable[str]) -> None:
    """Raise UserError if a file that is no table of ours is where a table will be written.

    columns: some that ours has. Better said now than after the computing.
    """
    runs.check_output(path)
    if not path.exists():
        return
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header = next(csv.reader(file), [])
    except (csv.Error, UnicodeDecodeError):
        header = []
    if not {*columns} <= {*header}:
        raise UserError(
            f"'{path}' is no table of an experiment and would be replaced: move it away, or give "
            "another output folder"
        )


def write(tables: dict[str, pd.DataFrame], names: ExperimentNames) -> None:
    """Write the tables of an experiment, on one of the processes of a run."""
    if runs.processes().is_main_process:
        for name, path in names.tables().items():
            runs.remove_leftovers(path)
            runs.write_table(path, tables[name])


def with_strengths(lm: LanguageModel, current: Study) -> list[Configuration]:
    """Every direction at the strengths of the grid, or else at those with certain costs.

    Trained vectors and LoRA have a length of their own and are tried at `learned.SCALES` of it.
    """
    settings, units = current.settings, current.settings.grid.units
    alphas: dict[Direction | LoraDirection, Sequence[float]] = {
        direction: learned.SCALES if direction.method in TRAINED_METHODS else settings.grid.alphas
        for direction in current.directions
    }
    passages = costs.passages(lm, "validation")

    def rises(points: list[tuple[Direction | LoraDirection, float]]) -> np.ndarray:
        """Upper bounds of the rise of the loss of directions at some strengths."""
        configurations = [direction.at(alpha, units) for direction, alpha in points]
        scores = scores_of(lm, current, passages, configurations, "validation_texts")
        return np.log1p(costs.perplexity_bound(passages, scores)[1:])

    aims = settings.strengths_at or sorted(settings.budgets)[::2]
    missing = [direction for direction in current.directions if not alphas[direction]]
    alphas |= strengths.search(missing, rises, np.log1p(np.sort(aims)))
    return [
        direction.at(alpha, units)
        for direction in current.directions
        for alpha in alphas[direction]
    ]
