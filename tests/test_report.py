"""The report: its numbers are those of the tables, texts come out as they went in, missing parts
are said to be missing, and a file that is not what its name says is a user's mistake."""

from __future__ import annotations

import io
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pandas as pd
import pytest
from helpers import tiny
from helpers.report_page import Page, page_of, plain
from helpers.results import (
    BUDGETS,
    MODEL,
    NASTY,
    SCRIPTS,
    STEM,
    VERSIONS,
    attribution_rows,
    picture_results,
    some,
    write_attributions,
    write_evaluation,
    write_front,
    write_generations,
)
from matplotlib.figure import Figure
from PIL import Image

from demo import text_figure
from grains import readable, runs
from grains.errors import UserError
from grains.export import harness
from grains.judge import generations
from grains.readable import word_difference
from grains.report import figures
from grains.report import page as report
from grains.report.tables import over_seeds
from grains.settings import METHODS

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line", "helpers.everything")


# --- numbers ---


CHANCE = "which is not significant"
GAIN, LOSS = "a significant gain", "a significant loss"
CHOSEN = "Base, the chosen configuration and its controls"


def wilson(right: int, count: int) -> str:
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    return f"{100 * p:.1f} % [{100 * (middle - half):.1f}, {100 * (middle + half):.1f}]"


def test_main_table_by_hand(tmp_path):
    # Per token 0, 5, 10, ... are wrong: 4 of the 16, 6 of the 30, 4 of the 20.
    write_evaluation(
        tmp_path,
        {
            "base": some(16),
            "mean pos@0.1": some(16),
            "mean pos@0.2": some(30),
            "random@0.2": some(20),
            "random@0.1": some(40),
        },
        best="mean pos@0.2",
    )
    page = page_of(tmp_path)
    # How far the preferred answer leads, right and wrong: 5 and -1 in sum, 1 and -3 per token; of
    # every fifth question that is right in sum 1 and -1.
    assert page.tables()[CHOSEN] == {
        "base": [
            wilson(12, 40),
            "",
            wilson(16, 40),
            "",
            f"{(12 - 4 - 24 * 3) / 40:+.2f}",
            f"{(12 * 5 + 4 - 24) / 40:+.2f}",
        ],
        "steered (chosen) mean pos @ 1-2 x 0.2": [
            wilson(24, 40),
            f"{2 / 2**12:.2g}",
            wilson(30, 40),
            f"{2 / 2**14:.2g}",
            f"{(24 - 6 - 10 * 3) / 40:+.2f}",
            f"{(24 * 5 + 6 - 10) / 40:+.2f}",
        ],
        "control: random random @ 1-2 x 0.2": [
            wilson(16, 40),
            f"{2 / 2**4:.2g}",
            wilson(20, 40),
            f"{2 / 2**4:.2g}",
            f"{(16 - 4 - 20 * 3) / 40:+.2f}",
            f"{(16 * 5 + 4 - 20) / 40:+.2f}",
        ],
    }
    assert (
        "On 40 test questions, steering with mean pos @ 1-2 x 0.2 changes per-token accuracy "
        "from 30.0 % to 60.0 %, a significant gain "
        f"(p = {2 / 2**12:.2g}) and summed accuracy from 40.0 % to 75.0 %, a significant gain "
        f"(p = {2 / 2**14:.2g})."
    ) in page.text
    # 8 questions right per token when steered and not under the control, none the other way.
    assert (
        "The control at the same layers and strength, random, reaches 40.0 % (per-token); the "
        f"difference of +20.0 points between steering and it is significant "
        f"(p = {2 / 2**8:.2g})."
    ) in page.text
    assert set(page.tables()["All configurations, test questions"]) == {
        "base",
        "mean pos @ 1-2 x 0.1",
        "mean pos @ 1-2 x 0.2",
        "random @ 1-2 x 0.1 (control)",
        "random @ 1-2 x 0.2 (control)",
    }
    assert "4 validation questions" in page.text


@pytest.mark.parametrize(
    ("base", "steered", "token", "summed"),
    [
        (some(16), some(18), CHANCE, CHANCE),
        (some(30), some(16), LOSS, LOSS),
        # summed 16 to 21 gained, p = 2 / 2 ** 6; per token 20 is not, p = 2 / 2 ** 5
        (some(16), some(22), CHANCE, GAIN),
        # as many right, others: no gain whatever p
        (some(16), some(16, first=20), CHANCE, CHANCE),
    ],
)
def test_verdicts(tmp_path, base, steered, token, summed):
    write_evaluation(tmp_path, {"base": base, "mean pos@0.1": steered}, best="mean pos@0.1")
    said = page_of(tmp_path).text
    for title, told in (("per-token", token), ("summed", summed)):
        assert re.search(rf"{title} accuracy from [\d.]+ % to [\d.]+ %, {told} \(p = ", said)


def test_a_control_that_gains_as_much_is_said(tmp_path):
    write_evaluation(
        tmp_path,
        {
            "base": some(16),
            "mean pos@0.2": some(30),
            "random@0.2": some(10),
            "rand_tokens@0.2": some(30, first=1),
        },
        best="mean pos@0.2",
    )
    assert (
        "The strongest control at the same layers and strength, rand_tokens, reaches 60.0 % "
        "(per-token); the difference of +0.0 points between steering and it is not "
        "significant (p = 1)."
    ) in page_of(tmp_path).text


@pytest.mark.parametrize("score", ["mc1", "mc2"])
def test_a_choice_by_a_score_that_the_page_lacks(tmp_path, score):
    """Sentences and figures then go by the accuracy per token."""
    pages = [
        page_of(write_chosen(tmp_path / chosen_by, {"score": chosen_by}))
        for chosen_by in ("token", score)
    ]
    said = "random, reaches 40.0 % (per-token); the difference of +20.0 points"
    alt = "Heat-map of the gain in per-token accuracy at single layers 0 to 1"
    for page in pages:
        assert said in page.text
        assert any(image.attributes["alt"].startswith(alt) for image in page.all("img"))
    assert pages[0].tables()[CHOSEN] == pages[1].tables()[CHOSEN]


def write_chosen(folder, flags):
    """A chosen configuration, its control, and single layers."""
    right = {"base": some(16), "mean pos@0.2": some(30), "random@0.2": some(20)}
    right |= {f"pca pos@0.1@{layer}": some(18 + layer) for layer in range(2)}
    write_evaluation(folder, right, best="mean pos@0.2", flags=flags)
    return folder


def test_tiny_p_values_and_included_steering_examples(tmp_path):
    write_evaluation(
        tmp_path,
        {"base": some(0), "mean pos@0.2": some(40)},
        best="mean pos@0.2",
        evaluate_on="all",
    )
    text = page_of(tmp_path).text
    assert "from 0.0 % to 100.0 %, a significant gain (p < 0.0001)" in text
    assert "The steering examples are among these questions" in text


