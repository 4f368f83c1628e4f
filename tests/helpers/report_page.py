"""The report as its tests look at it: its elements, their texts and attributes."""

from __future__ import annotations

import re
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from matplotlib.figure import Figure

from grains.report import images, page


class Page(HTMLParser):
    """The elements of a page, with their texts and attributes."""

    VOID = ("meta", "img", "source", "br", "link", "input")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.elements: list[SimpleNamespace] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        element = SimpleNamespace(tag=tag, text="", attributes=dict(attributes))
        self.elements.append(element)
        if tag not in ("span", "ins", "del", "a"):
            self.handle_data(" ")
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, text):
        for element in self.open:
            element.text += text

    def all(self, tag: str, css_class: str = "") -> list[SimpleNamespace]:
        return [
            e for e in self.elements if e.tag == tag and css_class in e.attributes.get("class", "")
        ]

    @property
    def text(self) -> str:
        return plain(self.all("main")[0].text)

    def tables(self) -> dict[str, dict[str, list[str]]]:
        """caption -> row header -> cells."""
        found, rows = {}, {}
        for element in self.elements:
            if element.tag == "caption":
                rows = found.setdefault(plain(element.text), {})
            elif element.tag == "th" and element.attributes["scope"] == "row":
                cells = rows.setdefault(plain(element.text), [])
            elif element.tag == "td":
                cells.append(plain(element.text))
        return found


def plain(text: str) -> str:
    """White space as one space, no-break spaces and the minus sign as typed."""
    return re.sub(r"\s+", " ", text.replace("\N{MINUS SIGN}", "-")).strip()


def page_of(*folders: Path, count: int = 6, drawn: bool = False) -> Page:
    """The report of some folders. drawn: its figures too; else they are filled, but not rendered.

    Rendering takes nearly all of the time, and most tests look at texts and tables alone.
    """
    with nullcontext() if drawn else patch.object(images, "rendered", _filled):
        return Page(page.build(list(folders), folders[0] / "report.html", count)[0])


def _filled(draw, height, theme, places=(), **options) -> tuple[bytes, list]:
    if theme == "light":
        draw(Figure(figsize=(images.WIDTH, height)))
    return b"PNG", []
