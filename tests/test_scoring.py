"""Scores of choices: transformers' own loss, hooked full forwards, and no trace of the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.reference import embeds, encoded, example, own_loss_log_likelihood, relative, words

from grains import prompts, scoring
from grains.errors import UserError
from grains.scoring import batches, correct, question_batches, score
from grains.steering import Configuration, layer_ranges, steered

W = words(80, seed=3)
QUESTIONS = [
    (W[:11], [W[20:24], W[30:33]]),
    (W[40:43], [W[20:22], W[20:23], W[20:22] + W[50:51], W[60:61]]),
    (W[44:46], [W[20:22], W[20:22]]),
    (W[:14], [W[24:36], W[24:30] + W[60:66], W[70:71]]),
    (W[46:53], [W[20 + i : 22 + i] for i in range(7)]),
    (W[53:60], [W[20:25]]),
]


def encode_all(lm, questions=QUESTIONS):
    return [encoded(lm, prompt, responses) for prompt, responses in questions]


def grid(lm, seed=0):
    """One layer, the last layer, several with and without the last, all; some of them twice."""
    generator = torch.Generator().manual_seed(seed)
    last = len(lm.layers) - 1
    size = 4 * embeds(lm, W).norm(dim=-1).median() / lm.hidden_size**0.5
    configurations = []
    for layers, alpha in [
        ((0,), 0.5),
        ((last,), -2.0),
        ((0, 2), 1.0),
        ((1, last), 0.5),
        ((0,), -2.0),
        (tuple(range(last + 1)), 0.3),
        ((last,), 1.0),
        ((0, 2), -2.0),
    ]:
        vectors = {
            layer: alpha * size * torch.randn(lm.hidden_size, generator=generator)
            for layer in layers
        }
        configurations.append(Configuration("some", "pos", layers, alpha, vectors))
    return configurations


def hooked(lm, vectors, prompt, response):
    """log P(response) of one sequence of its own through a forward with hooks."""
    with steered(lm, vectors):
        return own_loss_log_likelihood(lm, prompt, response)


def test_a_grid_of_a_batch_is_every_sequence_alone_with_hooks(tiny):
    configurations = grid(tiny)
    found = score(tiny, encode_all(tiny), configurations, 10_000)
    moved = 0
    for (prompt, responses), values in zip(QUESTIONS, found, strict=True):
        assert values.shape == (1 + len(configurations), len(responses))
        for column, response in enumerate(responses):
            expected = own_loss_log_likelihood(tiny, prompt, response)
            assert values[0, column] == pytest.approx(expected, abs=1e-3)
        for row, item in enumerate(configurations, start=1):
            column = row % min(2, len(responses))
            expected = hooked(tiny, item.vectors, prompt, responses[column])
            assert values[row, column] == pytest.approx(expected, abs=1e-3)
            moved += abs(values[row, column] - values[0, column]) > 0.1
    assert moved > 20


@pytest.mark.parametrize("max_tokens", [1, 300])
def test_the_configurations_computed_at_a_time_change_nothing(tiny, max_tokens):
    configurations = grid(tiny)
    found, expected = (
        score(tiny, encode_all(tiny), configurations, size) for size in (max_tokens, 10_000)
    )
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) <= 1e-5


def test_scores_do_not_depend_on_the_batch(tiny):
    configurations = grid(tiny)[1:5]
    together = score(tiny, encode_all(tiny), configurations, 10_000)
    reverse = score(tiny, encode_all(tiny, QUESTIONS[::-1]), configurations, 300)[::-1]
    alone = [score(tiny, [item], configurations, 10_000)[0] for item in encode_all(tiny)]
    for values in zip(together, reverse, alone, strict=True):
        assert relative(values[1], values[0]) <= 1e-5
        assert relative(values[2], values[0]) <= 1e-5


def test_a_choice_does_not_see_the_others(tiny):
    prompt, responses = QUESTIONS[3]
    together = score(tiny, [encoded(tiny, prompt, responses)], [], 10_000)[0][0]
    alone = [
        score(tiny, [encoded(tiny, prompt, [response])], [], 10_000)[0][0, 0]
        for response in responses
    ]
    assert relative(together, alone) <= 1e-5


def test_equal_choices_score_alike(tiny):
    values = score(tiny, [encoded(tiny, *QUESTIONS[2])], [], 10_000)[0]
    assert values[0, 0] == values[0, 1]


def test_strength_zero_changes_nothing(family):
    """Also where questions of different length are padded."""
    last = len(family.layers) - 1
    zero = torch.zeros(family.hidden_size)
    configurations = [
        Configuration("some", "", layers, 0.0, dict.fromkeys(layers, zero))
        for layers in [(0,), (1, 2), (last,)]
    ]
    for values in score(family, encode_all(family), configurations, 10_000):
        assert np.isfinite(values).all()
        assert np.abs(values - values[:1]).max() <= 1e-4


def test_layers_in_any_order_are_all_steered(family):
    vectors = grid(family)[5].vectors
    one, other = (Configuration("some", "", layers, 1.0, vectors) for layers in [(1, 3), (3, 1)])
    try:
        values = score(family, encode_all(family)[:1], [one, other], 10_000)[0]
    except (ValueError, UserError):
        return
    assert relative(values[2], values[1]) <= 1e-5


def test_no_configuration_gives_the_base_alone(family):
    found = score(family, encode_all(family), [], 10_000)
    assert [values.shape for values in found] == [(1, len(item[1])) for item in QUESTIONS]


SMOLLM2 = [
    example("What is the capital of Australia?", "Canberra", "Canberra, not Sydney", "Sydney"),
    example("Is a tomato a fruit?", "Yes, botanically it is one", "No"),
]


def test_an_unfinished_answer_has_no_end_of_turn(smollm2):
    end = smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for style, ends in (("chat", [end]), ("qa", [])):
        whole, cut = (
            prompts.encode(smollm2, SMOLLM2[0], style, finished=finished)
            for finished in (True, False)
        )
        assert whole.responses == [response + ends for response in cut.responses]


def test_smollm2(smollm2):
    """The loss of transformers, and three configurations, on prompts of two styles."""
    encodings = [
        prompts.encode(smollm2, item, style)
        for item, style in zip(SMOLLM2, ("qa", "chat"), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    configurations = [
        Configuration(
            "some",
            "",
            layers,
            1.0,
            {layer: torch.randn(576, generator=generator) * strength for layer in layers},
        )
        for layers, strength in [((14,), 1.0), ((29,), 4.0), (tuple(range(30)), 0.1)]
    ]
    found = score(smollm2, encodings, configurations, 2048)
    for item, values in zip(encodings, found, strict=True):
        for column, response in enumerate(item.responses):
            expected = own_loss_log_likelihood(smollm2, item.prompt_ids, response)
            assert values[0, column] == pytest.approx(expected, abs=1e-3)
            if column == 0:
                for row, configuration in enumerate(configurations, start=1):
                    expected = hooked(smollm2, configuration.vectors, item.prompt_ids, response)
                    assert values[row, column] == pytest.approx(expected, abs=2e-3)
                    assert abs(values[row, column] - values[0, column]) > 5e-3


def test_correct_by_hand():
    values = np.array([-4.0, -3.0, -9.0])
    assert correct(values, 1) == (True, 1.0)
    assert correct(values, 0) == (False, -1.0)
    assert correct(values, 2) == (False, -6.0)
    lengths = np.array([4, 2, 12])  # per token -1, -1.5, -0.75
    assert correct(values, 2, lengths) == (True, 0.25)
    assert correct(values, 1, lengths) == (False, -0.75)


def test_a_tie_is_not_correct():
    assert correct(np.array([-2.0, -2.0]), 0) == (False, 0.0)
    assert correct(np.array([-2.0, -2.0]), 1) == (False, 0.0)


def test_batches_hold_every_question_once_and_keep_their_width():
    lengths = [30, 5, 12, 5, 200, 7, 30, 31]
    groups = batches(lengths, 64)
    assert groups == [[1, 3, 5, 2], [0, 6], [7], [4]]
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 64
    assert batches([8] * 9, 64) == [list(range(8)), [8]]
    assert batches([], 64) == []


def test_questions_and_configurations_fill_a_batch_together(tiny, monkeypatch):
    widths = []
    replay = scoring.replay

    def noted(lm, states, *args, **kwargs):
        widths.append(states.shape[:-1].numel())
        return replay(lm, states, *args, **kwargs)

    monkeypatch.setattr(scoring, "replay", noted)
    items = encode_all(tiny) * 5
    configurations = [replace(grid(tiny)[5], alpha=float(alpha)) for alpha in range(6)]
    groups = question_batches(items, 400)
    assert sorted(index for group in groups for index in group) == [*range(len(items))]
    for group in groups:
        widths.clear()
        score(tiny, [items[index] for index in group], configurations, 400)
        base, *steered = widths
        assert base <= 100
        # As few passes as there can be, of like width.
        assert len(steered) == -(-6 // (400 // base)) and max(steered) <= 400
        assert max(steered) - min(steered) <= base


def test_labels():
    assert layer_ranges((3, 4, 5, 9)) == ["3-5", "9"]
    assert layer_ranges((0,)) == ["0"]
    assert layer_ranges(range(30)) == ["0-29"]
    assert Configuration("pca", "both", (1, 2, 5), 0.05).label == "pca both @ 1-2,5 x 0.05"
    assert Configuration("caa", "", (1,), 2.0).label == "caa @ 1 x 2"
    assert Configuration("base", "", (), 0.0).label == "base"
