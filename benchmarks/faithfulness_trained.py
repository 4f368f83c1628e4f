"""Faithfulness to a context: what trained vectors gain and cost beside contrary contexts.

Takes the vectors that `experiment.py --datasets faithfulness --own_answers keep` has trained and
the multiple of their length that it chose on validation, and measures on test what faithfulness.py
measures of one-step vectors: texts that agree with memory, no text, unrelated questions asked alike
and behind a text, own answers, free answers, and the turned sign, beside controls.

    python benchmarks/faithfulness_trained.py --vectors FILE=1.5 FILE=2 --document TABLES.md
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import faithfulness  # noqa: E402
from faithfulness import CHOSEN, CONTRARY, HARDEST, TURNED  # noqa: E402
from real_models import loaded  # noqa: E402

from grains import cpu, runs  # noqa: E402
from grains.cli import entry  # noqa: E402
from grains.cli.documents import print_tables  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.settings import EMBEDDED, DataSettings  # noqa: E402
from grains.study import learned  # noqa: E402
from grains.study.learned import TrainedDirection  # noqa: E402
from grains.vectors import SteeringVectors  # noqa: E402

NAMES = {
    CHOSEN: "trained",
    TURNED: "trained, sign turned",
    HARDEST: "trained_rotated, same strength",
}
RANDOM = "trained_random, same strength"


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument(
        "--vectors",
        nargs="+",
        required=True,
        metavar="FILE=STRENGTH",
        help="trained vectors, a file for each seed, and the multiple of their length",
    )
    flags.add_argument("--model_name", default=EMBEDDED)
    flags.add_argument("--prompt_style", default="chat")
    flags.add_argument("--num_test", type=int, default=137, help="test questions, of each set")
    flags.add_argument("--num_generations", type=int, default=60, help="free answers to a set")
    flags.add_argument(
        "--folder", type=Path, default=ROOT / "src" / "results" / "faithfulness_trained"
    )
    flags.add_argument("--document", type=Path, help="Markdown file of the tables")
    return flags


def main() -> None:
    args = parser().parse_args()
    entry.import_libraries()
    cpu.keep_freed_memory()
    every = []
    for given in args.vectors:
        file, _, strength = given.rpartition("=")
        vectors = SteeringVectors.load(file)
        path = args.folder / f"{Path(file).stem}_{strength}.csv"
        if not path.exists():
            rows = measured(loaded(args.model_name), args, vectors, float(strength))
            runs.write_table(path, rows)
        every.append(pd.read_csv(path, keep_default_na=False, na_values=["nan", ""]))
    title = f"{Path(args.model_name).stem}, trained to keep own answers"
    tables = faithfulness.asked_tables(pd.concat(every), title)
    print_tables(
        args.document,
        "trained",
        [(name, table.rename(index=NAMES, columns=NAMES)) for name, table in tables],
        {"rows": args.folder},
    )


def measured(
    lm: LanguageModel, args: argparse.Namespace, vectors: SteeringVectors, strength: float
) -> pd.DataFrame:
    """The rows of faithfulness.py for vectors of one seed, at one strength."""
    seed = vectors.info["seed"]
    asking = faithfulness.parser().parse_args(
        [
            *("--gated", "--prompt_style", args.prompt_style, "--num_test", str(args.num_test)),
            *("--num_generations", str(args.num_generations)),
        ]
    )
    source = DataSettings(CONTRARY, num_validation=1, num_test=args.num_test)
    layers = tuple(layer for layer, vector in enumerate(vectors.vectors) if vector.any())

    made = {
        CHOSEN: vectors,
        HARDEST: learned.rotated(vectors, seed),
        RANDOM: learned.random_like(vectors, seed),
    }
    lines = {
        label: TrainedDirection(of.info["method"], "", layers, of) for label, of in made.items()
    }
    tested = {label: line.at(strength) for label, line in lines.items()}
    tested[TURNED] = lines[CHOSEN].at(-strength)
    used = vectors.info["data"]["questions"]
    sets = faithfulness.asked_sets(lm, asking, source, seed, used)["test"]
    own = faithfulness.own_answers(lm, asking, sets)
    return pd.DataFrame(faithfulness.tested_rows(lm, asking, seed, tested, sets, own))


if __name__ == "__main__":
    entry.run(main)
