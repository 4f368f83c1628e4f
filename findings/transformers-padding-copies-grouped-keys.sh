#!/usr/bin/env bash
# transformers 5.20.2, torch 2.13.0, CPU: in a batch with one padded prompt, decoding copies all cached keys and values anew in every layer at every token,
# once for each query head that shares them (3x for SmolLM2, 7x for Qwen2.5-7B). Without padding it does not, and torch's kernel takes the shared heads
# with a mask just as well, with the same result in a fraction of the time. Batch prompts of one length, or register an attention that folds the heads
# that share keys into the queries' length (src/grains/decoding.py does).
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'EOF'
import time
import torch, transformers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = LlamaConfig(hidden_size=72, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, vocab_size=50, pad_token_id=0)
model = LlamaForCausalLM(config).eval()

kernel, heads = functional.scaled_dot_product_attention, []
def watched(query, key, value, **kwargs):
    if query.shape[2] == 1:  # a new token
        heads.append(key.shape[1])
    return kernel(query, key, value, **kwargs)
functional.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention = watched

seen = {}
for name, padding in (("equal lengths", 0), ("one padded prompt", 2)):
    heads.clear()
    ids, mask = torch.full((2, 6), 5), torch.ones(2, 6, dtype=torch.long)
    mask[0, :padding] = 0
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4, min_new_tokens=4)
    seen[name] = set(heads)
    print(f"{name}: the kernel is given keys of {heads} heads; the cache holds 3")

# The kernel itself does not need the copy.
query, key, value = torch.randn(64, 9, 1, 64), torch.randn(64, 3, 200, 64), torch.randn(64, 3, 200, 64)
mask = torch.ones(64, 1, 1, 200, dtype=torch.bool); mask[:, ..., :9] = False
ways = {
    "copied": lambda: kernel(query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), attn_mask=mask),
    "shared": lambda: kernel(query, key, value, attn_mask=mask, enable_gqa=True),
}
for name, way in ways.items():
    begin = time.process_time()
    for _ in range(5):
        way()
    print(f"{name}: {(time.process_time() - begin) * 200:.1f} ms a layer")
difference = (ways["copied"]() - ways["shared"]()).abs().max().item()
print(f"largest difference {difference:.1g}")

# Expected: three heads in both cases.
assert difference < 1e-5, "the kernel does not take shared heads with a mask"
assert seen["equal lengths"] == {3} and seen["one padded prompt"] == {9}, "changed: keys are not copied any more"
EOF
