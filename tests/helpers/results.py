"""Results as the stages write them, made up by hand for the report's tests."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

import steering_generation
import steering_mc
from grains import data, runs, tables
from grains.generation import Written
from grains.scoring import margins
from grains.steering import BASE, Configuration
from grains.study.pareto import UNCONSTRAINED
from helpers import tiny

MODEL = {
    "model": "small",
    "dtype": "float32",
    "num_layers": 4,
    "hidden_size": 8,
    "final_norm_sum": "1.0",
    "vocab_size": 99,
}
VERSIONS = {"grains": "0.1.0", "torch": "2.0"}
STEM = "things_small_n2_seed0"
NASTY = r'Is 1 < 2 & "quoted" <script>alert(1)</script> {{ 7*7 }} $\frac$?'
SCRIPTS = "Ελληνικά 日本語 العربية 👩‍🚀"


def configuration(name: str) -> Configuration:
    """'mean pos@0.1' steers layers 1 and 2, 'pca pos@0.1@3' layer 3; 'base' none."""
    if name == "base":
        return BASE
    method, alpha, *layer = name.split("@")
    method, _, mode = method.partition(" ")
    return Configuration(method, mode, (int(layer[0]),) if layer else (1, 2), float(alpha))


def write_evaluation(
    folder: Path,
    right: dict[str, list[bool]],
    *,
    best="",
    stem=STEM,
    flags=None,
    extra=None,
    evaluate_on="held_out",
) -> pd.DataFrame:
    """Stage 2's files, made by its own functions from which questions are answered right.

    right: 'base' first, then configurations as `configuration` reads them -> right or wrong for
    each question by the sum; per token every fifth question (0, 5, ...) is wrong for all.
    extra: column -> values of the configurations.
    """
    split = "test" if evaluate_on == "held_out" else "all"
    examples = [
        data.Example(f"q{i}", f"question {i}", ("yes", "no"), 0) for i in range(len(right["base"]))
    ]
    splits = [split] * len(examples)
    answers = np.array(list(right.values()))
    if evaluate_on == "held_out":
        examples += [data.Example(f"v{i}", f"other {i}", ("yes", "no"), 0) for i in range(4)]
        splits += ["validation"] * 4
        answers = np.concatenate([answers, np.ones((len(answers), 4), bool)], axis=1)
    encoded = [SimpleNamespace(example=example, responses=[[1], [1, 2]]) for example in examples]
    # Of one and of two tokens: -3 and -4 in sum are -3 and -2 per token.
    scores = [
        np.where(column[:, None], [[-3.0, -8.0 if i % 5 else -4.0]], [[-5.0, -4.0]])
        for i, column in enumerate(answers.T)
    ]
    configurations = [configuration(name) for name in right]
    questions = tables.question_table(splits, encoded, configurations, scores)
    accuracies = []
    for name in dict.fromkeys(splits):
        own = [index for index, other in enumerate(splits) if other == name]
        leads = margins([encoded[i] for i in own], [scores[i] for i in own])
        accuracies.append(tables.accuracy_table(configurations, leads).assign(part=name))
    grid = pd.concat(accuracies).sort_index(kind="stable").reset_index(drop=True)
    grid = grid.assign(alpha_units="relative", includes_steering_examples=split == "all")
    grid = grid[steering_mc.COLUMNS]
    for column, values in (extra or {}).items():
        grid[column] = [
            values[list(right).index(name)]
            for name in map(
                {configuration(name).label: name for name in right}.get, grid.configuration
            )
        ]
    place = folder / "steering"
    runs.write_table(place / f"{stem}_grid.csv", grid)
    runs.write_table(place / f"{stem}_questions.csv", questions)
    runs.write_json(
        place / f"{stem}_grid.manifest.json",
        {
            "stage": "steering_mc",
            "model": MODEL,
            "data": {"name": "things", "path": None},
            "flags": {"methods": ["mean", "random"], "score": "token", "seed": 0} | (flags or {}),
            "versions": VERSIONS,
        },
    )
    if best:
        runs.write_json(
            place / f"{stem}_chosen.json",
            {"configuration": configuration(best).label, "controls": ["random"]},
        )
    return grid


def some(right: int, count: int = 40, first: int = 0) -> list[bool]:
    """`right` of `count` questions, from number `first` on."""
    return [first <= i < first + right for i in range(count)]


def attribution_rows(
    identity="a",
    tokens=("Q", ":", "Ġis", "Ġit", "?"),
    scores=((0, 0, 1.5, -0.75, 0.25),),
    selected=None,
    **changes,
) -> list[dict]:
    """One example's rows of stage 1, in its columns."""
    selected = selected or {"pos": [[2]], "neg": [[3]]}
    return [
        {
            "id": identity,
            "top": top,
            "question": "is it?",
            "chosen": "yes it is",
            "rejected": "no it is not",
            "f": 2.0,
            "f_ablated": 2.0 - len(top),
            "log_likelihood_pos": -3.0,
            "log_likelihood_neg": -5.0,
            "log_likelihood_pos_ablated": -4.0,
            "log_likelihood_neg_ablated": -5.0,
            "k": 1,
            "selected_positions": json.dumps(positions),
            "selected_tokens": "[]",
            "f_change_along_path": 1.0,
            "completeness_error": 0.01,
            "completeness_error_relative": 0.01,
            "completeness_error_relative_worst": 0.0123,
            "gradients_computed": 17,
            "tokens": json.dumps(tokens),
            "attributions": json.dumps(scores),
            **changes,
        }
        for top, positions in selected.items()
    ]


