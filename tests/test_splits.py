"""Steering, validation and test examples share no prompt, whatever ids and prompts repeat."""

from __future__ import annotations

import pytest
from helpers import data_files

from grains import data, splits
from grains.errors import UserError
from grains.settings import DataSettings

# Of the 50 steering, 100 validation and 133 test questions of `misconceptions` with the seed 0.
FINGERPRINTS = ["3b7fddfebb7b6d31", "72825fa6aa3ccb90", "65510e66f6c4f2d4"]


def settings(path, **more):
    return DataSettings(
        "mine",
        str(path),
        **{"num_samples": 8, "num_validation": 8, "evaluate_on": "held_out"} | more,
    )


def drawn(given, seed=0):
    """Steering examples, and the others by their split, as the stages draw them."""
    steering = splits.steering_examples(given, seed)
    kept = {
        "ids": [example.id for example in steering],
        "questions": [data.question_key(example) for example in steering],
    }
    return steering, splits.evaluation_examples(given, seed, kept)


def greetings(prompts, answers):
    return [
        {"prompt": f"Greet person {p}.", "chosen": f"Hello {a}.", "rejected": f"What, {a}?"}
        for p in range(prompts)
        for a in range(answers)
    ]


def test_all_pairs_of_one_prompt_steer(tmp_path):
    path = data_files.write(tmp_path, "jsonl", greetings(1, 100) + greetings(1, 5))
    steering = splits.steering_examples(settings(path, num_samples=1000), 0)
    assert {item.chosen for item in steering} == {f"Hello {a}." for a in range(100)}
    assert len(steering) == len({item.id for item in steering}) == 100
    with pytest.raises(
        UserError, match=r"0 validation and 0 test questions .*100 of 100 examples share a prompt"
    ):
        drawn(settings(path))
    _, every = drawn(settings(path, evaluate_on="all"))
    assert len(every["all"]) == 100


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_is_in_two_splits(tmp_path, seed):
    path = data_files.write(tmp_path, "csv", greetings(40, 3))
    steering, rest = drawn(settings(path), seed)
    groups = [steering, rest["validation"], rest["test"]]
    prompts = [{item.question for item in group} for group in groups]
    assert [len(group) for group in groups[:2]] == [8, 8]
    assert sum(map(len, prompts)) == len(set.union(*prompts))
    # all pairs of the prompts that the others do not have
    assert len(groups[2]) == 3 * len(prompts[2]) and len(set.union(*prompts)) <= 40


@pytest.mark.parametrize("evaluate_on", ["held_out", "all"])
def test_ids_numbered_per_category_drop_no_question(tmp_path, evaluate_on):
    """24 questions with 6 ids: all of them are drawn, each under an id of its own."""
    rows = [
        {"id": i % 6, "question": f"Q{i}?", "choices": ["yes", "no"], "label": 0} for i in range(24)
    ]
    path = data_files.write(tmp_path, "jsonl", rows)
    steering, rest = drawn(settings(path, evaluate_on=evaluate_on))
    asked = [example for examples in rest.values() for example in examples]
    asked += steering if evaluate_on == "held_out" else []
    assert sorted(example.question for example in asked) == sorted(f"Q{i}?" for i in range(24))
    assert len({example.id for example in asked}) == 24


def test_ids_numbered_per_split_drop_no_question(tmp_path):
    for split in ("train", "test"):
        rows = [
            {"id": i, "prompt": f"{split} {i}", "chosen": "a", "rejected": "b"} for i in range(20)
        ]
        data_files.write(tmp_path, "parquet", rows, f"{split}-00000-of-00001")
    _, rest = drawn(settings(tmp_path, validation_split="train", test_split="test"))
    assert len(rest["validation"]) == 8 and len(rest["test"]) == 20


def test_pictures_left_in_the_file_are_told_apart(tmp_path):
    """The keys that stage 1 keeps are those by which a steering example is known again."""
    rows = [
        {"prompt": "What?", "chosen": "a", "rejected": "b", "image": bytes([i]) * 9, "id": "x"}
        for i in range(30)
    ]
    path = data_files.write(tmp_path, "parquet", rows)
    steering, rest = drawn(settings(path))
    groups = [steering, rest["validation"], rest["test"]]
    assert [len(group) for group in groups] == [8, 8, 14]
    assert len({item.image.read()["bytes"] for group in groups for item in group}) == 30
    keys = {data.question_key(item) for group in groups for item in group}
    loaded, source = data.load("mine", "train", path)
    read = [data.read(loaded, source, index) for index in range(30)]
    assert keys == set(map(data.question_key, read)) and len(keys) == 30
    again = data.StoredPicture(loaded, 3)
    assert data.picture_digest(again) == data.picture_digest(read[3].image)


def test_draws_of_the_packaged_questions_stay_as_they_were():
    """The results of the documents were drawn like this."""
    given = DataSettings("misconceptions", num_samples=50, num_validation=100)
    steering, rest = drawn(given)
    found = [data.fingerprint(examples) for examples in (steering, *rest.values())]
    assert found == FINGERPRINTS
