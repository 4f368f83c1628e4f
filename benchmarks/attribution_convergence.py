"""How well Integrated Gradients converge: baseline x moved positions x rule x points.

For each setting and example: the completeness error, the agreement of the five top tokens with a
400-point Gauss-Legendre reference of the same path, and the CPU seconds; and, for all examples, the
cosine between the steering vectors (mean shifts of the top tokens' ablation, averaged over
layers) and the reference's. Writes the table between the markers of docs/attribution.md.

    python benchmarks/attribution_convergence.py --num_samples 6
    python benchmarks/attribution_convergence.py --held_out 30   # the default rule on other pairs
    python benchmarks/attribution_convergence.py --held_out 30 --medium
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from grains import data, models, prompts, runs  # noqa: E402
from grains.ablation import hidden_states, select  # noqa: E402
from grains.attribution import attribute, attributed_positions  # noqa: E402
from grains.cli import documents  # noqa: E402
from grains.settings import AttributionSettings  # noqa: E402

DOCUMENT = ROOT / "docs" / "attribution.md"
PATHS = [("mean", "content"), ("pad", "content"), ("zeros", "content"), ("zeros", "all")]
RULES: dict[str, dict] = {
    "Gauss-Legendre 8": {"ig_steps": 8},
    "Gauss-Legendre 20": {"ig_steps": 20},
    "Gauss-Legendre 60": {"ig_steps": 60},
    "auto, 5 %": {"ig_steps": None, "tolerance": 0.05},
    "reference (400)": {"ig_steps": 400},
}
REFERENCE = "reference (400)"
DEFAULT = "auto, 5 %"
MEDIUM = f"{DEFAULT}, medium"
HELD_OUT = {rule: RULES[rule] for rule in (DEFAULT, REFERENCE)}
WITH_MEDIUM = {
    DEFAULT: RULES[DEFAULT],
    MEDIUM: {"matmul_precision": "medium"},
    REFERENCE: RULES[REFERENCE],
}
TOP = 5
# Of the first 50 pairs of misconceptions, those on which the adaptive rule's constants were chosen.
CHOSEN_ON = {0, 1, 3, 5, 7, 9, 10, 13, 14, 17, 18, 21, 22, 24, 26, 28, 30, 35, 42, 49}
STYLES = ("qa", "chat")  # of the other pairs, in turn


def held_out(examples: list) -> list:
    """Those of the first examples of misconceptions on which the adaptive rule was not chosen."""
    return [example for i, example in enumerate(examples) if i not in CHOSEN_ON]


def measure(args) -> pd.DataFrame:
    rows, source = data.load(
        args.dataset_name, data.default_split(args.dataset_name, "steering"), args.dataset_path
    )
    count = 50 if args.held_out else args.num_samples
    examples = [e.pair() for e in data.examples(rows, source, args.seed, count)]
    styles = ["qa"] * count
    paths, rules = PATHS, RULES
    if args.held_out:
        examples = held_out(examples)[: args.held_out]
        styles = [STYLES[i % 2] for i in range(len(examples))]
        paths, rules = PATHS[:1], WITH_MEDIUM if args.medium else HELD_OUT
    lm = models.load(args.model_name)
    kept = Path(args.work) / "points.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    done = {}
    if kept.is_file():
        done = {tuple(row["key"]): row for row in map(json.loads, kept.read_text().splitlines())}
    with open(kept, "a") as file:
        for example, style in zip(examples, styles, strict=True):
            encoded = prompts.encode(lm, example, style)
            for baseline, scope in paths:
                for rule, settings in rules.items():
                    key = (example.id, style, baseline, scope, rule)
                    if key in done:
                        continue
                    row = measured_point(lm, encoded, baseline, scope, settings) | {
                        "key": list(key)
                    }
                    done[key] = row
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                    print(*key, f"{row['error']:.3f}", f"{row['seconds']:.1f} s", flush=True)
    wanted = {(example.id, style) for example, style in zip(examples, styles, strict=True)}
    return pd.DataFrame(
        [
            row | dict(zip(("id", "style", "baseline", "scope", "rule"), key, strict=True))
            for key, row in done.items()
            if key[:2] in wanted and key[2:4] in paths and key[4] in rules
        ]
    )


def measured_point(lm, encoded, baseline: str, scope: str, settings: dict) -> dict:
    begin = time.process_time()
    result = attribute(
        lm,
        encoded,
        AttributionSettings(baseline=baseline, attribute=scope, **settings),
        2048,
        torch.Generator(),
    )[0]
    seconds = time.process_time() - begin
    candidates = encoded.words & attributed_positions(encoded, scope)
    top = select(torch.from_numpy(result.scores), candidates, TOP, "pos", torch.Generator())
    states = hidden_states(lm, encoded, [top], 2048).last
    shift = (states[0] - states[1])[:, 1:].mean(0)
    return {
        "error": result.relative_error,
        "difference": abs(result.difference),
        "top": top,
        "points": result.points,
        "seconds": seconds,
        "shift": shift.half().tolist(),
    }


def held_out_table(measured: pd.DataFrame) -> pd.DataFrame:
    parts = [(style, measured[measured["style"] == style]) for style in STYLES]
    lines = []
    for style, part in [*parts, ("all", measured)]:
        made = table(part)
        made.insert(0, "pairs", str(part.id.nunique()))
        made.insert(0, "style", style)
        lines.append(made)
    return pd.concat(lines).drop(columns=["path starts at", "moves"])


def table(measured: pd.DataFrame) -> pd.DataFrame:
    lines = []
    for (baseline, scope), of_path in measured.groupby(["baseline", "scope"], sort=False):
        reference = of_path[of_path.rule == REFERENCE].set_index("id")
        vector = np.mean(reference["shift"].tolist(), axis=0)
        for rule, of_rule in of_path.groupby("rule", sort=False):
            of_rule = of_rule.set_index("id").loc[reference.index]
            agreement = [
                len(set(a) & set(b)) / len(b)
                for a, b in zip(of_rule.top, reference.top, strict=True)
            ]
            own = np.mean(of_rule["shift"].tolist(), axis=0)
            cosine = (own * vector).sum(-1) / (
                np.linalg.norm(own, axis=-1) * np.linalg.norm(vector, axis=-1)
            )
            lines.append(
                {
                    "path starts at": baseline,
                    "moves": scope,
                    "rule": rule,
                    "points": f"{of_rule.points.median():.0f}",
                    "median error": f"{of_rule.error.median():.1%}",
                    "within 5 %": f"{(of_rule.error <= 0.05).mean():.0%}",
                    "top-5 agreement": f"{np.mean(agreement):.0%}",
                    "vectors' cosine": f"{cosine.mean():.3f}",
                    "CPU s/example": f"{of_rule.seconds.median():.1f}",
                }
            )
    return pd.DataFrame(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name", default=models.EMBEDDED)
    parser.add_argument("--dataset_name", default="misconceptions")
    parser.add_argument("--dataset_path")
    parser.add_argument("--num_samples", type=int, default=6)
    parser.add_argument(
        "--held_out",
        type=int,
        metavar="PAIRS",
        help="the default rule on so many pairs (at most 30) on which it was not chosen, styles qa "
        "and chat in turn",
    )
    parser.add_argument(
        "--medium",
        action="store_true",
        help="on these pairs also with matmul_precision medium, as a table of its own",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work",
        default=ROOT / "src" / "results" / "convergence",
        help="folder where finished measurements are kept",
    )
    args = parser.parse_args()
    if args.medium and not args.held_out:
        parser.error("--medium needs --held_out")
    measured = measure(args)
    lines = held_out_table(measured) if args.held_out else table(measured)
    body = documents.markdown(lines.columns, lines.itertuples(index=False))
    print(*body, sep="\n")
    note = (
        f"{args.model_name}, {measured.id.nunique()} pairs of {args.dataset_name}, float32, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}, transformers "
        f"{runs.versions()['transformers']}."
    )
    kind = "held out" if args.held_out else "measured"
    name = "matmul precision" if args.medium else kind
    documents.write_between(DOCUMENT, name, [note, "", *body])
    print(f"\nwritten to {DOCUMENT}")


if __name__ == "__main__":
    main()
