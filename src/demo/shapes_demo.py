"""What attribution and steering do to the small vision-language model, measured on drawn scenes.

1. Pointing game: for yes/no questions about an object that is there, and that the model answers
   right, does the image token with the largest attribution lie on that object?
2. Captions: how often the model names a square that is not there, and how many of the objects that
   are there it names, base and steered, beside controls of the same strength. The configuration is
   chosen on validation scenes, among those of steering_mc_vlm.py's grid.

Run after token_ablation_vlm.py and steering_mc_vlm.py, with their flags (see scripts/vlm/demo.sh).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from demo import shapes
from grains import cli, figures, models, prompts, runs, stats, vision
from grains.attribution import Settings, attribute
from grains.data import Example
from grains.errors import UserError
from grains.generation import generate
from grains.scoring import score
from grains.vectors import CONTROLS

# Image tokens alone move, words are kept: the question is where in the picture the answer lies.
PATHS = {
    "default: blank picture, adaptive": Settings(attribute="image"),
    "published: zeros, 20 points, all positions": Settings(
        baseline="zeros", image_baseline="zeros", attribute="all", ig_steps=20
    ),
}
ENOUGH = 0.85  # preference accuracy on validation scenes
FEWER = 0.25  # false squares on validation scenes, as a share of the base model's
FINALISTS = 16
BATCH = 25
SHOWN = 3


def flags():
    parser = cli.evaluation_parser(__doc__, cli.VLM)
    group = parser.add_argument_group("demo")
    group.add_argument(
        "--num_questions",
        type=cli.positive,
        default=120,
        help="yes/no questions of the pointing game",
    )
    group.add_argument(
        "--num_scenes",
        type=cli.positive,
        default=200,
        help="validation scenes of each kind that are captioned; twice as many test scenes are",
    )
    return parser


def main() -> None:
    args = flags().parse_args()
    lm = cli.load_model(args)
    folder = Path(args.output_dir or cli.SRC / "results" / "vlm" / "demo")

    asked = questions(lm, args)
    pointing = pointing_game(lm, asked, args)
    runs.write_table(folder / "pointing_game.csv", pointing)

    configurations, _ = cli.configurations(args, lm, cli.hidden_states_files(args))
    grid = pd.read_csv(cli.mc_paths(args)["grid"], keep_default_na=False)
    table, best = captions(lm, configurations, grid, args)
    runs.write_table(folder / "captions.csv", table)

    picture(lm, asked, best, args, folder / "demo.png")
    print("\nPointing game: the top image token lies on the object asked about")
    print(pointing.to_string(index=False))
    print("\nCaptions of test scenes; configuration chosen on validation scenes")
    print(table.to_string(index=False))
    print(f"\ntables:  {folder / 'pointing_game.csv'}, {folder / 'captions.csv'}")
    print(f"picture: {folder / 'demo.png'}")


def example(row: dict) -> Example:
    return Example(
        row["id"], row["question"], (row["chosen"], row["rejected"]), 0, image=row["image"]
    )


def questions(lm: models.LanguageModel, args) -> list[tuple]:
    """Rows and encodings of held-out questions about an object that is there, answered right."""
    asked: list[tuple] = []
    for row in shapes.yes_no_rows(shapes.scenes_of("yes_no", 4 * args.num_questions)):
        if row["box"] and len(asked) < args.num_questions:
            encoded = prompts.encode(lm, example(row), "chat")
            yes, no = score(lm, [encoded], [], args.batch_tokens)[0][0]
            if yes > no:
                asked.append((row, encoded))
    return asked


def pointing_game(lm: models.LanguageModel, asked: list[tuple], args) -> pd.DataFrame:
    """A row for each path."""
    lines = []
    for name, settings in PATHS.items():
        hits, chance, errors = [], [], []
        for row, encoded in tqdm(asked, desc=f"pointing game ({name.split(':')[0]})"):
            result = attribute(lm, encoded, settings, args.batch_tokens, torch.Generator())[0]
            inside = np.array([centre_inside(box, row["box"]) for box in boxes_of(lm, encoded)])
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


def boxes_of(lm: models.LanguageModel, encoded) -> list:
    """Where the image tokens of a prompt lie in its picture."""
    size = vision.open_image(encoded.example).size
    return vision.token_boxes(lm, encoded.inputs, size, int(encoded.image.sum()))


def centre_inside(token, box) -> bool:
    """Whether the middle of an image token's patch lies in an object's box."""
    if token is None:
        return False
    x, y = (token[0] + token[2]) / 2, (token[1] + token[3]) / 2
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def captions(lm, configurations, grid, args) -> tuple[pd.DataFrame, object]:
    """Choose on validation scenes, report on test scenes with the controls."""
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
        lm, finalists, *scenes_of("validation", args.num_scenes), "captions of validation scenes"
    )
    base = rates[0]
    # Of those that mend enough the one that costs least; of none, the one that mends most.
    few = [
        (cost(rate, base), item.label)
        for item, rate in zip(finalists, rates[1:], strict=True)
        if np.mean(rate["false squares"]) <= FEWER * np.mean(base["false squares"])
    ]
    most = [
        (np.mean(rate["false squares"]), item.label)
        for item, rate in zip(finalists, rates[1:], strict=True)
    ]
    best = by_label[min(few or most)[1]]
    controls = [
        item
        for item in configurations
        if item.method in CONTROLS and (item.layers, item.alpha) == (best.layers, best.alpha)
    ]

    flawed, squares = scenes_of("captions", 2 * args.num_scenes)
    rates = caption_rates(lm, [best, *controls], flawed, squares, "captions of test scenes")
    preferred = preferences(lm, [best, *controls], flawed, args.batch_tokens)
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


def interval(values) -> str:
    _, low, high = stats.accuracy_interval(np.array(values))
    return f"{low:.1%} to {high:.1%}"


def preferences(lm, configurations, scenes, max_tokens: int) -> np.ndarray:
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


def has_square(scene) -> bool:
    return any(thing.shape == "square" for thing in scene.things)


def caption_rates(lm, configurations, flawed, squares, what) -> list[dict]:
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
    said: list[list[str]] = [[] for _ in range(1 + len(configurations))]
    for start in tqdm(range(0, len(scenes), BATCH), desc=what):
        texts = generate(lm, encoded[start : start + BATCH], configurations, max_new_tokens=32)
        for row, part in zip(said, texts, strict=True):
            row += part
    rates = []
    for texts in said:
        named = [shapes.caption_pairs(text) for text in texts]
        there = [
            (pair, pair in names)
            for scene, names in zip(scenes, named, strict=True)
            for pair in scene.pairs
        ]
        rates.append(
            {
                "false squares": ["square" in text for text in texts[: len(flawed)]],
                "objects named": [hit for _, hit in there],
                "squares named": [hit for pair, hit in there if pair[1] == "square"],
            }
        )
    return rates


def picture(lm, asked, best, args, path: Path) -> None:
    """The first scenes in which the base model names a square that is not there: the attribution
    of a question about their circle, over the picture and in its words, and both captions."""
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
    captions = zip(*generate(lm, described, [best], 32), strict=True)
    shown = [
        (*row, *said)
        for row, said in zip(rows, captions, strict=True)
        if "square" in said[0] and "square" not in row[2]
    ][:SHOWN]
    if not shown:
        print("no picture: in none of these scenes does the base model name a false square")
        return
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
                attribute(lm, encoded, settings, args.batch_tokens, torch.Generator())[0].scores
                for settings in (Settings(attribute="image"), Settings())
            )
            over = figures.heat_map(boxes_of(lm, encoded), of_image[on_image], image.size)
            scene.imshow(image)
            scene.set_axis_off()
            figures.draw_heat(heat, image, over, np.abs(over).max())
            tokens = lm.tokenizer.convert_ids_to_tokens(encoded.prompt_ids)
            question = np.flatnonzero(encoded.content.numpy())
            figures.draw_words(
                text,
                [
                    (
                        figures.words([tokens[i] for i in question], of_words[question]),
                        f"answer: {row['chosen']}\n\nin the picture: {true}\nbase caption: {base}\n"
                        f"steered caption: {steered}",
                    )
                ],
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


if __name__ == "__main__":
    cli.main(main)
