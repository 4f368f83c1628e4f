"""The default attribution in bfloat16 beside float32: gradients, completeness, the largest words.

    python benchmarks/precisions.py [--pairs 12]      # writes a table into docs/families.md

On pairs of misconceptions, style qa, on which the adaptive rule's constants were not chosen. What
is measured is kept, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from attribution_convergence import CHOSEN_ON, TOP, held_out  # noqa: E402

from grains import data, models, prompts, runs  # noqa: E402
from grains.ablation import select  # noqa: E402
from grains.attribution import attribute, attributed_positions  # noqa: E402
from grains.cli import documents  # noqa: E402
from grains.settings import AttributionSettings  # noqa: E402

DATASET = "misconceptions"
DOCUMENT = ROOT / "docs" / "families.md"
WORK = ROOT / "src" / "results" / "precisions"
PRECISIONS = ("float32", "bfloat16")


def measure(pairs: int, model_name: str) -> dict[str, list[dict]]:
    """precision -> what was measured of each pair."""
    rows, source = data.load(DATASET, data.default_split(DATASET, "steering"))
    examples = [e.pair() for e in data.examples(rows, source, 0, pairs + len(CHOSEN_ON))]
    examples = held_out(examples)[:pairs]
    measured = {}
    for precision in PRECISIONS:
        lm = models.load(model_name, precision, "cpu")
        kept = WORK / f"{precision}.jsonl"
        kept.parent.mkdir(parents=True, exist_ok=True)
        lines = kept.read_text().splitlines() if kept.exists() else []
        done = {row["id"]: row for row in map(json.loads, lines)}
        with kept.open("a") as file:
            for example in examples:
                if example.id not in done:
                    done[example.id] = measured_pair(lm, example)
                    print(json.dumps(done[example.id]), file=file, flush=True)
                    print(precision, done[example.id], flush=True)
        measured[precision] = [done[example.id] for example in examples]
    return measured


def measured_pair(lm, example) -> dict:
    encoded = prompts.encode(lm, example, "qa")
    settings = AttributionSettings()
    result = attribute(lm, encoded, settings, 2048, torch.Generator())[0]
    candidates = encoded.words & attributed_positions(encoded, settings.attribute)
    top = select(torch.from_numpy(result.scores), candidates, TOP, "pos", torch.Generator())
    return {
        "id": example.id,
        "points": result.points,
        "error": result.relative_error,
        "noise": result.noise / abs(result.difference),
        "top": top,
    }


def table(measured: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| precision | gradients, median | mean | error of completeness, median | rounding "
        "noise, median | top 5 of float32 |",
        "|---|---|---|---|---|---|",
    ]
    for precision, rows in measured.items():
        points = [row["points"] for row in rows]
        error, noise = (np.median([row[key] for row in rows]) for key in ("error", "noise"))
        same = [
            len({*row["top"]} & {*plain["top"]}) / len(plain["top"])
            for row, plain in zip(rows, measured["float32"], strict=True)
        ]
        cells = [f"{np.median(points):.0f}", f"{np.mean(points):.0f}", f"{error:.1%}"]
        cells += ["", ""] if precision == "float32" else [f"{noise:.1%}", f"{np.mean(same):.0%}"]
        lines.append(f"| {precision} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--model_name", default=models.EMBEDDED)
    args = parser.parse_args()
    lines = table(measure(args.pairs, args.model_name))
    print("\n".join(lines))
    note = (
        f"{args.model_name}, {args.pairs} pairs of {DATASET}, style qa, on a CPU; torch "
        f"{torch.__version__}, transformers {runs.versions()['transformers']}."
    )
    documents.write_between(DOCUMENT, "precisions", [note, "", *lines])


if __name__ == "__main__":
    main()
