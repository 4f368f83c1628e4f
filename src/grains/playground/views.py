"""What the page shows, as HTML. Texts of the user and of the model are escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np
from PIL import Image

from grains import readable
from grains.api import TokenAttribution
from grains.playground.bench import Curve
from grains.readable import MINUS
from grains.settings import ABLATION_METHODS
from grains.steering import SteeringVectors

WIDTH, HEIGHT = 360, 190  # of the curve, in the units of its drawing
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 16, 24  # its margins


def number(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def strength(value: float) -> str:
    return f"{value:.4g}".replace("-", MINUS)


def note(text: str) -> str:
    """What the page does now."""
    return f'<p class="g-soft" role="status">{escape(text)}</p>'


def trouble(text: str) -> str:
    """What went wrong, in a line."""
    return f'<p class="g-trouble" role="alert">{escape(text)}</p>'


def empty(text: str) -> str:
    """What will stand in a place."""
    return f'<p class="g-empty">{escape(text)}</p>'


def attribution(scored: TokenAttribution, picture: Image.Image | None) -> str:
    """The prompt's words, and patches of its picture, on the colour of their scores.

    Words and patches are each on a scale of their own: a patch alone says little. The template at
    both ends, which has no scores, is left out.
    """
    words = readable.without_template(readable.words(scored.tokens, scored.scores.tolist()))
    of_image = scored.scores[scored.image]
    of_words = [word for word in words if not scored.image[word.positions[0]]]
    largest = max((abs(word.score) for word in of_words), default=0.0) or 1.0
    full = f"±{largest:.2f} nats"
    pieces = []
    for in_picture, group in groupby(words, lambda word: bool(scored.image[word.positions[0]])):
        if in_picture:
            pieces.append(f' <span class="g-chip">picture, {len(of_image)} tokens</span> ')
            continue
        for word in group:
            text = word.text.lstrip()
            space = word.text[: len(word.text) - len(text)]
            look = _look(word.score, largest)
            pieces.append(f"{escape(space)}<span {look}>{escape(text)}</span>")
    over = ""
    if picture is not None and of_image.any():
        strongest = float(np.abs(of_image).max())
        over = _patches(scored, of_image, strongest, picture)
        full += f", in the picture at ±{strongest:.2f}"
    error = scored.completeness_error
    return (
        f'{over}<p class="g-words" dir="auto">{"".join(pieces)}</p>'
        f'<p class="g-soft">for the dispreferred answer <span class="g-scale"></span> for the '
        f"preferred answer; full colour at {full}. The scores sum to "
        f"{number(float(scored.scores.sum()))}; completeness error {100 * error:.1f}&nbsp;%.</p>"
    )


def _look(score: float, largest: float, place: str = "") -> str:
    sign, share = "pos" if score > 0 else "neg", abs(score) / largest
    return f'class="g-{sign}" title="{number(score)}" style="--s:{share:.3f};{place}"'


def _patches(
    scored: TokenAttribution, scores: np.ndarray, largest: float, picture: Image.Image
) -> str:
    """The picture, pale, under its patches."""
    if not any(scored.boxes):
        return note("It is not known where in the picture this model's image tokens lie.")
    width, height = picture.size
    patches = []
    for box, score in zip(scored.boxes, scores, strict=True):
        if box is not None:
            x, y = 100 * box[0] / width, 100 * box[1] / height
            wide, high = 100 * (box[2] - box[0]) / width, 100 * (box[3] - box[1]) / height
            place = f"left:{x:.2f}%;top:{y:.2f}%;width:{wide:.2f}%;height:{high:.2f}%"
            patches.append(f"<i {_look(score, largest, place)}></i>")
    shown = picture.copy()
    shown.thumbnail((640, 640))
    content = io.BytesIO()
    shown.save(content, "PNG")
    source = base64.b64encode(content.getvalue()).decode()
    return (
        f'<div class="g-picture"><img alt="the picture, under the attribution of its patches" '
        f'src="data:image/png;base64,{source}">{"".join(patches)}</div>'
    )


def answers(texts: Sequence[str], alpha: float) -> str:
    """The base model's text and the steered one, side by side; in which words they differ."""
    titles = "base", f"steered at {strength(alpha)}"
    sides = []
    for title, tag, pieces in zip(
        titles, ("del", "ins"), readable.word_difference(*texts), strict=True
    ):
        text = "".join(
            f"<{tag}>{escape(piece)}</{tag}>" if differs else escape(piece)
            for piece, differs in pieces
            if piece
        )
        sides.append(f'<div><h4>{title}</h4><p dir="auto">{text}</p></div>')
    return f'<div class="g-answers">{"".join(sides)}</div>'


def pairs_of(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def vectors(made: SteeringVectors) -> str:
    """What vectors they are, in a line."""
    info = made.info
    method = info.get("method", "made by hand")
    name = f"{method} {info.get('mode')}" if method in ABLATION_METHODS else method
    data = info.get("data")
    count = data.get("num_samples") if isinstance(data, dict) else None
    pairs = f", {pairs_of(count)}" if count else ""
    gate = ", behind gates" if made.gate else ""
    return note(f"Vectors: {name}{pairs}{gate}; {len(made.vectors)} layers.")


def curve(response: Curve, alpha: float) -> str:
    """The margin over the strength as a drawing, marked at a strength."""
    low, high = min(0.0, response.margins.min()), max(0.0, response.margins.max())
    high += (high == low) * 1.0
    first, last = response.alphas[0], response.alphas[-1]

    def x(value: float) -> float:
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    points = list(zip(response.alphas, response.margins, strict=True))
    line = " ".join(f"{x(a):.1f},{y(m):.1f}" for a, m in points)
    dots = "".join(
        f'<circle cx="{x(a):.1f}" cy="{y(m):.1f}" r="2.5">'
        f"<title>{strength(a)}: {number(m)}</title></circle>"
        for a, m in points
    )
    sides = "".join(
        f'<text x="{x(a):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{strength(a)}</text>'
        for a, anchor in ((first, "start"), (0.0, "middle"), (last, "end"))
    )
    heights = "".join(
        f'<text x="{LEFT - 5}" y="{y(m) + 3:.1f}" text-anchor="end">{number(m)[:-1]}</text>'
        for m in {low, 0.0, high}
    )
    at, margin = float(np.clip(alpha, first, last)), response.at(alpha)
    anchor = "end" if at > (first + last) / 2 else "start"
    shift = -7 if anchor == "end" else 7
    said = f"margin {number(margin)} at strength {strength(at)}"
    return (
        f'<svg class="g-curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>'
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'{sides}{heights}<polyline points="{line}"/>{dots}'
        f'<line class="g-mark" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"/><circle class="g-mark" cx="{x(at):.1f}" cy="{y(margin):.1f}" '
        f'r="4.5"/><text class="g-now" x="{x(at) + shift:.1f}" y="{TOP - 4}" '
        f'text-anchor="{anchor}">{said}</text></svg>'
        f'<p class="g-soft">log P(preferred) {MINUS} log P(dispreferred) in nats, over the '
        "strength. Above 0 the model leans to the preferred answer.</p>"
    )
