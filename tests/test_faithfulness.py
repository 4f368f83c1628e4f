"""The file of contexts that contradict common knowledge: fields, splits, facts, form of answers."""

import json
import random
import re
from collections import Counter

import faithfulness
import numpy as np
import pandas as pd
import pytest
from faithfulness import gain, interval, level
from measure_surface import measure
from scipy.stats import binom

from grains import data
from grains.steering import Configuration
from grains.study.naming import core

FIELDS = ["id", "topic", "fact", "form", "split", "question", "context", "agreeing_context"]
ANSWERS = ["context_answer", "common_answer"]
NAMES = ("faithfulness", "faithfulness-agreeing", "faithfulness-bare")


@pytest.fixture(scope="module")
def rows():
    lines = (data.PACKAGED / "faithfulness.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def examples(name):
    for role in data.ROLES:
        of_role, source = data.load(name, data.default_split(name, role))
        for index in range(len(of_role)):
            yield role, data.read(of_role, source, index)


def says(text, answer):
    return bool(re.search(rf"\b{re.escape(core(answer).lower())}s?\b", text.lower()))


def test_size_and_fields(rows):
    assert len(rows) >= 320
    assert len({row["fact"] for row in rows}) >= 120 and len({row["topic"] for row in rows}) >= 15
    for row in rows:
        assert list(row) == FIELDS + ANSWERS
        assert all(isinstance(text, str) and text == text.strip() != "" for text in row.values())
    for field in ("id", "context"):
        assert len({row[field] for row in rows}) == len(rows)


def test_no_form_of_text_is_common(rows):
    """Neither the kind of text nor its first words are those of a tenth of the contexts."""
    for key in (lambda row: row["form"], lambda row: tuple(row["context"].split()[:3])):
        assert Counter(map(key, rows)).most_common(1)[0][1] <= len(rows) / 10


def test_splits_share_no_fact(rows):
    by_fact = {}
    for row in rows:
        by_fact.setdefault(row["fact"], set()).add(
            (row["split"], row["topic"], row["common_answer"])
        )
    assert all(len(places) == 1 for places in by_fact.values())
    assert {row["split"] for row in rows} == {"steering", "validation", "test"}
    for split in ("steering", "validation", "test"):  # every topic in each
        assert len({row["topic"] for row in rows if row["split"] == split}) == 18


def test_splits_follow_the_rule_of_the_card(rows):
    generator, places = random.Random(0), []
    for topic in sorted({row["topic"] for row in rows}):
        facts = sorted({row["fact"] for row in rows if row["topic"] == topic})
        generator.shuffle(facts)
        places += [((i + 0.5) / len(facts), topic, fact) for i, fact in enumerate(facts)]
    cuts = ["steering"] * 54 + ["validation"] * 36 + ["test"] * (len(places) - 90)
    rule = {fact: cut for (*_, fact), cut in zip(sorted(places), cuts, strict=True)}
    assert all(rule[row["fact"]] == row["split"] for row in rows)


def test_each_context_says_its_own_answer_alone(rows):
    """The two contexts differ in nothing but the answer, which the question does not hold."""
    for row in rows:
        contrary, agreeing = row["context"], row["agreeing_context"]
        assert says(contrary, row["context_answer"]) and says(agreeing, row["common_answer"])
        assert not says(contrary, row["common_answer"]), row["id"]
        assert not says(agreeing, row["context_answer"]), row["id"]
        assert not any(says(row["question"], row[name]) for name in ANSWERS), row["id"]
        assert row["question"].lower() not in contrary.lower()
        changed = {*contrary.lower().split()} ^ {*agreeing.lower().split()}
        answers = " ".join(row[name] for name in ANSWERS).lower().split()
        for word in changed:
            bare = re.sub(r"^\W+|\W+$", "", word).removesuffix("'s")
            known = [*answers, *(answer + "s" for answer in answers), "a", "an", "the"]
            assert bare in known or bare.rstrip("s") in known, (row["id"], word)


def test_form_does_not_give_the_answer_away(rows):
    questions = [
        {
            "fact": row["fact"],
            "best_answer": row["context_answer"],
            "incorrect_answers": [row["common_answer"]],
        }
        for row in rows
    ]
    for name, (rate, _, _) in measure(questions, "surface", repeats=1).items():
        assert rate < 0.60, name


def test_three_data_sets_read_the_same_file(rows):
    by_id = {row["id"]: row for row in rows}
    for name in NAMES:
        read = [*examples(name)]
        assert len(read) == len(rows)
        for role, example in read:
            row = by_id[example.id]
            assert row["split"] == role and example.question == row["question"]
            preferred, other = ANSWERS if name == "faithfulness" else ANSWERS[::-1]
            assert (example.chosen, example.rejected) == (row[preferred], row[other])
            context = {
                "faithfulness": row["context"],
                "faithfulness-agreeing": row["agreeing_context"],
                "faithfulness-bare": "",
            }[name]
            assert example.context == context


def test_intervals_are_over_facts():
    """Three texts a fact that always agree say no more than one text a fact."""
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    alone = pd.DataFrame({"fact": range(8), "id": range(8), "value": right})
    thrice = pd.concat([alone.assign(id=alone.id + 10 * copy) for copy in range(3)])
    seeds = pd.concat([alone, alone])  # a question that two seeds test counts once
    mean, low, high = interval(alone)
    assert mean == 5 / 8 and low < mean < high
    # By hand: of 8 draws with replacement, the 2.5 % and 97.5 % quantiles of Binomial(8, 5/8) / 8.
    assert (low, high) == (binom.ppf(0.025, 8, 5 / 8) / 8, binom.ppf(0.975, 8, 5 / 8) / 8)
    assert interval(thrice) == interval(seeds) == (mean, low, high)


def test_gains_are_paired_by_seed_and_question():
    rows = pd.DataFrame(
        [
            ("s", seed, name, f"{name} fact", configuration, value)
            for seed, name, configuration, value in [
                (0, "a", "base", 1.0),
                (0, "b", "base", 0.0),
                (1, "a", "base", 0.0),
                (0, "b", "steered", 1.0),
                (0, "a", "steered", 1.0),
                (1, "a", "steered", 1.0),
            ]
        ],
        columns=["set", "seed", "id", "fact", "configuration", "token"],
    )
    # a gains 0 with one seed and 1 with the other, b gains 1: the mean is 75 points.
    assert gain(rows, "s", "steered", "token").startswith("+75.0 [")
    assert level(rows, "s", "base", "token").startswith("25.0 [")
    assert gain(rows, "s", "unknown", "token") == "-"


class Line:
    """A direction of which only the strengths matter."""

    def __init__(self, method):
        self.method = method

    def at(self, alpha):
        return Configuration(self.method, "", (1,), alpha)


# Strength -> right of 10 contrary contexts, and the rise of the perplexity of prose.
RIGHT = {0.0: 5, 0.006: 7, 0.01: 8, 0.02: 9, 0.03: 10}
RISES = {0.0: 0.0, 0.006: 0.0, 0.01: 0.01, 0.02: 0.015, 0.03: 0.03}


@pytest.mark.parametrize(
    "lost, own, expected",
    [
        ({}, 0.05, 0.02),  # the best, 0.03, costs too much prose
        ({0.02: 6}, 0.05, 0.01),  # a set loses more than its interval allows
        ({0.02: 1}, 0.05, 0.02),  # one question of ten may be chance
        ({}, 0.2, 0.006),  # of none that holds own answers, the smallest
    ],
)
def test_behind_a_gate_the_best_strength_that_holds_the_rest_is_chosen(
    monkeypatch, lost, own, expected
):
    def right(lm, items, tried):
        rows = []
        for alpha in (0.0, *(item.alpha for item in tried)):
            count = RIGHT[alpha] if items == faithfulness.CONTRARY else 10 - lost.get(alpha, 0)
            rows.append([1.0] * count + [0.0] * (10 - count))
        return np.array(rows).T

    monkeypatch.setattr(faithfulness, "right", right)
    monkeypatch.setattr(faithfulness, "score_all", lambda lm, items, tried, size: tried)
    monkeypatch.setattr(faithfulness.costs, "passages", lambda lm, split: "prose")

    def rise(items, tried):
        return np.array([0.0, *(own if items == "own" else RISES[item.alpha] for item in tried)])

    monkeypatch.setattr(faithfulness.costs, "perplexity_rise", rise)
    args = faithfulness.parser().parse_args(["--gated", "--priced", "rotated"])
    sets = {name: name for name in faithfulness.GATED_SHOWN}
    lines = {method: Line(method) for method in ("gradient", "mean", "rotated")}
    chosen = faithfulness.choose(None, args, lines, sets, "own")
    assert {method: item.alpha for method, item in chosen.items()} == {
        "gradient": expected,
        "rotated": expected,
    }
    # Without a gate: of the gradient the best within the budget, of a control the largest.
    args = faithfulness.parser().parse_args(["--strengths", "0.006", "0.01", "--priced", "rotated"])
    chosen = faithfulness.choose(None, args, lines, sets, [])
    assert {method: item.alpha for method, item in chosen.items()} == {
        "gradient": 0.01,
        "rotated": 0.02,
    }
