"""Variants of steering against hooks on the model's own forward, and by hand."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import variants
from helpers.costs import perplexity
from helpers.families import tiny_model
from helpers.reference import encoded, hooked, layer_outputs, own_logits, relative
from pytest import approx
from torch.nn.functional import normalize

from grains import models
from grains.errors import UserError
from grains.settings import AblationSettings
from grains.steering import Configuration, SteeringVectors
from grains.study import costs

pytestmark = pytest.mark.slow

W = torch.randint(1000, 40000, (60,), generator=torch.Generator().manual_seed(0)).tolist()
GENERATOR = torch.Generator()


@pytest.fixture(scope="module")
def lm(smollm2_tokenizer):
    """A tiny model that reads all of SmolLM2's words."""
    model = tiny_model("llama", vocab_size=len(smollm2_tokenizer))
    return models.wrap("tiny-llama", model, smollm2_tokenizer)


@pytest.fixture
def material(lm):
    """What variants are made from, with vectors and gradients drawn at random."""
    GENERATOR.manual_seed(1)
    layers, size = len(lm.layers), lm.hidden_size
    vectors = SteeringVectors(
        torch.randn(layers, size, generator=GENERATOR), torch.linspace(20.0, 40.0, layers), {}
    )
    made = object.__new__(variants.Material)
    made.lm = lm
    made.study = SimpleNamespace(ablation=AblationSettings(batch_tokens=64))
    made.vectors, made.norms = {"gradient": vectors, "mean": vectors}, vectors.norms
    made.example_gradients = torch.randn(layers, 30, size, generator=GENERATOR)
    made.neutral = tuple(torch.randn(layers, 90, size, generator=GENERATOR) for _ in range(2))
    return made


def test_a_state_is_rotated_by_the_angle_in_the_plane_of_both():
    states = torch.randn(2, 5, 8, generator=GENERATOR, dtype=torch.float64)
    vector = 0.3 * normalize(torch.randn(8, generator=GENERATOR, dtype=torch.float64), dim=-1)
    first, others = variants.rotate(states, vector, torch.tensor(7.0)).split([1, 4], dim=1)
    assert torch.equal(first, states[:, :1])
    states, moved = states[:, 1:], others
    assert moved.norm(dim=-1).numpy() == approx(states.norm(dim=-1).numpy())
    cosine = torch.cosine_similarity(moved, states, dim=-1)
    assert cosine.numpy() == approx(math.cos(0.3))
    along = [torch.cosine_similarity(some, vector, dim=-1) for some in (states, moved)]
    angles = [cosine.acos() for cosine in along]
    assert (angles[0] - angles[1]).numpy() == approx(0.3)  # nearer by all of it: the same plane


def test_a_state_gets_what_it_lacks():
    vector, norm = torch.tensor([0.5, 0.0, 0.0]), torch.tensor(4.0)  # 2 along the first axis
    states = torch.tensor(
        [[0.0, 3.0, 0.0], [1.0, 3.0, 0.0], [2.0, 3.0, 0.0], [5.0, 1.0, 0.0], [-9.0, 1.0, 0.0]]
    )
    moved = variants.fill(states, vector, norm)
    before = torch.tensor(
        [[2.0, 3.0, 0.0], [2.0, 3.0, 0.0], [2.0, 3.0, 0.0], [5.0, 1.0, 0.0], [-5.0, 1.0, 0.0]]
    )  # at most twice as much is added
    lengths = states.norm(dim=-1, keepdim=True)
    assert relative(moved, before * lengths / before.norm(dim=-1, keepdim=True)) <= 1e-6


@pytest.mark.parametrize("begin", [None, 0, 1])
@pytest.mark.parametrize("move", [variants.add, variants.rotate, variants.fill])
def test_what_is_steered_is_what_hooks_steer(material, move, begin):
    lm = material.lm
    items = [encoded(lm, W[:9], [W[10:14], W[20:23]]), encoded(lm, W[30:34], [W[35:37], W[40:45]])]
    vectors = 0.4 * material.of("gradient")
    variant = variants.Variant("it", lambda _: vectors, move, begin)
    found = variants.values(material, items, variant, vectors)
    bases = variants.values(material, items, variant, 0 * vectors)
    for item, steered, base in zip(items, found, bases, strict=True):
        prompt = item.prompt_ids
        for choice, response in enumerate(item.responses):

            def steer(output, layer, prompt=prompt):
                moved = move(output, vectors[layer], material.norms[layer])
                if begin is not None:
                    first = len(prompt) - 1 + begin
                    moved = torch.cat([output[:, :first], moved[:, first:]], dim=1)
                return moved

            changes = {
                module: partial(steer, layer=layer) for layer, module in enumerate(lm.layers)
            }
            with torch.no_grad(), hooked(changes):
                logits = lm.model(torch.tensor([prompt + response]), use_cache=False).logits[0]
            log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
            expected = log_probs.gather(-1, torch.tensor(response)[:, None]).sum().item()
            assert steered[choice] == approx(expected, abs=1e-3)
            assert abs(base[choice] - steered[choice]) > 0.01


