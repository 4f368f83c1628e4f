"""Three real models side by side: attribution, base accuracies, and steering towards a context.

SmolLM2-135M-Instruct is embedded; `bash benchmarks/real_models.sh` fetches the others. Each model
gets the recipe of faithfulness.py, at layers of the same share of its depth. Finished pieces
are kept in --folder, which a later run takes up. Writes the tables between their markers of
--document, which gain_figure.py draws.

    python benchmarks/real_models.py --document docs/models.md
    python benchmarks/real_models.py --models gemma-3-270m --seeds 0 --truthfulqa truthfulqa.jsonl
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import faithfulness  # noqa: E402
from faithfulness import BASE, CHOSEN, CONTRARY  # noqa: E402

from grains import cpu, data, models, prompts, runs, splits, stats  # noqa: E402
from grains.attribution import attribute  # noqa: E402
from grains.cli import entry  # noqa: E402
from grains.cli.documents import print_tables  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.scoring import margins, score_all  # noqa: E402
from grains.settings import (  # noqa: E402
    EMBEDDED,
    SCORES,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    GridSettings,
)

# Strengths beside those of faithfulness.py: states of other models may be far longer than most of
# what they hold, so that a share of their length is a larger push.
SMALLER = (0.0001, 0.0003, 0.001)
Tables = list[tuple[str, pd.DataFrame]]  # with their titles
MAX_TOKENS = AblationSettings().batch_tokens
GRAD_METHODS = ("integrated_gradients", "vanilla")
TITLES = {"sum": "summed", "token": "per token"}


@dataclass(frozen=True)
class Measured:
    """A model, the style of its prompts and the layers that are steered."""

    name: str
    style: str
    layers: str
    kind: str


# Layers 8 to 24 of SmolLM2's 30, and the same share of the depth of the others.
MODELS = (
    Measured(EMBEDDED, "chat", "8-24", "30 layers, 135M, 4 bits, instructed"),
    Measured("gemma-3-270m", "qa", "5-14", "18 layers, 270M, 4 to 6 bits, base model"),
    Measured("qwen-2.5-coder-0.5b-instruct", "chat", "6-19", "24 layers, 0.5B, 4 bits, instructed"),
)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [model.name for model in MODELS]
    flags.add_argument("--models", nargs="+", choices=names, default=names, metavar="MODEL")
    flags.add_argument("--parts", nargs="+", choices=TABLES, default=[*TABLES], metavar="PART")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0])
    flags.add_argument("--truthfulqa", metavar="PATH", help="file of TruthfulQA, if at hand")
    flags.add_argument("--gated", action="store_true", help="steer behind a gate")
    flags.add_argument("--own_words", action="store_true", help="also pairs in the model's words")
    flags.add_argument("--positions", default=GridSettings.positions, help="those that are steered")
    flags.add_argument("--num_attributed", type=int, default=6, help="pairs that are attributed")
    flags.add_argument("--num_questions", type=int, default=133, help="of each set, for the base")
    flags.add_argument("--num_samples", type=int, default=40, help="steering pairs")
    flags.add_argument("--num_validation", type=int, default=24, help="of faithfulness")
    flags.add_argument("--num_test", type=int, default=60, help="of each set of faithfulness")
    flags.add_argument("--num_generations", type=int, default=24, help="free answers to a set")
    flags.add_argument("--folder", type=Path, default=ROOT / "src" / "results" / "models")
    flags.add_argument("--document", type=Path, help="Markdown file of the tables")
    return flags


def main() -> None:
    args = parser().parse_args()
    entry.import_libraries()
    cpu.keep_freed_memory()
    chosen = [model for model in MODELS if model.name in args.models]
    for part in args.parts:
        stem = ", ".join([part, *(faithfulness.variant(args) if part == "faithfulness" else [])])
        print_tables(args.document, stem, TABLES[part](chosen, args), {"rows": args.folder})


# --- measuring ---


@cache
def loaded(name: str) -> LanguageModel:
    return models.load(name, dtype="float32", device="cpu")


def kept(
    model: Measured, args: argparse.Namespace, name: str, measure: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """A finished piece from its file; what no file holds yet is measured."""
    path = args.folder / f"{model.name}_{name}.csv"
    if not path.exists():
        runs.write_table(path, measure())
    return pd.read_csv(path, keep_default_na=False, na_values=["nan", ""])


def steered_rows(model: Measured, args: argparse.Namespace) -> pd.DataFrame:
    """What faithfulness.py gives of every seed."""
    recipe = recipe_of(model, args)

    def one_seed(seed: int) -> pd.DataFrame:
        return faithfulness.one_seed(loaded(model.name), recipe, seed)

    return pd.concat(
        [
            kept(
                model,
                args,
                "_".join(["faithfulness", *faithfulness.variant(args), f"seed{seed}"]),
                partial(one_seed, seed),
            )
            for seed in args.seeds
        ]
    )


def recipe_of(model: Measured, args: argparse.Namespace) -> argparse.Namespace:
    """What faithfulness.py takes; its other settings are those of docs/tables/faithfulness.md."""
    words = ["--prompt_style", model.style, "--layers", model.layers]
    words += ["--positions", args.positions]
    strengths = faithfulness.GATED_STRENGTHS if args.gated else faithfulness.STRENGTHS
    words += ["--strengths", *map(str, (*SMALLER, *strengths))]
    words += ["--gated", "--priced", "rotated"] if args.gated else []
    words += ["--own_words"] if args.own_words else []
    for name in ("num_samples", "num_validation", "num_test", "num_generations"):
        words += [f"--{name}", str(getattr(args, name))]
    return faithfulness.parser().parse_args(words)


def answered(
    model: Measured, args: argparse.Namespace, name: str, path: str | None
) -> pd.DataFrame:
    """A row for each question: whether the base model answers it right."""
    lm = loaded(model.name)
    source = DataSettings(name, path, num_samples=1, num_validation=1, num_test=args.num_questions)
    (steering,) = splits.steering_examples(source, 0)
    asked = splits.evaluation_examples(source, 0, {"questions": [data.question_key(steering)]})[
        "test"
    ]
    # Like those of the experiments, these questions are asked without a template.
    items = [prompts.encode(lm, example, "qa") for example in asked]
    leads = margins(items, score_all(lm, items, [], MAX_TOKENS))
    return pd.DataFrame(
        [
            {"set": name, "id": item.example.id}
            | {kind: float(lead[place, 0] > 0) for kind, lead in leads.items()}
            for place, item in enumerate(items)
        ]
    )


def attribution_rows(model: Measured, args: argparse.Namespace) -> pd.DataFrame:
    """A row for each pair and gradient method: completeness error, gradients, CPU seconds."""
    lm = loaded(model.name)
    source = DataSettings("misconceptions", num_samples=args.num_attributed)
    rows = []
    for example in splits.steering_examples(source, 0):
        item = prompts.encode(lm, example.pair(), model.style)
        for method in GRAD_METHODS:
            start = time.process_time()
            (made,) = attribute(
                lm,
                item,
                AttributionSettings(grad_method=method),
                MAX_TOKENS,
                torch.Generator().manual_seed(0),
            )
            rows.append(
                {
                    "method": method,
                    "id": example.id,
                    "error": made.relative_error,
                    "points": made.points,
                    "tokens": len(item.prompt_ids),
                    "seconds": time.process_time() - start,
                }
            )
    return pd.DataFrame(rows)


# --- tables ---


def attributed(chosen: list[Measured], args: argparse.Namespace) -> Tables:
    columns = {}
    for model in chosen:
        rows = kept(model, args, "attribution", partial(attribution_rows, model, args))
        integrated = rows[rows.method == GRAD_METHODS[0]]
        columns[model.name] = {
            "model": model.kind,
            "prompts": model.style,
            "pairs": str(len(integrated)),
            "tokens of a prompt, median": f"{integrated.tokens.median():.0f}",
            "completeness error, median / largest": (
                f"{integrated.error.median():.1%} / {integrated.error.max():.1%}"
            ),
            "gradients a pair, median": f"{integrated.points.median():.0f}",
            "CPU seconds a pair, median": f"{integrated.seconds.median():.1f}",
            "CPU seconds a pair, gradient times input": (
                f"{rows[rows.method == GRAD_METHODS[1]].seconds.median():.1f}"
            ),
        }
    title = "Attribution of pairs of misconceptions, and how long it takes"
    return [(title, pd.DataFrame(columns))]


def base_accuracy(chosen: list[Measured], args: argparse.Namespace) -> Tables:
    asked = {"misconceptions": None}
    if args.truthfulqa:
        asked["truthfulqa"] = args.truthfulqa
    columns: dict[str, dict[str, str]] = {}
    for model in chosen:
        rows = pd.concat(
            [
                kept(model, args, name, partial(answered, model, args, name, path))
                for name, path in asked.items()
            ]
        )
        columns[model.name] = {
            f"{name}, {TITLES[kind]}, {len(of_set)} questions": faithfulness.cell(
                stats.accuracy_interval(of_set[kind].to_numpy())
            )
            for name, of_set in rows.groupby("set", sort=False)
            for kind in SCORES[::-1]
        }
    return [("Base accuracy in %", pd.DataFrame(columns))]


def faithfulness_tables(chosen: list[Measured], args: argparse.Namespace) -> Tables:
    steered = {model.name: steered_rows(model, args) for model in chosen}
    title = about(steered)
    return [
        (f"{title}: where the attribution of the steering pairs lies", attribution_shares(steered)),
        (f"{title}: accuracy in %", levels(steered)),
        (f"{title}: points gained over base, contrary contexts", gains(steered)),
    ]


def about(steered: dict[str, pd.DataFrame]) -> str:
    counts = [
        f"{name}: {rows.seed.nunique()} seed{'s' * (rows.seed.nunique() > 1)}, "
        f"{rows[rows.set == CONTRARY].id.nunique()} questions over "
        f"{rows[rows.set == CONTRARY].fact.nunique()} facts"
        for name, rows in steered.items()
    ]
    return "Faithfulness to a context (" + "; ".join(counts) + ")"


def attribution_shares(steered: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Where the attribution by gradient times input lies in the steering pairs."""
    columns = {}
    for name, rows in steered.items():
        of = rows[rows.set == "attribution"]
        columns[name] = {
            "positive attribution on the context's answer": f"{of.share.mean():.1%}",
            "the answer's share of the tokens of context and question": f"{of.tokens.mean():.1%}",
            "the largest attribution is on the context's answer": f"{of.top.mean():.1%}",
            "steering pairs": str(len(of)),
        }
    return pd.DataFrame(columns)


