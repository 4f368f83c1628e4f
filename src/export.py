"""Hands steering vectors on: to llama.cpp, transformers, PEFT or lm-eval, the strength included.

What is written is loaded again, and its logits are compared with our own on a text. What a target
cannot hold is said, and refused where it would not be used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grains.cli import entry, flags
from grains.cli.flags import LLM
from grains.settings import EXPORTS


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, LLM)
    flags.add_model(parser)
    group = parser.add_argument_group("export")
    flags.add_vectors(group)
    group.add_argument(
        "--to",
        required=True,
        choices=EXPORTS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in EXPORTS.items()),
    )
    group.add_argument("--alpha", type=flags.finite, required=True, help="strength")
    flags.add_positions(group)
    group.add_argument("--gguf", type=flags.file, help="for gguf-bias: the model's GGUF file")
    group.add_argument(
        "--measured",
        type=flags.file,
        help="..._grid.csv of steering_mc.py or experiment.py, for gain and cost in the model card",
    )
    group.add_argument("--license", help="of the model, for the model card, such as apache-2.0")
    group.add_argument(
        "--output_dir", help="folder that is made (default: exports/<vectors>_<to>_<alpha>)"
    )
    return parser


def main() -> None:
    args = parser().parse_args()

    entry.import_libraries()
    from grains import export
    from grains.export import card, plan
    from grains.steering import SteeringVectors

    vectors = SteeringVectors.load(args.vectors)
    folder = Path(
        args.output_dir
        or Path("exports", f"{Path(args.vectors).stem}_{args.to}_{args.alpha:g}".replace(".", "-"))
    )
    lm = entry.load_model(args)
    strength = args.alpha, args.layers, args.alpha_units
    planned = plan.make(lm, vectors, args.to, *strength, args.positions)
    measured = card.measured(Path(args.measured), planned) if args.measured else None
    check = export.write(
        lm,
        vectors,
        args.to,
        folder,
        *strength,
        positions=args.positions,
        gguf=args.gguf,
        measured=measured,
        licence=args.license,
        overwrite=args.overwrite,
    )
    if check is None:
        entry.say("nothing to do: this export is already there")
    else:
        print(f"{planned.label}: {EXPORTS[args.to]}")
        print(f"{'logits on a text':34}{'max':>10}{'mean':>10}")
        for name, pair in {
            "steering, against base": check.effect,
            "loaded again, against what it adds": check.written,
            "lost, as the norm is not kept": check.lost,
        }.items():
            print(f"{name:34}{pair[0]:>10.2g}{pair[1]:>10.2g}")
        print(f"use: {card.use(planned, args.to)}")
    print(f"folder: {folder}")


if __name__ == "__main__":
    entry.run(main)
