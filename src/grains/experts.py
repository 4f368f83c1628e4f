"""Mixtures of experts: the experts that routers choose, noted at one input and kept at others.

A router takes the k largest of a token's scores, so what it chooses jumps along a path of
embeddings. With the choice kept, a layer is a smooth function of its hidden states: scores of the
chosen experts still follow them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig


@dataclass
class Experts:
    """What the routers of a decoder chose for one sequence, or for each sequence of a trie.

    counts: how many experts there are, by the model's config; a router has as many scores a token.
    chosen: (layer, sequence, call of that layer) -> the indices (T, ..., k) that were chosen.
    noting: whether choices are noted; if not, those noted before are made again.
    """

    counts: frozenset[int]
    chosen: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    noting: bool = True

    def routing(self, layer: int, sequence: int, tokens: int) -> TorchFunctionMode:
        """A block in which a layer is called with R rows of a sequence of so many tokens."""
        return _Routing(self, (layer, sequence), tokens)


def counts(config: PretrainedConfig) -> frozenset[int]:
    """The numbers of experts in a config; none for a model without."""
    values = config.get_text_config().to_dict().items()
    return frozenset(
        value for name, value in values if re.search("experts?$", name) and type(value) is int
    )


class _Routing(TorchFunctionMode):
    def __init__(self, experts: Experts, place: tuple[int, int], tokens: int) -> None:
        super().__init__()
        self.experts, self.place, self.tokens = experts, place, tokens
        self.calls = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, Tensor.topk) or not self._routes(args[0]):
            return func(*args, **kwargs)
        key = (*self.place, self.calls)
        self.calls += 1
        if self.experts.noting:
            result = func(*args, **kwargs)
            self.experts.chosen[key] = result.indices
            return result
        scores, chosen = args[0], self.experts.chosen[key]
        index = chosen.repeat(len(scores) // len(chosen), *[1] * (chosen.dim() - 1))
        return torch.return_types.topk((scores.gather(-1, index), index))

    def _routes(self, scores: Tensor) -> bool:
        """Whether these are scores of experts (R T, E), of groups of them, or (R, T, E)."""
        if scores.dim() == 3 and scores.shape[1] == self.tokens:  # or an indexer's of positions
            return scores.shape[-1] in self.experts.counts
        return scores.dim() in (2, 3) and len(scores) % self.tokens == 0
