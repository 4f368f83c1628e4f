"""Variants of steering at the same cost: other positions, layers, moves and directions.

The vectors of `gradient` and of the token ablation (`mean`) are varied in one respect at a time, on
SmolLM2-135M-Instruct. Every variant has the strength at which the perplexity of neutral passages
is --cost higher, and is compared on validation questions and on unrelated ones. Writes the table
between its markers of docs/trials.md.

    python benchmarks/variants.py --dataset_path truthfulqa.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
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

from grains import cpu, models, prompts, runs, stats  # noqa: E402
from grains.ablation import hidden_states  # noqa: E402
from grains.cli import entry  # noqa: E402
from grains.cli.documents import print_tables  # noqa: E402
from grains.errors import UserError  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.names import StudyNames  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.replay import replay  # noqa: E402
from grains.scoring import batches, margins, packed_batch  # noqa: E402
from grains.settings import (  # noqa: E402
    EMBEDDED,
    METHODS,
    MODES,
    SCORES,
    AblationSettings,
    DataSettings,
    GridSettings,
    StudySettings,
    selections,
)
from grains.steering import steer  # noqa: E402
from grains.study import costs, study  # noqa: E402
from grains.study.pareto import points  # noqa: E402
from grains.study.study import Study  # noqa: E402

FURTHER_PAIRS = 150  # that steer beside the others in one variant, from questions for test
SENSITIVE = 32  # directions that neutral text is most sensitive to
COMPONENTS = 5  # of the gradients of single examples
RIDGE = 0.1  # added to a second moment, in units of its mean eigenvalue
PROBE = 0.1  # strength, in both directions, at which the cost of a single layer is measured
PASSAGES = 8  # neutral ones whose states and gradients are read; others measure costs
FIRST, STEP, LAST = 0.02, 4.0, 20.0  # strengths that bracket the one of a cost


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

    vectors: by method. norms: (L,) median ||h_l||. example_gradients: (L, N, D).
    """

    def __init__(self, lm: LanguageModel, study: Study):
        self.lm, self.study, states = lm, study, study.states
        self.vectors = {item.method: item.vectors for item in study.directions}
        self.norms = self.vectors["gradient"].norms
        self.example_gradients = torch.stack(
            [
                torch.from_numpy(np.concatenate([*states.layer("gradients", layer)])).float()
                for layer in range(states.layers)
            ]
        )

    def of(self, method: str) -> Tensor:
        """(L, D) the vectors of a method, of unit length."""
        return normalize(self.vectors[method].vectors, dim=-1)

    @cached_property
    def asked(self) -> dict[str, tuple[list[Encoded], list[np.ndarray]]]:
        """Validation questions and unrelated ones, and what the base model scores of them."""
        style, own = self.study.ablation.prompt_style, self.study.splits["validation"]
        kinds = {
            "own": [prompts.encode(self.lm, example, style) for example in own],
            "unrelated": costs.unrelated_questions(self.lm, "validation"),
        }
        return {
            kind: (items, values(self, items, PLAIN, torch.zeros_like(self.of("gradient"))))
            for kind, items in kinds.items()
        }

    @cached_property
    def measuring(self) -> tuple[list[Encoded], float]:
        """The neutral passages that measure costs, and the base model's perplexity of them."""
        texts = costs.passages(self.lm, "test")
        base = values(self, texts, PLAIN, torch.zeros_like(self.of("gradient")))
        return texts, perplexity(texts, base)

    @cached_property
    def further_gradients(self) -> Tensor:
        """(L, FURTHER_PAIRS, D) gradients of pairs that are for test."""
        pairs = [
            prompts.encode(self.lm, example.pair(), self.study.ablation.prompt_style)
            for example in self.study.splits["test"][:FURTHER_PAIRS]
        ]
        max_tokens = self.study.ablation.batch_tokens
        return torch.stack(
            [hidden_states(self.lm, item, [], max_tokens).gradients[1:] for item in pairs], dim=1
        )

    @cached_property
    def neutral(self) -> tuple[Tensor, Tensor]:
        """(L, n, D) directions h / ||h|| of states of neutral passages, and the gradients of the
        passages' loss there; the first tokens, whose states are unlike all others, are left out."""
        read = []
        for item in costs.passages(self.lm, "training")[:PASSAGES]:
            batch, scorer = packed_batch(self.lm, [item])
            outputs: list[Tensor] = []
            final = replay(
                self.lm,
                batch.embeds.clone().requires_grad_(),
                batch.calls,
                after=lambda layer, states, outputs=outputs: outputs.append(states),
            )
            gradients = torch.autograd.grad(-scorer(final[None]).sum(), outputs)
            read.append([torch.cat(layers).detach()[:, 1:] for layers in (outputs, gradients)])
        states, gradients = (torch.cat(items, dim=1) for items in zip(*read, strict=True))
        return normalize(states, dim=-1), gradients

    @cached_property
    def layer_costs(self) -> Tensor:
        """(L,) rise of the loss of neutral passages per squared strength of one layer's gradient,
        the mean of both directions."""
        texts = costs.passages(self.lm, "training")[:PASSAGES]

        def loss(vectors: Tensor) -> float:
            return float(np.log(perplexity(texts, values(self, texts, PLAIN, vectors))))

        base = loss(torch.zeros_like(self.of("gradient")))
        rises = [
            (loss(vectors) + loss(-vectors)) / 2 - base
            for vectors in (
                PROBE * only([layer], "gradient", self) for layer in range(len(self.norms))
            )
        ]
        return torch.tensor(rises).clamp_min(1e-4) / PROBE**2


