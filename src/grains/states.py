"""The hidden states that stage 1 keeps, in memory or in a file, and the names of its tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from grains.errors import UserError
from grains.lm import LanguageModel
from grains.runs import read_header
from grains.settings import NEED_ABLATION, NO_ATTRIBUTION

# Hidden states at the last position of x y+ and x y-, plain and with the selected tokens ablated:
# (N, L+1, D) each; index 0 is the embedding, l+1 the output of layer l before the final norm.
POS, NEG = "hidden_pos_response", "hidden_neg_response"
POS_ABLATED, NEG_ABLATED = f"{POS}_ablated", f"{NEG}_ablated"
# What the files of all selections have in common; norms (N, L+1), gradients (N, L+1, D).
SHARED = (POS, NEG, "norms", "gradients")
EXAMPLES_AT_A_TIME = 4096
# What the header of a file says, as far as later stages read it.
MANIFEST: dict[str, type] = {
    "top": str,
    "seed": int,
    "model.model": str,
    "model.num_layers": int,
    "model.hidden_size": int,
    "data.fingerprint": str,
    "data.questions": list,
    "settings": dict,
}


def stored(is_ablated: bool) -> tuple[str, ...]:
    """The arrays of a file of hidden states."""
    return (*SHARED, POS_ABLATED, NEG_ABLATED) if is_ablated else SHARED


class States(ABC):
    """The hidden states of N examples, plain and with the tokens of one selection ablated.

    info: the manifest of stage 1. layers: L, the number of decoder layers.
    """

    info: dict
    layers: int

    @abstractmethod
    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        """(n, D): array `name` at index `layer` (0: embeddings) for examples start to end-1."""

    @abstractmethod
    def _norms(self) -> np.ndarray:
        """(N, L+1)."""

    @property
    def count(self) -> int:
        """N."""
        return len(self._norms())

    def layer(self, name: str, layer: int) -> Iterator[np.ndarray]:
        """Array `name` after a decoder layer, as fp64 chunks (n, D) of the N examples.

        Raises UserError for NaN or infinite values.
        """
        count = self.count
        for start in range(0, count, EXAMPLES_AT_A_TIME):
            end = min(start + EXAMPLES_AT_A_TIME, count)
            rows = self._rows(name, layer + 1, start, end).astype(np.float64)
            if not np.isfinite(rows).all():
                raise UserError(
                    f"the hidden states ({name}, layer {layer}) hold NaN or infinite values: make "
                    "them again"
                )
            yield rows

    def norms(self) -> Tensor:
        """(L,) the median over examples of the median over positions of ||h_l||."""
        return torch.from_numpy(np.median(self._norms()[:, 1:], axis=0)).float()

    def difference(self, name: str, subtracted: str, layer: int) -> Iterator[np.ndarray]:
        """Array `name` minus array `subtracted` after a decoder layer, in chunks (n, D)."""
        pairs = zip(self.layer(name, layer), self.layer(subtracted, layer), strict=True)
        for minuend, subtrahend in pairs:
            yield minuend - subtrahend

    @property
    def is_ablated(self) -> bool:
        """Whether tokens were ablated as well."""
        return self.info["settings"].get("grad_method") != NO_ATTRIBUTION

    def check_methods(self, methods: Iterable[str]) -> None:
        """Raise UserError if one of these methods needs ablated states and there are none."""
        missing = [method for method in methods if method in NEED_ABLATION]
        if missing and not self.is_ablated:
            raise UserError(
                f"the hidden states were made with grad_method {NO_ATTRIBUTION}, without ablation, "
                f"so they give no {', '.join(missing)}: run token_ablation.py with another "
                "grad_method, or leave these methods out"
            )

    def shifts(self, layer: int) -> Iterator[np.ndarray]:
        """h(plain) - h(ablated) after a layer, 2N rows for both responses, in chunks (n, D)."""
        for plain, ablated in ((POS, POS_ABLATED), (NEG, NEG_ABLATED)):
            yield from self.difference(plain, ablated, layer)


class StatesInMemory(States):
    """The states of examples without a file.

    tensors: for every example, the tensors that `stage1.one_example`, `stage1.plain` or
        `stage1.states_alone` makes. top: the selection. info: the manifest of stage 1.
    """

    def __init__(self, tensors: list[dict[str, Tensor]], top: str, info: dict):
        names = {name: name for name in SHARED}
        names |= {name: f"{name}.{top}" for name in (POS_ABLATED, NEG_ABLATED)}
        self.info = info | {"top": top}
        self._arrays = {
            name: torch.stack([item[source] for item in tensors]).numpy()
            for name, source in names.items()
            if source in tensors[0]  # not every method needs all of them
        }
        self.layers = self._arrays[POS].shape[1] - 1

    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        return self._arrays[name][start:end, layer]

    def _norms(self) -> np.ndarray:
        return self._arrays["norms"]


class StatesFile(States):
    """The states in a file of stage 1, read layer by layer: it need not fit in memory.

    top: the selection that is expected; None: any.
    Raises UserError if the file is missing, cut short, of another kind or selection, or if its
    arrays are not those that its header says.
    """

    def __init__(self, path: str | Path, top: str | None = None):
        self.path = Path(path)
        self.info = read_header(self.path)
        if self.info.get("stage") != "token_ablation":
            raise UserError(f"'{path}' holds no hidden states of token_ablation.py")
        for name, kind in MANIFEST.items():
            value: Any = self.info
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self._changed(f"its header lacks {name}")
        if top not in (None, self.info["top"]):
            raise UserError(
                f"'{path}' holds the '{self.info['top']}' hidden states, expected the '{top}' "
                "ones: give the file of that selection"
            )
        self._file = safe_open(str(self.path), framework="np")
        self.layers = self.info["model"]["num_layers"]
        self._check_arrays()

    def _check_arrays(self) -> None:
        examples = len(self.info["data"]["questions"])
        shape = [examples, self.layers + 1, self.info["model"]["hidden_size"]]
        if min(shape) < 1 or self.layers < 1:
            raise self._changed(f"its header says {examples} examples, {self.layers} layers")
        for name in stored(self.is_ablated):
            if name not in self._file.keys():  # noqa: SIM118 (safe_open has no `in`)
                raise self._changed(f"{name} is missing")
            array = self._file.get_slice(name)
            expected = shape[:2] if name == "norms" else shape
            if array.get_dtype() != "F32" or array.get_shape() != expected:
                raise self._changed(
                    f"{name} is {array.get_dtype()} {array.get_shape()}, where its header says "
                    f"F32 {expected}"
                )

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"'{self.path}' is not as token_ablation.py writes it: {what}; was it changed? make it "
            "again"
        )

    def _rows(self, name: str, layer: int, start: int, end: int) -> np.ndarray:
        return self._file.get_slice(name)[start:end, layer]

    def _norms(self) -> np.ndarray:
        return self._file.get_tensor("norms")

    def check_model(self, lm: LanguageModel) -> None:
        """Raise UserError unless these states were made with this model, in this precision."""
        recorded, loaded = self.info["model"], lm.identity()
        wrong = [key for key in loaded if key != "model" and recorded.get(key) != loaded[key]]
        if wrong:
            raise UserError(
                f"'{self.path}' is of another model, {recorded['model']} "
                f"({recorded['num_layers']} layers of size {recorded['hidden_size']}, "
                f"{recorded.get('dtype')}), not of {lm.name} ({len(lm.layers)} layers of size "
                f"{lm.hidden_size}, {lm.dtype}): give the model and dtype of stage 1"
            )
