"""GrAInS: gradient-based attribution for inference-time steering (arXiv 2507.18043)."""

__version__ = "0.2.0"
