"""Steering pairs in the model's own words."""

import json
import re
from dataclasses import replace

import pytest
import torch

from grains import data, splits
from grains.settings import DataSettings, PromptSettings
from grains.study.naming import names, swapped, up_to
from grains.study.own_words import in_own_words

pytest_plugins = ("helpers.command_line",)
CHAT = PromptSettings("chat")


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("The capital is Lyon.", "Lyon", True),
        ("A king, they say", "A king", True),
        ("the kings", "A king", True),
        ("It is smoking.", "A king", False),
        ("the sea", "The sea", True),
        ("Nothing", "The sea", False),
        ("It costs 3 (three).", "Three", True),
        ("It costs 3 (three).", "Three.", True),
        ("It is +5 or more", "+5", True),
        ("It is 3+5 or more", "+5", False),
        ("A dot. And the", "The", True),
        ("A dot.", ".", False),
    ],
)
def test_names(text, answer, expected):
    assert names(text, answer) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It is Lyon. Lyon is large.", "It is Lyon."),
        ("A city. It is Lyon, in France! Yes", "A city. It is Lyon, in France!"),
        ('They say "it is Lyon." And so on', 'They say "it is Lyon."'),
        ("The 3.5 million people of Lyon are 3.5 mill", "The 3.5 million people of Lyon."),
        ("Lyon", "Lyon."),
    ],
)
def test_a_text_ends_with_the_sentence_that_names_the_answer(text, expected):
    assert up_to(text, "Lyon") == expected


@pytest.mark.parametrize(
    "text, named, instead, expected",
    [
        ("It is the cheetah.", "Cheetah", "Zebra", "It is the zebra."),
        ("Cheetahs are fast, a cheetah is.", "A cheetah", "Zebra", "Zebras are fast, a zebra is."),
        ("It is an elephant.", "Elephant", "Blue whale", "It is a blue whale."),
        ("A blue whale it is.", "Blue whale", "The elephant", "An elephant it is."),
        ("It is a\nGiraffe", "Giraffe", "Okapi", "It is an Okapi"),
        ("In 3 (three) days", "Three", "3.5+", "In 3 (3.5+) days"),
    ],
)
def test_one_answer_takes_the_place_of_the_other(text, named, instead, expected):
    assert swapped(text, named, instead) == expected


@pytest.fixture(scope="module")
def pairs():
    return splits.steering_examples(DataSettings("faithfulness", num_samples=20), seed=0)


@pytest.fixture(scope="module")
def made(smollm2, pairs):
    return in_own_words(smollm2, pairs, CHAT, max_new_tokens=16)


def test_pairs_are_what_the_model_answers_by_itself(smollm2, pairs, made):
    """Each against what transformers generates for the prompt, written down anew."""
    given = {pair.id: pair for pair in pairs}
    assert 4 <= len(made) < len(pairs)
    mended = 0
    for pair in made:
        was = given[pair.id]
        assert (pair.question, pair.context, pair.label) == (was.question, was.context, 0)
        tokens = smollm2.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{was.context}\n{was.question}"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = smollm2.model.generate(**tokens, max_new_tokens=16, do_sample=False)
        new = output[0, tokens["input_ids"].shape[1] :]
        text = smollm2.tokenizer.decode(new, skip_special_tokens=True).strip()

        holds_chosen, holds_rejected = names(text, was.chosen), names(text, was.rejected)
        assert holds_chosen != holds_rejected
        mended += holds_rejected
        said, swap = pair.choices if holds_chosen else pair.choices[::-1]
        assert text.startswith(said.removesuffix(".")) and said[-1] in ".!?\"'"
        # The other text has the other answer in its place, and differs in nothing else.
        words = [re.findall(r"\w+", part.lower()) for part in (said, swap)]
        for answer, part in zip((was.chosen, was.rejected), pair.choices, strict=True):
            assert names(part, answer)
        shared = [
            [word for word in part if word not in re.findall(r"\w+", f"{was.choices} a an".lower())]
            for part in words
        ]
        assert shared[0] == shared[1]
    assert 0 < mended < len(made)  # some answers are right, some are mended


