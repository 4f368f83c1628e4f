"""Shifts of attention heads (iti, nl_iti), against a short computation of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.reference import encoded, own_logits, relative, words
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import grains
from grains import heads
from grains.errors import UserError
from grains.scoring import score
from grains.settings import OF_HEADS

W = words(60, seed=7)
COUNT = 6


@pytest.fixture(params=["llama", "gemma3"])
def lm(make_tiny, request):
    return make_tiny(request.param, num_hidden_layers=2)


@pytest.fixture
def pairs(lm):
    return [encoded(lm, W[i : i + 4], [W[20 + i : 23 + i], W[40 + i : 42 + i]]) for i in range(6)]


def by_hand(lm, pairs, last=1):
    """(N, 2, L, H, d) what enters every `o_proj` at the end, read in the model's own forward: the
    mean of the last positions."""
    rows = []
    for item in pairs:
        for response in item.responses:
            seen = []
            hooks = [
                layer.self_attn.o_proj.register_forward_hook(
                    lambda module, args, output, seen=seen: seen.append(
                        args[0][0, -last:].sum(0) / last
                    )
                )
                for layer in lm.layers
            ]
            own_logits(lm, item.prompt_ids + response)
            for hook in hooks:
                hook.remove()
            rows.append(torch.stack(seen))
    each = lm.model.config.get_text_config().num_attention_heads
    return torch.stack(rows).reshape(len(pairs), 2, len(lm.layers), each, -1).numpy()


def test_heads_outputs_are_the_models_own(lm, pairs):
    found, expected = heads.outputs(lm, pairs, 1)[0].numpy(), by_hand(lm, pairs)
    assert found.shape == expected.shape and relative(found, expected) < 5e-5


def test_probes_are_scored_on_pairs_left_out(lm, pairs):
    """One head by hand: both folds, no pair in both."""
    rows = heads.outputs(lm, pairs, 1)[0].double().numpy()
    accuracy = heads.probe_accuracy(rows, seed=0)
    assert accuracy.shape == rows.shape[2:4] and len({*accuracy.flat}) > 1
    from sklearn.model_selection import GroupKFold

    splits = GroupKFold(2, shuffle=True, random_state=0)
    groups = np.repeat(range(COUNT), 2)
    head = rows[:, :, 1, 0].reshape(2 * COUNT, -1)
    right = []
    for train, test in splits.split(head, groups=groups):
        assert not {*groups[train]} & {*groups[test]}
        scaler = StandardScaler().fit(head[train])
        probe = LogisticRegression(max_iter=1000).fit(scaler.transform(head[train]), 1 - train % 2)
        right.append((probe.predict(scaler.transform(head[test])) == 1 - test % 2).mean())
    assert accuracy[1, 0] == pytest.approx(np.mean(right))


def test_several_last_positions_are_averaged(lm, pairs):
    four, six = heads.outputs(lm, pairs, 4, 6).numpy()
    assert relative(four, by_hand(lm, pairs, 4)) < 5e-5
    assert relative(six, by_hand(lm, pairs, 6)) < 5e-5


def test_probes_with_a_hidden_layer_see_what_a_line_does_not():
    """y+ on both sides of y-: no line tells them apart, and the second head is noise to both."""
    noise = np.random.default_rng(0)
    heads_of = noise.normal(size=(40, 2, 1, 2, 3))
    heads_of[:, 0, 0, 0, 0] = 4 * noise.choice([-1, 1], 40)
    heads_of[:, 1, 0, 0, 0] = 0
    linear, hidden = (heads.probe_accuracy(heads_of, 0, layer)[0] for layer in (False, True))
    assert linear[0] < 0.7 and hidden[0] > 0.9 and hidden[1] < 0.7
    assert np.array_equal(hidden, heads.probe_accuracy(heads_of, 0, True)[0])


@pytest.mark.parametrize("method, last", [("iti", 1), ("nl_iti", 6)])
def test_vectors_are_what_shifted_heads_add(lm, pairs, monkeypatch, method, last):
    """All heads chosen: o_proj of shifted outputs minus o_proj of the outputs, in every layer."""
    monkeypatch.setattr(heads, "SHARE", 1.0)
    vectors, places = heads.make(lm, pairs, 0, method)
    rows = by_hand(lm, pairs, last).astype(float)
    assert len(places) == rows.shape[2] * rows.shape[3] and [1, 0] in places
    for layer in range(rows.shape[2]):
        moved = []
        for head in range(rows.shape[3]):
            true, false = rows[:, 0, layer, head], rows[:, 1, layer, head]
            unit = true.mean(0) - false.mean(0)
            unit /= np.linalg.norm(unit)
            moved.append(np.std(np.concatenate([true, false]) @ unit) * unit)
        shift = torch.from_numpy(np.concatenate(moved)).float()
        before = torch.from_numpy(rows[0, 0, layer].reshape(-1)).float()
        map_ = lm.layers[layer].self_attn.o_proj
        with torch.no_grad():
            added = map_(before + shift) - map_(before)
        assert relative(vectors[layer], added) < 1e-3  # a difference in fp32


def test_the_best_heads_alone_are_shifted(lm, pairs, monkeypatch):
    accuracy = np.zeros((len(lm.layers), heads.count(lm)))
    accuracy[1, 1] = 0.9
    monkeypatch.setattr(heads, "probe_accuracy", lambda rows, seed, hidden: accuracy)
    vectors, places = heads.make(lm, pairs, seed=0)
    assert places == [[1, 1]]  # of so few heads, 48 of 1,024 are one
    assert vectors[1].norm() > 0 and not vectors[[0, *range(2, len(vectors))]].any()


@pytest.mark.parametrize("method", OF_HEADS)
def test_shifts_of_heads_are_methods_like_the_others(lm, method):
    made = grains.fit(lm, tiny.QUESTIONS[:4], method)
    assert made.info["method"] == method and len(made.info["heads"]) >= 1
    layers = [layer for layer, vector in enumerate(made.vectors) if vector.any()]
    assert {layer for layer, _ in made.info["heads"]} == {*layers}
    item = encoded(lm, W[:5], [W[20:23], W[30:32]])
    base, steered = score(lm, [item], [made.at(2.0, units="absolute")], 64)[0]
    assert np.abs(base - steered).max() > 1e-3


def test_a_model_of_unknown_heads_is_refused(make_tiny, lm):
    with pytest.raises(UserError, match="two pairs or more"):
        grains.fit(lm, tiny.QUESTIONS[:1], "iti")
    other = make_tiny("llama")
    layer = other.layers[0].self_attn
    layer.mix, layer.o_proj = layer.o_proj, None
    try:
        with pytest.raises(UserError, match="heads are not known"):
            heads.projections(other)
    finally:
        layer.o_proj = layer.mix
        del layer.mix
