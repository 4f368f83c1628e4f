"""The Python door against the stages' own functions, and what it refuses."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny
from helpers.families import tiny_model
from helpers.reference import no_hooks, relative
from safetensors.numpy import load_file

import grains
from grains import models, prompts, scoring, stage1, vectors
from grains.attribution import attribute
from grains.data import Example
from grains.errors import UserError
from grains.generation import generate
from grains.settings import NEED_ABLATION, STUDY_GRID, AblationSettings, AttributionSettings
from grains.states import StatesFile
from grains.steering import Configuration

PAIRS = tiny.QUESTIONS[:4]
STEPS = AblationSettings(AttributionSettings(ig_steps=3), top_k=2)


@pytest.fixture(scope="module")
def lm(tokenizer):
    return models.wrap("tiny-llama", tiny_model("llama"), tokenizer)


def example(number):
    question, chosen, rejected = PAIRS[number]
    return Example(f"pair {number}", question, (chosen, rejected), 0)


def test_attributions_are_those_of_stage_1(lm):
    found = grains.attribute(lm, *PAIRS[0], settings=STEPS.attribution)
    encoded = prompts.encode(lm, example(0))
    (expected,) = attribute(lm, encoded, STEPS.attribution, 2048, torch.Generator())
    assert np.array_equal(found.scores, expected.scores) and found.scores.any()
    assert found.completeness_error == expected.relative_error
    assert lm.tokenizer.convert_tokens_to_string(found.tokens) == f"Q: {PAIRS[0][0]}\nA:"
    assert not found.image.any()


@pytest.fixture(scope="module")
def states_of(lm, tmp_path_factory):
    """Selections -> the files of a stage 1 with these, which is run once."""

    @cache
    def run(*tops):
        folder = tmp_path_factory.mktemp("states")
        settings = AblationSettings(STEPS.attribution, tops, top_k=2, seed=3)
        files = {top: folder / f"{top}.safetensors" for top in tops}
        examples = [example(number) for number in range(len(PAIRS))]
        source = grains.settings.DataSettings("x")
        assert stage1.run(lm, examples, source, settings, folder / "a.csv", files)
        return {top: StatesFile(path) for top, path in files.items()}

    return run


@pytest.mark.parametrize("method", STUDY_GRID.methods)
def test_vectors_are_those_of_stage_1s_file(lm, states_of, method):
    mode = "both" if method in ("mean", "pca") else "pos"
    settings = AblationSettings(STEPS.attribution, top_k=2, seed=3)
    found = grains.fit(lm, PAIRS, method, mode=mode, settings=settings)
    # Alone, its random tokens are drawn first.
    tops = ("rand", "pos") if method == "rand_tokens" else ("pos", "neg", "rand")
    expected = vectors.make(states_of(*tops), method, mode, settings.seed)
    # Replayed in batches of other sizes, states differ by rounding.
    assert torch.allclose(found.vectors, expected.vectors, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found.norms, expected.norms, rtol=1e-5)
    assert found.info["method"] == method and found.vectors.norm(dim=1).min() > 1e-4


def test_states_without_attribution_give_what_needs_none(lm, tmp_path):
    """One file, which holds no ablated states; the same vectors as with them."""
    examples = [example(number) for number in range(len(PAIRS))]
    source = grains.settings.DataSettings("x")
    made = {}
    for grad_method, tops in (("vanilla", ("pos",)), ("none", ("pos",)), ("none", ("pos", "neg"))):
        settings = AblationSettings(AttributionSettings(grad_method=grad_method), tops, top_k=2)
        path = tmp_path / f"{grad_method}.safetensors"
        files = dict.fromkeys(tops, path)
        if len(tops) == 2:
            with pytest.raises(UserError, match="single file of states, pos"):
                stage1.run(lm, examples, source, settings, tmp_path / "b.csv", files)
            continue
        table = tmp_path / f"{grad_method}_table.csv"
        assert stage1.run(lm, examples, source, settings, table, files)
        made[grad_method] = {"pos": StatesFile(path, "pos")}
        rows = pd.read_csv(table)
        assert rows.id.tolist() == [item.id for item in examples]
        assert rows.f.to_numpy() == pytest.approx(
            [np.subtract(*grains.score(lm, item.question, item.choices)) for item in examples],
            abs=1e-4,
        )
    assert set(load_file(tmp_path / "none.safetensors")) == {
        "hidden_pos_response",
        "hidden_neg_response",
        "norms",
        "gradients",
    }
    for method in STUDY_GRID.methods:
        if method in NEED_ABLATION:
            with pytest.raises(UserError, match=f"without ablation, so they give no {method}"):
                vectors.make(made["none"], method, "pos", 0)
            continue
        found, expected = (vectors.make(states, method, "pos", 0) for states in made.values())
        # Computed in batches of other sizes, in float32.
        assert relative(found.vectors, expected.vectors) <= 5e-5
        assert relative(found.norms, expected.norms) <= 1e-5
    with pytest.raises(UserError, match="attributes nothing"):
        grains.attribute(lm, *PAIRS[0], settings=AttributionSettings(grad_method="none"))


@pytest.mark.parametrize("layers", [None, [-1], ["0-1"]])
def test_what_is_computed_inside_the_block_is_steered(lm, layers):
    made = grains.fit(lm, PAIRS, "gradient")
    question, *answers = tiny.QUESTIONS[5]
    base = grains.score(lm, question, answers)
    with made.apply(lm, 0.3, layers):
        steered = grains.score(lm, question, answers)
        text = grains.generate(lm, question, style="qa", max_new_tokens=6)
    encoded = prompts.encode(lm, Example("q", question, tuple(answers), 0))
    added = made.scaled(0.3, layers)
    item = Configuration("gradient", "", tuple(added), 0.3, added)
    expected = scoring.score(lm, [encoded], [item], 2048)[0]
    assert base == pytest.approx(expected[0], abs=1e-4)
    assert steered == pytest.approx(expected[1], abs=1e-4)
    assert np.abs(steered - base).max() > 0.01
    assert text == generate(lm, [encoded], [item], 6)[1][0]
    assert no_hooks(lm)


def test_several_prompts_at_a_time(lm):
    questions = [question for question, *_ in PAIRS]
    found = grains.generate(lm, questions, style="qa", max_new_tokens=5)
    alone = [grains.generate(lm, question, style="qa", max_new_tokens=5) for question in questions]
    assert found == alone and len(set(found)) > 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda lm: grains.fit(lm, PAIRS, "means"), "unknown method 'means'"),
        (lambda lm: grains.fit(lm, PAIRS, "pca", mode="neg"), "unknown mode 'neg'"),
        (lambda lm: grains.fit(lm, []), "no pairs are given"),
        (lambda lm: grains.fit(lm, [("a", "b")]), "expected three texts"),
        (lambda lm: grains.fit(lm, [("a", "b", 3)]), "expected three texts"),
        (lambda lm: grains.attribute(lm, "Is it?", "Yes", " "), "tokenizes to nothing"),
        (lambda lm: grains.attribute(lm, "a", "b", "c", style="letter"), "unknown prompt style"),
        (
            lambda lm: grains.attribute(
                lm, "a", "b", "c", settings=AttributionSettings(objective="normal")
            ),
            "compares two answers",
        ),
        (lambda lm: grains.fit(lm, PAIRS, "caa").apply(lm, float("nan")), "finite number"),
        (lambda lm: grains.fit(lm, PAIRS, "caa").apply(lm, 0.1, [0.5]), "whole numbers"),
    ],
)
def test_wrong_arguments_are_value_errors(lm, call, message):
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_nothing_else_is_in_the_door():
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        grains.train  # noqa: B018
    assert set(grains.__all__) <= {
        *dir(grains),
        "fit",
        "score",
        "attribute",
        "generate",
        "load",
        "stream",
        "SteeringVectors",
    }
