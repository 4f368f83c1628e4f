"""Prints the path of a stage's file, by the flags that the stage was run with.

    python -m grains.cli.where llm grid --model_name smollm2-135m-instruct --alphas 0.01 0.02

Scripts ask this instead of putting a file's name together, or of taking whatever is in a folder.
"""

from __future__ import annotations

import argparse

from grains.cli import entry, flags
from grains.data import DATASETS
from grains.errors import UserError

KINDS = {kind.name: kind for kind in (flags.LLM, flags.VLM)}
FILES = ("attributions", "grid", "questions", "chosen")


def parser(kind: flags.Kind) -> argparse.ArgumentParser:
    parser = flags.evaluation_parser(__doc__, kind)
    parser.prog = f"python -m grains.cli.where {kind.name}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_score(parser)
    parser.add_argument(
        "file",
        choices=FILES,
        help="attributions: of token_ablation.py; the others: of steering_mc.py",
    )
    return parser


def main() -> None:
    first = argparse.ArgumentParser(prog="python -m grains.cli.where", add_help=False)
    first.add_argument("kind", choices=KINDS)
    kind, rest = first.parse_known_args()
    args = parser(KINDS[kind.kind]).parse_args(rest)
    if args.dataset_name not in DATASETS and not args.dataset_path:
        raise UserError(f"unknown data set '{args.dataset_name}': expected {', '.join(DATASETS)}")
    names = flags.names_of(args)
    if args.file == "attributions":
        print(names.attributions())
    else:
        grid = flags.grid_settings(args)
        print(names.multiple_choice(grid, flags.GRID, args.score, args.output_dir)[args.file])


if __name__ == "__main__":
    entry.run(main)
