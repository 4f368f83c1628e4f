"""Trained on the steering examples of a study: the gate, vectors, LoRA.

Each is trained once and kept in a file; a killed training goes on after its last finished run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grains import data, prompts, runs
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.settings import TRAINED_RANDOM, TRAINED_ROTATED
from grains.steering import Configuration, Direction, Gate, SteeringVectors, parse_layers
from grains.study import costs, gates, lora, trained
from grains.study.evaluate import encode_answers, own_answers
from grains.study.lora import LoraDirection
from grains.study.study import Study
from grains.vectors import random_rotation

# The strengths that trained methods are tried at, by `own_answers`. Vectors that keep them have
# finer steps, as the rise of own answers reaches a budget of 10 % somewhere between 1 and 2.
SCALES = {"change": (0.35, 0.7, 1.0, 1.5, 2.5), "keep": (0.35, 0.7, 1.0, 1.25, 1.5, 1.75, 2.0)}
Pairs = Callable[[], list[Encoded]]


@dataclass(frozen=True, eq=False)
class TrainedDirection(Direction):
    """Trained vectors: a strength of 1 is their length as trained."""

    def at(self, alpha: float, units: str = "relative") -> Configuration:
        """The vectors at a multiple of their length; the units of a grid do not apply."""
        return super().at(alpha, "absolute")


def learn(lm: LanguageModel, study: Study) -> list[Direction | LoraDirection]:
    """The directions that need training: methods behind a gate, trained vectors, LoRA."""

    @cache  # encoded only where something is left to train
    def pairs() -> list[Encoded]:
        return [
            prompts.encode(lm, example, study.ablation.prompt)
            for example in study.splits["training"]
        ]

    settings = study.settings
    added: list[Direction | LoraDirection] = []
    gated = [
        direction
        for direction in study.directions
        if isinstance(direction, Direction) and direction.method in settings.gated
    ]
    if gated or settings.train_vectors:
        layers = {layer for direction in gated for layer in direction.layers}
        layers |= {*parse_layers(settings.grid.layers, len(lm.layers))}
        gate, manifest = fitted_gate(lm, study, pairs, sorted(layers))
        added += [
            replace(direction, vectors=replace(direction.vectors, gate=gate)) for direction in gated
        ]
        if settings.train_vectors:
            added += trained_vectors(lm, study, pairs, gate, manifest)
    if settings.lora != "none":
        added.append(trained_lora(lm, study, pairs))
    return added


def fitted_gate(
    lm: LanguageModel, study: Study, pairs: Pairs, layers: list[int]
) -> tuple[Gate, dict]:
    """The gate between the steering examples and other text, and the manifest of its file."""
    path, ablation = study.names.gate(), study.ablation
    background = costs.training_passages(lm) + costs.unrelated_questions(lm, "training")
    manifest = study.manifest | {
        "background": data.fingerprint([item.example for item in background]),
        "gate": {"layers": layers, "positions": gates.POSITIONS, "penalty": gates.PENALTY},
        "scikit-learn": version("scikit-learn"),
    }

    def fit(unit: int) -> dict[str, Tensor]:
        gate = gates.fit(lm, pairs(), background, layers, ablation.batch_tokens, study.seed)
        return {"weights": gate.weights, "biases": gate.biases}

    def save(made: Iterator[dict[str, Tensor]]) -> None:
        runs.write_tensors(path, next(made), manifest)

    compute_once(path, manifest, study.overwrite, "gate", fit, save)
    return Gate(**runs.read_tensors(path)[0]), manifest


def trained_vectors(
    lm: LanguageModel, study: Study, pairs: Pairs, gate: Gate, manifest: dict
) -> list[TrainedDirection]:
    """Vectors trained on the steering examples, and random ones of the same length at each layer.

    manifest: of the gate.
    """
    settings, ablation, where = study.settings, study.ablation, study.settings.grid.positions
    path = study.names.trained(where, settings.own_answers)
    layers = later_layers(settings.grid.layers, len(lm.layers))
    aim = trained.AIMS[settings.own_answers]
    answers = own_answers(lm, study, "training")
    longest = settings.max_new_tokens if aim.ends else None
    manifest = manifest | {
        "trained": {**trained.recipe(aim), "layers": layers},
        "answers": data.fingerprint(answers),
        "max_new_tokens": settings.max_new_tokens,
        **({"positions": where} if where != "all" else {}),
    }
    norms = study.states.norms()

    @cache  # for all runs that this process makes
    def trainer() -> Callable[[int], Tensor]:
        return trained.trainer(
            lm,
            pairs(),
            costs.may_stay(costs.training_passages(lm)),
            costs.may_stay(costs.unrelated_questions(lm, "training")),
            encode_answers(lm, answers, ablation.prompt, longest),
            norms,
            gate,
            layers,
            aim,
            seed=study.seed,
            max_tokens=ablation.batch_tokens,
            where=where,
        )

    def save(made: Iterator[dict[str, Tensor]]) -> None:
        info = {**study.states.info, "stage": "steering_vectors", "method": "trained", "mode": ""}
        mean = sum((tensors["vectors"] / aim.runs for tensors in made), torch.tensor(0.0))
        SteeringVectors(mean, norms, info, gate).save(path)

    compute_once(
        path,
        manifest,
        study.overwrite,
        "training vectors",
        lambda run: {"vectors": trainer()(run)},
        save,
        aim.runs,
    )
    # The same object as the other methods' gate, so that they are scored in one batch.
    vectors = replace(SteeringVectors.load(path), gate=gate)
    return [
        TrainedDirection(name, "", tuple(layers), made, where)
        for name, made in {
            "trained": vectors,
            TRAINED_RANDOM: random_like(vectors, study.seed),
            TRAINED_ROTATED: rotated(vectors, study.seed),
        }.items()
    ]


def later_layers(layers: Sequence[str], count: int) -> list[int]:
    """The layers at which vectors are trained: those given, without the first third of the model's.

    There they gain nothing (docs/trials.md), and the others take two thirds of the time. Where
    only such layers are given, these.

    layers: as `parse_layers` takes them. count: the model's.
    """
    every = parse_layers(layers, count)
    return [layer for layer in every if layer >= count // 3] or every


def random_like(vectors: SteeringVectors, seed: int) -> SteeringVectors:
    """Random directions with the length of the vectors at every layer, behind the same gate."""
    drawn = torch.randn(vectors.vectors.shape, generator=torch.Generator().manual_seed(seed))
    lengths = vectors.vectors.norm(dim=-1, keepdim=True)
    return replace(
        vectors,
        vectors=lengths * normalize(drawn, dim=-1),
        info={**vectors.info, "method": TRAINED_RANDOM},
    )


def rotated(vectors: SteeringVectors, seed: int) -> SteeringVectors:
    """The vectors under one random rotation (see `random_rotation`), behind the same gate."""
    rotation = random_rotation(vectors.vectors.shape[1], seed)
    return replace(
        vectors,
        vectors=torch.from_numpy(vectors.vectors.double().numpy() @ rotation).float(),
        info={**vectors.info, "method": TRAINED_ROTATED},
    )


def trained_lora(lm: LanguageModel, study: Study, pairs: Pairs) -> LoraDirection:
    """A LoRA adapter trained on the steering examples."""
    objective = study.settings.lora
    path, max_tokens = study.names.lora(objective), study.ablation.batch_tokens
    manifest = study.manifest | {
        "lora": {"objective": objective, **lora.RECIPE},
        "peft": version("peft"),
    }
    compute_once(
        path,
        manifest,
        study.overwrite,
        f"LoRA ({objective})",
        lambda unit: lora.train(lm, pairs(), objective, seed=study.seed, max_tokens=max_tokens),
        lambda made: lora.save(path, next(made), manifest),
    )
    return LoraDirection(lora.load(path)[0])


def compute_once(
    path: Path,
    manifest: dict,
    overwrite: bool,
    description: str,
    make: Callable[[int], dict[str, Tensor]],
    save: Callable[[Iterator[dict[str, Tensor]]], None],
    count: int = 1,
) -> None:
    """Have `save` write to `path` the tensors that `make` gives of every unit, unless it exists.

    See `runs.resume`.
    """
    runs.resume(
        [path],
        manifest,
        count,
        lambda unit: (make(unit), []),
        lambda units: save(tensors for tensors, _ in units()),
        description,
        overwrite,
    )
