#!/usr/bin/env bash
# torch 2.13.0: a forward hook that is registered on a layer after the model's first compiled call is ignored without a warning, so a steering vector
# added to a model that torch.compile has already run does nothing, and an evaluation reports "steering has no effect". Register hooks before the first
# call, call torch._dynamo.reset() after it, or set torch._dynamo.config.skip_nnmodule_hook_guards = False.
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
config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=99)
model = LlamaForCausalLM(config).eval()
compiled = torch.compile(model, backend="eager")
ids, push = torch.tensor([[5, 6, 7, 8, 9]]), torch.linspace(-5, 5, 32)

def hooked():
    return model.model.layers[1].register_forward_hook(lambda module, args, output: output + push)

def moved(call):
    return (call(ids).logits - plain).abs().max().item()

with torch.no_grad():
    plain = model(ids).logits
    print(f"compiled, no hook yet         : {moved(compiled):.4f} from the plain model")
    handle = hooked()
    expected, late = moved(model), moved(compiled)
    print(f"hook added: without compile   : {expected:.4f}")
    print(f"hook added: the compiled model: {late:.4f}")
    torch._dynamo.reset()
    after_reset = moved(compiled)
    print(f"after torch._dynamo.reset()   : {after_reset:.4f}")
    handle.remove()

    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    compiled(ids)
    hooked()
    guarded = moved(compiled)
    print(f"with hooks guarded            : {guarded:.4f}")

# Expected: a compiled model gives what the model itself gives, hooks included.
assert expected > 0.1 and abs(after_reset - expected) < 1e-4 and abs(guarded - expected) < 1e-4
assert late < 1e-5, "changed: late hooks are seen by a compiled model now"
EOF
