#!/usr/bin/env bash
# transformers 5.20.2: an image processor turns a photo upright by its EXIF orientation where it is given the file's path, and not where it is given the
# same file opened with PIL; datasets 5.2.0 turns it when it decodes an image column. So one photo is upright in one run and on its side in another,
# and boxes of an attribution lie elsewhere. Call ImageOps.exif_transpose on everything that is opened.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check torch==2.13.0 transformers==5.20.2 datasets==5.2.0 pillow==13.0.0

python - <<'EOF' 2> >(grep -v "requires torchvision" >&2)
import datasets, numpy as np, PIL, transformers
from PIL import Image, ImageDraw, ImageOps
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

print("transformers", transformers.__version__, "datasets", datasets.__version__, "pillow", PIL.__version__)
photo = Image.new("RGB", (64, 32), "red")
ImageDraw.Draw(photo).rectangle([0, 0, 20, 31], fill="blue")
exif = photo.getexif()
exif[0x0112] = 6  # Orientation: the camera was held on its side
photo.save("photo.jpg", exif=exif, quality=95)

column = datasets.Dataset.from_dict({"image": ["photo.jpg"]}).cast_column("image", datasets.Image())[0]["image"]
print("size: opened with PIL", Image.open("photo.jpg").size, "decoded by datasets", column.size)
assert Image.open("photo.jpg").size == (64, 32) and column.size == (32, 64)

for processor in (Gemma3ImageProcessorPil(), LlavaNextImageProcessorPil(image_grid_pinpoints=[[336, 672], [672, 336]])):
    pixels = lambda image: np.asarray(processor(images=image, return_tensors="np")["pixel_values"])
    by_path, opened, upright = pixels("photo.jpg"), pixels(Image.open("photo.jpg")), pixels(ImageOps.exif_transpose(Image.open("photo.jpg")))
    same = lambda one, other: one.shape == other.shape and bool(np.array_equal(one, other))
    print(type(processor).__name__, "path = turned upright:", same(by_path, upright), "  opened file = turned upright:", same(opened, upright))

    # Expected: both, or neither.
    assert same(by_path, upright)
    assert not same(opened, upright), "changed: opened files are turned too"
EOF
