"""The picture of the text demo: words coloured by their attribution, accuracy over strength."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags

if TYPE_CHECKING:
    import pandas as pd

    from grains.report.figures import Word

EXAMPLES = 5


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    parser.add_argument("attributions", type=Path, help="CSV of token_ablation.py")
    parser.add_argument("grid", type=Path, help="grid CSV of steering_mc.py")
    parser.add_argument("output", type=Path, help="PNG to write")
    return parser


def main() -> None:
    args = parser().parse_args()

    from matplotlib.figure import Figure

    from grains import runs
    from grains.report import figures
    from grains.report.reading import read_table

    grid = read_table(args.grid, "grid")
    attributions = read_table(args.attributions, "attribution")
    with figures.style("light"):
        figure = Figure(figsize=(12, 3.3), layout="constrained")
        words, accuracy = figure.subplots(1, 2, width_ratios=(1.25, 1))
        figures.draw_accuracy(accuracy, grid[grid.part.isin(["test", "all"])], "token")
        accuracy.set_title("Held-out questions answered right (per-token log-likelihood)")
        accuracy.set_xlabel("strength at every layer (share of the activation norm)")
        accuracy.legend(ncols=2)
        words.set_title("Which words push to the true answer (blue) or the false one (orange)")
        figures.draw_words(words, lines(attributions))
        runs.write_whole(args.output, lambda path: figure.savefig(path, format="png"))
    print(f"picture: {args.output}")


def lines(table: pd.DataFrame) -> list[tuple[list[Word], str]]:
    """The first examples' words with their attributions, and the two answers."""
    from grains.report.figures import words

    return [
        (
            words(json.loads(row.tokens), json.loads(row.attributions)[0]),
            f"✓ {row.chosen}    ✗ {row.rejected}",
        )
        for row in table.drop_duplicates("id").head(EXAMPLES).itertuples()
    ]


if __name__ == "__main__":
    entry.run(main)
