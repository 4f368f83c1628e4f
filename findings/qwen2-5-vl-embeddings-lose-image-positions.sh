#!/usr/bin/env bash
# transformers 5.20.2, Qwen2.5-VL: called with inputs_embeds (as gradient attribution does), or with input_ids but without mm_token_type_ids, the model
# silently counts image tokens as words in a line instead of giving them rows and columns, even where image_grid_thw is passed; logits are not those of
# the normal call. Compute model.model.get_rope_index(...) from the ids and pass it as position_ids, and compare the logits once.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2

python - <<'EOF'
import torch, transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

print("torch", torch.__version__, "transformers", transformers.__version__)
torch.manual_seed(0)
config = Qwen2_5_VLConfig(
    text_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=99, bos_token_id=1,
                     eos_token_id=2, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])),
    vision_config=dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1], window_size=56),
    image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
for weights in model.parameters():
    weights.data *= 3  # so that a random model's logits differ between positions
grid = torch.tensor([[1, 8, 12]])
pixels = torch.randn(8 * 12, 3 * 2 * 14 * 14)
ids = torch.tensor([[5, 6, 92] + [90] * 24 + [93, 7, 8, 9]])
kinds = (ids == 90).long()

with torch.no_grad():
    right = model(input_ids=ids, pixel_values=pixels, image_grid_thw=grid, mm_token_type_ids=kinds).logits
    features = model.model.get_image_features(pixels, grid)
    merged = model.get_input_embeddings()(ids).masked_scatter((kinds == 1)[..., None], torch.cat(tuple(getattr(features, "pooler_output", features))))
    places, _ = model.model.get_rope_index(ids, image_grid_thw=grid, mm_token_type_ids=kinds)
    calls = {
        "ids, pixels and grid, no mm_token_type_ids": dict(input_ids=ids, pixel_values=pixels, image_grid_thw=grid),
        "merged embeddings": dict(inputs_embeds=merged),
        "merged embeddings, grid, mm_token_type_ids": dict(inputs_embeds=merged, image_grid_thw=grid, mm_token_type_ids=kinds),
        "merged embeddings, position_ids": dict(inputs_embeds=merged, position_ids=places),
    }
    off = {name: (model(**call).logits - right).abs().max().item() for name, call in calls.items()}
for name, value in off.items():
    print(f"{name:45} logits off by {value:.5f}")

# Expected: 0 in every line.
assert off.pop("merged embeddings, position_ids") < 1e-4
assert all(value > 0.1 for value in off.values()), "changed: image positions are kept now"
EOF
