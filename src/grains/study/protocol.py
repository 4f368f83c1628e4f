"""The experiment's protocol: configurations are chosen on validation and reported on test.

For every data set and seed: steering, validation and test questions that share none; vectors of
every method from the steering examples; strengths that cost certain rises of perplexity; the best
configuration within each budget on validation; its gain on test, also on the other data sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from grains import manifests, runs, stage1
from grains.lm import LanguageModel
from grains.names import ExperimentNames
from grains.settings import TRAINED_METHODS, StudySettings
from grains.steering import Configuration, Direction
from grains.study import costs, learned, pareto, strengths, study
from grains.study.evaluate import evaluate, free_answers, scores_of
from grains.study.lora import LoraDirection
from grains.study.study import Study

# The columns of a front that are text, whatever it looks like.
TEXTS = ("dataset", "evaluated_on", "method", "mode", "score", "limit", "configuration")


def manifest(lm: LanguageModel, settings: StudySettings, names: ExperimentNames) -> dict:
    """All that the tables of an experiment depend on. Raises as `study.draw`.

    parts: the folder of what it makes on the way, which other experiments may share.
    """
    experiment = asdict(settings)
    experiment["ablation"]["attribution"] = manifests.attribution(settings.ablation.attribution)
    if settings.own_answers == StudySettings.own_answers:  # which older tables do not name
        del experiment["own_answers"]
    return {
        "stage": "experiment",
        "parts": names.parts.name,
        "model": manifests.model(lm),
        "examples": {
            f"{source.name}, seed {seed}": study.draw(settings, source, seed).fingerprints()
            for seed in settings.seeds
            for source in settings.sources
        },
        "experiment": experiment,
        "versions": runs.versions(),
    }


def run(
    lm: LanguageModel,
    settings: StudySettings,
    names: ExperimentNames,
    overwrite: bool = False,
    attributed: stage1.Known | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> pd.DataFrame:
    """Do the experiment and write its tables; what is finished is kept in the folder of parts.

    attributed, say: see `study.begin`.
    Returns the front. Raises UserError as `runs.Run` does for the tables, and as `study.begin`.
    """
    paths = names.tables()
    inputs = [source.path for source in settings.sources]
    own = manifest(lm, settings, names)
    opened = runs.Run([*paths.values()], own, overwrite, inputs=inputs)
    if opened.finished:
        say("nothing to do: these tables are already there")
        return read_front(paths["front"])
    tables = computed(lm, settings, names, overwrite, attributed, say)
    if opened.all_done():
        for name, path in paths.items():
            runs.write_table(path, tables[name])
    opened.finish()
    return tables["front"]


def read_front(path: Path) -> pd.DataFrame:
    """A front as it was before it was written."""
    columns = pd.read_csv(path, nrows=0).columns
    return pd.read_csv(
        path,
        dtype=dict.fromkeys(TEXTS, str),
        keep_default_na=False,
        na_values={name: [""] for name in columns if name not in TEXTS},
        float_precision="round_trip",
    )


def computed(
    lm: LanguageModel,
    settings: StudySettings,
    names: ExperimentNames,
    overwrite: bool,
    attributed: stage1.Known | None,
    say: Callable[[str], None],
) -> dict[str, pd.DataFrame]:
    """The tables by their names: grid (every configuration), front (the gain by budget and
    constraint) and generations (free answers). See `run`."""
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
            chosen_and_tested.append((chosen, with_repetition(questions, answers)))
            generations.append(answers)

            unknown = dict.fromkeys(pareto.ANSWER_COSTS, np.nan)
            for target in studies:
                if target is not current:
                    grid, questions = evaluate(lm, current, target, "test", configurations)
                    grids.append(grid)
                    unasked = questions.assign(repetition=np.nan)
                    chosen_and_tested.append((chosen.assign(**unknown), unasked))
    return {
        "grid": pd.concat(grids),
        "front": pareto.front(chosen_and_tested),
        "generations": pd.concat(generations),
    }


def with_repetition(questions: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Rows of questions (see `evaluate`) with the repetition of the free answer, or NaN.

    Unrelated questions, which are not answered freely, may have the names of others.
    """
    same = ["evaluated_on", "configuration", "id"]
    written = answers.rename(columns={"dataset": "evaluated_on"})[[*same, "repetition"]]
    return questions.merge(written, "left", same)


def with_strengths(lm: LanguageModel, current: Study) -> list[Configuration]:
    """Every direction at the strengths of the grid, or else at those with certain costs.

    Trained vectors and LoRA have a length of their own and are tried at `learned.SCALES` of it.
    """
    settings, units = current.settings, current.settings.grid.units
    scales = learned.SCALES[settings.own_answers]
    alphas: dict[Direction | LoraDirection, Sequence[float]] = {
        direction: scales if direction.method in TRAINED_METHODS else settings.grid.alphas
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
