"""The picture of the text demo: words coloured by their attribution, accuracy over strength."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from grains import figures

EXAMPLES = 5


def lines(table: pd.DataFrame) -> list[tuple[list[figures.Word], str]]:
    """The first examples' words with their attributions, and the two answers."""
    return [
        (
            figures.words(json.loads(row.tokens), json.loads(row.attributions)[0]),
            f"✓ {row.chosen}    ✗ {row.rejected}",
        )
        for row in table.drop_duplicates("id").head(EXAMPLES).itertuples()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attributions", type=Path, help="CSV of token_ablation.py")
    parser.add_argument("grid", type=Path, help="grid CSV of steering_mc.py")
    parser.add_argument("output", type=Path, help="PNG to write")
    args = parser.parse_args()
    grid = pd.read_csv(args.grid, keep_default_na=False)
    with figures.style("light"):
        figure = Figure(figsize=(12, 3.3), layout="constrained")
        words, accuracy = figure.subplots(1, 2, width_ratios=(1.25, 1))
        figures.draw_accuracy(accuracy, grid[grid.part.isin(["test", "all"])], "token")
        accuracy.set_title("Held-out questions answered right (per-token log-likelihood)")
        accuracy.set_xlabel("strength at every layer (share of the activation norm)")
        accuracy.legend(ncols=2)
        words.set_title("Which words push to the true answer (blue) or the false one (orange)")
        figures.draw_words(words, lines(pd.read_csv(args.attributions)))
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
