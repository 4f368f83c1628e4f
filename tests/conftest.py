"""Fixtures that many tests share: SmolLM2-135M-Instruct, tiny models of three families."""

import gc

gc.disable()  # until all tests are collected: what the libraries make while imported stays

from itertools import product

import pytest
from helpers import short_texts
from helpers.families import ATTENTIONS, FAMILIES, small_tokenizer, tiny_model
from transformers import AutoTokenizer

from grains import cpu, models
from grains.study import costs

# What takes long: scripts as processes of their own, and the real model.
SLOW = {"commands", "server_with", "smollm2"}
# Of the tiny models, those that `make test-fast` uses: with and without a sliding window.
QUICK = ["llama", "gemma3", ("llama", "sdpa"), ("gemma3", "eager")]


def pytest_collection_finish():
    """What the libraries made while they were imported is not searched for garbage any more, and
    freed memory is kept, as the scripts do it."""
    gc.collect()
    gc.freeze()
    gc.enable()
    cpu.keep_freed_memory()


def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32 on the CPU, converted once to the cache."""
    return models.load(models.EMBEDDED, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny models' tokenizer: SmolLM2's, with the first of its words."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """SmolLM2's tokenizer with all of its 49,152 words."""
    return AutoTokenizer.from_pretrained(models.embedded_model())


@pytest.fixture
def few_texts(monkeypatch):
    """This process reads the few passages and questions that commands with `short_texts` read."""
    for name in ("neutral_texts", "unrelated_examples"):
        monkeypatch.setattr(costs, name, getattr(costs, name))  # which puts them back
    short_texts.install()


@pytest.fixture(scope="session")
def make_tiny(tokenizer):
    """make_tiny(family, attention="sdpa", seed=0, **config changes) -> LanguageModel."""
    made = {}

    def make(family, attention="sdpa", seed=0, **changes):
        key = (family, attention, seed, *sorted(changes.items()))
        if key not in made:
            model = tiny_model(family, attention, seed, **changes)
            made[key] = models.wrap(f"tiny-{family}", model, tokenizer)
        return made[key]

    return make


def _slow_but_quick(values):
    """Parameters of a fixture, of which `make test-fast` leaves out those that are not quick."""
    return [v if v in QUICK else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.fixture(
    scope="session", params=_slow_but_quick(product(FAMILIES, ATTENTIONS)), ids="-".join
)
def tiny(request, make_tiny):
    """A tiny model of every family, with sdpa and with eager attention."""
    return make_tiny(*request.param)


@pytest.fixture(scope="session", params=_slow_but_quick(FAMILIES))
def family(request, make_tiny):
    """A tiny model of every family, with sdpa attention."""
    return make_tiny(request.param)
