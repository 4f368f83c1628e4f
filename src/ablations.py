"""The paper's ablation study: reruns the experiment, changing one setting at a time.

What changes is how tokens are attributed, the objective, how many tokens are ablated and how many
examples steer. The vectors of the ablation (mean, pca) stand beside those of the ablation of
random tokens, at one perplexity budget. Examples are attributed once for all numbers of tokens and
of examples. What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import experiment
from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.names import ExperimentNames
from grains.settings import GRAD_METHODS, OBJECTIVES, SCORES, StudySettings

if TYPE_CHECKING:
    import pandas as pd

GIVEN = "as given"
CHANGED = ("grad_method", "attribution", "top_k", "num_samples")


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = experiment.parser(kind, __doc__)
    parser.set_defaults(
        methods=["mean", "pca", "rand_tokens"], train_vectors=False, max_ppl_increase=[0.1]
    )
    group = parser.add_argument_group("ablations")
    group.add_argument(
        "--change",
        nargs="+",
        type=change,
        metavar="FLAG=VALUE",
        default=[
            "grad_method=vanilla",
            "grad_method=smoothgrad",
            "attribution=normal",
            *(f"top_k={max(1, kind.top_k * tenths // 10)}" for tenths in (1, 5, 20)),
            *(f"num_samples={count}" for count in (10, 25, 100)),
        ],
        help=f"settings to try, one at a time: {', '.join(CHANGED)}",
    )
    return parser


def change(text: str) -> str:
    """Checks a value of --change."""
    value_of(text)
    return text


def value_of(text: str) -> tuple[str, Any]:
    """'top_k=5' -> ('top_k', 5)."""
    name, _, value = text.partition("=")
    choices = {"grad_method": GRAD_METHODS, "attribution": OBJECTIVES}.get(name)
    if name not in CHANGED:
        raise argparse.ArgumentTypeError(
            f"{text}: expected FLAG=VALUE with a flag of {', '.join(CHANGED)}"
        )
    if choices is None:
        return name, flags.positive(value)
    if value not in choices:
        raise argparse.ArgumentTypeError(
            f"{text}: invalid choice: expected one of {', '.join(choices)}"
        )
    return name, value


def changed(settings: StudySettings, text: str) -> StudySettings:
    """The settings with one of them changed, as a value of --change says."""
    name, value = value_of(text)
    if name == "num_samples":
        sources = tuple(replace(source, num_samples=value) for source in settings.sources)
        return replace(settings, sources=sources)
    ablation = settings.ablation
    if name == "top_k":
        return replace(settings, ablation=replace(ablation, top_k=value))
    field = "objective" if name == "attribution" else name
    attribution = replace(ablation.attribution, **{field: value})
    return replace(settings, ablation=replace(ablation, attribution=attribution))


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    settings = experiment.study_settings(args)
    tried = {GIVEN: settings} | {text: changed(settings, text) for text in args.change}

    entry.import_libraries()
    import pandas as pd

    from grains import runs
    from grains.cli.documents import check_document, print_tables
    from grains.generation import check_limit
    from grains.stage1 import Known
    from grains.study import protocol

    names = {
        text: ExperimentNames(
            kind.name,
            args.model_name,
            tried[text],
            args.output_dir,
            args.steering_vectors_dir,
            "ablations",
            experiment.study_settings(parser(kind).parse_args([])),
        )
        for text in tried
    }
    check_document(args.document)
    lm = entry.load_model(args)
    check_limit(lm, args.max_new_tokens)
    entry.say_prompt(lm, settings.ablation.prompt)
    by_default = args.change == parser(kind).get_default("change")
    path = names[GIVEN].ablations(() if by_default else args.change)
    manifest = {
        "stage": "ablations",
        "parts": names[GIVEN].parts.name,
        "experiments": {text: protocol.manifest(lm, tried[text], names[text]) for text in tried},
    }
    inputs = [source.path for source in settings.sources]
    opened = runs.Run([path], manifest, args.overwrite, inputs=inputs)
    attributed: Known = {}  # an example is attributed once for all settings that agree on it
    fronts = []
    for text in tried:
        entry.say(f"\n{text}")
        front = protocol.run(lm, tried[text], names[text], args.overwrite, attributed, entry.say)
        fronts.append(front.assign(setting=text))
    table = pd.concat(fronts)
    if not opened.finished:
        if opened.all_done():
            runs.write_table(path, table)
        opened.finish()
    if runs.processes().is_main_process:
        print_tables(args.document, path.stem, summaries(table), {"all settings": path})


def summaries(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Titles and tables: a line for each setting, a column for each method."""
    from grains.study.pareto import UNCONSTRAINED, points

    tables = []
    own = table[(table.dataset == table.evaluated_on) & (table.limit == UNCONSTRAINED)]
    for (dataset, budget), rows in own.groupby(["dataset", "max_ppl_increase"], sort=False):
        condition = f"at most +{budget:.0%} perplexity, {rows.seeds.max()} seed(s)"
        for score, of_score in rows.groupby("score", sort=False):
            title = f"{dataset}: gain in {score} accuracy in points, {condition}"
            tables.append((title, by_setting(of_score, points)))
        title = f"{dataset}: rise of perplexity on neutral text on test, {condition}"
        of_score = rows[rows.score == SCORES[0]]
        tables.append((title, by_setting(of_score, lambda row: f"{row.perplexity_increase:+.1%}")))
    return tables


def by_setting(rows: pd.DataFrame, cell: Callable[[Any], str]) -> pd.DataFrame:
    from grains.study.pareto import pivot

    cells = pivot(rows, "setting", "{}", cell).T
    return cells.loc[rows.setting.unique()].rename_axis(columns=None)


if __name__ == "__main__":
    entry.run(main)
