"""Data sets: published columns and users' own, splits that never overlap, bad rows refused."""

import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from helpers.tiny import write_jsonl
from PIL import Image as Picture

from grains import data
from grains.errors import UserError
from grains.vision import open_image


def everything(name, path, split="train", seed=0, **options):
    """All examples of a file, by their question."""
    rows, source = data.load(name, split, str(path))
    return {item.question: item for item in data.examples(rows, source, seed, **options)}


def picture(colour):
    return Picture.new("RGB", (4, 3), colour)


# -- the registry, through files with the published columns --


def test_truthfulqa(tmp_path):
    pd.DataFrame(
        {
            "question": ["Is the sky blue?", "Do pigs fly?", "Who?"],
            "choices": [["Yes", "No"], ["They do", "They do not"], ["Me", "You"]],
            "label": [0, 1, 1],
        }
    ).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    found = everything("truthfulqa", str(tmp_path), "validation")
    assert len(found) == 3
    pigs = found["Do pigs fly?"]
    assert (pigs.choices, pigs.label, pigs.context) == (("They do", "They do not"), 1, "")
    assert (pigs.chosen, pigs.rejected) == ("They do not", "They do")
    assert data.default_split("truthfulqa", "steering") == data.default_split("truthfulqa", "test")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_faitheval(tmp_path, form):
    rows = [
        {
            "id": "f1",
            "context": "Here the moon is made of cheese.",
            "question": "Of what?",
            "choices": {"label": ["A", "B", "C", "D"], "text": ["rock", "ice", "cheese", "fire"]},
            "answerKey": "C",
            "answer": "cheese",
        },
        {
            "id": "f2",
            "context": "Two and two are five.",
            "question": "2 + 2?",
            "choices": {"label": ["1", "2"], "text": ["5", "4"]},
            "answerKey": "1",
            "answer": "5",
        },
    ]
    path = tmp_path / f"test.{form}"
    write_jsonl(path, rows) if form == "jsonl" else Dataset.from_list(rows).to_parquet(path)
    found = everything("faitheval", str(path), "test")
    moon = found["Of what?"]
    assert moon.choices == ("rock", "ice", "cheese", "fire") and moon.chosen == "cheese"
    assert moon.context == "Here the moon is made of cheese." and moon.id == "f1"
    assert moon.rejected == "rock"
    assert (found["2 + 2?"].chosen, found["2 + 2?"].rejected) == ("5", "4")


def test_faitheval_names_a_key_that_is_no_choice(tmp_path):
    path = write_jsonl(
        tmp_path / "x.jsonl",
        [
            {
                "context": "c",
                "question": "q",
                "answerKey": "E",
                "choices": {"label": ["A", "B"], "text": ["a", "b"]},
            }
        ],
    )
    with pytest.raises(UserError, match=r"row 1.*'E'"):
        everything("faitheval", path, "test")


def test_toxigen_pairs_within_a_group(tmp_path):
    """Toxic is where the two ratings sum to more than 5.5."""
    rows = [
        ("kind of us", "women", 1.0, 1.0),
        ("bad of them", "women", 5.0, 4.5),
        ("kind again", "women", 2.5, 3.0),
        ("more bad", "women", 2.5, 3.1),
        ("a third kind one", "women", 1.0, 1.5),
        ("lonely bad", "asian", 5.0, 5.0),
        ("nice", "black", 1.0, 2.0),
        ("nasty", "black", 4.0, 4.0),
    ]
    columns = ["text", "target_group", "toxicity_ai", "toxicity_human"]
    pd.DataFrame(rows, columns=columns).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table, source = data.load("toxigen", "train", str(tmp_path))
    items = [data.read(table, source, index) for index in range(len(table))]
    assert {(item.chosen, item.rejected) for item in items} == {
        ("kind of us", "bad of them"),
        ("kind again", "more bad"),
        ("nice", "nasty"),
    }
    for item in items:
        group = "black" if item.chosen == "nice" else "women"
        assert group in item.question and item.label == 0
    assert len({item.id for item in items}) == 3


