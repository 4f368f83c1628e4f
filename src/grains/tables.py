"""Tables of multiple choice: every question, and accuracies with intervals and tests."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from grains import stats
from grains.prompts import Encoded
from grains.scoring import correct
from grains.settings import SCORES
from grains.steering import Configuration


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
    rows = []
    for split, item, scored in zip(splits, encoded, log_likelihoods, strict=True):
        lengths = np.array([len(response) for response in item.responses])
        for configuration, values in zip(configurations, scored, strict=True):
            by_sum, margin_sum = correct(values, item.example.label)
            by_token, margin_token = correct(values, item.example.label, lengths)
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
                    "label": item.example.label,
                }
            )
    return pd.DataFrame(rows)


def accuracy_table(
    configurations: Sequence[Configuration], margins: dict[str, np.ndarray]
) -> pd.DataFrame:
    """A row per configuration: accuracies with intervals, tests against the base, margins.

    configurations: the base first.
    margins: score (token, sum) -> (questions, configurations), in nats (see `scoring.margins`).
    The columns p_value_* hold exact McNemar tests against the base. worse_* is the share of the
    questions answered right by the base that this configuration answers wrong.
    """
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
            is_right, was_right = (margins[score][:, i] > 0 for i in (index, 0))
            accuracy, low, high = stats.accuracy_interval(is_right)
            row |= {
                f"accuracy_{score}": accuracy,
                f"accuracy_{score}_low": low,
                f"accuracy_{score}_high": high,
                f"margin_{score}": margins[score][:, index].mean(),
                f"p_value_{score}": stats.paired_p_value(is_right, was_right),
                f"worse_{score}": (was_right & ~is_right).sum() / max(was_right.sum(), 1),
            }
        rows.append(row)
    return pd.DataFrame(rows)
