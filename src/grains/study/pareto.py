"""Gain over price: what is chosen on validation, what it gains on test, and tables of it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pandas as pd

from grains import runs, stats
from grains.vectors import CONTROLS

SCORES = ("token", "sum")
OF_ANSWERS = ["answers_increase", "repetition"]  # prices on the data set's own questions
PRICES = ["perplexity_increase", "varied_increase", "unrelated_change", *OF_ANSWERS]
UNRELATED = "unrelated questions"  # what all data sets are evaluated on beside their own
UNLIMITED = "whatever else happens"  # the first of `limits`


def limits(max_unrelated_loss: float) -> list[str]:
    """What a configuration must keep, beside its price on neutral text."""
    kept = f"losing at most {100 * max_unrelated_loss:g} points on unrelated questions"
    return [
        UNLIMITED,
        kept,
        f"{kept}, and within the same price on what the base model answers freely",
    ]


def choose(
    validated: pd.DataFrame, budgets: list[float], max_unrelated_loss: float
) -> pd.DataFrame:
    """For every method, mode, price and limit: the configuration best on validation.

    Best is the mean of the two accuracies, in sum and per token, so that one configuration stands
    for both. The price of a configuration is the upper bound of what it costs on neutral text
    (`costs.perplexity_bound`). Once whatever else happens; once within `max_unrelated_loss`; once
    also, on what the model itself answers freely, within the same price. The base model is one of
    the choices: where no configuration is affordable and better, the rows say base. A row for each
    score.
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
            for limit, choices in zip(limits(max_unrelated_loss), allowed, strict=True):
                best = choices.sort_values(["both", "perplexity_increase"], ascending=[False, True])
                found = best.iloc[0] if len(best) else base
                rows += [
                    {
                        "method": method,
                        "mode": mode,
                        "score": kind,
                        "max_ppl_increase": budget,
                        "limit": limit,
                        "configuration": found.configuration,
                        "validation_gain": found[f"accuracy_{kind}"] - base[f"accuracy_{kind}"],
                    }
                    for kind in SCORES
                ]
    return pd.DataFrame(rows)