def write_attributions(folder: Path, rows: list[dict], given: dict | None = None, name="words"):
    path = folder / "token_attribution" / f"{name}.csv"
    runs.write_table(path, pd.DataFrame(rows))
    runs.write_json(
        path.with_suffix(".manifest.json"),
        {
            "stage": "token_ablation",
            "model": MODEL,
            "seed": 5,
            "settings": {"top_k": 1},
            "data": {
                "name": "things",
                "path": None,
                "split": "train",
                "num_samples": 2,
                **(given or {}),
            },
            "versions": VERSIONS,
        },
    )
    return path


def write_generations(folder: Path, texts: list[tuple[str, str]], question="what is it?"):
    configuration = Configuration("mean", "pos", (1,), 0.5)
    example = data.Example("g", question, ("the truth",), 0)
    path = folder / "steering_generation" / "texts.csv"
    runs.write_table(
        path,
        pd.DataFrame(
            [
                steering_generation.row(
                    i,
                    example,
                    configuration,
                    "chat",
                    *(Written(i, n, 0, text, "eos", 5) for n, text in enumerate(pair)),
                )
                for i, pair in enumerate(texts)
            ]
        ),
    )
    runs.write_json(
        path.with_suffix(".manifest.json"),
        {
            "stage": "steering_generation",
            "model": MODEL,
            "data": {"name": "things"},
            "flags": {"seed": 0},
            "max_new_tokens": 9,
            "versions": VERSIONS,
        },
    )
    return path


