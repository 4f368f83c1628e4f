"""What a request steers by: vectors by their names, each at a strength."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.steering import BASE, Configuration, SteeringVectors

KEPT = 256  # configurations that are kept: a batch shares what is computed for the same one


@dataclass(frozen=True)
class Steering:
    """Vectors at a strength. layers: None for all; units, positions: see `SteeringVectors.at`."""

    vectors: str
    alpha: float
    layers: tuple[int | str, ...] | None = None
    units: str = "relative"
    positions: str = "all"


class Vectors:
    """The vectors of a server by their names, and the configurations that requests make of them.

    Raises UserError for vectors of another model, for those of a vision tower (requests are text),
    and for a name that a request could not give.
    """

    def __init__(self, lm: LanguageModel, vectors: Mapping[str, SteeringVectors]):
        for name, item in vectors.items():
            if not name or set(name) & set("+@ \t\n"):
                raise UserError(f"vectors '{name}': expected a name without +, @ and blanks")
            item.check_model(lm)
            if item.tower:
                raise UserError(
                    f"vectors '{name}' steer the vision tower, but this server reads text only: "
                    "give others"
                )
        self.vectors = dict(vectors)
        self.made: OrderedDict[tuple[Steering, ...], Configuration] = OrderedDict()

    def configuration(self, steering: Sequence[Steering]) -> Configuration:
        """The sum of some vectors as one configuration; the base without any.

        Raises UserError for unknown vectors, for vectors behind a gate beside others, for different
        positions, and as `SteeringVectors.at`.
        """
        if not steering:
            return BASE
        key = tuple(steering)
        if key not in self.made:
            self.made[key] = self._make(key)
        self.made.move_to_end(key)
        if len(self.made) > KEPT:
            self.made.popitem(last=False)
        return self.made[key]

    def _make(self, steering: tuple[Steering, ...]) -> Configuration:
        parts = []
        for item in steering:
            if item.vectors not in self.vectors:
                known = ", ".join(self.vectors) or "none"
                raise UserError(f"unknown vectors '{item.vectors}': this server has {known}")
            parts.append(
                self.vectors[item.vectors].at(item.alpha, item.layers, item.units, item.positions)
            )
        if len(parts) == 1:
            return parts[0]
        if any(part.gated for part in parts):
            raise UserError("vectors behind a gate cannot be added to others: give them alone")
        if len({part.positions for part in parts}) > 1:
            raise UserError("several vectors at different positions: give the same for all")
        layers = tuple(sorted({layer for part in parts for layer in part.layers}))
        added = {
            layer: torch.stack([p.vectors[layer] for p in parts if layer in p.vectors]).sum(0)
            for layer in layers
        }
        return replace(parts[0], method="sum", mode="", layers=layers, vectors=added)


def named(model: str, served: str) -> tuple[Steering, ...]:
    """What a model's name steers by: 'smollm2+truthful@0.02' is vectors 'truthful' at 0.02.

    served: the name of the base model. Raises UserError for another model.
    """
    base, *parts = model.split("+")
    if base != served:
        raise UserError(f"unknown model '{model}': this server has '{served}'")
    steering = []
    for part in parts:
        name, at, strength = part.rpartition("@")
        try:
            alpha = float(strength)
        except ValueError:
            at = ""
        if not at or not name:
            raise UserError(
                f"model '{model}': expected '{served}+VECTORS@STRENGTH', found '+{part}'"
            )
        steering.append(Steering(name, alpha))
    return tuple(steering)
