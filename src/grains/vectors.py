"""Steering vectors from hidden states: the methods (paper, section 3.2) and the controls.

The paper's methods, mean and pca, reduce the shifts d = h(plain) - h(ablated) of both responses of
all examples to one vector v_l per layer l. The other methods reduce gradients, or differences
between the responses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from grains.errors import UserError
from grains.settings import ABLATION_METHODS, OF_MODEL, GridSettings
from grains.states import NEG, POS, States
from grains.steering import SteeringVectors, TowerVectors


@dataclass(frozen=True)
class FromModel:
    """What a method of `OF_MODEL` takes from the model and the examples, not from hidden states.

    vectors: (L, D) for a method of heads. tower: the vision tower's for vti. info: what the
    manifest says of them.
    """

    vectors: Tensor | None = None
    tower: TowerVectors | None = None
    info: dict = field(default_factory=dict)


# Variance as a share of the mean's square: below it rows of fp32 differ by nothing.
SAME = 1e-20


def mean_vector(chunks: Iterable[np.ndarray]) -> np.ndarray:
    """The mean (D,) of rows that come in chunks (n, D)."""
    total, count = np.zeros(()), 0
    for chunk in chunks:
        total, count = total + chunk.sum(axis=0), count + len(chunk)
    return total / count


def pca_vector(chunks: Iterable[np.ndarray], around_mean: bool = True) -> np.ndarray:
    """The first principal component (D,), of unit length, of rows that come in chunks (n, D).

    around_mean: whether the rows are centred first. If not, it is the first principal direction of
        the rows themselves, near their mean where they have much in common; zeros for rows of
        zeros.
    Up to D rows are decomposed directly. More rows are summed into their covariance (D, D), which
    is then smaller than they are. A principal component has no sign of its own; it is oriented so
    that the mean of the rows projects positively on it.
    Raises UserError for fewer than two rows, and for centred rows that are all the same.
    """
    # Imported late: it takes long, and most runs compute no principal component.
    from scipy.linalg import eigh, svd

    chunks = iter(chunks)
    rows = next(chunks)
    while len(rows) <= rows.shape[1] and (chunk := next(chunks, None)) is not None:
        rows = np.concatenate([rows, chunk])
    if len(rows) < 2:
        raise UserError(
            "a principal component needs at least two rows: give more examples or use the "
            "method 'mean'"
        )
    if len(rows) <= rows.shape[1]:
        mean = rows.mean(axis=0)
        if around_mean:
            _check_spread(rows.var(axis=0).sum(), mean)
            rows = rows - mean
        elif not rows.any():
            return mean
        component = svd(rows, full_matrices=False)[2][0]
    else:
        # The products are of differences from an estimate of the mean: with a large mean, plain
        # products would lose digits.
        origin, count, total, products = rows.mean(axis=0), 0, 0.0, 0.0
        for chunk in chain([rows], chunks):
            centred = chunk - origin
            count += len(centred)
            total, products = total + centred.sum(axis=0), products + centred.T @ centred
        shift = total / count
        mean, size = origin + shift, len(origin)
        covariance = products / count - np.outer(shift, shift)
        if around_mean:
            _check_spread(np.trace(covariance), mean)
        else:
            covariance += np.outer(mean, mean)
            if not covariance.any():
                return mean
        component = eigh(covariance, subset_by_index=[size - 1, size - 1])[1][:, 0]
    return component if component @ mean >= 0 else -component


def _check_spread(variance: float, mean: np.ndarray) -> None:
    if variance <= SAME * (mean @ mean):
        raise UserError(
            "all rows are the same, so they have no principal component: give other examples or "
            "use the method 'mean'"
        )


def joint_direction(states: States) -> np.ndarray:
    """In-context vectors (arXiv 2311.06668): (L, D), of unit length over all layers together.

    The states of all layers are joined to one row an example; the vector is the first principal
    direction of the rows' differences h(x y+) - h(x y-), which are not centred, oriented so that
    their mean projects positively on it. The differences are read layer by layer in every step of
    the iteration, so they need not fit in memory.
    """
    from scipy.sparse.linalg import LinearOperator, svds  # late, as in `pca_vector`

    layers, size = range(states.layers), states.info["model"]["hidden_size"]
    mean = np.stack([mean_vector(states.difference(POS, NEG, layer)) for layer in layers])

    def onto(direction: np.ndarray) -> np.ndarray:
        """(N,) the rows' projections."""
        by_layer = direction.reshape(len(layers), size)
        total = np.zeros(states.count)
        for layer in layers:
            total += np.concatenate(
                [rows @ by_layer[layer] for rows in states.difference(POS, NEG, layer)]
            )
        return total

    def combined(weights: np.ndarray) -> np.ndarray:
        """(L * D,) the weighted sum of the rows."""
        weights = weights.ravel()
        sums = np.zeros((len(layers), size))
        for layer in layers:
            start = 0
            for rows in states.difference(POS, NEG, layer):
                sums[layer] += weights[start : start + len(rows)] @ rows
                start += len(rows)
        return sums.ravel()

    if states.count == 1 or not mean.any():  # one row is its own direction
        return mean / max(np.linalg.norm(mean), np.finfo(float).tiny)
    rows = LinearOperator(
        (states.count, len(layers) * size), matvec=onto, rmatvec=combined, dtype=np.float64
    )
    start = np.ones(min(rows.shape))  # so that the same states give the same digits
    direction = svds(rows, k=1, v0=start, return_singular_vectors="vh")[2][0]
    direction = direction.reshape(len(layers), size)
    return direction if (direction * mean).sum() >= 0 else -direction


