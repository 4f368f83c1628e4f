"""Steering in the report: what it gains and at what price, beside controls, over strength and by
layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from grains import stats
from grains.errors import UserError
from grains.report import figures
from grains.report.figures import SCORES
from grains.report.files import chosen_path, manifest_of, read_object
from grains.report.images import Images
from grains.report.reading import read_table
from grains.report.text import (
    count,
    interval,
    joined,
    number,
    p_is,
    p_text,
    percent,
    points,
    signed_percent,
)
from grains.settings import CONTROLS
from grains.steering import layer_ranges

SIGNIFICANT = 0.05
MAX_LAYER_SETS = 6
# What a grid may tell beside accuracies: title in figures, in tables, and how it is written.
MEASURES = {
    "margin_token": ("lead of the preferred answer per token", "lead, per-token", number),
    "margin_sum": ("lead of the preferred answer, summed", "lead, summed", number),
    "perplexity_increase": ("increase of perplexity", "perplexity", signed_percent),
    "varied_increase": (
        "increase of perplexity of code, dialogue, other languages and the like",
        "other text",
        signed_percent,
    ),
    "answers_increase": (
        "increase of perplexity of its own free answers",
        "own answers",
        signed_percent,
    ),
    "unrelated_accuracy": ("accuracy on unrelated questions", "unrelated accuracy", percent),
    "repetition": ("repetition in free answers", "repetition", percent),
    "words": ("words of a free answer", "words", count),
}


def evaluation_views(
    stem: Path, files: dict[str, Path], named: str, drawn: Images, prefix: str
) -> list[dict]:
    """A block for each data set that an evaluation's grid and front speak of.

    named: the data set if the tables do not say; prefix: of the figures' names.
    """
    tables = {kind: read_table(path, kind) for kind, path in files.items()}
    blocks: dict[str, dict[str, pd.DataFrame]] = {}
    for kind in ("front", "grid"):
        if kind in tables:
            table = tables[kind]
            dataset = table.get("dataset", pd.Series(named, table.index))
            tested = table.get("evaluated_on", dataset)
            title = dataset.where(tested == dataset, dataset + ", tested on " + tested)
            for name, rows in table.groupby(title, sort=False):
                blocks.setdefault(name, {})[kind] = rows
    views = []
    for title, block in blocks.items():
        name = prefix if len(blocks) == 1 else f"{prefix}_{title}"
        item = {
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
            item["fronts"] = front_views(block["front"], drawn, f"{name}_front")
        if "grid" in block:
            item |= grid_view(stem, files, block["grid"], tables.get("questions"), drawn, name)
        views.append(item)
    return views


# --- gain over price ---


def front_views(front: pd.DataFrame, drawn: Images, name: str) -> list[dict]:
    """Figure, sentences and tables for each limit on what else may be lost, the strictest first."""
    front = front.assign(
        control=front.is_control == "True", line=(front.method + " " + front["mode"]).str.strip()
    )
    front["name"] = front.line + np.where(front.control, " (control)", "")
    # One configuration may be the best at several prices: that is one comparison, not several.
    same = ["method", "mode", "score", "configuration", "p_value"]
    compared = front[~front.control].drop_duplicates(same)
    compared = compared[same].assign(corrected=stats.holm(compared.p_value.to_numpy(float)))
    front = front.merge(compared, "left", same)
    limited = [*front.groupby("limit", sort=False)][::-1]
    return [
        front_view(rows, limit, len(compared), drawn, name + f"_limit-{index}" * (len(limited) > 1))
        for index, (limit, rows) in enumerate(limited)
    ]


def front_view(
    front: pd.DataFrame, limit: str, comparisons: int, drawn: Images, name: str
) -> dict:
    budgets = sorted(front.max_ppl_increase.unique())
    paid = {column: MEASURES[column] for column in present(front)}

    def cell(row) -> dict:
        return {
            "gain": points(row.gain),
            "interval": interval(row, "gain"),
            "p": p_is(row.p_value),
            "corrected": "" if row.control else p_text(row.corrected),
            "told": row.corrected < SIGNIFICANT,
            "paid": [f"{name} {form(row[column])}" for column, (_, name, form) in paid.items()]
            + [f"unrelated {points(row.unrelated_change)}", interval(row, "unrelated_change")],
        }

    tables = []
    for score, rows in front.groupby("score", sort=False):
        found = {(row["name"], row.max_ppl_increase): cell(row) for _, row in rows.iterrows()}
        tables.append(
            {
                "title": f"{SCORES[score]}, {limit}",
                "base": percent(rows.base_accuracy.iloc[0]),
                "rows": [
                    (name, [found[name, budget] for budget in budgets])
                    for name in dict.fromkeys(rows["name"])
                ],
            }
        )
    height = 1.1 + 2.6 * front.score.nunique() + 0.18 * (front["name"].nunique() // 3)
    alt = (
        f"Gain in accuracy over the measured increase of perplexity for {series(front)}"
        + f", {limit}; the tables below have every number."
    )
    return {
        "figure": drawn.add(name, lambda figure: figures.fill_front(figure, front), height, alt),
        "tables": tables,
        "limit": limit,
        "comparisons": comparisons,
        "budgets": [f"+{100 * budget:g}\u00a0%" for budget in budgets],
        "seeds": joined(dict.fromkeys(front.seeds)),
        "says": [front_says(front, score) for score in front.score.unique()],
    }


def front_says(front: pd.DataFrame, score: str) -> str:
    """One sentence: the cheapest gain that can be told from chance, beside the controls."""
    part = front[front.score == score].sort_values("max_ppl_increase")
    told = part[(part.gain > 0) & (part.corrected < SIGNIFICANT)]
    if told.empty:
        return (
            f"By {SCORES[score]} accuracy, no method gains more than chance explains at any of "
            "these prices."
        )
    budget = told.max_ppl_increase.iloc[0]
    best = told[told.max_ppl_increase == budget].sort_values("gain").iloc[-1]
    controls = part[part.control & (part.max_ppl_increase == budget)].sort_values("gain")
    beside = (
        ""
        if controls.empty
        else (
            f"; the best control there, {controls.iloc[-1].line}, gains "
            f"{points(controls.iloc[-1].gain)} ({p_is(controls.iloc[-1].p_value)})"
        )
    )
    return (
        f"By {SCORES[score]} accuracy, the lowest price at which a gain can be told from "
        f"chance is perplexity up by at most {100 * budget:g}\u00a0%: {best['name']} gains "
        f"{points(best.gain)} points ({p_is(best.p_value)}, corrected "
        f"{p_text(best.corrected)}){beside}."
    )


# --- every configuration ---


def grid_view(stem, files, grid, asked, drawn, name) -> dict:
    """What a grid says, of the part of the questions on which most was tried."""
    tried = grid.groupby("part").size()  # of equally many test comes before validation
    part = tried.idxmax()
    here = grid[grid.part == part]
    if not (here.method == "base").any():
        raise UserError(
            f"'{files['grid']}': no row of the base model among the {part} questions; "
            "make it again with steering_mc.py"
        )
    score = manifest_of(files["grid"]).get("flags", {}).get("score", "token")
    best = (
        read_object(chosen_path(stem)).get("configuration") if chosen_path(stem).is_file() else None
    )
    seeds = list(dict.fromkeys(grid.get("seed", ())))
    parts = [part, *(other for other in tried.index if other != part)]
    item = {
        "seeds": seeds,
        "counts": grid.groupby("part", sort=False).questions.first().astype(int),
        "summary": summary(here, best, asked, score, part) if best else None,
        "tables": [
            table_view(
                f"All configurations, {one} questions",
                [
                    (
                        row.configuration
                        + " (control)" * (row.method in CONTROLS)
                        + f", seed {row.get('seed')}" * (len(seeds) > 1),
                        row,
                    )
                    for _, row in grid[grid.part == one].iterrows()
                ],
            )
            for one in parts
        ],
    }
    if "evaluated_on" in grid and (grid.evaluated_on != grid.dataset).any():
        return item  # on other data only what was chosen is tried: no curves
    label = f"{part} questions" + f" (means over {len(seeds)} seeds)" * (len(seeds) > 1)
    return item | curves(over_seeds(here), best, label, score, drawn, name)


def table_view(caption: str, named: list[tuple[str, pd.Series]]) -> dict:
    """Configurations' accuracies, p-values and other measures as text. named: titles and rows."""
    rows = pd.DataFrame([row for _, row in named])
    measures = present(rows)
    return {
        "caption": caption,
        "measures": [MEASURES[column][1] for column in measures],
        "rows": [
            {
                "name": name,
                "base": row.method == "base",
                "configuration": row.configuration,
                "scores": [
                    (
                        percent(row[f"accuracy_{score}"]),
                        interval(row, f"accuracy_{score}"),
                        p_text(row[f"p_value_{score}"]),
                    )
                    for score in SCORES
                ],
                "measures": [MEASURES[column][2](row[column]) for column in measures],
            }
            for name, row in named
        ],
    }


