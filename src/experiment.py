"""Experiment: what steering gains on held-out questions, at what price, beside controls.

For every data set and seed: steering, validation and test questions that share none; stage 1 on the
steering examples; the vectors of every method. Each is tried at strengths that cost it certain
prices, a rise of the perplexity of neutral text; the best affordable one on validation
questions is reported on test questions, and on those of the other data sets (transfer). Controls go
through the same choice: random directions, the ablation of random tokens, gradients whose chosen
and rejected answers are swapped at random. Vectors that are trained on the same examples stand
beside them, with random directions of their lengths, and LoRA.

Prices are the rise of perplexity on prose, on other kinds of text and on what the model itself
answers freely to the questions, and accuracy lost on unrelated questions. No text that trains a
vector or sets a strength reports a price: some are for training, some for choosing, others for the
report.

Methods may be "gated" as well: they steer where states look like those of the steering examples.
Trained vectors always are, and so are the random directions of their lengths.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import numpy as np
import pandas as pd
import torch
from grains.fronts import OF_ANSWERS, PRICES, SCORES, UNRELATED

import token_ablation
from grains import cli, costs, data, fronts, gates, lora, prompts, runs, stats, strengths, trained
from grains.errors import UserError
from grains.generation import decoding_batches, generate
from grains.prompts import Encoded
from grains.scoring import Configuration, Direction, margins, question_batches, score
from grains.vectors import METHODS, Gate, StatesFile, SteeringVectors

BUDGETS = [0.02, 0.05, 0.1, 0.25, 1.0]
LEARNT = ("trained", "trained_random", "lora")
SCALES = (0.35, 0.7, 1.0, 1.5, 2.5)  # of what was learnt
DRAWN = 4  # answers of the model itself to a steering question, to train on
# What the neutral passages are for, by their number modulo 8. Of the unrelated questions the even
# ones are for validation, the odd ones for test; those for training have a file of their own.
TEXTS = {"training": (2, 3, 4, 6, 7), "validation": (0,), "test": (1, 5)}


def flags(kind: cli.Kind, description: str = __doc__):
    parser = cli.evaluation_parser(description, kind)
    parser.set_defaults(methods=[*METHODS], alphas=None)
    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME[=PATH]",
        help="several data sets, in place of --dataset_name and --dataset_path",
    )
    group.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        help="each draws its own steering, validation and test questions",
    )
    group.add_argument(
        "--max_ppl_increase",
        nargs="+",
        type=cli.positive_float,
        default=BUDGETS,
        help="prices allowed: how much the perplexity of neutral text may rise",
    )
    group.add_argument(
        "--strengths_at",
        nargs="+",
        type=cli.positive_float,
        help="prices by which strengths are set, unless --alphas gives some "
        "(default: every other one of those allowed); what was learnt is "
        "tried at fixed multiples of its length instead",
    )
    group.add_argument(
        "--max_unrelated_loss",
        type=cli.not_negative,
        default=0.02,
        help="accuracy on unrelated questions that may be lost; results are given "
        "without this limit, with it, and with it and within the same price "
        "on what the base model answers freely",
    )
    group.add_argument(
        "--gated",
        nargs="*",
        default=[],
        choices=METHODS,
        metavar="METHOD",
        help="those of --methods that also steer behind a gate, only where states "
        "look like those of the steering examples (default: none)",
    )
    group.add_argument(
        "--train_vectors",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="beside the vectors of --methods, train one a layer on the same "
        "examples, behind the gate, held to what the model says of other text "
        "and itself answers",
    )
    group.add_argument(
        "--lora",
        default="none",
        choices=("none", *lora.OBJECTIVES),
        help="beside the vectors, train LoRA on the same examples",
    )
    group.add_argument(
        "--num_generations",
        type=cli.positive,
        default=24,
        help="questions answered freely, for validation and test",
    )
    group.add_argument("--max_new_tokens", type=cli.positive, default=32, help="of those answers")
    group.add_argument("--document", help="Markdown file the tables are also written into")
    return parser


def main(kind: cli.Kind = cli.LLM) -> None:
    args = flags(kind).parse_args()
    table = run(args, cli.load_model(args))
    if runs.processes().is_main_process:
        fronts.tell(args.document, stem_of(args), fronts.summaries(table), files_of(args))


def given_datasets(args) -> dict[str, str | None]:
    """Path, if there is one, by name."""
    named = args.datasets or [
        args.dataset_name + (f"={args.dataset_path}" if args.dataset_path else "")
    ]
    return dict((*name.split("=", 1), None)[:2] for name in named)


def stem_of(args) -> str:
    """What the names of the files begin with."""
    return "_".join(
        [
            "+".join(map(runs.slug, given_datasets(args))),
            runs.slug(args.model_name),
            f"n{args.num_samples}",
            args.attribution,
            args.grad_method,
            f"k{args.top_k}",
            args.layer_mode,
            "+".join(args.layer_idxs),
        ]
    )


def files_of(args) -> dict[str, Path]:
    """The tables that are written, by what they hold."""
    folder, stem = cli.output_dir(args, "experiment"), stem_of(args)
    return {
        what: folder / f"{stem}_{name}.csv"
        for what, name in (
            ("every configuration", "grid"),
            ("gain over price", "front"),
            ("free answers", "generations"),
        )
    }


def run(args, lm, known: dict | None = None) -> pd.DataFrame:
    """Do the experiment with a loaded model and write its tables; gives the `front`.

    known: see `token_ablation.run`.
    """
    datasets = given_datasets(args)
    args.parts_dir = cli.output_dir(args, "experiment") / f"{stem_of(args)}_parts"
    args.steering_vectors_dir = args.steering_vectors_dir or args.parts_dir
    known = {} if known is None else known  # an example that several seeds steer by
    grids, answers, texts = [], [], []
    for seed in args.seeds:
        studies = [study(lm, args, name, path, seed, known) for name, path in datasets.items()]
        for one in studies:
            configurations = priced(lm, one, args)
            validated, _ = evaluate(lm, one, one, "validation", configurations, args)
            chosen = fronts.choose(validated, args.max_ppl_increase, args.max_unrelated_loss)
            labels = set(chosen.configuration)
            configurations = [item for item in configurations if item.label in labels]
            own, questions = evaluate(lm, one, one, "test", configurations, args)
            written = free_answers(lm, one, "test", configurations, args)
            own = own.merge(
                written.groupby("configuration")[["repetition", "words"]].mean(), on="configuration"
            )
            paid = own.set_index("configuration")[PRICES]
            chosen[PRICES] = paid.loc[chosen.configuration].to_numpy()
            grids += [validated, own]
            answers.append((chosen, questions))
            texts.append(written)
            for other in studies:
                if other is not one:
                    grid, questions = evaluate(lm, one, other, "test", configurations, args)
                    grids.append(grid)
                    answers.append((chosen.assign(**dict.fromkeys(OF_ANSWERS, np.nan)), questions))
    table = fronts.front(answers)
    if runs.processes().is_main_process:
        for path, cells in zip(
            files_of(args).values(), (pd.concat(grids), table, pd.concat(texts)), strict=True
        ):
            runs.write_table(path, cells)
    return table


@dataclass(frozen=True)
class Tuned(Configuration):
    """The model with LoRA in place of vectors; its strength is the adapter's scale."""

    adapter: dict[str, torch.Tensor] = field(compare=False, repr=False, default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method} x {self.alpha:g}"


