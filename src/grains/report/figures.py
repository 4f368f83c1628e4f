"""Figures: words in colour, heat-maps over pictures, gain over cost, strength and layers.

A `draw_...` function draws on the axes it is given, in the colours of the current style, so that
any script can put several into one figure:

    with figures.style("light"):
        figure = Figure(figsize=(6, 3), layout="constrained")
        figures.draw_accuracy(figure.subplots(), grid, "token")
        figure.savefig("accuracy.png")

The `fill_...` functions make a whole figure. Tables have the columns of steering_mc.py's grid.
Blue is for the preferred answer, orange against it: which colour-blind readers can tell apart too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.scale import SymmetricalLogScale
from matplotlib.text import Text
from matplotlib.ticker import (
    FixedLocator,
    LogLocator,
    NullFormatter,
    NullLocator,
    SymmetricalLogLocator,
)
from PIL import Image

from grains.readable import Word
from grains.settings import CONTROLS, METHODS, OF_MODEL
from grains.settings import SCORE_TITLES as TITLES

DIVERGING = LinearSegmentedColormap.from_list(
    "orange_blue", ["#8c4004", "#d9822b", "#f4f2ee", "#4a90c9", "#174f8a"]
)
# Each colour stands out from white and from near-black (3:1); markers tell the methods apart too.
PALETTE = (
    ("#0072b2", "o"),
    ("#d55e00", "s"),
    ("#009e73", "^"),
    ("#bf6a9a", "D"),
    ("#a07000", "v"),
    ("#7d63c8", "P"),
    ("#2b8fa8", "X"),
    ("#5f8f2f", "p"),
    ("#9c5b3c", "<"),
    ("#4f6d94", ">"),
    ("#c8434d", "*"),
)
GREY, CONTROL_MARKERS = "#808080", "x+1234|_"
# How the tokens of a selection are outlined.
OUTLINES = {"pos": "solid", "neg": (0, (2, 1.2))}
MAX_TICKS = 5  # strengths that are all written at the axis


def style(theme: str = "light") -> AbstractContextManager[None]:
    """A context in which figures are drawn dark on light, or light on dark."""
    ink, faint, ground = {
        "light": ("#1b1b1b", "#d8d8d8", "#ffffff"),
        "dark": ("#e6e6e6", "#43474d", "#15171a"),
    }[theme]
    return matplotlib.rc_context(
        {
            "figure.facecolor": ground,
            "savefig.facecolor": ground,
            "axes.facecolor": ground,
            "text.color": ink,
            "axes.edgecolor": ink,
            "axes.labelcolor": ink,
            "axes.titlecolor": ink,
            "xtick.color": ink,
            "ytick.color": ink,
            "grid.color": faint,
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "legend.fontsize": 8.5,
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.7,
            "xtick.major.width": 0.7,
            "ytick.major.width": 0.7,
            "legend.frameon": False,
            "figure.dpi": 200,
            "savefig.dpi": 200,
        }
    )


def draw_words(axes: Axes, lines: Sequence[tuple[Sequence[Word], str]]) -> None:
    """Prompts as running text, each word on the colour of its attribution.

    lines: (words, caption) of each prompt, on a scale of its own. Words have to be measured, so
    the figure's layout is settled here: draw what else it holds before.
    """
    axes.set_axis_off()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    to_axes = axes.transAxes.inverted()
    line_height = 1.75 * 9 / 72 * figure.dpi / axes.bbox.height

    def write(x: float, y: float, text: str, **options: Any) -> tuple[Text, np.ndarray]:
        """Write text with its top left corner there. Returns it and its box."""
        shown = axes.text(
            x, y, text, va="top", transform=axes.transAxes, parse_math=False, **options
        )
        return shown, to_axes.transform(shown.get_window_extent())

    space = np.ptp(write(0, 0, "n n", fontsize=9)[1][:, 0]) - np.ptp(
        write(0, 0, "nn", fontsize=9)[1][:, 0]
    )
    for text in list(axes.texts):
        text.remove()
    y = 1.0
    for line, caption in lines:
        largest = max((abs(word.score) for word in line), default=0) or 1.0
        x = 0.0
        for word in line:
            value = word.score / largest
            x += space if word.text[:1].isspace() and x else 0
            look = {
                "color": _on(value),
                "fontsize": 9,
                "zorder": 2,
                "bbox": {"facecolor": DIVERGING(0.5 + 0.5 * value), "edgecolor": "none", "pad": 1},
            }
            shown, box = write(x, y, word.text.strip() or "␣", **look)
            if box[1, 0] > 1 and x > 0:
                shown.remove()
                y -= line_height
                shown, box = write(0.0, y, word.text.strip() or "␣", **look)
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


def draw_heat(
    axes: Axes,
    picture: Image.Image,
    heat: np.ndarray,
    largest: float,
    outlined: Mapping[str, Sequence] | None = None,
) -> None:
    """The heat-map over the picture in pale grey: clear where there is no attribution.

    largest: the absolute score that has full colour. outlined: boxes by selection ('pos', ...).
    """
    pale = 0.45 * np.asarray(picture.convert("L"), float) / 255 + 0.55
    axes.imshow(pale, cmap="gray", vmin=0, vmax=1)
    axes.imshow(
        heat,
        cmap=DIVERGING,
        vmin=-largest,
        vmax=largest,
        interpolation="nearest",
        alpha=0.9 * np.clip(np.abs(heat) / largest, 0, 1) ** 0.7,
    )
    for top, boxes in (outlined or {}).items():
        for x0, y0, x1, y1 in boxes:
            axes.add_patch(
                Rectangle(
                    (x0 - 0.5, y0 - 0.5),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    lw=0.9,
                    ls=OUTLINES[top],
                    edgecolor="#1b1b1b",
                )
            )
    axes.set_axis_off()


def look(method: str) -> tuple[str, str]:
    """Colour and marker. Controls are grey; LoRA has the last ones."""
    if method in CONTROLS:
        return GREY, CONTROL_MARKERS[CONTROLS.index(method)]
    made = [name for name in METHODS if name not in (*CONTROLS, *OF_MODEL)]
    methods = [*made, "trained", *OF_MODEL]
    return PALETTE[methods.index(method) if method in methods else -1]


def _lines(axes: Axes, table: pd.DataFrame, along: str, value: str, spread: bool = False) -> None:
    """A line for each method and mode, with intervals where the table has them; controls are thin.

    spread: draw them side by side where they share a place on a logarithmic axis.
    """
    table = table[np.isfinite(table[along]) & np.isfinite(table[value])]
    series = list(table.groupby(["method", "mode"], sort=False))
    for index, ((method, mode), rows) in enumerate(series):
        rows = rows.sort_values(along, kind="stable")
        colour, marker = look(method)
        control, variant, gated = method in CONTROLS, "both" in mode, "gated" in mode
        apart = 1.012 ** (index - (len(series) - 1) / 2) if spread else 1
        interval = (
            [rows[value] - rows[f"{value}_low"], rows[f"{value}_high"] - rows[value]]
            if f"{value}_low" in rows
            else None
        )
        axes.errorbar(
            rows[along] * apart,
            rows[value],
            yerr=interval and np.clip(interval, 0, None),
            color=colour,
            marker=marker,
            ms=4.5,
            fillstyle=("full", "none", "left", "bottom")[variant + 2 * gated],
            lw=0.7 if control else 1.2,
            elinewidth=0.5 if control else 0.9,
            zorder=2 if control else 3,
            label=f"{method} {mode}".strip(),
            ls="-." if gated else ":" if control else "--" if variant else "-",
        )


def draw_front(axes: Axes, front: pd.DataFrame) -> None:
    """Gain in accuracy over the perplexity that it cost, with 95 % intervals: a line a method.

    A line joins the configurations chosen within larger and larger budgets.
    front: rows of one data set and score: method, mode, perplexity_increase (0.05 is +5 %), gain,
    gain_low, gain_high.
    """
    ink = matplotlib.rcParams["text.color"]
    axes.axhline(0, color=ink, lw=1)
    axes.axvline(0, color=ink, lw=0.6)
    _lines(
        axes,
        front.drop_duplicates(["method", "mode", "perplexity_increase", "gain"]),
        "perplexity_increase",
        "gain",
    )
    _cost_scale(axes, "x")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.3g}" if value else "0")
    axes.set_ylabel("gain (percentage points)")


def _cost_scale(axes: Axes, along: str) -> None:
    """Increases of perplexity on an axis: linear up to 1 %, decades beyond, as they may run from
    nothing lost to a model that is gone."""
    axes.set(**{f"{along}scale": SymmetricalLogScale(None, linthresh=0.01)})
    axis = getattr(axes, f"{along}axis")
    axis.set_major_locator(FixedLocator([-0.1, -0.01, 0, *(10.0 ** np.arange(-2, 6))]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:+g} %" if value else "0")
    axis.set_minor_locator(SymmetricalLogLocator(base=10, linthresh=0.01, subs=range(2, 10)))
    axis.set_minor_formatter(NullFormatter())


def draw_accuracy(axes: Axes, grid: pd.DataFrame, score: str) -> None:
    """Accuracy over strength with 95 % intervals: a line a method, base as a band.

    grid: rows of one split of the questions, of base and of configurations of the same layers.
    score: token or sum.
    """
    value = f"accuracy_{score}"
    base = grid[grid.method == "base"].iloc[0]
    axes.axhspan(
        base[f"{value}_low"],
        base[f"{value}_high"],
        alpha=0.09,
        lw=0,
        color=matplotlib.rcParams["text.color"],
    )
    _over_strength(axes, grid, value)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    axes.set_title(f"{TITLES[score]} accuracy")


SHARES = ("unrelated_accuracy", "repetition")


def draw_measure(axes: Axes, grid: pd.DataFrame, column: str) -> None:
    """A column of the grid over strength (see `draw_accuracy`), such as a cost."""
    _over_strength(axes, grid, column)
    if column.endswith("_increase"):
        _cost_scale(axes, "y")
        # Autoscaling was linear: the axis begins below what is there, and ends above it.
        values = grid[column][np.isfinite(grid[column])]
        lowest, highest = values.min(), values.max()
        axes.set_ylim(1.5 * lowest if lowest < -0.001 else -0.001, max(1.5 * highest, 0.01))
    elif column in SHARES:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _over_strength(axes: Axes, grid: pd.DataFrame, column: str) -> None:
    base, steered = grid[grid.method == "base"].iloc[0], grid[grid.method != "base"]
    axes.axhline(base[column], color=matplotlib.rcParams["text.color"], lw=1, label="base")
    strengths = np.unique(steered.alpha)
    logarithmic = bool((strengths > 0).all())
    if logarithmic:
        axes.set_xscale("log")
    _lines(axes, steered, "alpha", column, spread=logarithmic)
    if len(strengths) <= MAX_TICKS:
        axes.set_xticks(strengths)
    elif logarithmic:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def draw_layers(axes: Axes, grid: pd.DataFrame, score: str, largest: float) -> AxesImage:
    """Gain in accuracy over base for every single layer and strength.

    grid: rows of one split, of base and of configurations of one method at one layer each. Layers
    may have strengths of their own: the columns are each layer's first, second, ... strength.
    largest: the gain that has full colour. Returns the image, for a colour bar.
    """
    base = grid[grid.method == "base"].iloc[0][f"accuracy_{score}"]
    rows = grid[grid.method != "base"]
    rows = rows.assign(
        layer=rows.layers.astype(int), nth=rows.groupby("layers").alpha.rank("dense").astype(int)
    )
    gains = rows.pivot(index="layer", columns="nth", values=f"accuracy_{score}") - base
    image = axes.imshow(
        gains, cmap=DIVERGING, vmin=-largest, vmax=largest, aspect="auto", origin="lower"
    )
    strengths = rows.groupby("nth").alpha.unique()
    axes.set_xticks(
        range(gains.shape[1]),
        [
            f"{values[0]:g}" if len(values) == 1 else f"no. {nth}"
            for nth, values in strengths.items()
        ],
    )
    every = -(-len(gains) // 12)
    axes.set_yticks(range(0, len(gains), every), gains.index[::every])
    if gains.size <= 60:
        for (y, x), gain in np.ndenumerate(gains.to_numpy()):
            if not np.isnan(gain):
                axes.text(
                    x,
                    y,
                    f"{100 * gain:+.1f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=_on(gain / largest),
                )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image


def fill_front(figure: Figure, front: pd.DataFrame) -> None:
    """Gain over its cost, a panel a score (see `draw_front`)."""
    scores = [score for score in TITLES if (front.score == score).any()]
    panels = figure.subplots(len(scores), squeeze=False, sharex=True)[:, 0]
    for axes, score in zip(panels, scores, strict=True):
        draw_front(axes, front[front.score == score])
        axes.set_title(f"{TITLES[score]} accuracy")
    panels[-1].set_xlabel("increase of perplexity")
    _legend_below(figure, panels[0])


def fill_strength(figure: Figure, grid: pd.DataFrame, measures: dict[str, str]) -> None:
    """Both accuracies over strength, and below them what else changes (see `draw_accuracy`).

    measures: further columns of the grid and their titles.
    """
    ratios = [2.2] * len(TITLES) + [1.5] * len(measures)
    panels = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
    for axes, score in zip(panels, TITLES, strict=False):
        draw_accuracy(axes, grid, score)
    for axes, (column, title) in zip(panels[len(TITLES) :], measures.items(), strict=True):
        draw_measure(axes, grid, column)
        axes.set_title(title)
    panels[-1].set_xlabel("strength")
    _legend_below(figure, panels[0])


def fill_layers(figure: Figure, grid: pd.DataFrame, score: str) -> None:
    """Gain of every single layer and strength, a panel a method (see `draw_layers`)."""
    base, steered = grid[grid.method == "base"], grid[grid.method != "base"]
    gains = steered[f"accuracy_{score}"] - base[f"accuracy_{score}"].iloc[0]
    largest = max(gains.abs().max(), 0.01)
    series = list(steered.groupby(["method", "mode"], sort=False))
    panels = figure.subplots(-(-len(series) // 2), min(2, len(series)), squeeze=False, sharey=True)
    for axes in panels.flat[len(series) :]:
        axes.set_axis_off()
    for axes, (names, rows) in zip(panels.flat, series, strict=False):
        image = draw_layers(axes, pd.concat([base, rows]), score, largest)
        axes.set_title(" ".join(names).strip())
        axes.set_xlabel("strength")
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    figure.colorbar(
        image,
        ax=panels,
        shrink=0.8,
        format=lambda v, _: f"{100 * v:+.3g}",
        label="gain (percentage points)",
    )


def _legend_below(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
