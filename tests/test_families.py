"""Text families beside the three of conftest, each against a second copy of its model.

What is compared and how is in benchmarks/families.py, which writes docs/families.md.
"""

from __future__ import annotations

import argparse
import math

import families
import pytest

import grains
from grains.cli import entry
from grains.errors import UserError
from grains.export import plan
from grains.selfcheck import can_decode, can_pad, check_decoding

pytestmark = pytest.mark.slow

PACKED = {
    "llama",
    "gpt_neox",
    "gptj",
    "falcon",
    "gemma2",
    "cohere2",
    "granite",
    "longcat_flash",
    "deepseek_v3",
    "phi",
    "phi3",
    "llama4_text",
    "gpt_oss",
    "olmo2",
    "nanochat",
}
APART = {
    "gpt2",
    "gpt_neo",
    "opt",
    "bloom",
    "mpt",
    "qwen3_next",
    "qwen3_5_text",
    "gemma3n_text",
    "gemma4_text",
    "granitemoehybrid",
    "lfm2",
    "minimax",
    "mamba2",
    "jamba",
    "bert",
    "deepseek_v4",
}
# Recurrent states in the cache, or what else a running batch of keys and values cannot hold.
OWN_DECODING = {
    "falcon",
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "lfm2",
    "minimax",
    "mamba2",
    "jamba",
    "gemma3n_text",
    "gemma4_text",
    "deepseek_v4",
    "longcat_flash",
}
# Several hidden states for each token, and where in a layer's tensor they lie.
STREAMS = {"gemma3n_text": (0, 4), "deepseek_v4": (2, 4)}
# Layers that read the keys and values of those below.
READ_BELOW = {"gemma3n_text", "gemma4_text"}
OWN_HEAD = set(STREAMS)
# Capped or scaled logits.
SHAPED = {
    "gemma2": (1.0, 5.0),
    "cohere2": (0.0625, math.inf),
    "granite": (0.5, math.inf),
    "nanochat": (1.0, 15.0),
}
OWN_EMBEDDINGS = {"gpt2", "gpt_neo", "opt", "bloom", "granite", "nanochat", "bert", *STREAMS}
REFUSED = {"zamba": "also take the embeddings", "roberta": "depend on the words before it"}


@pytest.fixture(scope="module", params=sorted(PACKED | APART))
def family(request):
    return families.load(request.param)


def test_how_it_is_replayed(family):
    lm, name = family.lm, family.name
    assert lm.packs == (name in PACKED)
    # Layers that count the positions in their cache themselves, or keep two caches each.
    assert lm.keeps_prefix == (name in PACKED - {"llama4_text", "longcat_flash"})
    assert lm.batches == (name not in {"bloom", "deepseek_v4"})
    assert lm.streams == STREAMS.get(name)
    assert lm.resumes == (name not in READ_BELOW)
    assert can_pad(lm) == (name not in {"minimax", "deepseek_v4"})
    assert can_decode(lm) == (name not in OWN_DECODING)
    assert lm.own_head == (name in OWN_HEAD)
    shape = lm.logit_shape
    assert (shape and (shape.scale, shape.cap)) == SHAPED.get(name)
    assert lm.own_embeddings == (name in OWN_EMBEDDINGS)


@pytest.mark.parametrize("check", families.CHECKS)
def test_it_is_the_models_own(family, check):
    difference = families.CHECKS[check](family)
    assert difference <= families.SAME


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_in_a_line(name):
    with pytest.raises(UserError, match=REFUSED[name]) as error:
        families.load(name)
    assert "\n" not in str(error.value)


def test_a_family_whose_own_decoding_is_wrong_does_not_write():
    """Two rows of RWKV in transformers: the second token is another one than a row alone gives."""
    lm = families.load("rwkv").lm
    with pytest.raises(UserError, match="its own decoding"):
        check_decoding(lm)


def test_states_side_by_side_are_one_longer_state(tmp_path):
    """Gemma-3n: vectors of all of a token's states are fitted, kept, applied; not exported."""
    lm = families.load("gemma3n_text").lm
    pairs = [("Is glass a slow liquid?", "No", "Yes"), ("Are bats blind?", "No, no", "Yes")]
    vectors = grains.fit(lm, pairs, method="caa")
    assert vectors.vectors.shape == (4, 4 * lm.model.config.hidden_size)
    vectors.save(tmp_path / "v.safetensors")
    read = grains.SteeringVectors.load(tmp_path / "v.safetensors")
    asked = "Is it?", ["No", "Yes"]
    with vectors.apply(lm, alpha=0.5, layers=[1, 2]):
        steered = grains.score(lm, *asked)
    assert abs(steered - grains.score(lm, *asked)).max() > 0.01
    with read.apply(lm, alpha=0.5, layers=[1, 2]):
        assert (grains.score(lm, *asked) == steered).all()
    with pytest.raises(UserError, match="4 hidden states for each token"):
        plan.make(lm, vectors, "lm-eval", 0.5)


def test_that_answers_are_computed_apart_is_said_once_at_loading(tmp_path, capsys):
    flags = argparse.Namespace(dtype="float32", device="cpu", device_map=None, quantize=None)
    for name, lines in (("gpt2", 1), ("llama", 0)):
        families.zoo.make(name).save_pretrained(tmp_path / name)
        families.tiny.byte_tokenizer().save_pretrained(tmp_path / name)
        entry.load_named(flags, str(tmp_path / name))
        assert capsys.readouterr().out.count("cannot share a row") == lines
