"""Steering: what a strength means, and how vectors change hidden states (paper, section 3.3)."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.runs import read_tensors, write_tensors
from grains.settings import UNITS, GridSettings


@dataclass(frozen=True, eq=False)
class Gate:
    """Per-layer logistic gate that scales the vector by a position's hidden state h:

        g(h) = sigmoid(w . h / ||h|| + b)

    weights: (L, D) w of each layer; biases: (L,) b; NaN at layers that it was not fitted for.
    """

    weights: Tensor
    biases: Tensor

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """What `steer` takes for one layer: (D,) and a number."""
        return self.weights[layer], self.biases[layer]


def steer(
    hidden_states: Tensor, vector: Tensor, gate: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """h' = (h + v) ||h|| / ||h + v||, norms over the hidden dimension (paper, section 3.3).

    hidden_states: (..., T, D); vector: (D,) or (R, 1, D), the strength already in it.
    gate: w (D,) or (R, 1, D) and b, a number or (R, 1, 1), by which v is scaled at each position
        (see `Gate`).
    """
    before = hidden_states.float()
    size = before.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # a state of length zero stays what it is
    vector = vector.to(hidden_states.device)
    if gate is not None:
        weight, bias = (part.to(hidden_states.device) for part in gate)
        along = (before * weight).sum(dim=-1, keepdim=True) / size.clamp_min(tiny)
        vector = torch.sigmoid(along + bias) * vector
    moved = before + vector
    length = moved.norm(dim=-1, keepdim=True).clamp_min(tiny)
    return (moved * (size / length)).to(hidden_states.dtype)


@contextmanager
def steered(
    lm: LanguageModel,
    vectors: dict[int, Tensor],
    gates: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[LanguageModel]:
    """Steer the outputs of decoder layers within the block; the model leaves as it came.

    vectors: layer -> (D,) or one for each row of the batch (R, 1, D), strength included.
    gates: layer -> what `steer` takes for its gate; none to steer at every position.
    """
    check_layers(vectors, len(lm.layers))
    handles = []
    try:
        for layer, vector in vectors.items():
            gate = gates[layer] if gates else None
            handles.append(
                lm.layers[layer].register_forward_hook(
                    lambda module, args, output, vector=vector, gate=gate: steer(
                        output, vector, gate
                    )
                )
            )
        yield lm
    finally:
        for handle in handles:
            handle.remove()


def check_layers(layers: Iterable[int], count: int, hint: str = "") -> None:
    """Raise UserError for a layer that does not exist. hint: what else would be taken."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise UserError(
            f"layer {', '.join(map(str, wrong))} does not exist: the model has decoder "
            f"layers 0 to {count - 1}{hint}"
        )


def parse_layers(items: Iterable[int | str] | None, count: int) -> list[int]:
    """Layer numbers, negative numbers, ranges ('10-29') and 'all' -> sorted layers of `count`.

    None stands for all. Raises UserError for what is no layer of the model, and for none at all.
    """
    if items is None:
        return list(range(count))
    if isinstance(items, str):
        items = [items]
    hint = f" (or -{count} to -1)"
    layers: set[int] = set()
    for item in items:
        if item == "all":
            layers |= set(range(count))
        elif isinstance(item, str) and (match := re.fullmatch(r"(\d+)-(\d+)", item)):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise UserError(f"layers '{item}': the range runs backwards")
            check_layers((first, last), count, hint)  # before a range of any length is written out
            layers |= set(range(first, last + 1))
        else:
            layer = _whole_number(item)
            layers.add(layer + count if -count <= layer < 0 else layer)
    check_layers(sorted(layers), count, hint)
    if not layers:
        raise UserError(
            "no layers are given, so nothing would be steered: give numbers, ranges "
            "like 10-29, or all"
        )
    return sorted(layers)


def _whole_number(item: int | str) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return int(item, 10) if isinstance(item, str) else operator.index(item)
    except (TypeError, ValueError):
        raise UserError(
            f"layers '{item}': expected whole numbers, ranges like 10-29, or all"
        ) from None


