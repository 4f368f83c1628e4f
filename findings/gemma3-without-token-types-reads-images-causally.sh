#!/usr/bin/env bash
# transformers 5.20.2, Gemma 3 with pictures: without token_type_ids a forward call gives the image tokens a causal mask instead of letting
# them see each other, without a warning. Scores and gradients of a batch put together by hand, ids and pixels alone, are then of another model.
# Pass token_type_ids (1 at image tokens), as the processor returns them, in every call.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'EOF'
import torch, transformers
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

print("torch", torch.__version__, "transformers", transformers.__version__)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
model = Gemma3ForConditionalGeneration(Gemma3Config(
    text_config=dict(small, num_key_value_heads=2, head_dim=16, vocab_size=99), vision_config=dict(small, image_size=56, patch_size=14),
    mm_tokens_per_image=4, boi_token_index=91, eoi_token_index=92, image_token_index=90)).eval()
torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
for weights in model.parameters():
    weights.data *= 3  # so that a random model's attention is not flat
ids = torch.tensor([[2, 5, 91, 90, 90, 90, 90, 92, 7, 8]])
image = ids == 90

def influence(**more):
    """How much each image token's state depends on the embedding of the last image token."""
    features = model.model.get_image_features(torch.ones(1, 3, 56, 56)).pooler_output
    merged = model.get_input_embeddings()(ids).masked_scatter(image[..., None], features).detach().requires_grad_()
    states = model.model(inputs_embeds=merged, **more).last_hidden_state
    place = image[0].nonzero().flatten().tolist()
    return [torch.autograd.grad(states[0, p].sum(), merged, retain_graph=True)[0][0, place[-1]].abs().max().item() for p in place]

def logits(**more):
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=torch.ones(1, 3, 56, 56), **more).logits

told, bare = influence(token_type_ids=image.long()), influence()
off = (logits() - logits(token_type_ids=image.long())).abs().max().item()
print("influence of the last image token on the four: with token_type_ids   ", [f"{value:.4f}" for value in told])
print("                                               without token_type_ids", [f"{value:.4f}" for value in bare])
print(f"logits differ by {off:.4f}")

# Expected: image tokens see each other in both, since the ids say where the image is; or an error.
assert all(value > 0 for value in told)
assert bare[:3] == [0, 0, 0] and off > 1e-4, "changed: the mask follows the ids now"
EOF
