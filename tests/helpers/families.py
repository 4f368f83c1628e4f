"""Tiny random models of three text families, and small disks."""

import json
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

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
WORDS = 4096  # of the tokenizer that the tiny models read
SIZES = {
    "vocab_size": WORDS,
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


def small_tokenizer(**options):
    """SmolLM2's own tokenizer with the first 4,096 of its 49,152 words; `options` of its loading.

    With all of them, nine tenths of a tiny model's time would go into its head.
    """
    return AutoTokenizer.from_pretrained(_small_vocabulary().name, **options)


@cache
def _small_vocabulary() -> TemporaryDirectory:
    """A folder with SmolLM2's special tokens, its bytes and the first of its merges."""
    folder = TemporaryDirectory(prefix="words-")
    for path in models.embedded_model().glob("*token*"):
        shutil.copy(path, folder.name)
    shutil.copy(models.embedded_model() / "chat_template.jinja", folder.name)
    path = Path(folder.name) / "tokenizer.json"
    described = json.loads(path.read_text())
    model = described["model"]
    model["vocab"] = {word: number for word, number in model["vocab"].items() if number < WORDS}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(described))
    return folder


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


def randomise(
    model: torch.nn.Module, seed: int = 0, weights: float = 0.35, norms: float = 0.2
) -> torch.nn.Module:
    """Random weights so large that attention and logits are far from flat.

    weights, norms: standard deviations of weights and biases, and of what is added to norms.

    With the usual small ones a wrong mask or position hardly shows.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(weights * noise)
            elif "norm" in name:
                parameter.add_(norms * noise)
            else:
                parameter.copy_(weights * noise)
    return model


def tiny_model(
    family: str,
    attention: str = "sdpa",
    seed: int = 0,
    weights: float = 0.35,
    norms: float = 0.2,
    **changes,
):
    """A random transformers model of a family, `changes` to its config (see `randomise`)."""
    kinds = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM, "gemma3": Gemma3ForCausalLM}
    config = tiny_config(family, **changes)
    config._attn_implementation = attention
    return randomise(kinds[family](config), seed, weights, norms).eval()


@contextmanager
def mounted_disk(folder, size: str):
    """A file system of a few KiB or MiB at a new folder, where one can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