def front(answers: list[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """A row per data set, method, score, price and limit: test accuracy and gain over all seeds.

    A question that several seeds test counts once, with its mean over them; intervals are
    bootstrapped over questions, the p-value flips the signs of their gains. What the unrelated
    questions lose or gain, with its interval, stands in every row.
    """
    parts = []
    for chosen, questions in answers:
        questions = questions.set_index(["evaluated_on", "id"])
        base = questions[questions.configuration == "base"]
        for row in chosen.itertuples():
            here = questions[questions.configuration == row.configuration]
            parts.append(
                pd.DataFrame(
                    {
                        "dataset": here.dataset,
                        "seed": here.seed,
                        "method": row.method,
                        "mode": row.mode,
                        "score": row.score,
                        "max_ppl_increase": row.max_ppl_increase,
                        "limit": row.limit,
                        "configuration": row.configuration,
                        **{price: getattr(row, price) for price in PRICES},
                        "right": here[row.score].astype(float),
                        "was": base[row.score].astype(float),
                    }
                )
            )
    every = pd.concat(parts).reset_index()
    keys = ["dataset", "evaluated_on", "method", "mode", "score", "max_ppl_increase", "limit"]
    rows = []
    for names, table in every.groupby(keys, sort=False):
        by_question = table.groupby("id")[["right", "was"]].mean()
        gains = (by_question.right - by_question.was).to_numpy()
        by_seed = table.groupby("seed")[["right", "was"]].mean()
        row = dict(zip(keys, names, strict=True))
        accuracy_low, accuracy_high = stats.bootstrap_interval(by_question.right.to_numpy())
        gain_low, gain_high = stats.bootstrap_interval(gains)
        seeds = table.drop_duplicates("seed")
        rows.append(
            row
            | {
                "is_control": row["method"] in CONTROLS,
                "seeds": len(seeds),
                "questions": len(gains),
                "configuration": "; ".join(dict.fromkeys(seeds.configuration)),
                "base_accuracy": by_question.was.mean(),
                "accuracy": by_question.right.mean(),
                "accuracy_low": accuracy_low,
                "accuracy_high": accuracy_high,
                "gain": gains.mean(),
                "gain_low": gain_low,
                "gain_high": gain_high,
                "gain_seed_sd": (by_seed.right - by_seed.was).std(ddof=1)
                if len(seeds) > 1
                else 0.0,
                "p_value": stats.sign_flip_p_value(gains),
                **seeds[PRICES].mean(),
            }
        )
    table = pd.DataFrame(rows)
    unrelated = table.evaluated_on == UNRELATED
    same = ["dataset", "method", "mode", "max_ppl_increase", "limit"]
    change = {f"gain_{end}": f"unrelated_change_{end}" for end in ("low", "high")}
    kept = table[unrelated & (table.score == SCORES[0])][[*same, *change]].rename(columns=change)
    return table[~unrelated].merge(kept, on=same)


def summaries(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Titles and tables: gains on each data set's own test questions at every price, and on the
    others' questions."""
    found = []
    own = table[table.dataset == table.evaluated_on]
    for (dataset, limit), limited in own.groupby(["dataset", "limit"], sort=False):
        for kind, rows in limited.groupby("score", sort=False):
            found.append(
                (
                    f"{dataset}: gain in {kind} accuracy in points, {rows.questions.max()} test "
                    f"questions, base {rows.base_accuracy.iloc[0]:.1%}, "
                    f"{rows.seeds.max()} seed(s); chosen "
                    f"on validation {limit}; by the rise of perplexity allowed",
                    pivot(rows, "max_ppl_increase", "+{:.0%}"),
                )
            )
        found.append(
            (
                f"{dataset}: what these cost on test, rise of perplexity on neutral text / "
                "on code, dialogue, other languages and the like / on the model's own free "
                "answers / change on unrelated questions in points / repetition in free "
                "answers",
                pivot(limited[limited.score == SCORES[0]], "max_ppl_increase", "+{:.0%}", prices),
            )
        )
    away = table[(table.dataset != table.evaluated_on) & (table.limit == UNLIMITED)]
    for (dataset, kind, budget), rows in away.groupby(
        ["dataset", "score", "max_ppl_increase"], sort=False
    ):
        found.append(
            (
                f"{dataset}'s vectors at +{budget:.0%} on other data sets: gain in {kind} "
                "accuracy in points",
                pivot(rows, "evaluated_on", "{}"),
            )
        )
    return found


def points(row, name: str = "gain") -> str:
    value, low, high = (100 * getattr(row, name + end) for end in ("", "_low", "_high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def prices(row) -> str:
    return (
        f"{row.perplexity_increase:+.1%} / {row.varied_increase:+.1%} / "
        f"{row.answers_increase:+.1%} / {points(row, 'unrelated_change')} / "
        f"{row.repetition:.2f}"
    )


def pivot(rows: pd.DataFrame, by: str, header: str, cell=points) -> pd.DataFrame:
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


def tell(
    into: str | None, stem: str, found: list[tuple[str, pd.DataFrame]], files: dict[str, Path]
) -> None:
    """Print tables with their titles, write them into a document, say where the files are."""
    for title, cells in found:
        print(f"\n{title}\n{cells.to_string()}")
    if into:
        document(Path(into), stem, found)
        files = {"tables": Path(into)} | files
    print()
    for what, path in files.items():
        print(f"{what + ':':20} {path}")


def document(path: Path, stem: str, found: list[tuple[str, pd.DataFrame]]) -> None:
    """Write the tables into a Markdown file, in place of what the same experiment wrote there."""
    begin, end = f"<!-- {stem}: begin -->", f"<!-- {stem}: end -->"
    command = [
        Path(sys.argv[0]).name,
        *(word.replace(str(path), path.name) for word in sys.argv[1:]),
    ]
    lines = [begin, "```", "python " + shlex.join(command), "```"]
    for title, table in found:
        rows = [
            ["", *table.columns],
            ["---"] * (1 + len(table.columns)),
            *([name, *cells] for name, cells in zip(table.index, table.to_numpy(), strict=True)),
        ]
        lines += [
            "",
            f"**{title}**",
            "",
            *("| " + " | ".join(map(str, row)) + " |" for row in rows),
        ]
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    before, _, after = text.partition(begin)
    after = after.partition(end)[2] or "\n"
    runs.write_whole(
        path,
        lambda file: file.write_text(before + "\n".join([*lines, end]) + after, encoding="utf-8"),
    )