def test_several_seeds_are_averaged(tmp_path):
    """Every seed has strengths of its own: its n-th goes with the n-th of the others."""
    parts = []
    for seed, (base, weak, strong) in enumerate([(16, 20, 30), (20, 20, 24), (12, 14, 18)]):
        strengths = (0.1 + 0.01 * seed, 0.2 + 0.01 * seed)
        write_evaluation(
            tmp_path,
            {
                "base": some(base),
                f"mean pos@{strengths[0]}": some(weak),
                f"mean pos@{strengths[1]}": some(strong),
            },
        )
        path = tmp_path / "steering" / f"{STEM}_grid.csv"
        parts.append(pd.read_csv(path, keep_default_na=False).assign(seed=seed, dataset="things"))
    grid = pd.concat(parts)
    grid.to_csv(path, index=False)
    means = over_seeds(grid[grid.part == "test"])
    assert means.configuration.tolist() == [
        "base",
        "mean pos @ 1-2 x 0.1; mean pos @ 1-2 x 0.11; mean pos @ 1-2 x 0.12",
        "mean pos @ 1-2 x 0.2; mean pos @ 1-2 x 0.21; mean pos @ 1-2 x 0.22",
    ]
    assert means.alpha.tolist() == pytest.approx([0, 0.11, 0.21])
    assert means.accuracy_sum.tolist() == pytest.approx([48 / 120, 54 / 120, 72 / 120])
    page = page_of(tmp_path)
    assert any("base 40.0 %, highest 60.0 %" in plain(e.attributes["alt"]) for e in page.all("img"))
    assert "test questions (means over 3 seeds)" in page.text and "Seed 0, 1, 2 " in page.text
    every = page.tables()["All configurations, test questions"]
    assert every["base, seed 1"][2] == wilson(20, 40) and len(every) == 9


def test_costs_stand_in_the_tables(everything):
    folder, *_, page = everything
    grid = pd.read_csv(folder / "steering" / f"{STEM}_grid.csv", keep_default_na=False)
    row = grid[(grid.configuration == "mean pos @ 1-2 x 0.2") & (grid.part == "test")].iloc[0]
    cells = page.tables()[CHOSEN]["steered (chosen) mean pos @ 1-2 x 0.2"]
    assert cells[6:] == [f"{100 * row.perplexity_increase:+.1f} %", "55.0 %"]


def test_front_table_and_sentence(tmp_path):
    front = write_front(
        tmp_path,
        [
            {"method": "mean", "mode": "pos", "gains": (0.01, 0.03, 0.08), "p": 0.2},
            {"method": "gradient", "gains": (-0.02, 0.02, 0.05), "p": 0.004},
            {"method": "random", "gains": (-0.01, 0.04, 0.0), "p": 0.0001},
        ],
    )
    page = page_of(tmp_path)
    # Six comparisons of gradient and six of mean: 12 x 0.004, then 6 x 0.2, at most 1.
    adjusted = {"gradient": " Holm 0.048", "mean": " Holm 1", "random": ""}
    for score, title in (("token", "per-token"), ("sum", "summed")):
        table = next(
            rows
            for caption, rows in page.tables().items()
            if f"over base (40.0 %), {title}" in caption and "the 12 different" in caption
        )
        assert list(table) == ["mean pos", "gradient", "random (control)"]
        for row in front[front.score == score].itertuples():
            name = {"mean": "mean pos", "random": "random (control)"}.get(row.method, row.method)
            assert table[name][BUDGETS.index(row.max_ppl_increase)] == (
                f"{100 * row.gain:+.1f} [{100 * row.gain_low:.1f}, {100 * row.gain_high:.1f}] "
                f"p = {row.p_value:g}{adjusted[row.method]} perplexity "
                f"{100 * row.perplexity_increase:+.1f} % own answers +7.0 % repetition 18.0 % "
                "unrelated -1.2 [-3.1, 0.4] change of repetition +2.1 [-1.3, 5.5]"
            )
    assert [e.text for e in page.all("span", "significant")] == [
        text
        for gains in ("\N{MINUS SIGN}2.0 +2.0 +5.0", "\N{MINUS SIGN}1.0 +1.0 +2.5")
        for text in gains.split()
    ]
    assert (
        "By per-token accuracy, the smallest budget with a significant gain is a perplexity rise "
        "of at most 5 %: gradient gains +2.0 points (p = 0.004, adjusted 0.048); the best control "
        "within this budget, random, gains +4.0 (p = 0.0001)."
    ) in page.text


def test_what_is_chosen_within_several_budgets_is_compared_once(tmp_path):
    write_front(
        tmp_path,
        [
            {
                "method": "mean",
                "mode": "pos",
                "gains": (0.08,) * 3,
                "p": 0.01,
                "configuration": "m",
            },
            {"method": "gradient", "gains": (0.05,) * 3, "p": 0.03, "configuration": "g"},
            {"method": "random", "gains": (0.0,) * 3, "p": 1.0},
        ],
        limits=("freely", "strictly"),
    )
    page = page_of(tmp_path)
    captions = [caption for caption in page.tables() if "may rise" in caption]
    assert len(captions) == 4 and all("the 4 different" in caption for caption in captions)
    # 4 x 0.01, the same again, then 2 x 0.03
    assert page.text.count("Holm 0.04") == page.text.count("Holm 0.06") == 2 * 2 * 3
    assert "Gain and cost, strictly" in plain(page.all("h4")[0].text)
    assert "Gain and cost, freely" in [plain(e.text) for e in page.all("summary")]


def test_a_front_without_gains(tmp_path):
    """0.01 is no gain adjusted for twelve comparisons."""
    write_front(
        tmp_path,
        [
            {"method": "mean", "mode": "pos", "gains": (0.01, 0.03, 0.08), "p": 0.01},
            {"method": "pca", "mode": "pos", "gains": (0.0, 0.0, 0.0), "p": 1.0},
            {"method": "random", "gains": (0.02, 0.2, 0.3), "p": 0.001},
        ],
    )
    page = page_of(tmp_path)
    assert (
        "By summed accuracy, no method has a significant gain within any of these budgets."
    ) in page.text
    assert not page.all("span", "significant") and "p = 0.01 Holm 0.12" in page.text


