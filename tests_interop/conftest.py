"""These tests need lm-eval, and the packages of `tests`."""
