"""Which strengths to try, so that some cost certain prices.

Prices and targets are rises of the loss of neutral text, in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import takewhile

import numpy as np

# What was measured of one direction: (strength, rise of the loss), by strength, from (0, 0) on.
Curve = list[tuple[float, float]]

# The first strength tried for its price, how much stronger the next may be, and how many are.
FIRST_STRENGTH, STEPS, ROUNDS = 0.02, (2.0, 4.0), 5
# How often strengths between those are tried, until one costs no less than this share of a price.
REFINEMENTS, NEAR = 3, 0.85


def search(
    directions: list[Hashable],
    rises: Callable[[list[tuple[Hashable, float]]], Iterable[float]],
    targets: np.ndarray,
) -> dict[Hashable, list[float]]:
    """For each direction the strongest strengths measured that cost no more than the targets.

    rises: measures the rise of the loss for each of a list of (direction, strength).
    targets: rises that may be paid, ascending.
    """
    curves: dict[Hashable, Curve] = {direction: [(0.0, 0.0)] for direction in directions}

    def measure(tried: list[tuple[Hashable, float]]) -> None:
        if not tried:
            return
        for (direction, alpha), rise in zip(tried, rises(tried), strict=True):
            curves[direction] = sorted({*curves[direction], (alpha, rise)})

    for _ in range(ROUNDS):
        measure(
            [
                (direction, stronger(curve, targets[-1]))
                for direction, curve in curves.items()
                if curve[-1][1] < targets[-1]
            ]
        )
    for _ in range(REFINEMENTS):
        measure(
            [
                (direction, alpha)
                for direction, curve in curves.items()
                for alpha in between(curve, targets)
            ]
        )
    return {direction: strongest(curve, targets) for direction, curve in curves.items()}


def stronger(curve: Curve, target: float) -> float:
    """The strength to try next, where a curve is below a target.

    A rise goes with the square of the strength at first, faster then.
    """
    alpha, rise = curve[-1]
    if not alpha:
        return FIRST_STRENGTH
    factor = np.sqrt(target / rise) if rise > 0 else np.inf
    return float(f"{alpha * np.clip(factor, *STEPS):.3g}")


def between(curve: Curve, targets) -> list[float]:
    """Strengths to try for targets that no affordable point of a curve is near to yet.

    Between points with a price a rise goes with a power of the strength, before them with its
    square. Nothing for a target that the curve never exceeds.
    """
    found = []
    for target in targets:
        index = len(affordable_points(curve, target))
        if index == len(curve) or curve[index - 1][1] >= NEAR * target:
            continue
        (weaker, below), (dearer, above) = curve[index - 1 : index + 1]
        aim = (1 + NEAR) / 2 * target
        if below > 0:
            share = np.log(aim / below) / np.log(above / below)
            found.append(weaker * (dearer / weaker) ** share)
        else:
            share = (aim - below) / (above - below)
            found.append(np.sqrt(weaker**2 + (dearer**2 - weaker**2) * share))
    return list(dict.fromkeys(float(f"{alpha:.3g}") for alpha in found))


def strongest(curve: Curve, targets) -> list[float]:
    """The largest strength tried for each target that costs no more; at least the weakest tried."""
    found = [affordable_points(curve, target)[-1][0] for target in targets]
    return [alpha for alpha in dict.fromkeys(found) if alpha] or [curve[1][0]]


def affordable_points(curve: Curve, target: float) -> Curve:
    """The points of a curve before it exceeds a target."""
    return [*takewhile(lambda point: point[1] <= target, curve)]
