"""What steering costs: perplexity and accuracies against every text and choice by itself."""

import copy
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.costs import capability, perplexity
from helpers.reference import encoded, example, own_loss_log_likelihood
from scipy.stats import ttest_1samp
from tokenizers.processors import TemplateProcessing

from grains import data, stats
from grains.errors import UserError
from grains.steering import Configuration, steered
from grains.study import costs

TEXTS = [
    "The ferry was late, and the passengers waited in the hall.",
    "Snow fell for most of Monday and left about twenty centimetres in the town.",
    "Wash the lettuce.",
]
QUESTIONS = [
    example("What is the capital of France?", "Rome", "Paris", "the city of London", label=1),
    example("What is the plural of box?", "boxes", "boxen", "boxies"),
    example("What colour is fresh snow?", "red", "white", label=1),
    example("Which animal barks?", "A small dog", "A cow", "A very old cat"),
]


def grid(lm, strength=1.0):
    """One layer, the last layer, and several."""
    generator = torch.Generator().manual_seed(0)
    last = len(lm.layers) - 1
    return [
        Configuration(
            "some",
            "",
            layers,
            factor,
            {
                layer: strength * factor * torch.randn(lm.hidden_size, generator=generator)
                for layer in layers
            },
        )
        for layers, factor in [((3,), 1.0), ((last,), 4.0), ((0, 2), 0.3)]
    ]


def own_perplexity(lm, sequences):
    """From transformers' own loss on one sequence at a time; the first token is not predicted."""
    total = sum(own_loss_log_likelihood(lm, ids[:1], ids[1:]) for ids in sequences)
    return np.exp(-total / sum(len(ids) - 1 for ids in sequences))


def own_accuracies(lm):
    """Share of QUESTIONS whose right choice scores highest, in sum and per token, by hand."""
    by_sum, by_token = [], []
    for item in QUESTIONS:
        prompt = f"Q: {item.question}\nA:"
        start = lm.tokenizer(prompt).input_ids
        ends = [
            lm.tokenizer(f"{prompt} {choice}").input_ids[len(start) :] for choice in item.choices
        ]
        sums = [own_loss_log_likelihood(lm, start, end) for end in ends]
        means = [value / len(end) for value, end in zip(sums, ends, strict=True)]
        by_sum.append(sums.index(max(sums)) == item.label)
        by_token.append(means.index(max(means)) == item.label)
    return np.mean(by_sum), np.mean(by_token)


def check_perplexity(lm, texts, configurations):
    sequences = [lm.tokenizer(text).input_ids for text in texts]
    assert len({len(ids) for ids in sequences}) == len(texts)
    found = perplexity(lm, texts, configurations, 64)
    assert found[0] == pytest.approx(own_perplexity(lm, sequences), rel=1e-4)
    for value, item in zip(found[1:], configurations, strict=True):
        with steered(lm, item.vectors):
            assert value == pytest.approx(own_perplexity(lm, sequences), rel=1e-3)
        assert abs(np.log(value / found[0])) > 0.01


def test_perplexity_is_that_of_every_text_alone(make_tiny):
    lm = make_tiny("llama")
    check_perplexity(lm, TEXTS, grid(lm, strength=3))


def test_perplexity_of_smollm2(smollm2):
    check_perplexity(smollm2, TEXTS[1:], grid(smollm2)[1:2])


def test_a_bos_is_read_and_every_token_of_the_text_predicted(make_tiny):
    lm = make_tiny("llama")
    tokenizer = copy.deepcopy(lm.tokenizer)
    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, number)]
    )
    sequences = [[number, *lm.tokenizer(text).input_ids] for text in TEXTS]
    found = perplexity(replace(lm, tokenizer=tokenizer), TEXTS, [], 64)
    assert found == pytest.approx([own_perplexity(lm, sequences)], rel=1e-4)


@pytest.mark.parametrize("text", ["", "The"])
def test_a_text_of_which_nothing_is_predicted_is_refused(make_tiny, text):
    with pytest.raises(UserError, match=r"prompt tokenizes to nothing|single token"):
        perplexity(make_tiny("llama"), [*TEXTS, text], [], 64)