@dataclass(frozen=True)
class Lora:
    """What `Direction` is to `Configuration`, for LoRA."""

    adapter: dict[str, torch.Tensor] = field(compare=False, repr=False)
    method: str = "lora"

    def at(self, alpha: float, units: str = "relative") -> Tuned:
        return Tuned(self.method, "", (), alpha, adapter=self.adapter)


@dataclass(frozen=True)
class Trained(Direction):
    """Trained vectors, whose lengths were learnt: a strength of 1 is as long as they are."""

    def at(self, alpha: float, units: str = "relative") -> Configuration:
        return super().at(alpha, "absolute")


@dataclass(frozen=True)
class Study:
    """One data set with one seed: its questions, and what its steering examples gave.

    used: keys of the questions that steer or choose, so that no test may ask them.
    """

    dataset: str
    seed: int
    parts: dict[str, list[data.Example]]
    used: frozenset[str]
    directions: list[Direction | Lora]
    manifest: dict

    @property
    def name(self) -> str:
        return f"{self.dataset}_seed{self.seed}"


def study(lm, args, name: str, path: str | None, seed: int, known: dict | None) -> Study:
    """Do stage 1 and make the vectors of one data set and seed."""
    words = [
        f"--{flag}={value}"
        for flag, value in (
            ("model_name", args.model_name),
            ("dataset_name", name),
            ("num_samples", args.num_samples),
            ("prompt_style", args.prompt_style),
            ("attribution", args.attribution),
            ("grad_method", args.grad_method),
            ("top_k", args.top_k),
            ("seed", seed),
            ("batch_tokens", args.batch_tokens),
            ("output_path_meta", args.parts_dir / f"{name}_seed{seed}.csv"),
            ("output_path_hidden", args.parts_dir / f"{name}_seed{seed}.safetensors"),
        )
    ]
    words += [f"--dataset_path={path}"] if path else []
    words += ["--split", args.split] if args.split else []
    words += ["--overwrite"] if args.overwrite else []
    print(f"\n{name}, seed {seed}: attribution and hidden states")
    stage1 = token_ablation.flags(args.kind).parse_args([*words, "--top", "pos", "neg", "rand"])
    states = {top: StatesFile(file) for top, file in token_ablation.run(stage1, lm, known).items()}
    args.dataset_name, args.dataset_path, args.seed = name, path, seed
    parts = cli.evaluation_parts(args, states)
    directions, made = cli.directions(args, lm, states)
    if runs.processes().is_main_process:
        for file, vectors in made.items():
            vectors.save(file)
    manifest = cli.evaluation_manifest(args, "experiment", lm, states, parts)
    used = {*states["pos"].info["data"]["questions"], *map(data.question_key, parts["validation"])}

    @cache  # read by what trains first, and encoded only where something is left to train
    def examples() -> list[data.Example]:
        return [example.pair() for example in cli.steering_examples(args)]

    @cache
    def pairs() -> list[Encoded]:
        return [prompts.encode(lm, example, args.prompt_style) for example in examples()]

    # Neither what is learnt nor what a configuration scores depends on what else is tried.
    flags = manifest["flags"]
    common = {name: flags[name] for name in ("prompt_style", "batch_tokens", "seed")}
    learning = manifest | {"flags": common | {"layer_idxs": flags["layer_idxs"]}}
    manifest = manifest | {"flags": common | {"alpha_units": flags["alpha_units"]}}
    one = Study(name, seed, parts, frozenset(used), directions, manifest)
    gated = [direction for direction in directions if direction.method in args.gated]
    if gated or args.train_vectors:
        layers = {layer for direction in gated for layer in direction.layers}
        layers |= {*cli.parse_layers(args.layer_idxs, len(lm.layers))}
        gate, gate_manifest = learnt_gate(lm, one, args, pairs, sorted(layers), learning)
        directions += [
            replace(
                direction,
                mode=f"{direction.mode} gated".strip(),
                vectors=replace(direction.vectors, gate=gate),
            )
            for direction in gated
        ]
    if args.train_vectors:
        parts["training"] = examples()
        directions += trained_vectors(lm, one, args, pairs, states["pos"], gate, gate_manifest)
    if args.lora != "none":
        directions.append(trained_lora(lm, one, args, pairs, learning))
    return one


