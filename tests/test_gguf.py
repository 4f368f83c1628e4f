"""GGUF files against the models and tokenizers that they were written from."""

from __future__ import annotations

import copy
import json

import gguf
import numpy as np
import pytest
import torch
from helpers.families import randomise
from helpers.tiny import byte_tokenizer, smollm2_tokenizer
from tokenizers import pre_tokenizers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from grains import gguf_files, models
from grains.errors import UserError

TEXTS = (
    "Are bats blind?",
    "  two spaces, 12345 digits",
    "naïve café ½",
    "def f(x):\n    return x\n",
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA3 = PARTS | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAINS_CACHE", str(tmp_path / "cache"))


def llama(rope, tokens=420):
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters=rope,
        pad_token_id=0,
    )
    return randomise(LlamaForCausalLM(config)).eval()


def gemma():
    linear = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    config = Gemma3TextConfig(
        vocab_size=420,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=256,
        sliding_window=64,
        max_position_embeddings=512,
        rope_parameters={
            "full_attention": linear,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    return randomise(Gemma3ForCausalLM(config)).eval()


def write(path, model, backend, arch="llama", name="gpt2", **more):
    """The model and a byte-level tokenizer as a GGUF file.

    more: metadata, without tokenizer.ggml. or the architecture before it.
    """
    config = model.config
    file = gguf.GGUFWriter(path, arch)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    file.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if arch == "llama":
        file.add_rope_dimension_count(config.head_dim)
    else:
        file.add_key_length(config.head_dim)
        file.add_sliding_window(config.sliding_window)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    added = backend.get_added_tokens_decoder()
    file.add_tokenizer_model(name)
    file.add_token_list([token for token, _ in vocabulary])
    file.add_token_types([3 if number in added else 1 for _, number in vocabulary])
    merges = json.loads(backend.to_str())["model"]["merges"]
    file.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    )
    for key, value in {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 0, **more}.items():
        key = key.replace("__", ".")
        key = f"{arch}.{key}" if key.startswith("rope") else f"tokenizer.ggml.{key}"
        kinds = {bool: file.add_bool, int: file.add_uint32, float: file.add_float32}
        kinds.get(type(value), file.add_string)(key, value)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        names["output.weight"] = "lm_head.weight"
    for layer in range(config.num_hidden_layers):
        for part, own in (GEMMA3 if arch == "gemma3" else PARTS).items():
            names[f"blk.{layer}.{part}.weight"] = f"model.layers.{layer}.{own}.weight"
    for name, own in names.items():
        value = weights[own]
        part = name.split(".")[-2]
        if arch == "llama" and part in heads:  # llama.cpp pairs neighbours
            pairs = value.reshape(heads[part], 2, -1, value.shape[-1]).swapaxes(1, 2)
            value = np.ascontiguousarray(pairs.reshape(value.shape))
        if arch == "gemma3" and "norm" in part:  # of which llama.cpp multiplies by 1 + w
            value = value + 1
        file.add_tensor(name, value)
    if rope.get("rope_type") == "llama3":
        plain = 10000.0 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        stretch = plain / model.model.rotary_emb.inv_freq.numpy()
        file.add_tensor("rope_freqs.weight", stretch.astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


def logits(model, length=400):
    ids = torch.randint(5, 400, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits


MODELS = {
    "Llama-3.1's frequencies": (lambda: llama(LLAMA3), "llama", {}),
    "yarn": (
        lambda: llama(YARN),
        "llama",
        {
            "rope__scaling__type": "yarn",
            "rope__scaling__factor": 4.0,
            "rope__scaling__original_context_length": 64,
        },
    ),
    "Gemma-3, full attention stretched": (
        gemma,
        "gemma3",
        {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_is_the_one_that_was_written(kind, tmp_path):
    make, arch, metadata = MODELS[kind]
    model = make()
    backend = byte_tokenizer().backend_tokenizer
    path = write(tmp_path / "model.gguf", model, backend, arch, pre="gpt-2", **metadata)
    lm = models.load(str(path))
    assert (logits(lm.model) - logits(model)).abs().max() < 1e-2
    assert logits(model).abs().max() > 5
    assert not list(tmp_path.glob("cache/*/*.gguf"))
    half = models.load(str(path), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert len(list(tmp_path.glob("cache/model-*"))) == 2


@pytest.mark.parametrize(
    ("pre", "metadata", "begins", "ends"),
    [
        ("gpt-2", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, [1], [2]),
    ],
)
def test_the_tokenizer_is_what_the_file_says(pre, metadata, begins, ends, tmp_path):
    """Its vocabulary has no numbers of two digits, so that all of these cut alike."""
    backend = byte_tokenizer().backend_tokenizer
    path = write(tmp_path / "model.gguf", llama(LLAMA3), backend, pre=pre, **metadata)
    tokenizer = models.load(str(path)).tokenizer
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids == begins + backend.encode(text, add_special_tokens=False).ids + ends
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_numbers_are_cut_as_the_file_says():
    """SmolLM2's own cut, from its tokenizer.json, against the file's word for it."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    digits = pre_tokenizers.Digits(individual_digits=True)
    own = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2"}
    mended = gguf_files.mend(Tokenizer(BPE()), metadata | {"tokenizer.ggml.pre": "smollm"})
    for text in (*TEXTS, "4 ½ months in 1999!", " 3333\n\n 33"):
        assert mended.pre_tokenizer.pre_tokenize_str(text) == own.pre_tokenize_str(text)


def test_a_file_is_read_as_ggufs_own_reader_does(tmp_path):
    path = write(tmp_path / "model.gguf", llama(LLAMA3), byte_tokenizer().backend_tokenizer)
    found, own = gguf_files.reader_of(path), gguf.GGUFReader(path)
    assert {name: field.contents() for name, field in found.fields.items()} == {
        name: field.contents() for name, field in own.fields.items()
    }
    for read, expected in zip(found.tensors, own.tensors, strict=True):
        assert (read.name, read.tensor_type) == (expected.name, expected.tensor_type)
        assert read.data.dtype == expected.data.dtype and read.data.any()
        assert np.array_equal(read.data, expected.data)


def refused(path):
    with pytest.raises(UserError) as error:
        gguf_files.converted(path, torch.float32)
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    return message


def test_what_cannot_be_followed_is_refused(tmp_path):
    backend = byte_tokenizer().backend_tokenizer
    model = llama(LLAMA3)
    no_file = tmp_path / "no.gguf"
    assert "No such file" in refused(no_file)
    no_file.write_bytes(b"not a model")
    assert "does not begin" in refused(no_file)
    whole = write(tmp_path / "whole.gguf", model, backend)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:4000])
    assert "is it whole?" in refused(cut)
    unknown = write(tmp_path / "unknown.gguf", model, backend, pre="viking")
    assert "'viking'" in refused(unknown)
    longrope = write(tmp_path / "longrope.gguf", model, backend, rope__scaling__type="longrope")
    assert "longrope" in refused(longrope)


@pytest.mark.slow
def test_the_embedded_models_file_gives_its_tokenizer(tmp_path, monkeypatch):
    small = write(tmp_path / "small.gguf", llama(LLAMA3), byte_tokenizer().backend_tokenizer)
    monkeypatch.setattr(gguf, "GGUFReader", type(gguf_files.reader_of(small)))  # the faster one
    read = smollm2_tokenizer()
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
    }
    mended = gguf_files.described_tokenizer(copy.deepcopy(read), metadata)
    for text in TEXTS:  # transformers keeps "4 ½" together, which the model's own tokenizer cuts
        text = text.replace("½", "")
        assert mended(text).input_ids == read(text).input_ids


def test_a_fetched_model_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAINS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"gemma-3-270m.*run benchmarks"):
        models.load("gemma-3-270m")
    (tmp_path / "gemma-3-270m.gguf").write_bytes(b"GGUF")
    assert models.resolve("gemma-3-270m") == str(tmp_path / "gemma-3-270m.gguf")
