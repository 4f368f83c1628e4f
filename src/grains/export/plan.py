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

from grains.calls import first_tensor, with_states
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import EXPORTS
from grains.steering import SteeringVectors, layer_ranges

KEEPS_NORM = ("hf",)  # the others add the vectors, and leave the state longer or shorter
TEXT = (
    "The lighthouse keeper wrote down the weather every evening: wind from the west, rain until "
    "noon, and a ship that passed far out at sea without an answer to his light."
)


@dataclass(frozen=True, eq=False)
class Plan:
    """Vectors of a model at one strength.

    added: layer -> (D,) in fp32, with the strength included.
    """

    lm: LanguageModel
    vectors: SteeringVectors
    alpha: float
    units: str
    added: dict[int, Tensor]

    @property
    def label(self) -> str:
        """Method, layers and strength, as tables show them."""
        method = " ".join(filter(None, (self.vectors.info.get("method"), self._mode)))
        layers = ",".join(layer_ranges([*self.added]))
        return f"{method or 'vectors'} @ {layers} x {self.alpha:g} ({self.units})"

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
        """A `with` block that steers the model as this project does."""
        return self.vectors.apply(self.lm, self.alpha, [*self.added], self.units)


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
) -> Plan:
    """What a target holds of vectors at a strength.

    Raises UserError for an unknown target, for gates that the target cannot hold, for vectors of
    another model, and as `SteeringVectors.scaled` does.
    """
    if to not in EXPORTS:
        raise UserError(f"unknown target '{to}': expected {', '.join(EXPORTS)}")
    vectors.check_model(lm)
    added = {
        layer: vector.float().cpu()
        for layer, vector in vectors.scaled(alpha, layers, units).items()
    }
    if vectors.gate and to not in KEEPS_NORM:
        raise UserError(
            f"these vectors are behind gates, which '{to}' cannot hold, so they would steer "
            f"everywhere: export to {' or '.join(KEEPS_NORM)}, which holds them"
        )
    added = {layer: vector for layer, vector in added.items() if vector.any()}
    if not added:
        raise UserError(f"strength {alpha:g} adds nothing at these layers: give another one")
    if to == "gguf" and 0 in added:
        raise UserError(
            "llama.cpp cannot steer behind block 0 (it refuses a file with direction.0): give "
            f"layers from 1 on, such as 1-{len(lm.layers) - 1}, or export to gguf-bias"
        )
    return Plan(lm, vectors, alpha, units, added)


@contextmanager
def adding(added: dict[nn.Module, Tensor]) -> Iterator[None]:
    """Add vectors (D,) to the outputs of modules within the block; their norm is not kept."""

    def hook(vector: Tensor, module: nn.Module, args: tuple, output: Any) -> Any:
        states = first_tensor(output)
        return with_states(output, states + vector.to(states))

    handles = [
        module.register_forward_hook(partial(hook, vector)) for module, vector in added.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """(T, V) logits of one text in fp32, on the CPU. ids: (1, T)."""
    return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
