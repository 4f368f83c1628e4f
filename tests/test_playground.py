"""What the playground computes and shows, against the library; the page itself is tested in
test_playground_browser.py."""

from __future__ import annotations

import re
import threading
from html import unescape
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny, vlm_models

import grains
from grains.errors import UserError
from grains.playground import views
from grains.playground.bench import LARGEST_FILE, Bench, Curve, Question, Steering, table_pairs
from grains.steering import SteeringVectors

TEXTS = tiny.QUESTIONS[6]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def bench(lm):
    return Bench(lm, "qa", (), (), "gradient", "all", 0.2, 0.4)


@pytest.fixture(scope="module")
def steering(lm):
    directions = torch.randn(
        len(lm.layers), lm.hidden_size, generator=torch.Generator().manual_seed(3)
    )
    return Steering(
        SteeringVectors(directions, torch.full((len(lm.layers),), 40.0), {}), "1-2", "relative"
    )


def test_the_dose_response_is_what_score_gives(lm, bench, steering):
    question = Question(*TEXTS)
    response = bench.response(question, steering, 0.5)
    assert response.alphas.tolist() == pytest.approx([-0.5 + 0.1 * n for n in range(11)], abs=1e-9)
    for place in (0, 5, 9):
        alpha = float(response.alphas[place])
        scores = grains.score(lm, TEXTS[0], TEXTS[1:], steering=steering.vectors.at(alpha, ["1-2"]))
        assert response.margins[place] == pytest.approx(scores[0] - scores[1], abs=1e-3)
    plain = grains.score(lm, TEXTS[0], TEXTS[1:])
    assert response.margins[5] == pytest.approx(plain[0] - plain[1], abs=1e-3)
    assert np.ptp(response.margins) > 0.1
    middle = response.margins[8:10].mean()
    assert response.at(0.35) == pytest.approx(middle)


def test_answers_grow_to_what_generate_gives(lm, bench, steering):
    texts = list(bench.answers(Question(*TEXTS), steering, 0.6, 12))
    assert len(texts) == 12 and texts[-1][0] != texts[-1][1]
    for before, after in pairwise(texts):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    configuration = steering.vectors.at(0.6, ["1-2"])
    assert texts[-1] == [
        grains.generate(lm, TEXTS[0], style="qa", max_new_tokens=12, steering=item)
        for item in (None, configuration)
    ]


@pytest.mark.slow
def test_answers_to_a_picture_grow_too(monkeypatch):
    """They are written in a thread, which the caller's block steers as well."""
    lm = vlm_models.make("qwen2.5-vl")
    picture, asked = vlm_models.picture(60, 40), "What is it?"
    shape = len(lm.layers), lm.hidden_size
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    v = SteeringVectors(directions, torch.full(shape[:1], 40.0), {})
    more = {"image": picture, "style": "chat", "max_new_tokens": 10}
    configuration = v.at(0.6, ["1-2"], positions="image")
    expected = [grains.generate(lm, asked, steering=s, **more) for s in (None, configuration)]
    texts = list(grains.stream(lm, asked, [configuration], **more))
    assert len(texts) == 10 and texts[-1] == expected and expected[0] != expected[1]
    for before, after in pairwise(texts):
        assert all(new.startswith(old.rstrip()) for old, new in zip(before, after, strict=True))

    threads = threading.active_count()
    with v.apply(lm, 0.6, ["1-2"]):
        inside = grains.generate(lm, asked, **more)
        stream = grains.stream(lm, asked, **more)
        first = next(stream)
        assert inside.startswith(first[0]) and first != [inside]
        stream.close()  # as when the page is left
        assert threading.active_count() == threads
        assert [*grains.stream(lm, asked, **more)][-1] == [inside] != expected[:1]
    assert not any(layer._forward_hooks for layer in lm.layers)

    def broken(*args, **kwargs):
        raise ZeroDivisionError("in the model")

    monkeypatch.setattr(lm.model, "generate", broken)
    with pytest.raises(ZeroDivisionError, match="in the model"):
        next(grains.stream(lm, asked, **more))
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "texts, line",
    [
        (("", "a", "b"), "the prompt is empty: write one"),
        (("q", "\n", "b"), "the preferred answer is empty: write one"),
        (("q", "a", " a"), "the two answers are the same: write two that differ"),
    ],
)
def test_a_question_that_is_none(texts, line):
    with pytest.raises(UserError) as error:
        Question(*texts)
    assert str(error.value) == line


def test_a_picture_of_many_bytes(tmp_path):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(UserError, match="16 MiB: give one of at most 16 MiB"):
        Question("q", "a", "b", str(path))


@pytest.mark.parametrize("reach", [None, 0.0, -1.0, float("nan"), float("inf")])
def test_a_reach_that_is_none(bench, steering, reach):
    with pytest.raises(UserError, match=r"the largest strength is .*: give a number above 0"):
        bench.response(Question(*TEXTS), steering, reach)


def test_vectors_of_a_file(lm, bench, tmp_path):
    norms = torch.ones(len(lm.layers))
    for size, known in ((lm.hidden_size, True), (lm.hidden_size + 1, False)):
        path = tmp_path / f"{size}.safetensors"
        SteeringVectors(torch.ones(len(lm.layers), size), norms, {}).save(path)
        if known:
            assert bench.load(str(path)).vectors.shape == (len(lm.layers), size)
            continue
        with pytest.raises(UserError, match=f"of size {size}"):
            bench.load(str(path))
    with pytest.raises(UserError, match="no file is given"):
        bench.load(None)


