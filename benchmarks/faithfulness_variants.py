"""Faithfulness to a context: which tokens attribution finds, what other settings gain.

Steering pairs of src/data/faithfulness.jsonl are attributed by gradient times input and by
Integrated Gradients. The paper's vectors are made from the ablation of 1, 5 or 20 tokens and of the
whole context, and steer several layers; those of `gradient` steer several layers and positions. For
each the strength is the best on validation questions among those within --budget; the gains are on
test questions. Finished variants are kept in --folder, which a later run takes up.

    python benchmarks/faithfulness_variants.py --document docs/tables/faithfulness_variants.md
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import faithfulness  # noqa: E402
from faithfulness import CONTRARY, PROSE, characters, context_span  # noqa: E402

from grains import (  # noqa: E402
    cpu,
    data,
    manifests,
    models,
    prompts,
    runs,
    splits,
    stage1,
    vectors,
)
from grains.ablation import hidden_states  # noqa: E402
from grains.cli import entry  # noqa: E402
from grains.cli.documents import print_tables  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.scoring import margins, score_all  # noqa: E402
from grains.settings import (  # noqa: E402
    EMBEDDED,
    SCORES,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
)
from grains.states import (  # noqa: E402
    NEG,
    NEG_ABLATED,
    POS,
    POS_ABLATED,
    StatesFile,
    StatesInMemory,
)
from grains.steering import Configuration, directions  # noqa: E402
from grains.study import costs  # noqa: E402

SHORT = {"integrated_gradients": "IG", "vanilla": "gradient times input"}
CONTEXT, TOP_K = "context", 5
STRENGTHS = (0.003, 0.006, 0.01, 0.02, 0.03)


@dataclass(frozen=True)
class Variant:
    """Vectors and where they steer.

    ablated: how tokens are attributed and how many of them are ablated, or the whole context; None
        for a method that ablates nothing.
    """

    method: str
    layers: str = "8-24"
    ablated: tuple[str, int] | str | None = None
    positions: str = "all"

    @property
    def name(self) -> str:
        at = f"layers {self.layers}" if self.layers != "all" else "all layers"
        words = [f"{self.method}, {at}"]
        if self.ablated == CONTEXT:
            words.append("whole context ablated")
        elif self.ablated:
            method, k = self.ablated
            words.append(f"k = {k} by {SHORT[method]}")
        if self.positions != "all":
            words.append(f"positions: {self.positions}")
        return ", ".join(words)


VARIANTS = (
    *(Variant("gradient", layers) for layers in ("8-24", "all", "4-16", "10-19", "14-29")),
    *(Variant("gradient", positions=words) for words in ("prompt", "response")),
    *(Variant(m, ablated=how) for m in ("mean", "pca") for how in (("vanilla", 5), CONTEXT)),
    *(Variant("mean", layers, CONTEXT) for layers in ("all", "10-19")),
    *(
        Variant(method, ablated=("integrated_gradients", k))
        for method in ("mean", "pca")
        for k in (1, 5, 20)
    ),
    *(
        Variant("mean", layers, ("integrated_gradients", 5))
        for layers in ("all", "0-9", "10-19", "20-29", "14")
    ),
)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--model_name", default=EMBEDDED)
    flags.add_argument("--prompt_style", default="chat")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--num_samples", type=int, default=40, help="steering pairs")
    flags.add_argument("--ig_steps", type=int, default=20, help="points of Integrated Gradients")
    flags.add_argument("--budget", type=float, default=0.02, help="rise of perplexity of prose")
    flags.add_argument("--num_validation", type=int, default=40, help="validation questions")
    flags.add_argument("--num_test", type=int, default=80, help="test questions")
    flags.add_argument(
        "--folder", type=Path, default=ROOT / "src" / "results" / "faithfulness_variants"
    )
    flags.add_argument("--document", type=Path, help="Markdown file of the tables")
    return flags


def main() -> None:
    args = parser().parse_args()
    entry.import_libraries()
    cpu.keep_freed_memory()

    source = DataSettings(
        CONTRARY,
        num_samples=args.num_samples,
        num_validation=args.num_validation,
        num_test=args.num_test,
    )
    settings = AblationSettings(
        tops=("pos",), prompt=PromptSettings(args.prompt_style), seed=args.seed
    )
    material = Material(args, source, settings)
    every = []
    for number, variant in enumerate(VARIANTS):
        path = args.folder / f"{number:02}_{runs.digest(variant.name)}.csv"
        if not path.exists():
            runs.write_table(path, material.measured(variant))
        every.append(pd.read_csv(path, dtype={"id": str}))
    rows = pd.concat(every)
    title = (
        f"{Path(args.model_name).stem}, seed {args.seed}: points gained over base, "
        f"{rows.id.nunique()} test questions over {rows.fact.nunique()} facts; strength chosen on "
        f"{args.num_validation} validation questions within {args.budget:+.0%} perplexity"
    )
    print_tables(
        args.document,
        "variants",
        [
            (
                "Where the positive attribution of the steering pairs lies",
                share_table({method: material.shares(method) for method in SHORT}),
            ),
            (title, gain_table(rows)),
        ],
        {"rows": args.folder},
    )


class Material:
    """What variants are made from and measured on; what is costly is computed when first read."""

    def __init__(self, args: argparse.Namespace, source: DataSettings, settings: AblationSettings):
        self.args, self.source, self.settings = args, source, settings
        self.pairs = splits.steering_examples(source, args.seed)
        self.known: stage1.Known = {}

    @cached_property
    def lm(self) -> LanguageModel:
        return models.load(self.args.model_name, dtype="float32", device="cpu")

    @cached_property
    def steering(self) -> list[Encoded]:
        return [prompts.encode(self.lm, pair, self.settings.prompt) for pair in self.pairs]

    @cached_property
    def asked(self) -> dict[str, list[Encoded]]:
        """Contrary contexts by split, and the passages of prose."""
        used = {"questions": [*map(data.question_key, self.pairs)]}
        examples = splits.evaluation_examples(self.source, self.args.seed, used)
        return {
            split: [prompts.encode(self.lm, example, self.settings.prompt) for example in some]
            for split, some in examples.items()
        } | {f"{split} {PROSE}": costs.passages(self.lm, split) for split in examples}

    def files(self, method: str, k: int) -> tuple[Path, Path]:
        """What stage 1 writes when k tokens are ablated: attributions and states."""
        table = self.args.folder / f"{method}_k{k}.csv"
        states = table.with_suffix(".safetensors")
        steps = self.args.ig_steps if method == "integrated_gradients" else None
        attribution = AttributionSettings(grad_method=method, ig_steps=steps)
        settings = replace(self.settings, attribution=attribution, top_k=k)
        pos = {"pos": states}
        stage1.run(self.lm, self.pairs, self.source, settings, table, pos, known=self.known)
        return table, states

    @cached_property
    def context_ablated(self) -> StatesInMemory:
        """The states of the pairs with every token of the context ablated."""
        made = []
        for item in self.steering:
            begin, end = context_span(item)
            positions = [
                position
                for position, (first, last) in enumerate(characters(self.lm, item))
                if first < end and last > begin
            ]
            states = hidden_states(self.lm, item, [positions], self.settings.batch_tokens)
            plain, ablated = states.last
            made.append(
                {
                    **{POS: plain[0], NEG: plain[1], "norms": states.norms},
                    **{f"{POS_ABLATED}.pos": ablated[0], f"{NEG_ABLATED}.pos": ablated[1]},
                    "gradients": states.gradients,
                }
            )
        counts = prompts.tally(self.steering)
        info = manifests.stage1(self.lm, self.pairs, self.source, self.settings, counts)
        return StatesInMemory(made, "pos", info)

    def shares(self, method: str) -> pd.DataFrame:
        """Where the attribution of each pair lies (see `faithfulness.attribution_row`)."""
        table = pd.read_csv(self.files(method, TOP_K)[0], dtype={"id": str})
        return pd.DataFrame(
            [
                faithfulness.attribution_row(self.lm, item, row)
                for item, row in zip(self.steering, table.to_dict("records"), strict=True)
            ]
        )

    def measured(self, variant: Variant) -> pd.DataFrame:
        """A row for each test question, base and steered, and the costs; the strength is chosen on
        validation."""
        states = (
            self.context_ablated
            if variant.ablated == CONTEXT
            else StatesFile(self.files(*(variant.ablated or ("vanilla", TOP_K)))[1])
        )
        made = vectors.make({"pos": states}, variant.method, "pos", self.args.seed)
        grid = GridSettings(
            (variant.method,), layers=(variant.layers,), positions=variant.positions
        )
        (line,) = directions(made, variant.method, "pos", grid)
        tried = [line.at(alpha) for alpha in STRENGTHS]
        rises = self.rises("validation", tried)
        within = [item for item, rise in zip(tried, rises, strict=True) if rise <= self.args.budget]
        candidates = within or tried[:1]
        right = self.right("validation", candidates)
        mean = sum(kind.mean(axis=0) for kind in right.values())[1:] / len(right)
        best = candidates[int(mean.argmax())]  # of equal ones the weakest
        tested = self.right("test", [best])
        (cost,) = self.rises("test", [best])
        return pd.DataFrame(
            [
                {
                    "variant": variant.name,
                    "alpha": best.alpha,
                    "within": bool(within),
                    "validation": mean.max() - sum(k[:, 0].mean() for k in right.values()) / 2,
                    "rise": cost,
                    "id": item.example.id,
                    "fact": faithfulness.fact_of(item.example, CONTRARY),
                    **{
                        f"{kind}_{when}": float(values[place, column])
                        for kind, values in tested.items()
                        for column, when in enumerate(("before", "after"))
                    },
                }
                for place, item in enumerate(self.asked["test"])
            ]
        )

    def right(self, split: str, tried: list[Configuration]) -> dict[str, np.ndarray]:
        """(questions, 1 + configurations) bool, by score."""
        items = self.asked[split]
        leads = margins(items, score_all(self.lm, items, tried, self.settings.batch_tokens))
        return {kind: lead > 0 for kind, lead in leads.items()}

    def rises(self, split: str, tried: list[Configuration]) -> np.ndarray:
        """(configurations,) rises of the perplexity of prose."""
        passages = self.asked[f"{split} {PROSE}"]
        scores = score_all(self.lm, passages, tried, self.settings.batch_tokens)
        return costs.perplexity_rise(passages, scores)[1:]


def share_table(shares: dict[str, pd.DataFrame]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            SHORT[method]: {
                "positive attribution on the context's answer": f"{rows.share.mean():.1%}",
                "the answer's share of the tokens": f"{rows.tokens.mean():.1%}",
                "the largest attribution is on it": f"{rows.top.mean():.1%}",
                # Gradient times input need not add up to anything.
                "completeness error, median": (
                    f"{rows.completeness_error.median():.1%}" if method != "vanilla" else "-"
                ),
                "gradients a pair": f"{rows.points.median():.0f}",
                "steering pairs": str(len(rows)),
            }
            for method, rows in shares.items()
        }
    )


def gain_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each variant: what it gained on validation and gains on test."""
    lines = {}
    for name, of in rows.groupby("variant", sort=False):
        first = of.iloc[0]
        gains = {
            kind: faithfulness.cell(
                faithfulness.interval(of.assign(value=of[f"{kind}_after"] - of[f"{kind}_before"])),
                "+",
            )
            for kind in SCORES
        }
        lines[name] = {
            "strength": f"{first.alpha:g}" + ("" if first.within else ", above the budget"),
            "validation, mean of both": f"{100 * first.validation:+.1f}",
            "summed": gains["sum"],
            "per token": gains["token"],
            "prose, %": f"{100 * first.rise:+.1f}",
        }
    return pd.DataFrame.from_dict(lines, orient="index")


if __name__ == "__main__":
    entry.run(main)
