"""Pictures: opening them, their model inputs, and where each image token lies in the picture."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    unpad_image,
)

from grains.data import Example, StoredPicture
from grains.errors import UserError
from grains.lm import LanguageModel

Box = tuple[float, float, float, float]


def open_image(example: Example) -> Image.Image:
    """The example's picture, upright, as RGB; transparency on white.

    Raises UserError, naming the example, if it is missing or broken.
    """
    stored = example.image.read() if isinstance(example.image, StoredPicture) else example.image
    try:
        if isinstance(stored, Image.Image):
            picture = stored
        elif isinstance(stored, dict) and stored.get("bytes"):
            picture = Image.open(io.BytesIO(stored["bytes"]))
        else:
            path = stored.get("path") if isinstance(stored, dict) else stored
            if not isinstance(path, (str, Path)) or not Path(path).is_file():
                raise UserError(f"example {example.id}: its picture '{path}' does not exist")
            picture = Image.open(path)
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at white
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"example {example.id}: its picture cannot be read ({error}); mend it or "
            "take the example out"
        ) from error


def blank_like(picture: Image.Image) -> Image.Image:
    """A picture of the same size with nothing on it: all in this picture's median colour."""
    colour = np.median(np.asarray(picture).reshape(-1, 3), axis=0)
    return Image.new("RGB", picture.size, tuple(int(channel) for channel in colour))


def model_inputs(lm: LanguageModel, texts: list[str], pictures: list[Image.Image]) -> dict:
    """What the model's forward takes for prompts with one picture each, padded on the left.

    The prompts come with their placeholder for the picture, as the chat template writes it.
    """
    special = not starts_with_bos(lm, texts[0])
    try:
        inputs = lm.processor(
            text=texts,
            images=[[picture] for picture in pictures],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=special,
        )
    except (ValueError, IndexError, ZeroDivisionError) as error:
        sizes = ", ".join(f"{p.width}x{p.height}" for p in pictures)
        raise UserError(
            f"the image processor of {lm.name} refuses a picture ({sizes}): {error}"
        ) from error
    return {
        key: value.to(lm.device) if isinstance(value, Tensor) else value
        for key, value in inputs.items()
    }


def placeholder(lm: LanguageModel) -> str:
    """What stands for a picture in a prompt's text, in the frame that the family gives it."""
    frame = [getattr(lm.model.config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    if None in frame:
        return lm.processor.image_token
    return lm.processor.image_token.join(lm.tokenizer.convert_ids_to_tokens(frame))


def check_text(lm: LanguageModel, example: Example) -> None:
    """Raise UserError if the example's own words hold what stands for a picture."""
    tokens = lm.tokenizer.convert_ids_to_tokens(sorted(lm.image_ids()))
    reserved = {lm.processor.image_token, *filter(None, tokens)}
    for text in (example.context, example.question, *example.choices):
        for token in reserved:
            if token in text:
                raise UserError(
                    f"example {example.id}: its text holds '{token}', which stands for "
                    "a picture; take it out (the picture's place is before the text)"
                )


def starts_with_bos(lm: LanguageModel, text: str) -> bool:
    """Whether a rendered prompt brings its own BOS, so that none must be put before it."""
    bos = lm.tokenizer.bos_token
    return bool(bos) and text.startswith(bos)


def token_boxes(
    lm: LanguageModel, inputs: dict, picture_size: tuple[int, int], count: int
) -> list[Box | None]:
    """Where each image token of a prompt lies in the picture, in its pixels (x0, y0, x1, y1).

    inputs: the model's inputs of one prompt; picture_size: (width, height); count: image tokens.
    A token that shows no part of the picture (LLaVA-NeXT's row ends) has None, and so have all
    tokens of a family whose layout is not known here.
    """
    kind = lm.model.config.model_type
    if kind == "llava_next":
        boxes = _llava_next_boxes(
            lm, inputs["image_sizes"][0].tolist(), inputs["pixel_values"].shape[1]
        )
    elif "image_grid_thw" in inputs:  # Qwen: merged patches, row by row
        merge = lm.model.config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        boxes = _grid(rows // merge, columns // merge)
    elif (
        math.isqrt(count) ** 2 == count
        and inputs["pixel_values"].shape[0] == 1
        and not getattr(lm.processor.image_processor, "do_center_crop", None)
    ):
        # one square grid over the whole picture
        boxes = _grid(math.isqrt(count), math.isqrt(count))
    else:
        return [None] * count
    if len(boxes) != count:
        raise UserError(f"{lm.name}: {count} image tokens where its layout gives {len(boxes)}")
    width, height = picture_size
    return [
        None if box is None else (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        for box in boxes
    ]


def _grid(rows: int, columns: int) -> list[Box | None]:
    """Boxes of a grid over the unit square, row by row."""
    return [
        (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
        for r in range(rows)
        for c in range(columns)
    ]


def _llava_next_boxes(lm: LanguageModel, size: list[int], views: int) -> list[Box | None]:
    """Base view (the whole picture, squeezed into a square), then the rows of the tiles.

    The tiles cover the picture scaled to fit the best resolution and padded; the features of the
    padding are cut away by the model, with the function that is used here too.
    """
    config = lm.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    base = _grid(side, side)
    if views == 1:
        return [*base, None]
    rows, columns = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    height, width = rows * side, columns * side
    places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    kept = unpad_image(places, size)
    scale = min(height / size[0], width / size[1])
    # The scaled picture lies in the middle of the padded canvas; all in patches.
    tall, wide = size[0] * scale, size[1] * scale
    top, left = (height - tall) / 2, (width - wide) / 2
    boxes = list(base)
    for row in range(kept.shape[1]):
        for column in range(kept.shape[2]):
            y, x = kept[:, row, column].tolist()
            box = np.array(
                [(x - left) / wide, (y - top) / tall, (x + 1 - left) / wide, (y + 1 - top) / tall]
            ).clip(0, 1)
            boxes.append(tuple(box.tolist()))
        boxes.append(None)
    return boxes