def add(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """The paper's: h + norm v, scaled to the length of h.

    vector: (D,) the strength included. norm: median ||h|| of the layer.
    """
    return steer(states, norm * vector)


def rotate(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """Rotate every state but the first token's towards v by ||v|| radians."""
    size, angle = states.norm(dim=-1, keepdim=True), vector.norm()
    direction, unit = normalize(states, dim=-1), normalize(vector, dim=-1)
    across = normalize(unit - (direction @ unit)[..., None] * direction, dim=-1)
    turned = size * (angle.cos() * direction + angle.sin() * across)
    return torch.cat([states[..., :1, :], turned[..., 1:, :]], dim=-2)


def fill(states: Tensor, vector: Tensor, norm: Tensor) -> Tensor:
    """`add` what the component along v lacks of norm ||v||, between 0 and twice that length."""
    unit, wanted = normalize(vector, dim=-1), norm * vector.norm()
    missing = (wanted - states @ unit).clamp(0, 2 * wanted)
    return steer(states, missing[..., None] * unit)


def only(layers: Iterable[int], method: str, material: Material) -> Tensor:
    """(L, D) the vectors of a method at some layers, zero at all others."""
    kept = torch.zeros(len(material.norms), 1)
    kept[list(layers)] = 1
    return kept * material.of(method)


def by_gain_and_cost(material: Material) -> Tensor:
    """Gradients at the best strength of each layer, for linear gains and quadratic costs.

    The gain of a layer is estimated on one half of the pairs for the direction of the other half.
    """
    halves = [half.mean(1) for half in material.example_gradients.chunk(2, dim=1)]
    gains = sum((a * normalize(b, dim=-1)).sum(-1) for a, b in (halves, halves[::-1]))
    strengths = material.norms * gains.clamp_min(0) / material.layer_costs
    return (strengths / strengths.max())[:, None] * material.of("gradient")


def without_sensitive(method: str, material: Material) -> Tensor:
    """The vectors without their part in the main directions of neutral text's gradients."""
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
        Variant("gradient, layers by gain over cost", by_gain_and_cost, add),
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
    strength included. Raises UserError for NaN or infinite values."""
    lm, scores = material.lm, [np.empty(0)] * len(items)
    max_tokens = material.study.ablation.batch_tokens
    for members in batches([item.length for item in items], max_tokens):
        batch, read = packed_batch(lm, [items[index] for index in members])
        ends = torch.tensor([len(items[index].prompt_ids) - 1 for index in members])
        place = torch.arange(batch.embeds.shape[1]) - ends[:, None]

        def after(layer: int, states: Tensor, place=place) -> Tensor | None:
            if not vectors[layer].any():
                return None
            steered_states = variant.move(states, vectors[layer], material.norms[layer])
            if variant.begin is None:
                return steered_states
            return torch.where((place >= variant.begin)[..., None], steered_states, states)

        scored = read(replay(lm, batch.embeds, batch.calls, after=after)[None])[0]
        if not scored.isfinite().all():
            raise UserError(f"'{variant.name}' scores NaN or infinite")
        sizes = [len(items[index].responses) for index in members]
        for index, choices in zip(members, scored.split(sizes), strict=True):
            scores[index] = choices.double().numpy()
    return scores


def perplexity(texts: list[Encoded], scored: list[np.ndarray]) -> float:
    return costs.perplexity_of(texts, [choices[None] for choices in scored])[0]


def strength(material: Material, variant: Variant, vectors: Tensor, cost: float) -> float:
    """The strength at which the perplexity of neutral passages is `cost` higher, 0.1 for 10 %."""
    texts, base = material.measuring

    @cache  # brentq evaluates the ends of the bracket again
    def excess(log_alpha: float) -> float:
        now = perplexity(texts, values(material, texts, variant, np.exp(log_alpha) * vectors))
        return float(np.log(max(now / base - 1, 1e-4) / cost))

    low = high = np.log(FIRST)
    if excess(low) < 0:
        while excess(high := high + np.log(STEP)) < 0:
            low = high
            if high > np.log(LAST):
                raise UserError(f"'{variant.name}' costs less than {cost:.0%} at any strength")
    else:
        while excess(low := low - np.log(STEP)) > 0:
            high = low
    return float(np.exp(brentq(excess, low, high, xtol=0.02)))


def measured(material: Material, variant: Variant, cost: float) -> list[dict]:
    """A row for every validation and unrelated question."""
    vectors = variant.vectors(material)
    alpha = strength(material, variant, vectors, cost)
    rows = []
    for kind, (items, before) in material.asked.items():
        after = values(material, items, variant, alpha * vectors)
        leads = margins(items, [np.stack(pair) for pair in zip(before, after, strict=True)])
        rows += [
            {
                "variant": variant.name,
                "seed": material.study.seed,
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
    lines = {}
    for name, of_variant in rows.groupby("variant", sort=False):
        lines[name] = {"strength": f"{of_variant.groupby('seed').alpha.first().mean():.3g}"}
        for title, kind, score in (
            ("per token", "own", "token"),
            ("summed", "own", "sum"),
            ("unrelated questions", "unrelated", "token"),
        ):
            asked = of_variant[of_variant.questions == kind]
            gains = (asked[f"{score}_after"] - asked[f"{score}_before"]).groupby(asked.id).mean()
            low, high = stats.bootstrap_interval(gains.to_numpy())
            lines[name][title] = points(
                pd.Series({"gain": gains.mean(), "gain_low": low, "gain_high": high})
            )
    return pd.DataFrame.from_dict(lines, orient="index")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="truthfulqa")
    parser.add_argument("--dataset_path")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cost", type=float, default=0.1, help="rise of perplexity, 0.1 for 10 %%")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "src" / "results" / "variants",
        help="folder where finished measurements are kept",
    )
    parser.add_argument("--document", default=ROOT / "docs" / "trials.md")
    args = parser.parse_args()
    settings = StudySettings(
        (DataSettings(args.dataset_name, args.dataset_path),),
        tuple(args.seeds),
        AblationSettings(tops=selections(METHODS, MODES), batch_tokens=1024),
        GridSettings(("gradient", "mean", "random")),
        train_vectors=False,
    )
    entry.import_libraries()
    lm = models.load(EMBEDDED, dtype="float32", device="cpu")
    cpu.keep_freed_memory()
    every = variants(len(lm.layers))
    tables = [
        measured_study(lm, settings, seed, every, args.cost, args.work) for seed in settings.seeds
    ]
    rows = pd.concat(tables)
    questions = rows[rows.questions == "own"].groupby("id")[["token_before", "sum_before"]].mean()
    print_tables(
        args.document,
        "variants",
        [
            (
                f"{args.dataset_name}: gain in points on {len(questions)} validation questions of "
                f"{len(args.seeds)} seed(s), base {questions.token_before.mean():.1%} per token "
                f"and {questions.sum_before.mean():.1%} summed, and change on unrelated questions, "
                f"at {args.cost:+.0%} perplexity",
                table(rows),
            )
        ],
        {"every question": args.work},
    )


def measured_study(
    lm: LanguageModel,
    settings: StudySettings,
    seed: int,
    every: list[Variant],
    cost: float,
    folder: Path,
) -> pd.DataFrame:
    """The rows of all variants on one seed's questions, kept in a folder."""
    (source,) = settings.sources
    names = StudyNames(folder, folder, source.name, seed)
    begun = study.begin(lm, settings, source, seed, names, say=print)
    output = folder / f"{begun.name}_variants.csv"
    manifest = begun.manifest | {
        "price": cost,
        "variants": [variant.name for variant in every],
        "constants": [RIDGE, PROBE, PASSAGES],
    }

    @cache
    def material() -> Material:
        return Material(lm, begun)

    def make(unit: int) -> tuple[dict[str, Tensor], list[dict]]:
        return {}, measured(material(), every[unit], cost)

    def write(units: Callable[[], Iterator[tuple[dict[str, Tensor], list[dict]]]]) -> None:
        runs.write_rows(output, (rows for _, rows in units()))

    runs.resume([output], manifest, len(every), make, write, f"{begun.name} variants")
    return pd.read_csv(output, dtype={"id": str})


if __name__ == "__main__":
    entry.run(main)
