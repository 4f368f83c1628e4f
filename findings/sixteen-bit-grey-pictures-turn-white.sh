#!/usr/bin/env bash
# pillow 13.0.0 under datasets 5.2.0 and transformers 5.20.2: a 16-bit grey PNG (scans, X-rays, depth maps) is not scaled but cut off at 255 when it is
# made RGB, by Image(mode="RGB") of datasets and by load_image and the processors of transformers alike, so nearly all of it is white, and no warning
# says so. A model is asked about a blank picture. Divide by 257 and save 8 bits before.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

python - <<'EOF' 2> >(grep -v "requires torchvision" >&2)
import datasets, numpy as np, PIL, transformers
from PIL import Image
from transformers.image_utils import load_image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

print("pillow", PIL.__version__, "datasets", datasets.__version__, "transformers", transformers.__version__)
ramp = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)  # from black to white
Image.fromarray(ramp).save("scan.png")
Image.fromarray((ramp // 257).astype(np.uint8)).save("scan8.png")

def mean_brightness(name):
    column = datasets.Dataset.from_dict({"image": [name]}).cast_column("image", datasets.Image(mode="RGB"))
    pixels = Gemma3ImageProcessorPil()(images=Image.open(name), return_tensors="np")["pixel_values"]
    return {
        "datasets Image(mode='RGB')": float(np.asarray(column[0]["image"]).mean() / 255),
        "transformers load_image": float(np.asarray(load_image(name)).mean() / 255),
        "Gemma 3's processor": float((np.asarray(pixels).mean() + 1) / 2),
    }

sixteen, eight = mean_brightness("scan.png"), mean_brightness("scan8.png")
for name in sixteen:
    print(f"{name:27} mean brightness of the 16-bit file {sixteen[name]:.3f}, of the 8-bit file {eight[name]:.3f}")

# Expected: 0.5 for both, which are the same ramp.
assert all(abs(value - 0.5) < 0.01 for value in eight.values())
assert all(value > 0.99 for value in sixteen.values()), "changed: 16 bits are scaled now"
EOF