def test_transfer_and_configurations_tried_on_validation_alone(tmp_path):
    """As the experiment writes: costs on validation, some configurations on test questions, also
    on those of another data set."""
    grid = write_evaluation(
        tmp_path, {"base": some(16), "mean pos@0.1": some(30), "mean pos@0.2": some(20)}
    ).drop(columns=["includes_steering_examples", "alpha_units"])
    grid = grid.assign(dataset="things", evaluated_on="things", seed=0)
    priced = grid.part == "validation"
    grid.loc[priced, "perplexity_increase"] = [0, 0.03, 0.08]
    of_test = grid[~priced & (grid.configuration != "mean pos @ 1-2 x 0.1")]
    pd.concat([grid[priced], of_test, of_test.assign(evaluated_on="others")]).to_csv(
        tmp_path / "steering" / f"{STEM}_grid.csv", index=False
    )
    front = write_front(
        tmp_path, [{"method": "mean", "mode": "pos", "gains": (0.01, 0.03, 0.08), "p": 0.01}]
    ).assign(evaluated_on="things")
    pd.concat([front, front.assign(evaluated_on="others")]).to_csv(
        tmp_path / "steering" / f"{STEM}_front.csv", index=False
    )
    page = page_of(tmp_path)
    assert [plain(e.text) for e in page.all("h3")][1:3] == [
        "Multiple choice: things",
        "Multiple choice: things, tested on others",
    ]
    every = page.tables()["All configurations, validation questions"]
    assert every["mean pos @ 1-2 x 0.2"][6] == "+8.0 %" and len(every) == 3
    assert sum("may rise" in e.text for e in page.all("caption")) == 4
    assert len(page.all("h4")) == 3  # over strength only where every strength was tried


# --- figures ---


def drawn(axes) -> dict[str, tuple[list, list, list]]:
    """label -> places, values and the ends of the error bars."""
    return {
        item.get_label(): (
            *map(list, item.lines[0].get_data()),
            [segment[:, 1].tolist() for segment in item.lines[2][0].get_segments()],
        )
        for item in axes.containers
    }


def test_every_method_has_a_look_of_its_own():
    methods = [*METHODS, "trained", "trained_random", "trained_rotated", "lora"]
    assert len({figures.look(method)[1] for method in methods}) == len(methods)


def test_every_mode_has_a_look_of_its_own():
    lines = [
        ("mean", "pos"),
        ("mean", "both"),
        ("mean", "pos gated"),
        ("mean", "both gated"),
        ("random", ""),
        ("random", "gated"),
    ]
    axes = Figure().subplots()
    figures.draw_front(
        axes,
        pd.DataFrame(
            [
                {
                    "method": method,
                    "mode": mode,
                    "perplexity_increase": price,
                    "gain": 0.1,
                    "gain_low": 0.0,
                    "gain_high": 0.2,
                }
                for method, mode in lines
                for price in (0.1, 0.2)
            ]
        ),
    )
    drawn_lines = [item.lines[0] for item in axes.containers]
    looks = {
        (line.get_marker(), line.get_fillstyle(), line.get_linestyle()) for line in drawn_lines
    }
    assert len(looks) == len(drawn_lines) == len(lines)


def test_accuracy_figure_draws_the_table(tmp_path):
    grid = write_evaluation(
        tmp_path,
        {
            "base": some(16),
            "mean pos@0.2": some(30),
            "mean pos@0.1": some(20),
            "random@0.1": some(15),
        },
    )
    axes = Figure().subplots()
    figures.draw_accuracy(axes, grid[grid.part == "test"], "sum")
    table = grid[grid.part == "test"].set_index("configuration")
    found = drawn(axes)
    assert set(found) == {"mean pos", "random"}
    places, values, bars = found["mean pos"]
    assert places == pytest.approx([0.1, 0.2], rel=0.05)
    rows = table.loc[["mean pos @ 1-2 x 0.1", "mean pos @ 1-2 x 0.2"]]
    assert values == pytest.approx(rows.accuracy_sum.tolist())
    assert np.array(bars) == pytest.approx(rows[["accuracy_sum_low", "accuracy_sum_high"]].values)
    base = next(line for line in axes.lines if line.get_label() == "base")
    assert base.get_ydata()[0] == pytest.approx(16 / 40)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "0.2"]


def test_front_figure_is_gain_over_measured_cost(tmp_path):
    front = write_front(
        tmp_path,
        [
            {"method": "gradient", "gains": (0.0, 0.02, 0.05), "p": 0.01},
            {"method": "random", "gains": (-0.01, 0.04, 0.0), "p": 0.9},
        ],
    )
    front.loc[front.max_ppl_increase == 0.1, "perplexity_increase"] = 0.01  # cheaper than allowed
    axes = Figure().subplots()
    figures.draw_front(axes, front[front.score == "token"])
    places, values, bars = drawn(axes)["gradient"]
    assert places == pytest.approx([0.01, 0.018, 0.045]) and values == [0.05, 0.0, 0.02]
    assert np.array(bars) == pytest.approx(np.array([[0.01, 0.1], [-0.04, 0.05], [-0.02, 0.07]]))
    assert drawn(axes)["random"][1] == [0.0, -0.01, 0.04]
    grey = {line.get_color() for line in axes.lines if line.get_linestyle() == ":"}
    assert grey == {figures.GREY}


def test_measures_over_strength(tmp_path):
    """Optional columns are drawn where there are numbers in them, and nothing else is."""
    right = {"base": some(16), "mean pos@0.2": some(30), "mean pos@0.1": some(20)}
    grid = write_evaluation(
        tmp_path,
        right,
        extra={
            "perplexity_increase": [0.0, 0.5, 0.04],
            "repetition": [np.nan] * 3,
            "words": [9.0, 7.0, 8.5],
        },
    )
    axes = Figure().subplots()
    figures.draw_measure(axes, grid[grid.part == "test"], "perplexity_increase")
    (line,) = axes.containers
    assert line.lines[0].get_ydata().tolist() == [0.04, 0.5]
    alt = next(plain(e.attributes["alt"]) for e in page_of(tmp_path, drawn=True).all("img"))
    assert "increase of perplexity: +4.0 % to +50.0 %" in alt
    assert "words of a free answer: 7.0 to 8.5" in alt and "repetition" not in alt


def test_an_adapter_has_no_layers(tmp_path):
    grid = write_evaluation(tmp_path, {"base": some(16), "mean pos@0.2": some(30)})
    adapter = grid[grid.method == "mean"].assign(
        configuration="lora x 0.5", method="lora", mode="", layers="", alpha=0.5
    )
    pd.concat([grid, adapter]).to_csv(tmp_path / "steering" / f"{STEM}_grid.csv", index=False)
    page = page_of(tmp_path, drawn=True)
    first, second = (plain(e.attributes["alt"]) for e in page.all("img"))
    assert "at layers 1-2" in first and "for base, mean pos." in first
    assert "of the adapter" in second and "for base, lora." in second
    assert "lora x 0.5" in page.tables()["All configurations, test questions"]


