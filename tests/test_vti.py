"""Visual and textual intervention, against a short computation of its own."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import vlm_models
from helpers.reference import relative

import grains
from grains import models, prompts, scoring, tower, vision, vti
from grains.calls import first_tensor, with_first
from grains.errors import UserError
from grains.export import plan
from grains.generation import generate, stream
from grains.replay import extend
from grains.serve.steering import Vectors
from grains.settings import EXPORTS, GridSettings, StudySettings
from grains.steering import SteeringVectors, TowerVectors, steered
from grains.study.evaluate import identity

COPIES, COUNT, SEED = 2, 4, 0
SIZES = ((60, 40), (60, 40), (40, 70), (90, 30))  # LLaVA-NeXT cuts them into 2 to 4 tiles


def pairs_of(count=COUNT, sizes=SIZES):
    return [
        vlm_models.asked(
            vlm_models.picture(*sizes[number % len(sizes)], seed=number),
            f"What is on table {number}?",
            (f"{number} red cups", "A dog, I think"),
            id=str(number),
        )
        for number in range(count)
    ]


@cache
def made_once(family):
    if family == "shapes":  # the embedded model
        folder = Path(__file__).parents[1] / "src" / "demo" / "shapes_vlm"
        return models.load(str(folder), dtype="float32", device="cpu")
    return vlm_models.make(family)


@pytest.fixture(scope="module", params=[*vlm_models.FAMILIES, "shapes"])
def lm(request):
    return made_once(request.param)


@pytest.fixture(scope="module")
def llava():
    return made_once("llava-next")


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(vti, "COPIES", COPIES)


@pytest.fixture(scope="module")
def fitted():
    """Vectors by the name of their model."""
    made: dict[str, SteeringVectors] = {}

    def fit(lm):
        if lm.name not in made:
            made[lm.name] = grains.fit(lm, pairs_of(), "vti")
        return made[lm.name]

    return fit


def untouched(lm):
    """Whether no hook is left but those by which transformers notes states, nor a forward."""
    modules = list(lm.model.modules())
    names = {hook.__name__ for module in modules for hook in module._forward_hooks.values()}
    return names <= {"output_capturing_hook"} and not any("forward" in m.__dict__ for m in modules)


def own_tower(lm):
    """The tower's layers by their name in each family."""
    model = lm.model.model
    return list(
        model.visual.blocks if hasattr(model, "visual") else model.vision_tower.encoder.layers
    )


