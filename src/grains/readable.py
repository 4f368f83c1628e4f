"""Tokens as words that people read, and in which words two texts differ."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import decoders

# Pieces of one character that byte-level vocabularies may cut it into (an emoji's four bytes).
MAX_PIECES = 6
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Word:
    """A piece of the prompt as it reads, its attribution and the positions of its tokens."""

    text: str
    score: float
    positions: tuple[int, ...]


def words(tokens: Sequence[str], scores: Sequence[float]) -> list[Word]:
    """A tokenizer's tokens as text.

    A character that several tokens make up is one word, with the sum of their scores:
    attributions add up.
    """
    sentencepiece = any("▁" in token for token in tokens)  # byte-level otherwise
    decoder = (
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        if sentencepiece
        else decoders.ByteLevel()
    )
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        text = decoder.decode(list(tokens[start:end]))
        if text.endswith("\ufffd") and end < len(tokens) and end - start < MAX_PIECES:
            continue
        pieces.append(Word(text, float(sum(scores[start:end])), tuple(range(start, end))))
        start = end
    return pieces


def without_template(words: list[Word]) -> list[Word]:
    """The words from the first to the last with a score; all if none has one.

    The template at a prompt's ends is not attributed, so its scores are zero.
    """
    scored = [place for place, word in enumerate(words) if word.score]
    return words[scored[0] : scored[-1] + 1] if scored else words


def word_difference(base: str, steered: str) -> tuple[list, list]:
    """Both texts in pieces: (text, whether the other text lacks it)."""
    words = [re.findall(r"\s*\S+", text) for text in (base, steered)]
    first_words, second_words = ([word.strip() for word in side] for side in words)
    matcher = difflib.SequenceMatcher(None, first_words, second_words, autojunk=False)
    pieces: tuple[list, list] = ([], [])
    for tag, *ends in matcher.get_opcodes():
        for side, all_words, first, end in zip(pieces, words, ends[::2], ends[1::2], strict=True):
            text = "".join(all_words[first:end])
            stripped = text.lstrip()
            side += [(text[: len(text) - len(stripped)], False), (stripped, tag != "equal")]
    return pieces