def learnt_gate(
    lm, one: Study, args, pairs, layers: list[int], manifest: dict
) -> tuple[Gate, dict]:
    """The gate between the steering examples and other text, or as it was learnt before.

    And the manifest of what it was learnt from.
    """
    path = args.parts_dir / f"{one.name}_gate.safetensors"
    others = training_texts(lm) + unrelated_items(lm, "training")
    manifest = manifest | {
        "others": data.fingerprint([item.example for item in others]),
        "gate": {"layers": layers, "positions": gates.POSITIONS, "penalty": gates.PENALTY},
        "scikit-learn": version("scikit-learn"),
    }

    def learn(_) -> dict[str, torch.Tensor]:
        gate = gates.fit(lm, pairs(), others, layers, args.batch_tokens, args.seed)
        return {"weights": gate.weights, "biases": gate.biases}

    once(
        path, manifest, args, "gate", learn, lambda made: runs.write_tensors(path, *made, manifest)
    )
    return Gate(**runs.read_tensors(path)[0]), manifest


def trained_vectors(
    lm, one: Study, args, pairs, states: StatesFile, gate: Gate, manifest: dict
) -> list[Trained]:
    """Vectors trained on the steering examples, or as they were trained before.

    Beside them random directions that are as long at every layer.
    """
    layers = later_layers(lm, args)
    info = {**states.info, "stage": "steering_vectors", "method": "trained", "mode": ""}
    answers = own_answers(lm, one, "training", args)
    manifest = manifest | {
        "trained": {**trained.DEFAULTS, **trained.RECIPE, "layers": layers},
        "answers": data.fingerprint(answers),
        "max_new_tokens": args.max_new_tokens,
    }
    norms = states.norms()

    @cache  # for all runs that this process makes
    def trainer():
        return trained.trainer(
            lm,
            pairs(),
            training_texts(lm),
            unrelated_items(lm, "training"),
            unfinished(lm, answers, args),
            norms,
            gate,
            layers,
            seed=args.seed,
            max_tokens=args.batch_tokens,
        )

    def save(made) -> None:
        mean = sum(tensors["vectors"] / trained.RUNS for tensors in made)
        SteeringVectors(mean, norms, info, gate).save(path)

    path = args.parts_dir / f"{one.name}_trained.safetensors"
    once(
        path,
        manifest,
        args,
        "training vectors",
        lambda run: {"vectors": trainer()(run)},
        save,
        trained.RUNS,
    )
    # The same object as other methods' gate, so that they are scored in one batch.
    vectors = replace(SteeringVectors.load(path), gate=gate)
    return [
        Trained(method, "gated", tuple(layers), given)
        for method, given in (
            ("trained", vectors),
            ("trained_random", random_like(vectors, args.seed)),
        )
    ]


