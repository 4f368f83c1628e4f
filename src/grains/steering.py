"""Steering vectors, what their strength means, and how they change hidden states (paper, 3.3)."""

from __future__ import annotations

import math
import operator
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from grains import tower as towers
from grains.calls import first_tensor, states_of, with_first, with_states
from grains.errors import UserError
from grains.lm import LanguageModel, kept_with_model
from grains.runs import read_tensors, write_tensors
from grains.settings import TRAINED_METHODS, UNITS, GridSettings, parse_positions


@dataclass(frozen=True, eq=False)
class Gate:
    """Per-layer logistic gate that scales the vector by a position's hidden state h:

        g(h) = sigmoid(w . h / ||h|| + b)

    It is not part of the paper.
    weights: (L, D), w of each layer. biases: (L,), b of each layer. NaN for layers without a gate.
    """

    weights: Tensor
    biases: Tensor

    def at(self, layer: int) -> tuple[Tensor, Tensor]:
        """w (D,) and b () of one layer, as `steer` takes them."""
        return self.weights[layer], self.biases[layer]


@dataclass(frozen=True, eq=False)
class TowerVectors:
    """Steering vectors of a vision tower's layers, and the typical length of a patch's state there.

    They move the states of every picture; how strongly is said as for the decoder's vectors.
    vectors: (Lv, T, Dv), of T patches; T is 1 where they are the same for all.
    norms: (Lv,) the median over the steering examples of a patch's ||h||.
    """

    vectors: Tensor
    norms: Tensor

    def __post_init__(self) -> None:
        if self.vectors.dim() != 3 or self.norms.shape != self.vectors.shape[:1]:
            raise UserError(
                "expected vectors of a vision tower (Lv, T, Dv) and norms (Lv,), found "
                f"{tuple(self.vectors.shape)} and {tuple(self.norms.shape)}"
            )


# What may go with vectors; a file holds its tensors under names such as gate_weights.
PARTS: dict[str, type] = {"gate": Gate, "tower": TowerVectors}


@dataclass(frozen=True)
class TowerSteering:
    """Vectors of a vision tower at a strength (see `SteeringVectors.scaled`)."""

    vectors: TowerVectors
    alpha: float
    units: str

    def added(self) -> dict[int, Tensor]:
        """layer of the tower -> what is added there, (T, Dv)."""
        given = self.vectors
        every = range(len(given.vectors))
        return _scaled(given.vectors, given.norms, every, self.alpha, self.units)


def _scaled(
    vectors: Tensor, norms: Tensor, layers: Iterable[int], alpha: float, units: str
) -> dict[int, Tensor]:
    """layer -> its vectors (..., D) at a strength (see `SteeringVectors.scaled`).

    vectors: (L, ..., D). norms: (L,).
    """
    if units == "absolute":
        return {layer: alpha * vectors[layer] for layer in layers}
    unit = normalize(vectors, dim=-1)
    return {layer: alpha * norms[layer] * unit[layer] for layer in layers}


