"""Intervals of accuracies and means, paired tests, corrected for many; repetition of a text."""

from __future__ import annotations

import numpy as np
import scipy  # it imports scipy.stats, which takes long, where that is used


def accuracy_interval(correct: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Accuracy, lower and upper end of its Wilson interval, of (n,) booleans; NaNs for n = 0."""
    if not len(correct):
        return float("nan"), float("nan"), float("nan")
    test = scipy.stats.binomtest(int(correct.sum()), len(correct))
    interval = test.proportion_ci(confidence, method="wilson")
    return float(correct.mean()), float(interval.low), float(interval.high)


def paired_p_value(correct: np.ndarray, base: np.ndarray) -> float:
    """Exact two-sided McNemar test of two sets of answers to the same questions.

    correct, base: (n,) booleans, whether each answer is right. Returns 1.0 if they are the same.
    """
    gained, lost = int((correct & ~base).sum()), int((~correct & base).sum())
    return float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (n,) values, seeded; NaNs for n = 0."""
    if not len(values):
        return float("nan"), float("nan")
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = scipy.stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        method="percentile",
        n_resamples=4999,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def sign_flip_p_value(gains: np.ndarray) -> float:
    """Two-sided permutation test that paired differences (n,) have mean zero, seeded.

    Under the null hypothesis each difference is as likely with the other sign. Returns 1.0 if at
    most one difference is not zero.
    """
    gains = gains[gains != 0]
    if len(gains) < 2:
        return 1.0
    result = scipy.stats.permutation_test(
        (gains,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm-adjusted p-values (n,), which control the family-wise error rate of n tests."""
    order = np.argsort(p_values)
    larger = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(larger, 1)
    return corrected


def repetition(text: str) -> float:
    """1 - distinct-3: the share of three-word sequences that occurred before in the text.

    Words are what white space separates. 0 for a text of fewer than four words.
    """
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
