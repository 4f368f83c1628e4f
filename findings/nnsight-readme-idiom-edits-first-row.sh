#!/usr/bin/env bash
# nnsight 0.7.0 with transformers 5.20.2: `block.output[0][:] += vector`, as nnsight's own README edits GPT-2 blocks, was meant for blocks that return a
# tuple; they return a tensor now, so [0] is the first text of the batch and only that is steered, without an error. A steered batch is then mostly
# the plain model. Edit `block.output` itself, and compare the second row with the plain one.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 nnsight==0.7.0

cat > edit.py <<'EOF'
import torch, transformers
from importlib.metadata import metadata, version
from nnsight import NNsight
from transformers import GPT2Config, GPT2LMHeadModel

print("nnsight", version("nnsight"), "transformers", transformers.__version__, "torch", torch.__version__)
readme = metadata("nnsight").get_payload() or metadata("nnsight")["Description"]
print("in its README:", readme.count("transformer.h[0].output[0][:]"), "times transformer.h[0].output[0][:]")
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=99, bos_token_id=1, eos_token_id=2)).eval()
traced = NNsight(model)
ids, push = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]), torch.linspace(-3, 3, 32)

with torch.no_grad():
    plain = model(ids).logits
    with traced.trace(ids):
        shape = traced.transformer.h[1].output[0].shape.save()
        traced.transformer.h[1].output[0][:] += push
        idiom = traced.output.logits.save()
    with traced.trace(ids):
        traced.transformer.h[1].output = traced.transformer.h[1].output + push
        whole = traced.output.logits.save()

rows = lambda logits: [round(value, 3) for value in (logits - plain).abs().amax((1, 2)).tolist()]
print("shape of output[0]               :", tuple(shape), "for 3 texts of 4 tokens")
print("change by row, output[0][:] +=   :", rows(idiom))
print("change by row, output = output + :", rows(whole))

# Expected: all rows are steered, or an error.
assert "transformer.h[0].output[0][:]" in readme
assert min(rows(whole)) > 0.1
assert rows(idiom)[0] > 0.1 and rows(idiom)[1:] == [0, 0], "changed: all rows are edited now"
EOF
python edit.py
