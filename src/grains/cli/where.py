"""Prints the path of a stage's file, by the flags that the stage was run with; a line for each of
several.

    python -m grains.cli.where llm grid --model_name smollm2-135m-instruct --alphas 0.01 0.02

Scripts ask this instead of putting a file's name together, or of searching a folder.
"""

from __future__ import annotations

import argparse

from grains.cli import entry, flags
from grains.data import DATASETS
from grains.errors import UserError
from grains.settings import TOPS

KINDS = {kind.name: kind for kind in (flags.LLM, flags.VLM)}
FILES = ("attributions", "states", "grid", "questions", "chosen", "generations")
NAMED_BY_SPLIT = ("attributions", "states")  # the split of the steering examples is in the name


def parser(kind: flags.Kind) -> argparse.ArgumentParser:
    parser = flags.evaluation_parser(__doc__, kind)
    parser.prog = f"python -m grains.cli.where {kind.name}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_score(parser)
    parser.add_argument(
        "file",
        choices=FILES,
        help="attributions, states: of token_ablation.py; grid, questions, chosen: of "
        "steering_mc.py; generations: all that steering_generation.py wrote with these settings of "
        "stage 1",
    )
    parser.add_argument(
        "--top",
        nargs="+",
        default=["pos", "neg"],
        choices=TOPS,
        help="selections of tokens whose states are meant",
    )
    return parser


def main() -> None:
    first = argparse.ArgumentParser(prog="python -m grains.cli.where", add_help=False)
    first.add_argument("kind", choices=KINDS)
    kind, rest = first.parse_known_args()
    args = parser(KINDS[kind.kind]).parse_args(rest)
    check_data(args)
    names = flags.names_of(args)
    if args.file == "attributions":
        print(names.attributions())
    elif args.file == "states":
        print(*names.states(args.top).values(), sep="\n")
    elif args.file == "generations":
        for path in names.all_generations(args.output_dir):
            print(path)
    else:
        grid = flags.grid_settings(args)
        files = names.multiple_choice(
            grid, flags.GRID, args.score, args.output_dir, args.max_ppl_increase
        )
        print(files[args.file])


def check_data(args: argparse.Namespace) -> None:
    """Raise UserError for a data set that is not known.

    The vision-language scripts register one that is not known here; only the names of stage 1 need
    to know its split.
    """
    if args.dataset_name in DATASETS or args.dataset_path:
        return
    if args.kind is flags.LLM:
        raise UserError(f"unknown data set '{args.dataset_name}': expected {', '.join(DATASETS)}")
    if args.file in NAMED_BY_SPLIT and not args.split:
        raise UserError(
            f"unknown data set '{args.dataset_name}': give --split, its split of steering examples"
        )


if __name__ == "__main__":
    entry.run(main)
