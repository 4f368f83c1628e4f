"""What a free answer names."""

from __future__ import annotations

import re


def core(answer: str) -> str:
    """An answer without its article."""
    return re.sub(r"^(a|an|the)\s+", "", answer, flags=re.IGNORECASE)


def holds(text: str, answer: str) -> bool:
    """Whether a free answer names an answer, from the beginning of a word on, in any case."""
    return bool(re.search(rf"\b{re.escape(core(answer))}", text, re.IGNORECASE))
