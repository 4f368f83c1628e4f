"""Accuracies with intervals, and paired tests."""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest


def accuracy_interval(correct: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Accuracy and its Wilson interval from (n,) booleans; NaNs for n = 0."""
    if not len(correct):
        return float("nan"), float("nan"), float("nan")
    test = binomtest(int(correct.sum()), len(correct))
    interval = test.proportion_ci(confidence, method="wilson")
    return float(correct.mean()), float(interval.low), float(interval.high)


def paired_p_value(correct: np.ndarray, base: np.ndarray) -> float:
    """Exact two-sided McNemar test that two sets of answers to the same questions are as good.

    correct, base: (n,) booleans. 1.0 where no answer differs.
    """
    gained, lost = int((correct & ~base).sum()), int((~correct & base).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
