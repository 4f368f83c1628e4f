"""Several vectors at once, and vectors at some positions, against hooks written here."""

from functools import partial

import pytest
import torch
from helpers.decoding import text_of
from helpers.reference import embeds, encoded, hooked, own_loss_log_likelihood, words

import grains
import steering_mc
from grains.cli import flags
from grains.cli.flags import LLM
from grains.errors import UserError
from grains.generation import generate
from grains.names import grid_parts
from grains.positions import in_prompt
from grains.scoring import score
from grains.settings import parse_positions
from grains.steering import Configuration, Gate, SteeringVectors, directions
from grains.study import costs

W = words(80, seed=10)
QUESTIONS = [(W[:9], [W[20:24], W[20:21] + W[30:33]]), (W[40:44], [W[24:26], W[60:61]])]
LAST = 3  # the tiny models have layers 0 to 3


def vectors(lm, seed, **info):
    generator = torch.Generator().manual_seed(seed)
    shape = len(lm.layers), lm.hidden_size
    norms = embeds(lm, W).norm(dim=-1).median() * (torch.rand(shape[0], generator=generator) + 1)
    return SteeringVectors(torch.randn(shape, generator=generator), norms, info)


def moved_to(h, vector):
    """Another state of the same length, by NumPy's own arithmetic."""
    before = h.detach().double().numpy()
    after = before + vector.double().numpy()
    ratio = ((before**2).sum(-1) / (after**2).sum(-1)) ** 0.5
    return torch.from_numpy(after * ratio[..., None]).to(h.dtype)


def at_positions(lm, added, word, length):
    """A forward with hooks that steer the positions that a word means, one by one."""

    def change(h, vector):
        h = h.clone()
        for number in range(h.shape[1]):
            if MEANINGS[word](number, length):
                h[:, number] = moved_to(h[:, number], vector)
        return h

    return hooked({lm.layers[k]: partial(change, vector=v) for k, v in added.items()})


# What each word means, of a prompt of P positions, its picture at 2 and 3.
MEANINGS = {
    "all": lambda number, length: True,
    "prompt": lambda number, length: number < length,
    "response": lambda number, length: number >= length - 1,
    "last": lambda number, length: number == length - 1,
    "image": lambda number, length: number in (2, 3),
    "1:3": lambda number, length: number in (1, 2),
    "-2:": lambda number, length: length - 2 <= number < length,
}


def with_picture(lm, prompt, responses):
    made = encoded(lm, prompt, responses)
    made.image[2:4] = True
    return made


@pytest.mark.parametrize("layers", [(1, 2), (LAST,), (0, LAST)])
def test_multiple_choice_steers_only_these_positions(make_tiny, layers):
    lm = make_tiny("llama")
    added = {layer: v for layer, v in vectors(lm, 1).scaled(1.0).items() if layer in layers}
    every = [Configuration("some", "", layers, 0.5, added, positions=word) for word in MEANINGS]
    values = score(lm, [with_picture(lm, *question) for question in QUESTIONS], every, 1000)
    for (prompt, responses), rows in zip(QUESTIONS, values, strict=True):
        for word, row in zip(MEANINGS, rows[1:], strict=True):
            for value, response in zip(row, responses, strict=True):
                with at_positions(lm, added, word, len(prompt)):
                    expected = own_loss_log_likelihood(lm, prompt, response)
                assert value == pytest.approx(expected, abs=1e-4)
    # The first token of an answer is predicted from the last position of the prompt.
    assert abs(values[1][1 + [*MEANINGS].index("response")][1] - values[1][0][1]) > 0.01


