"""Batched decoding, base and steered rows side by side, is one prompt at a time."""

import pytest
from helpers.decoding import greedy, random_configuration, text_of
from helpers.reference import encoded, example, no_hooks, words

from grains import prompts
from grains.generation import generate, pad_left

NEW = 8
PROMPTS = [
    "The capital of France is",
    "Why is the sky blue?",
    "Write one sentence about a cat that sleeps on the kitchen table every afternoon.",
    "Translate to Spanish: Good morning, my friend, how are you today?",
]


def test_smollm2_decodes_a_batch_as_greedy(smollm2):
    """Base and a configuration that steers jointly, prompts of two styles."""
    styles = ["chat", "plain"] * 2
    items = [
        prompts.encode(smollm2, example(text, "x"), style)
        for text, style in zip(PROMPTS, styles, strict=True)
    ]
    assert len({len(item.prompt_ids) for item in items}) == 4
    configurations = [random_configuration(smollm2, tuple(range(10, 30)), 0.15, 2)]
    found = generate(smollm2, items, configurations, NEW)
    assert no_hooks(smollm2)
    assert [len(texts) for texts in found] == [4, 4]
    for row, configuration in enumerate([None, *configurations]):
        vectors = configuration.vectors if configuration else {}
        for item, text in zip(items, found[row], strict=True):
            assert text == text_of(smollm2, greedy(smollm2, item.prompt_ids, vectors, NEW))
    changed = sum(base != other for base, other in zip(*found, strict=True))
    assert changed >= 2


W = words(60, seed=5)


def test_tiny_models_with_sliding_layers_too(tiny):
    """Prompts shorter and longer than the window, decoded beyond it."""
    items = [
        encoded(tiny, W[start : start + length], [[5]])
        for start, length in [(0, 2), (10, 13), (30, 7), (40, 20)]
    ]
    configurations = [
        random_configuration(tiny, (1,), 0.5, 3),
        random_configuration(tiny, (0, 3), 0.5, 4),
    ]
    found = generate(tiny, items, configurations, 10)
    for texts, vectors in zip(found, [{}, *(item.vectors for item in configurations)], strict=True):
        for item, text in zip(items, texts, strict=True):
            expected = greedy(tiny, item.prompt_ids, vectors, 10)
            assert text == text_of(tiny, expected)
    assert found[0] != found[1] != found[2]


def test_sampling_is_seeded(make_tiny):
    lm = make_tiny("llama")
    items = [encoded(lm, W[:5], [[5]]), encoded(lm, W[8:20], [[5]])]
    one, same, other = (
        generate(lm, items, [], 8, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other


@pytest.mark.parametrize("rows", [1, 3])
def test_pad_left(make_tiny, rows):
    lm = make_tiny("llama")
    items = [encoded(lm, W[:length], [[5]]).inputs for length in (2, 4, 3)[:rows]]
    padded = pad_left(lm, items)
    longest, pad = (4, lm.replacement_id("pad")) if rows > 1 else (2, None)
    for row, item in enumerate(items):
        missing = longest - item["input_ids"].shape[1]
        assert padded["input_ids"][row].tolist() == [pad] * missing + W[: longest - missing]
        assert padded["attention_mask"][row].tolist() == [0] * missing + [1] * (longest - missing)
