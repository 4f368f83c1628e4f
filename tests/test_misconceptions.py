"""The file of misconceptions: fields, splits, and answers whose form tells nothing."""

import random
from collections import Counter

import pytest
from measure_surface import load_questions, measure

FIELDS = ["id", "category", "split", "question", "best_answer"]
LISTS = ["correct_answers", "incorrect_answers"]


@pytest.fixture(scope="module")
def questions():
    return load_questions()


def test_size_and_uniqueness(questions):
    assert len(questions) >= 300
    assert len({question["category"] for question in questions}) >= 12
    for field in ("id", "question"):
        assert len({question[field].strip().lower() for question in questions}) == len(questions)


def test_fields_are_filled_and_typed(questions):
    for question in questions:
        assert list(question) == FIELDS + LISTS
        texts = [question[field] for field in FIELDS]
        for field in LISTS:
            assert isinstance(question[field], list) and question[field]
            texts += question[field]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts)


def test_answers_are_unique_within_a_question(questions):
    for question in questions:
        assert len(question["incorrect_answers"]) >= 2
        answers = [question["best_answer"]] + [text for name in LISTS for text in question[name]]
        assert len({answer.lower() for answer in answers}) == len(answers), question["id"]


def test_splits(questions):
    sizes = Counter(question["split"] for question in questions)
    assert sizes == {"steering": 100, "validation": 100, "test": len(questions) - 200}
    members = {split: set() for split in sizes}
    for question in questions:
        members[question["split"]].add(question["id"])
    assert sum(map(len, members.values())) == len(set.union(*members.values()))


def test_splits_follow_the_rule_of_the_card(questions):
    generator, places = random.Random(0), []
    for category in sorted({question["category"] for question in questions}):
        ids = sorted(item["id"] for item in questions if item["category"] == category)
        generator.shuffle(ids)
        places += [((i + 0.5) / len(ids), category, name) for i, name in enumerate(ids)]
    cuts = ["steering"] * 100 + ["validation"] * 100 + ["test"] * (len(questions) - 200)
    rule = {name: cut for (*_, name), cut in zip(sorted(places), cuts, strict=True)}
    assert rule == {question["id"]: question["split"] for question in questions}


@pytest.mark.parametrize("with_correct", [False, True])
def test_form_does_not_give_the_answer_away(questions, with_correct):
    for name, (rate, _, _) in measure(questions, "surface", with_correct, repeats=1).items():
        assert rate < 0.60, name
