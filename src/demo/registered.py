"""The demo's data set and model, known by their short names once this module is imported."""

import json
from pathlib import Path

from grains.data import Source, pairs, register
from grains.settings import MODELS

HERE = Path(__file__).resolve().parent
SCENES = HERE.parent / "data" / "vlm" / "shapes"


def draw(folder: Path) -> None:
    """The scenes that the small vision-language model knows, drawn from their seeds."""
    from demo.shapes import write_dataset

    write_dataset(folder)


def scene(row: dict) -> dict:
    """A row of the scenes: two captions, and all objects of the picture."""
    things = json.loads(row.get("objects") or "null")
    return pairs(row) | {
        "objects": things and [f"{thing['colour']} {thing['shape']}" for thing in things]
    }


MODELS["shapes-vlm"] = str(HERE / "shapes_vlm")
register(
    "shapes",
    Source(
        str(SCENES),
        ("image", "question", "chosen", "rejected"),
        scene,
        ("steering", "validation", "test"),
        make=draw,
    ),
)
