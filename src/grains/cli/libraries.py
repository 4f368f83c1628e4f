"""Imports transformers' model code without the libraries that it imports and we never use.

It asks for SciPy and scikit-learn (object detection, assisted generation), for torch's compiler
(decorators of functions that are compiled only where a caller compiles) and for sharded tensors
(models spread over several processes). They take two thirds of its import, so while it lasts the
first two look as if they were not installed, the compiler is a stand-in that gives way to the real
one when anything asks for more of it, and torch looks as if it was built without its distributed
part. Afterwards all of them can be imported as always.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

from transformers.utils import import_utils

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")


def import_models() -> None:
    """Import the model code of transformers, which all models share."""
    with _without_scipy(), without_compiler(), _names_from_the_end():
        _without_sharding()
        import transformers.generation.utils
        import transformers.modeling_utils
    with _names_from_the_end():
        import transformers.processing_utils  # noqa: F401  # it reads the model files once more


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Whether they are installed is asked anew before and afterwards."""
    asked = (import_utils.is_scipy_available, import_utils.is_sklearn_available)
    hidden = {"scipy", "sklearn"} - {*sys.modules}
    for is_available in asked:
        is_available.cache_clear()
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # none of them is found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        for is_available in asked:
            is_available.cache_clear()


def _without_sharding() -> None:
    """transformers keeps the answer, so that what it did not import is not used either.

    A group of processes needs nothing of it: each of them holds a whole model.
    """
    import_utils.is_torch_distributed_available.cache_clear()
    with mock.patch("torch.distributed.is_available", lambda: False):
        import_utils.is_torch_distributed_available()


@contextmanager
def _names_from_the_end() -> Iterator[None]:
    """transformers reads what every one of its model files exports: without the lines before it."""
    exported = import_utils.fetch__all__

    def fetch(text: str) -> list[str]:
        return exported(text[text.rfind("\n__all__") + 1 :])

    with mock.patch.object(import_utils, "fetch__all__", fetch):
        yield


class _StandIn(ModuleType):
    """A module of which only given parts are needed; for any other the real one is imported."""

    def __init__(self, name: str, **parts: Any):
        super().__init__(name)
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        # The import of one of its modules asks for the path of the compiler.
        if name.startswith("__") and (self.__name__, name) != (COMPILER, "__path__"):
            raise AttributeError(name)
        _drop_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _drop_stand_ins() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]


def _as_it_is(function: Callable | None = None, *args: Any, **options: Any) -> Callable:
    return function or _as_it_is


def _index_by_tensors() -> Any:
    """The compiler's own context, which a mask of an unusual form is made in."""
    return importlib.import_module(INDEXING).TransformGetItemToIndex()


@contextmanager
def without_compiler() -> Iterator[None]:
    """The compiler is a stand-in within the block.

    Also for loading a model: torch asks for it where tensors have no values yet (meta).
    """
    parts: dict[str, dict[str, Any]] = {
        COMPILER: dict.fromkeys(DECORATORS, _as_it_is),
        INDEXING: {"TransformGetItemToIndex": _index_by_tensors},
    }
    # A part of the compiler that was imported has imported the rest.
    if not sys.modules.keys() & parts.keys():
        sys.modules |= {name: _StandIn(name, **given) for name, given in parts.items()}
    try:
        yield
    finally:
        _drop_stand_ins()
