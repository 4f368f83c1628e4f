#!/usr/bin/env bash
# transformers 5.20.2: with position_ids that skip or repeat a place (tokens left out for an ablation, two answers after one prompt) and no attention_mask,
# use_cache=False makes the model take each jump for the start of another packed text: later tokens no longer see what is before it. With the default
# use_cache, or a mask of ones, all is seen. Ablation scores then lose the prompt without a warning. Always pass an attention_mask.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'EOF'
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99)).eval()
for weights in model.parameters():
    weights.data *= 3  # so that a random model's attention is not flat
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])

def last(places, **more):
    """The last token's logits, and which tokens they depend on."""
    start = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=start, position_ids=torch.tensor([places]), **more).logits[0, -1]
    return logits.detach(), "".join("x" if g > 0 else "." for g in torch.autograd.grad(logits.square().sum(), start)[0][0].abs().amax(-1))

seen = {}
for name, places in {"in a row": [0, 1, 2, 3, 4, 5, 6], "third place skipped": [0, 1, 3, 4, 5, 6, 7], "two answers": [0, 1, 2, 3, 4, 3, 4]}.items():
    cached, sees = last(places)
    plain, plain_sees = last(places, use_cache=False)
    masked, masked_sees = last(places, use_cache=False, attention_mask=torch.ones_like(ids))
    seen[name] = sees, plain_sees, masked_sees, (plain - cached).abs().max().item()
    print(f"{name:20} {places} last token sees: default {sees}, use_cache=False {plain_sees}, and a mask of ones {masked_sees}; logits differ by {seen[name][3]:.3f}")
    assert sees == masked_sees == "xxxxxxx" and torch.allclose(cached, masked, atol=1e-4)

# Expected: use_cache changes nothing, and every token before is seen.
assert seen["in a row"][1] == "xxxxxxx" and seen["in a row"][3] < 1e-4
assert seen["third place skipped"][1] == "..xxxxx" and seen["two answers"][1] == ".....xx", "changed: jumps don't cut the text any more"
assert seen["third place skipped"][3] > 1e-3 and seen["two answers"][3] > 1e-3
EOF