def present(rows: pd.DataFrame) -> list[str]:
    """The measures that a grid has."""
    return [column for column in MEASURES if column in rows and rows[column].notna().any()]


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of each method's first, second, ... strength: every seed may have its own.

    An interval's ends are averaged too, so that it is that of one seed's questions.
    """
    if "seed" not in rows:
        return rows
    nth = rows.groupby(["seed", "method", "mode", "layers"]).alpha.rank("dense")
    groups = rows.assign(nth=nth).groupby(["method", "mode", "layers", "nth"], sort=False)
    names = groups.configuration.agg(lambda names: "; ".join(dict.fromkeys(names)))
    return groups.mean(numeric_only=True).assign(configuration=names).reset_index()


def curves(
    grid: pd.DataFrame, best: str | None, label: str, score: str, drawn: Images, name: str
) -> dict:
    """Accuracy, prices and other measures over strength for each set of layers, the chosen one's
    first; and the gain by layer where single ones were tried."""
    base, steered = grid[grid.method == "base"], grid[grid.method != "base"]
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
                drawn,
                f"{name}_strength" + f"_layers-{ranges(layers)}" * (len(shown) > 1),
                rows,
                f"at layers {ranges(layers)}" if layers else "of the adapter",
                label,
            )
        )
    return {
        "label": label,
        "figures": drawings,
        "layers": layers_figure(drawn, f"{name}_layers", pd.concat([base, single]), score)
        if single.layers.nunique() > 1
        else None,
    }


def ranges(layers: str) -> str:
    """'0 1 2 5' -> '0-2, 5'."""
    return ", ".join(layer_ranges([int(layer) for layer in layers.split()]))


def strength_figure(drawn, name, grid, where: str, label: str) -> dict:
    steered, base = grid[grid.method != "base"], grid[grid.method == "base"].iloc[0]
    said = []
    for score, title in SCORES.items():
        best = steered.loc[steered[f"accuracy_{score}"].idxmax()]
        said.append(
            f"{title} accuracy: base {percent(base[f'accuracy_{score}'])}, highest "
            f"{percent(best[f'accuracy_{score}'])} with {best.configuration}"
        )
    titles = {column: MEASURES[column][0] for column in present(steered)}
    for column, title in titles.items():
        least, most = map(MEASURES[column][2], steered[column].agg(["min", "max"]))
        said.append(f"{title}: {least} to {most}")
    alt = (
        f"On {label} over strength {where}, with 95 % intervals, for base, {series(steered)}. "
        f"{'. '.join(said)}."
    )
    return drawn.add(
        name,
        lambda figure: figures.fill_strength(figure, grid, titles),
        1.0 + 2.2 * len(SCORES) + 1.5 * len(titles),
        alt,
    ) | {"where": where}


def layers_figure(drawn, name, grid, score: str) -> dict:
    steered, value = grid[grid.method != "base"], f"accuracy_{score}"
    gains = steered[value] - grid[grid.method == "base"][value].iloc[0]
    layers = steered.layers.astype(int)
    alt = (
        f"Heat-map of the gain in {SCORES[score]} accuracy at single layers {layers.min()} to "
        f"{layers.max()} by strength. Largest: {points(gains.max())} points with "
        f"{steered.configuration[gains.idxmax()]}; smallest: {points(gains.min())} points with "
        f"{steered.configuration[gains.idxmin()]}."
    )
    rows = -(-steered.groupby(["method", "mode"]).ngroups // 2)
    return drawn.add(
        name,
        lambda figure: figures.fill_layers(figure, grid, score),
        0.5 + rows * min(3.6, 1.2 + 0.17 * layers.nunique()),
        alt,
    )


def series(table: pd.DataFrame) -> str:
    """The methods of a table, each with its mode."""
    return joined(dict.fromkeys(f"{row.method} {row.mode}".strip() for row in table.itertuples()))


# --- the chosen configuration ---


def summary(here, best: str, asked, score: str, part: str) -> dict | None:
    """Base, the chosen configuration and its controls, and what they say in a sentence or two."""
    chosen = here[here.configuration == best]
    if chosen.empty:
        return None
    base, chosen = here[here.method == "base"].iloc[0], chosen.iloc[0]
    same = here[(here.layers == chosen.layers) & (here.alpha == chosen.alpha)]
    controls = [row for _, row in same[same.method.isin(CONTROLS)].iterrows()]
    named = [
        ("base", base),
        ("steered (chosen)", chosen),
        *((f"control: {row.method}", row) for row in controls),
    ]
    says = verdict(base, chosen, part)
    if controls:
        says += " " + beside_controls(chosen, controls, asked, score, part)
    if "True" in set(here.get("includes_steering_examples", ())):
        says += (
            " The steering examples are among these questions and the configuration was "
            "chosen on them: this is no held-out result."
        )
    return {"says": says} | table_view("Base, the chosen configuration and its controls", named)


def verdict(base, chosen, part: str) -> str:
    """One sentence: what steering changed, and whether it can be told from chance."""
    changes = []
    for score, title in SCORES.items():
        before, after = base[f"accuracy_{score}"], chosen[f"accuracy_{score}"]
        p = chosen[f"p_value_{score}"]
        told = (
            "which cannot be told from chance"
            if p >= SIGNIFICANT
            else f"a {'gain' if after > before else 'loss'} that is more than chance explains"
        )
        changes.append(
            f"{title} accuracy from {percent(before)} to {percent(after)}, {told} ({p_is(p)})"
        )
    return (
        f"On {int(chosen.questions)} {part} questions, steering with {chosen.configuration} "
        f"changes {joined(changes)}."
    )


def beside_controls(chosen, controls, asked, score: str, part: str) -> str:
    """One sentence: the strongest control, and whether steering is told from it.

    asked: the table of every question, or None.
    """
    value = f"accuracy_{score}"
    control = max(controls, key=lambda row: row[value])
    lead = chosen[value] - control[value]
    said = (
        f"The {'strongest ' * (len(controls) > 1)}control at the same layers and strength, "
        f"{control.method}, reaches {percent(control[value])} ({SCORES[score]})"
    )
    if asked is None:
        return f"{said}, {points(lead)} points from steering to it."
    steered, other = (
        asked[(asked.configuration == row.configuration) & (asked.part == part)].set_index("id")[
            f"correct_{score}"
        ]
        == "True"
        for row in (chosen, control)
    )
    p = stats.paired_p_value(steered.to_numpy(), other.reindex(steered.index).to_numpy())
    told = "is more than chance explains" if p < SIGNIFICANT else "cannot be told from chance"
    return (
        f"{said}; the difference of {points(lead)} points between steering and it {told} "
        f"({p_is(p)})."
    )