def steer(
    hidden_states: Tensor,
    vector: Tensor,
    gate: tuple[Tensor, Tensor] | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """h' = (h + v) ||h|| / ||h + v||, norms over the hidden dimension (paper, section 3.3).

    hidden_states: (..., T, D), h. vector: (D,), (T, D) or (R, 1, D), v with its strength included.
    gate: w, (D,) or (R, 1, D), and b, () or (R, 1, 1): v is scaled by g(h) at each position (see
        `Gate`).
    where: bool, (..., T) or what broadcasts to it: the steered positions; None: all.
    Returns (..., T, D) in the precision of hidden_states; the computation is in fp32.
    """
    before = hidden_states.float()
    size = before.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # a state of length zero stays as it is
    vector = vector.to(hidden_states.device)
    if gate is not None:
        weight, bias = (tensor.to(hidden_states.device) for tensor in gate)
        projection = (before * weight).sum(dim=-1, keepdim=True) / size.clamp_min(tiny)
        vector = torch.sigmoid(projection + bias) * vector
    shifted = before + vector
    length = shifted.norm(dim=-1, keepdim=True).clamp_min(tiny)
    changed = (shifted * (size / length)).to(hidden_states.dtype)
    if where is None:
        return changed
    return torch.where(where.to(changed.device)[..., None], changed, hidden_states)


# The thread for which this one computes, while that one waits.
_CALLER: ContextVar[int | None] = ContextVar("caller", default=None)


def compute_for(thread: int) -> None:
    """Let what this thread computes from now on be steered as what another thread computes.

    The other one, by its `threading.get_ident`, waits meanwhile. Blocks that this thread opens
    itself steer it as ever.
    """
    _CALLER.set(thread)


@contextmanager
def steered(
    lm: LanguageModel,
    vectors: dict[int, Tensor],
    gates: dict[int, tuple[Tensor, Tensor]] | None = None,
    where: Callable[[int], Tensor | None] | None = None,
    tower: TowerSteering | None = None,
) -> Iterator[LanguageModel]:
    """Steer the outputs of decoder layers within the block; afterwards the model is unchanged.

    What other threads compute meanwhile with the same model is not steered, unless they compute
    for this one (see `compute_for`).

    vectors: layer -> (D,), or (R, 1, D) for R rows of a batch, with the strength included.
    gates: layer -> w and b (see `steer`); None: no gate.
    where: the number T of positions that a layer computes -> those that are steered (see `steer`).
        Called at every steered layer of every forward; None: all positions are.
    tower: what moves the states of pictures in the vision tower; None: nothing.
    Raises UserError for a layer that does not exist, for a picture with another number of patches
    than the tower's vectors are for, and at the end of the block if only other threads computed in
    it, so that nothing was steered.
    """
    check_layers(vectors, len(lm.layers))
    seeing = towers.layers(lm) if tower else ()  # found by a forward, which nothing is to steer
    owner, computed, handles = threading.get_ident(), set(), []

    def hook(change: Callable[[Any], Any]) -> Callable:
        def changed(module: nn.Module, args: tuple, output: Any) -> Any:
            own = owner in (threading.get_ident(), _CALLER.get()) or _is_autograds()
            computed.add(own)
            return change(output) if own else None

        return changed

    def in_decoder(vector: Tensor, gate: tuple[Tensor, Tensor] | None, output: Any) -> Any:
        states = states_of(lm, output)
        part = where(states.shape[-2]) if where else None
        return with_states(lm, output, steer(states, vector, gate, part))

    def in_tower(vector: Tensor, output: Any) -> Any:
        states = first_tensor(output)
        if len(vector) not in (1, states.shape[-2]):
            raise UserError(
                f"these vectors are for pictures of {len(vector)} patches, and this one has "
                f"{states.shape[-2]}: give pictures of one size, or make the vectors from pictures "
                "of several sizes"
            )
        return with_first(output, steer(states, vector))

    try:
        for layer, vector in vectors.items():
            change = partial(in_decoder, vector, gates[layer] if gates else None)
            handles.append(lm.layers[layer].register_forward_hook(hook(change)))
        for layer, vector in (tower.added() if tower else {}).items():
            # Before transformers' own hooks, by which some models note the features they use.
            change = partial(in_tower, vector)
            handles.append(seeing[layer].register_forward_hook(hook(change), prepend=True))
        yield lm
    finally:
        for handle in handles:
            handle.remove()
    if computed == {False}:
        raise UserError(
            f"nothing was steered: {lm.name} computed in other threads than the one that began to "
            "steer; open the block in the thread that computes"
        )


def _is_autograds() -> bool:
    """Whether this is a thread of autograd, which computes checkpointed layers a second time."""
    return isinstance(threading.current_thread(), threading._DummyThread)  # not begun in Python


def check_layers(layers: Iterable[int], count: int, hint: str = "") -> None:
    """Raise UserError unless each layer is one of 0 to count-1. hint: added to the message."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise UserError(
            f"layer {', '.join(map(str, wrong))} does not exist: the model has decoder "
            f"layers 0 to {count - 1}{hint}"
        )


def parse_layers(items: Iterable[int | str] | None, count: int) -> list[int]:
    """The sorted layer numbers that `items` name, for a model of `count` layers.

    items: numbers (negative ones count from the end), ranges ('10-29') or 'all'; None: all layers.
    Raises UserError for anything else, for a layer that does not exist, and if no layer is named.
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
        elif isinstance(item, str) and (match := re.fullmatch(r"(\d{1,18})-(\d{1,18})", item)):
            first, last = int(match[1]), int(match[2])
            if first > last:
                raise UserError(f"layers '{item}': the range runs backwards")
            check_layers((first, last), count, hint)  # before a huge range fills the memory
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
            f"layers '{str(item)[:40]}': expected whole numbers, ranges like 10-29, or all"
        ) from None


