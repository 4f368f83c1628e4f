"""Vectors handed on to other programs, and taken from them (docs/interop.md).

from grains import export

export.write(lm, vectors, "gguf", "exports/truthful", alpha=0.02)
vectors = export.read_gguf(lm, "theirs.gguf")
"""

from grains.export.objects import (
    from_steering_vectors,
    read_arrays,
    read_gguf,
    to_repeng,
    to_steering_vectors,
)
from grains.export.plan import Check
from grains.export.write import write

__all__ = [
    "Check",
    "from_steering_vectors",
    "read_arrays",
    "read_gguf",
    "to_repeng",
    "to_steering_vectors",
    "write",
]
