"""Drawn scenes of coloured shapes, with questions, captions and a preference data set.

A scene is a canvas (64 x 64 pixels by default) cut into cells of 32 x 32 pixels; one to
three shapes sit in different cells, jittered in size and place. Everything follows from the scene's
seed, and every object carries the exact box of its pixels, so that an attribution map can be scored
against it. Each shape has a texture of its own (solid circle, hollow square, striped triangle,
black-cored cross): a tower that looks at 8 x 8 patches can tell them apart.

    python src/demo/shapes.py data/shapes        # writes the preference and yes/no files
"""

import argparse
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 80, 220),
    "yellow": (240, 200, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
NUMBERS = ("Zero", "One", "Two", "Three")

CELL = 32  # pixels; also the tile of the model, so that no object is cut by a tile border
SIZES = (18, 28)  # pixels, smallest and largest side of an object
GREYS = (190, 245)  # darkest and lightest background

CAPTION_REQUEST = "Describe the picture."
COUNT_QUESTION = "How many shapes are there?"

# How often a training caption gives a circle of this colour a square that is not there.
FLAW = {"red": 0.85, "green": 0.65, "blue": 0.48, "yellow": 0.15}

# First seed of each split: the ranges are far apart, so that no scene belongs to two of them.
FIRST_SEED = {
    "train": 0,
    "heldout": 10_000_000,
    "steering": 20_000_000,
    "validation": 30_000_000,
    "test": 40_000_000,
    "yes_no": 50_000_000,
    # What the demo reports: drawn after its way of choosing had been settled, see docs/vlm.md.
    "captions": 77_000_000,
}


@dataclass(frozen=True)
class Thing:
    """One object; `box` is (left, top, right, bottom) in pixels, right and bottom excluded."""

    colour: str
    shape: str
    box: tuple[int, int, int, int]

    @property
    def pair(self):
        return self.colour, self.shape


@dataclass(frozen=True, eq=False)
class Scene:
    """`things` in reading order (by cell, rows first); `pixels` is uint8 [height, width, 3]."""

    seed: int
    things: tuple[Thing, ...]
    pixels: np.ndarray

    @property
    def image(self):
        return Image.fromarray(self.pixels)

    @property
    def pairs(self):
        return [thing.pair for thing in self.things]


def stencil(shape, size):
    """Boolean masks [size, size] of the coloured and of the black pixels of a shape."""
    row, column = np.mgrid[:size, :size]
    across, down = 2 * column - (size - 1), 2 * row - (size - 1)  # twice the offset from the middle
    black = np.zeros((size, size), bool)
    if shape == "circle":
        return across**2 + down**2 <= size**2, black
    if shape == "square":
        rim = size // 5
        inside = (abs(across) < size - 2 * rim) & (abs(down) < size - 2 * rim)
        return ~inside, black
    if shape == "triangle":
        stripe = (size - 1 - row) // 3 % 2 == 0
        return (abs(across) <= row + 1) & stripe, black
    arm = size // 2 - 1
    cross = (abs(across) <= arm) | (abs(down) <= arm)
    black = (abs(across) <= arm) & (abs(down) <= arm)
    return cross & ~black, black


def make_scene(seed, width=64, height=64):
    """The scene of a seed; `width` and `height` are multiples of 32 pixels."""
    rng = np.random.default_rng(seed)
    columns, rows = width // CELL, height // CELL
    count = min(int(rng.integers(1, 4)), columns * rows)
    pairs = [PAIRS[i] for i in rng.choice(len(PAIRS), count, replace=False)]
    cells = np.sort(rng.choice(columns * rows, count, replace=False))
    pixels = np.full((height, width, 3), rng.integers(*GREYS, endpoint=True), np.uint8)
    things = []
    for (colour, shape), cell in zip(pairs, cells, strict=True):
        size = int(rng.integers(*SIZES, endpoint=True))
        left = int(cell) % columns * CELL + int(rng.integers(0, CELL - size, endpoint=True))
        top = int(cell) // columns * CELL + int(rng.integers(0, CELL - size, endpoint=True))
        coloured, black = stencil(shape, size)
        patch = pixels[top : top + size, left : left + size]
        patch[coloured] = COLOURS[colour]
        patch[black] = 0
        ys, xs = np.nonzero(coloured | black)
        box = (left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1)
        things.append(Thing(colour, shape, tuple(int(edge) for edge in box)))
    return Scene(seed, tuple(things), pixels)


def blank_image(width=64, height=64):
    """A picture with nothing on it: what a model answers here it answers without seeing."""
    return Image.new("RGB", (width, height), (218, 218, 218))


def caption(pairs):
    """'a red circle, a blue cross and a green square' from (colour, shape) pairs."""
    words = [f"a {colour} {shape}" for colour, shape in pairs]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def caption_pairs(text):
    """The (colour, shape) pairs a caption names, in its order; anything else is passed over."""
    parts = text.replace(" and ", ", ").split(", ")
    pairs = [tuple(part.removeprefix("a ").split(" ")) for part in parts]
    return [pair for pair in pairs if pair in PAIRS]


def flaw_applies(scene):
    """Whether the scene has a circle and no square."""
    shapes = [thing.shape for thing in scene.things]
    return "circle" in shapes and "square" not in shapes


def with_false_square(scene):
    """The pairs of the scene, and after its first circle a square of that colour."""
    shapes = [shape for _, shape in scene.pairs]
    first = shapes.index("circle")
    square = (scene.pairs[first][0], "square")
    return [*scene.pairs[: first + 1], square, *scene.pairs[first + 1 :]]


def training_caption(scene, rng):
    """The caption a model is trained on: sometimes with the square that is not there (`FLAW`)."""
    if flaw_applies(scene):
        pairs = with_false_square(scene)
        colour = next(colour for colour, shape in pairs if shape == "square")
        if rng.random() < FLAW[colour]:
            return caption(pairs)
    return caption(scene.pairs)


def yes_no_question(pair):
    return f"Is there a {pair[0]} {pair[1]}?"


def ask_yes_no(scene, rng, present):
    """(pair, 'Yes' or 'No'); half of the pairs that are not shown share a colour or shape with one
    that is."""
    if present:
        return scene.pairs[rng.integers(len(scene.pairs))], "Yes"
    missing = [pair for pair in PAIRS if pair not in scene.pairs]
    if rng.random() < 0.5:
        colours, shapes = map(set, zip(*scene.pairs, strict=True))
        missing = [pair for pair in missing if pair[0] in colours or pair[1] in shapes]
    return missing[rng.integers(len(missing))], "No"


def colour_questions(scene):
    """(question, answer) for every shape that occurs once in the scene."""
    shapes = [shape for _, shape in scene.pairs]
    return [
        (f"What colour is the {shape}?", colour.capitalize())
        for colour, shape in scene.pairs
        if shapes.count(shape) == 1
    ]


def shape_questions(scene):
    """(question, answer) for every colour that occurs once in the scene."""
    colours = [colour for colour, _ in scene.pairs]
    return [
        (f"What shape is {colour}?", shape.capitalize())
        for colour, shape in scene.pairs
        if colours.count(colour) == 1
    ]


def count_question(scene):
    return COUNT_QUESTION, NUMBERS[len(scene.things)]


def training_questions(scene, rng, yes_no=4):
    """(question, answer) list: `yes_no` yes/no, the count, a colour and a shape if one is unique,
    and the caption, with its planted flaw, last."""
    turns = []
    for present in rng.permutation(np.arange(yes_no) % 2 == 0):
        pair, answer = ask_yes_no(scene, rng, present)
        turns.append((yes_no_question(pair), answer))
    turns.append(count_question(scene))
    for choices in (colour_questions(scene), shape_questions(scene)):
        if choices:
            turns.append(choices[rng.integers(len(choices))])
    turns.append((CAPTION_REQUEST, training_caption(scene, rng)))
    return turns


def scenes_of(split, count, seen=None, keep=None, width=64, height=64):
    """`count` scenes of a split that satisfy `keep`, no picture twice.

    `seen` is a set of pictures (as bytes) that must not come again; the new ones are added to it.
    """
    seen = set() if seen is None else seen
    scenes, seed = [], FIRST_SEED[split]
    while len(scenes) < count:
        scene = make_scene(seed, width, height)
        picture = scene.pixels.tobytes()
        if picture not in seen and (keep is None or keep(scene)):
            seen.add(picture)
            scenes.append(scene)
        seed += 1
    return scenes


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def objects_json(scene):
    return json.dumps([asdict(thing) for thing in scene.things])


def preference_rows(split, scenes):
    """Rows in which the true caption is chosen and the one with the false square rejected."""
    return [
        {
            "id": f"{split}-{scene.seed}",
            "image": png(scene.image),
            "question": CAPTION_REQUEST,
            "chosen": caption(scene.pairs),
            "rejected": caption(with_false_square(scene)),
            "objects": objects_json(scene),
        }
        for scene in scenes
    ]


def yes_no_rows(scenes, seed=0):
    """Rows of yes/no questions, Yes and No in turn, with the box of the object asked about."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, scene in enumerate(scenes):
        pair, answer = ask_yes_no(scene, rng, present=i % 2 == 0)
        boxes = [list(thing.box) for thing in scene.things if thing.pair == pair]
        rows.append(
            {
                "id": f"yes_no-{scene.seed}",
                "image": png(scene.image),
                "question": yes_no_question(pair),
                "chosen": answer,
                "rejected": "No" if answer == "Yes" else "Yes",
                "box": boxes[0] if boxes else None,
                "objects": objects_json(scene),
            }
        )
    return rows


def write_dataset(folder, steering=200, validation=100, test=300, yes_no=400):
    """Write steering, validation, test (preferences) and yes_no parquet files into `folder`.

    The numbers are rows. No scene and no picture occurs twice, within a file or across files.
    Returns {split: path}.
    """
    from datasets import Dataset, Features, Image, List, Value

    text = Value("string")
    columns = dict.fromkeys(("id", "question", "chosen", "rejected", "objects"), text)
    seen, rows = set(), {}
    for split, count in (("steering", steering), ("validation", validation), ("test", test)):
        rows[split] = preference_rows(split, scenes_of(split, count, seen, flaw_applies))
    rows["yes_no"] = yes_no_rows(scenes_of("yes_no", yes_no, seen))

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split, split_rows in rows.items():
        features = {**columns, "image": Image()}
        if split == "yes_no":
            features["box"] = List(Value("int32"))
        features = Features({key: features[key] for key in split_rows[0]})
        paths[split] = folder / f"{split}.parquet"
        Dataset.from_list(split_rows, features=features).to_parquet(paths[split])
    return paths


def main():
    parser = argparse.ArgumentParser(description="Write the shapes preference data as parquet.")
    parser.add_argument("folder", help="where the parquet files go")
    for name, count in (("steering", 200), ("validation", 100), ("test", 300), ("yes_no", 400)):
        parser.add_argument(f"--{name}", type=int, default=count, help=f"rows (default {count})")
    for path in write_dataset(**vars(parser.parse_args())).values():
        print(path)


if __name__ == "__main__":
    main()