def test_a_gate_acts_at_these_positions_alone(make_tiny):
    lm = make_tiny("llama")
    added = vectors(lm, 2).scaled(1.5, [1, LAST])
    gate = Gate(torch.zeros(4, lm.hidden_size), torch.full((4,), 0.3))
    half = {layer: torch.tensor(0.3).sigmoid() * v for layer, v in added.items()}
    every = [
        Configuration("gated", "", (1, LAST), 0.5, added, gate, positions="last"),
        Configuration("plain", "", (1, LAST), 0.5, half, positions="last"),
    ]
    (rows,) = score(lm, [with_picture(lm, *QUESTIONS[0])], every, 1000)
    assert rows[1] == pytest.approx(rows[2], abs=1e-4)
    assert abs(rows[1] - rows[0]).max() > 0.01


@pytest.mark.parametrize("kind, strength", [("llama", 1.2), ("gemma3", 0.8)])
def test_generation_steers_only_these_positions(make_tiny, kind, strength):
    """Rows of several lengths in one batch are each prompt alone, decoded without a cache."""
    lm = make_tiny(kind)
    items = [encoded(lm, W[start : start + length], [[5]]) for start, length in [(0, 5), (10, 8)]]
    added = vectors(lm, 3).scaled(strength, [0, 2])
    meant = [word for word in MEANINGS if word != "image"]
    every = [Configuration("some", "", (0, 2), 1.0, added, positions=word) for word in meant]
    texts = generate(lm, items, every, 6)
    for word, row in zip(meant, texts[1:], strict=True):
        for item, text in zip(items, row, strict=True):
            ids, length = list(item.prompt_ids), len(item.prompt_ids)
            with at_positions(lm, added, word, length), torch.no_grad():
                for _ in range(6):
                    logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                    ids.append(int(logits[0, -1].argmax()))
            assert text == text_of(lm, ids[length:])
    assert len({tuple(row) for row in texts}) > 4


def test_positions_that_name_nothing_are_refused(make_tiny):
    lm = make_tiny("llama")
    with pytest.raises(UserError, match="expected all, prompt, response, last, image, or a slice"):
        parse_positions("first")
    for word, why in [("image", "it has no picture"), ("9:12", "it has 4 positions")]:
        with pytest.raises(UserError, match=why):
            in_prompt(word, torch.zeros(4, dtype=torch.bool))
        steering = vectors(lm, 1).at(0.5, positions=word)
        with pytest.raises(UserError, match=f"positions '{word}' name nothing"):
            grains.generate(lm, "Why?", style="plain", steering=steering)


def test_texts_of_costs_may_stay_as_they_are(make_tiny):
    """Prose has no picture: steering the picture alone costs it nothing, and is no mistake."""
    lm = make_tiny("llama")
    texts = [encoded(lm, W[:1], [W[1:9]]), encoded(lm, W[9:10], [W[10:14]])]
    every = [vectors(lm, 1).at(0.5, positions=word) for word in ("image", "4:", "last", "response")]
    with pytest.raises(UserError, match="'image' name nothing"):
        score(lm, texts, every, 1000)
    for text, rows in zip(texts, score(lm, costs.may_stay(texts), every, 1000), strict=True):
        base = own_loss_log_likelihood(lm, text.prompt_ids, text.responses[0])
        assert rows[:3, 0] == pytest.approx([base] * 3, abs=1e-4)
        assert abs(rows[3:, 0] - base).min() > 0.01


def test_python_scores_and_generates_at_positions(make_tiny):
    lm = make_tiny("llama")
    v = vectors(lm, 5)
    steering = v.at(0.5, ["0-1"], positions="last")
    assert steering.label == "vectors @ 0-1 x 0.5 (last)"
    prompt, answers = "Is glass a liquid?", ["No", "Yes, it flows"]
    length = len(lm.tokenizer("Q: Is glass a liquid?\nA:").input_ids)
    found = grains.score(lm, prompt, answers, steering=steering)
    with at_positions(lm, v.scaled(0.5, ["0-1"]), "last", length):
        assert found == pytest.approx(grains.score(lm, prompt, answers), abs=1e-4)
    assert abs(found - grains.score(lm, prompt, answers)).max() > 0.01
    with v.apply(lm, 0.5, ["0-1"]):
        inside = grains.generate(lm, [prompt, "Why?"])
    assert inside == grains.generate(lm, [prompt, "Why?"], steering=v.at(0.5, ["0-1"]))


