"""Variants of steering at one price: other positions, layers, moves and directions.

The vectors of `gradient` and of the token ablation (`mean`) are varied in one respect at a time, on
SmolLM2-135M-Instruct. Every variant has the strength at which the perplexity of neutral passages
is --price higher, and is judged on validation questions and on unrelated ones. Writes the table
between its markers of docs/trials.md.

    python benchmarks/variants.py --dataset_path truthfulqa.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import experiment  # noqa: E402
from grains import cli, costs, models, prompts, runs, stats  # noqa: E402
from grains.ablation import hidden_states  # noqa: E402
from grains.errors import UserError  # noqa: E402
from grains.fronts import SCORES, points, tell  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.replay import replay  # noqa: E402
from grains.scoring import batches, margins, packed_batch  # noqa: E402
from grains.vectors import StatesFile, steer  # noqa: E402

FURTHER_PAIRS = 150  # that steer beside the others in one variant, from questions for test
SENSITIVE = 32  # directions that neutral text is most sensitive to
COMPONENTS = 5  # of the gradients of single examples
RIDGE = 0.1  # added to a second moment, in units of its mean eigenvalue
PROBE = 0.1  # strength, either way, at which the price of a single layer is measured
PASSAGES = 8  # neutral ones whose states and gradients are read; others measure prices
FIRST, STEP, LAST = 0.02, 4.0, 20.0  # strengths tried to enclose the one of a price


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to steer, at any strength.

    vectors: Material -> (L, D), to be multiplied by the strength.
    move: how states are moved, see `add`. begin: the first position steered, 0 for the prompt's
        last token and 1 for the response; None steers everywhere.
    """

    name: str
    vectors: Callable[[Material], Tensor]
    move: Callable[[Tensor, Tensor, Tensor], Tensor]
    begin: int | None = None


class Material:
    """What the vectors of one study are made from; what is costly is computed when first read.

    given: the vectors by method. norms: (L,) median ||h_l||. example_gradients: (L, N, D).
    """

    def __init__(self, lm, one: experiment.Study, args):
        self.lm, self.one, self.args = lm, one, args
        self.given = {item.method: item.vectors for item in one.directions}
        self.norms = self.given["gradient"].norms
        states = StatesFile(args.parts_dir / f"{one.name}_pos.safetensors")
        self.example_gradients = torch.stack(
            [
                torch.from_numpy(np.concatenate([*states.layer("gradients", layer)])).float()
                for layer in range(states.layers)
            ]
        )

    def of(self, method: str) -> Tensor:
        """(L, D) the vectors of a method, of unit length."""
        return normalize(self.given[method].vectors, dim=-1)

    @cached_property
    def asked(self) -> dict[str, tuple[list[Encoded], list[np.ndarray]]]:
        """Validation questions and unrelated ones, and what the base model scores of them."""
        kinds = {
            "own": experiment.encode(self.lm, self.one.parts["validation"], self.args),
            "unrelated": experiment.unrelated_items(self.lm, "validation"),
        }
        return {
            kind: (items, values(self, items, PLAIN, torch.zeros_like(self.of("gradient"))))
            for kind, items in kinds.items()
        }

    @cached_property
    def priced(self) -> tuple[list[Encoded], float]:
        """The neutral passages that measure prices, and the base model's perplexity of them."""
        texts = experiment.neutral_items(self.lm, "test")
        base = values(self, texts, PLAIN, torch.zeros_like(self.of("gradient")))
        return texts, perplexity(texts, base)

    @cached_property
    def further_gradients(self) -> Tensor:
        """(L, FURTHER_PAIRS, D) gradients of pairs that are for test."""
        pairs = [
            prompts.encode(self.lm, example.pair(), self.args.prompt_style)
            for example in self.one.parts["test"][:FURTHER_PAIRS]
        ]
        return torch.stack(
            [
                hidden_states(self.lm, item, [], self.args.batch_tokens).gradients[1:]
                for item in pairs
            ],
            dim=1,
        )

    @cached_property
    def neutral(self) -> tuple[Tensor, Tensor]:
        """(L, n, D) directions h / ||h|| of states of neutral passages, and the gradients of the
        passages' loss there; the first tokens, whose states are unlike all others, are left out."""
        found = []
        for item in experiment.neutral_items(self.lm, "training")[:PASSAGES]:
            batch, read = packed_batch(self.lm, [item])
            outputs: list[Tensor] = []
            final = replay(
                self.lm,
                batch.embeds.clone().requires_grad_(),
                batch.kwargs,
                after=lambda layer, states, outputs=outputs: outputs.append(states),
            )
            gradients = torch.autograd.grad(-read(final[None]).sum(), outputs)
            found.append([torch.cat(parts).detach()[:, 1:] for parts in (outputs, gradients)])
        states, gradients = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return normalize(states, dim=-1), gradients

    @cached_property
    def layer_prices(self) -> Tensor:
        """(L,) rise of the loss of neutral passages per squared strength of one layer's gradient,
        the mean of both ways."""
        texts = experiment.neutral_items(self.lm, "training")[:PASSAGES]

        def loss(vectors: Tensor) -> float:
            return float(np.log(perplexity(texts, values(self, texts, PLAIN, vectors))))

        base = loss(torch.zeros_like(self.of("gradient")))
        rises = [
            (loss(alone) + loss(-alone)) / 2 - base
            for alone in (
                PROBE * only([layer], "gradient", self) for layer in range(len(self.norms))
            )
        ]
        return torch.tensor(rises).clamp_min(1e-4) / PROBE**2


