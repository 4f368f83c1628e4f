#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.20.2: model(ids, adapter_names=["__base__", "default"]) is to give the first row of a batch without the adapter and the second
# with it. LoRA does; BEFT, IA3, VeRA, LoHa, OFT and LN tuning take the argument, say nothing and adapt every row, so a "base" row beside a
# steered one (a BEFT adapter is a steering vector) is steered as well. Compute the base rows in a call of their own, within model.disable_adapter().
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 peft==0.21.2

python - <<'EOF' 2> errors.txt || { cat errors.txt; exit 1; }
from importlib.metadata import version
import torch
from peft import BeftConfig, IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "peft")))
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
down = dict(target_modules=["down_proj"])
ids = torch.arange(12).view(2, 6)
kept = []
for config in (
    LoraConfig(**down),
    BeftConfig(**down),
    IA3Config(**down, feedforward_modules=["down_proj"]),
    VeraConfig(**down),
    LoHaConfig(**down),
    OFTConfig(**down, oft_block_size=8, r=0),
    LNTuningConfig(target_modules=["norm"]),
):
    torch.manual_seed(0)
    adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), config).eval()
    for weights in adapted.parameters():
        if weights.requires_grad:
            weights.data.normal_()
    with torch.no_grad():
        with adapted.disable_adapter():
            base = adapted(ids).logits
        steered, mixed = adapted(ids).logits, adapted(ids, adapter_names=["__base__", "default"]).logits
    from_base, from_steered = ((mixed - other)[0].abs().max().item() for other in (base, steered))
    name = type(config).__name__
    print(f"{name}: the row '__base__' differs from the base model by {from_base:.3f}, from the adapted one by {from_steered:.3f}")
    assert torch.equal(mixed[1], steered[1]) and (steered - base)[0].abs().max() > 0.01
    kept += [name] if from_base < 1e-6 else []
    assert from_base < 1e-6 or from_steered == 0
# Expected: the base model's row, or an error.
assert kept == ["LoraConfig"], "changed: other adapters know adapter_names"
EOF
