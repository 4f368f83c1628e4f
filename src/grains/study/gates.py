"""Gates: steer only where the states look like those of the steering examples.

A vector added at every position reaches texts that it was not made for, and is paid there. Behind
a gate it is added at a position as far as the position's own state says that it belongs to such
text as the steering examples are:

    h' = (h + g(h) v) ||h|| / ||h + g(h) v||,    g(h) = sigmoid(w . h / ||h|| + b)

w and b of a layer are a logistic regression between the states of the steering examples and those
of other text, none of them steered. What a gate keeps shut it has seen examples of: text unlike
both kinds may pay more. Conditional activation steering (Lee et al. 2024, arXiv 2409.05907) decides
so once for a prompt; the paper steers everywhere.
"""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from grains.errors import UserError
from grains.models import LanguageModel
from grains.prompts import Encoded
from grains.replay import replay
from grains.scoring import batches, packed_batch
from grains.vectors import Gate

POSITIONS = 4096  # read of each kind of text
PENALTY = 1.0  # C of scikit-learn, for standardized states


def fit(
    lm: LanguageModel,
    steering: list[Encoded],
    others: list[Encoded],
    layers: list[int],
    max_tokens: int = 2048,
    seed: int = 0,
) -> Gate:
    """Learn to tell the states of steering examples, prompts and responses, from other text.

    layers: those that are steered; the others have no gates (NaN).
    max_tokens: positions computed at a time. seed: which positions are read, where there are more
        than `POSITIONS` of a kind.
    Raises UserError if there are no examples or no other text, or their states are no numbers.
    """
    for name, items in (("steering examples", steering), ("other text", others)):
        if not items:
            raise UserError(f"a gate tells steering examples from other text, found no {name}")
    generator = torch.Generator().manual_seed(seed)
    mine, theirs = (
        _states(lm, items, layers, max_tokens, generator, f"states of {name}")
        for items, name in ((steering, "steering examples"), (others, "other text"))
    )
    labels = [1] * len(mine[layers[0]]) + [0] * len(theirs[layers[0]])
    weights = torch.full((len(lm.layers), lm.hidden_size), torch.nan)
    biases = torch.full((len(lm.layers),), torch.nan)
    for layer in tqdm(layers, desc="gates", unit="layer"):
        states = torch.cat([mine.pop(layer), theirs.pop(layer)])
        if not states.isfinite().all():
            raise UserError(
                f"hidden states of layer {layer} are NaN or infinite: give dtype float32"
            )
        scaler, regression = (
            StandardScaler(),
            LogisticRegression(C=PENALTY, class_weight="balanced", solver="newton-cholesky"),
        )
        regression.fit(scaler.fit_transform(states.numpy()), labels)
        weight = regression.coef_[0] / scaler.scale_
        weights[layer] = torch.from_numpy(weight)
        biases[layer] = float(regression.intercept_[0] - weight @ scaler.mean_)
    return Gate(weights, biases)


@torch.inference_mode()
def _states(lm, items, layers, max_tokens, generator, what) -> dict[int, Tensor]:
    """layer -> (n, D) directions of the states at about `POSITIONS` positions of the items."""
    share = POSITIONS / sum(item.length for item in items)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for members in tqdm(
        batches([item.length for item in items], max_tokens), desc=what, unit="batch"
    ):
        batch, _ = packed_batch(lm, [items[index] for index in members])
        count, length = batch.embeds.shape[:2]
        read = (torch.arange(length) < batch.lengths[:, None]) & (
            torch.rand(count, length, generator=generator) < share
        )

        def keep(layer: int, states: Tensor, read=read) -> None:
            if layer in found:
                found[layer].append(normalize(states[read.to(states.device)].float(), dim=-1).cpu())

        replay(lm, batch.embeds, batch.kwargs, stop=max(layers) + 1, after=keep)
    return {layer: torch.cat(parts) for layer, parts in found.items()}
