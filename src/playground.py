"""A page in the browser to try attribution and steering on prompts of one's own.

    python playground.py            # on http://127.0.0.1:7860, with the embedded models

Words, and patches of a picture, in colour; base and steered answers side by side; the preference
over the strength; vectors from built-in pairs, own pairs or a file. See docs/playground.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags
from grains.errors import UserError
from grains.settings import EMBEDDED, MODELS

if TYPE_CHECKING:
    from grains.lm import LanguageModel
    from grains.playground.bench import Bench

SHAPES = "shapes-vlm"
FACTS = range(39, -1, -5)  # rows of questions to begin with, each about another fact
SCENES = 8  # pictures to begin with, half of them to be described


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__)
    parser.add_argument(
        "--model_names",
        nargs="+",
        default=[EMBEDDED, SHAPES],
        metavar="MODEL",
        help=f"short names ({', '.join([EMBEDDED, SHAPES, *MODELS])}), hub ids or local folders; a "
        "tab for each",
    )
    flags.add_device(parser)
    parser.add_argument(
        "--num_pairs",
        type=flags.positive,
        default=40,
        help="built-in pairs, which the first vectors are made from",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=flags.port, default=7860)
    return parser


def main() -> None:
    args = parser().parse_args()
    # Where gradio keeps what is uploaded: in a folder of this run's, which goes with it.
    with tempfile.TemporaryDirectory(prefix="grains-playground-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        serve(args, Path(folder))


def serve(args: argparse.Namespace, folder: Path) -> None:
    listener = listening(args.host, args.port)
    entry.import_libraries()
    try:
        import uvicorn

        from grains.playground import page
    except ModuleNotFoundError as error:
        raise UserError(
            f"playground.py needs {error.name}: install requirements-playground.txt (make "
            "playground does)"
        ) from error
    from demo import registered  # noqa: F401  the drawn scenes and their model

    benches, vectors = {}, {}
    for name in args.model_names:
        lm = entry.load_named(args, name)
        short = name.rstrip("/").split("/")[-1]
        title = name if short in benches else short
        begin = of_words if lm.processor is None else of_pictures
        benches[title] = begin(lm, args.num_pairs)
        entry.say(f"{title}: vectors of {args.num_pairs} pairs are made")
        vectors[title] = benches[title].fit(benches[title].pairs, benches[title].method)
    application = page.application(page.build(benches, vectors, folder))
    entry.say(f"open http://{args.host}:{args.port}")
    # Pages that are open do not keep it from ending, and are no error then.
    config = uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1)
    with listener, suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(
            f"{host}:{port} cannot be listened on ({reason}): give another address or port"
        ) from error


def of_words(lm: LanguageModel, num_pairs: int) -> Bench:
    """Begins with texts that contradict what is known; the vectors are towards the text."""
    from grains import data
    from grains.playground.bench import Bench

    def examples(kind: str, places: Iterable[int]) -> list[data.Example]:
        rows, source = data.load("faithfulness", data.default_split("faithfulness", kind))
        return [data.read(rows, source, place) for place in places if place < len(rows)]

    style = "chat" if lm.tokenizer.chat_template else "qa"
    pairs = examples("steering", range(num_pairs))
    shown = examples("test", FACTS)
    return Bench(lm, style, pairs, shown, "gradient", middle(lm), 0.003, 0.01)


def of_pictures(lm: LanguageModel, num_pairs: int) -> Bench:
    """Begins with drawn scenes; the vectors are against squares that are not there."""
    from demo import shapes
    from grains.data import Example
    from grains.playground.bench import Bench

    def examples(rows: list[dict], scenes: list[shapes.Scene]) -> list[Example]:
        return [
            Example(
                row["id"], row["question"], (row["chosen"], row["rejected"]), 0, image=scene.image
            )
            for row, scene in zip(rows, scenes, strict=True)
        ]

    def captions(split: str, count: int) -> list[Example]:
        scenes = shapes.scenes_of(split, count, keep=shapes.flaw_applies)
        return examples(shapes.preference_rows(split, scenes), scenes)

    asked = shapes.scenes_of("yes_no", SCENES)
    questions = examples(shapes.yes_no_rows(asked), asked)[::2]  # whose answer is yes
    shown = [*captions("test", SCENES // 2), *questions]
    return Bench(lm, "chat", captions("steering", num_pairs), shown, "gradient", "all", 0.1, 0.2)


def middle(lm: LanguageModel) -> str:
    """The layers that are steered at first: those in the middle, 8 to 24 of 30."""
    count = len(lm.layers)
    return f"{count * 4 // 15}-{count * 4 // 5}"


if __name__ == "__main__":
    entry.run(main)
