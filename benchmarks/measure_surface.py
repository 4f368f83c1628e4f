"""Measure how far the form of an answer gives away whether it is true.

Two logistic regressions are cross-validated by question on the answers of a question file: one on
surface features (length, negation, hedges, punctuation, first word, ...), one on word counts. A
file whose answers are parallel in form leaves the first near 50 %. Where a file has contexts (as
faithfulness.jsonl), the answers are judged without them, and folds share no fact.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

DATA = Path(__file__).parents[1] / "src" / "data" / "misconceptions.jsonl"

NEGATIONS = {
    *("no", "not", "never", "none", "neither", "nor", "nothing", "nobody", "nowhere"),
    *("without", "cannot"),
}
HEDGES = {
    *("may", "might", "can", "could", "some", "sometimes", "often", "usually", "mostly"),
    *("mainly", "largely", "about", "around", "roughly", "nearly", "almost", "probably"),
    *("depends", "likely", "partly"),
}
ABSOLUTES = {
    *("always", "all", "only", "every", "each", "any", "exactly", "entirely", "whole"),
    *("must", "alone"),
}
FIRST_WORDS = (
    *("it", "they", "the", "a", "in", "from", "he", "she", "by", "to", "at", "through"),
    *("there", "his", "her", "its", "on", "most"),
)


def load_questions(path: str | Path = DATA) -> list[dict]:
    """Read a question file, one JSON object a line.

    Of a file with contexts, the context's answer is the best one, the common one is incorrect.
    """
    with open(path, encoding="utf-8") as file:
        questions = [json.loads(line) for line in file if line.strip()]
    for question in questions:
        if "context_answer" in question:
            question["best_answer"] = question["context_answer"]
            question["incorrect_answers"] = [question["common_answer"]]
    return questions


def answers_of(question: dict, with_correct: bool = False) -> list[tuple[str, int]]:
    """The answers of a question as (text, 1 if true else 0): best first, then the incorrect."""
    rows = [(question["best_answer"], 1)]
    rows += [(text, 0) for text in question["incorrect_answers"]]
    if with_correct:
        rows += [(text, 1) for text in question["correct_answers"]]
    return rows


def text_features(text: str) -> list[float]:
    """Surface features of one answer by itself."""
    words = re.findall(r"[\w'-]+", text)
    lower = [word.lower() for word in words]
    negations = sum(word in NEGATIONS or word.endswith("n't") for word in lower)
    features = [
        len(text),
        len(words),
        np.mean([len(word) for word in words]),
        max(len(word) for word in words),
        text.count(","),
        sum(char in ".;:!?'\"()-" for char in text),
        sum(char.isdigit() for char in text),
        sum(char.isupper() for char in text),
        negations,
        sum(word in HEDGES for word in lower),
        sum(word in ABSOLUTES for word in lower),
        lower.count("because"),
        lower.count("and"),
        lower.count("or"),
        lower.count("than"),
        sum(word in {"a", "an"} for word in lower),
        lower.count("the"),
    ]
    return features + [float(lower[0] == word) for word in FIRST_WORDS]


def surface_matrix(texts: list[str]) -> np.ndarray:
    """Features of all answers of one question, with their place among the question's answers."""
    base = np.array([text_features(text) for text in texts], dtype=float)
    lengths = base[:, :3]
    centred = lengths - lengths.mean(axis=0)
    below = (lengths[:, None] > lengths[None]).sum(axis=1)
    equal = (lengths[:, None] == lengths[None]).sum(axis=1) - 1
    rank = (below + equal / 2) / max(len(texts) - 1, 1)
    longest = (lengths[:, :1] == lengths[:, :1].max()).astype(float)
    shortest = (lengths[:, :1] == lengths[:, :1].min()).astype(float)
    return np.hstack([base, centred, rank, longest, shortest])


def word_overlap(texts: list[str]) -> np.ndarray:
    """Mean share of words (Jaccard) of each answer with the other answers of its question."""
    words = [set(re.findall(r"[\w'-]+", text.lower())) for text in texts]
    shares = np.array([[len(a & b) / len(a | b) for b in words] for a in words])
    return (shares.sum(axis=1) - 1) / max(len(texts) - 1, 1)


