#!/usr/bin/env bash
# transformers 5.20.2: with a forward hook that steers decoder layer 1, output_hidden_states shows the state before the hook in Llama, Qwen2, Gemma 3,
# GPT-2, OPT, GPT-NeoX and Phi, though later layers and the logits do see it; in GPT-J, BLOOM, MPT, Falcon and GPT-Neo it shows the state after the hook.
# Who checks or measures steering by hidden_states sees none in seven of these twelve. Record states with a forward hook registered after the steering one.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'EOF'
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
common = dict(vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2)
modern = dict(common, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2)
openai = dict(common, n_embd=32, n_layer=3, n_head=2, n_positions=64)
families = {
    "llama": modern, "qwen2": modern, "gemma3_text": dict(modern, head_dim=16), "phi": modern, "falcon": modern, "gpt2": openai,
    "gpt_neox": dict(modern, max_position_embeddings=64),
    "opt": dict(common, hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=2, word_embed_proj_dim=32),
    "gptj": dict(openai, rotary_dim=8), "bloom": dict(common, hidden_size=32, n_layer=3, n_head=2), "mpt": dict(common, d_model=32, n_layers=3, n_heads=2),
    "gpt_neo": dict(common, hidden_size=32, num_layers=3, num_heads=2, attention_types=[[["global"], 3]]),
}
push = torch.linspace(-5, 5, 32)
hidden = set()
for name, settings in families.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).eval()
    body = model.get_decoder() if hasattr(model.get_decoder(), "layers") else model.base_model
    layers = next(getattr(body, key) for key in ("layers", "h", "blocks") if hasattr(body, key))
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def steer(module, args, output):
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)
        handle = layers[1].register_forward_hook(steer)
        steered = model(ids, output_hidden_states=True)
        handle.remove()
    moved = [round((b - a).abs().max().item(), 3) for a, b in zip(plain.hidden_states, steered.hidden_states)]
    print(f"{name:12} change in hidden_states 0..3 {moved}, in the logits {(steered.logits - plain.logits).abs().max().item():.3f}")
    assert moved[3] > 0.01 and (steered.logits - plain.logits).abs().max() > 0.001
    if moved[2] == 0:
        hidden.add(name)

# Expected: hidden_states[2], the output of layer 1, changes by 5 in every family.
print("steering not visible at the steered layer in", sorted(hidden))
assert hidden == {"llama", "qwen2", "gemma3_text", "gpt2", "opt", "gpt_neox", "phi"}, "changed"
EOF