def random_rotation(size: int, seed: int) -> np.ndarray:
    """A rotation of the hidden space (D, D) in fp64, uniform over all rotations.

    Vectors resemble each other from layer to layer, which makes them a far stronger push than a
    random direction at each layer. Rotated alike they keep their lengths and angles.
    """
    normal = np.random.default_rng(seed).standard_normal((size, size))
    orthogonal, triangular = np.linalg.qr(normal)
    orthogonal *= np.sign(np.diag(triangular))  # without these signs it is not uniform
    if np.linalg.slogdet(orthogonal).sign < 0:  # a reflection
        orthogonal[:, 0] *= -1
    return orthogonal


def make(
    states: Mapping[str, States],
    method: str,
    mode: str,
    seed: int,
    of_model: Callable[[str], FromModel] | None = None,
) -> SteeringVectors:
    """One steering vector per layer (paper, section 3.2).

    states: selection (pos, neg, rand) -> its hidden states. pos is always needed, neg for the mode
        both, rand for rand_tokens.
    method: mean or pca: the mean or the first principal component of the shifts; gradient: the mean
        over examples of df/dh; caa: the mean over examples of h(x y+) - h(x y-); repe: the first
        principal component of these differences; icv: in-context vectors (see
        `joint_direction`); iti, nl_iti: what `of_model` gives; vti: as icv, but of each layer on
        its own, and the vision tower's vectors that `of_model` gives.
        Controls: random: random directions; shared_random: one random direction at all layers;
        rotated: gradient under one random rotation, so that lengths, and angles between layers,
        stay; rand_tokens: the mean shift when random tokens are ablated; shuffled: gradient with
        y+ and y- swapped at random in each example.
    mode: for mean and pca: pos, v = v_pos; both, v = v_pos - v_neg.
    seed: seeds random, shared_random, rotated and shuffled.
    of_model: makes what iti, nl_iti and vti take from the model and the examples (see
        `grains.of_model.make`), as the hidden states do not hold it.
    Raises UserError if the hidden states hold NaN or infinite values, and for a method of
    `OF_MODEL` without of_model.
    """
    generator = torch.Generator().manual_seed(seed)
    pos_states = states["pos"]
    pos_states.check_methods([method])
    size = pos_states.info["model"]["hidden_size"]

    def vector(layer: int) -> np.ndarray:
        if method in ABLATION_METHODS:
            reduce = {"mean": mean_vector, "pca": pca_vector}[method]
            v_pos = reduce(pos_states.shifts(layer))
            return v_pos - reduce(states["neg"].shifts(layer)) if mode == "both" else v_pos
        if method == "rand_tokens":
            return mean_vector(states["rand"].shifts(layer))
        if method in ("gradient", "rotated"):
            return mean_vector(pos_states.layer("gradients", layer))
        if method in ("caa", "repe"):
            reduce = {"caa": mean_vector, "repe": pca_vector}[method]
            return reduce(pos_states.difference(POS, NEG, layer))
        if method == "vti":
            return pca_vector(pos_states.difference(POS, NEG, layer), around_mean=False)
        if method == "shuffled":
            # Swapping the answers changes the sign of f, so of its gradients at every layer:
            # each layer draws the same signs.
            swaps = np.random.default_rng(seed)
            return mean_vector(
                chunk * swaps.choice([-1.0, 1.0], size=(len(chunk), 1))
                for chunk in pos_states.layer("gradients", layer)
            )
        if method == "shared_random":
            generator.manual_seed(seed)  # each layer draws the same direction
        return torch.randn(size, generator=generator, dtype=torch.float64).numpy()

    info = {**pos_states.info, "stage": "steering_vectors", "method": method, "mode": mode}
    added = FromModel()
    if method in OF_MODEL:
        if of_model is None:
            raise UserError(
                f"method {method}: hidden states alone do not give it; it needs the model"
            )
        added = of_model(method)
        info |= added.info
    if added.vectors is not None:
        return SteeringVectors(added.vectors, pos_states.norms(), info)
    if method == "icv":
        by_layer = joint_direction(pos_states)
    else:
        by_layer = np.stack([vector(layer) for layer in range(pos_states.layers)])
    if method == "rotated":
        by_layer = by_layer @ random_rotation(size, seed)
    vectors = torch.from_numpy(by_layer).float()
    return SteeringVectors(vectors, pos_states.norms(), info, tower=added.tower)


def make_all(
    states: Mapping[str, States],
    grid: GridSettings,
    seed: int,
    of_model: Callable[[str], FromModel] | None = None,
) -> Iterator[tuple[str, str, SteeringVectors]]:
    """Method, mode ("" for methods without modes) and vectors, for all of a grid (see `make`)."""
    for method in grid.methods:
        for mode in grid.modes if method in ABLATION_METHODS else ("",):
            yield method, mode, make(states, method, mode, seed, of_model)