def test_layers_figure_is_the_gain(tmp_path):
    right = {"base": some(16)} | {
        f"pca pos@{alpha}@{layer}": some(10 + layer + round(50 * alpha))
        for alpha in (0.1, 0.2)
        for layer in (3, 0, 11)
    }
    grid = write_evaluation(tmp_path, right)
    figure = Figure()
    image = figures.draw_layers(figure.subplots(), grid[grid.part == "test"], "sum", 0.5)
    expected = [
        [(10 + layer + 50 * alpha - 16) / 40 for alpha in (0.1, 0.2)] for layer in (0, 3, 11)
    ]
    assert np.asarray(image.get_array()) == pytest.approx(np.array(expected))
    page = page_of(tmp_path)
    alt = next(
        e.attributes["alt"] for e in page.all("img") if "single layers" in e.attributes["alt"]
    )
    assert "layers 0 to 11" in alt
    assert "Largest: +30.0 points with pca pos @ 11 x 0.2" in plain(alt)


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 4, 3], [4, 0, 8, 3], None, [2, 1, 6, 6]],
        [[0, 0, 8, 6], [0.4, 0.4, 3.6, 2.6], [7, 5, 8, 6], None],
    ],
)
def test_heat_map_pixel_by_pixel(boxes):
    scores = [1.0, -2.5, 100.0, 0.75]
    expected = np.zeros((6, 8))
    for y in range(6):
        for x in range(8):
            for box, score in zip(boxes, scores, strict=True):
                if box and box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]:
                    expected[y, x] += score
    assert np.array_equal(figures.heat_map(boxes, scores, (8, 6)), expected)


@pytest.mark.parametrize(
    "text", ["Do cats land on their feet?", f"naïve {SCRIPTS}: 3 €", "line one\n\n  line two 🙂🙂"]
)
def test_words_of_a_byte_level_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    scores = np.random.default_rng(0).normal(size=len(ids))
    found = readable.words(tokenizer.convert_ids_to_tokens(ids), scores)
    assert "".join(word.text for word in found) == text
    assert [i for word in found for i in word.positions] == list(range(len(ids)))
    for word in found:
        assert word.score == pytest.approx(scores[list(word.positions)].sum())
        assert tokenizer.decode(ids[word.positions[0] : word.positions[-1] + 1]) == word.text


def test_words_of_sentencepiece():
    tokens = ["▁a", "▁caf", "é", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "日", "<0x0A>"]
    found = readable.words(tokens, range(9))
    assert [(word.text, word.score) for word in found] == [
        (" a", 0),
        (" caf", 1),
        ("é", 2),
        ("😀", 3 + 4 + 5 + 6),
        ("日", 7),
        ("\n", 8),
    ]


# --- words and pictures on the page ---


def test_words_have_sign_strength_and_marks(tmp_path):
    write_attributions(tmp_path, attribution_rows())
    page = page_of(tmp_path)
    words = [e for e in page.all("span") if "title" in e.attributes]
    # "Q" and ":" of the template have no attribution and stand at the end
    assert [
        (plain(e.text), e.attributes["class"], e.attributes["title"], e.attributes["style"])
        for e in words
    ] == [
        ("is (ablated: pos)", "pos cut-pos", "+1.50", "--s:1.000"),
        ("it (ablated: neg)", "neg cut-neg", "\N{MINUS SIGN}0.75", "--s:0.500"),
        ("?", "pos", "+0.25", "--s:0.167"),
    ]
    assert [plain(e.text) for e in page.all("p", "words")] == [
        "is (ablated: pos) it (ablated: neg)?"
    ]
    assert "is +1.50 (ablated: pos); it -0.75 (ablated: neg); ? +0.25" in page.text
    assert "preferred yes it is dispreferred no it is not" in page.text
    assert "f +2.00; with tokens ablated: -1.00 (1 pos), -1.00 (1 neg)" in page.text
    assert "completeness error 1.2 % (17 gradients)" in page.text
    assert page.tables()["Mean f before and after the selected tokens are ablated"] == {
        top: ["+2.00", "-1.00", "-3.00", "1 of 1"] for top in ("pos", "neg")
    }


def test_each_response_on_its_own(tmp_path):
    write_attributions(
        tmp_path,
        attribution_rows(
            scores=((0, 0, 1, 2, 3), (0, 0, -3, 0.5, 0)), selected={"pos": [[4], [3]]}
        ),
    )
    lines = page_of(tmp_path).all("p", "words")
    assert [plain(line.text) for line in lines] == ["is it? (ablated: pos)", "is it (ablated: pos)"]


def test_texts_come_out_as_they_went_in(everything):
    page = everything[-1]
    assert not page.all("script") and not page.all("b")
    answers = [e.text for e in page.all("dd") if e.attributes.get("dir") == "auto"]
    assert SCRIPTS in answers and NASTY in answers
    assert plain(NASTY) in [plain(e.text) for e in page.all("h4")]
    # the two halves of an emoji are one word, with the sum of their attributions
    emoji = next(e for e in page.all("span") if "😀" in e.text and "title" in e.attributes)
    assert emoji.attributes["title"] == "+0.70"