def layer_ranges(layers: Sequence[int]) -> list[str]:
    """[3, 4, 5, 9] -> ['3-5', '9'], as `parse_layers` takes them."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges]


# A vector so many times as long as the state leaves nothing of it in fp32, which has 24 bits.
LONGEST = 1e6


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """One vector a layer, as reduced, and what a strength of 1 means at each.

    vectors: (L, D). norms: (L,) median ||h_l|| of the steering examples.
    info: the manifest of where they come from.
    gate: scales them at each position; None adds them everywhere alike.
    Raises UserError for values that are NaN or infinite, and sizes that do not fit each other.
    """

    vectors: Tensor
    norms: Tensor
    info: dict
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or self.norms.shape != self.vectors.shape[:1]:
            raise UserError(
                f"expected vectors (L, D) and norms (L,), found {tuple(self.vectors.shape)} and "
                f"{tuple(self.norms.shape)}"
            )
        for name, values in (("vectors", self.vectors), ("norms", self.norms)):
            if not values.isfinite().all():
                raise UserError(f"the {name} hold NaN or infinite values: make them again")

    def scaled(
        self, alpha: float, layers: Iterable[int | str] | None = None, units: str = "relative"
    ) -> dict[int, Tensor]:
        """layer -> what is added there, (D,) in fp32.

        layers: as `parse_layers` takes them. units: relative: alpha times the median activation
        norm, along the unit vector, so that one alpha means the same at every layer and in every
        model; absolute: alpha times the vector as it was reduced (the paper's; its own factor of
        10 is not included).
        Raises UserError for a strength that is no finite number, or so large that it would erase
        the hidden states.
        """
        found = parse_layers(layers, len(self.vectors))
        if units not in UNITS:
            raise UserError(f"unknown units '{units}': expected {' or '.join(UNITS)}")
        if not math.isfinite(alpha):
            raise UserError(f"strength {alpha}: expected a finite number")
        if units == "absolute":
            added = {layer: alpha * self.vectors[layer] for layer in found}
        else:
            unit = normalize(self.vectors, dim=-1)
            added = {layer: alpha * self.norms[layer] * unit[layer] for layer in found}
        if not all(vector.norm() <= LONGEST * self.norms[layer] for layer, vector in added.items()):
            raise UserError(
                f"strength {alpha:g} ({units}) is more than {LONGEST:g} times the hidden states' "
                "norm, which leaves nothing of them: give a smaller one"
            )
        return added

    def apply(
        self,
        lm: LanguageModel,
        alpha: float,
        layers: Iterable[int | str] | None = None,
        units: str = "relative",
    ) -> AbstractContextManager[LanguageModel]:
        """`with vectors.apply(lm, 0.05):` steers whatever the model computes inside the block.

        alpha, layers, units: see `scaled`; without layers all are steered.
        Raises UserError if the vectors are of another model.
        """
        self.check_model(lm)
        added = self.scaled(alpha, layers, units)
        gates = {layer: self.gate.at(layer) for layer in added} if self.gate else None
        return steered(lm, added, gates)

    def check_model(self, lm: LanguageModel) -> None:
        """Raise UserError unless these vectors are of this model, in whatever precision."""
        if self.vectors.shape != (len(lm.layers), lm.hidden_size):
            raise UserError(
                f"these vectors are for {len(self.vectors)} layers of size "
                f"{self.vectors.shape[1]}; {lm.name} has {len(lm.layers)} of size "
                f"{lm.hidden_size}"
            )
        theirs, ours = self.info.get("model"), lm.identity()
        if not isinstance(theirs, dict) or "final_norm_sum" not in theirs:
            return  # vectors made by hand say nothing of their model
        # The weights of one model in two precisions sum up to nearly the same.
        alike = math.isclose(
            float(theirs["final_norm_sum"]), float(ours["final_norm_sum"]), rel_tol=1e-2
        )
        if theirs.get("vocab_size") != ours["vocab_size"] or not alike:
            raise UserError(
                f"these vectors are of another model, {theirs.get('model')}, not of {lm.name}: "
                "make them with this one"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, its origin in the header."""
        gate = (
            {"gate_weights": self.gate.weights, "gate_biases": self.gate.biases}
            if self.gate
            else {}
        )
        write_tensors(Path(path), {"vectors": self.vectors, "norms": self.norms, **gate}, self.info)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectors:
        """Read what `save` wrote. Raises UserError if it is not such a file."""
        tensors, info = read_tensors(Path(path))
        gated = {"gate_weights", "gate_biases"} <= set(tensors)
        gate = Gate(tensors.pop("gate_weights"), tensors.pop("gate_biases")) if gated else None
        if set(tensors) != {"vectors", "norms"}:
            raise UserError(
                f"'{path}' holds {', '.join(sorted(tensors))}: these are no steering vectors"
            )
        return cls(tensors["vectors"], tensors["norms"], info, gate)


@dataclass(frozen=True)
class Configuration:
    """One way to steer: which vectors, where, how strongly.

    vectors: layer -> (D,), the strength included. gate: scales them at each position, if there is
    one.
    """

    method: str
    mode: str
    layers: tuple[int, ...]
    alpha: float
    vectors: dict[int, Tensor] = field(compare=False, repr=False, default_factory=dict)
    gate: Gate | None = field(compare=False, repr=False, default=None)

    @property
    def gated(self) -> bool:
        return self.gate is not None

    @property
    def variant(self) -> str:
        """The mode, and that it is gated, as tables and labels have it."""
        return " ".join(filter(None, (self.mode, "gated" if self.gated else "")))

    @property
    def label(self) -> str:
        if not self.layers:
            return self.method
        name = " ".join(filter(None, (self.method, self.variant)))
        return f"{name} @ {','.join(layer_ranges(self.layers))} x {self.alpha:g}"


BASE = Configuration("base", "", (), 0.0)


@dataclass(frozen=True, eq=False)
class Direction:
    """A configuration at every strength: which vectors, where."""

    method: str
    mode: str
    layers: tuple[int, ...]
    vectors: SteeringVectors

    def at(self, alpha: float, units: str = "relative") -> Configuration:
        return Configuration(
            self.method,
            self.mode,
            self.layers,
            alpha,
            self.vectors.scaled(alpha, self.layers, units),
            self.vectors.gate,
        )


def directions(
    vectors: SteeringVectors, method: str, mode: str, grid: GridSettings
) -> list[Direction]:
    """The vectors of one method at all groups of layers of a grid, without strengths."""
    layers = parse_layers(grid.layers, len(vectors.vectors))
    groups = {
        "joint": [tuple(layers)],
        "each": [(layer,) for layer in layers],
        "from": [tuple(range(layer, len(vectors.vectors))) for layer in layers],
    }[grid.layer_mode]
    return [Direction(method, mode, group, vectors) for group in groups]
