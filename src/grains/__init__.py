"""GrAInS: gradient-based attribution for inference-time steering (arXiv 2507.18043).

The whole method from Python:

    lm = grains.load("smollm2-135m-instruct")
    vectors = grains.fit(lm, pairs, method="gradient")
    with vectors.apply(lm, 0.01):
        print(grains.generate(lm, "What colour is a polar bear's skin?"))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grains.version import __version__

if TYPE_CHECKING:
    from grains.api import attribute, fit, generate, load, score, stream
    from grains.steering import SteeringVectors

__all__ = [
    "SteeringVectors",
    "__version__",
    "attribute",
    "fit",
    "generate",
    "load",
    "score",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import the library at its first use: it takes seconds, which `--help` need not wait for."""
    if name not in __all__:
        raise AttributeError(f"module 'grains' has no attribute '{name}'")
    module = "grains.steering" if name == "SteeringVectors" else "grains.api"
    return getattr(import_module(module), name)
