"""Intervals and paired tests against published values and counts by hand."""

import math

import numpy as np
import pytest

from grains.stats import accuracy_interval, holm, paired_p_value


def answers(right, wrong):
    return np.array([True] * right + [False] * wrong)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3: Wilson's score
        # interval without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(right, count, low, high):
    accuracy, found_low, found_high = accuracy_interval(answers(right, count - right))
    assert accuracy == right / count
    assert (round(found_low, 4), round(found_high, 4)) == (low, high)


def test_wilson_interval_by_its_formula():
    z, p, n = 1.6448536269514722, 0.7, 50
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = accuracy_interval(answers(35, 15), confidence=0.9)
    assert found == pytest.approx((0.7, middle - half, middle + half))


def test_no_answers_have_no_accuracy():
    assert all(math.isnan(value) for value in accuracy_interval(np.array([], dtype=bool)))


def pairs(gained, lost, both=3, neither=4):
    """(correct, base) with so many questions gained, lost, right in both and in neither."""
    correct = [True] * gained + [False] * lost + [True] * both + [False] * neither
    base = [False] * gained + [True] * lost + [True] * both + [False] * neither
    return np.array(correct), np.array(base)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (5, 0, 2 / 2**5),
        (0, 5, 2 / 2**5),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (4, 1, 2 * (1 + 5) / 2**5),
        (3, 3, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(gained, lost, p):
    assert paired_p_value(*pairs(gained, lost)) == pytest.approx(p)
    assert paired_p_value(*pairs(gained, lost, both=50, neither=0)) == pytest.approx(p)


def test_accuracies_may_be_equal_and_answers_not():
    correct, base = pairs(6, 6)
    assert correct.mean() == base.mean()
    assert paired_p_value(correct, base) == 1.0


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # 4 x 0.005, 3 x 0.01, then 2 x 0.03 and 0.04, which may not be less than the one before
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.2, 0.9, 0.6], [0.6, 1.0, 1.0]),
        ([0.02, 0.02], [0.04, 0.04]),
        ([0.3], [0.3]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, corrected):
    assert holm(np.array(p_values)) == pytest.approx(np.array(corrected))
