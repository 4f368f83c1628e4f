"""Which strengths to try, so that some cost certain prices.

A curve holds what was measured of one method: (strength, rise of the loss of neutral text in nats),
by strength, from (0, 0) on.
"""

from __future__ import annotations

from itertools import takewhile

import numpy as np

# The first strength tried for its price, how much stronger the next may be, and how many are.
FIRST_STRENGTH, STEPS, ROUNDS = 0.02, (2.0, 4.0), 5
# How often strengths between those are tried, until one costs no less than this share of a price.
REFINEMENTS, NEAR = 3, 0.85


def stronger(curve: list[tuple[float, float]], target: float) -> float:
    """The strength to try next, where a curve of (strength, rise of the loss) is below a target.

    A rise goes with the square of the strength at first, faster then.
    """
    alpha, rise = curve[-1]
    if not alpha:
        return FIRST_STRENGTH
    factor = np.sqrt(target / rise) if rise > 0 else np.inf
    return float(f"{alpha * np.clip(factor, *STEPS):.3g}")


def between(curve: list[tuple[float, float]], targets) -> list[float]:
    """Strengths to try for targets that no affordable point of a curve is near to yet.

    The curve of (strength, rise of the loss) begins at (0, 0). Between points with a price a rise
    goes with a power of the strength, before them with its square. Nothing for a target that the
    curve never exceeds.
    """
    found = []
    for target in targets:
        index = len(affordable_points(curve, target))
        if index == len(curve) or curve[index - 1][1] >= NEAR * target:
            continue
        (weaker, below), (dearer, above) = curve[index - 1:index + 1]
        aim = (1 + NEAR) / 2 * target
        if below > 0:
            share = np.log(aim / below) / np.log(above / below)
            found.append(weaker * (dearer / weaker) ** share)
        else:
            share = (aim - below) / (above - below)
            found.append(np.sqrt(weaker ** 2 + (dearer ** 2 - weaker ** 2) * share))
    return list(dict.fromkeys(float(f"{alpha:.3g}") for alpha in found))


def strongest(curve: list[tuple[float, float]], targets) -> list[float]:
    """The largest strength tried for each target that costs no more; at least the weakest tried."""
    found = [affordable_points(curve, target)[-1][0] for target in targets]
    return [alpha for alpha in dict.fromkeys(found) if alpha] or [curve[1][0]]


def affordable_points(curve: list[tuple[float, float]], target: float) -> list[tuple[float, float]]:
    """The points of a curve of (strength, rise of the loss) before it exceeds a target."""
    return [*takewhile(lambda point: point[1] <= target, curve)]