def test_pictures_are_read_again(tmp_path):
    given = picture_results(tmp_path)
    text, pngs = report.build([tmp_path], tmp_path / "report.html", 6)
    page = Page(text)
    first = given["order"][0]
    alt = next(e.attributes["alt"] for e in page.all("img") if first in e.attributes["alt"])
    assert alt.endswith("outlined: 1 ablated as pos and 1 ablated as neg.")
    with Image.open(io.BytesIO(pngs[f"things_small_heat_{first}.png"])) as png:
        pixels = np.asarray(png.convert("RGBA"), int)
    height, width = pixels.shape[:2]
    plain_side, left, right = (pixels[height // 2, round(width * x)] for x in (0.25, 0.62, 0.88))
    assert plain_side[:3].argmax() == (0 if first == "a" else 2)  # the picture itself: red or blue
    assert left[2] > left[0] + 20 and right[0] > right[2] + 60  # for: blue, against: orange
    assert "66.7 % of the positive and 100.0 % of the negative attribution" in page.text
    # of one scale with the picture, of which two tokens show the right half: -4 - 0.5
    word = next(e for e in page.all("span") if "title" in e.attributes)
    assert word.attributes["style"] == f"--s:{1 / 4.5:.3f}"
    assert "full colour at ±4.50" in page.text and "picture, 3 tokens" in page.text


@pytest.mark.parametrize("change", ["gone", "other rows", "picture gone", "no manifest"])
def test_pictures_that_are_not_there_any_more(tmp_path, change):
    given = picture_results(tmp_path)
    first = given["order"][0]
    expected = "The pictures are not shown, their data cannot be read again: "
    if change == "gone":
        given["source"].unlink()
        expected += f"data file '{given['source']}' does not exist"
    elif change == "other rows":
        rows = given["source"].read_text().replace('"id": "a"', '"id": "c"')
        given["source"].write_text(rows)
        expected += f"{given['source']} has other examples now than in this run"
    elif change == "picture gone":
        (tmp_path / f"{first}.png").unlink()
        expected = f"example {first}: its picture '{tmp_path / first}.png' does not exist"
    else:
        (tmp_path / "token_attribution" / "words.manifest.json").unlink()
        expected += "no manifest says where they are"
    page = page_of(tmp_path)
    assert expected in page.text
    assert len(page.all("img")) == (1 if change == "picture gone" else 0)


def test_image_tokens_whose_places_are_not_known(tmp_path):
    picture_results(tmp_path)
    path = tmp_path / "token_attribution" / "words.csv"
    with_cell("image_boxes", "[null, null, null]")(path)
    page = page_of(tmp_path)
    assert page.text.count("It is not known where in the picture") == 2 and not page.all("img")


# --- generations ---


@pytest.mark.parametrize(
    ("base", "steered"),
    [
        ("the cat sat on the mat", "the dog sat on a mat today"),
        ("", "all of it is new"),
        ("gone", ""),
        ("same  words\n\nkept", "same words kept"),
        (f"{SCRIPTS} a", f"b {SCRIPTS}"),
    ],
)
def test_differences_rebuild_both_texts(base, steered):
    sides = word_difference(base, steered)
    for text, side in zip((base, steered), sides, strict=True):
        assert "".join(run for run, _ in side) == text
        assert all(run == run.strip() for run, differs in side if differs)
    kept = ["".join(run for run, differs in side if not differs).split() for side in sides]
    assert kept[0] == kept[1]
    assert set(base.split()) & set(steered.split()) == set(kept[0])


def test_generations_side_by_side(tmp_path):
    write_generations(tmp_path, [("it is a cat", "it is one dog"), ("fine", "fine")])
    page = page_of(tmp_path)
    assert "mean pos @ 1 x 0.5 changes 1 of 2 texts" in page.text
    marked = [(e.tag, e.text) for e in page.elements if e.tag in ("ins", "del")][2:]
    assert marked == [("del", "a cat"), ("ins", "one dog")]  # the first two are the legend's
    assert "reference: the truth (g)" in page.text
    assert page.text.count("the same") == 1


def test_draws_of_a_prompt_are_told_apart(tmp_path):
    path = write_generations(tmp_path, [("a cat", "a dog"), ("a cat", "a fox")])
    table = pd.read_csv(path).assign(prompt=0, draw=[0, 1])
    table.to_csv(path, index=False)
    page = page_of(tmp_path)
    assert "mean pos @ 1 x 0.5, draw 0" in page.text and "mean pos @ 1 x 0.5, draw 1" in page.text
    read = generations.read(path)
    assert generations.texts(read).text.tolist() == ["a cat", "a cat", "a dog", "a fox"]


# --- the page as a whole ---


def test_the_page_stands_alone_and_its_links_lead_to_the_files(everything):
    folder, output, text, page = everything
    assert not page.all("link") and "url(" not in text and "@import" not in text
    for element in page.all("img") + page.all("source"):
        sources = [element.attributes.get(name) for name in ("src", "srcset")]
        assert all(source.startswith("data:image/png;base64,") for source in sources if source)
    links = [e.attributes["href"] for e in page.all("a")]
    files = {
        (output.parent / unquote(urlparse(link).path)).resolve() for link in links if link[0] != "#"
    }
    assert files == {
        path
        for path in folder.rglob("*")
        if path.suffix in (".csv", ".json") and path.parent.name != "pictures"
    }
    anchors = {e.attributes["id"] for e in page.elements if "id" in e.attributes}
    assert {link[1:] for link in links if link[0] == "#"} <= anchors


def test_headings_tables_and_pictures_are_named(everything):
    page = everything[-1]
    levels = [int(e.tag[1]) for e in page.elements if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert all(
        e.attributes.get("scope") in ("row", "col") and plain(e.text) for e in page.all("th")
    )
    alts = [e.attributes["alt"] for e in page.all("img")]
    assert len(alts) >= 6 and len(set(alts)) == len(alts) and min(map(len, alts)) > 40
    assert page.all("html")[0].attributes["lang"] == "en"


def test_two_models_make_two_sections(tmp_path):
    write_attributions(tmp_path / "one", attribution_rows())
    path = write_attributions(tmp_path / "two", attribution_rows(question="other"))
    manifest = path.with_suffix(".manifest.json")
    manifest.write_text(manifest.read_text().replace('"small"', '"large"'))
    page = page_of(tmp_path / "one", tmp_path / "two", tmp_path)  # the last is found already
    assert [e.text for e in page.all("h2")] == ["things · small", "things · large"]


def test_an_experiment_has_its_stage_1_beside_it(tmp_path):
    write_front(
        tmp_path,
        [{"method": "mean", "mode": "pos", "gains": (0.0, 0.1, 0.1), "p": 1.0}],
        stem="both_lora-dpo",
    )
    manifest = {"stage": "experiment", "parts": "both_parts", "model": MODEL, "versions": VERSIONS}
    runs.write_json(tmp_path / "steering" / "both_lora-dpo_grid.manifest.json", manifest)
    for name, seed in (("things", 0), ("things", 1), ("others", 0)):
        path = write_attributions(tmp_path, attribution_rows(), {"name": name}, f"{name}_{seed}")
        for file in (path, path.with_suffix(".manifest.json")):
            place = tmp_path / "steering" / "both_parts" / file.name
            place.parent.mkdir(exist_ok=True)
            file.rename(place)
    page = page_of(tmp_path)
    assert [e.text for e in page.all("h2")] == ["both"]
    assert "others_0.csv" in page.text and "things_0.csv" in page.text
    assert "things_1.csv" not in page.text
    assert "name others split train" in page.text and "name things split train" in page.text


def test_missing_stages_are_named(tmp_path):
    write_attributions(tmp_path / "first", attribution_rows())
    text = page_of(tmp_path / "first").text
    assert "run steering_mc.py" in text and "run steering_generation.py" in text
    write_generations(tmp_path / "last", [("a", "b")])
    assert "run token_ablation.py" in page_of(tmp_path / "last").text
    write_evaluation(tmp_path / "mc", {"base": some(3), "mean pos@0.1": some(4)})
    (tmp_path / "mc" / "steering" / f"{STEM}_questions.csv").unlink()
    (tmp_path / "mc" / "steering" / f"{STEM}_grid.manifest.json").unlink()
    text = page_of(tmp_path / "mc").text
    assert "No configuration of these results is chosen" in text
    assert "No manifest lies beside" in text


def test_the_picture_of_the_text_demo_appears_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    right = {"base": 16, "gradient@0.2": 30, "gradient@-0.2": 4, "random@0.2": 17}
    write_evaluation(tmp_path, {name: some(count) for name, count in right.items()})
    attributions = write_attributions(tmp_path, attribution_rows())
    grid, output = tmp_path / "steering" / f"{STEM}_grid.csv", tmp_path / "new" / "demo.png"
    rows = pd.read_csv(grid).assign(perplexity_increase=0.015)
    rows.to_csv(grid, index=False)
    (steered,) = rows[(rows.method == "gradient") & (rows.alpha == 0.2)].configuration.unique()
    chosen = tmp_path / "chosen.json"
    runs.write_json(
        chosen,
        {"configuration": steered, "method": "gradient", "alpha": 0.2, "controls": ["random"]},
    )
    answers = tmp_path / "answers.csv"
    answers.write_text(f"id,reference,base,steered,configuration\nq0,Lyon,Paris,Lyon.,{steered}\n")
    given = (attributions, grid, chosen, answers, output)
    monkeypatch.setattr(sys, "argv", ["text_figure", *map(str, given)])
    text_figure.main()
    table = capsys.readouterr().out
    assert "| 40.0 % [" in table and "| 0 of 1 | +1.5 % |" in table
    assert "| control `random`, 0.2 | 42.5 % [" in table
    picture = output.read_bytes()
    assert Image.open(output).format == "PNG" and Image.open(output).width > 600

    def cut_short(figure, path, **options):
        Path(path).write_bytes(picture[:100])
        raise OSError("no space")

    monkeypatch.setattr(Figure, "savefig", cut_short)
    with pytest.raises(UserError, match=r"demo\.png' could not be written"):
        text_figure.main()
    assert output.read_bytes() == picture and list(output.parent.iterdir()) == [output]


def test_what_a_demo_measured_and_drew(tmp_path):
    write_attributions(tmp_path, attribution_rows())
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "false_squares.csv").write_text(',rate\nbase,"<b>51.0%</b>"\n')
    Image.new("RGB", (600, 300), "red").save(tmp_path / "demo" / "scenes.png")
    page = page_of(tmp_path)
    assert [e.text for e in page.all("h3")][-1] == "False squares"
    assert "<b>51.0%</b>" in page.text and not page.all("b")
    picture = page.all("img")[-1].attributes
    assert "scenes.png" in picture["alt"]
    assert int(picture["width"]) == pytest.approx(2 * int(picture["height"]), abs=1)


# --- mistakes ---


def without(column):
    return lambda path: pd.read_csv(path, dtype=str).drop(columns=column).to_csv(path, index=False)


def with_cell(column, value):
    return lambda path: (
        pd.read_csv(path, dtype=str).assign(**{column: value}).to_csv(path, index=False)
    )


@pytest.mark.parametrize(
    ("file", "spoil", "expected"),
    [
        (f"steering/{STEM}_grid.csv", without("accuracy_token"), "column accuracy_token missing"),
        (
            f"steering/{STEM}_grid.csv",
            with_cell("alpha", "strong"),
            "column alpha, row 1: expected a finite number, found 'strong'",
        ),
        (
            f"steering/{STEM}_grid.csv",
            with_cell("perplexity_increase", "x"),
            "column perplexity_incre",
        ),
        (f"steering/{STEM}_questions.csv", without("correct_sum"), "column correct_sum missing"),
        (f"steering/{STEM}_front.csv", without(["gain", "seeds"]), "columns seeds, gain missing"),
        (f"steering/{STEM}_chosen.json", lambda path: path.write_text('{"conf'), "cannot be read"),
        (f"steering/{STEM}_grid.manifest.json", lambda path: path.write_text("[1]"), "JSON object"),
        (f"steering/{STEM}_chosen.json", lambda path: path.write_text("[1]"), "JSON object"),
        ("token_attribution/words.csv", without("tokens"), "column tokens missing"),
        (
            "token_attribution/words.csv",
            with_cell("tokens", "[1"),
            "column tokens, example a: expected a JSON list",
        ),
        (
            "token_attribution/words.csv",
            with_cell("attributions", "[[1]]"),
            "1 scores for 5 tokens",
        ),
        ("steering_generation/texts.csv", without("steered"), "column steered missing"),
        (
            "steering_generation/texts.csv",
            lambda path: path.write_bytes(b"\xff\x00\x80"),
            "as a CSV",
        ),
        ("steering_generation/texts.csv", lambda path: path.write_text(""), "as a CSV"),
        (
            "token_attribution/words.csv",
            lambda path: path.write_text(path.read_text().split("\n")[0]),
            "no rows",
        ),
    ],
)
def test_files_that_are_not_what_their_names_say(tmp_path, file, spoil, expected):
    write_evaluation(
        tmp_path,
        {"base": some(3), "mean pos@0.1": some(4)},
        best="mean pos@0.1",
        extra={"perplexity_increase": [0.0, 0.1]},
    )
    write_front(tmp_path, [{"method": "gradient", "gains": (0.0, 0.0, 0.0), "p": 1.0}])
    write_attributions(tmp_path, attribution_rows())
    write_generations(tmp_path, [("a", "b")])
    path = tmp_path / file
    for other in set(tmp_path.iterdir()) - {path.parent}:
        shutil.rmtree(other)
    spoil(path)
    with pytest.raises(UserError) as error:
        page_of(tmp_path)
    assert str(path) in str(error.value) and expected in str(error.value)


@pytest.fixture(scope="module")
def tables_and_page(tmp_path_factory):
    """A folder with a table of every kind, and its page."""
    folder = tmp_path_factory.mktemp("tables")
    right = {"base": some(16), "mean pos@0.2@3": some(30), "random@0.2@3": some(20)}
    write_evaluation(folder, right, best="mean pos@0.2@3", evaluate_on="all")
    write_front(
        folder,
        [
            {"method": "mean", "mode": "pos", "gains": (0.01, 0.03, 0.08), "p": 0.002},
            {"method": "random", "gains": (0.0, 0.04, 0.0), "p": 0.9},
        ],
    )
    write_attributions(folder, attribution_rows())
    write_generations(folder, [("it is a cat", "it is a dog")])
    return folder, page_of(folder)


def saved_by_pandas(path):
    """Empty cells become NaN, and layers with them 3.0."""
    pd.read_csv(path).to_csv(path, index=False)


def saved_by_a_spreadsheet(path):
    pd.read_csv(path, dtype=str, keep_default_na=False).replace(
        {"True": "TRUE", "False": "FALSE"}
    ).to_csv(path, index=False, lineterminator="\r\n")


def with_an_empty_row(path):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[len(table)] = ""
    table.to_csv(path, index=False)


@pytest.mark.parametrize("save", [saved_by_pandas, saved_by_a_spreadsheet, with_an_empty_row])
def test_tables_that_were_saved_again(tables_and_page, tmp_path, save):
    folder, expected = tables_and_page
    # As many right answers of steering alone as differ, per token: 8, all gained.
    assert f"and it is significant (p = {2 / 2**8:.2g})" in expected.text
    assert "no held-out result" in expected.text and "best control" in expected.text
    again = shutil.copytree(folder, tmp_path / "again")
    before = {path: path.read_bytes() for path in again.rglob("*.csv")}
    for path in before:
        save(path)
    assert all(path.read_bytes() != content for path, content in before.items())
    grid = (again / "steering" / f"{STEM}_grid.csv").read_text()
    assert {saved_by_pandas: ",3.0,", saved_by_a_spreadsheet: "TRUE"}.get(save, "") in grid
    page = page_of(again)
    assert page.text == expected.text and page.tables() == expected.tables()


GRID, FRONT = f"steering/{STEM}_grid.csv", f"steering/{STEM}_front.csv"
QUESTIONS, WORDS = f"steering/{STEM}_questions.csv", "token_attribution/words.csv"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "column", "cell", "expected"),
    [
        (GRID, "alpha", "inf", "a finite number, found 'inf'"),
        (GRID, "alpha", "", "a finite number, found ''"),
        (GRID, "questions", "", "a finite number"),
        (GRID, "accuracy_sum", "nan", "a finite number"),
        (GRID, "margin_sum", "x", "a number, found 'x'"),
        (GRID, "layers", "1.5", "layers such as 0 1 2, found '1.5'"),
        (GRID, "method", "", "a text, found ''"),
        (GRID, "includes_steering_examples", "perhaps", "True or False, found 'perhaps'"),
        (QUESTIONS, "correct_token", "yes", "True or False, found 'yes'"),
        (FRONT, "is_control", "", "True or False, found ''"),
        (FRONT, "score", "both", "token or sum, found 'both'"),
        (FRONT, "max_ppl_increase", "", "a finite number"),
        (WORDS, "k", "", "a finite number"),
        (WORDS, "gradients_computed", "", "a finite number"),
        (WORDS, "tokens", "5", "a JSON list of texts, found '5'"),
        (WORDS, "tokens", '{"a": 1}', "a JSON list of texts"),
        (WORDS, "tokens", "[1, 2, 3, 4, 5]", "a JSON list of texts"),
        (WORDS, "tokens", DEEP, "a JSON list of texts"),
        (WORDS, "tokens", "", "a JSON list of texts, found ''"),
        (WORDS, "attributions", "[]", "0 scores for 5 tokens"),
        (WORDS, "attributions", "[1, 2]", "a JSON list of lists of numbers"),
        (WORDS, "attributions", '[["1", 2, 3, 4, 5]]', "a JSON list of lists of numbers"),
        (WORDS, "attributions", "[[NaN, 2, 3, 4, 5]]", "a JSON list of lists of numbers"),
        (WORDS, "attributions", f"[[1{'0' * 400}, 2, 3, 4, 5]]", "a JSON list of lists of numbers"),
        (WORDS, "selected_positions", "[[5]]", "a JSON list of positions"),
        (WORDS, "selected_positions", "[[-1]]", "a JSON list of positions"),
        (WORDS, "selected_positions", "[[1], [2]]", "a JSON list of positions"),
        (WORDS, "selected_positions", "null", "a JSON list of positions"),
        (WORDS, "image_positions", '["0"]', "a JSON list of positions"),
        (WORDS, "image_positions", "[true]", "a JSON list of positions"),
    ],
)
def test_cells_that_are_not_what_their_columns_say(
    tables_and_page, tmp_path, file, column, cell, expected
):
    path = shutil.copytree(tables_and_page[0], tmp_path / "spoilt") / file
    for folder in {*(tmp_path / "spoilt").iterdir()} - {path.parent}:
        shutil.rmtree(folder)
    with_cell(column, cell)(path)
    with pytest.raises(UserError) as error:
        page_of(tmp_path / "spoilt")
    assert all(part in str(error.value) for part in (str(path), f"column {column}", expected))
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("cell", ["7", '[[0, 0, 1, 1], "x", null]', "[null]", "[[0, 0, 1], 1, 2]"])
def test_boxes_that_are_none(tmp_path, cell):
    picture_results(tmp_path)
    path = tmp_path / "token_attribution" / "words.csv"
    with_cell("image_boxes", cell)(path)
    assert "column image_boxes" in page_of(tmp_path).text  # in place of the picture


