"""Steering vectors: from hidden-state shifts, kept in a file, applied to a model.

Paper, section 3.2 (vectors) and 3.3 (steering). For every layer l, v_l reduces the shifts
d = h(plain) - h(ablated) of both responses over all examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.linalg import eigh
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from grains.errors import UserError
from grains.models import LanguageModel
from grains.runs import read_header, write_tensors

METHODS = ("mean", "pca", "gradient", "caa", "repe", "random", "rand_tokens", "shuffled")
# The last: random directions as long as trained ones, which an experiment makes of them.
CONTROLS = ("random", "rand_tokens", "shuffled", "trained_random")
MODES = ("pos", "both")
# Only these are made from ablation shifts, and so know the modes pos and both.
ABLATION_METHODS = ("mean", "pca")
EXAMPLES_AT_A_TIME = 4096


def mean_vector(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The mean (D,) of rows that come in parts (n, D)."""
    total, count = 0.0, 0
    for part in parts:
        total, count = total + part.sum(axis=0), count + len(part)
    return total / count


def pca_vector(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The first principal component (D,) of rows that come in parts (n, D), unit length.

    Up to D rows are decomposed as they are; more are folded into their covariance as they come,
    which is then the smaller of the two. A principal component has no sign of its own: it is
    turned so that the mean projects positively on it.
    """
    parts = iter(parts)
    rows = next(parts)
    while len(rows) <= rows.shape[1] and (part := next(parts, None)) is not None:
        rows = np.concatenate([rows, part])
    if len(rows) < 2:
        raise UserError(
            "a principal component needs at least two shifts: give more examples or "
            "use the method 'mean'"
        )
    if len(rows) <= rows.shape[1]:
        mean = rows.mean(axis=0)
        component = PCA(n_components=1, svd_solver="full").fit(rows).components_[0]
    else:
        # Products of differences from a first guess of the mean lose no digits to a large mean.
        origin, count, total, products = rows.mean(axis=0), 0, 0.0, 0.0
        for part in chain([rows], parts):
            part = part - origin
            count += len(part)
            total, products = total + part.sum(axis=0), products + part.T @ part
        shift = total / count
        mean, size = origin + shift, len(origin)
        covariance = products / count - np.outer(shift, shift)
        component = eigh(covariance, subset_by_index=[size - 1, size - 1])[1][:, 0]
    return component if component @ mean >= 0 else -component


class StatesFile:
    """A file of stage 1, read a layer at a time so that it need not fit in memory.

    info: its manifest. Raises UserError if it is missing, cut short or something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_header(self.path)
        if self.info.get("stage") != "token_ablation":
            raise UserError(f"'{path}' holds no hidden states of token_ablation.py")
        self._file = safe_open(str(self.path), framework="np")
        self.layers = self._file.get_slice("gradients").get_shape()[1] - 1

    def layer(self, name: str, layer: int) -> Iterator[np.ndarray]:
        """Array `name` after decoder layer `layer` in parts (n, D) of some examples, in fp64."""
        array = self._file.get_slice(name)
        count = array.get_shape()[0]
        for start in range(0, count, EXAMPLES_AT_A_TIME):
            end = min(start + EXAMPLES_AT_A_TIME, count)
            yield array[start:end, layer + 1].astype(np.float64)

    def norms(self) -> Tensor:
        """(L,) median over examples of the median over positions of ||h_l||."""
        return torch.from_numpy(np.median(self._file.get_tensor("norms")[:, 1:], axis=0)).float()

    def difference(self, one: str, other: str, layer: int) -> Iterator[np.ndarray]:
        """What array `one` has more than array `other` after a layer, in parts (n, D)."""
        for a, b in zip(self.layer(one, layer), self.layer(other, layer), strict=True):
            yield a - b

    def shifts(self, layer: int) -> Iterator[np.ndarray]:
        """h(plain) - h(ablated) after a layer, 2N rows for both responses, in parts (n, D)."""
        for which in ("pos", "neg"):
            plain = f"hidden_{which}_response"
            yield from self.difference(plain, f"{plain}_ablated", layer)

    def check_model(self, lm: LanguageModel) -> None:
        """Raise UserError unless these states are of this model."""
        theirs, ours = self.info["model"], lm.identity()
        wrong = [key for key in ours if key != "model" and theirs.get(key) != ours[key]]
        if wrong:
            raise UserError(
                f"'{self.path}' is of another model: {theirs['model']} ({theirs['num_layers']} "
                f"layers of size {theirs['hidden_size']}) there, {lm.name} ({len(lm.layers)} of "
                f"size {lm.hidden_size}) here, or the same in another precision (states in "
                f"{theirs.get('dtype')}, now {lm.dtype}); give the model and --dtype of stage 1"
            )


def make(states: dict[str, StatesFile], method: str, mode: str, seed: int) -> SteeringVectors:
    """One steering vector a layer, from stage 1's files by their selection (pos, neg, rand).

    method: mean or pca of the shifts, mode pos or both = pos - neg; gradient: the mean over
        examples of df/dh; caa: the mean of h(x y+) - h(x y-); repe: their first principal
        component. Controls: random, directions from the seed; rand_tokens, the mean shift when
        random tokens are ablated; shuffled, gradient with y+ and y- swapped in every example for
        which the seed says so.
    """
    generator = torch.Generator().manual_seed(seed)
    first = states["pos"]

    def vector(layer: int) -> np.ndarray:
        if method in ABLATION_METHODS:
            reduce = {"mean": mean_vector, "pca": pca_vector}[method]
            of_pos = reduce(first.shifts(layer))
            return of_pos - reduce(states["neg"].shifts(layer)) if mode == "both" else of_pos
        if method == "rand_tokens":
            return mean_vector(states["rand"].shifts(layer))
        if method == "gradient":
            return mean_vector(first.layer("gradients", layer))
        if method in ("caa", "repe"):
            reduce = {"caa": mean_vector, "repe": pca_vector}[method]
            return reduce(first.difference("hidden_pos_response", "hidden_neg_response", layer))
        if method == "shuffled":
            swaps = np.random.default_rng(seed)  # of every layer alike: f changes its sign whole
            return mean_vector(
                part * swaps.choice([-1.0, 1.0], size=(len(part), 1))
                for part in first.layer("gradients", layer)
            )
        size = first.info["model"]["hidden_size"]
        return torch.randn(size, generator=generator, dtype=torch.float64).numpy()

    made = np.stack([vector(layer) for layer in range(first.layers)])
    if not np.isfinite(made).all():
        raise UserError(f"'{first.path}' holds NaN or infinite values: make it again")
    info = {**first.info, "stage": "steering_vectors", "method": method, "mode": mode}
    return SteeringVectors(torch.from_numpy(made).float(), first.norms(), info)


@dataclass(frozen=True, eq=False)
class Gate:
    """How far the vectors of each layer are added at a position, by its state (see `grains.gates`).

    weights: (L, D); biases: (L,); NaN at layers that it was not made for.
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
    gate: a weight (D,) or (R, 1, D) and a bias, a number or (R, 1, 1): v counts as far as they open
        at a state (see `Gate`).
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
):
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


def check_layers(layers, count: int) -> None:
    """Raise UserError for a layer that does not exist."""
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise UserError(
            f"layer {', '.join(map(str, wrong))} does not exist: the model has decoder "
            f"layers 0 to {count - 1}"
        )


@dataclass(frozen=True, eq=False)
class SteeringVectors:
    """One vector a layer, as reduced, and what a strength of 1 means at each.

    vectors: (L, D). norms: (L,) median ||h_l|| of the steering examples.
    info: the manifest of where they come from.
    gate: where they are added; everywhere without one.
    """

    vectors: Tensor
    norms: Tensor
    info: dict
    gate: Gate | None = None

    def scaled(self, alpha: float, layers: list[int], units: str = "relative") -> dict[int, Tensor]:
        """layer -> what is added there.

        relative: alpha times the median activation norm, along the unit vector, so that one alpha
        means the same at every layer and in every model. absolute: alpha times the vector as it
        was reduced (the paper's; its own factor of 10 is not included).
        """
        check_layers(layers, len(self.vectors))
        if units == "absolute":
            return {layer: alpha * self.vectors[layer] for layer in layers}
        unit = normalize(self.vectors, dim=-1)
        return {layer: alpha * self.norms[layer] * unit[layer] for layer in layers}

    def apply(self, lm: LanguageModel, alpha: float, layers: list[int], units: str = "relative"):
        """`with vectors.apply(lm, 0.05, layers):` steers whatever the model computes inside."""
        if self.vectors.shape != (len(lm.layers), lm.hidden_size):
            raise UserError(
                f"these vectors are for {len(self.vectors)} layers of size "
                f"{self.vectors.shape[1]}; {lm.name} has {len(lm.layers)} of size "
                f"{lm.hidden_size}"
            )
        return steered(
            lm,
            self.scaled(alpha, layers, units),
            {layer: self.gate.at(layer) for layer in layers} if self.gate else None,
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
        info = read_header(Path(path))
        tensors = load_file(str(path))
        gated = {"gate_weights", "gate_biases"} <= set(tensors)
        gate = Gate(tensors.pop("gate_weights"), tensors.pop("gate_biases")) if gated else None
        if set(tensors) != {"vectors", "norms"}:
            raise UserError(
                f"'{path}' holds {', '.join(sorted(tensors))}: these are no steering vectors"
            )
        return cls(tensors["vectors"], tensors["norms"], info, gate)
