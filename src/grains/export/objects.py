"""Vectors as objects of repeng and steering-vectors, and vectors that others have made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grains.errors import UserError
from grains.export.files import gguf_directions
from grains.export.plan import TEXT, make
from grains.lm import LanguageModel
from grains.replay import capture, replay
from grains.steering import SteeringVectors, check_layers, steer

# Strength 1 adds imported vectors as they are.
IMPORTED = {"stage": "steering_vectors", "method": "imported", "mode": "", "fixed": "absolute"}


def to_repeng(
    lm: LanguageModel,
    vectors: SteeringVectors,
    alpha: float,
    layers: Iterable[int | str] | None = None,
    units: str = "relative",
) -> Any:
    """repeng's ControlVector; its layers are ours.

    `set_control(vector, 1.0, normalize=True)` restores the norm as we do; the default adds alone.
    Raises UserError as `export.write` to lm-eval does, and if repeng is not installed.
    """
    try:
        from repeng import ControlVector
    except ImportError as error:
        raise UserError(
            "repeng is not installed: pip install repeng==0.4.0 (with numpy 1)"
        ) from error
    plan = make(lm, vectors, "lm-eval", alpha, layers, units)
    directions = {layer: vector.numpy() for layer, vector in plan.added.items()}
    return ControlVector(model_type=lm.model.config.model_type, directions=directions)


def to_steering_vectors(
    lm: LanguageModel,
    vectors: SteeringVectors,
    alpha: float,
    layers: Iterable[int | str] | None = None,
    units: str = "relative",
) -> Any:
    """steering-vectors' SteeringVector, which adds to the outputs of decoder blocks.

    Its `apply(model, operator=...)` takes `keep_norm` of this module, which restores the norm.
    Raises UserError as `to_repeng` does.
    """
    try:
        from steering_vectors import SteeringVector
    except ImportError as error:
        raise UserError(
            "steering-vectors is not installed: pip install --no-deps steering-vectors==0.12.2"
        ) from error
    plan = make(lm, vectors, "lm-eval", alpha, layers, units)
    return SteeringVector(layer_activations=plan.added, layer_type="decoder_block")


def from_steering_vectors(lm: LanguageModel, vector: Any) -> SteeringVectors:
    """Our vectors from steering-vectors' SteeringVector.

    Raises UserError for other modules than decoder blocks, and for vectors of another model.
    """
    if vector.layer_type != "decoder_block":
        raise UserError(
            f"vectors of '{vector.layer_type}': only those of decoder_block act where ours do"
        )
    return imported(lm, vector.layer_activations, "an object of steering-vectors")


def read_gguf(lm: LanguageModel, path: str | Path) -> SteeringVectors:
    """Our vectors from a control vector in GGUF, as repeng and llama.cpp write it.

    Raises UserError for another file, and for vectors of another model.
    """
    return imported(lm, gguf_directions(Path(path)), str(path))


def read_arrays(lm: LanguageModel, path: str | Path, layer: int | None = None) -> SteeringVectors:
    """Our vectors from NumPy's files.

    .npy: (L, D), a row for each layer, or (D,) of one `layer`. .npz: an array (D,) for each layer,
    whose number ends its name, or one array as in .npy.
    Nothing is unpickled. Raises UserError for other contents, and for vectors of another model.
    """
    path = Path(path)
    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read as NumPy's arrays: {error}") from error
    arrays = {path.stem: content} if isinstance(content, np.ndarray) else {**content}
    if len(arrays) == 1:
        ((name, array),) = arrays.items()
        if array.ndim == 2:
            if len(array) != len(lm.layers):
                raise UserError(
                    f"'{path}' holds {len(array)} vectors, {lm.name} has {len(lm.layers)} layers: "
                    "give a row for each layer"
                )
            return imported(lm, dict(enumerate(array)), str(path))
        if layer is None and not name[-1:].isdecimal():
            raise UserError(f"'{path}' holds a vector of one layer: say of which")
    by_layer = {}
    for name, array in arrays.items():
        digits = name[len(name.rstrip("0123456789")) :]
        if layer is None and not digits:
            raise UserError(f"'{path}': the name '{name}' ends in no layer's number")
        by_layer[int(digits) if layer is None else layer] = array
    return imported(lm, by_layer, str(path))


def imported(lm: LanguageModel, by_layer: Mapping[int, Any], source: str) -> SteeringVectors:
    """Vectors of some layers as our own: strength 1 adds them as they are, zero at the others.

    by_layer: layer -> (D,). The norms are the medians over the positions of a text, without the
    first, whose states are far longer in many models.
    """
    check_layers(by_layer, len(lm.layers))
    vectors = torch.zeros(len(lm.layers), lm.hidden_size)
    for layer, vector in by_layer.items():
        tensor = torch.as_tensor(np.asarray(vector)).float()
        if tensor.numel() != lm.hidden_size:
            raise UserError(
                f"{source}: the vector of layer {layer} has {tensor.numel()} values, {lm.name} has "
                f"states of size {lm.hidden_size}"
            )
        vectors[layer] = tensor.flatten()
    info = IMPORTED | {"source": source, "model": lm.identity()}
    return SteeringVectors(vectors, _norms(lm), info)


@torch.no_grad()
def _norms(lm: LanguageModel) -> Tensor:
    """(L,) median length of the states behind each layer on a short text."""
    ids = lm.tokenizer(TEXT, return_tensors="pt").input_ids.to(lm.device)
    norms = []
    captured = capture(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    replay(
        lm,
        captured.embeds,
        captured.calls,
        after=lambda layer, states: norms.append(states[0, 1:].float().norm(dim=-1).median().cpu()),
    )
    return torch.stack(norms)


def keep_norm(original: Tensor, added: Tensor) -> Tensor:
    """An `operator` for steering-vectors' apply: what it adds so that the state keeps its norm."""
    return steer(original, added.float()) - original
