"""Scores that need no judge: words shared with right answers, objects not in the picture."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

from grains.data import Example

# --- overlap with reference answers ---


def normalised(text: str) -> list[str]:
    """Words as SQuAD's evaluation compares them: lower case, no ASCII punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(text: str, reference: str) -> float:
    """SQuAD's F1: the harmonic mean of the shares of words that each text shares with the other.

    1 where neither has any words.
    """
    words, expected = normalised(text), normalised(reference)
    if not words or not expected:
        return float(words == expected)
    common = (Counter(words) & Counter(expected)).total()
    return 2 * common / (len(words) + len(expected))


def overlap(example: Example, text: str) -> tuple[float, float]:
    """The best F1 with a right answer, and by how much it is above the best with a wrong one.

    The second is NaN where the example has no wrong answer.
    """
    right = max(token_f1(text, answer) for answer in (example.chosen, *example.references))
    wrong = [
        token_f1(text, choice)
        for index, choice in enumerate(example.choices)
        if index != example.label
    ]
    return right, right - max(wrong) if wrong else float("nan")


SMOOTHED = 4  # the longest sequence of words that BLEU compares


def bleu(text: str, reference: str) -> float:
    """Sentence BLEU, 0 to 1: words in sequences of 1 to 4 (Papineni et al. 2002).

    The precisions of sequences of two words and more have 1 added to both counts (Lin and Och
    2004), so that a short answer without a common sequence of four does not score 0.
    """
    words, expected = normalised(text), normalised(reference)
    if not words or not expected:
        return float(words == expected)
    logs = 0.0
    for size in range(1, SMOOTHED + 1):
        own, known = sequences(words, size), sequences(expected, size)
        shared, count, more = (own & known).total(), own.total(), int(size > 1)
        if shared + more == 0:
            return 0.0
        logs += math.log((shared + more) / (count + more)) / SMOOTHED
    return math.exp(logs + min(0.0, 1 - len(expected) / len(words)))


def sequences(words: list[str], size: int) -> Counter[tuple[str, ...]]:
    """The sequences of so many words, with how often each occurs."""
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def rouge_l(text: str, reference: str) -> float:
    """ROUGE-L, 0 to 1: F1 of the longest common subsequence of words (Lin 2004)."""
    words, expected = normalised(text), normalised(reference)
    if not words or not expected:
        return float(words == expected)
    longest = [0] * (1 + len(expected))  # of the words so far and the first of those expected
    for word in words:
        before = longest[:]
        for place, known in enumerate(expected, 1):
            longest[place] = (
                before[place - 1] + 1 if word == known else max(before[place], longest[place - 1])
            )
    return 2 * longest[-1] / (len(words) + len(expected))


def margin(similarity: Callable[[str, str], float], example: Example, text: str) -> float:
    """How much nearer a text is to the nearest right answer than to the nearest wrong one.

    TruthfulQA's measure of free answers without a judge (Lin et al. 2022, arXiv 2109.07958): the
    similarity is BLEU or ROUGE. The example has wrong answers.
    """
    known = {example.label, *example.also_right}
    wrong = [choice for index, choice in enumerate(example.choices) if index not in known]
    right = (example.chosen, *example.references)
    nearest = [max(similarity(text, answer) for answer in some) for some in (right, wrong)]
    return nearest[0] - nearest[1]


# --- objects ---

IRREGULAR = {
    "person": "people",
    "man": "men",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "goose": "geese",
}


class Objects:
    """The objects that are known, and all words that name them.

    names: of all objects. Two that differ in number only ('light', 'lights') are one object.
    """

    def __init__(self, names: Iterable[str]):
        self.forms: dict[str, str] = {}  # 'traffic lights' -> 'traffic light'
        for name in sorted(map(_words, set(names)), key=lambda name: (len(name), name)):
            if name and name not in self.forms:
                for form in _numbers(name):
                    self.forms.setdefault(form, name)
        longest_first = sorted(self.forms, key=len, reverse=True)
        self.pattern = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")

    def named(self, text: str) -> set[str]:
        """The objects that a text names; of names that overlap, the longer ('traffic light').

        Words alone are compared: synonyms are missed, and 'there is no dog' names a dog.
        """
        return {self.forms[form] for form in self.pattern.findall(_words(text)) if form}

    def count(self, text: str, shown: Iterable[str]) -> tuple[int, int]:
        """How many objects a text names, and how many of them are not `shown` in the picture."""
        named = self.named(text)
        true = {self.forms[name] for name in map(_words, shown) if name}
        return len(named), len(named - true)


def _words(text: str) -> str:
    """Lower case, one space between words, nothing else."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _numbers(name: str) -> list[str]:
    """A name and what may be its plural or, where it is one, its singular."""
    forms = [name, f"{name}s", f"{name}es"]
    for ending, changed in {"y": "ies", "f": "ves", "fe": "ves", "s": "", **IRREGULAR}.items():
        if name.endswith(ending):
            forms.append(name.removesuffix(ending) + changed)
    return forms
