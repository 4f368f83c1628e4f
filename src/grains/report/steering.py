"""Steering in the report: gains and costs, beside controls, over strength and by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from grains.errors import UserError
from grains.report import figures, tables, verdicts
from grains.report.figures import TITLES
from grains.report.files import chosen_configuration, manifest_of
from grains.report.images import Images
from grains.report.reading import read_table
from grains.report.tables import MEASURES, present
from grains.report.text import joined, percent, points
from grains.settings import CONTROLS, SCORES
from grains.steering import BASE, layer_ranges

MAX_LAYER_SETS = 6


def evaluation_views(
    stem: Path, files: dict[str, Path], named: str, images: Images, prefix: str
) -> list[dict]:
    """A block for each data set that an evaluation's grid and front are of.

    named: the data set if the tables do not say; prefix: of the figures' names.
    """
    read = {kind: read_table(path, kind) for kind, path in files.items()}
    blocks: dict[str, dict[str, pd.DataFrame]] = {}
    for kind in ("front", "grid"):
        if kind in read:
            table = read[kind]
            dataset = table.get("dataset", pd.Series(named, table.index))
            tested = table.get("evaluated_on", dataset)
            title = dataset.where(tested == dataset, dataset + ", tested on " + tested)
            for name, rows in table.groupby(title, sort=False):
                blocks.setdefault(name, {})[kind] = rows
    views = []
    for title, block in blocks.items():
        name = prefix if len(blocks) == 1 else f"{prefix}_{title}"
        item: dict[str, Any] = {
            "title": title if [*blocks] != [named] else "",
            "stem": stem.name,
            "counts": {},
            "seeds": [],
            "fronts": [],
            "summary": None,
            "tables": [],
            "figures": [],
            "layers": None,
        }
        if "front" in block:
            item["fronts"] = front_views(block["front"], images, f"{name}_front")
        if "grid" in block:
            item |= grid_view(stem, files, block["grid"], read.get("questions"), images, name)
        views.append(item)
    return views


# --- gain and cost ---


def front_views(front: pd.DataFrame, images: Images, name: str) -> list[dict]:
    """Figure, sentences and tables for each constraint on further costs, the strictest first."""
    line = (front.method + " " + front["mode"]).str.strip()
    front = front.assign(line=line, title=line + np.where(front.is_control, " (control)", ""))
    front, comparisons = tables.adjusted(front)
    limited = [*front.groupby("limit", sort=False)][::-1]
    return [
        front_view(rows, limit, comparisons, images, name + f"_limit-{index}" * (len(limited) > 1))
        for index, (limit, rows) in enumerate(limited)
    ]


def front_view(
    front: pd.DataFrame, limit: str, comparisons: int, images: Images, name: str
) -> dict:
    height = 1.1 + 2.6 * front.score.nunique() + 0.18 * (front.title.nunique() // 3)
    alt = (
        f"Gain in accuracy over the measured increase of perplexity for {series(front)}"
        + f", {limit}; the tables below have every number."
    )
    budgets = sorted(front.max_ppl_increase.unique())
    return {
        "figure": images.add(name, lambda figure: figures.fill_front(figure, front), height, alt),
        "tables": tables.gains(front, limit),
        "limit": limit,
        "comparisons": comparisons,
        "budgets": [f"+{100 * budget:g}\u00a0%" for budget in budgets],
        "seeds": joined(dict.fromkeys(front.seeds)),
        "says": [verdicts.of_budgets(front, score) for score in front.score.unique()],
    }


# --- every configuration ---


def grid_view(
    stem: Path,
    files: dict[str, Path],
    grid: pd.DataFrame,
    questions: pd.DataFrame | None,
    images: Images,
    name: str,
) -> dict:
    """What a grid says of the split on which most configurations were tried."""
    sizes = grid.groupby("part").size()  # of equally large ones test comes before validation
    split = sizes.idxmax()
    rows = grid[grid.part == split]
    if not (rows.method == BASE.method).any():
        raise UserError(
            f"'{files['grid']}': no row of the base model among the {split} questions; "
            "make it again with steering_mc.py"
        )
    score = (manifest_of(files["grid"]).get("flags") or {}).get("score")
    if score not in SCORES:  # unknown, or TruthfulQA's own, which figures and sentences lack
        score = SCORES[0]
    best = chosen_configuration(stem)
    seeds = list(dict.fromkeys(grid.get("seed", ())))
    splits = [split, *(name for name in sizes.index if name != split)]
    item = {
        "seeds": seeds,
        "counts": grid.groupby("part", sort=False).questions.first().astype(int),
        "summary": summary(rows, best, questions, score, split) if best else None,
        "tables": [
            tables.accuracies(
                f"All configurations, {part} questions",
                [
                    (
                        row.configuration
                        + " (control)" * (row.method in CONTROLS)
                        + f", seed {row.get('seed')}" * (len(seeds) > 1),
                        row,
                    )
                    for _, row in grid[grid.part == part].iterrows()
                ],
            )
            for part in splits
        ],
    }
    if "evaluated_on" in grid and (grid.evaluated_on != grid.dataset).any():
        return item  # on other data only what was chosen is tried: no curves
    label = f"{split} questions" + f" (means over {len(seeds)} seeds)" * (len(seeds) > 1)
    return item | curves(tables.over_seeds(rows), best, label, score, images, name)


def summary(
    rows: pd.DataFrame, best: str, questions: pd.DataFrame | None, score: str, split: str
) -> dict | None:
    """Base, the chosen configuration and its controls, and what they say in a sentence or two.

    rows: of one split. None where the chosen configuration is not among them.
    """
    chosen = rows[rows.configuration == best]
    if chosen.empty:
        return None
    base, chosen = rows[rows.method == BASE.method].iloc[0], chosen.iloc[0]
    same = rows[(rows.layers == chosen.layers) & (rows.alpha == chosen.alpha)]
    controls = [row for _, row in same[same.method.isin(CONTROLS)].iterrows()]
    named = [
        (BASE.label, base),
        ("steered (chosen)", chosen),
        *((f"control: {row.method}", row) for row in controls),
    ]
    says = verdicts.of_choice(base, chosen, split)
    if controls:
        says += " " + verdicts.beside_controls(chosen, controls, questions, score, split)
    if rows.get("includes_steering_examples", pd.Series(False)).any():
        says += (
            " The steering examples are among these questions and the configuration was "
            "chosen on them: this is no held-out result."
        )
    return {"says": says} | tables.accuracies(
        "Base, the chosen configuration and its controls", named
    )


def curves(
    grid: pd.DataFrame, best: str | None, label: str, score: str, images: Images, name: str
) -> dict:
    """Accuracies, costs and other measures over strength for each set of layers, the chosen one's
    first; and the gain by layer where single layers were tried."""
    base, steered = grid[grid.method == BASE.method], grid[grid.method != BASE.method]
    single = steered[steered.layers.str.fullmatch(r"\d+")]
    sets = list(dict.fromkeys([*steered.layers[steered.configuration == best], *steered.layers]))
    if len(sets) > MAX_LAYER_SETS:  # the single ones after the chosen are in the heat-map
        sets = [*sets[:1], *(item for item in sets[1:] if item not in set(single.layers))]
    shown = sets[:MAX_LAYER_SETS]
    drawings = []
    for layers in shown:
        rows = pd.concat([base, steered[steered.layers == layers]])
        drawings.append(
            strength_figure(
                images,
                f"{name}_strength" + f"_layers-{ranges(layers)}" * (len(shown) > 1),
                rows,
                f"at layers {ranges(layers)}" if layers else "of the adapter",
                label,
            )
        )
    return {
        "label": label,
        "figures": drawings,
        "layers": layers_figure(images, f"{name}_layers", pd.concat([base, single]), score)
        if single.layers.nunique() > 1
        else None,
    }


def ranges(layers: str) -> str:
    """'0 1 2 5' -> '0-2, 5'."""
    return ", ".join(layer_ranges([int(layer) for layer in layers.split()]))


def strength_figure(images: Images, name: str, grid: pd.DataFrame, where: str, label: str) -> dict:
    steered, base = grid[grid.method != BASE.method], grid[grid.method == BASE.method].iloc[0]
    parts = []
    for score, title in TITLES.items():
        best = steered.loc[steered[f"accuracy_{score}"].idxmax()]
        parts.append(
            f"{title} accuracy: base {percent(base[f'accuracy_{score}'])}, highest "
            f"{percent(best[f'accuracy_{score}'])} with {best.configuration}"
        )
    titles = {column: MEASURES[column][0] for column in present(steered)}
    for column, title in titles.items():
        least, most = map(MEASURES[column][2], steered[column].agg(["min", "max"]))
        parts.append(f"{title}: {least} to {most}")
    alt = (
        f"On {label} over strength {where}, with 95 % intervals, for base, {series(steered)}. "
        f"{'. '.join(parts)}."
    )
    return images.add(
        name,
        lambda figure: figures.fill_strength(figure, grid, titles),
        1.0 + 2.2 * len(TITLES) + 1.5 * len(titles),
        alt,
    ) | {"where": where}


def layers_figure(images: Images, name: str, grid: pd.DataFrame, score: str) -> dict:
    steered, value = grid[grid.method != BASE.method], f"accuracy_{score}"
    gains = steered[value] - grid[grid.method == BASE.method][value].iloc[0]
    layers = steered.layers.astype(int)
    alt = (
        f"Heat-map of the gain in {TITLES[score]} accuracy at single layers {layers.min()} to "
        f"{layers.max()} by strength. Largest: {points(gains.max())} points with "
        f"{steered.configuration[gains.idxmax()]}; smallest: {points(gains.min())} points with "
        f"{steered.configuration[gains.idxmin()]}."
    )
    rows = -(-steered.groupby(["method", "mode"]).ngroups // 2)
    return images.add(
        name,
        lambda figure: figures.fill_layers(figure, grid, score),
        0.5 + rows * min(3.6, 1.2 + 0.17 * layers.nunique()),
        alt,
    )


def series(table: pd.DataFrame) -> str:
    """The methods of a table, each with its mode."""
    return joined(dict.fromkeys(f"{row.method} {row.mode}".strip() for row in table.itertuples()))
