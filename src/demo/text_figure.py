"""What the text demo came to: a table, and a picture from the turned sign to the full strength.

The picture shows words coloured by their attribution, and accuracy over strength from -alpha to
alpha: on the left of the two, the contrary contexts under the vectors and the controls, on the
right what else the vectors change.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grains.cli import entry, flags
from grains.study.naming import names

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from grains.report.figures import Word

EXAMPLES = 2
TITLES = {
    "faithfulness-agreeing": "agreeing contexts",
    "faithfulness-bare": "no context",
    "unrelated": "unrelated questions",
}


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    parser.add_argument("attributions", type=Path, help="CSV of token_ablation.py")
    parser.add_argument("grid", type=Path, help="grid CSV of steering_mc.py, contrary contexts")
    parser.add_argument("chosen", type=Path, help="the configuration that it chose")
    parser.add_argument("answers", type=Path, help="CSV of steering_generation.py")
    parser.add_argument("output", type=Path, help="PNG to write")
    parser.add_argument(
        "--beside",
        nargs="*",
        default=[],
        metavar="NAME=GRID",
        help="grids of the same vectors on further questions",
    )
    return parser


def main() -> None:
    args = parser().parse_args()

    import pandas as pd

    from grains import runs
    from grains.report.reading import read_table

    grid = tested(read_table(args.grid, "grid"))
    named = [text.partition("=") for text in args.beside]
    beside = {
        TITLES.get(name, name): tested(read_table(Path(path), "grid")) for name, _, path in named
    }
    answers = pd.read_csv(args.answers, keep_default_na=False, dtype=str)
    chosen = runs.read_json(args.chosen)
    print(f"\n{table(grid, beside, answers, chosen)}\n")
    figure = picture(read_table(args.attributions, "attribution"), grid, beside)
    runs.write_whole(args.output, lambda path: figure.savefig(path, format="png"))
    print(f"picture: {args.output}")


def tested(grid: pd.DataFrame) -> pd.DataFrame:
    return grid[grid.part == "test"]


# --- the table ---


def table(
    grid: pd.DataFrame, beside: dict[str, pd.DataFrame], answers: pd.DataFrame, chosen: dict
) -> str:
    """Markdown: base, the chosen strength, its sign turned, and the controls of that strength."""
    from grains.cli.documents import markdown

    alpha = chosen["alpha"]
    rows = [
        ("base", grid.method == "base"),
        (f"steered, {alpha:g}", grid.configuration == chosen["configuration"]),
        (f"sign turned, {-alpha:g}", (grid.method == chosen["method"]) & at(grid, -alpha)),
        *(
            (f"control `{name}`, {alpha:g}", (grid.method == name) & at(grid, alpha))
            for name in chosen["controls"]
        ),
    ]
    titles = [
        "contrary contexts, summed",
        "per token",
        "free answers from the context",
        *beside,
        "prose",
    ]
    lines = []
    for name, which in rows:
        (row,) = grid[which].itertuples()
        cells = [accuracy(row, "sum"), accuracy(row, "token"), free(answers, row)]
        for further in beside.values():
            same = further[(further.method == row.method) & at(further, row.alpha)]
            cells.append(accuracy(next(same.itertuples()), "token") if len(same) else "")
        cells.append(f"{100 * row.perplexity_increase:+.1f} %")
        lines.append([name, *cells])
    return "\n".join(markdown(["", *titles], lines))


def at(grid: pd.DataFrame, alpha: float) -> pd.Series:
    return (grid.alpha - alpha).abs() < 1e-12


def accuracy(row: Any, score: str) -> str:
    value, low, high = (
        100 * getattr(row, f"accuracy_{score}{end}") for end in ("", "_low", "_high")
    )
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def free(answers: pd.DataFrame, row: Any) -> str:
    """How many free answers hold the answer of the text; '' where none were given."""
    if row.method == "base":
        texts = answers.drop_duplicates("id").base
        wanted = answers.drop_duplicates("id").reference
    else:
        own = answers[answers.configuration == row.configuration]
        texts, wanted = own.steered, own.reference
    held = [names(text, answer) for text, answer in zip(texts, wanted, strict=True)]
    return f"{sum(held)} of {len(held)}" if held else ""


# --- the picture ---


def picture(
    attributions: pd.DataFrame, grid: pd.DataFrame, beside: dict[str, pd.DataFrame]
) -> Figure:
    from matplotlib.figure import Figure

    from grains.report import figures

    with figures.style("light"):
        figure = Figure(figsize=(13, 3.9), layout="constrained")
        words, contrary, further = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
        figures.draw_accuracy(contrary, grid, "token")
        contrary.set_title("Answers from texts that contradict memory")
        contrary.legend(fontsize=7, loc="upper left")
        for (name, rows), (colour, marker) in zip(
            beside.items(), figures.PALETTE[2:], strict=False
        ):
            rows = rows[rows.method.isin(["base", "gradient"])].sort_values("alpha")
            error = [rows.accuracy_token - rows.accuracy_token_low]
            error.append(rows.accuracy_token_high - rows.accuracy_token)
            further.errorbar(
                *(rows.alpha, rows.accuracy_token, error),
                **{"label": name, "color": colour, "marker": marker, "ms": 4.5, "elinewidth": 0.9},
            )
        further.set_title("The same vectors on further questions")
        further.yaxis.set_major_formatter(contrary.yaxis.get_major_formatter())
        further.legend(fontsize=7, loc="upper left")
        for axes in (contrary, further):
            axes.set_ylim(0, 1.02)
            axes.axvline(0, color="#808080", lw=0.6)
            axes.set_xticks(sorted({0.0, *grid.alpha}))
            axes.xaxis.set_major_formatter(contrary.xaxis.get_major_formatter())
            axes.set_xlabel("strength (share of the activation norm)")
        words.set_title("Words that push to the text's answer (blue) or to memory (orange)")
        figures.draw_words(words, lines(attributions))
    return figure


def lines(attributed: pd.DataFrame) -> list[tuple[list[Word], str]]:
    """The first examples' words with their attributions, and the two answers."""
    from grains.readable import without_template, words

    return [
        (
            without_template(words(json.loads(row.tokens), json.loads(row.attributions)[0])),
            f"✓ {row.chosen}    ✗ {row.rejected}",
        )
        for row in attributed.drop_duplicates("id").head(EXAMPLES).itertuples()
    ]


if __name__ == "__main__":
    entry.run(main)