def later_layers(lm, args) -> list[int]:
    """Where vectors are trained: --layer_idxs without the first third of the model's layers.

    There they gain nothing of their own (docs/trials.md), and the others take two thirds of the
    time. Where --layer_idxs gives no others, its layers.
    """
    layers = cli.parse_layers(args.layer_idxs, len(lm.layers))
    return [layer for layer in layers if layer >= len(lm.layers) // 3] or layers


def random_like(vectors: SteeringVectors, seed: int) -> SteeringVectors:
    """Random directions, at every layer as long as the vectors, behind the same gate."""
    drawn = torch.randn(vectors.vectors.shape, generator=torch.Generator().manual_seed(seed))
    lengths = vectors.vectors.norm(dim=-1, keepdim=True)
    return replace(
        vectors,
        vectors=lengths * torch.nn.functional.normalize(drawn, dim=-1),
        info={**vectors.info, "method": "trained_random"},
    )


def trained_lora(lm, one: Study, args, pairs, manifest: dict) -> Lora:
    """LoRA's adapter, trained on the steering examples, or as it was trained before."""
    path = args.parts_dir / f"{one.name}_lora.safetensors"
    manifest = manifest | {
        "lora": {"objective": args.lora, **lora.DEFAULTS},
        "peft": version("peft"),
    }
    once(
        path,
        manifest,
        args,
        f"LoRA ({args.lora})",
        lambda _: lora.train(lm, pairs(), args.lora, seed=args.seed, max_tokens=args.batch_tokens),
        lambda made: lora.save(path, *made, manifest),
    )
    return Lora(lora.load(path)[0])


def once(path: Path, manifest: dict, args, what: str, make, save, count: int = 1) -> None:
    """Have `save` write to `path` what `make` gives of every unit, tensors, unless it is there."""
    work = runs.Run([path], manifest, args.overwrite)
    if not work.finished:
        for unit in work.todo(count, what):
            work.save(unit, make(unit), [])
        if work.all_done():
            save(tensors for tensors, _ in work.units(count))
        work.finish()


def priced(lm, one: Study, args) -> list[Configuration]:
    """Every direction at the strengths that cost certain prices (or at --alphas).

    What was learnt has lengths of its own, and is tried at `SCALES` of them.
    """
    alphas = {
        direction: SCALES if direction.method in LEARNT else dict.fromkeys(args.alphas or ())
        for direction in one.directions
    }
    texts = neutral_items(lm, "validation")

    def rises(tried: list[tuple[Direction, float]]) -> np.ndarray:
        """What directions may cost at some strengths."""
        items = [direction.at(alpha, args.alpha_units) for direction, alpha in tried]
        found = scores_of(lm, texts, items, args, one, "validation_texts")
        return np.log1p(costs.perplexity_bound(texts, found)[1:])

    targets = np.log1p(np.sort(args.strengths_at or sorted(args.max_ppl_increase)[::2]))
    unknown = [direction for direction in one.directions if not alphas[direction]]
    alphas |= strengths.search(unknown, rises, targets)
    return [
        direction.at(alpha, args.alpha_units)
        for direction in one.directions
        for alpha in alphas[direction]
    ]


def evaluate(
    lm, one: Study, other: Study, part: str, configurations, args
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Configurations of one study on the questions of it or another; on its own with their price.

    Returns a row for each configuration, and a row for each configuration and question, those of
    the unrelated ones as well if it is on its own.
    """
    examples = other.parts[part]
    if part == "test":
        examples = [example for example in examples if data.question_key(example) not in one.used]
    asked = encode(lm, examples, args)
    leads = margins(
        asked, scores_of(lm, asked, configurations, args, one, f"{part}_{other.dataset}")
    )
    every = [None, *configurations]
    table = grid_rows(one, other, part, every, leads)
    answered = [question_rows(one, other.dataset, every, examples, leads)]
    if other is one:

        def scored(items: list[Encoded], what: str) -> list[np.ndarray]:
            return scores_of(lm, items, configurations, args, one, f"{part}_{what}")

        def increase(items: list[Encoded], what: str) -> np.ndarray:
            perplexity = costs.perplexity_of(items, scored(items, what))
            return perplexity / perplexity[0] - 1

        neutral, unrelated = neutral_items(lm, part), unrelated_items(lm, part)
        of_neutral = scored(neutral, "texts")
        perplexity = costs.perplexity_of(neutral, of_neutral)
        leads = margins(unrelated, scored(unrelated, "unrelated"))
        answered.append(
            question_rows(one, UNRELATED, every, [item.example for item in unrelated], leads)
        )
        kept = costs.accuracy_of(leads)
        table = table.assign(
            perplexity=perplexity,
            perplexity_increase=perplexity / perplexity[0] - 1,
            perplexity_bound=costs.perplexity_bound(neutral, of_neutral),
            answers_increase=increase(
                unfinished(lm, own_answers(lm, one, part, args), args), "answers"
            ),
            unrelated_accuracy=kept["token"],
            unrelated_change=kept["token"] - kept["token"][0],
            unrelated_accuracy_sum=kept["sum"],
            unrelated_change_sum=kept["sum"] - kept["sum"][0],
        )
        if part == "test":
            table = table.assign(
                varied_increase=increase(neutral_items(lm, part, costs.VARIED), "varied")
            )
    return table, pd.concat(answered)


def free_answers(lm, one: Study, part: str, configurations, args) -> pd.DataFrame:
    """Free answers to questions of one part, base and steered, how long and how repetitive.

    Greedy ones to the first --num_generations; to train on, several to each, drawn at temperature
    1 and as the model's generation settings say otherwise (by default, of the 50 likeliest tokens).
    number: of the question in its part, and so on in its repetitions.
    """
    examples, repeated, drawn = one.parts[part], DRAWN, {"temperature": 1.0}
    if part != "training":
        examples, repeated, drawn = examples[: args.num_generations], 1, {}
    manifest = (
        one.manifest
        | {
            "configurations": [*map(identity, configurations)],
            "items": data.fingerprint(examples * repeated),
            "max_new_tokens": args.max_new_tokens,
        }
        | drawn
    )
    path = args.parts_dir / f"{one.name}_{part}_answers_{runs.digest(manifest)}.csv"
    work = runs.Run([path], manifest, args.overwrite)
    if not work.finished:
        asked = [prompts.encode(lm, example, args.prompt_style) for example in examples] * repeated
        groups = decoding_batches(asked, configurations, args.max_new_tokens, args.batch_tokens)
        steered = [item for item in configurations if not isinstance(item, Tuned)]
        tuned = [item for item in configurations if isinstance(item, Tuned)]
        labels = ["base", *(item.label for item in [*steered, *tuned])]
        for unit in work.todo(len(groups), f"{one.name} {part} free answers"):
            batch = [asked[index] for index in groups[unit]]
            texts = generate(
                lm, batch, steered, args.max_new_tokens, seed=1000 * one.seed + unit, **drawn
            )
            if tuned:
                with with_lora(lm, tuned) as at_each_scale:
                    for alone in at_each_scale(generate, batch, [], args.max_new_tokens):
                        texts += alone
            work.save(
                unit,
                {},
                [
                    {
                        "dataset": one.dataset,
                        "seed": one.seed,
                        "number": number,
                        "id": asked[number].example.id,
                        "question": asked[number].example.question,
                        "configuration": label,
                        "text": text,
                        "repetition": costs.repetition(text),
                        "words": len(text.split()),
                    }
                    for label, answers in zip(labels, texts, strict=True)
                    for number, text in zip(groups[unit], answers, strict=True)
                ],
            )
        if work.all_done():
            runs.write_rows(path, (rows for _, rows in work.units(len(groups))))
        work.finish()
    return pd.read_csv(path, keep_default_na=False, dtype={"id": str, "text": str})


def own_answers(lm, one: Study, part: str, args) -> list[data.Example]:
    """Questions of one part with what the model itself, unsteered, answers as their only choice.

    A prompt that all examples share (ToxiGen's) has the same answer in validation and test.
    """
    written = free_answers(lm, one, part, [], args).sort_values("number")
    examples = one.parts[part]
    return [
        replace(examples[row.number % len(examples)], choices=(row.text,), label=0)
        for row in written.itertuples()
        if row.text
    ]


def unfinished(lm, answered: list[data.Example], args) -> list[Encoded]:
    """Answers of the model, which may be cut off, and no text that it can be given again."""
    found = []
    for example in answered:
        try:
            found.append(prompts.encode(lm, example, args.prompt_style, finished=False))
        except UserError as error:
            print(f"note: left out what {lm.name} answers: {error}")
    if not found:
        raise UserError(
            f"{lm.name} answers no question in words, so what steering does to free "
            "answers cannot be told: give another --prompt_style"
        )
    return found


@cache
def neutral_items(lm, part: str, path: Path = costs.NEUTRAL) -> list[Encoded]:
    """The passages of a file that are for one part of the experiment."""
    return [
        costs.continuation(lm, text)
        for index, text in enumerate(costs.neutral_texts(path))
        if index % 8 in TEXTS[part]
    ]


def training_texts(lm) -> list[Encoded]:
    """Passages of prose and of other kinds, none of which sets a strength or reports a price."""
    return neutral_items(lm, "training") + neutral_items(lm, "training", costs.VARIED)


@cache
def unrelated_items(lm, part: str) -> list[Encoded]:
    """The unrelated questions that are for one part of the experiment."""
    examples = (
        costs.unrelated_examples(costs.UNRELATED_TRAINING)
        if part == "training"
        else costs.unrelated_examples()[("validation", "test").index(part) :: 2]
    )
    return [prompts.encode(lm, example, "qa") for example in examples]


@contextmanager
def with_lora(lm, tuned: list[Tuned]) -> Iterator[Callable[..., list]]:
    """LoRA in the model within the block; putting it there takes as long as scoring a batch.

    Yields a function: (compute, *given) -> [compute(lm, *given) of each scale].
    """
    with lora.adapted(lm, tuned[0].adapter) as set_scale:

        def at_each_scale(compute: Callable, *given) -> list:
            found = []
            for item in tuned:
                set_scale(item.alpha)
                found.append(compute(lm, *given))
            return found

        yield at_each_scale


def encode(lm, examples: list[data.Example], args) -> list[Encoded]:
    if alone := next((example for example in examples if len(example.choices) < 2), None):
        raise UserError(f"example {alone.id} has a single answer: the experiment compares answers")
    return [prompts.encode(lm, example, args.prompt_style) for example in examples]


def scores_of(
    lm, items: list[Encoded], configurations, args, one: Study, what: str
) -> list[np.ndarray]:
    """(1 + C, choices) log-likelihoods of every item, base and steered, kept in files.

    A configuration that was scored on these items before, whatever for, is not scored again.
    """
    name = f"{one.name}_{what}_scores"
    manifest = one.manifest | {"items": data.fingerprint([item.example for item in items])}
    wanted = ["base", *map(identity, configurations)]
    kept: dict[str, tuple[Path, int]] = {}  # where each stands: file and row
    for path in sorted(args.parts_dir.glob(f"{glob.escape(name)}_*.safetensors")):
        if args.overwrite or not path.with_suffix(".manifest.json").is_file():
            continue  # without a manifest: killed just before its end
        info = runs.read_header(path)
        scored = info.pop("configurations")
        if runs.digest(info) == runs.digest(manifest):
            kept |= {known: (path, row) for row, known in enumerate(scored)}
    missing = {
        known: item
        for known, item in zip(wanted[1:], configurations, strict=True)
        if known not in kept
    }
    tuned = {known: item for known, item in missing.items() if isinstance(item, Tuned)}
    steered = {known: item for known, item in missing.items() if known not in tuned}

    def keep(scored: list[str], compute: Callable) -> None:
        path = args.parts_dir / f"{name}_{runs.digest([manifest, scored])}.safetensors"
        write_scores(items, compute, path, manifest | {"configurations": scored}, args)
        kept.update({known: (path, row) for row, known in enumerate(scored)})

    if steered or "base" not in kept:
        keep(
            ["base", *steered],
            lambda batch: score(lm, batch, [*steered.values()], args.batch_tokens),
        )
    if tuned:
        with with_lora(lm, [*tuned.values()]) as at_each_scale:
            keep(
                [*tuned],
                lambda batch: [
                    np.concatenate(rows)
                    for rows in zip(
                        *at_each_scale(score, batch, [], args.batch_tokens), strict=True
                    )
                ],
            )
    rows = [kept[known] for known in wanted]
    files = {path: runs.read_tensors(path)[0] for path in {path for path, _ in rows}}
    return [
        np.stack([files[path][str(index)].numpy()[row] for path, row in rows])
        for index in range(len(items))
    ]


def identity(item: Configuration) -> str:
    """A configuration's label, and a digest of all that it changes in the model."""
    tensors = (
        item.adapter
        if isinstance(item, Tuned)
        else {f"{layer}": vector for layer, vector in item.vectors.items()}
    )
    if item.gate:
        tensors = tensors | {
            f"{layer} {part}": tensor
            for layer in item.layers
            for part, tensor in zip("wb", item.gate.at(layer), strict=True)
        }
    digests = {
        name: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    }
    return f"{item.label} {runs.digest({name: one.hexdigest() for name, one in digests.items()})}"


def write_scores(items: list[Encoded], compute: Callable, path: Path, manifest: dict, args) -> None:
    """Write the log-likelihoods of every item to `path`, by its number, in resumable parts.

    compute: gives those (rows, choices) of each of a list of items.
    """
    groups = question_batches(items, args.batch_tokens)
    work = runs.Run([path], manifest, args.overwrite)
    if work.finished:
        return
    for unit in work.todo(len(groups), path.stem.partition("_scores")[0]):
        found = compute([items[i] for i in groups[unit]])
        work.save(
            unit,
            {
                str(i): torch.from_numpy(values)
                for i, values in zip(groups[unit], found, strict=True)
            },
            [],
        )
    if work.all_done():
        runs.write_tensors(
            path,
            {
                key: value
                for tensors, _ in work.units(len(groups))
                for key, value in tensors.items()
            },
            manifest,
        )
    work.finish()


def question_rows(
    one: Study, evaluated_on: str, configurations, examples: list[data.Example], leads
) -> pd.DataFrame:
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "dataset": one.dataset,
                    "evaluated_on": evaluated_on,
                    "seed": one.seed,
                    "configuration": item.label if item else "base",
                    "id": [example.id for example in examples],
                    **{kind: leads[kind][:, index] > 0 for kind in SCORES},
                }
            )
            for index, item in enumerate(configurations)
        ]
    )


def grid_rows(one: Study, other: Study, part: str, configurations, leads) -> pd.DataFrame:
    rows = []
    for index, item in enumerate(configurations):
        row = {
            "dataset": one.dataset,
            "evaluated_on": other.dataset,
            "seed": one.seed,
            "part": part,
            "configuration": item.label if item else "base",
            "method": item.method if item else "base",
            "mode": item.mode if item else "",
            "layers": " ".join(map(str, item.layers)) if item else "",
            "alpha": item.alpha if item else 0.0,
            "questions": len(leads["sum"]),
        }
        for kind in SCORES:
            here, base = leads[kind][:, index] > 0, leads[kind][:, 0] > 0
            accuracy, low, high = stats.accuracy_interval(here)
            row |= {
                f"accuracy_{kind}": accuracy,
                f"accuracy_{kind}_low": low,
                f"accuracy_{kind}_high": high,
                f"margin_{kind}": leads[kind][:, index].mean(),
                f"p_value_{kind}": stats.paired_p_value(here, base),
                f"worse_{kind}": (base & ~here).sum() / max(base.sum(), 1),
            }
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    cli.main(main)