def test_pairs_of_a_table():
    rows = [["q", " a", "b"], ["", None, ""], [1, 2, 3]]
    assert table_pairs(rows) == [("q", "a", "b"), ("1", "2", "3")]
    with pytest.raises(UserError, match="pair 2: a text is missing"):
        table_pairs([["q", "a", "b"], ["q", "a", ""]])
    with pytest.raises(UserError, match="no pair"):
        table_pairs([["", "", ""]])


def plain(html: str) -> str:
    return unescape(re.sub("<[^>]*>", "", html))


def test_words_are_those_of_the_prompt_on_their_colours(lm, bench):
    prompt = "Is <b>glass</b> a slow & cold liquid?"
    scored = bench.attribute(Question(prompt, *TEXTS[1:]))
    shown = views.attribution(scored, None)
    words = re.search(r'<p class="g-words"[^>]*>(.*?)</p>', shown, re.DOTALL)[1]
    assert plain(words).strip() == prompt
    assert "<b>" not in shown
    shares = [float(share) for share in re.findall(r"--s:([\d.]+)", words)]
    signs = [sign == "pos" for sign in re.findall(r"g-(pos|neg)", words)]
    largest = np.abs(scored.scores).max()
    expected = scored.scores[scored.scores != 0] / largest
    assert len(shares) == len(expected)
    assert np.abs(np.array(shares) - np.abs(expected)).max() < 6e-4
    assert signs == (expected > 0).tolist()
    assert f"sum to {views.number(scored.scores.sum())}" in shown
    assert f"completeness error {100 * scored.completeness_error:.1f}" in shown


@pytest.mark.slow
def test_patches_lie_where_the_boxes_are(lm):
    vlm = vlm_models.make("gemma-3")
    picture = vlm_models.picture(60, 40)
    scored = grains.attribute(vlm, "What is it?", "A dot", "A line", image=picture, style="chat")
    assert len(scored.boxes) == int(scored.image.sum()) > 0
    shown = views.attribution(scored, picture)
    patches = re.findall(
        r"--s:([\d.]+);left:([\d.]+)%;top:([\d.]+)%;width:([\d.]+)%;height:([\d.]+)%", shown
    )
    assert len(patches) == len(scored.boxes)
    largest = np.abs(scored.scores[scored.image]).max()
    assert f", in the picture at ±{largest:.2f}" in shown
    for patch, box, score in zip(patches, scored.boxes, scored.scores[scored.image], strict=True):
        share, left, top, width, height = map(float, patch)
        assert share == pytest.approx(abs(score) / largest, abs=6e-4)
        x0, y0, x1, y1 = box
        expected = 100 * x0 / 60, 100 * y0 / 40, 100 * (x1 - x0) / 60, 100 * (y1 - y0) / 40
        assert (left, top, width, height) == pytest.approx(expected, abs=0.01)


def test_differences_are_marked_and_escaped():
    shown = views.answers(("The <i>sun</i> is hot.", "The <i>moon</i> is hot."), -0.25)
    assert "<del>&lt;i&gt;sun&lt;/i&gt;</del>" in shown
    assert "<ins>&lt;i&gt;moon&lt;/i&gt;</ins>" in shown
    assert "steered at \N{MINUS SIGN}0.25" in shown
    assert plain(shown).endswith("The <i>moon</i> is hot.")


def test_the_curve_is_marked_at_the_strength():
    curve = Curve(np.array([-1.0, 0.0, 1.0]), np.array([-2.0, 0.0, 6.0]))
    shown = views.curve(curve, 0.5)
    assert 'aria-label="margin +3.00 at strength 0.5"' in shown
    points = re.search(r'points="([^"]*)"', shown)[1].split()
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split(",")] for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and (y0 - y1) * 3 == pytest.approx(
        y1 - y2, abs=0.4
    )
    mark = re.search(r'<circle class="g-mark" cx="([\d.]+)" cy="([\d.]+)"', shown)
    assert float(mark[1]) == pytest.approx((x1 + x2) / 2, abs=0.2)
    assert float(mark[2]) == pytest.approx((y1 + y2) / 2, abs=0.2)
    assert "margin +6.00 at strength 1" in views.curve(curve, 7.0)  # at its end
    flat = views.curve(Curve(curve.alphas, np.zeros(3)), 0.0)
    assert "nan" not in flat and "margin +0.00" in flat


@pytest.mark.parametrize(
    "info, line",
    [
        ({}, "Vectors: made by hand; 2 layers."),
        ({"method": "<b>", "data": "faitheval"}, "Vectors: <b>; 2 layers."),
        (
            {"method": "pca", "mode": "both", "data": {"num_samples": 1}},
            "Vectors: pca both, 1 pair; 2 layers.",
        ),
    ],
)
def test_vectors_are_named(info, line):
    shown = views.vectors(SteeringVectors(torch.ones(2, 4), torch.ones(2), info))
    assert plain(shown) == line and "<b>" not in shown
