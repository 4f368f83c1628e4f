"""Batched decoding, base and steered rows side by side, is one prompt at a time."""

from dataclasses import replace

import pytest
import torch
from helpers.decoding import greedy, random_configuration, text_of
from helpers.reference import encoded, example, no_hooks, words
from transformers import GenerationConfig

from grains import generation, prompts, sampling
from grains.decoding import Decoder, Row
from grains.errors import UserError
from grains.generation import generate, pad_left
from grains.sampling import Choice, generator
from grains.settings import DecodingSettings
from grains.steering import BASE


def test_smollm2_decodes_a_batch_as_greedy(smollm2):
    """Base and a configuration that steers jointly, prompts of two styles."""
    items = [
        prompts.encode(smollm2, example(text, "x"), style)
        for text, style in (("The capital of France is", "plain"), ("Why is the sky blue?", "chat"))
    ]
    configurations = [random_configuration(smollm2, tuple(range(10, 30)), 0.15, 2)]
    found = generate(smollm2, items, configurations, 3)
    assert no_hooks(smollm2)
    assert [len(texts) for texts in found] == [2, 2]
    for row, configuration in enumerate([None, *configurations]):
        vectors = configuration.vectors if configuration else {}
        for item, text in zip(items, found[row], strict=True):
            assert text == text_of(smollm2, greedy(smollm2, item.prompt_ids, vectors, 3))
    assert found[0] != found[1]


W = words(60, seed=6)


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
    found = generate(tiny, items, configurations, 7)
    for texts, vectors in zip(found, [{}, *(item.vectors for item in configurations)], strict=True):
        for item, text in zip(items, texts, strict=True):
            expected = greedy(tiny, item.prompt_ids, vectors, 7)
            assert text == text_of(tiny, expected)
    assert found[0] != found[1] != found[2]


def rows_of(lm, settings, configurations=(BASE,), limits=(4, 2, 6, 3, 3)):
    """Prompts of several lengths, two of which begin alike, each with a limit of its own."""
    how = sampling.choosing(lm, settings)
    prompts_of = [W[:14], W[20:23], W[:9] + W[30:41], W[41:48], W[:14] + W[50:53]]
    return [
        Row(ids, item, Choice(lm, how, ids, limit, generator(settings.seed, str(n))), limit)
        for n, (ids, limit) in enumerate(zip(prompts_of, limits, strict=True))
        for item in configurations
    ]


def written(lm, rows, positions=4096, max_rows=None):
    decoder = Decoder(lm, positions, max_rows)
    for row in rows:
        decoder.submit(row)
    while not decoder.idle:
        for step in decoder.step():
            assert step.token == step.row.new[-1]
    return [row.new for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [DecodingSettings(), DecodingSettings(temperature=1.2)])
def test_a_row_is_what_it_is_alone(family, settings):
    """Rows enter when others leave, in batches of two, of five and of few positions."""
    configurations = [
        BASE,
        random_configuration(family, (1, 3), 0.5, 3),
        replace(random_configuration(family, (0, 2), 1.5, 4), positions="last"),
        replace(random_configuration(family, (2,), 1.5, 5), positions="response"),
    ]
    alone = [written(family, [row])[0] for row in rows_of(family, settings, configurations)]
    for options in ({"max_rows": 2}, {"max_rows": 5}, {"positions": 70}, {}):
        together = written(family, rows_of(family, settings, configurations), **options)
        assert together == alone
    assert len({tuple(ids) for ids in alone}) >= 10
    if settings == DecodingSettings():
        for row, ids in zip(rows_of(family, settings, configurations), alone, strict=True):
            if row.configuration.positions == "all":
                vectors = row.configuration.vectors
                expected = greedy(family, row.prompt_ids, vectors, row.limit)
                assert [id for id in ids if id != 2] == expected


def test_shared_beginnings_are_computed_once(make_tiny):
    lm = make_tiny("llama")
    computed = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append((args or [kwargs["input_ids"]])[0].shape),
        with_kwargs=True,
    )
    how = sampling.choosing(lm, DecodingSettings())
    prompts_of = [W[:30], W[:20] + W[40:44], W[:20] + W[50:55]]
    written(lm, [Row(ids, BASE, Choice(lm, how, ids, 1), 1) for ids in prompts_of])
    handle.remove()
    assert computed == [(1, 30), (2, 5)]


def test_a_cancelled_row_leaves_the_others_as_they_are(make_tiny):
    lm = make_tiny("gemma3")
    expected = written(lm, rows_of(lm, DecodingSettings()))
    rows = rows_of(lm, DecodingSettings())
    decoder = Decoder(lm, 4096, max_rows=4)
    for row in rows:
        decoder.submit(row)
    decoder.step(), decoder.step()
    for number in (4, 0):  # one that waits, and one that has begun
        decoder.cancel(rows[number])
    while not decoder.idle:
        decoder.step()
    assert [row.new for row in rows[1:4]] == expected[1:4]
    assert len(rows[0].new) == 2 and not rows[4].new


def test_draws_are_the_same_in_every_batch(make_tiny):
    lm = make_tiny("llama")
    items = [encoded(lm, W[:5], [[5]]), encoded(lm, W[8:20], [[5]])]
    items = [replace(item, example=example("?", id=str(n))) for n, item in enumerate(items)]
    settings = DecodingSettings(temperature=1.0, top_p=0.9, num_return=3, seed=1)
    (texts,) = generate(lm, items, [], 8, settings)
    alone = [generate(lm, [item], [], 8, settings)[0] for item in items]
    assert texts == [*alone[0], *alone[1]] and len(set(texts)) == 6
    assert texts != generate(lm, items, [], 8, replace(settings, seed=2))[0]