def add(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """The paper's: h + norm v at the length of h, whatever h is.

    vector: (D,) the strength included. norm: median ||h|| of the layer.
    """
    return steer(states, norm * vector)


def rotate(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """Turn every state but the first token's towards v by ||v|| radians."""
    size, angle = states.norm(dim=-1, keepdim=True), vector.norm()
    direction, unit = normalize(states, dim=-1), normalize(vector, dim=-1)
    across = normalize(unit - (direction @ unit)[..., None] * direction, dim=-1)
    turned = size * (angle.cos() * direction + angle.sin() * across)
    return torch.cat([states[..., :1, :], turned[..., 1:, :]], dim=-2)


def fill(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """`add` as much as the component along v lacks of norm ||v||, at most twice that, never less
    than nothing."""
    unit, wanted = normalize(vector, dim=-1), norm * vector.norm()
    missing = (wanted - states @ unit).clamp(0, 2 * wanted)
    return steer(states, missing[..., None] * unit)


def only(layers, method: str, material: Material) -> Tensor:
    kept = torch.zeros(len(material.norms), 1)
    kept[list(layers)] = 1
    return kept * material.of(method)


def by_gain_and_price(material: Material) -> Tensor:
    """Gradients as strong as buys the most, for gains linear and prices quadratic in strengths.

    What a layer gains is read off one half of the pairs for the direction of the other.
    """
    halves = [half.mean(1) for half in material.example_gradients.chunk(2, dim=1)]
    gains = sum((one * normalize(other, dim=-1)).sum(-1) for one, other in (halves, halves[::-1]))
    bought = material.norms * gains.clamp_min(0) / material.layer_prices
    return (bought / bought.max())[:, None] * material.of("gradient")


def without_sensitive(method: str, material: Material) -> Tensor:
    """The vectors less what lies in the main directions of neutral text's gradients."""
    main = torch.linalg.svd(material.neutral[1], full_matrices=False).Vh[:, :SENSITIVE]
    vectors = material.of(method)[:, None]
    return normalize(vectors - vectors @ main.mT @ main, dim=-1)[:, 0]


def whitened(method: str, of: int, material: Material) -> Tensor:
    """(C + ridge)^-1 v, C the second moment of neutral directions (of 0) or gradients (1)."""
    rows = material.neutral[of]
    moment = rows.mT @ rows / rows.shape[1]
    ridge = RIDGE * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return normalize(
        torch.linalg.solve(moment + ridge * torch.eye(moment.shape[-1]), material.of(method)),
        dim=-1,
    )


def main_components(material: Material) -> Tensor:
    """The mean gradient within the first components of the examples' gradients."""
    rows = material.example_gradients
    main = torch.linalg.svd(rows, full_matrices=False).Vh[:, :COMPONENTS]
    return normalize(rows.mean(1, keepdim=True) @ main.mT @ main, dim=-1)[:, 0]


def of_half_the_pairs(material: Material) -> Tensor:
    rows = material.example_gradients
    return normalize(rows[:, : rows.shape[1] // 2].mean(1), dim=-1)


def of_further_pairs(material: Material) -> Tensor:
    rows = torch.cat([material.example_gradients, material.further_gradients], dim=1)
    return normalize(rows.mean(1), dim=-1)


PLAIN = Variant(
    "gradient, added at all layers and positions", partial(Material.of, method="gradient"), add
)


def variants(layers: int) -> list[Variant]:
    gradient, mean, random = (
        partial(Material.of, method=method) for method in ("gradient", "mean", "random")
    )
    third = layers // 3

    def of(method: str, made) -> list[Variant]:
        return [
            Variant(f"{method}, from the prompt's last token on", made, add, 0),
            Variant(f"{method}, the response alone", made, add, 1),
            Variant(
                f"{method}, layer {layers // 2 - 1} alone",
                partial(only, [layers // 2 - 1], method),
                add,
            ),
            Variant(
                f"{method}, layers {third} to {layers - 1}",
                partial(only, range(third, layers), method),
                add,
            ),
            Variant(
                f"{method}, whitened by the gradients of neutral text",
                partial(whitened, method, 1),
                add,
            ),
            Variant(f"{method}, rotated by one angle", made, rotate),
        ]

    return [
        PLAIN,
        *of("gradient", gradient),
        Variant(
            f"gradient, layers {third} to {2 * third - 1}",
            partial(only, range(third, 2 * third), "gradient"),
            add,
        ),
        Variant("gradient, layers by gain over price", by_gain_and_price, add),
        Variant(
            f"gradient, without {SENSITIVE} directions that neutral text is sensitive to",
            partial(without_sensitive, "gradient"),
            add,
        ),
        Variant("gradient, whitened by neutral states", partial(whitened, "gradient", 0), add),
        Variant("gradient, as much as a state lacks", gradient, fill),
        Variant(f"gradient, within {COMPONENTS} components", main_components, add),
        Variant("gradient, half of the pairs", of_half_the_pairs, add),
        Variant(f"gradient, {FURTHER_PAIRS} more pairs", of_further_pairs, add),
        Variant("mean, added at all layers and positions", mean, add),
        *of("mean", mean),
        Variant("random, added at all layers and positions", random, add),
        Variant("random, rotated by one angle", random, rotate),
    ]


@torch.inference_mode()
def values(
    material: Material, items: list[Encoded], variant: Variant, vectors: Tensor
) -> list[np.ndarray]:
    """(choices,) log-likelihoods of every item under a variant with its (L, D) vectors, the
    strength included. Raises UserError for one that is no number."""
    lm, found = material.lm, [np.empty(0)] * len(items)
    for members in batches([item.length for item in items], material.args.batch_tokens):
        batch, read = packed_batch(lm, [items[index] for index in members])
        ends = torch.tensor([len(items[index].prompt_ids) - 1 for index in members])
        place = torch.arange(batch.embeds.shape[1]) - ends[:, None]

        def after(layer: int, states: Tensor, place=place) -> Tensor | None:
            if not vectors[layer].any():
                return None
            moved = variant.move(states, vectors[layer], material.norms[layer])
            if variant.begin is None:
                return moved
            return torch.where((place >= variant.begin)[..., None], moved, states)

        scored = read(replay(lm, batch.embeds, batch.kwargs, after=after)[None])[0]
        if not scored.isfinite().all():
            raise UserError(f"'{variant.name}' scores NaN or infinite")
        sizes = [len(items[index].responses) for index in members]
        for index, part in zip(members, scored.split(sizes), strict=True):
            found[index] = part.double().numpy()
    return found


def perplexity(texts: list[Encoded], scored: list[np.ndarray]) -> float:
    return costs.perplexity_of(texts, [one[None] for one in scored])[0]


def strength(material: Material, variant: Variant, vectors: Tensor, price: float) -> float:
    """The strength at which the perplexity of neutral passages is `price` higher, 0.1 for 10 %."""
    texts, base = material.priced

    @cache  # the ends of the bracket are asked for again
    def excess(log_alpha: float) -> float:
        now = perplexity(texts, values(material, texts, variant, np.exp(log_alpha) * vectors))
        return float(np.log(max(now / base - 1, 1e-4) / price))

    low = high = np.log(FIRST)
    if excess(low) < 0:
        while excess(high := high + np.log(STEP)) < 0:
            low = high
            if high > np.log(LAST):
                raise UserError(f"'{variant.name}' costs less than {price:.0%} at any strength")
    else:
        while excess(low := low - np.log(STEP)) > 0:
            high = low
    return float(np.exp(brentq(excess, low, high, xtol=0.02)))


def measured(material: Material, variant: Variant, price: float) -> list[dict]:
    """A row for every validation and unrelated question."""
    vectors = variant.vectors(material)
    alpha = strength(material, variant, vectors, price)
    rows = []
    for kind, (items, before) in material.asked.items():
        after = values(material, items, variant, alpha * vectors)
        leads = margins(items, [np.stack(pair) for pair in zip(before, after, strict=True)])
        rows += [
            {
                "variant": variant.name,
                "seed": material.one.seed,
                "alpha": alpha,
                "questions": kind,
                "id": item.example.id,
                **{
                    f"{score}_{when}": int(leads[score][row, column] > 0)
                    for score in SCORES
                    for column, when in enumerate(("before", "after"))
                },
            }
            for row, item in enumerate(items)
        ]
    return rows


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line for each variant: mean strength over seeds, gains with their intervals."""
    found = {}
    for name, part in rows.groupby("variant", sort=False):
        found[name] = {"strength": f"{part.groupby('seed').alpha.first().mean():.3g}"}
        for title, kind, score in (
            ("per token", "own", "token"),
            ("summed", "own", "sum"),
            ("unrelated questions", "unrelated", "token"),
        ):
            here = part[part.questions == kind]
            gains = (here[f"{score}_after"] - here[f"{score}_before"]).groupby(here.id).mean()
            low, high = stats.bootstrap_interval(gains.to_numpy())
            found[name][title] = points(
                pd.Series({"gain": gains.mean(), "gain_low": low, "gain_high": high})
            )
    return pd.DataFrame.from_dict(found, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="truthfulqa")
    parser.add_argument("--dataset_path")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--price", type=float, default=0.1, help="rise of perplexity, 0.1 for 10 %%"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "src" / "results" / "variants",
        help="folder where finished measurements are kept",
    )
    parser.add_argument("--document", default=ROOT / "docs" / "trials.md")
    given = parser.parse_args()
    args = experiment.flags(cli.LLM).parse_args(
        [
            "--model_name",
            models.EMBEDDED,
            "--methods",
            "gradient",
            "mean",
            "random",
            "--batch_tokens",
            "1024",
            "--no-train_vectors",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
    )
    args.parts_dir = args.steering_vectors_dir = given.work
    lm = cli.load_model(args)
    every, found = variants(len(lm.layers)), []
    for seed in given.seeds:
        one = experiment.study(lm, args, given.dataset_name, given.dataset_path, seed, {})
        output = given.work / f"{one.name}_variants.csv"
        work = runs.Run(
            [output],
            one.manifest
            | {
                "price": given.price,
                "variants": [variant.name for variant in every],
                "constants": [RIDGE, PROBE, PASSAGES],
            },
            False,
        )
        if not work.finished:
            material = Material(lm, one, args)
            for unit in work.todo(len(every), f"{one.name} variants"):
                work.save(unit, {}, measured(material, every[unit], given.price))
            runs.write_rows(output, (rows for _, rows in work.units(len(every))))
            work.finish()
        found.append(pd.read_csv(output, dtype={"id": str}))
    rows = pd.concat(found)
    questions = rows[rows.questions == "own"].groupby("id")[["token_before", "sum_before"]].mean()
    tell(
        given.document,
        "variants",
        [
            (
                f"{given.dataset_name}: gain in points on {len(questions)} validation questions of "
                f"{len(given.seeds)} seed(s), base {questions.token_before.mean():.1%} per token "
                f"and {questions.sum_before.mean():.1%} summed, and change on unrelated questions, "
                f"at {given.price:+.0%} perplexity",
                table(rows),
            )
        ],
        {"every question": given.work},
    )


if __name__ == "__main__":
    cli.main(main)