def layer_ranges(layers: Sequence[int]) -> list[str]:
    """Sorted layers as ranges that `parse_layers` takes: [3, 4, 5, 9] -> ['3-5', '9']."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and layer == ranges[-1][1] + 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges]


# Next to a vector this many times as long, little is left of a state in fp32, which has 24 bits.
LARGEST_RATIO = 1e6


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """One steering vector per layer, and the typical length of a hidden state there.

    vectors: (L, D), as their method gives them, before any scaling.
    norms: (L,) the median over the steering examples of ||h_l||.
    info: the manifest: model, data and settings that they come from.
    gate: scales them at each position; None: they are added alike at every position.
    tower: those of the vision tower, of the method vti alone; they go with any layers of the
        decoder, at every patch. With a gate or in combinations they cannot be.

    Vectors of one model can be combined, as in v + 0.5 * w - u: at every strength the combination
    adds what v, half of w and minus u add together at that strength (see `fix`), before the
    state's length is restored.
    Raises UserError for NaN or infinite values, for other types than floating point, and for shapes
    that do not match.
    """

    vectors: Tensor
    norms: Tensor
    info: dict
    gate: Gate | None = None
    tower: TowerVectors | None = None

    def __post_init__(self) -> None:
        if self.vectors.dim() != 2 or self.norms.shape != self.vectors.shape[:1]:
            raise UserError(
                f"expected vectors (L, D) and norms (L,), found {tuple(self.vectors.shape)} and "
                f"{tuple(self.norms.shape)}"
            )
        if self.gate and (
            self.gate.weights.shape != self.vectors.shape
            or self.gate.biases.shape != self.norms.shape
        ):
            raise UserError(
                f"expected a gate's weights {tuple(self.vectors.shape)} and biases "
                f"{tuple(self.norms.shape)}, found {tuple(self.gate.weights.shape)} and "
                f"{tuple(self.gate.biases.shape)}"
            )
        if self.gate and self.tower:
            raise UserError(
                "vectors that steer the vision tower cannot be behind a gate, which reads the "
                "decoder's states alone: use another method"
            )
        every = [("vectors", self.vectors), ("norms", self.norms)]
        if self.tower:
            every += [("vectors", self.tower.vectors), ("norms", self.tower.norms)]
        for name, values in every:
            if not values.is_floating_point():
                raise UserError(f"the {name} are {values.dtype}: expected floating point")
            if not values.isfinite().all():
                raise UserError(f"the {name} hold NaN or infinite values: make them again")

    def scaled(
        self, alpha: float, layers: Iterable[int | str] | None = None, units: str = "relative"
    ) -> dict[int, Tensor]:
        """layer -> the vector (D,) in fp32 that is added there, lambda v of the paper.

        alpha: the strength. layers: see `parse_layers`.
        units: relative: alpha times the median activation norm, along the unit vector, so that an
            alpha means the same at every layer and in every model; absolute: alpha times the vector
            as its method gives it (as in the paper, whose factor of 10 is not included).
        Vectors that are `fixed` are multiplied by alpha in both units.
        Raises UserError for unknown layers or units, for a strength that is not finite or so large
        that nothing of the hidden states would be left, and for a layer whose gate is NaN.
        """
        chosen = parse_layers(layers, len(self.vectors))
        if self.gate:
            weights, biases = self.gate.weights[chosen], self.gate.biases[chosen]
            if not weights.isfinite().all() or biases.isnan().any():
                fitted = (~self.gate.biases.isnan()).nonzero()[:, 0].tolist()
                raise UserError(
                    "a gate of these layers is NaN or infinite: give layers that have a gate "
                    f"({' '.join(layer_ranges(fitted)) or 'none has'})"
                )
        if units not in UNITS:
            raise UserError(f"unknown units '{units}': expected {' or '.join(UNITS)}")
        if not math.isfinite(alpha):
            raise UserError(f"strength {alpha}: expected a finite number")
        units = "absolute" if self.fixed else units
        added = _scaled(self.vectors, self.norms, chosen, alpha, units)
        if not all(
            vector.norm() <= LARGEST_RATIO * self.norms[layer] for layer, vector in added.items()
        ):
            raise UserError(
                f"strength {alpha:g} ({units}) is more than {LARGEST_RATIO:g} times the hidden "
                "states' norm, which leaves nothing of them: give a smaller one"
            )
        return added

    @property
    def fixed(self) -> bool:
        """Whether strength 1 adds the vectors as they are, in both units (see `fix`)."""
        return "fixed" in self.info

    def fix(self, units: str | None = None) -> SteeringVectors:
        """The same vectors with the length that strength 1 gives them in `units`, from now on.

        units: None: absolute for trained vectors, as their length was trained, relative for others.
        Combinations are of fixed vectors: v + w is v.fix() + w.fix().
        """
        if self.fixed:
            return self
        self._check_combined()
        default = "absolute" if self.info.get("method") in TRAINED_METHODS else "relative"
        units = units or default
        added = replace(self, gate=None).scaled(1.0, units=units)  # gates may lack some layers
        info = self.info | {"fixed": units}
        return replace(self, vectors=torch.stack([*added.values()]), info=info)

    def __mul__(self, factor: float) -> SteeringVectors:
        """`factor` times what these vectors add at any strength; a gate is kept."""
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        own = self.fix()
        return replace(own, vectors=factor * own.vectors, info=_combined([(factor, own)]))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVectors:
        return -1 * self

    def __add__(self, added: SteeringVectors) -> SteeringVectors:
        """What both add together at any strength.

        The norms are the first one's. Raises UserError for vectors of different models, and for
        gates, each of which would scale the sum.
        """
        return self._sum(added, 1)

    def __sub__(self, added: SteeringVectors) -> SteeringVectors:
        return self._sum(added, -1)

    def _sum(self, added: SteeringVectors, factor: int) -> SteeringVectors:
        if not isinstance(added, SteeringVectors):
            return NotImplemented
        self._check_alike(added)
        if self.gate or added.gate:
            raise UserError(
                "vectors behind a gate cannot be added to others, as the gate would scale both: "
                "steer by each in a block of its own, one within the other"
            )
        own, more = self.fix(), added.fix()
        return replace(
            own,
            vectors=own.vectors + factor * more.vectors,
            info=_combined([(1, own), (factor, more)]),
        )

    def without(self, removed: SteeringVectors) -> SteeringVectors:
        """These vectors without their part along `removed`'s: v - (v . w) w / ||w||^2.

        What is left is shorter. In relative units strength 1 still gives it the full length, unless
        these vectors were `fix`ed before. A layer where nothing is left is not steered.
        Raises UserError for vectors of different models.
        """
        self._check_alike(removed)
        self._check_combined()
        unit = normalize(removed.vectors.double(), dim=-1)
        own = self.vectors.double()
        left = own - (own * unit).sum(-1, keepdim=True) * unit
        # Only rounding is left of vectors along each other: no direction to be scaled up.
        left[left.norm(dim=-1) <= 1e-6 * own.norm(dim=-1)] = 0
        info = self.info | {"without": removed.info.get("method", "vectors")}
        return replace(self, vectors=left.to(self.vectors.dtype), info=info)

    def _check_combined(self) -> None:
        if self.tower:
            raise UserError(
                "vectors that steer the vision tower cannot be combined with others, nor scaled "
                "but by their strength: steer by each in a block of its own, one within the other"
            )

    def _check_alike(self, vectors: SteeringVectors) -> None:
        """Raise UserError unless two vectors are of one model."""
        if self.vectors.shape != vectors.vectors.shape:
            sizes = " and ".join(_sizes(item) for item in (self, vectors))
            raise UserError(f"vectors of {sizes} cannot be combined: both must be of one model")
        first, second = (v.info.get("model") or {} for v in (self, vectors))
        if "weights_sum" in first and "weights_sum" in second:
            _check_same_weights(
                first, second, "the first vectors' model: combine vectors of one model"
            )

    def apply(
        self,
        lm: LanguageModel,
        alpha: float,
        layers: Iterable[int | str] | None = None,
        units: str = "relative",
    ) -> AbstractContextManager[LanguageModel]:
        """Steer everything that the model computes in a `with vectors.apply(lm, 0.02):` block.

        A block steers what its own thread computes (see `steered`).
        alpha, layers, units: see `scaled`; by default all layers are steered.
        Raises UserError as `scaled` does, and if the vectors are of another model.
        """
        self.check_model(lm)
        added = self.scaled(alpha, layers, units)
        gates = {layer: self.gate.at(layer) for layer in added} if self.gate else None
        return steered(lm, added, gates, tower=self.tower_at(alpha, units))

    def tower_at(self, alpha: float, units: str = "relative") -> TowerSteering | None:
        """What moves the vision tower's states at a strength (see `scaled`); None: nothing."""
        return TowerSteering(self.tower, alpha, units) if self.tower else None

    def at(
        self,
        alpha: float,
        layers: Iterable[int | str] | None = None,
        units: str = "relative",
        positions: str = "all",
    ) -> Configuration:
        """These vectors at a strength, for `grains.score` and `grains.generate`.

        alpha, layers, units: see `scaled`. positions: see `grains.settings.parse_positions`.
        Raises UserError as these do.
        """
        parse_positions(positions)
        added = self.scaled(alpha, layers, units)
        name = self.info.get("method", "vectors")
        mode = self.info.get("mode") or ""
        tower = self.tower_at(alpha, units)
        return Configuration(name, mode, tuple(added), alpha, added, self.gate, positions, tower)

    def check_model(self, lm: LanguageModel) -> None:
        """Raise UserError unless these vectors are of this model; its precision may differ."""
        if self.vectors.shape != (len(lm.layers), lm.hidden_size):
            raise UserError(
                f"these vectors are for {len(self.vectors)} layers of size "
                f"{self.vectors.shape[1]}; {lm.name} has {len(lm.layers)} of size "
                f"{lm.hidden_size}"
            )
        recorded = self.info.get("model") or {}
        if "weights_sum" in recorded:  # vectors made by hand do not name their model
            _check_same_weights(_known(lm), recorded, f"{lm.name}: make them with this model")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, with `info` as JSON in its header (see docs/outputs.md)."""
        write_tensors(Path(path), *self.content())

    def content(self) -> tuple[dict[str, Tensor], dict]:
        """What `save` writes: the tensors by their names, and `info`."""
        tensors = {"vectors": self.vectors, "norms": self.norms}
        for name in PARTS:
            if part := getattr(self, name):
                tensors |= {f"{name}_{key}": tensor for key, tensor in vars(part).items()}
        return tensors, self.info

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectors:
        """Read a file that `save` wrote. Raises UserError for any other file."""
        tensors, info = read_tensors(Path(path))
        parts: dict[str, Any] = {}
        for name, kind in PARTS.items():
            keys = {each.name: f"{name}_{each.name}" for each in fields(kind)}
            if set(keys.values()) <= set(tensors):
                parts[name] = kind(**{own: tensors.pop(key) for own, key in keys.items()})
        if set(tensors) != {"vectors", "norms"}:
            raise UserError(
                f"'{path}' holds {', '.join(sorted(tensors))}: these are no steering vectors"
            )
        return cls(tensors["vectors"], tensors["norms"], info, **parts)


def _sizes(vectors: SteeringVectors) -> str:
    return f"{len(vectors.vectors)} layers of size {vectors.vectors.shape[1]}"


@kept_with_model
def _known(lm: LanguageModel) -> dict[str, Any]:
    """A model's identity, taken once: a block may be entered for every prompt."""
    return lm.identity()


