"""Which answer a text names, and the same text with another answer in its place."""

from __future__ import annotations

import re

# What ends a sentence, with a quotation mark or bracket after it.
SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


def core(answer: str) -> str:
    """An answer without its article and full stop."""
    return re.sub(r"^(a|an|the)\s+", "", answer.strip(), flags=re.IGNORECASE).rstrip(".")


def names(text: str, answer: str) -> bool:
    """Whether a text names an answer, from the beginning of a word on, in any case.

    An answer without a letter or digit is named nowhere.
    """
    return bool(re.search(r"\w", answer) and _pattern(answer).search(text))


def up_to(text: str, answer: str) -> str:
    """A text up to the end of the sentence that first names an answer.

    A sentence that was cut off ends behind the answer, with a full stop.
    """
    named = _pattern(answer).search(text)
    end = named and SENTENCE_END.search(text, named.end())
    if end:
        return text[: end.end()]
    return text[: named.end()] + "." if named else text


def swapped(text: str, named: str, instead: str) -> str:
    """A text with one answer in place of another, which it names.

    The new one begins with a small letter or a capital one as the old one does, and an article a or
    an before it is the one that the new one takes.
    """
    word = core(instead)

    def in_place(match: re.Match) -> str:
        article, was = match.group("article") or "", match.group("answer")
        first = word[0].lower() if was[0].islower() else word[0].upper()
        if article:
            letter = "an " if first.lower() in "aeiou" else "a "
            article = letter.capitalize() if article[0].isupper() else letter
        return article + first + word[1:]

    return _pattern(named).sub(in_place, text)


def _pattern(answer: str) -> re.Pattern:
    """An answer in a text, from the beginning of a word on, with an article a or an before it."""
    words = rf"(?<!\w)(?P<article>an?\s+)?(?P<answer>{re.escape(core(answer))})"
    return re.compile(words, re.IGNORECASE)