def test_capability_is_that_of_every_choice_alone(make_tiny):
    lm = make_tiny("llama")
    configurations = grid(lm, strength=3)
    found = capability(lm, QUESTIONS, configurations, 128)
    rows = [own_accuracies(lm)]
    for item in configurations:
        with steered(lm, item.vectors):
            rows.append(own_accuracies(lm))
    by_sum, by_token = zip(*rows, strict=True)
    assert found["sum"].tolist() == list(by_sum)
    assert found["token"].tolist() == list(by_token)
    assert by_sum != by_token and len(set(by_sum)) > 1 and len(set(by_token)) > 1


@pytest.mark.parametrize(
    ("path", "least", "topics"), [(costs.NEUTRAL, 60, 8), (costs.VARIED, 48, 6)]
)
def test_the_embedded_texts(path, least, topics):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= least and len({row["topic"] for row in rows}) >= topics
    assert all(list(row) == ["id", "topic", "text"] for row in rows)
    for field in ("id", "text"):
        assert len({row[field] for row in rows}) == len(rows)
    assert all(
        (45 if row["topic"] == "code" else 60) <= len(row["text"].split()) <= 120 for row in rows
    )
    assert costs.neutral_texts(path) == [row["text"] for row in rows]


@pytest.mark.parametrize(
    ("path", "least"), [(costs.UNRELATED, 200), (costs.UNRELATED_TRAINING, 180)]
)
def test_the_embedded_questions(path, least):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= least and len({row["category"] for row in rows}) >= 10
    for field in ("id", "question"):
        assert len({row[field].lower() for row in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["id", "category", "question", "choices", "label"]
        assert len({choice.strip().lower() for choice in row["choices"]}) == 4
    labels = Counter(row["label"] for row in rows)
    assert set(labels) == {0, 1, 2, 3} and max(labels.values()) - min(labels.values()) <= 1
    misconceptions = Path(data.DATASETS["misconceptions"].path).read_text(encoding="utf-8")
    others = {json.loads(line)["question"].lower() for line in misconceptions.splitlines()}
    assert not others & {row["question"].lower() for row in rows}

    examples = costs.unrelated_examples(path)
    assert [(item.id, item.question, list(item.choices), item.label) for item in examples] == [
        (row["id"], row["question"], row["choices"], row["label"]) for row in rows
    ]


def test_no_question_is_both_for_training_and_for_the_report():
    training, others = (
        {item.question.lower() for item in costs.unrelated_examples(path)}
        for path in (costs.UNRELATED_TRAINING, costs.UNRELATED)
    )
    assert not training & others


def test_repetition():
    assert stats.repetition("a b a b a b a") == pytest.approx(3 / 5)  # aba bab aba bab aba
    assert stats.repetition("one two three one two three") == pytest.approx(1 / 4)
    assert stats.repetition("no no  no\nno") == pytest.approx(1 / 2)
    assert stats.repetition("a b c d e") == 0
    assert [stats.repetition(text) for text in ("", "a", "a a", "a a a")] == [0, 0, 0, 0]


def test_the_bound_of_a_price_is_scipys(make_tiny):
    """Over texts of one length it is the one-sided interval of the t-test of their rises."""
    generator = np.random.default_rng(0)
    texts = [encoded(make_tiny("llama"), [5], [list(range(10, 17))]) for _ in range(6)]
    scores = [generator.normal(-20, 2, size=(3, 1)) for _ in texts]
    found = costs.perplexity_bound(texts, scores)
    assert found[0] == 0
    for row in (1, 2):
        rises = [(values[0, 0] - values[row, 0]) / 7 for values in scores]
        interval = ttest_1samp(rises, 0, alternative="less").confidence_interval(0.95)
        assert found[row] == pytest.approx(np.expm1(interval.high))
        assert (
            found[row]
            > costs.perplexity_of(texts, scores)[row] / costs.perplexity_of(texts, scores)[0] - 1
        )


def test_a_text_counts_by_its_tokens_in_the_bound(make_tiny):
    """Rises of 0.3 and 0 per token over 10 and 30: mean 0.075; apart by 2.25 each, times sqrt 2."""
    texts = [encoded(make_tiny("llama"), [5], [list(range(10, 10 + size))]) for size in (10, 30)]
    scores = [np.array([[-30.0], [-33.0]]), np.array([[-90.0], [-90.0]])]
    error = (2 * 2.25**2 * 2 / 1) ** 0.5 / 40
    assert costs.perplexity_bound(texts, scores)[1] == pytest.approx(
        np.expm1(0.075 + 6.313752 * error)
    )
