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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from demo import shapes
from grains import cli, models, prompts, runs, stats, vision
from grains.attribution import Settings, attribute
from grains.data import Example
from grains.generation import generate
from grains.scoring import score
from grains.vectors import CONTROLS

# Image tokens alone move, words are kept: the question is where in the picture the answer lies.
PATHS = {
    "default: blank picture, adaptive": Settings(attribute="image"),
    "published: zeros, 20 points, all positions": Settings(
        baseline="zeros", image_baseline="zeros", attribute="all", ig_steps=20),
}
MAX_RECALL_LOSS = 0.02  # of objects and of real squares, on validation scenes
FINALISTS = 8
BATCH = 25
SHOWN = 3


def flags():
    parser = cli.parser(__doc__, cli.VLM)
    cli.add_model_flags(parser)
    cli.add_data_flags(parser)
    cli.add_stage1_flags(parser)
    cli.add_vector_flags(parser)
    cli.add_grid_flags(parser)
    cli.add_evaluation_flags(parser)
    group = parser.add_argument_group("demo")
    group.add_argument("--num_questions", type=cli.positive, default=120,
                       help="yes/no questions of the pointing game")
    group.add_argument("--num_scenes", type=cli.positive, default=200,
                       help="test scenes of each kind that are captioned")
    return parser


def main() -> None:
    args = flags().parse_args()
    lm = cli.load_model(args)
    folder = Path(args.output_dir or cli.SRC / "results" / "vlm" / "demo")

    pointing, shown = pointing_game(lm, args)
    runs.write_table(folder / "pointing_game.csv", pointing)

    configurations, _ = cli.configurations(args, lm, cli.hidden_states_files(args))
    grid = pd.read_csv(cli.mc_paths(args)["grid"], keep_default_na=False)
    table, best = captions(lm, configurations, grid, args)
    runs.write_table(folder / "captions.csv", table)

    picture(lm, shown, best, folder / "demo.png")
    print("\nPointing game: the top image token lies on the object asked about")
    print(pointing.to_string(index=False))
    print("\nCaptions of test scenes; configuration chosen on validation scenes")
    print(table.to_string(index=False))
    print(f"\ntables:  {folder / 'pointing_game.csv'}, {folder / 'captions.csv'}")
    print(f"picture: {folder / 'demo.png'}")


def example(row: dict) -> Example:
    return Example(row["id"], row["question"], (row["chosen"], row["rejected"]), 0,
                   image=row["image"])


def pointing_game(lm: models.LanguageModel, args) -> tuple[pd.DataFrame, list]:
    """A row for each path; and the first examples with their scores, to be drawn."""
    asked: list[tuple] = []
    scenes = shapes.scenes_of("yes_no", 4 * args.num_questions)
    for row in shapes.yes_no_rows(scenes):
        if row["box"] and len(asked) < args.num_questions:
            encoded = prompts.encode(lm, example(row), "chat")
            yes, no = score(lm, [encoded], [], args.batch_tokens)[0][0]
            if yes > no:
                asked.append((row, encoded))
    lines, shown = [], []
    for name, settings in PATHS.items():
        hits, chance, errors = [], [], []
        for row, encoded in tqdm(asked, desc=f"pointing game ({name.split(':')[0]})"):
            result = attribute(lm, encoded, settings, args.batch_tokens, torch.Generator())[0]
            image = encoded.image.numpy()
            boxes = vision.token_boxes(lm, encoded.inputs, shapes_size(row), int(image.sum()))
            inside = np.array([centre_inside(box, row["box"]) for box in boxes])
            hits.append(inside[result.scores[image].argmax()])
            chance.append(inside.mean())
            errors.append(result.relative_error)
            if settings.attribute == "image" and len(shown) < SHOWN and "circle" in row["question"]:
                shown.append((row, encoded, result, boxes))
        rate, low, high = stats.accuracy_interval(np.array(hits))
        lines.append({"path": name, "questions": len(hits), "on the object": f"{rate:.1%}",
                      "95 % interval": f"{low:.1%} to {high:.1%}",
                      "by chance": f"{np.mean(chance):.1%}",
                      "median completeness error": f"{np.median(errors):.1%}"})
    return pd.DataFrame(lines), shown