@pytest.mark.parametrize("file", [GRID, FRONT, WORDS, "steering_generation/texts.csv"])
def test_rows_that_stand_twice(tables_and_page, tmp_path, file):
    path = shutil.copytree(tables_and_page[0], tmp_path / "twice") / file
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    pd.concat([table, table]).to_csv(path, index=False)
    with pytest.raises(UserError, match="more than once") as error:
        page_of(tmp_path / "twice")
    assert str(path) in str(error.value)


def test_questions_of_another_run(tables_and_page, tmp_path):
    path = shutil.copytree(tables_and_page[0], tmp_path / "fewer") / QUESTIONS
    table = pd.read_csv(path, dtype=str)
    table[(table.id != "q3") | (table.configuration != "random @ 3 x 0.2")].to_csv(
        path, index=False
    )
    with pytest.raises(UserError, match="does not hold the same all questions"):
        page_of(tmp_path / "fewer")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"data": 5}', "data: expected an object or a text, found 5"),
        ('{"model": [1]}', "model: expected an object or a text, found [1]"),
        ('{"flags": "x"}', "flags: expected an object, found x"),
        ('{"versions": 1}', "versions: expected an object"),
        ('{"stage": {}}', "stage: expected a text"),
        ('{"seed": true}', "seed: expected a whole number, found True"),
        ('{"model": {"model": 7}}', "model.model: expected a text, found 7"),
        ('{"data": {"name": ["x"]}}', "data.name: expected a text"),
        ('{"data": {"ids": 3}}', "data.ids: expected a list, found 3"),
        (
            '{"flags": {"score": "both"}}',
            "flags.score: expected one of token, sum, mc1, mc2, found both",
        ),
        ("5", "expected a JSON object, found 5"),
        ("null", "expected a JSON object"),
        ('{"data": ' + DEEP + "}", "cannot be read"),
    ],
)
@pytest.mark.parametrize("name", [f"steering/{STEM}_grid", "token_attribution/words"])
def test_manifests_of_another_shape(tables_and_page, tmp_path, name, content, expected):
    folder = shutil.copytree(tables_and_page[0], tmp_path / "shape")
    path = folder / f"{name}.manifest.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        page_of(folder)
    assert str(path) in str(error.value) and expected in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"model": null, "data": null, "flags": null, "settings": null, "stage": null}',
        '{"data": {"name": null, "ids": null}, "flags": {"seed": null, "alphas": [[1], [1, 2]]}}',
    ],
)
def test_manifests_that_say_little(tables_and_page, tmp_path, content):
    folder = shutil.copytree(tables_and_page[0], tmp_path / "little")
    for path in folder.rglob("*.manifest.json"):
        path.write_text(content)
    assert page_of(folder).tables()[CHOSEN] == tables_and_page[1].tables()[CHOSEN]


