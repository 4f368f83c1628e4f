"""Tiny random models of three text families, and small disks."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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