def test_toxigen_examples_of_one_group_are_all_there(tmp_path):
    """They share their prompt, and are pairs of their own all the same, in both splits."""
    columns = ["text", "target_group", "toxicity_ai", "toxicity_human"]
    parts = {}
    for split, first in (("train", 0), ("test", 6)):
        rows = [
            (f"{kind} text {index}", "women", toxicity, toxicity)
            for index in range(first, first + 6)
            for kind, toxicity in (("kind", 1.0), ("bad", 5.0))
        ]
        path = tmp_path / f"{split}-00000-of-00001.parquet"
        pd.DataFrame(rows, columns=columns).to_parquet(path)
    for split in ("train", "test"):
        used = frozenset(
            key
            for items in parts.values()
            for item in items
            for key in (item.id, data.question_key(item))
        )
        table, source = data.load("toxigen", split, str(tmp_path))
        parts[split] = data.examples(table, source, 0, exclude=used)
    assert [len(items) for items in parts.values()] == [6, 6]
    assert not {i.chosen for i in parts["train"]} & {i.chosen for i in parts["test"]}


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_spa_vl(tmp_path, form):
    rows = Dataset.from_dict(
        {
            "image": [picture("red"), picture("blue")],
            "question": ["What is this?", "Which?"],
            "chosen": ["Red paint.", "Blue."],
            "rejected": ["A weapon.", "A threat."],
        },
        features=Features(
            {
                "image": Image(),
                "question": Value("string"),
                "chosen": Value("string"),
                "rejected": Value("string"),
            }
        ),
    )
    if form == "parquet":
        rows.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    else:
        DatasetDict({"train": rows}).save_to_disk(tmp_path)
    found = everything("spa-vl", str(tmp_path), "train")
    assert found["What is this?"].choices == ("Red paint.", "A weapon.")
    assert found["What is this?"].label == 0
    stored = found["Which?"].image
    assert isinstance(stored, data.StoredPicture)  # neither read nor decoded yet
    assert np.asarray(open_image(found["Which?"]))[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(UserError, match=r"no split 'test'.*train"):
        data.load("spa-vl", "test", str(tmp_path))


def test_the_same_question_about_another_picture_is_another_question(tmp_path):
    features = Features(
        {"image": Image(), **dict.fromkeys(("question", "chosen", "rejected"), Value("string"))}
    )
    Dataset.from_dict(
        {
            "image": [picture(c) for c in ("red", "blue", "red")],
            "question": ["What is this?"] * 3,
            "chosen": ["a"] * 3,
            "rejected": ["b"] * 3,
        },
        features=features,
    ).to_parquet(tmp_path / "train.parquet")
    rows, source = data.load("spa-vl", "train", str(tmp_path / "train.parquet"))
    items = data.examples(rows, source, 0)
    assert len(items) == 2 and len({data.question_key(item) for item in items}) == 2
    assert len({item.id for item in items}) == 2


def test_mmhal_bench(tmp_path):
    features = Features(
        {
            "image": Image(),
            **dict.fromkeys(("question", "gt_answer", "question_type"), Value("string")),
        }
    )
    Dataset.from_dict(
        {
            "image": [picture("red")],
            "question": ["What colour is the wall?"],
            "gt_answer": ["It is red."],
            "question_type": ["attribute"],
        },
        features=features,
    ).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    (item,) = everything("mmhal-bench", str(tmp_path)).values()
    assert item.chosen == "It is red." and item.image.read()["bytes"]
    with pytest.raises(UserError, match="single answer"):
        _ = item.rejected


def test_misconceptions(tmp_path):
    row = {
        "id": "a-1",
        "category": "a",
        "split": "steering",
        "question": "Why?",
        "best_answer": "So",
        "correct_answers": ["Thus"],
        "incorrect_answers": ["No", "Never"],
    }
    path = write_jsonl(
        tmp_path / "m.jsonl", [row, row | {"id": "a-2", "split": "test", "question": "Who?"}]
    )
    found = everything("misconceptions", path, "steering")
    assert list(found) == ["Why?"]
    item = found["Why?"]
    assert (item.id, item.choices, item.label) == ("a-1", ("So", "No", "Never"), 0)
    with pytest.raises(UserError, match=r"no split 'train'.*steering, test"):
        data.load("misconceptions", "train", path)


def test_the_packaged_misconceptions_keep_their_splits_apart():
    ids, keys = [], []
    for role in data.ROLES:
        rows, source = data.load("misconceptions", data.default_split("misconceptions", role))
        items = data.examples(rows, source, 0)
        ids.append({item.id for item in items})
        keys.append({data.question_key(item) for item in items})
        assert len(ids[-1]) == len(rows) >= 100
    for kind in (ids, keys):
        assert not (kind[0] & kind[1] | kind[0] & kind[2] | kind[1] & kind[2])


@pytest.mark.parametrize(
    "name", ["truthfulqa", "faitheval", "toxigen", "spa-vl", "mmhal-bench", "misconceptions"]
)
def test_a_missing_column_is_named(tmp_path, name):
    source = data.DATASETS[name]
    for column in source.columns:
        rows = [{key: "text" for key in source.columns if key != column} | {"other": "x"}]
        path = write_jsonl(tmp_path / f"{column}.jsonl", rows)
        with pytest.raises(UserError, match=rf"column {column} missing.*found .*other"):
            data.load(name, "train", path)


# -- users' own files --

PAIR = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away, now"}
QUESTION = {"question": "How many?", "choices": ["one", "two", "three, or so"], "label": 2}


def write(path, row):
    if path.suffix == ".jsonl":
        write_jsonl(path, [row])
    elif path.suffix == ".csv":
        flat = {
            key: json.dumps(value) if isinstance(value, list) else value
            for key, value in row.items()
        }
        pd.DataFrame([flat]).to_csv(path, index=False)
    else:
        pd.DataFrame([row]).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_own_pairs(tmp_path, form):
    (item,) = everything("my own", write(tmp_path / f"x.{form}", PAIR)).values()
    assert item.question == "Say hello." and item.choices == ("Hello!", "Go away, now")
    assert item.label == 0 and item.image is None
    other = {"question": "Say hello.", "chosen": "Hello!", "rejected": "Go away, now"}
    assert everything("x", write(tmp_path / f"y.{form}", other))["Say hello."] == item


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_own_questions(tmp_path, form):
    (item,) = everything("my own", write(tmp_path / f"x.{form}", QUESTION)).values()
    assert item.choices == ("one", "two", "three, or so") and item.label == 2
    assert item.pair().choices == ("three, or so", "one") and item.pair().label == 0
    assert item.pair().id == item.id


def test_a_context_and_an_image_beside_the_file(tmp_path):
    picture("red").save(tmp_path / "red.png")
    path = write_jsonl(
        tmp_path / "x.jsonl", [QUESTION | {"context": " Once. ", "image": "red.png"}]
    )
    (item,) = everything("x", path).values()
    assert item.context == "Once." and item.image == str(tmp_path / "red.png")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "column rejected missing"),
        ({"question": "a", "choices": ["b", "c"]}, "column label missing"),
        ({"text": "a"}, "missing; expected prompt, chosen, rejected or question, choices, label"),
    ],
)
def test_own_files_with_a_missing_column(tmp_path, row, reason):
    with pytest.raises(UserError, match=reason):
        data.load("x", "train", write_jsonl(tmp_path / "x.jsonl", [row]))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (PAIR | {"prompt": " \n"}, "empty question"),
        (PAIR | {"chosen": ""}, "empty answer"),
        (PAIR | {"rejected": None}, "empty"),
        (QUESTION | {"choices": ["one", "", "three"]}, "empty answer"),
        (QUESTION | {"label": 3}, "label 3 does not name one of 3 choices"),
        (QUESTION | {"label": -1}, "label -1 does not name one of 3 choices"),
        (QUESTION | {"label": None}, "an empty label"),
        (QUESTION | {"choices": []}, "label 2 does not name one of 0 choices"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    good = PAIR | {"prompt": "fine"} if "prompt" in row else QUESTION | {"question": "fine"}
    rows, source = data.load("x", "train", write_jsonl(tmp_path / "x.jsonl", [good, row]))
    with pytest.raises(UserError, match="row 2") as caught:
        data.examples(rows, source, 0)
    assert reason in str(caught.value)
    assert data.read(rows, source, 0).question == "fine"


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match="unknown data set 'nothing': expected misconceptions"):
        data.load("nothing", "train")
    with pytest.raises(UserError, match="does not exist"):
        data.load("x", "train", str(tmp_path / "none.jsonl"))
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(
        UserError, match=r"expected a \.jsonl, \.json, \.csv, \.tsv .* or \.parquet file"
    ):
        data.load("x", "train", str(tmp_path / "x.txt"))
    with pytest.raises(UserError):
        data.load("x", "train", write_jsonl(tmp_path / "empty.jsonl", []))


