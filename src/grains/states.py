"""What stage 1 keeps: the names of its tensors, and the file that later stages read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.runs import read_header

# Last-position hidden states of x y+ and x y-, as they are and with the selected tokens ablated:
# (N, L+1, D) each, where index 0 is the embedding and l+1 the output of layer l.
POS, NEG = "hidden_pos_response", "hidden_neg_response"
POS_ABLATED, NEG_ABLATED = f"{POS}_ablated", f"{NEG}_ablated"
# What the files of all selections have alike; norms (N, L+1), gradients (N, L+1, D).
SHARED = (POS, NEG, "norms", "gradients")
EXAMPLES_AT_A_TIME = 4096


class States(ABC):
    """The hidden states of N examples, plain and with the tokens of one selection ablated.

    info: the manifest of where they come from. layers: L.
    """

    info: dict
    layers: int

    @abstractmethod
    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        """(n, D) of array `name` at index `layer` for some examples."""

    @abstractmethod
    def _norms(self) -> np.ndarray:
        """(N, L+1)."""

    @property
    def count(self) -> int:
        return len(self._norms())

    def layer(self, name: str, layer: int) -> Iterator[np.ndarray]:
        """Array `name` after decoder layer `layer` in parts (n, D) of some examples, in fp64."""
        count = self.count
        for start in range(0, count, EXAMPLES_AT_A_TIME):
            end = min(start + EXAMPLES_AT_A_TIME, count)
            yield self._rows(name, layer + 1, start, end).astype(np.float64)

    def norms(self) -> Tensor:
        """(L,) median over examples of the median over positions of ||h_l||."""
        return torch.from_numpy(np.median(self._norms()[:, 1:], axis=0)).float()

    def difference(self, name: str, subtracted: str, layer: int) -> Iterator[np.ndarray]:
        """Array `name` minus array `subtracted` after a layer, in parts (n, D)."""
        for a, b in zip(self.layer(name, layer), self.layer(subtracted, layer), strict=True):
            yield a - b

    def shifts(self, layer: int) -> Iterator[np.ndarray]:
        """h(plain) - h(ablated) after a layer, 2N rows for both responses, in parts (n, D)."""
        for plain, ablated in ((POS, POS_ABLATED), (NEG, NEG_ABLATED)):
            yield from self.difference(plain, ablated, layer)


class StatesInMemory(States):
    """States of examples as stage 1 makes them, without a file.

    tensors: of every example what `stage1.one_example` gives. top: the selection.
    """

    def __init__(self, tensors: list[dict[str, Tensor]], top: str, info: dict):
        names = {name: name for name in SHARED}
        names |= {name: f"{name}.{top}" for name in (POS_ABLATED, NEG_ABLATED)}
        self.info = info | {"top": top}
        self._arrays = {
            name: torch.stack([item[source] for item in tensors]).numpy()
            for name, source in names.items()
            if source in tensors[0]  # methods that ablate nothing have no ablated states
        }
        self.layers = self._arrays["gradients"].shape[1] - 1

    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        return self._arrays[name][start:end, layer]

    def _norms(self) -> np.ndarray:
        return self._arrays["norms"]


class StatesFile(States):
    """A file of stage 1, read a layer at a time so that it need not fit in memory.

    Raises UserError if it is missing, cut short or something else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.info = read_header(self.path)
        if self.info.get("stage") != "token_ablation":
            raise UserError(f"'{path}' holds no hidden states of token_ablation.py")
        self._file = safe_open(str(self.path), framework="np")
        self.layers = self._file.get_slice("gradients").get_shape()[1] - 1

    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        return self._file.get_slice(name)[start:end, layer]

    def _norms(self) -> np.ndarray:
        return self._file.get_tensor("norms")

    def check_model(self, lm: LanguageModel) -> None:
        """Raise UserError unless these states are of this model."""
        theirs, ours = self.info["model"], lm.identity()
        wrong = [key for key in ours if key != "model" and theirs.get(key) != ours[key]]
        if wrong:
            raise UserError(
                f"'{self.path}' is of another model: {theirs['model']} ({theirs['num_layers']} "
                f"layers of size {theirs['hidden_size']}) there, {lm.name} ({len(lm.layers)} of "
                f"size {lm.hidden_size}) here, or the same in another precision (states in "
                f"{theirs.get('dtype')}, now {lm.dtype}); give the model and dtype of stage 1"
            )
