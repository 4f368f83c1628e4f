"""The measurements of the vision-language demo: pointing game, captions, and a picture of both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from demo import shapes
from grains import prompts, readable, runs, stats, vision
from grains.attribution import attribute
from grains.data import Example
from grains.errors import UserError
from grains.generation import generate
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.report import figures
from grains.scoring import score
from grains.settings import CONTROLS, AttributionSettings
from grains.steering import Configuration

# Image tokens alone move, words are kept: the question is where in the picture the answer lies.
PATHS = {
    "default: blank picture, adaptive": AttributionSettings(attribute="image"),
    "published: zeros, 20 points, all positions": AttributionSettings(
        baseline="zeros", image_baseline="zeros", attribute="all", ig_steps=20
    ),
}
ENOUGH = 0.85  # preference accuracy on validation scenes
FEWER = 0.25  # false squares on validation scenes, as a share of the base model's
FINALISTS = 16
BATCH = 25
SHOWN = 3


def example(row: dict) -> Example:
    return Example(
        row["id"], row["question"], (row["chosen"], row["rejected"]), 0, image=row["image"]
    )


def questions(lm: LanguageModel, count: int, max_tokens: int) -> list[tuple[dict, Encoded]]:
    """Held-out questions about an object of the picture that the model answers right.

    count: how many at most. Returns their rows and encodings.
    """
    asked: list[tuple[dict, Encoded]] = []
    for row in shapes.yes_no_rows(shapes.scenes_of("yes_no", 4 * count)):
        if row["box"] and len(asked) < count:
            encoded = prompts.encode(lm, example(row), "chat")
            yes, no = score(lm, [encoded], [], max_tokens)[0][0]
            if yes > no:
                asked.append((row, encoded))
    return asked


def pointing_game(
    lm: LanguageModel, asked: list[tuple[dict, Encoded]], max_tokens: int
) -> pd.DataFrame:
    """How often the image token with the largest attribution lies on the object: a row a path.

    asked: as `questions` gives them.
    """
    lines = []
    for name, settings in PATHS.items():
        hits, chance, errors = [], [], []
        for row, encoded in tqdm(asked, desc=f"pointing game ({name.split(':')[0]})"):
            result = attribute(lm, encoded, settings, max_tokens, torch.Generator())[0]
            inside = np.array(
                [centre_inside(box, row["box"]) for box in prompts.boxes(lm, encoded)]
            )
            hits.append(inside[result.scores[encoded.image.numpy()].argmax()])
            chance.append(inside.mean())
            errors.append(result.relative_error)
        rate, low, high = stats.accuracy_interval(np.array(hits))
        lines.append(
            {
                "path": name,
                "questions": len(hits),
                "on the object": f"{rate:.1%}",
                "95 % interval": f"{low:.1%} to {high:.1%}",
                "by chance": f"{np.mean(chance):.1%}",
                "median completeness error": f"{np.median(errors):.1%}",
            }
        )
    return pd.DataFrame(lines)


def centre_inside(token, box) -> bool:
    """Whether the middle of an image token's patch lies in an object's box."""
    if token is None:
        return False
    x, y = (token[0] + token[2]) / 2, (token[1] + token[3]) / 2
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def captions(
    lm: LanguageModel,
    configurations: list[Configuration],
    grid: pd.DataFrame,
    num_scenes: int,
    max_tokens: int,
) -> tuple[pd.DataFrame, Configuration]:
    """Choose a configuration on validation scenes, and report on test scenes with its controls.

    grid: steering_mc_vlm.py's table of the same configurations. num_scenes: validation scenes of
    each kind (flawed, with a square). Returns the table, and what was chosen.
    Raises UserError if no configuration prefers the true captions often enough.
    """
    seen: set[bytes] = set()

    def scenes_of(split, count):
        return (
            shapes.scenes_of(split, count, seen, shapes.flaw_applies),
            shapes.scenes_of(split, count, seen, has_square),
        )

    validation = grid[(grid.part == "validation") & ~grid.method.isin(["base", *CONTROLS])]
    by_label = {item.label: item for item in configurations}
    # The mildest of those that prefer the true captions: strength times layers.
    good = validation[validation.accuracy_sum >= ENOUGH].configuration
    finalists = sorted(
        (by_label[label] for label in good),
        key=lambda item: (item.alpha * len(item.layers), item.label),
    )[:FINALISTS]
    if not finalists:
        raise UserError(
            f"no configuration prefers the true caption in {ENOUGH:.0%} of the "
            "validation scenes: widen the grid"
        )
    rates = caption_rates(
        lm, finalists, *scenes_of("validation", num_scenes), "captions of validation scenes"
    )
    base = rates[0]
    # Of those with few enough false squares the one that costs least; otherwise the fewest.
    enough = [
        (cost(rate, base), item.label)
        for item, rate in zip(finalists, rates[1:], strict=True)
        if np.mean(rate["false squares"]) <= FEWER * np.mean(base["false squares"])
    ]
    fewest = [
        (np.mean(rate["false squares"]), item.label)
        for item, rate in zip(finalists, rates[1:], strict=True)
    ]
    best = by_label[min(enough or fewest)[1]]
    controls = [
        item
        for item in configurations
        if item.method in CONTROLS and (item.layers, item.alpha) == (best.layers, best.alpha)
    ]

    flawed, squares = scenes_of("captions", 2 * num_scenes)
    rates = caption_rates(lm, [best, *controls], flawed, squares, "captions of test scenes")
    preferred = preferences(lm, [best, *controls], flawed, max_tokens)
    names = ["base", "steered (chosen)", *("control" for _ in controls)]
    labels = ["", best.label, *(item.label for item in controls)]
    return pd.DataFrame(
        [
            {
                "": name,
                "configuration": label,
                "preference accuracy": f"{wins.mean():.1%}",
                "preference interval": interval(wins),
                **{key: f"{np.mean(values):.1%}" for key, values in rate.items()},
                "false squares interval": interval(rate["false squares"]),
            }
            for name, label, wins, rate in zip(names, labels, preferred, rates, strict=True)
        ]
    ), best


def interval(values: Sequence[bool]) -> str:
    _, low, high = stats.accuracy_interval(np.array(values))
    return f"{low:.1%} to {high:.1%}"


def preferences(
    lm: LanguageModel,
    configurations: list[Configuration],
    scenes: list[shapes.Scene],
    max_tokens: int,
) -> np.ndarray:
    """(1 + C, scenes) whether the true caption is likelier than the one with a false square."""
    encoded = [
        prompts.encode(lm, example(row), "chat")
        for row in shapes.preference_rows("captions", scenes)
    ]
    scores = [
        values
        for start in tqdm(range(0, len(encoded), BATCH), desc="preferences")
        for values in score(lm, encoded[start : start + BATCH], configurations, max_tokens)
    ]
    return np.array([values[:, 0] > values[:, 1] for values in scores]).T


def cost(rate: dict, base: dict) -> float:
    """Objects and real squares that are no longer named: the sum of both shares lost."""
    return sum(
        np.mean(base[kind]) - np.mean(rate[kind]) for kind in ("objects named", "squares named")
    )


def has_square(scene: shapes.Scene) -> bool:
    return any(thing.shape == "square" for thing in scene.things)


def caption_rates(
    lm: LanguageModel,
    configurations: list[Configuration],
    flawed: list[shapes.Scene],
    squares: list[shapes.Scene],
    what: str,
) -> list[dict[str, list[bool]]]:
    """For base and each configuration (n,) booleans: false squares, objects and squares named.

    flawed: scenes with a circle and no square; squares: scenes with a square.
    """
    scenes = [*flawed, *squares]
    encoded = [
        prompts.encode(
            lm,
            Example(
                str(scene.seed), shapes.CAPTION_REQUEST, ("a",), 0, image=shapes.png(scene.image)
            ),
            "chat",
        )
        for scene in scenes
    ]
    written: list[list[str]] = [[] for _ in range(1 + len(configurations))]
    for start in tqdm(range(0, len(scenes), BATCH), desc=what):
        texts = generate(lm, encoded[start : start + BATCH], configurations, max_new_tokens=32)
        for row, part in zip(written, texts, strict=True):
            row += part
    rates = []
    for texts in written:
        named = [shapes.caption_pairs(text) for text in texts]
        shown = [
            (pair, pair in names)
            for scene, names in zip(scenes, named, strict=True)
            for pair in scene.pairs
        ]
        rates.append(
            {
                "false squares": ["square" in text for text in texts[: len(flawed)]],
                "objects named": [hit for _, hit in shown],
                "squares named": [hit for pair, hit in shown if pair[1] == "square"],
            }
        )
    return rates


def draw(
    lm: LanguageModel,
    asked: list[tuple[dict, Encoded]],
    best: Configuration,
    max_tokens: int,
    path: Path,
) -> bool:
    """A figure of the first scenes in which the base model names a square that is not shown: the
    attribution of a question about their circle, over the picture and in its words, and both
    captions. Returns False if none of the scenes is such."""
    rows = [
        (
            row,
            encoded,
            shapes.caption(
                [(thing["colour"], thing["shape"]) for thing in json.loads(row["objects"])]
            ),
        )
        for row, encoded in asked
        if "circle" in row["question"]
    ]
    described = [
        prompts.encode(
            lm, Example(row["id"], shapes.CAPTION_REQUEST, ("a",), 0, image=row["image"]), "chat"
        )
        for row, _, _ in rows
    ]
    written = zip(*generate(lm, described, [best], 32), strict=True)
    shown = [
        (*row, *texts)
        for row, texts in zip(rows, written, strict=True)
        if "square" in texts[0] and "square" not in row[2]
    ][:SHOWN]
    if not shown:
        return False
    with figures.style("light"):
        figure = Figure(figsize=(9, 1.8 * len(shown)), layout="constrained")
        panels = figure.subplots(len(shown), 3, width_ratios=(1, 1, 3.4), squeeze=False)
        for axes, title in zip(
            panels[0], ("scene", "attribution", "question and captions"), strict=True
        ):
            axes.set_title(title)
        for (row, encoded, true, base, steered), (scene, heat, text) in zip(
            shown, panels, strict=True
        ):
            image, on_image = vision.open_image(encoded.example), encoded.image.numpy()
            # The picture as in the pointing game, its words kept; the words with all moving.
            of_image, of_words = (
                attribute(lm, encoded, settings, max_tokens, torch.Generator())[0].scores
                for settings in (AttributionSettings(attribute="image"), AttributionSettings())
            )
            over = figures.heat_map(prompts.boxes(lm, encoded), of_image[on_image], image.size)
            scene.imshow(image)
            scene.set_axis_off()
            figures.draw_heat(heat, image, over, np.abs(over).max())
            tokens = lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids)
            question = np.flatnonzero(encoded.content.numpy())
            figures.draw_words(
                text,
                [
                    (
                        readable.words([tokens[i] for i in question], of_words[question]),
                        f"answer: {row['chosen']}\n\nin the picture: {true}\nbase caption: {base}\n"
                        f"steered caption: {steered}",
                    )
                ],
            )
        runs.write_whole(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True