# -- splits --


@pytest.fixture
def many(tmp_path):
    rows = [
        {"question": f"Question {i}?", "choices": [f"a{i}", f"b{i}"], "label": i % 2}
        for i in range(40)
    ]
    twice = [rows[3] | {"choices": ["other", "answers"]}, rows[5] | {"question": "QUESTION 5?"}]
    return data.load("x", "train", write_jsonl(tmp_path / "x.jsonl", rows + twice))


def ids(items):
    return [item.id for item in items]


def test_the_order_is_of_the_seed(many):
    one, same, other = (ids(data.examples(*many, seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert ids(data.examples(*many, 1, limit=7)) == one[:7]


def test_a_question_with_the_same_answers_is_taken_once(many):
    """The 41st of these rows asks question 3 with other answers, the 42nd is question 5 again."""
    for seed in range(5):
        items = data.examples(*many, seed)
        assert len(items) == 41
        assert len({item.question.lower() for item in items}) == 40
        assert sum(item.question == "Question 3?" for item in items) == 2


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_one_split_never_overlap(many, seed):
    steering = data.examples(*many, seed, limit=10)
    used = {*ids(steering), *map(data.question_key, steering)}
    validation = data.examples(*many, seed, limit=12, exclude=frozenset(used))
    used |= {*ids(validation), *map(data.question_key, validation)}
    test = data.examples(*many, seed, exclude=frozenset(used))
    parts = [{item.question.lower() for item in part} for part in (steering, validation, test)]
    assert (len(steering), len(validation)) == (10, 12)
    assert len(set.union(*parts)) == 40 == sum(map(len, parts))


def test_excluded_by_question(many):
    """Neither of the two rows that ask it is left, whatever their answers. An id excludes nothing:
    ids that are numbered per split are no sign of the same question."""
    items = data.examples(*many, 0)
    assert len(data.examples(*many, 0, exclude=frozenset(ids(items)))) == 41
    three = next(item for item in items if item.question == "Question 3?")
    by_question = data.examples(*many, 0, exclude=frozenset({data.question_key(three)}))
    assert "Question 3?" not in {item.question for item in by_question}
    assert len(by_question) == 39


def test_ids_are_of_the_content_and_stable(many, tmp_path):
    rows, source = many
    items = [data.read(rows, source, index) for index in range(len(rows))]
    assert len(set(ids(items))) == len(items)
    order = np.random.default_rng(0).permutation(len(rows))
    turned, again = data.load(
        "x", "train", write_jsonl(tmp_path / "turned.jsonl", [rows[int(i)] for i in order])
    )
    assert ids(data.read(turned, again, i) for i in range(len(rows))) == [
        items[i].id for i in order
    ]
    named = write_jsonl(tmp_path / "named.jsonl", [QUESTION | {"id": 17}])
    assert ids(everything("x", named).values()) == ["17"]


def test_fingerprint_tells_examples_apart(many):
    items = data.examples(*many, 0)
    assert data.fingerprint(items) == data.fingerprint(list(items))
    assert (
        len({data.fingerprint(items), data.fingerprint(items[1:]), data.fingerprint(items[::-1])})
        == 3
    )
