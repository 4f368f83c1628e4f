"""The picture of the text demo: words coloured by their attribution, accuracy over strength."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps

EXAMPLES = 5
# Blue pushes to the preferred answer, orange away from it: told apart by colour-blind readers too.
COLOURS = colormaps["PuOr"]
STYLES = {"mean": ("#0072B2", "o"), "pca": ("#56B4E9", "s"), "gradient": ("#009E73", "^"),
          "caa": ("#CC79A7", "D"), "random": ("#767676", "x"), "rand_tokens": ("#999999", "+")}


def draw_words(axes, table: pd.DataFrame) -> None:
    """One line of words an example, each on the colour of its attribution."""
    axes.set_axis_off()
    axes.set_title("Which words push to the true answer (blue) or the false one (orange)",
                   fontsize=10, loc="left")
    once = table.drop_duplicates("id").sort_values("completeness_error_relative").head(EXAMPLES)
    renderer = axes.figure.canvas.get_renderer()
    for line, example in enumerate(once.itertuples()):
        scores = np.array(json.loads(example.attributions)[0])
        largest = np.abs(scores).max()
        x, y = 0.0, 0.93 - line * 0.205
        for token, score in zip(json.loads(example.tokens), scores, strict=True):
            word = token.replace("Ġ", " ").replace("Ċ", "").replace("▁", " ")
            if not word.strip() or score == 0:
                continue
            dark = abs(score) > 0.75 * largest
            drawn = axes.text(x, y, word, fontsize=9, va="top", transform=axes.transAxes,
                              color="white" if dark else "black",
                              bbox={"facecolor": COLOURS(0.5 + 0.4 * score / largest),
                                    "edgecolor": "none", "pad": 1.5})
            extent = drawn.get_window_extent(renderer)
            x = axes.transAxes.inverted().transform((extent.x1, 0))[0] + 0.006
        axes.text(0.01, y - 0.095, f"✓ {example.chosen}    ✗ {example.rejected}", fontsize=7.5,
                  va="top", color="#444444", transform=axes.transAxes)


def draw_accuracy(axes, grid: pd.DataFrame) -> None:
    """Test accuracy over strength with 95 % intervals, a line for each method."""
    part = grid[grid.part.isin(["test", "all"])]
    base = part[part.method == "base"].iloc[0]
    axes.axhspan(base.accuracy_token_low, base.accuracy_token_high, color="#dddddd", zorder=0)
    axes.axhline(base.accuracy_token, color="black", lw=1, label="base")
    for shift, ((method, mode), rows) in enumerate(
            part[part.method != "base"].groupby(["method", "mode"], sort=False)):
        rows = rows.sort_values("alpha")
        colour, marker = STYLES[method]
        axes.errorbar(
            rows.alpha * (1 + 0.015 * shift), rows.accuracy_token,
            yerr=[rows.accuracy_token - rows.accuracy_token_low,
                  rows.accuracy_token_high - rows.accuracy_token],
            label=f"{method} {mode}".strip(), color=colour, marker=marker, ms=5, lw=1.3,
            ls="--" if mode == "both" else "-", capsize=2)
    axes.set_xscale("log")
    strengths = sorted(part.alpha[part.alpha > 0].unique())
    axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    axes.minorticks_off()
    axes.set_xlabel("strength at every layer (share of the activation norm)")
    axes.set_ylabel("per-token accuracy, test")
    axes.set_title("Held-out questions answered right", fontsize=10, loc="left")
    axes.legend(fontsize=7.5, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attributions", type=Path, help="CSV of token_ablation.py")
    parser.add_argument("grid", type=Path, help="grid CSV of steering_mc.py")
    parser.add_argument("output", type=Path, help="PNG to write")
    args = parser.parse_args()
    figure, (words, accuracy) = plt.subplots(
        1, 2, figsize=(12, 4.2), width_ratios=(1.25, 1), layout="constrained", dpi=130)
    draw_accuracy(accuracy, pd.read_csv(args.grid, keep_default_na=False))
    figure.canvas.draw()
    draw_words(words, pd.read_csv(args.attributions))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(f"picture: {args.output}")


if __name__ == "__main__":
    main()
