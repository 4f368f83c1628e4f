"""The whole report: one HTML page that opens from disk without a network, and its figures."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import quote

import jinja2

from grains import runs
from grains.errors import UserError
from grains.names import slug
from grains.report.examples import attribution_view, demo_view, generation_view, harness_view
from grains.report.figures import TITLES
from grains.report.files import Section, chosen_path, demo_files, find, manifest_of, what_was_run
from grains.report.images import Images
from grains.report.steering import evaluation_views


def check_output(path: Path) -> None:
    """Raise UserError unless a report can be written here: only a report is replaced."""
    runs.check_output(path)
    if path.exists():
        with path.open("rb") as file:
            if b"<title>GrAInS report: " not in file.read(1024):
                raise UserError(
                    f"'{path}' is no report, so it is not replaced: give another output, or move "
                    "it away"
                )


def build(folders: list[Path], output: Path, count: int) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNGs by name.

    output: where the page will lie, for its links; count: examples shown of each file.
    """
    images = Images()
    page = _template().render(
        sections=[section_view(section, output.parent, images, count) for section in find(folders)],
        demo=[demo_view(path) for path in demo_files(folders)],
        scores=TITLES,
        version=runs.versions()["grains"],
    )
    return page, images.pngs


@cache
def _template() -> jinja2.Template:
    """Compiled once, however many reports a process makes."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("template.html.j2")


def section_view(section: Section, folder: Path, images: Images, count: int) -> dict:
    """A section for the template. folder: where the page lies, for links."""
    name = f"{section.data}_{slug(section.model)}".strip("_")
    evaluations = [
        item
        for stem, files in section.evaluations.items()
        for item in evaluation_views(stem, files, section.data, images, name)
    ]
    attributions = [attribution_view(path, images, name, count) for path in section.attributions]
    tables = section.tables()
    manifests = [manifest_of(path) for path in tables]
    beside = [
        *(path.with_suffix(".manifest.json") for path in tables),
        *map(chosen_path, section.evaluations),
    ]
    examples = [f"{item['total']} attributed" for item in attributions]
    examples += [
        f"{asked} {part} questions"
        for item in evaluations
        for part, asked in item["counts"].items()
    ]
    return {
        "title": " · ".join(filter(None, (section.data, slug(section.model)))),
        "anchor": re.sub(r"[^\w-]+", "-", name),
        "known": any(manifests),
        "run": what_was_run(
            manifests,
            ", ".join(dict.fromkeys(examples)),
            [seed for item in evaluations for seed in item["seeds"]],
        ),
        "evaluations": evaluations,
        "attributions": attributions,
        "generations": [generation_view(path, count) for path in section.generations],
        "harness": [harness_view(path) for path in section.harness],
        "files": [
            (f"{path.parent.name}/{path.name}", link(path, folder))
            for path in [*tables, *beside]
            if path.is_file()
        ],
    }


def link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())
