"""Gain and cost: the configurations chosen on validation, their gains on test, and tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pandas as pd

from grains import stats
from grains.settings import CONTROLS, SCORES
from grains.steering import BASE

# The columns of costs; the last two are measured on the questions of the data set itself.
ANSWER_COSTS = ("answers_increase", "repetition")
COSTS = ("perplexity_increase", "varied_increase", "unrelated_change", *ANSWER_COSTS)
UNRELATED = "unrelated questions"  # the data set that all vectors are evaluated on
UNCONSTRAINED = "no further constraint"  # the first of `constraints`
Titled = tuple[str, pd.DataFrame]


def constraints(max_unrelated_loss: float) -> list[str]:
    """The constraints that a configuration is chosen under, beside its perplexity budget."""
    kept = f"at most {100 * max_unrelated_loss:g} points lost on unrelated questions"
    return [
        UNCONSTRAINED,
        kept,
        f"{kept}, and the same perplexity budget on the base model's own answers",
    ]


def choose(
    validated: pd.DataFrame, budgets: Sequence[float], max_unrelated_loss: float
) -> pd.DataFrame:
    """The configuration that is best on validation: for each method, mode, budget and constraint.

    Best is the largest mean of the two accuracies, summed and per token, so that there is one
    choice for both. A configuration is within a budget if the upper bound of its cost on neutral
    text is (`costs.perplexity_bound`). The constraints (see `constraints`): none; at most
    `max_unrelated_loss` lost on unrelated questions; also the same perplexity budget on the base
    model's own answers. Where no configuration is allowed and better than the base model, the
    base model is chosen.

    validated: rows of the grid on validation questions, the base model first. Returns a row for
    each score.
    """
    validated = validated.assign(both=validated[[f"accuracy_{kind}" for kind in SCORES]].mean(1))
    base, steered = validated.iloc[0], validated.iloc[1:]
    lost = -steered[["unrelated_change", "unrelated_change_sum"]].min(axis=1)
    rows = []
    for (method, mode), table in steered.groupby(["method", "mode"], sort=False):
        for budget in budgets:
            affordable = table[(table.perplexity_bound <= budget) & (table.both > base.both)]
            kept = affordable[lost[affordable.index] <= max_unrelated_loss + 1e-9]
            allowed = affordable, kept, kept[kept.answers_increase <= budget]
            for limit, choices in zip(constraints(max_unrelated_loss), allowed, strict=True):
                ranked = choices.sort_values(
                    ["both", "perplexity_increase"], ascending=[False, True]
                )
                chosen = ranked.iloc[0] if len(ranked) else base
                rows += [
                    {
                        "method": method,
                        "mode": mode,
                        "score": kind,
                        "max_ppl_increase": budget,
                        "limit": limit,
                        "configuration": chosen.configuration,
                        "validation_gain": chosen[f"accuracy_{kind}"] - base[f"accuracy_{kind}"],
                    }
                    for kind in SCORES
                ]
    return pd.DataFrame(rows)


def front(chosen_and_tested: Sequence[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """Accuracy and gain on test over all seeds: by data set, method, score, budget and constraint.

    A question that several seeds test counts once, with its mean over them; intervals are
    bootstrapped over questions, the p-value flips the signs of their gains. Each row also has the
    interval of the change on unrelated questions, and the change of the repetition in free answers
    with its interval, over the questions that were answered freely (NaN where none was).

    chosen_and_tested: for each study (one data set, one seed) and each data set it is tested on,
    the chosen configurations (`choose`, with COSTS on test) and a row per question and
    configuration, with the repetition of its free answer or NaN.
    """
    answers = [
        {
            of: rows.set_index("id")
            for of, rows in questions.groupby(["evaluated_on", "configuration"], sort=False)
        }
        for _, questions in chosen_and_tested
    ]
    costs_of = [
        chosen.drop_duplicates("configuration").set_index("configuration")[[*COSTS]]
        for chosen, _ in chosen_and_tested
    ]

    @cache  # budgets and constraints often choose the same configurations
    def compared(tested: str, score: str, picked: tuple[tuple[int, str], ...]) -> dict[str, Any]:
        """What follows from the answers to the questions of a data set.

        picked: for each seed the number of its study and the configuration chosen in it.
        """
        tables = []
        for number, label in picked:
            steered, base = (answers[number][tested, name] for name in (label, BASE.label))
            columns = {"right": steered[score].astype(float), "was": base[score].astype(float)}
            columns["repeated"] = steered.repetition - base.repetition
            tables.append(pd.DataFrame({"seed": steered.seed, **columns}))
        table = pd.concat(tables)
        by_question = table.groupby("id")[["right", "was"]].mean()
        gains = (by_question.right - by_question.was).to_numpy()
        repeated = table.groupby("id").repeated.mean().dropna().to_numpy()
        by_seed = table.groupby("seed")[["right", "was"]].mean()
        accuracy_low, accuracy_high = stats.bootstrap_interval(by_question.right.to_numpy())
        gain_low, gain_high = stats.bootstrap_interval(gains)
        repeated_low, repeated_high = stats.bootstrap_interval(repeated)
        return {
            "seeds": len(by_seed),
            "questions": len(gains),
            "configuration": "; ".join(dict.fromkeys(label for _, label in picked)),
            "base_accuracy": by_question.was.mean(),
            "accuracy": by_question.right.mean(),
            "accuracy_low": accuracy_low,
            "accuracy_high": accuracy_high,
            "gain": gains.mean(),
            "gain_low": gain_low,
            "gain_high": gain_high,
            "gain_seed_sd": (by_seed.right - by_seed.was).std(ddof=1) if len(by_seed) > 1 else 0.0,
            "p_value": stats.sign_flip_p_value(gains),
            **pd.DataFrame([costs_of[number].loc[label] for number, label in picked]).mean(),
            "repetition_change": repeated.mean() if len(repeated) else float("nan"),
            "repetition_change_low": repeated_low,
            "repetition_change_high": repeated_high,
        }

    keys = ["dataset", "evaluated_on", "method", "mode", "score", "max_ppl_increase", "limit"]
    picked: dict[tuple, list[tuple[int, str]]] = {}
    for number, (chosen, questions) in enumerate(chosen_and_tested):
        tested = questions[["dataset", "evaluated_on"]].drop_duplicates()
        for row in chosen.itertuples():
            for dataset, evaluated_on in tested.itertuples(index=False):
                names = dataset, evaluated_on, *(getattr(row, key) for key in keys[2:])
                picked.setdefault(names, []).append((number, row.configuration))
    rows = []
    for names, of_seeds in picked.items():
        row = dict(zip(keys, names, strict=True))
        measured = compared(row["evaluated_on"], row["score"], tuple(of_seeds))
        rows.append(row | {"is_control": row["method"] in CONTROLS} | measured)
    table = pd.DataFrame(rows)
    unrelated = table.evaluated_on == UNRELATED
    same = ["dataset", "method", "mode", "max_ppl_increase", "limit"]
    change = {f"gain_{end}": f"unrelated_change_{end}" for end in ("low", "high")}
    kept = table[unrelated & (table.score == SCORES[0])][[*same, *change]].rename(columns=change)
    return table[~unrelated].merge(kept, on=same)


def summaries(table: pd.DataFrame) -> list[Titled]:
    """Tables of a front with their titles.

    The gains on each data set's own test questions and their costs, by budget; then the gains on
    the questions of the other data sets.
    """
    tables = []
    own = table[table.dataset == table.evaluated_on]
    for (dataset, limit), limited in own.groupby(["dataset", "limit"], sort=False):
        for score, rows in limited.groupby("score", sort=False):
            tables.append(
                (
                    f"{dataset}: gain in {score} accuracy in points, {rows.questions.max()} test "
                    f"questions, base {rows.base_accuracy.iloc[0]:.1%}, "
                    f"{rows.seeds.max()} seed(s); chosen on validation, constraint: {limit}; "
                    "columns: perplexity budget",
                    pivot(rows, "max_ppl_increase", "+{:.0%}"),
                )
            )
        tables.append(
            (
                f"{dataset}: cost on test, constraint: {limit}; rise of perplexity on neutral text "
                "/ on code, dialogue, other languages and the like / on the model's own free "
                "answers / change on unrelated questions in points / repetition in free answers "
                "and its change over the same questions",
                pivot(limited[limited.score == SCORES[0]], "max_ppl_increase", "+{:.0%}", costs),
            )
        )
    transferred = table[(table.dataset != table.evaluated_on) & (table.limit == UNCONSTRAINED)]
    for (dataset, score, budget), rows in transferred.groupby(
        ["dataset", "score", "max_ppl_increase"], sort=False
    ):
        tables.append(
            (
                f"{dataset}'s vectors at +{budget:.0%} on other data sets: gain in {score} "
                "accuracy in points",
                pivot(rows, "evaluated_on", "{}"),
            )
        )
    return tables


def points(row: Any, name: str = "gain") -> str:
    """A share of a row of a front in points, with its interval."""
    value, low, high = (100 * getattr(row, name + end) for end in ("", "_low", "_high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def costs(row: Any) -> str:
    """All costs of a row of a front; older ones have no change of the repetition."""
    cell = (
        f"{row.perplexity_increase:+.1%} / {row.varied_increase:+.1%} / "
        f"{row.answers_increase:+.1%} / {points(row, 'unrelated_change')} / "
        f"{row.repetition:.2f}"
    )
    if not hasattr(row, "repetition_change"):
        return cell
    change, low, high = (getattr(row, f"repetition_change{end}") for end in ("", "_low", "_high"))
    return f"{cell}, {change:+.2f} [{low:+.2f}, {high:+.2f}]"


def pivot(
    rows: pd.DataFrame, by: str, header: str, cell: Callable[[Any], str] = points
) -> pd.DataFrame:
    """A line for each method, a column for each value of `by`."""
    cells = rows.assign(
        method=(rows.method + " " + rows["mode"]).str.strip(),
        cell=[cell(row) for row in rows.itertuples()],
    )
    return (
        cells.pivot(index="method", columns=by, values="cell")
        .reindex(cells.method.unique())
        .rename(columns=header.format)
        .rename_axis(columns=None)
    )
