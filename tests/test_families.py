"""Text families beside the three of conftest, each against a second copy of its model.

What is compared and how is in benchmarks/families.py, which writes docs/families.md.
"""

from __future__ import annotations

import families
import pytest
import zoo

from grains.selfcheck import can_decode, can_pad

pytestmark = pytest.mark.slow

PACKED = {
    "llama",
    "gpt_neox",
    "gptj",
    "falcon",
    "gemma2",
    "cohere2",
    "granite",
    "phi",
    "phi3",
    "llama4_text",
    "gpt_oss",
    "olmo2",
    "nanochat",
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
}
OWN_HEAD = {"gemma2", "cohere2", "granite", "nanochat"}
OWN_EMBEDDINGS = {"gpt2", "gpt_neo", "opt", "bloom", "granite", "nanochat"}


@pytest.fixture(scope="module", params=zoo.FAMILIES)
def family(request):
    return families.load(request.param)


def test_how_it_is_replayed(family):
    lm, name = family.lm, family.name
    assert lm.packs == (name in PACKED)
    # Llama 4's layers count the positions in their cache themselves.
    assert lm.keeps_prefix == (name in PACKED - {"llama4_text"})
    assert lm.batches == (name != "bloom")
    assert can_pad(lm) == (name != "minimax")
    assert can_decode(lm) == (name not in OWN_DECODING)
    assert lm.own_head == (name in OWN_HEAD)
    assert lm.own_embeddings == (name in OWN_EMBEDDINGS)


@pytest.mark.parametrize("check", families.CHECKS)
def test_it_is_the_models_own(family, check):
    difference = families.CHECKS[check](family)
    if check == "ablation" and family.name == "gemma4_text":
        assert difference != difference  # not defined: its layers take the token ids too
    else:
        assert difference <= families.SAME
