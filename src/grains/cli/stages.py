"""What the scripts of stages 2 and 3 share: stage 1's files and the grid of configurations."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from grains import data, of_model, runs, splits, vectors
from grains.cli import entry, flags
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import (
    TOPS,
    AblationSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
    selections,
)
from grains.states import StatesFile
from grains.steering import Configuration, Gate, SteeringVectors, directions, layer_groups

FitGate = Callable[[LanguageModel, list[Example], PromptSettings, list[int], int, int], Gate]


def states_files(args: argparse.Namespace, grid: GridSettings) -> dict[str, StatesFile]:
    """Selection -> stage 1's file: pos, and neg or rand if a method or mode needs it.

    Raises UserError if a file does not exist, or if the files are of different runs.
    """
    # Always pos: its file names those of the vectors, and its data the questions to leave out.
    needed = dict.fromkeys(["pos", *selections(grid.methods, grid.modes)])
    default = flags.names_of(args).states(TOPS)
    files: dict[str, StatesFile] = {}
    for top in needed:
        flag = "hidden_states_path" if top == "pos" else f"hidden_states_{top}_path"
        path = Path(getattr(args, flag) or default[top])
        if not path.is_file():
            raise UserError(
                f"hidden states '{path}' do not exist: first run token_ablation.py with --top "
                f"{top} and the same model, data and settings, or give --{flag}"
            )
        files[top] = StatesFile(path, top)
        files[top].check_methods(grid.methods)
        different = runs.differences(
            files["pos"].info | {"top": None}, files[top].info | {"top": None}
        )
        if different:
            raise UserError(
                f"the 'pos' and the '{top}' hidden states are of different runs: "
                + "; ".join(different[:4])
            )
    return files


def questions(
    source: DataSettings, settings: AblationSettings, states: StatesFile
) -> tuple[AblationSettings, dict[str, list[Example]]]:
    """The settings with their shots, and the questions: none that steered or is a shot."""
    made = states.info
    steering = made["data"]["questions"]
    prompt = splits.with_shots(settings.prompt, source, settings.seed, steering)
    shots = [shot.key for shot in prompt.shots]
    shots += [shot["key"] for shot in made["settings"].get("prompt", {}).get("shots", ())]
    examples = splits.evaluation_examples(source, settings.seed, made["data"], shots)
    return replace(settings, prompt=prompt), examples


def say_other_prompts(
    states: StatesFile, prompt: PromptSettings, compare_styles: bool = True
) -> None:
    """Print in what the prompts that hidden states were made from differ from those asked with."""
    made = states.info["settings"]
    recorded = {"prompt_style": made["prompt_style"]} | made.get("prompt", {})
    asked = {"prompt_style": prompt.style} | json.loads(json.dumps(prompt.changed()))
    names = ["prompt_style"] * compare_styles + [
        f.name for f in fields(prompt)[1:] if f.name != "shots"
    ]
    different = [
        f"{name} {shown(recorded.get(name))}, here {shown(asked.get(name))}"
        for name in names
        if recorded.get(name) != asked.get(name)
    ]
    if different:
        entry.say(f"note: the vectors are made from other prompts: {'; '.join(different)}")


def shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:36]!r} ..."


def from_model(
    args: argparse.Namespace, lm: LanguageModel, states: StatesFile, method: str, path: Path
) -> vectors.FromModel:
    """What a method of `OF_MODEL` takes from the examples that the hidden states are of.

    path: the file of these vectors. Where the flags name other data than that of the states, they
    are read from it. Raises UserError if they are not there.
    """
    if again := steering_pairs(args, states):
        pairs, prompt = again
        return of_model.make(lm, pairs, prompt, args.seed, method)
    if path.is_file():
        made = SteeringVectors.load(path)
        if made.info["data"]["fingerprint"] == states.info["data"]["fingerprint"]:
            info = {key: made.info[key] for key in ("heads", "tower") if key in made.info}
            return vectors.FromModel(None if made.tower else made.vectors, made.tower, info)
    raise _other_data(f"method {method}", states)


def gate_of(
    args: argparse.Namespace,
    lm: LanguageModel,
    states: StatesFile,
    made: SteeringVectors,
    layers: list[int],
    path: Path,
    fit_gate: FitGate,
) -> Gate:
    """The gate in the file of these vectors, or a new one, at the layers that are steered.

    made: the vectors without a gate. path: their file. Raises UserError if it lacks a gate of one
    of the layers and the flags name other data than that of the states.
    """
    if path.is_file():
        kept = SteeringVectors.load(path)
        if kept.gate and kept.info == made.info and not kept.gate.biases[layers].isnan().any():
            return kept.gate
    if not (again := steering_pairs(args, states)):
        raise _other_data("a gate", states)
    return fit_gate(lm, *again, layers, args.batch_tokens, args.seed)


def steering_pairs(
    args: argparse.Namespace, states: StatesFile
) -> tuple[list[Example], PromptSettings] | None:
    """The examples that hidden states are of and how they are asked; None for other data."""
    source, settings = flags.data_settings(args), flags.ablation_settings(args, ("pos",))
    recorded = states.info["data"]
    pairs = [example.pair() for example in splits.steering_examples(source, settings.seed)]
    if data.fingerprint(pairs) != recorded["fingerprint"]:
        return None
    questions = recorded["questions"]
    return pairs, splits.with_shots(settings.prompt, source, settings.seed, questions)


def _other_data(what: str, states: StatesFile) -> UserError:
    return UserError(
        f"{what} needs the steering examples of the hidden states "
        f"({states.info['data']['name']}), and this data has others: run steering_mc.py with it on "
        "the data of stage 1 first, with the same seed and number of examples"
    )


def configurations(
    args: argparse.Namespace,
    lm: LanguageModel,
    grid: GridSettings,
    states: dict[str, StatesFile],
    fit_gate: FitGate,
) -> tuple[list[Configuration], dict[Path, SteeringVectors]]:
    """The configurations of a grid, and the file of each of their vectors.

    fit_gate: see `grains.study.gates.around`.
    Raises UserError if the hidden states are of another model.
    """
    for file in states.values():
        file.check_model(lm)
    names = flags.names_of(args)
    grid_configurations: list[Configuration] = []
    files: dict[Path, SteeringVectors] = {}

    def path_of(method: str, mode: str) -> Path:
        folder = args.steering_vectors_dir
        return names.vectors(states["pos"].path, method, mode, folder, grid.gate)

    def taken(method: str) -> vectors.FromModel:
        return from_model(args, lm, states["pos"], method, path_of(method, ""))

    gate = None
    for method, mode, by_layer in vectors.make_all(states, grid, args.seed, taken):
        path = path_of(method, mode)
        if grid.gate:
            if gate is None:
                groups = layer_groups(grid, len(by_layer.vectors))
                layers = sorted({layer for group in groups for layer in group})
                gate = gate_of(args, lm, states["pos"], by_layer, layers, path, fit_gate)
            by_layer = replace(by_layer, gate=gate)
        files[path] = by_layer
        if not by_layer.vectors.any():  # pos and neg ablate the same where k is not exceeded
            entry.say(
                f"note: {' '.join(filter(None, (method, mode)))} is a vector of zeros at every "
                "layer, which steers nothing"
            )
        grid_configurations += [
            direction.at(alpha, grid.units)
            for direction in directions(by_layer, method, mode, grid)
            for alpha in grid.alphas
        ]
    return grid_configurations, files
