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

from collections import Counter

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded, encode
from grains.scoring import SHARED, batches, read_states
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
    lm: LanguageModel,
    pairs: list[Example],
    prompt: PromptSettings,
    layers: list[int],
    max_tokens: int,
    seed: int,
) -> Gate:
    """The gate between steering examples and other text.

    That text is training text of this project, and the examples' questions without their context
    (see `costs.gate_background`). layers, max_tokens, seed: see `fit`.
    """
    from grains.study import costs  # late: it takes scipy along, and most runs have no gate

    encoded = [encode(lm, pair, prompt) for pair in pairs]
    background = costs.gate_background(lm, pairs, prompt)
    return fit(lm, encoded, background, layers, max_tokens, seed)


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
    numbers, count = _drawn(items, max_tokens, generator)
    states_of = {layer: torch.empty(count, lm.hidden_size) for layer in layers}

    def read(members: list[int]) -> None:
        number = pad_sequence([numbers[i] for i in members], batch_first=True, padding_value=-1)

        def keep(layer: int, positions: slice, states: Tensor) -> None:
            if layer in states_of:
                own = number[:, positions]
                drawn = own >= 0
                picked = states.expand(len(members), -1, -1)[drawn.to(states.device)]
                states_of[layer][own[drawn]] = normalize(picked.float(), dim=-1).cpu()

        read_states(lm, [items[index] for index in members], keep, max(layers) + 1)

    groups = [
        [alike[index] for index in members]
        for alike in _by_beginning(items)
        for members in batches([items[index].length for index in alike], max_tokens)
    ]
    for members in tqdm(groups, desc=description, unit="batch"):
        read(members)
    return states_of


def _drawn(
    items: list[Encoded], max_tokens: int, generator: torch.Generator
) -> tuple[dict[int, Tensor], int]:
    """Which positions of the items are read, drawn batch by batch.

    Returns for the index of each item (T,), the number of the row that a position is read into or
    -1, and the number of all rows.
    """
    share = POSITIONS / sum(item.length for item in items)
    numbers: dict[int, Tensor] = {}
    count = 0
    for members in batches([item.length for item in items], max_tokens):
        lengths = [items[index].packed_length for index in members]
        drawn = torch.rand(len(members), max(lengths), generator=generator) < share
        for index, length, row in zip(members, lengths, drawn, strict=True):
            own = row[:length]
            numbers[index] = torch.where(own, count + own.cumsum(0) - 1, -1)
            count += int(own.sum())
    return numbers, count


def _by_beginning(items: list[Encoded]) -> list[list[int]]:
    """Indices of the items that begin as most of them do, and of the others.

    What all of a batch begin with is computed once, and a few do not make a batch.
    """
    begins = [tuple(item.prompt_ids[: SHARED + 1]) for item in items]
    ((common, _),) = Counter(begins).most_common(1)
    alike = [index for index, begin in enumerate(begins) if begin == common]
    others = [index for index, begin in enumerate(begins) if begin != common]
    return [alike, others] if others and len(common) > SHARED else [[*range(len(items))]]
