"""Figures: words in colour, heat-maps over pictures, accuracy over strength, layers, cost.

A `draw_...` function draws on the axes it is given, in the colours of the current style, so that
any script can put several into one figure:

    with figures.style("light"):
        figure = Figure(figsize=(6, 3), layout="constrained")
        figures.draw_accuracy(figure.subplots(), grid, "token")
        figure.savefig("accuracy.png")

The `fill_...` functions make a whole figure. Tables have the columns of steering_mc.py's grid.
Blue is for the preferred answer, orange against it: told apart by colour-blind readers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from tokenizers import decoders

from grains.vectors import CONTROLS

DIVERGING = LinearSegmentedColormap.from_list(
    "orange_blue", ["#8c4004", "#d9822b", "#f4f2ee", "#4a90c9", "#174f8a"])
# Each colour stands out from white and from near-black (3:1); markers tell the methods apart too.
METHODS = {"mean": ("#0072b2", "o"), "pca": ("#d55e00", "s"), "gradient": ("#009e73", "^"),
           "caa": ("#bf6a9a", "D"), "repe": ("#a07000", "v"), "random": ("#808080", "x"),
           "rand_tokens": ("#808080", "+"), "shuffled": ("#808080", "1")}
SCORES = {"token": "per-token", "sum": "summed"}
# How the tokens of a selection are outlined.
OUTLINES = {"pos": "solid", "neg": (0, (2, 1.2)), "abs": "solid", "rand": (0, (0.8, 1.2))}
# Pieces of one character that byte-level vocabularies may cut it into (an emoji's four bytes).
MAX_PIECES = 6


def style(theme: str = "light"):
    """A context in which figures are drawn dark on light, or light on dark."""
    ink, faint, ground = {"light": ("#1b1b1b", "#d8d8d8", "#ffffff"),
                          "dark": ("#e6e6e6", "#43474d", "#15171a")}[theme]
    return matplotlib.rc_context({
        "figure.facecolor": ground, "savefig.facecolor": ground, "axes.facecolor": ground,
        "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "axes.titlecolor": ink,
        "xtick.color": ink, "ytick.color": ink, "grid.color": faint,
        "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "legend.fontsize": 8.5,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7,
        "legend.frameon": False, "figure.dpi": 200, "savefig.dpi": 200})


@dataclass(frozen=True)
class Word:
    """A piece of the prompt as it reads, its attribution and the positions of its tokens."""

    text: str
    score: float
    positions: tuple[int, ...]


def words(tokens: Sequence[str], scores: Sequence[float]) -> list[Word]:
    """A tokenizer's tokens as text.

    A character that several tokens make up is one word, with the sum of their scores:
    attributions add up.
    """
    pieces = any("▁" in token for token in tokens)  # SentencePiece; byte-level otherwise
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                 decoders.Fuse()]) if pieces else decoders.ByteLevel()
    found, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = decoder.decode(list(tokens[start:end]))
        if text.endswith("\ufffd") and end < len(tokens) and end - start < MAX_PIECES:
            continue
        found.append(Word(text, float(sum(scores[start:end])), tuple(range(start, end))))
        start = end
    return found


def draw_words(axes: Axes, lines: Sequence[tuple[Sequence[Word], str]],
               ablated: Sequence[frozenset[int]] = ()) -> None:
    """Prompts as running text, each word on the colour of its attribution.

    lines: (words, caption) of each prompt, on a scale of its own. ablated: for each prompt the
    positions that are underlined. Words have to be measured, so the figure's layout is settled
    here: draw what else it holds before.
    """
    axes.set_axis_off()
    axes.figure.draw_without_rendering()
    axes.figure.set_layout_engine("none")
    to_axes = axes.transAxes.inverted()
    line_height = 1.75 * 9 / 72 * axes.figure.dpi / axes.bbox.height

    def write(x, y, text, **options):
        """Write text with its top left corner there. Returns it and its box."""
        shown = axes.text(x, y, text, va="top", transform=axes.transAxes, parse_math=False,
                          **options)
        return shown, to_axes.transform(shown.get_window_extent())

    space = np.ptp(write(0, 0, "n n", fontsize=9)[1][:, 0]) - np.ptp(
        write(0, 0, "nn", fontsize=9)[1][:, 0])
    for text in list(axes.texts):
        text.remove()
    y = 1.0
    for index, (line, caption) in enumerate(lines):
        largest = max((abs(word.score) for word in line), default=0) or 1.0
        underlined = ablated[index] if ablated else frozenset()
        x = 0.0
        for word in line:
            value = word.score / largest
            x += space if word.text[:1].isspace() and x else 0
            look = {"color": _on(value), "fontsize": 9, "zorder": 2, "bbox": {
                "facecolor": DIVERGING(0.5 + 0.5 * value), "edgecolor": "none", "pad": 1}}
            shown, box = write(x, y, word.text.strip() or "␣", **look)
            if box[1, 0] > 1 and x > 0:
                shown.remove()
                y -= line_height
                shown, box = write(0.0, y, word.text.strip() or "␣", **look)
            if underlined.intersection(word.positions):
                axes.plot(box[:, 0], [y - 0.72 * line_height] * 2, lw=1.3, clip_on=False,
                          color=matplotlib.rcParams["text.color"], transform=axes.transAxes)
            x = box[1, 0] + 0.15 * space
        y -= line_height
        box = write(0.0, y, caption, fontsize=8)[1]
        y = box[0, 1] - 0.7 * line_height


def _on(value: float) -> str:
    """The colour of text on DIVERGING at a value in -1 ... 1."""
    return "white" if abs(value) > 0.6 else "#1b1b1b"


def heat_map(boxes: Sequence, scores: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """(height, width): at each pixel the summed scores of the image tokens that show it.

    boxes: (x0, y0, x1, y1) in pixels, or None for a token that shows no part of the picture.
    size: (width, height).
    """
    heat = np.zeros(size[::-1])
    for box, score in zip(boxes, scores, strict=True):
        if box is not None:
            x0, y0, x1, y1 = (round(edge) for edge in box)
            heat[y0:y1, x0:x1] += score
    return heat


def draw_heat(axes: Axes, picture: Image.Image, heat: np.ndarray, largest: float,
              outlined: dict[str, Sequence] | None = None) -> None:
    """The heat-map over the picture in pale grey: clear where there is no attribution.

    largest: the absolute score that has full colour. outlined: boxes by selection ('pos', ...).
    """
    pale = 0.45 * np.asarray(picture.convert("L"), float) / 255 + 0.55
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1)
    axes.imshow(heat, cmap=DIVERGING, vmin=-largest, vmax=largest, interpolation="nearest",
                alpha=0.9 * np.clip(np.abs(heat) / largest, 0, 1) ** 0.7)
    for top, boxes in (outlined or {}).items():
        for x0, y0, x1, y1 in boxes:
            axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False,
                                     lw=0.9, ls=OUTLINES[top], edgecolor="#1b1b1b"))
    axes.set_axis_off()


def draw_accuracy(axes: Axes, grid: pd.DataFrame, score: str) -> None:
    """Accuracy over strength with 95 % intervals: a line a method, base as a band.

    grid: rows of one part of the questions, of base and of configurations of the same layers.
    score: token or sum.
    """
    base = grid[grid.method == "base"].iloc[0]
    ink = matplotlib.rcParams["text.color"]
    value = f"accuracy_{score}"
    axes.axhspan(base[f"{value}_low"], base[f"{value}_high"], color=ink, alpha=0.09, lw=0)
    axes.axhline(base[value], color=ink, lw=1, label="base")
    strengths = _lines(axes, grid[grid.method != "base"], "alpha", value)
    axes.set_xticks(range(len(strengths)), [f"{strength:g}" for strength in strengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.set_title(f"{SCORES[score]} accuracy")


def draw_front(axes: Axes, front: pd.DataFrame) -> None:
    """Gain in accuracy over the price it may have at most, a line a method.

    front: rows of one data set and score: method, mode, max_ppl_increase (0.05 is 5 %), gain,
    gain_low, gain_high.
    """
    axes.axhline(0, color=matplotlib.rcParams["text.color"], lw=1, label="base")
    budgets = _lines(axes, front, "max_ppl_increase", "gain")
    axes.set_xticks(range(len(budgets)), [f"+{100 * budget:g} %" for budget in budgets])
    _gain_axis(axes)


def _lines(axes: Axes, table: pd.DataFrame, along: str, value: str) -> list[float]:
    """Lines with intervals, a method and mode each, side by side at equally spaced places.

    Returns the values of column `along` that the places 0, 1, ... stand for.
    """
    places = sorted(table[along].unique())
    series = list(table.groupby(["method", "mode"], sort=False))
    step = min(0.1, 0.7 / max(len(series), 1))
    for index, ((method, mode), rows) in enumerate(series):
        rows = rows.dropna(subset=value).sort_values(along)
        colour, marker = _look(method)
        shift = step * (index - (len(series) - 1) / 2)
        axes.errorbar(
            [places.index(place) + shift for place in rows[along]], rows[value],
            yerr=np.clip([rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]],
                         0, None),
            color=colour, marker=marker, ms=4.5, lw=1.1, elinewidth=0.9,
            mfc="none" if mode == "both" else colour, label=f"{method} {mode}".strip(),
            ls=":" if method in CONTROLS else "--" if mode == "both" else "-")
    axes.set_xlim(-0.5, len(places) - 0.5)
    return places


def draw_layers(axes: Axes, grid: pd.DataFrame, score: str, largest: float):
    """Gain in accuracy over base for every single layer and strength.

    grid: rows of one part, of base and of configurations of one method at one layer each.
    largest: the gain that has full colour. Returns the image, for a colour bar.
    """
    base = grid[grid.method == "base"].iloc[0][f"accuracy_{score}"]
    rows = grid[grid.method != "base"]
    gains = rows.assign(layer=rows.layers.astype(int)).pivot(
        index="layer", columns="alpha", values=f"accuracy_{score}") - base
    image = axes.imshow(gains, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto",
                        origin="lower")
    axes.set_xticks(range(gains.shape[1]), [f"{alpha:g}" for alpha in gains.columns])
    every = -(-len(gains) // 12)
    axes.set_yticks(range(0, len(gains), every), gains.index[::every])
    if gains.size <= 60:
        for (y, x), gain in np.ndenumerate(gains.to_numpy()):
            if not np.isnan(gain):
                axes.text(x, y, f"{100 * gain:+.1f}", ha="center", va="center", fontsize=8,
                          color=_on(gain / largest))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def draw_cost(axes: Axes, grid: pd.DataFrame, score: str) -> None:
    """Gain in accuracy over the increase of perplexity, a point a configuration.

    grid: rows of one part, with the column perplexity_increase (0.05 is +5 %).
    """
    base = grid[grid.method == "base"].iloc[0][f"accuracy_{score}"]
    ink = matplotlib.rcParams["text.color"]
    axes.axhline(0, color=ink, lw=1)
    axes.axvline(0, color=ink, lw=0.6)
    steered = grid[grid.method != "base"].dropna(subset="perplexity_increase")
    for (method, mode), rows in steered.groupby(["method", "mode"], sort=False):
        colour, marker = _look(method)
        axes.plot(rows.perplexity_increase, rows[f"accuracy_{score}"] - base, marker, ms=5,
                  color=colour, mfc="none" if mode == "both" else colour,
                  label=f"{method} {mode}".strip())
    # Linear up to 1 %, decades beyond: from nothing lost to a model that is gone.
    axes.set_xscale("symlog", linthresh=0.01)
    least, most = steered.perplexity_increase.min(), steered.perplexity_increase.max()
    ticks = [tick for tick in (-0.1, -0.01, 0, 0.01, 0.1, 1, 10, 100, 1000)
             if min(least, 0) <= tick <= max(most, 0.01)]
    axes.set_xticks(ticks, [f"{100 * tick:+g} %" if tick else "0" for tick in ticks])
    axes.minorticks_off()
    _gain_axis(axes)


def _look(method: str) -> tuple[str, str]:
    """Colour and marker; of a method that is not known here a grey dot."""
    return METHODS.get(method, ("#808080", "."))


def _gain_axis(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}" if value else "0")
    axes.set_ylabel("gain (percentage points)")


def fill_accuracy(figure: Figure, grid: pd.DataFrame) -> None:
    """Both accuracies over strength, one above the other (see `draw_accuracy`)."""
    panels = figure.subplots(len(SCORES), sharex=True)
    for axes, score in zip(panels, SCORES, strict=True):
        draw_accuracy(axes, grid, score)
    panels[-1].set_xlabel("strength")
    _legend_below(figure, panels[0])


def fill_layers(figure: Figure, grid: pd.DataFrame, score: str) -> None:
    """Gain of every single layer and strength, a panel a method (see `draw_layers`)."""
    base, steered = grid[grid.method == "base"], grid[grid.method != "base"]
    gains = steered[f"accuracy_{score}"] - base[f"accuracy_{score}"].iloc[0]
    largest = max(gains.abs().max(), 0.01)
    series = list(steered.groupby(["method", "mode"], sort=False))
    panels = figure.subplots(-(-len(series) // 2), min(2, len(series)), squeeze=False, sharey=True)
    for axes in panels.flat[len(series):]:
        axes.set_axis_off()
    for axes, (names, rows) in zip(panels.flat, series, strict=False):
        image = draw_layers(axes, pd.concat([base, rows]), score, largest)
        axes.set_title(" ".join(names).strip())
        axes.set_xlabel("strength")
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    figure.colorbar(image, ax=panels, shrink=0.8, format=lambda v, _: f"{100 * v:+.3g}",
                    label="gain (percentage points)")


def fill_front(figure: Figure, front: pd.DataFrame) -> None:
    """Gain over the price allowed, a panel a score (see `draw_front`)."""
    scores = [score for score in SCORES if (front.score == score).any()]
    panels = figure.subplots(len(scores), squeeze=False, sharex=True)[:, 0]
    for axes, score in zip(panels, scores, strict=True):
        draw_front(axes, front[front.score == score])
        axes.set_title(f"{SCORES[score]} accuracy")
    panels[-1].set_xlabel("perplexity may rise by")
    _legend_below(figure, panels[0])


def fill_cost(figure: Figure, grid: pd.DataFrame) -> None:
    """Gain in both accuracies over the price, one above the other (see `draw_cost`)."""
    panels = figure.subplots(len(SCORES), sharex=True)
    for axes, score in zip(panels, SCORES, strict=True):
        draw_cost(axes, grid, score)
        axes.set_title(f"{SCORES[score]} accuracy")
    panels[-1].set_xlabel("increase of perplexity")
    _legend_below(figure, panels[0])


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
