"""Figures as the report holds them: drawn light and dark, inside the page and as PNG files."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from itertools import chain, count

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from grains.report import figures

WIDTH = 4.8  # inches: text of 9 points is legible on a phone and on a laptop


class Images:
    """Draws figures light and dark for the page, and keeps the light ones as PNGs.

    pngs: file name -> content.
    """

    def __init__(self) -> None:
        self.pngs: dict[str, bytes] = {}

    def add(self, name: str, draw: Callable[[Figure], None], height: float, alt: str) -> dict:
        """What the template needs for one figure. draw: fills a Figure; height: inches."""
        light, places = rendered(draw, height, "light")
        dark, _ = rendered(draw, height, "dark", places)
        return as_item(alt, height, self._keep(name, light), dark)

    def add_picture(
        self, name: str, draw: Callable[[Figure], None], height: float, alt: str
    ) -> dict:
        """As `add`, for a figure without text on a clear ground: one variant goes for both."""
        png, _ = rendered(draw, height, "light", transparent=True)
        return as_item(alt, height, self._keep(name, png))

    def _keep(self, name: str, png: bytes) -> bytes:
        """Make it a PNG file of this name, or of one like it."""
        base = re.sub(r"[^\w+-]+", "-", name)
        files = (f"{base}{end}.png" for end in chain([""], count(2)))
        file = next(file for file in files if file not in self.pngs)
        self.pngs[file] = png
        return png


def as_item(alt: str, height: float, light: bytes, dark: bytes | None = None) -> dict:
    """What the template needs for one figure, from its PNGs. height: inches, of `WIDTH` ones."""
    links = [
        png and "data:image/png;base64," + base64.b64encode(png).decode() for png in (light, dark)
    ]
    # CSS pixels of the figure as drawn: 96 an inch.
    return {
        "light": links[0],
        "dark": links[1],
        "alt": alt,
        "width": round(96 * WIDTH),
        "height": round(96 * height),
    }


def rendered(
    draw: Callable[[Figure], None],
    height: float,
    theme: str,
    places: Sequence[Bbox] = (),
    transparent: bool = False,
) -> tuple[bytes, list[Bbox]]:
    """A figure as a PNG, and where its axes are.

    places: of the same figure in another theme. To find them takes as long as to draw it.
    transparent: without a ground.
    """
    with figures.style(theme), warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page has them as text.
        warnings.filterwarnings("ignore", message="Glyph")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        if places:
            figure.set_layout_engine("none")
            for axes, place in zip(figure.axes, places, strict=True):
                axes.set_position(place)
        if transparent:
            figure.patch.set_visible(False)
            for axes in figure.axes:
                axes.patch.set_visible(False)
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)  # savefig would first draw it for its size
    return buffer.getvalue(), [axes.get_position() for axes in figure.axes]