@pytest.mark.parametrize("content", ["{}", '{"configuration": 5}', '{"configuration": null}'])
def test_a_choice_of_another_shape(tables_and_page, tmp_path, content):
    folder = shutil.copytree(tables_and_page[0], tmp_path / "choice")
    path = folder / "steering" / f"{STEM}_chosen.json"
    path.write_text(content)
    with pytest.raises(UserError, match="configuration: expected a text") as error:
        page_of(folder)
    assert str(path) in str(error.value)


def test_an_infinite_cost_is_written_and_not_drawn(tmp_path):
    write_evaluation(
        tmp_path,
        {"base": some(16), "mean pos@0.2": some(30), "mean pos@0.1": some(20)},
        extra={"perplexity_increase": [0.0, np.inf, 0.04]},
    )
    front = write_front(tmp_path, [{"method": "mean", "gains": (0.01, 0.03, 0.08), "p": 0.01}])
    front.loc[front.max_ppl_increase == 0.1, "perplexity_increase"] = np.inf
    front.to_csv(tmp_path / FRONT, index=False)
    page = page_of(tmp_path, drawn=True)
    table = page.tables()["All configurations, test questions"]
    assert table["mean pos @ 1-2 x 0.2"][6] == "+inf %"
    assert table["mean pos @ 1-2 x 0.1"][6] == "+4.0 %"
    axes = Figure().subplots()
    figures.draw_front(axes, front[front.score == "token"])
    assert drawn(axes)["mean"][1] == [0.01, 0.03]


