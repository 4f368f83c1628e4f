"""Methods that hidden states alone do not give: made from the model and the examples."""

from __future__ import annotations

from collections.abc import Sequence

from grains import heads, prompts, vti
from grains.data import Example
from grains.lm import LanguageModel
from grains.settings import OF_HEADS, PromptSettings
from grains.vectors import FromModel


def make(
    lm: LanguageModel, examples: Sequence[Example], prompt: PromptSettings, seed: int, method: str
) -> FromModel:
    """What a method of `OF_MODEL` takes from the model and N examples with two answers each.

    Raises UserError as `heads.make` and `vti.make` do.
    """
    if method in OF_HEADS:
        encoded = (prompts.encode(lm, example, prompt) for example in examples)
        vectors, places = heads.make(lm, encoded, seed, method)
        return FromModel(vectors, None, {"heads": places})
    made = vti.make(lm, examples, seed)
    masks = {"hidden": vti.HIDDEN, "copies": vti.COPIES, "cells": vti.CELLS}
    return FromModel(None, made, {"tower": masks})