def odd_one_out(questions: list[dict]) -> tuple[float, float, float]:
    """How often the best answer shares fewer words with the rest than the first incorrect one."""
    overlaps = [word_overlap([text for text, _ in answers_of(question)]) for question in questions]
    wins = [(own < first) + 0.5 * (own == first) for own, first, *_ in overlaps]
    rate = float(np.mean(wins))
    return rate, *wilson(rate, len(wins))


def wilson(rate: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson 95 % interval of a rate measured on n cases."""
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return centre - half, centre + half


def measure(
    questions: list[dict],
    model: str = "surface",
    with_correct: bool = False,
    folds: int = 10,
    repeats: int = 5,
) -> dict[str, tuple[float, float, float]]:
    """Cross-validate one model by question, or fact; each figure is (rate, lower, upper).

    The rates are means over `repeats` seeded ways of cutting the questions into folds; the
    intervals take each question, or row, as one case whatever the number of repeats.
    """
    answers = [answers_of(question, with_correct) for question in questions]
    groups = np.repeat(np.arange(len(questions)), [len(rows) for rows in answers])
    facts = {question.get("fact", index): None for index, question in enumerate(questions)}
    number = {fact: place for place, fact in enumerate(facts)}
    fact_of = np.array([number[q.get("fact", i)] for i, q in enumerate(questions)])
    labels = np.array([label for rows in answers for _, label in rows])
    if model == "surface":
        inputs = np.vstack([surface_matrix([text for text, _ in rows]) for rows in answers])
        steps = [StandardScaler()]
    else:
        inputs = np.array([text for rows in answers for text, _ in rows], dtype=object)
        steps = [CountVectorizer(ngram_range=(1, 2))]

    first, every, balanced = [], [], []
    for seed in range(repeats):
        fold_groups = np.random.default_rng(seed).permutation(len(facts))[fact_of[groups]]
        probability = np.zeros(len(labels))
        for train, test in GroupKFold(folds).split(inputs, labels, fold_groups):
            classifier = LogisticRegression(C=0.1, class_weight="balanced", max_iter=2000)
            pipeline = make_pipeline(*steps, classifier).fit(inputs[train], labels[train])
            probability[test] = pipeline.predict_proba(inputs[test])[:, 1]
        for index, question in enumerate(questions):
            scores = probability[groups == index]
            incorrect = scores[1 : 1 + len(question["incorrect_answers"])]
            wins = (scores[0] > incorrect) + 0.5 * (scores[0] == incorrect)
            first.append(wins[0])
            every.append(wins.mean())
        guess = probability > 0.5
        balanced.append((guess[labels == 1].mean() + (~guess[labels == 0]).mean()) / 2)
    rows = 4 / (1 / (labels == 1).sum() + 1 / (labels == 0).sum())
    figures = {
        "best against first incorrect": (float(np.mean(first)), len(questions)),
        "best against each incorrect": (float(np.mean(every)), len(questions)),
        "balanced accuracy of rows": (float(np.mean(balanced)), float(rows)),
    }
    return {name: (rate, *wilson(rate, n)) for name, (rate, n) in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=DATA, help="question file (default: %(default)s)")
    parser.add_argument(
        "--folds", type=int, default=10, help="number of folds (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, help="ways of cutting the folds (default: %(default)s)"
    )
    args = parser.parse_args()
    questions = load_questions(args.data)
    print(f"{len(questions)} questions; rates in % with Wilson 95 % intervals; chance is 50 %")
    for model in ("surface", "words"):
        for with_correct in (False, True) if "correct_answers" in questions[0] else (False,):
            extra = "best, other correct, incorrect" if with_correct else "best, incorrect"
            print(f"{model} model, answers used: {extra}")
            figures = measure(questions, model, with_correct, args.folds, args.repeats)
            for name, (rate, low, high) in figures.items():
                print(f"  {name:30s}{100 * rate:6.1f} [{100 * low:.1f}, {100 * high:.1f}]")
    rate, low, high = odd_one_out(questions)
    print("fewer words shared with the question's other answers, best against first incorrect")
    print(f"  {'share of questions':30s}{100 * rate:6.1f} [{100 * low:.1f}, {100 * high:.1f}]")


if __name__ == "__main__":
    main()
