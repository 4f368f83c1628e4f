#!/usr/bin/env bash
# transformers 5.20.2: black lettering on a transparent ground (a usual PNG diagram) is one even black picture to the processors of CLIP, LLaVA-NeXT,
# Gemma 3, Qwen2-VL, SigLIP, Idefics3 and SmolVLM, which drop the alpha channel, black on white to those of Idefics2, Mllama and Chameleon, and an
# error "mean must have 4 elements" in Janus and ViT. So models are compared on different pictures. Paste such pictures on white before.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 pillow==13.0.0

python - <<'EOF' 2> >(grep -v "requires torchvision" >&2)
import importlib, numpy as np, PIL, transformers
from PIL import Image, ImageDraw

print("transformers", transformers.__version__, "pillow", PIL.__version__)
picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
ImageDraw.Draw(picture).rectangle([20, 20, 40, 40], fill=(0, 0, 0, 255))
picture.save("diagram.png")
on_white = Image.new("RGB", picture.size, "white")
on_white.paste(picture, mask=picture)

names = {"clip": "CLIP", "llava_next": "LlavaNext", "gemma3": "Gemma3", "qwen2_vl": "Qwen2VL", "siglip": "Siglip", "idefics3": "Idefics3", "smolvlm": "SmolVLM",
         "idefics2": "Idefics2", "mllama": "Mllama", "chameleon": "Chameleon", "janus": "Janus", "vit": "ViT"}
seen = {}
for module, name in names.items():
    processor = getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), f"{name}ImageProcessorPil")
    more = {"image_grid_pinpoints": [[336, 672]]} if module == "llava_next" else {}

    pixels = lambda image: np.asarray(processor(**more)(images=image, return_tensors="np")["pixel_values"])
    as_black, as_white = pixels(Image.new("RGB", picture.size, "black")), pixels(on_white)
    assert not np.array_equal(as_black, as_white)
    try:
        got = pixels(Image.open("diagram.png"))
        seen[module] = "all black" if np.array_equal(got, as_black) else "black on white" if np.array_equal(got, as_white) else "other"
    except ValueError as error:
        seen[module] = str(error).split(" if ")[0]
    print(f"{name:11} {seen[module]}")

# Expected: the same picture to all of them.
kinds = {kind: {name for name in seen if seen[name] == kind} for kind in set(seen.values())}
assert kinds["all black"] == {"clip", "llava_next", "gemma3", "qwen2_vl", "siglip", "idefics3", "smolvlm"}, f"changed: {kinds}"
assert kinds["black on white"] == {"idefics2", "mllama", "chameleon"} and kinds["mean must have 4 elements"] == {"janus", "vit"}, f"changed: {kinds}"
EOF