def shapes_size(row: dict) -> tuple[int, int]:
    return vision.open_image(example(row)).size


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
        return (shapes.scenes_of(split, count, seen, shapes.flaw_applies),
                shapes.scenes_of(split, count, seen, has_square))

    validation = grid[(grid.part == "validation") & ~grid.method.isin(["base", *CONTROLS])]
    ranked = validation.sort_values(f"accuracy_{args.score}", ascending=False).configuration
    by_label = {item.label: item for item in configurations}
    finalists = [by_label[label] for label in ranked[:FINALISTS]]
    rates = caption_rates(lm, finalists, *scenes_of("validation", args.num_scenes // 2),
                          "captions of validation scenes")
    base = rates[0]
    kept = [(rate["false squares"], item.alpha, item.label)
            for item, rate in zip(finalists, rates[1:], strict=True)
            if base["objects named"] - rate["objects named"] <= MAX_RECALL_LOSS
            and base["squares named"] - rate["squares named"] <= MAX_RECALL_LOSS]
    if not kept:  # every one costs more: the cheapest, and the table says so
        kept = [(base["objects named"] - rate["objects named"], item.alpha, item.label)
                for item, rate in zip(finalists, rates[1:], strict=True)]
    best = by_label[min(kept)[2]]
    controls = [item for item in configurations if item.method in CONTROLS
                and (item.layers, item.alpha) == (best.layers, best.alpha)]

    test = scenes_of("test", args.num_scenes)
    rates = caption_rates(lm, [best, *controls], *test, "captions of test scenes")
    names = ["base", "steered (chosen)", *("control" for _ in controls)]
    labels = ["", best.label, *(item.label for item in controls)]
    on_test = grid[grid.part == "test"].set_index("configuration")
    return pd.DataFrame([
        {"": name, "configuration": label,
         "preference accuracy": f"{on_test.accuracy_sum[label or 'base']:.1%}",
         **{key: f"{value:.1%}" for key, value in rate.items()}}
        for name, label, rate in zip(names, labels, rates, strict=True)]), best


def has_square(scene) -> bool:
    return any(thing.shape == "square" for thing in scene.things)


def caption_rates(lm, configurations, flawed, squares, what) -> list[dict]:
    """For base and each configuration: false squares, objects and real squares named.

    flawed: scenes with a circle and no square; squares: scenes with a square.
    """
    scenes = [*flawed, *squares]
    encoded = [prompts.encode(lm, Example(str(scene.seed), shapes.CAPTION_REQUEST, ("a",), 0,
                                          image=shapes.png(scene.image)), "chat")
               for scene in scenes]
    said: list[list[str]] = [[] for _ in range(1 + len(configurations))]
    for start in tqdm(range(0, len(scenes), BATCH), desc=what):
        texts = generate(lm, encoded[start:start + BATCH], configurations, max_new_tokens=32)
        for row, part in zip(said, texts, strict=True):
            row += part
    rates = []
    for texts in said:
        named = [shapes.caption_pairs(text) for text in texts]
        there = [(pair, pair in names) for scene, names in zip(scenes, named, strict=True)
                 for pair in scene.pairs]
        rates.append({
            "false squares": float(np.mean(["square" in text for text in texts[:len(flawed)]])),
            "objects named": float(np.mean([hit for _, hit in there])),
            "squares named": float(np.mean([hit for pair, hit in there if pair[1] == "square"])),
        })
    return rates


def picture(lm, shown, best, path: Path) -> None:
    """Scenes with their heat-map, the question's words in colour, base and steered captions."""
    figure, axes = plt.subplots(2, len(shown), figsize=(3.6 * len(shown), 4.6), dpi=130,
                                layout="constrained", height_ratios=(6, 1))
    for column, (row, encoded, result, boxes) in enumerate(shown):
        image = vision.open_image(example(row))
        scores = result.scores[encoded.image.numpy()]
        heat = np.zeros((image.height, image.width))
        for box, value in zip(boxes, scores, strict=True):
            if box is not None:
                x0, y0, x1, y1 = (round(edge) for edge in box)
                heat[y0:y1, x0:x1] += value
        largest = np.abs(heat).max()
        above, below = axes[0, column], axes[1, column]
        above.imshow(image)
        # Opaque where the attribution is, clear where there is none.
        above.imshow(heat, cmap="PuOr", vmin=-largest, vmax=largest,
                     alpha=0.75 * np.abs(heat) / largest)
        above.set_axis_off()
        above.set_title(f"{row['question']} {row['chosen']}", fontsize=10)
        caption = prompts.encode(lm, Example(row["id"], shapes.CAPTION_REQUEST, ("a",), 0,
                                             image=row["image"]), "chat")
        base, steered = (texts[0] for texts in generate(lm, [caption], [best], 32))
        below.set_axis_off()
        true = shapes.caption([(t["colour"], t["shape"]) for t in json.loads(row["objects"])])
        below.text(0.5, 1, f"there: {true}\nbase: {base}\nsteered: {steered}", fontsize=7,
                   ha="center", va="top", transform=below.transAxes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    cli.main(main)
