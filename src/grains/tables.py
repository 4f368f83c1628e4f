"""Tables of multiple choice: every question, and accuracies with intervals and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from grains import stats
from grains.data import Example
from grains.prompts import Encoded
from grains.scoring import correct, mc1, mc2
from grains.settings import SCORES
from grains.steering import Configuration

if TYPE_CHECKING:
    import pandas as pd


def question_table(
    splits: Sequence[str],
    encoded: Sequence[Encoded],
    configurations: Sequence[Configuration],
    log_likelihoods: Sequence[np.ndarray],
) -> pd.DataFrame:
    """A row per question and configuration (columns: see docs/outputs.md).

    splits: the split of each question. configurations: the base first.
    log_likelihoods: for each question (configurations, choices), in nats, summed over tokens.
    """
    import pandas as pd  # takes long, and only the end of a run needs it

    rows = []
    for split, item, scored in zip(splits, encoded, log_likelihoods, strict=True):
        lengths = np.array([len(response) for response in item.responses])
        for configuration, values in zip(configurations, scored, strict=True):
            label, right = item.example.label, item.example.also_right
            by_sum, margin_sum = correct(values, label, None, right)
            by_token, margin_token = correct(values, label, lengths, right)
            rows.append(
                {
                    "configuration": configuration.label,
                    "part": split,
                    "id": item.example.id,
                    "correct_sum": by_sum,
                    "correct_token": by_token,
                    "margin_sum": margin_sum,
                    "margin_token": margin_token,
                    "log_likelihoods": json.dumps(values.round(6).tolist()),
                    "tokens": json.dumps(lengths.tolist()),
                    "label": label,
                    **_target_scores(values, item.example),
                }
            )
    return pd.DataFrame(rows)


def _target_scores(values: np.ndarray, example: Example) -> dict[str, float]:
    if example.targets is None:
        return {}
    margin = mc1(values, example.label, example.targets)
    return {"correct_mc1": margin > 0, "margin_mc1": margin, "mc2": mc2(values, example.targets)}


def accuracy_table(
    configurations: Sequence[Configuration],
    margins: dict[str, np.ndarray],
    target_scores: dict[str, np.ndarray] | None = None,
) -> pd.DataFrame:
    """A row per configuration: accuracies with intervals, tests against the base, margins.

    configurations: the base first.
    margins: score (token, sum) -> (questions, configurations), in nats (see `scoring.margins`).
    target_scores: mc1 and mc2 (see `scoring.target_scores`), whose columns follow. The accuracy by
    mc2 is the mean mass, with a bootstrapped interval and a sign-flip test.
    The columns p_value_* hold exact McNemar tests against the base. worse_* is the share of the
    questions answered right by the base that this configuration answers wrong.
    """
    import pandas as pd

    rows = []
    for index, configuration in enumerate(configurations):
        row = {
            "configuration": configuration.label,
            "method": configuration.method,
            "mode": configuration.variant,
            "layers": " ".join(map(str, configuration.layers)),
            "alpha": configuration.alpha,
            "questions": len(margins[SCORES[0]]),
        }
        for score in SCORES:
            row |= _accuracy(score, margins[score], index)
        if target_scores:
            row |= _accuracy("mc1", target_scores["mc1"], index)
            masses, base = (target_scores["mc2"][:, i] for i in (index, 0))
            low, high = stats.bootstrap_interval(masses)
            row |= {
                "accuracy_mc2": masses.mean(),
                "accuracy_mc2_low": low,
                "accuracy_mc2_high": high,
                "margin_mc2": (2 * masses - 1).mean(),
                "p_value_mc2": stats.sign_flip_p_value(masses - base),
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _accuracy(score: str, margins: np.ndarray, index: int) -> dict[str, float]:
    """The columns of one score for the configuration `index`, from (questions, configurations)."""
    is_right, was_right = (margins[:, i] > 0 for i in (index, 0))
    accuracy, low, high = stats.accuracy_interval(is_right)
    return {
        f"accuracy_{score}": accuracy,
        f"accuracy_{score}_low": low,
        f"accuracy_{score}_high": high,
        f"margin_{score}": margins[:, index].mean(),
        f"p_value_{score}": stats.paired_p_value(is_right, was_right),
        f"worse_{score}": (was_right & ~is_right).sum() / max(was_right.sum(), 1),
    }