def test_one_answer_a_time_gives_the_same(smollm2, pairs, made):
    alone = [pair for each in pairs[:5] for pair in in_own_words(smollm2, [each], CHAT, 16)]
    assert [pair.choices for pair in alone] == [pair.choices for pair in made][: len(alone)]


def test_an_answer_without_letters_makes_no_pair(smollm2, pairs, made):
    (first,) = [pair for pair in pairs if pair.id == made[0].id]
    unnamed = replace(first, choices=(first.chosen, "."), label=0)
    assert in_own_words(smollm2, [unnamed], CHAT, 16) == []


# --- the script ---


FLAGS = (
    *("own_words.py", "--model_name", "smollm2-135m-instruct", "--prompt_style", "chat"),
    *("--dataset_name", "faithfulness", "--num_samples", "6", "--max_new_tokens", "16"),
)


@pytest.fixture(scope="module")
def written(commands, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "pairs.jsonl"
    also = ("--also", "faithfulness-agreeing", "--num_given", "4")
    result = commands.run(*FLAGS, *also, "--output_path", str(path)).ok()
    return path, result


def test_the_file_is_a_data_set_of_its_own(written, smollm2):
    path, result = written
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    by_split = {split: [row for row in rows if row["split"] == split] for split in data.ROLES}
    steering = by_split["steering"]
    assert f"{len(steering)} steering pairs, {len(steering) - 4} of them" in result.out

    source = DataSettings(
        "own_words", str(path), 1000, "steering", "validation", "test", num_validation=1000
    )
    read = splits.steering_examples(source, seed=0)
    assert {pair.id for pair in read} == {row["id"] for row in steering}
    expected = []
    for name in ("faithfulness", "faithfulness-agreeing"):
        given = splits.steering_examples(DataSettings(name, num_samples=6), seed=0)
        expected += given[:4] if name == "faithfulness" else []
        expected += in_own_words(smollm2, given, CHAT, 16)
    assert {(pair.context, pair.choices[pair.label], pair.rejected) for pair in read} == {
        (pair.context, pair.chosen, pair.rejected) for pair in expected
    }

    # Validation and test questions are those of the data set itself.
    keys = [data.question_key(pair) for pair in read]
    asked = splits.evaluation_examples(source, 0, {"questions": keys})
    own = DataSettings("faithfulness", num_samples=6)
    for split, examples in splits.evaluation_examples(own, 0, {"questions": keys}).items():
        assert {(e.id, e.choices, e.label) for e in examples} == {
            (e.id, e.choices, e.label) for e in asked[split]
        }


def test_the_same_command_has_nothing_to_do_and_other_settings_are_refused(written, commands):
    path, _ = written
    before = path.read_bytes()
    also = ("--also", "faithfulness-agreeing", "--num_given", "4")
    again = commands.run(*FLAGS, *also, "--output_path", str(path)).ok()
    assert "nothing to do" in again.out and path.read_bytes() == before
    differs = commands.run(*FLAGS, "--output_path", str(path)).error()
    assert str(path) in differs and path.read_bytes() == before


def test_answers_that_no_free_answer_names_are_one_line(commands, tmp_path):
    source, output = tmp_path / "long.jsonl", tmp_path / "pairs.jsonl"
    row = {"choices": ["Whatever the weather may be", "Nothing that has a name"], "label": 0}
    rows = [{"question": f"What is {n}?", **row} for n in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    error = commands.run(
        *FLAGS[:5],
        *("--dataset_name", "own", "--dataset_path", str(source), "--num_samples", "2"),
        *("--num_validation", "2"),
        *("--max_new_tokens", "4", "--output_path", str(output)),
    ).error()
    assert "names one answer of a pair" in error and not output.exists()
