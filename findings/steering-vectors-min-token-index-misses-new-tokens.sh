#!/usr/bin/env bash
# steering-vectors 0.12.2: apply(model, min_token_index=k), which is to steer from token k on, counts tokens within each forward call; generate with its
# key/value cache passes new tokens one at a time, all at index 0, so no generated token is steered, without a warning. With use_cache=False they are,
# and the text is another. Use min_token_index=0 or None for generation, or generate without the cache.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 scikit-learn==1.9.1
pip install -q --disable-pip-version-check --no-deps steering-vectors==0.12.2

python - <<'EOF'
import torch, transformers
from importlib.metadata import version
from steering_vectors import SteeringVector
from transformers import LlamaConfig, LlamaForCausalLM

print("steering-vectors", version("steering-vectors"), "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=200, eos_token_id=None)).eval()
for weights in model.parameters():
    weights.data *= 3
vector = SteeringVector({1: torch.linspace(-8, 8, 32)}, "decoder_block")
ids = torch.tensor([[5, 6, 7, 8, 9]])
settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)

def answer(start, **more):
    if start is None:
        return model.generate(ids, **settings, **more)[0, 5:].tolist()
    with vector.apply(model, min_token_index=start):
        return model.generate(ids, **settings, **more)[0, 5:].tolist()

plain = answer(None)
seen = {(start, cached): answer(start, use_cache=cached) for start in (0, 5) for cached in (True, False)}
print("not steered                         ", plain)
for (start, cached), tokens in seen.items():
    print(f"from token {start} on, {'with' if cached else 'without'} the cache".ljust(36), tokens)

# Expected: the cache never changes the answer. From token 5 on = all tokens after the prompt.
assert seen[0, True] == seen[0, False] != plain
assert seen[5, False] != plain
assert seen[5, True] == plain, "changed: generated tokens are steered now"
EOF
