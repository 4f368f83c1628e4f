"""Serve a model behind OpenAI's interface: the base and any steering of it, in one batch.

    python serve.py --vectors truthful=truthful.safetensors

A request steers by the field "steering", {"vectors": "truthful", "alpha": 0.02}, or a list of such,
or by the model's name, smollm2-135m-instruct+truthful@0.02. See docs/serving.md.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags
from grains.errors import UserError
from grains.settings import EMBEDDED, METHODS, MODELS

if TYPE_CHECKING:
    from grains.lm import LanguageModel
    from grains.steering import SteeringVectors

KEY = "GRAINS_API_KEY"  # in the environment, where other users of the machine cannot read it
FITTED = 20  # pairs of the embedded data set that --fit makes vectors from


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    parser.add_argument(
        "--model_name",
        default=EMBEDDED,
        help=f"short name ({', '.join([EMBEDDED, *MODELS])}), hub id or local folder",
    )
    parser.add_argument("--served_name", help="the name in requests (default: the model's)")
    flags.add_device(parser)
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code from the model's repository"
    )
    parser.add_argument(
        "--vectors",
        nargs="+",
        type=named_file,
        default=[],
        metavar="NAME=FILE",
        help="steering vectors that requests may name",
    )
    parser.add_argument(
        "--fit",
        nargs="+",
        default=[],
        choices=METHODS,
        metavar="METHOD",
        help=f"make vectors from {FITTED} pairs of the embedded data set at the start, named by "
        "their method",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=flags.port, default=8000)
    group.add_argument(
        "--api_key", help=f"key that requests must have (default: the environment's {KEY}, or none)"
    )
    group = parser.add_argument_group("limits")
    for name, default, text in (
        ("max_rows", 64, "texts that are written together"),
        ("max_waiting", 256, "texts that wait beside them; more are refused"),
        ("max_tokens", 1024, "longest answer, in tokens"),
        ("max_positions", 65536, "texts that are written together, times the longest of them"),
        ("max_bytes", 2**22, "longest request"),
    ):
        group.add_argument(f"--{name}", type=flags.positive, default=default, help=text)
    return parser


def named_file(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=FILE")
    return name, Path(path)


def main() -> None:
    args = parser().parse_args()
    names = [name for name, _ in args.vectors] + args.fit
    if repeated := {name for name in names if names.count(name) > 1}:
        raise UserError(f"vectors '{min(repeated)}' are given twice: give each a name of its own")
    for name, path in args.vectors:
        if not path.is_file():
            raise UserError(f"vectors '{name}': '{path}' does not exist")
    entry.import_libraries()
    try:
        import uvicorn

        from grains.serve import app
    except ModuleNotFoundError as error:
        raise UserError(
            f"serve.py needs {error.name}: install requirements-serve.txt (make serve does)"
        ) from error
    from grains.steering import SteeringVectors

    lm = entry.load_named(args, args.model_name, trust_remote_code=args.trust_remote_code)
    vectors = {name: SteeringVectors.load(path) for name, path in args.vectors}
    vectors |= {method: fitted(lm, method) for method in args.fit}
    limits = {item.name: getattr(args, item.name) for item in fields(app.Limits)}
    served = args.served_name or args.model_name.rstrip("/").split("/")[-1]
    key = args.api_key or os.environ.get(KEY) or None
    server = app.serve(lm, vectors, served, app.Limits(**limits), key)
    entry.say(f"model {served}; vectors: {', '.join(vectors) or 'none'}")
    uvicorn.run(app.application(server), host=args.host, port=args.port)


def fitted(lm: LanguageModel, method: str) -> SteeringVectors:
    """Vectors from pairs of the embedded data set."""
    from grains import api, data

    rows, source = data.load("misconceptions", data.default_split("misconceptions", "steering"))
    return api.fit(lm, [data.read(rows, source, index) for index in range(FITTED)], method)


if __name__ == "__main__":
    entry.run(main)
