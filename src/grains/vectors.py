"""Steering vectors from hidden states: the methods (paper, section 3.2) and their controls.

For every layer l, v_l reduces the shifts d = h(plain) - h(ablated) of both responses over all
examples, or what else a method takes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import torch

from grains.errors import UserError
from grains.settings import ABLATION_METHODS, GridSettings
from grains.states import NEG, POS, States
from grains.steering import SteeringVectors


def mean_vector(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The mean (D,) of rows that come in parts (n, D)."""
    total, count = np.zeros(()), 0
    for part in parts:
        total, count = total + part.sum(axis=0), count + len(part)
    return total / count


def pca_vector(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The first principal component (D,) of rows that come in parts (n, D), unit length.

    Up to D rows are decomposed as they are; more are folded into their covariance as they come,
    which is then the smaller of the two. A principal component has no sign of its own: it is
    turned so that the mean projects positively on it.
    """
    # These libraries take a second to import, and most runs make no principal component.
    from scipy.linalg import eigh
    from sklearn.decomposition import PCA

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


def make(states: Mapping[str, States], method: str, mode: str, seed: int) -> SteeringVectors:
    """One steering vector a layer, from the states of each selection (pos, neg, rand).

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
            return reduce(first.difference(POS, NEG, layer))
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
        raise UserError("the hidden states hold NaN or infinite values: make them again")
    info = {**first.info, "stage": "steering_vectors", "method": method, "mode": mode}
    return SteeringVectors(torch.from_numpy(made).float(), first.norms(), info)


def make_all(
    states: Mapping[str, States], grid: GridSettings, seed: int
) -> Iterator[tuple[str, str, SteeringVectors]]:
    """Method, mode and vectors for all methods and modes of a grid."""
    for method in grid.methods:
        for mode in grid.modes if method in ABLATION_METHODS else ("",):
            yield method, mode, make(states, method, mode, seed)
