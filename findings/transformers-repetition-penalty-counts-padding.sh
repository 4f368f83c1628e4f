#!/usr/bin/env bash
# transformers 5.20.2: generate's repetition_penalty also counts the padding to the left of a prompt, so where padding is the end token (the usual
# choice for Llama, Mistral, SmolLM) a shorter prompt's answer has its end token penalised and runs on: greedy answers depend on the other prompts of
# the batch. Base and steered answers then differ for no reason of the model's. Generate one prompt at a time, or use a pad token of its own.
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
end, other = 2, 3
torch.manual_seed(0)
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50,
                     bos_token_id=1, eos_token_id=end, pad_token_id=end)
model = LlamaForCausalLM(config).eval()
for weights in model.parameters():
    weights.data *= 4  # so that a random model has clear preferences

def first_answer(prompts, pad, **settings):
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    rows = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=pad, **settings)
    answer = rows[0, width:].tolist()
    return answer[: answer.index(end) + 1] if end in answer else answer

short, long = [5, 6, 7], list(range(10, 30))
seen = {}
for penalty in (1.0, 1.3):
    for pad in (end, 0):
        alone, beside = first_answer([short], pad, repetition_penalty=penalty), first_answer([short, long], pad, repetition_penalty=penalty)
        seen[penalty, pad] = alone, beside
        print(f"penalty {penalty}, padding with {pad}: alone {alone}, beside a longer prompt {beside}")

# Expected: alone and beside are the same in all four lines.
assert seen[1.0, end][0] == seen[1.0, end][1] and seen[1.0, 0][0] == seen[1.0, 0][1] and seen[1.3, 0][0] == seen[1.3, 0][1]
alone, beside = seen[1.3, end]
assert alone != beside and len(beside) > len(alone), "changed: padding is not counted any more"
EOF
