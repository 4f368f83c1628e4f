"""What is handed on: the vectors with their strength, and what a target can hold of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grains.calls import first_tensor, with_first
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.positions import newest
from grains.settings import EXPORTS, parse_positions
from grains.steering import SteeringVectors, layer_ranges, steered

# What keeps norm, gates and positions; the others add the vectors at every position, and leave the
# state longer or shorter.
KEEPS_NORM = ("hf",)
TEXT = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, rain until "
    "noon, and a ship that passed far out at sea without an answer to his light."
)


@dataclass(frozen=True, eq=False)
class Plan:
    """Vectors of a model at one strength.

    added: layer -> (D,) in fp32, with the strength included.
    positions: those that are steered (see `grains.settings.parse_positions`).
    """

    lm: LanguageModel
    vectors: SteeringVectors
    alpha: float
    units: str
    added: dict[int, Tensor]
    positions: str = "all"

    @property
    def label(self) -> str:
        """Method, layers and strength, as tables show them."""
        method = " ".join(filter(None, (self.vectors.info.get("method"), self._mode)))
        layers = ",".join(layer_ranges([*self.added]))
        where = "" if self.positions == "all" else f", positions {self.positions}"
        return f"{method or 'vectors'} @ {layers} x {self.alpha:g} ({self.units}{where})"

    @property
    def _mode(self) -> str:
        return self.vectors.info.get("mode") or ""

    def digest(self) -> str:
        """Of all that is added, gates included."""
        content, gate = hashlib.sha256(), self.vectors.gate
        for layer, vector in self.added.items():
            content.update(f"{layer} ".encode())
            for tensor in (vector, *(gate.at(layer) if gate else ())):
                content.update(tensor.float().cpu().numpy().tobytes())
        return content.hexdigest()[:16]

    def steer(self) -> AbstractContextManager:
        """A `with` block that steers the model as this project does, at all positions."""
        return self.vectors.apply(self.lm, self.alpha, [*self.added], self.units)

    def steer_text(self, prompt: Tensor, length: int) -> AbstractContextManager:
        """A `with` block that steers the model at its positions of a text of `length` tokens.

        prompt: (P,) bool, which of its first tokens, those of the prompt, are of a picture.
        Raises UserError if no position of the prompt is meant.
        """
        gate = self.vectors.gate
        gates = {layer: gate.at(layer) for layer in self.added} if gate else None
        where = newest([self.positions], [prompt], [length], length)
        return steered(self.lm, self.added, gates, lambda count: where)


@dataclass(frozen=True)
class Check:
    """Differences of logits on a text, maximum and mean, over all positions and words.

    written: between what was written, loaded again, and the same vectors added here.
    lost: between that and our own steering, which keeps the norm; 0 where the target does too.
    effect: between our own steering and the base model.
    """

    written: tuple[float, float]
    lost: tuple[float, float]
    effect: tuple[float, float]


def make(
    lm: LanguageModel,
    vectors: SteeringVectors,
    to: str,
    alpha: float,
    layers: Iterable[int | str] | None = None,
    units: str = "relative",
    positions: str = "all",
) -> Plan:
    """What a target holds of vectors at a strength.

    Raises UserError for an unknown target, for gates, vision towers and positions that it cannot
    hold, for vectors of another model, and as `SteeringVectors.scaled` does.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown target '{to}': expected {', '.join(EXPORTS)}")
    vectors.check_model(lm)
    if lm.streams:
        raise UserError(
            f"{lm.name}: its layers pass on {lm.streams[1]} hidden states for each token, which "
            f"'{to}' cannot steer; steer it here"
        )
    added = {
        layer: vector.float().cpu()
        for layer, vector in vectors.scaled(alpha, layers, units).items()
    }
    if vectors.tower:
        raise UserError(
            "these vectors steer the vision tower too, which no target holds, so half of them "
            "would be lost: give others"
        )
    if vectors.gate and to not in KEEPS_NORM:
        raise UserError(
            f"these vectors are behind gates, which '{to}' cannot hold, so they would steer "
            f"everywhere: export to {' or '.join(KEEPS_NORM)}, which holds them"
        )
    if parse_positions(positions) != "all" and to not in KEEPS_NORM:
        raise UserError(
            f"positions '{positions}' cannot be held by '{to}', so it would steer everywhere: "
            f"export to {' or '.join(KEEPS_NORM)}, which holds them"
        )
    if positions == "image" and lm.processor is None:
        raise UserError(f"positions 'image': {lm.name} reads no pictures")
    added = {layer: vector for layer, vector in added.items() if vector.any()}
    if not added:
        raise UserError(f"strength {alpha:g} adds nothing at these layers: give another one")
    if to == "gguf" and 0 in added:
        raise UserError(
            "llama.cpp cannot steer behind block 0 (it refuses a file with direction.0): give "
            f"layers from 1 on, such as 1-{len(lm.layers) - 1}, or export to gguf-bias"
        )
    return Plan(lm, vectors, alpha, units, added, positions)


@contextmanager
def adding(added: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Add vectors (D,) to the outputs of modules within the block; their norm is not kept."""

    def hook(vector: Tensor, module: nn.Module, args: tuple, output: Any) -> Any:
        states = first_tensor(output)
        return with_first(output, states + vector.to(states))

    handles = [
        module.register_forward_hook(partial(hook, vector)) for module, vector in added.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """(T, V) logits of one text in fp32, on the CPU. ids: (1, T). inputs: others of the forward."""
    return model(input_ids=ids, use_cache=False, **inputs).logits[0].float().cpu()
