#!/usr/bin/env bash
# torchao 0.18.0: linear layers that round their input as well (Int8DynamicActivationInt8WeightConfig, and the Intx one) give no gradient to it, and no error.
# In a language model the residual connections stay, so a backward pass works and looks right: every token but the last has a gradient of exactly 0, and that
# of the last is what passes beside all layers. Integrated Gradients and saliency of such a model are wrong without a warning. Weights alone
# (Int8WeightOnlyConfig) have the right gradient; attribute with those, or with the dequantised model.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 torchao==0.18.0

python - <<'EOF' 2> errors.txt || { cat errors.txt; exit 1; }
import copy
from importlib.metadata import version
import torch
import torchao.quantization as ao
from torchao.quantization import quantize_
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("torch", "torchao", "transformers")))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(config).eval()
with torch.no_grad():
    for weights in model.parameters():
        if weights.dim() == 2:
            weights.normal_(std=0.2)
ids = torch.randint(256, (1, 8))

def gradients(of):
    """(8,) the length of each token's gradient of the likeliest next token's log-probability."""
    of.requires_grad_(False)
    embeds = of.get_input_embeddings()(ids).detach().requires_grad_(True)
    of(inputs_embeds=embeds).logits[0, -1].log_softmax(-1).max().backward()
    return embeds.grad[0]

def dequantized(of):
    plain = copy.deepcopy(model)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = of.get_submodule(name).weight
            module.weight.data = weight.dequantize() if hasattr(weight, "dequantize") else weight.data
    return plain

off = {}
for name in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"):
    quantized = copy.deepcopy(model)
    quantize_(quantized.model, getattr(ao, name)())
    own, expected = gradients(quantized), gradients(dequantized(quantized))
    off[name] = own
    print(name)
    print("   gradient of each token   ", [round(value, 4) for value in own.norm(dim=-1).tolist()])
    print("   of dequantised weights   ", [round(value, 4) for value in expected.norm(dim=-1).tolist()])
    if name == "Int8WeightOnlyConfig":
        assert (own - expected).norm() < 1e-3 * expected.norm()
# Expected: about the gradients of the dequantised weights, or an error.
for own in [*off.values()][1:]:
    assert (own[:-1] == 0).all() and (own[-1] != 0).any(), "changed: rounded inputs have a gradient"
EOF
