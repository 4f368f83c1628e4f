"""The paper's ablations: the experiment again and again, with one setting at a time changed.

What is changed is how tokens are attributed, the objective, how many tokens are ablated and how
many examples steer. The vectors of the ablation (mean, pca) stand beside those of the ablation of
random tokens, at one price. Examples are attributed once for all numbers of tokens and examples.
What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import pandas as pd
from grains.fronts import SCORES, UNLIMITED, pivot, points, tell

import experiment
from grains import cli, runs

GIVEN = "as given"
CHANGED = ("grad_method", "attribution", "top_k", "num_samples")


def flags(kind: cli.Kind):
    parser = experiment.flags(kind, __doc__)
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
        help=f"settings to try, one at a time: {', '.join(CHANGED)} (default: %(default)s)",
    )
    return parser


def change(text: str) -> str:
    if text.partition("=")[0] not in CHANGED:
        raise argparse.ArgumentTypeError(
            f"{text}: expected FLAG=VALUE with a flag of {', '.join(CHANGED)}"
        )
    return text


def main(kind: cli.Kind = cli.LLM) -> None:
    parser = flags(kind)
    args = parser.parse_args()
    tried = {GIVEN: args} | {
        setting: parser.parse_args([*sys.argv[1:], f"--{setting}"]) for setting in args.change
    }
    lm = cli.load_model(args)
    folder = cli.output_dir(args, "ablations")
    path = folder / f"{experiment.stem_of(args)}_ablations.csv"
    fronts, known = [], {}  # what is attributed alike is attributed once
    for setting, one in tried.items():
        print(f"\n{setting}")
        one.output_dir = folder
        fronts.append(experiment.run(one, lm, known).assign(setting=setting))
    if runs.processes().is_main_process:
        table = pd.concat(fronts)
        runs.write_table(path, table)
        tell(args.document, path.stem, summaries(table), {"all settings": path})


def summaries(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Titles and tables: a line for each setting, a column for each method."""
    found = []
    own = table[(table.dataset == table.evaluated_on) & (table.limit == UNLIMITED)]
    for (dataset, budget), rows in own.groupby(["dataset", "max_ppl_increase"], sort=False):
        about = f"at most +{budget:.0%} perplexity, {rows.seeds.max()} seed(s)"
        for kind, part in rows.groupby("score", sort=False):
            found.append(
                (f"{dataset}: gain in {kind} accuracy in points, {about}", by_setting(part, points))
            )
        part = rows[rows.score == SCORES[0]]
        found.append(
            (
                f"{dataset}: rise of perplexity on neutral text on test, {about}",
                by_setting(part, lambda row: f"{row.perplexity_increase:+.1%}"),
            )
        )
    return found


def by_setting(rows: pd.DataFrame, cell) -> pd.DataFrame:
    cells = pivot(rows, "setting", "{}", cell).T
    return cells.loc[rows.setting.unique()].rename_axis(columns=None)


if __name__ == "__main__":
    cli.main(main)
