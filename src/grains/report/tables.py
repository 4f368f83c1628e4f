"""The report's tables about steering: accuracies and p-values, gains by perplexity budget."""

from __future__ import annotations

from typing import Any

import pandas as pd

from grains import stats
from grains.report.figures import TITLES
from grains.report.text import (
    count,
    interval,
    number,
    p_is,
    p_text,
    percent,
    points,
    signed_percent,
)

SIGNIFICANT = 0.05
# What a grid may hold beside accuracies: title in figures, in tables, and how it is written.
MEASURES = {
    "margin_token": ("margin of the preferred answer per token", "margin, per-token", number),
    "margin_sum": ("margin of the preferred answer, summed", "margin, summed", number),
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
# Costs that a front gives as changes in points, with their intervals.
CHANGES = {"unrelated_change": "unrelated", "repetition_change": "change of repetition"}


def present(rows: pd.DataFrame) -> list[str]:
    """The measures that a table has."""
    return [column for column in MEASURES if column in rows and rows[column].notna().any()]


def accuracies(caption: str, named: list[tuple[str, pd.Series]]) -> dict:
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
                    for score in TITLES
                ],
                "measures": [MEASURES[column][2](row[column]) for column in measures],
            }
            for name, row in named
        ],
    }


def adjusted(front: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The front with Holm-adjusted p-values (column adjusted; NaN for controls).

    One configuration may be the best within several budgets: that is one comparison, not several.
    Returns also the number of comparisons.
    """
    same = ["method", "mode", "score", "configuration", "p_value"]
    compared = front[~front.is_control].drop_duplicates(same)
    compared = compared[same].assign(adjusted=stats.holm(compared.p_value.to_numpy(float)))
    return front.merge(compared, "left", same), len(compared)


def gains(front: pd.DataFrame, limit: str) -> list[dict]:
    """A table for each score: a row for each method and mode, a column for each budget.

    front: rows of one constraint (`limit`), as `adjusted` gives them, each with its `title`.
    """
    budgets = sorted(front.max_ppl_increase.unique())
    measured = {column: MEASURES[column] for column in present(front)}
    changes = [item for item in CHANGES.items() if item[0] in front]

    def cell(row: pd.Series) -> dict:
        return {
            "gain": points(row.gain),
            "interval": interval(row, "gain"),
            "p": p_is(row.p_value),
            "adjusted": "" if row.is_control else p_text(row.adjusted),
            "significant": row.adjusted < SIGNIFICANT,
            "costs": [f"{name} {form(row[column])}" for column, (_, name, form) in measured.items()]
            + [
                text
                for name, title in changes
                for text in (f"{title} {points(row[name])}", interval(row, name))
            ],
        }

    tables = []
    for score, rows in front.groupby("score", sort=False):
        cells = {(row.title, row.max_ppl_increase): cell(row) for _, row in rows.iterrows()}
        empty: dict[str, Any] = dict.fromkeys(cell(rows.iloc[0]), "") | {"costs": []}
        tables.append(
            {
                "title": f"{TITLES[score]}, {limit}",
                "base": percent(rows.base_accuracy.iloc[0]),
                "rows": [
                    (title, [cells.get((title, budget), empty) for budget in budgets])
                    for title in dict.fromkeys(rows.title)
                ],
            }
        )
    return tables


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
