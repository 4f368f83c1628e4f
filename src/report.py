"""A report of results: one HTML page that opens from disk without a network, and PNGs.

Finds what the three stages and the experiment wrote in the given folders, and shows what was run,
what steering gained beside its controls and at what cost, which words and image patches the answers
relied on, and what the model says with and without steering.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo import registered  # noqa: F401  its pictures are read again by the data set's name
from grains.cli import entry, flags


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    parser.add_argument(
        "results",
        nargs="+",
        type=flags.path,
        metavar="RESULTS_DIR",
        help="folder with results of the stages, such as results/llm",
    )
    parser.add_argument(
        "--output",
        type=flags.file,
        help="HTML file (default: report.html in the first RESULTS_DIR); the PNGs "
        "go into a folder beside it",
    )
    parser.add_argument(
        "--num_examples",
        type=flags.positive,
        default=6,
        help="examples and prompts shown of each file, in its order",
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    results = [Path(folder) for folder in args.results]
    output = Path(args.output) if args.output else results[0] / "report.html"

    entry.import_libraries()
    from grains import runs
    from grains.report import page

    page.check_output(output)
    html, pngs = page.build(results, output, args.num_examples)
    folder = output.with_name(f"{output.stem}_figures")
    for name, content in pngs.items():
        runs.write_whole(folder / name, lambda path, content=content: path.write_bytes(content))
    runs.write_whole(output, lambda path: path.write_text(html, encoding="utf-8"))
    print(f"report:  {output}")
    print(f"figures: {folder} ({len(pngs)} PNG files)")


if __name__ == "__main__":
    entry.run(main)
