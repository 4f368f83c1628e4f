"""Tiny random models of every family that transformers can build, from their own config classes.

A family's default config is shrunk by the names of its settings (`RULES`); what cannot be guessed
from a name is in `SPECIAL`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from helpers.families import randomise
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LAYERS, WINDOW, VOCABULARY, WIDTH = 4, 12, 420, 48
BIGGEST = 30_000_000  # weights of a model that still counts as tiny
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Of what a setting's whole name says, its small value; the first that matches.
RULES = [
    (r"vocab_size(_per_layer_input)?|decoder_vocab_size", VOCABULARY),
    (
        r"(attention_)?hidden_size|d_model|n_embd|(word_)?embed(ding)?_(proj_)?(dim|size)|emb_dim"
        r"|(in|out)put_embedding_size|lru_width|dim_model_base|(proj|projection|out_hidden)_size"
        r"|out_dim",
        WIDTH,
    ),
    (r"(num_)?(encoder_|decoder_|hidden_|n_)?layers?(_per_stack)?|n_layers?|depth", LAYERS),
    (r"num_(key_value_heads|kv_heads|query_groups)|linear_num_key_heads", 2),
    (r"(global_|swa_|v_|attention_)?head_dim|kv_channels|d_head|attention_head_size|dim_head", 12),
    (r"(\w+_)?(num_|n_)?(\w+_)?heads?", 4),
    (r"(qk_rope|qk_nope|linear_key|linear_value|linear|index|indexer)_head_dim", 8),
    (r"hidden_size_per_layer_input|(mamba_|time_step_).*rank|rotary_dim", 8),
    (
        r".*(intermediate_size|ffn_dim|feed_forward_size|ffn_hidden_size|dff|dim_ff|d_inner)(_mlp)?",
        64,
    ),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length", 256),
    (r"max_target_positions|max_source_positions", 256),
    (r".*(window|chunk|block|(window|chunk|block)_size|chunk_length|local_attention)", WINDOW),
    (r"(n_routed|num|num_local|moe_num)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_?groups", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r".*(lora_rank|laurel_rank|adapter_rank|lowrank)|mamba_d_state|(ssm_)?state_size", 16),
    (r"max_window_layers|moe_layer_end_index", LAYERS),
]
LINEAR = {
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_n_groups": 1, "mamba_d_state": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
ROWS_AND_COLUMNS = {  # rotary positions with three parts of a head
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]}
}
# What the rules cannot know, or what makes a check harder.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "cohere2": {"sliding_window": WINDOW, "head_dim": 12} | MIXED,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"keep_window_size": 2048},  # beyond it the model itself depends on the row's length
    "dots1": MIXED | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_ssm": 96},
    "gemma2": {"head_dim": 12, "sliding_window": WINDOW, "final_logit_softcapping": 5.0} | MIXED,
    "gemma3n_text": MIXED
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]}
    | {"intermediate_size": 64},
    # A tower of timm's own tests instead of 300 million weights; vocabularies one after the other.
    "gemma3n": {
        "vision_config": {
            "model_type": "gemma3n_vision",
            "architecture": "test_efficientnet",
            "hidden_size": 256,
            "vocab_offset": VOCABULARY - 20,
            "vocab_size": 10,
        },
        "vision_soft_tokens_per_image": 4,
    },
    "gemma3n_audio": {"vocab_offset": VOCABULARY - 10, "vocab_size": 10},
    "gemma4_text": {"global_head_dim": 12, "num_kv_shared_layers": 2} | MIXED,
    "gpt_neo": {
        "num_layers": LAYERS,
        "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
    },
    "glm5_next_text": {"num_key_value_heads": 4},
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 1],
        }
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "granitemoehybrid": MAMBA
    | {
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 32,
    },
    "longcat_flash": {"zero_expert_num": 4},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 24, "n_groups": 1},
    "minimax": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "head_dim": 12,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp_text": LINEAR
    | {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 12,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "stablelm": {"partial_rotary_factor": 0.5},
    "xmod": {"default_language": "en_XX"},
    **dict.fromkeys(
        (
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm46v_text"),
            *("glm_ocr_text", "glmga_text", "paddleocr_vl_text"),
        ),
        ROWS_AND_COLUMNS,
    ),
    "zamba": {"attention_hidden_size": 96, "attention_head_dim": 24},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 4,
        "mamba_headdim": 24,
        "mamba_d_state": 16,
        "attention_head_dim": 24,
    },
}

KNOWN = {
    "apertus": "Apertus",
    "arcee": "Arcee AFM",
    "aria": "Aria",
    "aya_vision": "Aya Vision",
    "bamba": "Bamba",
    "bloom": "BLOOM",
    "chameleon": "Chameleon",
    "codegen": "CodeGen",
    "cohere": "Command-R",
    "cohere2": "Command-R7B, Command-A",
    "cohere2_vision": "Command-A Vision",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "DeepSeek-V3, R1",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_vl": "DeepSeek-VL",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5",
    "ernie4_5_moe": "ERNIE 4.5 A3B",
    "exaone4": "EXAONE 4",
    "falcon": "Falcon",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon-Mamba",
    "fuyu": "Fuyu",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma3_text": "Gemma 3, words alone",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n, words alone",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4, words alone",
    "glm": "GLM-4",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, 4.6",
    "glm4v": "GLM-4.1V",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "Pythia, GPT-NeoX",
    "gpt_oss": "gpt-oss",
    "gptj": "GPT-J",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 MoE",
    "granitemoehybrid": "Granite 4",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan",
    "idefics2": "Idefics2",
    "idefics3": "Idefics3",
    "internvl": "InternVL 3",
    "jamba": "Jamba",
    "kimi_linear": "Kimi-Linear",
    "lfm2": "LFM2",
    "llama": "Llama 1 to 3.3, SmolLM2",
    "llama4": "Llama 4",
    "llama4_text": "Llama 4, words alone",
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-1.6",
    "llava_onevision": "LLaVA-OneVision",
    "longcat_flash": "LongCat-Flash",
    "mamba": "Mamba",
    "mamba2": "Mamba-2, Codestral Mamba",
    "minicpm3": "MiniCPM3",
    "minimax": "MiniMax-01",
    "minimax_m2": "MiniMax-M2",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Mistral Nemo",
    "mistral3": "Mistral Small 3.1, Pixtral",
    "mixtral": "Mixtral",
    "mllama": "Llama 3.2 Vision",
    "mpt": "MPT",
    "nanochat": "nanochat",
    "nemotron": "Nemotron-4",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "opt": "OPT",
    "ovis2": "Ovis2",
    "paligemma": "PaliGemma 1 and 2",
    "persimmon": "Persimmon",
    "phi": "Phi-1, Phi-2",
    "phi3": "Phi-3, Phi-4",
    "phi4_multimodal": "Phi-4-multimodal, words alone",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen2_vl": "Qwen2-VL",
    "qwen3": "Qwen3",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_text": "Qwen3.5, words alone",
    "qwen3_moe": "Qwen3-30B-A3B, Qwen3-235B-A22B",
    "qwen3_next": "Qwen3-Next",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B",
    "recurrent_gemma": "RecurrentGemma",
    "rwkv": "RWKV-4",
    "seed_oss": "Seed-OSS",
    "smollm3": "SmolLM3",
    "smolvlm": "SmolVLM",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
    "video_llama_3": "VideoLLaMA 3",
    "vipllava": "ViP-LLaVA",
    "zamba": "Zamba",
    "zamba2": "Zamba2",
}


def text_families() -> list[str]:
    """All families that transformers has a causal model for, but those that also see pictures."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(picture_families()))