def test_layers_that_are_not_steered_have_no_length(material):
    kept = variants.only([1, 3], "gradient", material).norm(dim=-1)
    assert kept.numpy() == approx([0, 1, 0, 1])


def test_vectors_without_what_neutral_text_is_sensitive_to(material):
    found = variants.without_sensitive("gradient", material)
    assert found.norm(dim=-1).numpy() == approx(1.0)
    for layer, gradients in enumerate(material.neutral[1].numpy()):
        _, _, main = np.linalg.svd(gradients)
        vector = material.of("gradient")[layer].numpy()
        assert abs(main[: variants.SENSITIVE] @ found[layer].numpy()).max() < 1e-5
        rest = main[variants.SENSITIVE :]
        expected = rest.T @ (rest @ vector)
        assert found[layer].numpy() == approx(expected / np.linalg.norm(expected), abs=1e-5)


@pytest.mark.parametrize("of", [0, 1])
def test_whitened_vectors(material, of):
    found = variants.whitened("gradient", of, material)
    for layer, rows in enumerate(material.neutral[of].double().numpy()):
        moment = rows.T @ rows / len(rows)
        moment += variants.RIDGE * np.trace(moment) / len(moment) * np.eye(len(moment))
        back = moment @ found[layer].double().numpy()
        vector = material.of("gradient")[layer].numpy()
        assert back / np.linalg.norm(back) == approx(vector, abs=1e-4)


def test_gradients_of_fewer_pairs_and_of_their_main_components(material):
    rows = material.example_gradients.numpy()
    half = rows[:, :15].mean(1)
    assert variants.of_half_the_pairs(material).numpy() == approx(
        half / np.linalg.norm(half, axis=1, keepdims=True), abs=1e-6
    )
    found = variants.main_components(material).numpy()
    for layer, each in enumerate(rows):
        main = np.linalg.svd(each)[2][: variants.COMPONENTS]
        expected = main.T @ (main @ each.mean(0))
        assert found[layer] == approx(expected / np.linalg.norm(expected), abs=1e-5)


def test_what_neutral_text_gives(material, monkeypatch):
    """Directions at every position but the first; gradients of the loss by finite differences."""
    lm = material.lm
    texts = [costs.continuation(lm, text) for text in ("The sea is wide and blue.", "Bees dance.")]
    monkeypatch.setattr(costs, "passages", lambda lm, split: texts)
    del material.__dict__["neutral"]
    states, gradients = material.neutral
    ids = texts[0].prompt_ids + texts[0].responses[0]
    with layer_outputs(lm) as own:
        own_logits(lm, ids)
    for layer in range(len(lm.layers)):
        expected = normalize(own[layer + 1][0, 1 : len(ids) - 1], dim=-1)
        assert relative(states[layer, : len(ids) - 2], expected) <= 1e-4
    layer, step = 1, 0.05
    moved = torch.zeros(lm.hidden_size)
    moved[3] = step

    def loss(sign: int) -> float:
        def change(output):
            changed = output.clone()
            changed[0, 2] += sign * moved
            return changed

        with torch.no_grad(), hooked({lm.layers[layer]: change}):
            log_probs = lm.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        return -log_probs.gather(-1, torch.tensor(ids[1:])[:, None]).sum().item()

    expected = (loss(1) - loss(-1)) / (2 * step)
    assert gradients[layer, 1, 3].item() == approx(expected, rel=0.05, abs=0.01)


def test_the_strength_of_a_cost(material, monkeypatch):
    lm = material.lm
    texts = [costs.continuation(lm, text) for text in ("The sea is wide and blue.", "Bees dance.")]
    monkeypatch.setattr(costs, "passages", lambda lm, split: texts)
    vectors = material.of("gradient")
    alpha = variants.strength(material, variants.PLAIN, vectors, 0.1)
    layers = tuple(range(len(lm.layers)))
    scaled = material.vectors["gradient"].scaled(alpha, list(layers))
    steered = Configuration("it", "", layers, alpha, scaled)
    before, after = perplexity(
        lm, [text.text + lm.tokenizer.decode(text.responses[0]) for text in texts], [steered], 64
    )
    assert after / before - 1 == approx(0.1, rel=0.1)
    with pytest.raises(UserError, match="at any strength"):
        variants.strength(material, variants.PLAIN, 0 * vectors, 0.1)


def test_layers_by_gain_over_cost(material):
    material.layer_costs = torch.tensor([1.0, 2.0, 4.0, 1.0])
    rows = material.example_gradients.double().numpy()
    first, second = rows[:, :15].mean(1), rows[:, 15:].mean(1)
    gains = [
        a @ b / np.linalg.norm(b) + a @ b / np.linalg.norm(a)
        for a, b in zip(first, second, strict=True)
    ]
    expected = np.maximum(gains, 0) * material.norms.numpy() / [1, 2, 4, 1]
    found = variants.by_gain_and_cost(material)
    assert found.norm(dim=-1).numpy() == approx(expected / expected.max(), abs=1e-5)
    assert max(gains) > 0
