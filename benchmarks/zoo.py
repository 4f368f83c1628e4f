"""Tiny random models of many text families, from their own config classes."""

from __future__ import annotations

import torch
from helpers.families import randomise
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

LAYERS, WINDOW = 4, 12
SIZES = {
    "vocab_size": 420,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 420}
OWN = {"vocab_size": 420, "hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
LINEAR = {
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
# What differs from SIZES; a family with a vocab_size here takes these sizes alone.
FAMILIES = {
    "llama": {},
    "gpt2": GPT,
    "gpt_neox": {},
    "gpt_neo": {
        "vocab_size": 420,
        "hidden_size": 48,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 256,
        "window_size": WINDOW,
    },
    "gptj": GPT | {"rotary_dim": 8},
    "opt": OWN | {"ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 48},
    "bloom": {"vocab_size": 420, "hidden_size": 48, "n_layer": 4, "n_head": 4},
    "falcon": OWN,
    "mpt": {"vocab_size": 420, "d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 256},
    "gemma2": {"head_dim": 12, "sliding_window": WINDOW, "final_logit_softcapping": 5.0},
    "cohere2": {"sliding_window": WINDOW, "head_dim": 12},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "phi": {},
    "phi3": {},
    "qwen3_next": LINEAR | EXPERTS,
    "qwen3_5_text": LINEAR,
    "gemma4_text": {
        "head_dim": 12,
        "global_head_dim": 12,
        "vocab_size_per_layer_input": 420,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "sliding_window": WINDOW,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 24,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {
        "head_dim": 12,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": WINDOW,
    },
    "gpt_oss": {
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 12,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "mamba2": OWN | {"num_heads": 4, "head_dim": 24, "state_size": 16, "n_groups": 1},
    "olmo2": {},
    "nanochat": {},
}


def make(family: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A model of a family whose random weights are large enough for mistakes to show."""
    sizes = FAMILIES[family]
    config = CONFIG_MAPPING[family](**(sizes if "vocab_size" in sizes else SIZES | sizes) | changes)
    torch.manual_seed(seed)
    return randomise(AutoModelForCausalLM.from_config(config), seed).eval()