def test_draws_follow_the_probabilities(make_tiny):
    """2,000 draws of one token against the softmax at that temperature, cut by top_p."""
    lm = make_tiny("llama")
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    how = sampling.choosing(lm, DecodingSettings(temperature=0.5, top_p=0.95))
    drawn = [Choice(lm, how, [1], 1, generator(0, str(n))).token(logits, [1]) for n in range(2000)]
    weights = (logits[:2] / 0.5).softmax(-1)  # the two likeliest hold 0.98 of the probability
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / len(drawn)
    assert shares[:2] == pytest.approx(weights, abs=0.03) and not shares[2:].any()


PENALTIES = {
    "repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [7],
    "min_new_tokens": 6,
    "forced_eos_token_id": 2,
}


@pytest.mark.parametrize("in_batch", [True, False])
def test_the_models_own_settings_act_as_in_generate(make_tiny, monkeypatch, in_batch):
    """Row by row, against transformers' `generate` of each prompt alone."""
    lm = make_tiny("llama")
    monkeypatch.setattr(
        lm.model, "generation_config", GenerationConfig(eos_token_id=2, **PENALTIES)
    )
    monkeypatch.setattr(generation, "can_decode", lambda lm: in_batch)
    items = [encoded(lm, ids * 3, [[5]]) for ids in (W[:3], W[8:12], W[20:30])]
    settings = DecodingSettings("model")
    (texts,) = generate(lm, items, [], 9, settings)
    for item, text in zip(items, texts, strict=True):
        ids = lm.model.generate(**item.inputs, max_new_tokens=9, do_sample=False, pad_token_id=2)
        assert text == text_of(lm, ids[0, len(item.prompt_ids) :])
    assert sampling.choosing(lm, settings).acting == PENALTIES
    (plain,) = generate(lm, items, [], 9)
    for item, text in zip(items, plain, strict=True):
        assert text == text_of(lm, greedy(lm, item.prompt_ids, {}, 9))
    assert texts != plain


@pytest.mark.parametrize(
    "settings", [DecodingSettings(), DecodingSettings(temperature=1.0, num_return=2)]
)
def test_the_models_own_decoding_is_the_same(make_tiny, monkeypatch, settings):
    lm = make_tiny("qwen2")
    items = [encoded(lm, W[:5], [[5]]), encoded(lm, W[8:20], [[5]])]
    configurations = [random_configuration(lm, (1,), 0.5, 3)]
    first = generate(lm, items, configurations, 8, settings)[1][0]
    stop = first[len(first) // 2 :][:3]
    settings = replace(settings, stop=(stop,))

    def everything():
        found = generation.write(lm, items, configurations, 8, settings)
        return sorted(found, key=lambda item: (item.prompt, item.configuration, item.draw))

    together = everything()
    monkeypatch.setattr(generation, "can_decode", lambda lm: False)
    assert everything() == together
    cut = next(item for item in together if (item.prompt, item.configuration) == (0, 1))
    assert cut.ended == "stop" and cut.text == first[: first.index(stop)].strip()
    assert "length" in {item.ended for item in together}


def test_how_a_text_ends(make_tiny):
    lm = make_tiny("llama")
    item = encoded(lm, W[:5], [[5]])
    (token,) = greedy(lm, item.prompt_ids, {}, 1)
    own = lm.model.generation_config.eos_token_id
    try:
        lm.model.generation_config.eos_token_id = [token, 2]
        (written,) = generation.write(lm, [item], [], 4, DecodingSettings())
    finally:
        lm.model.generation_config.eos_token_id = own
    assert (written.ended, written.tokens) == ("eos", 1)
    (written,) = generation.write(lm, [item], [], 4, DecodingSettings())
    assert (written.ended, written.tokens) == ("length", 4)


def test_a_text_ends_where_the_context_does(make_tiny):
    lm = make_tiny("llama", max_position_embeddings=16)
    (written,) = generation.write(lm, [encoded(lm, W[:10], [[5]])], [], 16, DecodingSettings())
    assert (written.ended, written.tokens) == ("length", 7)  # the last is not read
    for limit in (0, 17, 10**23):
        with pytest.raises(UserError, match=f"max_new_tokens {limit}: expected 1 to 16"):
            next(generation.write(lm, [], [], limit, DecodingSettings()))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"generation_config": "own"}, "unknown generation_config 'own'"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": 1e-9}, "temperature 1e-09"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_p": 1.1}, "top_p 1.1"),
        ({"num_return": 0}, "num_return 0"),
        ({"stop": ("a", "")}, "an empty text"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(UserError, match=message):
        DecodingSettings(**values)


def test_settings_that_this_model_cannot_follow(make_tiny, monkeypatch):
    lm = make_tiny("llama")
    with pytest.raises(UserError, match="num_return 2: without a temperature"):
        sampling.choosing(lm, DecodingSettings(num_return=2))
    monkeypatch.setattr(lm.model, "generation_config", GenerationConfig(num_beams=4))
    sampling.choosing(lm, DecodingSettings())
    with pytest.raises(UserError, match="sets num_beams to 4, which is not supported"):
        sampling.choosing(lm, DecodingSettings("model"))


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
