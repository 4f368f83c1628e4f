#!/usr/bin/env bash
# transformers 5.20.2, LLaVA-NeXT: of a picture much wider than high (3000 x 40) the processor cuts three high-resolution tiles and the model encodes them,
# but removing the padding rounds their rows to none, so only the 576 tokens of the overview, squeezed to a square, reach the language model, without
# a warning: an attribution can't point at any tile. Pad or split such pictures before, and look whether there are more than 576 image tokens.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 pillow==13.0.0

python - <<'EOF'
import torch, transformers, PIL
from PIL import Image
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

print("torch", torch.__version__, "transformers", transformers.__version__, "pillow", PIL.__version__)
grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # those of the published checkpoints
processor = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=grids)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed(0)
model = LlavaNextForConditionalGeneration(LlavaNextConfig(
    text_config=dict(small, model_type="llama", vocab_size=99), vision_config=dict(small, model_type="clip_vision_model", image_size=336, patch_size=14),
    image_grid_pinpoints=grids, image_token_index=90)).eval()

used = {}
for width, height in ((1000, 700), (970, 90), (3000, 40)):
    sheet = processor(images=Image.new("RGB", (width, height), "white"), return_tensors="pt")
    pixels = sheet.pixel_values.requires_grad_()
    features = model.model.get_image_features(pixels, sheet.image_sizes)
    features = getattr(features, "pooler_output", features)[0]
    tiles = torch.autograd.grad((features * torch.randn_like(features)).sum(), pixels)[0][0].abs().amax((1, 2, 3))
    used[width, height] = len(features), [bool(gradient > 0) for gradient in tiles]
    print(f"{width} x {height}: {pixels.shape[1]} tiles, {len(features)} image tokens, tile has any influence: {used[width, height][1]}")

# Expected: every tile that holds part of the picture has influence.
assert all(used[1000, 700][1]) and all(used[970, 90][1])
assert used[3000, 40] == (576, [True, False, False, False]), "changed: a banner keeps its tiles now"
EOF