@pytest.mark.parametrize(("name", "expected"), [("a.csv", "as a CSV"), ("a.png", "as a picture")])
def test_demo_files_that_cannot_be_read(tmp_path, name, expected):
    write_attributions(tmp_path, attribution_rows())
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"{name}' cannot be read {expected}"):
        page_of(tmp_path)


def test_a_grid_without_base(tmp_path):
    table = write_evaluation(tmp_path, {"base": some(3), "mean pos@0.1": some(4)})
    path = tmp_path / "steering" / f"{STEM}_grid.csv"
    table[table.method != "base"].to_csv(path, index=False)
    with pytest.raises(UserError, match="no row of the base model"):
        page_of(tmp_path)


def test_nothing_to_report(commands, tmp_path):
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    message = commands.run("report.py", tmp_path).error()
    assert f"'{tmp_path}' holds no results" in message and "run_token_ablation.sh" in message
    assert "is not a folder" in commands.run("report.py", tmp_path / "nowhere").error()
    assert list(tmp_path.iterdir()) == [tmp_path / "notes.csv"]


def test_the_stages_and_then_the_report(commands, tmp_path):
    model = tiny.save_model(tmp_path / "tiny")
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", tiny.question_rows())
    common = [
        "--model_name",
        model,
        "--dataset_name",
        "questions",
        "--dataset_path",
        questions,
        "--num_samples",
        4,
        "--top_k",
        3,
    ]
    evaluated = [
        "--hidden_states_path",
        tmp_path / "states_pos.safetensors",
        "--steering_vectors_dir",
        tmp_path / "vectors",
        "--num_validation",
        5,
    ]
    out = tmp_path / "out"
    commands.run(
        "token_ablation.py",
        *common,
        "--ig_steps",
        4,
        "--output_path_meta",
        out / "attributions.csv",
        "--output_path_hidden",
        tmp_path / "states.safetensors",
    ).ok()
    commands.run(
        "steering_mc.py",
        *common,
        *evaluated,
        "--methods",
        "mean",
        "random",
        "--alphas",
        0.1,
        0.4,
        "--layer_idxs",
        "all",
        "--layer_mode",
        "each",
        "--output_dir",
        out,
    ).ok()
    commands.run(
        "steering_generation.py",
        *common,
        *evaluated,
        "--methods",
        "mean",
        "--alphas",
        0.4,
        "--layer_idxs",
        1,
        "--num_prompts",
        3,
        "--max_new_tokens",
        5,
        "--generation_style",
        "qa",
        "--output_dir",
        out / "texts",
    ).ok()
    said = commands.run("report.py", out, "--num_examples", 2).ok().out
    assert f"report:  {out / 'report.html'}" in said and f"{out / 'report_figures'} (" in said
    pngs = list((out / "report_figures").glob("*.png"))
    assert f"({len(pngs)} PNG files)" in said
    for path in pngs:
        with Image.open(path) as png:
            png.load()

    page = Page((out / "report.html").read_text())
    assert [e.text for e in page.all("h2")] == ["questions · tiny"]
    grid = pd.read_csv(next(out.glob("*_grid.csv")), keep_default_na=False)
    table = page.tables()["All configurations, test questions"]
    for row in grid[grid.part == "test"].itertuples():
        name = row.configuration + " (control)" * (row.method == "random")
        for cell, kind in ((0, "token"), (2, "sum")):
            value, low, high = (
                100 * getattr(row, f"accuracy_{kind}{end}") for end in ("", "_low", "_high")
            )
            assert table[name][cell] == f"{value:.1f} % [{low:.1f}, {high:.1f}]"
    assert "of 4 examples" in page.text and "The first 2 of 3 prompts" in page.text
    rows = pd.read_csv(out / "attributions.csv").drop_duplicates("id")
    for question, line in zip(rows.question, page.all("p", "words"), strict=False):
        assert question in re.sub(r" \(ablated: [a-z, ]+\)", "", plain(line.text))


def test_tasks_of_the_harness(tmp_path):
    """Base and steered with intervals, from the table that harness.py writes."""
    values = {"base": [1, 1, 0, 0, 1, 0, 1, 1], "caa @ 0-3 x 0.2": [1, 0, 0, 0, 0, 0, 0, 1]}
    examples = pd.DataFrame(
        {
            "configuration": label,
            "task": "capitals",
            "filter": "none",
            "metric": "acc",
            "doc": doc,
            "value": float(value),
            "seconds": 12.4,
        }
        for label, row in values.items()
        for doc, value in enumerate(row)
    )
    table = harness.summary(examples)
    path = tmp_path / "harness" / "caa_capitals.csv"
    runs.write_table(path, table)
    runs.write_table(path.with_name("caa_capitals_samples.csv"), examples)
    manifest = {"stage": "harness", "model": {"model": "tiny"}, "steering": {}, "tasks": {}}
    for name in ("caa_capitals", "caa_capitals_samples"):
        runs.write_json(path.with_name(f"{name}.manifest.json"), manifest)
    text, _ = report.build([tmp_path], tmp_path / "report.html", 3)
    (shown,) = re.findall(r"<h3>Other abilities</h3>.*?</table>", text, re.DOTALL)
    base, steered = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", shown, re.DOTALL)
    low, high = table.change_low[1], table.change_high[1]
    assert "0.625" in base and "interval" not in base
    assert "caa @ 0-3 x 0.2" in steered and "0.250" in steered
    assert "\N{MINUS SIGN}0.375" in steered and ">0 / 3<" in steered
    assert f"[{low:.3f}, {high:.3f}]".replace("-", "\N{MINUS SIGN}") in steered
    assert "run steering_mc.py" not in text and "samples" not in shown
