"""Numbers as the report writes them. What is not known is a dash."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from grains.readable import MINUS

NONE = "\N{EN DASH}"


def percent(value: float) -> str:
    return NONE if np.isnan(value) else f"{100 * value:.1f}\u00a0%"


def points(value: float) -> str:
    """A difference of shares in percentage points."""
    return NONE if np.isnan(value) else f"{100 * value:+.1f}".replace("-", MINUS)


def signed_percent(value: float) -> str:
    return NONE if np.isnan(value) else f"{points(value)}\u00a0%"


def number(value: float) -> str:
    return NONE if np.isnan(value) else f"{value:+.2f}".replace("-", MINUS)


def count(value: float) -> str:
    return NONE if np.isnan(value) else f"{value:.1f}"


def p_text(p: float) -> str:
    return NONE if np.isnan(p) else "<\u00a00.0001" if p < 0.0001 else f"{p:.2g}"


def p_is(p: float) -> str:
    return f"p {p_text(p)}" if p < 0.0001 else f"p = {p_text(p)}"


def interval(row: pd.Series, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if np.isnan(low) else f"[{100 * low:.1f}, {100 * high:.1f}]".replace("-", MINUS)


def joined(items: Iterable[object]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last
