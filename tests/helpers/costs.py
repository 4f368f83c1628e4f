"""Perplexity and accuracy of texts and questions as they are, in a single call."""

import numpy as np

from grains.data import Example
from grains.lm import LanguageModel
from grains.prompts import encode
from grains.scoring import margins, score_all
from grains.steering import Configuration
from grains.study.costs import accuracy_of, continuation, perplexity_of


def perplexity(
    lm: LanguageModel, texts: list[str], configurations: list[Configuration], max_tokens: int
) -> np.ndarray:
    """exp of the mean negative log-likelihood per predicted token over all texts.

    A BOS that the tokenizer writes is read, not predicted; without one, the first token of a text
    takes its place.

    max_tokens: positions computed at a time. Returns (1 + C,), the base model first.
    Raises UserError for a text of which no token is predicted, or longer than the context.
    """
    encoded = [continuation(lm, text) for text in texts]
    return perplexity_of(encoded, score_all(lm, encoded, configurations, max_tokens))


def capability(
    lm: LanguageModel, examples: list[Example], configurations: list[Configuration], max_tokens: int
) -> dict[str, np.ndarray]:
    """Accuracy on multiple-choice questions in the prompt style qa.

    max_tokens: positions computed at a time.
    Returns (1 + C,) accuracies, the base model first, by how choices are compared: their
    log-likelihoods in sum ("sum") or per token ("token").
    """
    encoded = [encode(lm, example, "qa") for example in examples]
    return accuracy_of(margins(encoded, score_all(lm, encoded, configurations, max_tokens)))
