#!/usr/bin/env bash
# transformers 5.20.2: a Llama GGUF file carries the stretched rotary frequencies of Llama 3.1 and later as a tensor, rope_freqs.weight, and older ways of
# stretching as rope.scaling metadata; from_pretrained(gguf_file=) reads neither and uses plain RoPE, without a warning, so logits drift with length:
# a little after 20 tokens, another model after 2,000. Set config.rope_parameters by hand, and compare with the safetensors model on a long text.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 gguf==0.19.0

python - <<'EOF' 2> >(grep -v "it/s" >&2)
import gguf, numpy as np, os, torch, transformers
from importlib.metadata import version
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__, "gguf", version("gguf"))
assert gguf.MODEL_TENSOR.ROPE_FREQS in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]  # it belongs to the format
width, heads, layers, words, theta = 64, 2, 2, 100, 500000.0
half = width // heads
torch.manual_seed(0)
llama31 = dict(rope_type="llama3", rope_theta=theta, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
model = LlamaForCausalLM(LlamaConfig(hidden_size=width, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=words,
                                     max_position_embeddings=131072, rope_parameters=llama31)).eval()
for weights in model.parameters():
    weights.data *= 3  # so that a random model's attention is not flat
weights = {name: value.numpy() for name, value in model.state_dict().items()}
plain = 1 / theta ** (np.arange(0, half, 2) / half)
stretch = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)

def writer(path, arch):
    file = gguf.GGUFWriter(path, arch)
    file.add_context_length(131072); file.add_embedding_length(width); file.add_block_count(layers); file.add_feed_forward_length(96)
    file.add_head_count(heads); file.add_head_count_kv(heads); file.add_layer_norm_rms_eps(1e-6); file.add_vocab_size(words)
    file.add_rope_dimension_count(half); file.add_rope_freq_base(theta)
    return file

def finish(file):
    file.write_header_to_file(); file.write_kv_data_to_file(); file.write_tensors_to_file(); file.close()

os.mkdir("files")
file = writer("files/llama.gguf", "llama")
file.add_tensor("rope_freqs.weight", stretch)
for ours, theirs in (("token_embd", "model.embed_tokens"), ("output", "lm_head"), ("output_norm", "model.norm")):
    file.add_tensor(f"{ours}.weight", weights[f"{theirs}.weight"])
for layer in range(layers):
    for ours, theirs in (("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
                         ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_norm", "input_layernorm"),
                         ("ffn_norm", "post_attention_layernorm")):
        value = weights[f"model.layers.{layer}.{theirs}.weight"]
        if ours in ("attn_q", "attn_k"):  # llama.cpp pairs neighbours
            value = np.ascontiguousarray(value.reshape(heads, 2, half // 2, width).swapaxes(1, 2).reshape(width, width))
        file.add_tensor(f"blk.{layer}.{ours}.weight", value)
finish(file)

read = AutoModelForCausalLM.from_pretrained("files", gguf_file="llama.gguf").eval()
print("stretch written:", stretch.round(2).tolist())
print("read           :", read.config.rope_parameters)
off = {}
with torch.no_grad():
    for length in (20, 200, 2000):
        ids = torch.randint(0, words, (1, length), generator=torch.Generator().manual_seed(0))
        off[length] = (read(ids).logits[0, -1] - model(ids).logits[0, -1]).abs().max().item()
        print(f"last logits after {length} tokens off by {off[length]:.3f}, of {model(ids).logits[0, -1].abs().max():.1f}")
    read.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq
    mended = (read(ids).logits[0, -1] - model(ids).logits[0, -1]).abs().max().item()
print(f"with the frequencies put in by hand: off by {mended:.6f}")

kept = {}
for arch in ("llama", "qwen2", "gemma3"):
    file = writer(f"files/{arch}-linear.gguf", arch)
    file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR); file.add_rope_scaling_factor(8.0)
    finish(file)
    kept[arch] = AutoConfig.from_pretrained("files", gguf_file=f"{arch}-linear.gguf").rope_parameters
    print(f"{arch} file with rope.scaling.type linear, factor 8: {kept[arch]}")

# Expected: the same logits at every length, and factor 8 kept.
assert mended < 1e-3
assert off[20] < off[200] < off[2000] and off[2000] > 0.5, "changed: rope_freqs.weight is read now"
assert not any("linear" in str(value) for value in kept.values()), "changed: rope.scaling is read now"
EOF
