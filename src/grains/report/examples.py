"""Single examples in the report: the words and image patches that the model goes by, and what it
says with and without steering."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from grains import data, vision
from grains.errors import UserError
from grains.report import figures
from grains.report.files import examples_of, manifest_of
from grains.report.images import WIDTH, Images, as_item
from grains.report.reading import from_json, read_table
from grains.report.text import joined, number, percent

# --- stage 1 ---


def attribution_view(path: Path, drawn: Images, name: str, count: int) -> dict:
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
    once = table.drop_duplicates("id")
    errors = once.completeness_error_relative_worst.dropna()  # Integrated Gradients' alone
    return {
        "name": path.name,
        "note": note,
        "total": len(ids),
        "error": percent(errors.median()),
        "worst": percent(errors.max()),
        "gradients": f"{once.gradients_computed.median():.0f}",
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
            example_view(path, table[table.id == identity], pictures, drawn, name)
            for identity in ids[:count]
        ],
    }


@dataclass(frozen=True)
class Line:
    """The prompt once: contrastive attribution has one line, 'normal' one for each response.

    scores: of every position; ablated: selection -> positions. The words are those of the prompt
    without its template at both ends, which has no attribution.
    """

    words: list[figures.Word]
    scores: list[float]
    ablated: dict[str, set[int]]


def example_lines(path: Path, rows: pd.DataFrame) -> list[Line]:
    first = rows.iloc[0]
    tokens = from_json(path, "tokens", first.tokens)
    selected = {
        row.top: from_json(path, "selected_positions", row.selected_positions)
        for row in rows.itertuples()
    }
    lines = []
    for index, scores in enumerate(from_json(path, "attributions", first.attributions)):
        if len(scores) != len(tokens):
            raise UserError(
                f"'{path}', column attributions: {len(scores)} scores for "
                f"{len(tokens)} tokens of example {first.id}"
            )
        found = figures.words(tokens, scores)
        moved = [i for i, word in enumerate(found) if word.score] or [0, len(found) - 1]
        lines.append(
            Line(
                found[moved[0] : moved[-1] + 1],
                scores,
                {top: set(sets[index]) for top, sets in selected.items()},
            )
        )
    return lines


def example_view(
    path: Path, rows: pd.DataFrame, pictures: dict[str, data.Example], drawn: Images, name: str
) -> dict:
    first, lines = rows.iloc[0], example_lines(path, rows)
    image = set(from_json(path, "image_positions", first.get("image_positions") or "[]"))
    heat, note = None, ""
    if image and first.id in pictures:
        try:
            heat = heat_view(path, first, lines[0], sorted(image), pictures[first.id], drawn, name)
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
    items = []
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


def heat_view(path, row, line, positions, example, drawn, name) -> dict:
    """The picture beside its heat-map."""
    boxes = from_json(path, "image_boxes", row.image_boxes)
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
    cut = {
        top: [
            box
            for position, box in zip(positions, boxes, strict=True)
            if box and position in line.ablated[top]
        ]
        for top in ("pos", "neg")
        if top in line.ablated
    }

    def draw(figure):
        plain, mapped = figure.subplots(1, 2)
        plain.imshow(picture)
        plain.set_axis_off()
        figures.draw_heat(mapped, picture, heat, largest, cut)

    outlined = [f"{len(boxes)} ablated as {top}" for top, boxes in cut.items()]
    alt = (
        f"Picture of example {row.id}, plain and with the attribution of its patches; outlined: "
        f"{joined(outlined) if outlined else 'none'}."
    )
    item = drawn.add_picture(
        f"{name}_heat_{row.id}", draw, min(WIDTH / 2 * picture.height / picture.width, 5.0), alt
    )
    return item | {
        "largest": largest,
        "scale": number(largest).lstrip("+"),
        "shares": joined(
            f"{percent(float(row[f'{sign}_share_image']))} of the {sign}"
            for sign in ("positive", "negative")
        ),
    }


# --- stage 3 ---


def generation_view(path: Path, count: int) -> dict:
    """Base and steered texts of the first prompts, with what differs."""
    table = read_table(path, "generation")
    prompts = list(table.groupby("prompt", sort=False))
    changed = table.base != table.steered
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
                        "configuration": row.configuration,
                        "same": row.base == row.steered,
                        "texts": word_difference(row.base, row.steered),
                    }
                    for row in rows.itertuples()
                ],
            }
            for _, rows in prompts[:count]
        ],
    }


def word_difference(base: str, steered: str) -> tuple[list, list]:
    """Both texts as runs of words (text, whether the other text lacks them)."""
    one, two = (re.findall(r"\s*\S+", text) for text in (base, steered))
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in one], [word.strip() for word in two], autojunk=False
    )
    runs_of = ([], [])
    for tag, i, j, k, m in matcher.get_opcodes():
        for found, text in zip(runs_of, ("".join(one[i:j]), "".join(two[k:m])), strict=True):
            words = text.lstrip()
            found += [(text[: len(text) - len(words)], False), (words, tag != "equal")]
    return runs_of


# --- the demo ---


def demo_view(path: Path) -> dict:
    """What a demo measured (CSV) or drew (PNG), as it stands."""
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype=str, keep_default_na=False).rename(
            columns={"Unnamed: 0": ""}
        )
        return {
            "name": path.stem.replace("_", " ").capitalize(),
            "picture": None,
            "table": table.to_html(index=False, border=0),
        }
    with Image.open(path) as picture:
        height = WIDTH * picture.height / picture.width
    return {
        "name": path.name,
        "picture": as_item(
            f"The picture that the demo drew, {path.name}.", height, path.read_bytes()
        ),
    }
