"""The version of this package, which every manifest names."""

__version__ = "0.3.0"
