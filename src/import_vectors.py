"""Takes vectors that others have made: a control vector in GGUF, or NumPy's .npy and .npz.

Strength 1 in absolute units adds them as they are. The norms that relative strengths need are
measured on a short text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grains.cli import entry, flags
from grains.cli.flags import LLM
from grains.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, LLM)
    flags.add_model(parser)
    group = parser.add_argument_group("import")
    group.add_argument(
        "--source", type=flags.file, required=True, help="file of the vectors: .gguf, .npy or .npz"
    )
    group.add_argument("--layer", type=int, help="the layer of a vector, where the file names none")
    group.add_argument(
        "--output", type=flags.file, required=True, help="safetensors file that is written"
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    source = Path(args.source)
    if source.suffix not in (".gguf", ".npy", ".npz"):
        raise UserError(f"'{source}': expected a file that ends in .gguf, .npy or .npz")

    entry.import_libraries()
    from grains import export, runs
    from grains.steering import layer_ranges

    lm = entry.load_model(args)
    if source.suffix == ".gguf":
        vectors = export.read_gguf(lm, source)
    else:
        vectors = export.read_arrays(lm, source, args.layer)
    runs.write_shared(Path(args.output), *vectors.content(), args.overwrite)
    layers = [layer for layer, vector in enumerate(vectors.vectors) if vector.any()]
    print(f"vectors of layers {','.join(layer_ranges(layers))}: {args.output}")
    print("strength 1 adds them as they are, in both units")


if __name__ == "__main__":
    entry.run(main)
