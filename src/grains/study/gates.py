"""Gates: steer only where the hidden states look like those of the steering examples.

A vector added at every position also changes texts that it was not made for, at a cost there. A
gate scales it at each position by how much the position's own state looks like the steering
examples':

    h' = (h + g(h) v) ||h|| / ||h + g(h) v||,    g(h) = sigmoid(w . h / ||h|| + b)

w and b of a layer are a logistic regression between the unsteered states of the steering examples
and those of other text. A gate stays shut only on kinds of text it was fitted on: text unlike both
kinds may cost more. Conditional activation steering (Lee et al. 2024, arXiv 2409.05907) decides so
once for a prompt; the paper steers everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded, encode
from grains.replay import replay
from grains.scoring import batches, packed_batch
from grains.settings import PromptSettings
from grains.steering import Gate

POSITIONS = 4096  # positions read of each kind of text, about
PENALTY = 1.0  # C of scikit-learn, for standardized states


def fit(
    lm: LanguageModel,
    steering: list[Encoded],
    background: list[Encoded],
    layers: list[int],
    max_tokens: int = 2048,
    seed: int = 0,
) -> Gate:
    """Fit a classifier between the states of steering examples, prompts and responses, and others.

    background: the other text. layers: those that are steered; at all others weights are NaN.
    max_tokens: positions computed at a time. seed: draws the positions that are read, where there
        are more than `POSITIONS` of a kind.
    Raises UserError without examples or other text, and for states that are NaN or infinite.
    """
    # It takes a second to import, and an experiment that goes on has its gates already.
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    kinds = {"steering examples": steering, "other text": background}
    for name, items in kinds.items():
        if not items:
            raise UserError(
                f"a gate is fitted between steering examples and other text, found no {name}"
            )
    generator = torch.Generator().manual_seed(seed)
    positive, negative = (
        _states(lm, items, layers, max_tokens, generator, f"states of {name}")
        for name, items in kinds.items()
    )
    labels = [1] * len(positive[layers[0]]) + [0] * len(negative[layers[0]])
    weights = torch.full((len(lm.layers), lm.hidden_size), torch.nan)
    biases = torch.full((len(lm.layers),), torch.nan)
    for layer in tqdm(layers, desc="gates", unit="layer"):
        states = torch.cat([positive.pop(layer), negative.pop(layer)])
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


def around(
    lm: LanguageModel, pairs: list[Example], prompt: PromptSettings, max_tokens: int, seed: int
) -> Gate:
    """The gate at all layers between steering examples and other text.

    That text is training text of this project, and the examples' questions without their context
    (see `costs.gate_background`). max_tokens, seed: see `fit`.
    """
    from grains.study import costs  # late: it takes scipy along, and most runs have no gate

    encoded = [encode(lm, pair, prompt) for pair in pairs]
    background = costs.gate_background(lm, pairs, prompt)
    return fit(lm, encoded, background, [*range(len(lm.layers))], max_tokens, seed)


@torch.inference_mode()
def _states(
    lm: LanguageModel,
    items: list[Encoded],
    layers: list[int],
    max_tokens: int,
    generator: torch.Generator,
    description: str,
) -> dict[int, Tensor]:
    """layer -> (n, D) states of unit length at about `POSITIONS` positions of the items."""
    share = POSITIONS / sum(item.length for item in items)
    states_of: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for members in tqdm(
        batches([item.length for item in items], max_tokens), desc=description, unit="batch"
    ):
        batch, _ = packed_batch(lm, [items[index] for index in members])
        count, length = batch.embeds.shape[:2]
        read = (torch.arange(length) < batch.lengths[:, None]) & (
            torch.rand(count, length, generator=generator) < share
        )

        def keep(layer: int, states: Tensor, read: Tensor = read) -> None:
            if layer in states_of:
                states_of[layer].append(
                    normalize(states[read.to(states.device)].float(), dim=-1).cpu()
                )

        replay(lm, batch.embeds, batch.calls, stop=max(layers) + 1, after=keep)
    return {layer: torch.cat(parts) for layer, parts in states_of.items()}
