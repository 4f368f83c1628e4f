"""What the tables about steering show, in a sentence or two each."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from grains import stats
from grains.errors import UserError
from grains.report.figures import TITLES
from grains.report.tables import SIGNIFICANT
from grains.report.text import joined, p_is, p_text, percent, points


def of_budgets(front: pd.DataFrame, score: str) -> str:
    """The significant gain within the smallest budget, beside the controls.

    front: rows of one constraint, as `tables.adjusted` gives them, each with its `line` (method
    and mode).
    """
    rows = front[front.score == score].sort_values("max_ppl_increase")
    significant = rows[(rows.gain > 0) & (rows.adjusted < SIGNIFICANT)]
    if significant.empty:
        return (
            f"By {TITLES[score]} accuracy, no method has a significant gain within any of these "
            "budgets."
        )
    budget = significant.max_ppl_increase.iloc[0]
    best = significant[significant.max_ppl_increase == budget].sort_values("gain").iloc[-1]
    controls = rows[rows.is_control & (rows.max_ppl_increase == budget)].sort_values("gain")
    beside = (
        ""
        if controls.empty
        else (
            f"; the best control within this budget, {controls.iloc[-1].line}, gains "
            f"{points(controls.iloc[-1].gain)} ({p_is(controls.iloc[-1].p_value)})"
        )
    )
    return (
        f"By {TITLES[score]} accuracy, the smallest budget with a significant gain is a perplexity "
        f"rise of at most {100 * budget:g}\u00a0%: {best.title} gains {points(best.gain)} points "
        f"({p_is(best.p_value)}, adjusted {p_text(best.adjusted)}){beside}."
    )


def of_choice(base: pd.Series, chosen: pd.Series, split: str) -> str:
    """What the chosen configuration changed, and whether that is significant."""
    changes = []
    for score, title in TITLES.items():
        before, after = base[f"accuracy_{score}"], chosen[f"accuracy_{score}"]
        p = chosen[f"p_value_{score}"]
        change = (
            "which is not significant"
            if p >= SIGNIFICANT
            else f"a significant {'gain' if after > before else 'loss'}"
        )
        changes.append(
            f"{title} accuracy from {percent(before)} to {percent(after)}, {change} ({p_is(p)})"
        )
    return (
        f"On {int(chosen.questions)} {split} questions, steering with {chosen.configuration} "
        f"changes {joined(changes)}."
    )


def beside_controls(
    chosen: pd.Series,
    controls: Sequence[pd.Series],
    questions: pd.DataFrame | None,
    score: str,
    split: str,
) -> str:
    """The strongest control, and whether steering differs significantly from it.

    questions: the table of every question, if there is one.
    Raises UserError if it does not hold the same questions for both.
    """
    value = f"accuracy_{score}"
    control = max(controls, key=lambda row: row[value])
    lead = chosen[value] - control[value]
    reached = (
        f"The {'strongest ' * (len(controls) > 1)}control at the same layers and strength, "
        f"{control.method}, reaches {percent(control[value])} ({TITLES[score]})"
    )
    if questions is None:
        return f"{reached}, {points(lead)} points from steering to it."
    steered, controlled = (
        questions[
            (questions.configuration == row.configuration) & (questions.part == split)
        ].set_index("id")[f"correct_{score}"]
        for row in (chosen, control)
    )
    if not (
        len(steered)
        and steered.index.is_unique
        and controlled.index.is_unique
        and set(steered.index) == set(controlled.index)
    ):
        raise UserError(
            f"the table of questions does not hold the same {split} questions for "
            f"'{chosen.configuration}' and '{control.configuration}': was it cut short or changed? "
            "make it again with steering_mc.py"
        )
    p = stats.paired_p_value(steered.to_numpy(), controlled.reindex(steered.index).to_numpy())
    return (
        f"{reached}; the difference of {points(lead)} points between steering and it is "
        f"{'' if p < SIGNIFICANT else 'not '}significant ({p_is(p)})."
    )