def picture_families() -> list[str]:
    """All families that transformers has an image-text model for."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The settings of a tiny model, from a family's default config; those of its parts inside."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            own = {key: kept for key, kept in vars(value).items() if isinstance(kept, int | str)}
            own = {key: kept for key, kept in own.items() if not key.startswith("_")}
            small[name] = own | shrunk(value) | {"model_type": value.model_type}
        elif name in SPECIAL_TOKENS:
            small[name] = SPECIAL_TOKENS[name]
        elif name == "head_dim" and value is None:
            small[name] = 12
        elif isinstance(value, int) and not isinstance(value, bool):
            if re.search("token_(id|index)$", name):
                small[name] = 4
                continue
            rule, size = next(
                (item for item in RULES if re.fullmatch(item[0], name)), (None, value)
            )
            small |= {name: size} if size < value or (size == LAYERS and rule) else {}
        elif isinstance(value, dict) and "mrope_section" in value:
            small[name] = value | {"mrope_section": [2, 2, 2]}
        elif isinstance(value, (list, tuple)) and re.search("layer|types|block|pattern", name):
            kinds = [item for index, item in enumerate(value) if item not in value[:index]]
            if len(value) > LAYERS:
                small[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
    if "qk_rope_head_dim" in small:  # latent attention: a head is its two parts
        own = {"qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
        small |= {name: size for name, size in own.items() if hasattr(config, name)}
    if hasattr(config, "is_decoder"):
        small["is_decoder"] = True
    return small | SPECIAL.get(config.model_type, {})


def _from_config(family: str) -> torch.nn.Module:
    kind = CONFIG_MAPPING[family]
    auto = AutoModelForImageTextToText if family in picture_families() else AutoModelForCausalLM
    return auto.from_config(kind(**shrunk(kind())))


@cache
def _weights(family: str) -> int:
    """How many weights a family's tiny model has."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in _from_config(family).parameters())


def make(family: str, seed: int = 0) -> torch.nn.Module:
    """A model of a family whose random weights are large enough for mistakes to show."""
    if (size := _weights(family)) > BIGGEST:
        raise ValueError(f"its config shrinks to {size / 1e6:,.0f} million weights only")
    torch.manual_seed(seed)
    model = randomise(_from_config(family), seed).eval()
    if model.generation_config is not None:  # no token is forced at the end of a text
        model.generation_config.forced_eos_token_id = None
        model.generation_config.forced_bos_token_id = None
    return model
