"""What many tests share: SmolLM2-135M-Instruct, tiny models of three families, small disks."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grains import models

FAMILIES = ("llama", "qwen2", "gemma3")
ATTENTIONS = ("sdpa", "eager")
SLIDING_WINDOW = 8
SIZES = {
    "vocab_size": 49152,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def tiny_config(family: str, **changes):
    """The config of a tiny model of a family; Gemma-3 with sliding and full layers."""
    sizes = SIZES | changes
    if family == "llama":
        return LlamaConfig(**sizes)
    if family == "qwen2":
        return Qwen2Config(**sizes)
    kinds = ("sliding_attention", "full_attention", "sliding_attention", "sliding_attention")
    layers = sizes["num_hidden_layers"]
    return Gemma3TextConfig(
        **{
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": [kinds[i % 4] for i in range(layers)],
        }
        | sizes
    )


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights so large that attention and logits are far from flat.

    With the usual small ones a wrong mask or position hardly shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.35 * noise)
            elif "norm" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.35 * noise)
    return model


def tiny_model(family: str, attention: str = "sdpa", seed: int = 0, **changes):
    """A random transformers model of a family, `changes` to its config."""
    kinds = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "gemma3": Gemma3ForCausalLM}
    config = tiny_config(family, **changes)
    config._attn_implementation = attention
    return randomise(kinds[family](config), seed).eval()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in fp32 on the CPU, converted once to the cache."""
    return models.load(models.EMBEDDED, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def tokenizer():
    """SmolLM2's tokenizer (49,152 words), which the tiny models use too."""
    return AutoTokenizer.from_pretrained(models.embedded_model())


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


@pytest.fixture(
    scope="session", params=[(f, a) for f in FAMILIES for a in ATTENTIONS], ids="-".join
)
def tiny(request, make_tiny):
    """A tiny model of every family, with sdpa and with eager attention."""
    return make_tiny(*request.param)


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, make_tiny):
    """A tiny model of every family, with sdpa attention."""
    return make_tiny(request.param)


@contextmanager
def mounted_disk(folder, size: str):
    """A file system of a few KiB or MiB at a new folder, where one can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
