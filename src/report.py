"""A report of results: one HTML page that opens from disk without a network, and PNGs.

Finds what the three stages and the experiment wrote in the given folders, and tells what was run,
what steering gained beside its controls and at what price, which words and image patches the model
went by, and what it says with and without steering.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from urllib.parse import quote

import jinja2
from grains.figures import SCORES
from grains.report_examples import attribution_view, demo_view, generation_view
from grains.report_figures import Figures
from grains.report_files import Section, chosen_path, demo_files, find, manifest_of, what_was_run
from grains.report_steering import evaluation_views

from grains import cli, runs


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS_DIR",
        help="folder with results of the stages, such as results/llm",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="HTML file (default: report.html in the first RESULTS_DIR); the PNGs "
        "go into a folder beside it",
    )
    parser.add_argument(
        "--num_examples",
        type=cli.positive,
        default=6,
        help="examples and prompts shown of each file, in its order",
    )
    return parser


def main() -> None:
    args = flags().parse_args()
    output = args.output or args.results[0] / "report.html"
    page, pngs = build(args.results, output, args.num_examples)
    folder = output.with_name(f"{output.stem}_figures")
    for name, content in pngs.items():
        runs.write_whole(folder / name, lambda path, content=content: path.write_bytes(content))
    runs.write_whole(output, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"report:  {output}")
    print(f"figures: {folder} ({len(pngs)} PNG files)")


def build(folders: list[Path], output: Path, count: int) -> tuple[str, dict[str, bytes]]:
    """The page, and the PNGs by name.

    output: where the page will lie, for its links; count: examples shown of each file.
    """
    drawn = Figures()
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template("report.html.j2")
    page = template.render(
        sections=[view(section, output.parent, drawn, count) for section in find(folders)],
        demo=[demo_view(path) for path in demo_files(folders)],
        scores=SCORES,
        version=runs.versions()["grains"],
    )
    return page, drawn.pngs


def view(section: Section, folder: Path, drawn: Figures, count: int) -> dict:
    """A section for the template. folder: where the page lies, for links."""
    name = f"{section.data}_{runs.slug(section.model)}".strip("_")
    evaluations = [
        item
        for stem, files in section.evaluations.items()
        for item in evaluation_views(stem, files, section.data, drawn, name)
    ]
    attributions = [attribution_view(path, drawn, name, count) for path in section.attributions]
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
        "title": " · ".join(filter(None, (section.data, runs.slug(section.model)))),
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
        "files": [
            (f"{path.parent.name}/{path.name}", link(path, folder))
            for path in [*tables, *beside]
            if path.is_file()
        ],
    }


def link(path: Path, folder: Path) -> str:
    return quote(Path(os.path.relpath(path, folder)).as_posix())


if __name__ == "__main__":
    cli.main(main)