def _check_same_weights(model: dict, recorded: dict, wanted: str) -> None:
    """Raise UserError unless two identities of models are of one, in any precision."""
    # The weights of a model in two precisions have nearly the same sum.
    alike = math.isclose(float(recorded["weights_sum"]), float(model["weights_sum"]), rel_tol=1e-2)
    if recorded.get("vocab_size") != model["vocab_size"] or not alike:
        raise UserError(
            f"these vectors are of another model, {recorded.get('model')}, not of {wanted}"
        )


def _combined(parts: list[tuple[float, SteeringVectors]]) -> dict:
    """The manifest of a combination: the model, and every vector with its factor."""
    return {
        "stage": "steering_vectors",
        "method": "combined",
        "mode": "",
        "fixed": "combined",
        "model": parts[0][1].info.get("model"),
        "parts": [{"factor": factor, **part.info} for factor, part in parts],
    }


@dataclass(frozen=True)
class Configuration:
    """One way to steer: a method's vectors, their layers and their strength.

    method, mode: see `grains.vectors.make`. layers: the steered layers. alpha: the strength.
    vectors: layer -> (D,), with the strength included. gate: scales them at each position, or None.
    positions: those that are steered (see `grains.settings.parse_positions`).
    tower: what moves the vision tower's states; None: nothing.
    Raises UserError for a tower with other positions than all.
    """

    method: str
    mode: str
    layers: tuple[int, ...]
    alpha: float
    vectors: dict[int, Tensor] = field(compare=False, repr=False, default_factory=dict)
    gate: Gate | None = field(compare=False, repr=False, default=None)
    positions: str = "all"
    tower: TowerSteering | None = field(compare=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.tower and self.positions != "all":
            raise UserError(
                f"positions '{self.positions}': vectors that steer the vision tower move every "
                "patch of a picture, so they are for all positions"
            )

    @property
    def gated(self) -> bool:
        """Whether a gate scales the vectors."""
        return self.gate is not None

    @property
    def variant(self) -> str:
        """The mode, and `gated` if there is a gate, as tables and labels show it."""
        return " ".join(filter(None, (self.mode, "gated" if self.gated else "")))

    @property
    def label(self) -> str:
        """A name for tables, such as 'mean pos @ 10-29 x 0.01'."""
        if not self.layers:
            return self.method
        name = " ".join(filter(None, (self.method, self.variant)))
        at = "" if self.positions == "all" else f" ({self.positions})"
        return f"{name} @ {','.join(layer_ranges(self.layers))} x {self.alpha:g}{at}"


BASE = Configuration("base", "", (), 0.0)  # the model without steering


@dataclass(frozen=True, eq=False)
class Direction:
    """A method's vectors at some layers and positions, without a strength."""

    method: str
    mode: str
    layers: tuple[int, ...]
    vectors: SteeringVectors
    positions: str = "all"

    def at(self, alpha: float, units: str = "relative") -> Configuration:
        """This direction at a strength (see `SteeringVectors.scaled`)."""
        return Configuration(
            self.method,
            self.mode,
            self.layers,
            alpha,
            self.vectors.scaled(alpha, self.layers, units),
            self.vectors.gate,
            self.positions,
            self.vectors.tower_at(alpha, units),
        )


def layer_groups(grid: GridSettings, num_layers: int) -> list[tuple[int, ...]]:
    """The groups of layers that a grid steers at once (see `GridSettings.layer_mode`).

    num_layers: how many the model has. Raises UserError for layers that it lacks.
    """
    layers = parse_layers(grid.layers, num_layers)
    if grid.layer_mode == "each":
        return [(layer,) for layer in layers]
    if grid.layer_mode == "from":
        return [tuple(range(layer, num_layers)) for layer in layers]
    return [tuple(layers)]


def directions(
    vectors: SteeringVectors, method: str, mode: str, grid: GridSettings
) -> list[Direction]:
    """One method's vectors at each group of layers of a grid (see `layer_groups`)."""
    return [
        Direction(method, mode, group, vectors, grid.positions)
        for group in layer_groups(grid, len(vectors.vectors))
    ]