def test_a_combination_adds_what_its_parts_add_at_every_strength(make_tiny, tmp_path):
    lm = make_tiny("llama")
    v, w = vectors(lm, 1), vectors(lm, 2)
    trained = vectors(lm, 3, method="trained", mode="")
    combined = v + 0.5 * w - trained
    combined.save(tmp_path / "v.safetensors")
    for known in (combined, SteeringVectors.load(tmp_path / "v.safetensors")):
        for alpha, units in [(0.3, "relative"), (-0.3, "absolute")]:
            for layer, vector in known.scaled(alpha, [0, 3], units).items():
                unit_v, unit_w = (x.vectors[layer] / x.vectors[layer].norm() for x in (v, w))
                expected = alpha * (
                    v.norms[layer] * unit_v
                    + 0.5 * w.norms[layer] * unit_w
                    - trained.vectors[layer]  # its length was trained
                )
                assert vector == pytest.approx(expected, abs=1e-5)
    assert (2 * v).scaled(0.1)[2] == pytest.approx(v.scaled(0.2)[2], abs=1e-6)
    assert (-v).scaled(0.1)[2] == pytest.approx(v.scaled(-0.1)[2], abs=1e-6)
    assert v.fix("absolute").scaled(0.1)[2] == pytest.approx(0.1 * v.vectors[2], abs=1e-6)


def test_what_cannot_be_combined_is_refused(make_tiny):
    lm = make_tiny("llama")
    v = vectors(lm, 1)
    with pytest.raises(UserError, match=r"4 layers of size \d+ and 3 layers of size"):
        v + SteeringVectors(v.vectors[:3], v.norms[:3], {})
    model = {"model": "a", "weights_sum": "1.0", "vocab_size": 9}
    with pytest.raises(UserError, match="another model, b, not of the first"):
        vectors(lm, 1, model=model) + vectors(lm, 2, model=model | {"model": "b", "vocab_size": 8})
    gate = Gate(torch.zeros_like(v.vectors), torch.zeros(4))
    gated = SteeringVectors(v.vectors, v.norms, {}, gate)
    for both in ((gated, v), (v, gated)):
        with pytest.raises(UserError, match="behind a gate cannot be added"):
            both[0] - both[1]
    assert (3 * gated).gate is gate
    with pytest.raises(TypeError):
        v + 1


def test_without_leaves_nothing_along_the_others(make_tiny):
    lm = make_tiny("llama")
    v, w = vectors(lm, 1), vectors(lm, 2)
    w.vectors[1] = 3 * v.vectors[1]
    left = v.without(w)
    for layer in (0, 2, 3):
        a, b = v.vectors[layer].double().numpy(), w.vectors[layer].double().numpy()
        expected = a - (a @ b) / (b @ b) * b
        assert left.vectors[layer].numpy() == pytest.approx(expected, abs=1e-5)
        assert left.scaled(0.1)[layer].norm() == pytest.approx(0.1 * float(v.norms[layer]))
    assert not left.scaled(0.1)[1].any()  # not rounding, scaled up
    fixed = v.fix().without(w).scaled(1.0)[0]
    assert fixed.norm() < v.norms[0]


def test_the_flag_reaches_every_configuration_and_the_names():
    flags_of = steering_mc.parser(LLM)
    grid = flags.grid_settings(flags_of.parse_args(["--positions=-5:", "--alphas", "0.1"]))
    assert grid.positions == "-5:"
    assert grid_parts(grid, flags.GRID)[-1] == "positions--5:"
    v = SteeringVectors(torch.ones(3, 2), torch.ones(3), {})
    (direction,) = directions(v, "mean", "pos", grid)
    assert direction.at(0.1).positions == "-5:"
    with pytest.raises(SystemExit):
        flags_of.parse_args(["--positions", "end"])