def levels(steered: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Accuracies of the base model and steered, in %."""
    columns = {}
    for name, rows in steered.items():
        for label, title in ((BASE, "base"), (CHOSEN, "`gradient`")):
            columns[f"{name}, {title}"] = {
                **{
                    f"{title_of_set}, {TITLES[kind]}": faithfulness.level(rows, of_set, label, kind)
                    for of_set, title_of_set in faithfulness.shown_of(rows).items()
                    for kind in SCORES[::-1]
                },
                "free answers that hold the context's answer": faithfulness.level(
                    rows, f"{CONTRARY} free", label, "holds"
                ),
                "rise of the perplexity of prose, %": faithfulness.prose(rows, label),
                **own_answers(rows, label),
            }
    return pd.DataFrame(columns)


def own_answers(rows: pd.DataFrame, label: str) -> dict[str, str]:
    """What is measured behind a gate only."""
    rise = faithfulness.prose(rows, label, faithfulness.OWN)
    return {"rise of the perplexity of own answers, %": rise} if rise != "-" else {}


def gains(steered: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Of every configuration and model: strength, gains summed and per token, cost in prose."""
    columns: dict[str, dict[str, str]] = {}
    for name, rows in steered.items():
        tested = rows[(rows.set == CONTRARY) & (rows.configuration != BASE)]
        columns[f"{name}: strength"] = {}
        for kind in SCORES[::-1]:
            columns[f"{name}: {TITLES[kind]}"] = {}
        columns[f"{name}: prose, %"] = {}
        for label, of_label in tested.groupby("configuration", sort=False):
            strengths = sorted(of_label.alpha.unique(), key=abs)
            columns[f"{name}: strength"][label] = ", ".join(f"{a:g}" for a in strengths)
            for kind in SCORES[::-1]:
                columns[f"{name}: {TITLES[kind]}"][label] = faithfulness.gain(
                    rows, CONTRARY, label, kind
                )
            columns[f"{name}: prose, %"][label] = faithfulness.prose(rows, label)
    return pd.DataFrame(columns)


TABLES = {"base": base_accuracy, "attribution": attributed, "faithfulness": faithfulness_tables}


if __name__ == "__main__":
    entry.run(main)
