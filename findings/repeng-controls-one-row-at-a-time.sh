#!/usr/bin/env bash
# repeng 0.4.0 with transformers 5.20.2: a controlled model scores a batch of one, and generates for any batch, but a plain forward call on two rows
# raises "shape '[2, 4, 1]' is invalid for input of size 4", as repeng reshapes the one row of position_ids that layers now get to the whole batch; with
# no control set the same call works. Who scores choices in batches can't steer. Pass position_ids with a row for each text.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 numpy==1.26.4 scikit-learn==1.7.2 gguf==0.19.0
pip install -q --disable-pip-version-check --no-deps repeng==0.4.0

python - <<'EOF'
import numpy as np, torch, transformers
from importlib.metadata import version
from repeng import ControlModel, ControlVector
from transformers import LlamaConfig, LlamaForCausalLM

print("repeng", version("repeng"), "transformers", transformers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=99)).eval()
controlled = ControlModel(model, [1])
ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])

def call(rows, **more):
    with torch.no_grad():
        try:
            return tuple(controlled(input_ids=rows, **more).logits.shape)
        except RuntimeError as error:
            return str(error)

print("no control, two rows        :", call(ids))
controlled.set_control(ControlVector("llama", {1: np.ones(32, dtype=np.float32)}))
one, two, told = call(ids[:1]), call(ids), call(ids, position_ids=torch.arange(4).repeat(2, 1))
print("control, one row            :", one)
print("control, two rows           :", two)
print("control, rows of positions  :", told)

# Expected: (2, 4, 99) with or without control.
assert one == (1, 4, 99) and told == (2, 4, 99)
assert "is invalid for input of size 4" in two, "changed: batches can be scored under control"
EOF