def picture_results(folder: Path, size=(24, 12)) -> dict:
    """Stage 1 of two examples with pictures, and the data they came from.

    Their image tokens show the left half, the right half, and the whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", size, colour).save(folder / f"{name}.png")
        rows.append(
            {
                "id": name,
                "image": f"{name}.png",
                "prompt": f"what is {name}?",
                "chosen": colour,
                "rejected": "grey",
            }
        )
    source = tiny.write_jsonl(folder / "pictures.jsonl", rows)
    order = [e.id for e in data.examples(*data.load("things", "train", str(source)), 5)]
    half = size[0] // 2
    table = [
        row
        for name in order
        for row in attribution_rows(
            name,
            ("<image>",) * 3 + ("Ġwhat",),
            ((2.0, -4.0, -0.5, 1.0),),
            {"pos": [[0]], "neg": [[1]]},
            positive_share_image=2 / 3,
            positive_share_text=1 / 3,
            negative_share_image=1.0,
            negative_share_text=0.0,
            image_positions="[0, 1, 2]",
            image_boxes=json.dumps(
                [[0, 0, half, size[1]], [half, 0, size[0], size[1]], [0, 0, *size]]
            ),
        )
    ]
    write_attributions(folder, table, {"path": str(source), "ids": order})
    return {"source": source, "order": order}


BUDGETS = (0.02, 0.05, 0.1)


def write_front(folder: Path, rows: list[dict], stem=STEM, limits=(UNCONSTRAINED,)):
    """rows: method, gain of each budget, p; one configuration a budget unless it is named.

    limits: on what else may be lost; under each the same is chosen.
    """
    lines = []
    for row, score, limit in product(rows, ("token", "sum"), limits):
        for budget, gain in zip(BUDGETS, row["gains"], strict=True):
            shown = gain / (1 if score == "token" else 2)
            lines.append(
                {
                    "dataset": "things",
                    "method": row["method"],
                    "mode": row.get("mode", ""),
                    "is_control": row["method"] == "random",
                    "score": score,
                    "limit": limit,
                    "max_ppl_increase": budget,
                    "base_accuracy": 0.4,
                    "seeds": 3,
                    "configuration": row.get("configuration", f"{row['method']} @ 1-2 x {budget}"),
                    "accuracy": 0.4 + shown,
                    "accuracy_low": 0.3 + shown,
                    "accuracy_high": 0.5 + shown,
                    "gain": shown,
                    "gain_low": shown - 0.04,
                    "gain_high": shown + 0.05,
                    "p_value": row["p"],
                    "perplexity_increase": budget * 0.9,
                    "answers_increase": 0.07,
                    "repetition": 0.18,
                    "unrelated_change": -0.012,
                    "unrelated_change_low": -0.031,
                    "unrelated_change_high": 0.004,
                    "repetition_change": 0.021,
                    "repetition_change_low": -0.013,
                    "repetition_change_high": 0.055,
                }
            )
    table = pd.DataFrame(lines)
    runs.write_table(folder / "steering" / f"{stem}_front.csv", table)
    return table


def write_everything(folder: Path) -> Path:
    """Results of all stages, with single layers, costs, a front, pictures and awkward texts."""
    right = {"base": some(16)}
    for i, method in enumerate(("mean pos", "mean both", "gradient", "random")):
        right |= {f"{method}@{alpha}": some(22 + round(40 * alpha) - 3 * i) for alpha in (0.1, 0.2)}
    right |= {
        f"{method}@{alpha}@{layer}": some(12 + 2 * layer + round(20 * alpha))
        for method in ("pca pos", "random")
        for alpha in (0.1, 0.2)
        for layer in range(2)
    }
    count = len(right)
    write_evaluation(
        folder,
        right,
        best="mean pos@0.2",
        extra={
            "perplexity_increase": [0.03 * i for i in range(count)],
            "unrelated_accuracy": [0.55] * count,
        },
    )
    write_front(
        folder,
        [
            {"method": "mean", "mode": "pos", "gains": (0.01, 0.03, 0.08), "p": 0.01},
            {"method": "gradient", "gains": (-0.01, 0.02, 0.05), "p": 0.2},
            {"method": "random", "gains": (0.0, -0.01, 0.01), "p": 0.9},
        ],
    )
    write_attributions(
        folder,
        [
            *attribution_rows("first"),
            *attribution_rows(
                NASTY,
                question=NASTY,
                chosen=SCRIPTS,
                rejected=NASTY,
                tokens=("Ġ<b>", "Ġ" + "w" * 90, "ðŁĺ", "Ģ"),
                scores=((0.1, -0.2, 0.3, 0.4),),
                selected={"pos": [[2, 3]]},
            ),
        ],
    )
    write_generations(
        folder,
        [(f"It is {NASTY}", f"It was {SCRIPTS} " + "long" * 60), ("the same", "the same")],
        question=NASTY,
    )
    picture_results(folder / "pictures")
    return folder
