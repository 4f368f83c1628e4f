"""Single examples in the report: the words and image patches that an answer depends on, and what
the model writes with and without steering."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from grains import data, readable, vision
from grains.errors import UserError
from grains.readable import MINUS, Word
from grains.report import figures
from grains.report.files import examples_of, manifest_of
from grains.report.images import WIDTH, Images, as_item
from grains.report.reading import are, from_json, is_below, is_box, is_finite, is_text, read_table
from grains.report.text import joined, number, p_text, percent
from grains.steering import BASE

# --- stage 1 ---


def attribution_view(path: Path, images: Images, name: str, count: int) -> dict:
    """What ablation does on the whole, and the first examples with their attributions.

    name: begins the names of the figures; count: examples shown.
    """
    table = read_table(path, "attribution")
    ids = list(dict.fromkeys(table.id))
    pictures, note = {}, ""
    if "image_boxes" in table and (table.image_boxes != "").any():
        try:
            pictures = examples_of(manifest_of(path))
        except UserError as error:
            note = f"The pictures are not shown, their data cannot be read again: {error}"
    firsts = table.drop_duplicates("id")
    errors = firsts.completeness_error_relative_worst.dropna()  # Integrated Gradients' alone
    return {
        "name": path.name,
        "note": note,
        "total": len(ids),
        "error": percent(errors.median()),
        "worst": percent(errors.max()),
        "gradients": f"{firsts.gradients_computed.median():.0f}",
        "tops": [
            {
                "top": top,
                "before": number(rows.f.mean()),
                "after": number(rows.f_ablated.mean()),
                "change": number((rows.f_ablated - rows.f).mean()),
                "lower": int((rows.f_ablated < rows.f).sum()),
                "of": len(rows),
            }
            for top, rows in table.groupby("top", sort=False)
        ],
        "examples": [
            example_view(path, table[table.id == identity], pictures, images, name)
            for identity in ids[:count]
        ],
    }


@dataclass(frozen=True)
class Line:
    """The prompt once: contrastive attribution has one line, 'normal' one for each response.

    scores: of every position; ablated: selection -> positions. The words are those of the prompt
    without its template at both ends, which has no attribution.
    """

    words: list[Word]
    scores: list[float]
    ablated: dict[str, set[int]]


def example_lines(path: Path, rows: pd.DataFrame) -> list[Line]:
    """The prompt of an example; rows: those of its selections.

    Raises UserError for a cell that is not what stage 1 writes.
    """
    first = rows.iloc[0]
    tokens = cell(path, "tokens", first, are(is_text), "a JSON list of texts")
    attributions = cell(
        path, "attributions", first, are(are(is_finite)), "a JSON list of lists of numbers"
    )
    wrong = [scores for scores in attributions if len(scores) != len(tokens)]
    if wrong or not attributions:
        raise UserError(
            f"'{path}', column attributions: {len(wrong[0]) if wrong else 0} scores for "
            f"{len(tokens)} tokens of example {first.id}"
        )
    positions, count = are(is_below(len(tokens))), len(attributions)
    selected = {
        row.top: cell(
            path,
            "selected_positions",
            row,
            lambda content: are(positions)(content) and len(content) == count,
            "a JSON list of positions for each list of attributions",
        )
        for _, row in rows.iterrows()
    }
    lines = []
    for index, scores in enumerate(attributions):
        words = readable.words(tokens, scores)
        lines.append(
            Line(
                readable.without_template(words),
                scores,
                {top: set(lists[index]) for top, lists in selected.items()},
            )
        )
    return lines


def cell(
    path: Path, column: str, row: pd.Series, fits: Callable[[Any], bool], expected: str
) -> Any:
    """The JSON in a cell of an example (see `from_json`)."""
    return from_json(f"'{path}', column {column}, example {row.id}", row[column], fits, expected)


def example_view(
    path: Path, rows: pd.DataFrame, pictures: dict[str, data.Example], images: Images, name: str
) -> dict:
    first, lines = rows.iloc[0], example_lines(path, rows)
    shown = are(is_below(len(lines[0].scores)))
    image = (
        set(cell(path, "image_positions", first, shown, "a JSON list of positions"))
        if first.get("image_positions")
        else set()
    )
    heat, note = None, ""
    if image and first.id in pictures:
        try:
            heat = heat_view(path, first, lines[0], sorted(image), pictures[first.id], images, name)
        except UserError as error:
            note = str(error)
    return {
        "id": first.id,
        "question": first.question,
        "chosen": first.chosen,
        "rejected": first.rejected,
        "heat": heat,
        "note": note,
        "lines": [
            line_view(line, image, heat["largest"] if heat and index == 0 else 0)
            for index, line in enumerate(lines)
        ],
        "f": number(first.f),
        "ablated": [
            {"top": row.top, "k": int(row.k), "f": number(row.f_ablated)}
            for row in rows.itertuples()
        ],
        "error": percent(first.completeness_error_relative_worst),
        "gradients": int(first.gradients_computed),
    }


def line_view(line: Line, image: set[int], largest: float) -> list[dict]:
    """The words of a line for the template; a picture's tokens are one item.

    largest: what has full colour at least (the picture's largest attribution).
    """
    largest = max([largest, *(abs(word.score) for word in line.words)]) or 1.0
    items: list[dict] = []
    for in_picture, group in groupby(line.words, lambda word: word.positions[0] in image):
        if in_picture:
            items.append({"picture": sum(len(word.positions) for word in group)})
            continue
        for word in group:
            tops = [top for top, cut in line.ablated.items() if cut.intersection(word.positions)]
            items.append(
                {
                    "picture": 0,
                    "space": word.text[:1].isspace(),
                    "text": word.text.strip() or ("↵" if "\n" in word.text else "␣"),
                    "sign": "pos" if word.score > 0 else "neg" if word.score < 0 else "none",
                    "strength": f"{abs(word.score) / largest:.3f}",
                    "score": number(word.score),
                    "tops": tops,
                }
            )
    return items


def heat_view(
    path: Path,
    row: pd.Series,
    line: Line,
    positions: list[int],
    example: data.Example,
    images: Images,
    name: str,
) -> dict:
    """The picture beside its heat-map."""
    boxes = cell(
        path,
        "image_boxes",
        row,
        lambda content: are(is_box)(content) and len(content) == len(positions),
        "a JSON list of a box or null for each image token",
    )
    if not any(boxes):
        raise UserError(
            "It is not known where in the picture this model's image tokens lie: no heat-map"
        )
    picture = vision.open_image(example)
    scores = [line.scores[position] for position in positions]
    heat = figures.heat_map(boxes, scores, picture.size)
    largest = max(
        np.abs(heat).max(),
        *(abs(word.score) for word in line.words if word.positions[0] not in positions),
        1e-12,
    )
    cut: dict[str, list] = {
        top: [
            box
            for position, box in zip(positions, boxes, strict=True)
            if box and position in line.ablated[top]
        ]
        for top in ("pos", "neg")
        if top in line.ablated
    }

    def draw(figure: Figure) -> None:
        plain, mapped = figure.subplots(1, 2)
        plain.imshow(picture)
        plain.set_axis_off()
        figures.draw_heat(mapped, picture, heat, largest, cut)

    outlined = [f"{len(boxes)} ablated as {top}" for top, boxes in cut.items()]
    alt = (
        f"Picture of example {row.id}, plain and with the attribution of its patches; outlined: "
        f"{joined(outlined) if outlined else 'none'}."
    )
    item = images.add_picture(
        f"{name}_heat_{row.id}", draw, min(WIDTH / 2 * picture.height / picture.width, 5.0), alt
    )
    return item | {
        "largest": largest,
        "scale": number(largest).lstrip("+"),
        "shares": joined(
            f"{percent(row.get(f'{sign}_share_image', np.nan))} of the {sign}"
            for sign in ("positive", "negative")
        ),
    }


# --- stage 3 ---


def generation_view(path: Path, count: int) -> dict:
    """Base and steered texts of the first prompts, with what differs."""
    table = read_table(path, "generation")
    prompts = list(table.groupby("prompt", sort=False))
    changed = table.base != table.steered
    several = "draw" in table and table.draw.nunique() > 1
    return {
        "name": path.name,
        "total": len(prompts),
        "says": [
            f"{configuration} changes {int(changed[rows.index].sum())} of {len(rows)} texts"
            for configuration, rows in table.groupby("configuration", sort=False)
        ],
        "prompts": [
            {
                "id": rows.id.iloc[0],
                "question": rows.question.iloc[0],
                "reference": rows.reference.iloc[0],
                "pairs": [
                    {
                        "configuration": row.configuration
                        + (f", draw {row.draw}" if several else ""),
                        "same": row.base == row.steered,
                        "texts": readable.word_difference(row.base, row.steered),
                    }
                    for row in rows.itertuples()
                ],
            }
            for _, rows in prompts[:count]
        ],
    }


# --- other abilities ---


def harness_view(path: Path) -> dict:
    """lm-eval's tasks, base and steered: each change with its interval, and what it took."""
    table = read_table(path, "harness")
    return {
        "name": path.name,
        "rows": [
            {
                "task": f"{row.task} {row.metric}" + (f" ({row.filter})" if row.filter else ""),
                "configuration": row.configuration,
                "base": row.configuration == BASE.label,
                "examples": int(row.examples),
                "value": f"{row.value:.3f}",
                "change": f"{row.change:+.3f}".replace("-", MINUS),
                "interval": f"[{row.change_low:.3f}, {row.change_high:.3f}]".replace("-", MINUS),
                "p": p_text(row.p_value),
                "turned": f"{int(row.better)} / {int(row.worse)}",
                "seconds": f"{row.seconds:.0f}",
            }
            for row in table.itertuples()
        ],
    }


# --- the demo ---


AGAIN = "was it cut short or changed? run the demo again"


def demo_view(path: Path) -> dict:
    """What a demo measured (CSV) or drew (PNG), as it stands."""
    if path.suffix == ".csv":
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise UserError(f"'{path}' cannot be read as a CSV ({error}): {AGAIN}") from error
        return {
            "name": path.stem.replace("_", " ").capitalize(),
            "picture": None,
            "table": table.rename(columns={"Unnamed: 0": ""}).to_html(index=False, border=0),
        }
    try:
        with Image.open(path) as picture:
            height = WIDTH * picture.height / picture.width
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as a picture ({error}): {AGAIN}") from error
    return {
        "name": path.name,
        "picture": as_item(
            f"The picture that the demo drew, {path.name}.", height, path.read_bytes()
        ),
    }