def states_by_hand(lm, picture):
    """The output of each of the tower's layers in the model's own forward with a question."""
    item = prompts.encode(lm, vlm_models.asked(picture), "chat")
    read = []
    handles = [
        layer.register_forward_hook(lambda m, args, out: read.append(first_tensor(out).numpy()))
        for layer in own_tower(lm)
    ]
    with torch.no_grad():
        lm.model.model(**item.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return [states.astype(float) for states in read]


def first_direction(rows):
    """Of rows as they are, not centred; and how far rounding may turn it, which is the more, the
    closer the second direction is."""
    _, sizes, directions = np.linalg.svd(rows)
    return directions[0] * np.sign(directions[0] @ rows.mean(0)), 1e-4 / (
        1 - (sizes[1] / sizes[0]) ** 2
    )


@contextmanager
def moved(modules, vectors):
    """Modules that return h' in place of h, by forwards of their own: no hooks."""

    def forward(module, vector):
        own = module.forward

        def moved(*args, **kwargs):
            output = own(*args, **kwargs)
            h = first_tensor(output)
            h2 = h + vector
            return with_first(
                output, h2 * h.norm(dim=-1, keepdim=True) / h2.norm(dim=-1)[..., None]
            )

        return moved

    for module, vector in zip(modules, vectors, strict=True):
        module.forward = forward(module, vector)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def by_hand(lm, made, alpha):
    """The tower's and the decoder's layers moved by vectors of a strength in relative units."""

    def added(vectors, norms):
        unit = vectors / vectors.norm(dim=-1, keepdim=True)
        return [alpha * norm * vector for norm, vector in zip(norms, unit, strict=True)]

    seen = added(made.tower.vectors, made.tower.norms)
    return moved([*own_tower(lm), *lm.layers], [*seen, *added(made.vectors, made.norms)])


def log_likelihoods(lm, item):
    """log P of each response by the model's own forward."""
    values = []
    for response in item.responses:
        with torch.no_grad():
            logits = lm.model(**extend(item.inputs, response, lm.marks_prompts)).logits[0].float()
        own = logits[len(item.prompt_ids) - 1 : -1].log_softmax(-1)
        values.append(own[range(len(response)), response].sum().item())
    return np.array(values)


# --- vectors ---


def test_a_masked_copy_shows_few_cells_of_the_picture():
    picture = vlm_models.picture(120, 72)
    first, again, second = (vti.masked(picture, np.random.default_rng(s)) for s in (1, 1, 2))
    pixels, blank = np.asarray(picture), np.asarray(vision.blank_like(picture))
    changed = np.asarray(first)
    is_blank = (changed == blank).all(-1)
    assert ((changed == pixels).all(-1) | is_blank).all()
    hidden = is_blank.reshape(24, 3, 24, 5).all((1, 3))  # 24 x 24 cells of 3 x 5 pixels
    assert hidden.sum() == round(0.99 * 576) and (~is_blank).sum() == 6 * 15
    assert np.array_equal(changed, np.asarray(again))
    assert not np.array_equal(changed, np.asarray(second))


def test_the_towers_layers_are_found(lm):
    assert list(tower.layers(lm)) == own_tower(lm) and untouched(lm)


def test_vectors_of_the_tower_are_first_directions_of_the_shifts(lm, fitted):
    """By hooks in the model's own forward, and NumPy's SVD for each layer and patch."""
    made = fitted(lm).tower
    shifts, lengths = [], []
    for number, pair in enumerate(pairs_of()):
        generator = np.random.default_rng(SEED * 1_000_003 + number)
        own = states_by_hand(lm, pair.image)
        copies = [states_by_hand(lm, vti.masked(pair.image, generator)) for _ in range(COPIES)]
        lengths.append([np.median(np.linalg.norm(states, axis=-1)) for states in own])
        shift = [
            np.mean([copy[layer] for copy in copies], axis=0) - states
            for layer, states in enumerate(own)
        ]
        # Of the tiles the mean; Qwen's patches, as many as the picture has, are averaged too.
        shifts.append(
            [rows.mean(0, keepdims=True) if rows.ndim == 2 else rows.mean(0) for rows in shift]
        )
    rows = np.array(shifts)  # (N, Lv, T, Dv)
    assert made.vectors.shape == rows.shape[1:]
    assert relative(made.norms, np.sort(lengths, axis=0)[(COUNT - 1) // 2]) < 1e-2
    for layer, patch in np.ndindex(rows.shape[1:3]):
        own = rows[:, layer, patch]
        expected, allowed = first_direction(own)
        assert relative(made.vectors[layer, patch], expected) < allowed, (layer, patch)


def test_vectors_of_the_decoder_are_first_directions_of_the_differences(lm, fitted):
    """At the last position of the model's own forward with each response, layer by layer."""
    made = fitted(lm)
    read = []
    for pair in pairs_of():
        item = prompts.encode(lm, pair)
        for response in item.responses:
            outputs = []
            handles = [
                layer.register_forward_hook(
                    lambda m, args, out, kept=outputs: kept.append(first_tensor(out)[0, -1])
                )
                for layer in lm.layers
            ]
            with torch.no_grad():
                lm.model.model(**extend(item.inputs, response, lm.marks_prompts), use_cache=False)
            for handle in handles:
                handle.remove()
            read.append(torch.stack(outputs).double().numpy())
    differences = np.array(read[::2]) - np.array(read[1::2])  # (N, L, D)
    for layer in range(len(lm.layers)):
        expected, allowed = first_direction(differences[:, layer])
        assert relative(made.vectors[layer], expected) < allowed, layer
    assert torch.equal(made.norms, grains.fit(lm, pairs_of(), "caa").norms)
    assert made.info["tower"] == {"hidden": 0.99, "copies": COPIES, "cells": 24}


# --- steering ---


def test_scores_are_those_of_moved_layers(lm, fitted):
    """Several strengths beside a configuration without a tower, two questions in a batch."""
    made = fitted(lm)
    half = replace(made, vectors=torch.zeros_like(made.vectors))
    plain = replace(made, tower=None)
    items = [prompts.encode(lm, pair, "chat") for pair in pairs_of(6)[4:]]
    tried = [made.at(0.2), plain.at(0.2), half.at(0.2), made.at(0.2, layers=[1])]
    scores = scoring.score_all(lm, items, tried, 4096)
    for item, rows in zip(items, scores, strict=True):
        with by_hand(lm, made, 0.2):
            assert rows[1] == pytest.approx(log_likelihoods(lm, item), abs=2e-3)
        assert min(np.abs(rows[a] - rows[b]).max() for a, b in ((1, 2), (1, 3), (0, 3))) > 0.05
        assert np.abs(rows[4] - rows[1]).max() > 0.05
    item, rows = items[0], scores[0]
    assert rows[0] == pytest.approx(log_likelihoods(lm, item), abs=2e-3)
    with steered(lm, plain.scaled(0.2)):
        assert rows[2] == pytest.approx(log_likelihoods(lm, item), abs=2e-3)
    with made.apply(lm, 0.2, layers=[1]):
        assert rows[4] == pytest.approx(log_likelihoods(lm, item), abs=2e-3)
    assert untouched(lm)


def test_answers_are_those_of_moved_layers(llava, fitted):
    """Base and steered answers of two prompts, from batches that differ in their towers."""
    made = fitted(llava)
    plain = replace(made, tower=None)
    items = [
        prompts.encode(llava, vlm_models.asked(picture, choices=()), "chat", free=True)
        for picture in (vlm_models.picture(*size, seed=9) for size in SIZES[1:3])
    ]
    base, first, second = generate(llava, items, [made.at(0.3), plain.at(0.3)], 2)

    def greedy(item):
        ids = []
        for _ in range(2):
            with torch.no_grad():
                inputs = extend(item.inputs, ids)
                ids.append(int(llava.model(**inputs, use_cache=False).logits[0, -1].argmax()))
        return llava.tokenizer.decode(ids, skip_special_tokens=True).strip()

    assert base == [greedy(item) for item in items]
    with by_hand(llava, made, 0.3):
        assert first == [greedy(item) for item in items]
    with steered(llava, plain.scaled(0.3)):
        assert second == [greedy(item) for item in items]
    assert first != second and untouched(llava)


def test_a_file_holds_the_tower(llava, fitted, tmp_path):
    made = fitted(llava)
    made.save(tmp_path / "vti.safetensors")
    again = SteeringVectors.load(tmp_path / "vti.safetensors")
    assert torch.equal(again.tower.vectors, made.tower.vectors) and again.info == made.info
    ask = {"prompt": "What?", "answers": ["Two", "A dog"], "image": vlm_models.picture(50, 50)}
    scores = [grains.score(llava, **ask, steering=vectors.at(0.2)) for vectors in (made, again)]
    with again.apply(llava, 0.2):
        scores.append(grains.score(llava, **ask))
    assert np.array_equal(scores[0], scores[1]) and scores[2] == pytest.approx(scores[0], abs=1e-3)


def test_kept_scores_know_the_tower(llava, fitted):
    """Of configurations of one label, an experiment takes none for another."""
    made = fitted(llava)
    moved_on = TowerVectors(-made.tower.vectors, made.tower.norms)
    ways = made, replace(made, tower=None), replace(made, tower=moved_on)
    identities = [identity(vectors.at(0.2)) for vectors in ways]
    assert len({*identities}) == 3 and identities[0] == identity(made.at(0.2))


def test_text_alone_passes_no_tower(llava, fitted):
    made = fitted(llava)
    plain = replace(made, tower=None)
    ask = {"prompt": "What?", "answers": ["Two", "A dog"]}
    with_tower, without = (grains.score(llava, **ask, steering=v.at(0.2)) for v in (made, plain))
    assert np.array_equal(with_tower, without)


# --- what cannot be ---


def test_pictures_of_several_sizes_share_a_vector_where_patches_differ(monkeypatch, llava):
    """A tower whose patches are as many as the picture has: one direction for all of them."""
    drawn = np.random.default_rng(0).normal(size=(3, 2, 6, 5))

    def shift(lm, picture, seed):
        rows = torch.from_numpy(drawn[seed, :, : 4 + seed]).float()
        return rows, torch.ones(2)

    monkeypatch.setattr(vti, "shift", shift)
    made = vti.make(llava, pairs_of(3), 0)
    rows = np.array([drawn[i, :, : 4 + i].mean(1) for i in range(3)])
    for layer in range(2):
        expected, _ = first_direction(rows[:, layer])
        assert made.vectors.shape == (2, 1, 5)
        assert made.vectors[layer, 0].numpy() == pytest.approx(expected, abs=1e-5)


def test_another_number_of_patches_is_refused(llava, fitted):
    made = fitted(llava)
    short = TowerVectors(made.tower.vectors[:, :5], made.tower.norms)
    with pytest.raises(UserError, match="for pictures of 5 patches, and this one has 17"):
        grains.score(
            llava,
            "What?",
            ["Two", "A dog"],
            image=vlm_models.picture(50, 50),
            steering=replace(made, tower=short).at(0.2),
        )
    assert untouched(llava)


def test_a_model_or_an_example_without_pictures_is_refused(make_tiny, llava):
    texts = [("Is it?", "Yes, it is", "No"), ("Was it?", "It was", "Never")]
    with pytest.raises(UserError, match="reads text only"):
        tower.layers(make_tiny("llama"))
    for model in (make_tiny("llama"), llava):
        with pytest.raises(UserError, match="pair 1 has no picture"):
            grains.fit(model, texts, "vti")


def test_what_has_no_vision_tower_refuses_it(llava, fitted):
    made = fitted(llava)
    with pytest.raises(UserError, match="every patch"):
        made.at(0.1, positions="response")
    for combine in (lambda: made + made, lambda: -made, made.fix, lambda: made.without(made)):
        with pytest.raises(UserError, match="cannot be combined"):
            combine()
    gate = grains.steering.Gate(torch.zeros_like(made.vectors), torch.zeros_like(made.norms))
    with pytest.raises(UserError, match="cannot be behind a gate"):
        replace(made, gate=gate)
    for to in EXPORTS:
        with pytest.raises(UserError, match="no target holds"):
            plan.make(llava, made, to, 0.1)
    with pytest.raises(UserError, match="reads text only"):
        Vectors(llava, {"seen": made})
    item = prompts.encode(llava, vlm_models.asked(vlm_models.picture(50, 50)), "chat")
    with pytest.raises(UserError, match="cannot be streamed"):
        next(stream(llava, item, [made.at(0.1)], 4))
    for changes in ({"gate": True}, {"positions": "image"}):
        with pytest.raises(UserError, match="method vti steers the vision tower"):
            GridSettings(("caa", "vti"), **changes)
    grid = GridSettings(("vti",))
    with pytest.raises(UserError, match="gated: vti"):
        replace(StudySettings((), (0,), grains.settings.AblationSettings(), grid), gated=("vti",))
