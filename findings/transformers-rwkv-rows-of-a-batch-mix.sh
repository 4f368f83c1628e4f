#!/usr/bin/env bash
# transformers 5.20.2: RWKV decodes two prompts of one length in a batch to other tokens than each alone, although its forward over the whole texts is the same
# in a batch and alone, and decoding alone agrees with it. The recurrent state that is carried from token to token is what differs. Decode RWKV one row at a time.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'PY'
import torch, transformers
from transformers import RwkvConfig, RwkvForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
model = RwkvForCausalLM(RwkvConfig(vocab_size=64, num_hidden_layers=2, context_length=64, **sizes)).eval()
NEW, END = 8, 1


@torch.no_grad()
def written(prompts):
    more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    return model.generate(prompts, pad_token_id=0, eos_token_id=END, **more)[:, prompts.shape[1] :].tolist()


@torch.no_grad()
def by_whole_forwards(prompt):
    for _ in range(NEW):
        logits = model(prompt).logits[:, -1].clone()
        logits[:, END] = -torch.inf
        prompt = torch.cat([prompt, logits.argmax(-1)[None]], dim=1)
    return prompt[0, -NEW:].tolist()


with torch.no_grad():
    for weights in model.parameters():
        weights.normal_(0, 0.5)
    prompts = torch.randint(3, 64, (2, 9))
    together = model(prompts).logits
    alone = torch.cat([model(prompts[i : i + 1]).logits for i in (0, 1)])
print("forwards of two rows and of one differ by at most", (together - alone).abs().max().item())
single = [written(prompts[i : i + 1])[0] for i in (0, 1)]
batch = written(prompts)
for name, tokens in (("alone", single), ("in a batch", batch)):
    print(f"{name:12}", *tokens)

# Expected: all three ways give the same tokens.
assert torch.allclose(together, alone, atol=1e-4)
assert single == [by_whole_forwards(prompts[i : i + 1]) for i in (0, 1)]
assert batch[0] != single[0] and batch[1] != single[1], "changed: rows of a batch are written as alone"
PY
