"""Imports transformers' model code without the libraries that it imports and we never use.

It asks for SciPy and scikit-learn (object detection, assisted generation), for torch's compiler
(decorators of functions that are compiled only where a caller compiles) and for sharded tensors
(models spread over several processes). They take two thirds of its import, so while it lasts the
first two look as if they were not installed, the compiler is a stand-in that gives way to the real
one when anything asks for more of it, and torch looks as if it was built without its distributed
part. So are SymPy and what the compiler does with it, which torch asks about sizes while a model
is loaded, when its tensors have no values yet (meta). Afterwards all of them can be imported as
always.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

COMPILER = "torch._dynamo"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
DECORATORS = ("disable", "allow_in_graph", "assume_constant_result")
ALGEBRA = "sympy"
SHAPES = "torch.fx.experimental.symbolic_shapes"
PACKAGES = (COMPILER, ALGEBRA)
READER = "transformers.utils.import_utils"


def import_models() -> None:
    """Import the model code of transformers, which all models share."""
    with _reading_once():
        import transformers

        with _without_scipy(), without_compiler():
            _without_sharding()
            import transformers.generation.utils
            import transformers.modeling_utils
        import transformers.processing_utils  # noqa: F401


@contextmanager
def _reading_once() -> Iterator[None]:
    """transformers reads what every one of its model files exports, line by line and three times:
    within the block once, and without the lines before it."""
    quick: dict[str, Callable] = {}

    def find_spec(name: str, path: Any, target: Any = None) -> None:
        """Find no module. But the reader can be changed as soon as it is imported itself."""
        reader = sys.modules.get(READER)
        if quick or reader is None or not hasattr(reader, "define_import_structure"):
            return
        exported, read = reader.fetch__all__, reader.create_import_structure_from_path
        quick["fetch__all__"] = lambda text: exported(text[text.rfind("\n__all__") + 1 :])
        quick["create_import_structure_from_path"] = functools.cache(read.__wrapped__)
        for function in quick:
            changed.enter_context(mock.patch.object(reader, function, quick[function]))

    finder: Any = SimpleNamespace(find_spec=find_spec)
    with ExitStack() as changed:
        sys.meta_path.insert(0, finder)
        changed.callback(sys.meta_path.remove, finder)
        yield


@contextmanager
def _without_scipy() -> Iterator[None]:
    """Whether they are installed is asked anew before and afterwards."""
    from transformers.utils import import_utils

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
    from transformers.utils import import_utils

    import_utils.is_torch_distributed_available.cache_clear()
    with mock.patch("torch.distributed.is_available", lambda: False):
        import_utils.is_torch_distributed_available()


class _StandIn(ModuleType):
    """A module of which only given parts are needed; for any other the real one is imported."""

    def __init__(self, name: str, **parts: Any):
        super().__init__(name)
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        # The import of one of its modules asks for the path of a package.
        if name.startswith("__") and (name != "__path__" or self.__name__ not in PACKAGES):
            raise AttributeError(name)
        return _real(self.__name__, name)


def _real(module: str, name: str) -> Any:
    _drop_stand_ins()
    return getattr(importlib.import_module(module), name)


def _drop_stand_ins() -> None:
    for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
        del sys.modules[name]


def _as_it_is(function: Callable | None = None, *args: Any, **options: Any) -> Callable:
    return function or _as_it_is


def _itself(value: Any) -> Any:
    return value


def _index_by_tensors() -> Any:
    """The compiler's own context, which a mask of an unusual form is made in."""
    return _real(INDEXING, "TransformGetItemToIndex")()


def _equal(first: Any, second: Any) -> bool:
    """Whether two sizes, or lists or tuples of them, are equal."""
    return first == second if isinstance(first, int) else [*first] == [*second]


# What is asked about sizes, and the answer where all of them are numbers.
ANSWERS: dict[str, Callable] = {
    "expect_true": _itself,
    "guard_or_false": _itself,
    "guard_or_true": _itself,
    "guard_size_oblivious": _itself,
    "guarding_hint_or_throw": _itself,
    "statically_known_true": _itself,
    "has_guarding_hint": lambda size: True,
    "is_nested_int": lambda size: False,
    "sym_and": lambda *conditions: all(conditions),
    "sym_or": lambda *conditions: any(conditions),
    "sym_eq": _equal,
}


def _answer(name: str) -> Callable:
    """A function of the compiler's that is answered without it where sizes are numbers."""

    def ask(*sizes: Any, **options: Any) -> Any:
        if options or not _is_plain(sizes):
            return _real(SHAPES, name)(*sizes, **options)
        return ANSWERS[name](*sizes)

    return ask


def _is_plain(size: Any) -> bool:
    return isinstance(size, (int, float)) or (
        isinstance(size, (list, tuple)) and all(map(_is_plain, size))
    )


@contextmanager
def without_compiler() -> Iterator[None]:
    """The compiler and SymPy are stand-ins within the block."""
    parts: dict[str, dict[str, Any]] = {
        COMPILER: dict.fromkeys(DECORATORS, _as_it_is),
        INDEXING: {"TransformGetItemToIndex": _index_by_tensors},
        ALGEBRA: {"Basic": type("Basic", (), {})},  # a class that nothing is of
        SHAPES: {name: _answer(name) for name in ANSWERS},
    }
    missing = parts.keys() - sys.modules.keys()
    sys.modules |= {name: _StandIn(name, **parts[name]) for name in missing}
    try:
        yield
    finally:
        if missing:
            _drop_stand_ins()
