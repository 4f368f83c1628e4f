"""Inference-time intervention: mass-mean shifts at attention heads (Li et al., arXiv 2306.03341).

A head's output is what it gives to the projection that ends the attention. The heads whose outputs
tell preferred from dispreferred responses best are shifted along the difference of the two means,
by the standard deviation of the outputs along it. The projection is linear, so the shifts of a
layer's heads are one vector in the residual stream.

The non-linear variant (NL-ITI, Hoscilowicz et al., arXiv 2403.18680) looks at several last tokens
in place of one, whose outputs it averages, and its probes have a hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.replay import extend

# Of all heads, the share that is shifted: 48 of LLaMA-7B's 1,024, as in the paper of the method.
SHARE = 48 / 1024
FOLDS = 2  # of the pairs, for the accuracy of the probes


@dataclass(frozen=True)
class Recipe:
    """How heads are chosen and shifted.

    probed, shifted: the last tokens whose outputs are averaged, for the probes and for the shifts.
    hidden: whether the probes have a hidden layer, as wide as a head's output.
    """

    probed: int
    shifted: int
    hidden: bool


# The tokens of nl_iti are those of its paper's main table.
RECIPES = {"iti": Recipe(1, 1, False), "nl_iti": Recipe(4, 6, True)}
NAMES = ("o_proj", "out_proj", "dense", "wo")


def projections(lm: LanguageModel) -> list[nn.Linear]:
    """The linear map of every layer from its heads' outputs to the hidden states.

    Raises UserError for a model whose layers do not have exactly one by a known name.
    """
    maps: list[nn.Linear] = []
    for layer in lm.layers:
        named = [
            module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
            and "att" in name
            and name.rpartition(".")[2] in NAMES
            and module.out_features == lm.hidden_size
        ]
        if len(named) != 1 or named[0].in_features % count(lm):
            raise UserError(
                f"{lm.name}: its attention heads are not known by their names "
                f"({', '.join(NAMES)}), which {' and '.join(RECIPES)} shift: use another method"
            )
        maps += named
    return maps


def count(lm: LanguageModel) -> int:
    """The number of attention heads of a layer."""
    return lm.model.config.get_text_config().num_attention_heads


def outputs(lm: LanguageModel, pairs: Iterable[Encoded], *tokens: int) -> Tensor:
    """(W, N, 2, L, H, d) the heads' outputs at the end of x y+ and of x y-, in fp32.

    pairs: N examples with two responses. tokens: W times the number of last positions that are
    averaged. Raises UserError as `projections` does, and for outputs that are not finite.
    """
    maps, rows = projections(lm), []
    for item in pairs:
        for response in item.responses:
            with torch.inference_mode(), noted(maps, max(tokens)) as entering:
                inputs = extend(item.inputs, response)
                lm.model(**inputs, use_cache=False, logits_to_keep=1)
            last = torch.stack([entering[index] for index in range(len(maps))])  # (L, T, H * d)
            rows.append(torch.stack([last[:, -some:].mean(dim=1) for some in tokens]))
    given = torch.stack(rows, dim=1).unflatten(1, (-1, 2)).unflatten(-1, (count(lm), -1))
    if not given.isfinite().all():
        raise UserError(f"{lm.name}: its heads' outputs hold NaN or infinite values")
    return given


@contextmanager
def noted(maps: list[nn.Linear], positions: int) -> Iterator[dict[int, Tensor]]:
    """What enters each map at the last positions of one row, (T, in_features), within the block."""
    given: dict[int, Tensor] = {}

    def note(index: int) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            given[index] = args[0][0, -positions:].float().cpu()

        return hook

    handles = [module.register_forward_pre_hook(note(i)) for i, module in enumerate(maps)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def probe_accuracy(heads: np.ndarray, seed: int, hidden: bool = False) -> np.ndarray:
    """(L, H) how often a probe on a head's output tells y+ from y-.

    heads: (N, 2, L, H, d). hidden: see `Recipe`; without it a probe is a logistic regression.
    Cross-validated: no pair is in both folds.
    """
    # Imported late: they take a second, and other methods do not need them.
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pairs, _, layers, each, size = heads.shape
    folds = GroupKFold(min(FOLDS, pairs), shuffle=True, random_state=seed)
    groups, labels = np.repeat(np.arange(pairs), 2), np.tile([1, 0], pairs)
    accuracy = np.empty((layers, each))
    for layer, head in np.ndindex(layers, each):
        probe = make_pipeline(StandardScaler(), _classifier(size if hidden else 0, seed))
        rows = heads[:, :, layer, head].reshape(2 * pairs, -1)
        accuracy[layer, head] = cross_val_score(probe, rows, labels, groups=groups, cv=folds).mean()
    return accuracy


def _classifier(hidden: int, seed: int) -> Any:
    if not hidden:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(max_iter=1000)
    from sklearn.neural_network import MLPClassifier

    # Of so few rows, where it gets in 1,000 steps is far beyond what separates them.
    return MLPClassifier((hidden,), solver="lbfgs", max_iter=1000, random_state=seed)


def shifts(heads: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(L, H, d) the shift of every chosen head, zero of the others.

    The unit vector from the mean output for y- to that for y+, times the standard deviation of all
    outputs along it. heads: (N, 2, L, H, d). chosen: (L, H) bool.
    """
    direction = heads[:, 0].mean(0) - heads[:, 1].mean(0)
    length = np.linalg.norm(direction, axis=-1, keepdims=True)
    direction = np.divide(direction, length, out=np.zeros_like(direction), where=length > 0)
    spread = np.einsum("nklhd,lhd->nklh", heads, direction).std(axis=(0, 1))
    return direction * (spread * chosen)[..., None]


def make(
    lm: LanguageModel, pairs: Iterable[Encoded], seed: int, method: str = "iti"
) -> tuple[Tensor, list[list[int]]]:
    """One vector per layer, (L, D): what the shifted heads of the layer add to its attention.

    Added at the layer's output, where all vectors are, it reaches what follows the layer, but not
    the layer's own MLP, which in the papers of the methods sees it too.
    method: of `RECIPES`. Returns also the chosen heads, [layer, head] each, the best first.
    Raises UserError for fewer than two pairs, and as `outputs` does.
    """
    recipe = RECIPES[method]
    probed, shifted = outputs(lm, pairs, recipe.probed, recipe.shifted).double().numpy()
    if len(probed) < 2:
        raise UserError(
            f"the method {method} chooses heads on pairs left out: give two pairs or more"
        )
    accuracy = probe_accuracy(probed, seed, recipe.hidden)
    order = np.argsort(-accuracy, axis=None, kind="stable")[: max(1, round(SHARE * accuracy.size))]
    chosen = np.zeros(accuracy.shape, dtype=bool)
    chosen.flat[order] = True
    by_layer = torch.from_numpy(shifts(shifted, chosen)).float().flatten(1)
    vectors = torch.stack(
        [
            module.weight.detach().float().cpu() @ shift
            for module, shift in zip(projections(lm), by_layer, strict=True)
        ]
    )
    places = np.stack(np.unravel_index(order, accuracy.shape), axis=1)
    return vectors, places.tolist()
