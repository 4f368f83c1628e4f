"""Search for the strengths whose cost is just below given targets.

Costs and targets are rises of the loss of neutral text, in nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from itertools import takewhile
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
# The measurements of one direction: (strength, rise of the loss), by strength, from (0, 0) on.
Curve = list[tuple[float, float]]

# The first strength, the least and the largest factor to the next one, and the number of rounds.
FIRST_STRENGTH, STEPS, ROUNDS = 0.02, (2.0, 4.0), 5
# Rounds of strengths in between, which end once one costs at least this share of a target.
REFINEMENTS, NEAR = 3, 0.85


def search(
    directions: list[Key],
    rises: Callable[[list[tuple[Key, float]]], Iterable[float]],
    targets: np.ndarray,
) -> dict[Key, list[float]]:
    """For each direction, the largest strength measured within each target.

    rises: measures the rise of the loss for each of a list of (direction, strength).
    targets: rises of the loss, ascending.
    """
    curves: dict[Key, Curve] = {direction: [(0.0, 0.0)] for direction in directions}

    def measure(points: list[tuple[Key, float]]) -> None:
        if not points:
            return
        for (direction, alpha), rise in zip(points, rises(points), strict=True):
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

    The loss rises with the square of the strength at first, later faster.
    """
    alpha, rise = curve[-1]
    if not alpha:
        return FIRST_STRENGTH
    factor = np.sqrt(target / rise) if rise > 0 else np.inf
    return float(f"{alpha * np.clip(factor, *STEPS):.3g}")


def between(curve: Curve, targets: Iterable[float]) -> list[float]:
    """Strengths to try for targets that no point of a curve within them is near to yet.

    Interpolates with a power of the strength between points that have a cost, with its square
    below them. Nothing for a target that the curve never exceeds.
    """
    strengths = []
    for target in targets:
        index = len(affordable_points(curve, target))
        if index == len(curve) or curve[index - 1][1] >= NEAR * target:
            continue
        (lower, below), (upper, above) = curve[index - 1 : index + 1]
        aim = (1 + NEAR) / 2 * target
        if below > 0:
            share = np.log(aim / below) / np.log(above / below)
            strengths.append(lower * (upper / lower) ** share)
        else:
            share = (aim - below) / (above - below)
            strengths.append(np.sqrt(lower**2 + (upper**2 - lower**2) * share))
    return list(dict.fromkeys(float(f"{alpha:.3g}") for alpha in strengths))


def strongest(curve: Curve, targets: Iterable[float]) -> list[float]:
    """The largest strength within each target; the smallest strength if none is within any."""
    largest = [affordable_points(curve, target)[-1][0] for target in targets]
    return [alpha for alpha in dict.fromkeys(largest) if alpha] or [curve[1][0]]


def affordable_points(curve: Curve, target: float) -> Curve:
    """The points of a curve before it exceeds a target."""
    return [*takewhile(lambda point: point[1] <= target, curve)]
