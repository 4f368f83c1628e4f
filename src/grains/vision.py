"""Pictures: opening them, model inputs, and the box of the picture that each image token shows."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import ProcessorMixin

from grains.controls import Controls, Span
from grains.data import Example, StoredPicture
from grains.errors import UserError
from grains.lm import LanguageModel

Box = tuple[float, float, float, float]  # x0, y0, x1, y1; the origin is the upper left corner


def open_image(example: Example) -> Image.Image:
    """The example's picture as RGB, turned upright as its EXIF data says, transparency on white.

    Raises UserError, naming the example, if the picture is missing or broken.
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
        if picture.mode.startswith("I"):  # 16-bit grey values, which convert() would clip to 255
            grey = (np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)
            exif = picture.getexif()
            picture = Image.fromarray(grey)
            picture.getexif().update(exif)
        picture = ImageOps.exif_transpose(_of_usable_size(picture))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture)
        return picture.convert("RGB")
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"example {example.id}: its picture cannot be read ({error}); repair it or take the "
            "example out"
        ) from error


# No image processor takes as many pixels as are left of a larger picture; its copies would take
# gigabytes.
LARGEST_PICTURE = 2**26


def _of_usable_size(picture: Image.Image) -> Image.Image:
    """The picture, shrunk by a whole factor if it is larger than any model uses."""
    factor = math.ceil(math.sqrt(picture.width * picture.height / LARGEST_PICTURE))
    if factor < 2:
        return picture
    if picture.mode in ("1", "P", "PA"):  # their values are no brightness
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    return picture.reduce(factor)


def blank_like(picture: Image.Image) -> Image.Image:
    """A picture of the same size in a single colour, the median colour of this picture."""
    colour = np.median(np.asarray(picture).reshape(-1, 3), axis=0)
    return Image.new("RGB", picture.size, tuple(int(channel) for channel in colour))


@dataclass(frozen=True)
class Guard:
    """Control tokens of a model, and the spans of a prompt in which they are words."""

    controls: Controls
    words: tuple[Span, ...]


def model_inputs(
    lm: LanguageModel,
    texts: list[str],
    pictures: list[Image.Image],
    guards: Sequence[Guard | None] = (),
) -> dict:
    """What the model's forward takes for B prompts with one picture each, padded on the left.

    texts: B prompts, which hold the placeholder of their picture. pictures: B pictures.
    guards: of the prompts whose own words hold control tokens.
    Returns input_ids and attention_mask (B, P), pixel_values and what else the family needs.
    Raises UserError if the image processor refuses a picture.
    """
    special = not starts_with_bos(lm, texts[0])
    if any(guards):
        texts, processor = _guarded(lm, texts, pictures, guards)
    else:
        processor = lm.processor
    try:
        inputs = processor(
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
        # Llama 4's pixels are in bfloat16, which its tower does not take in another precision.
        key: value.to(lm.device, lm.dtype if value.dtype == torch.bfloat16 else value.dtype)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
        if key != "labels"  # of PaliGemma, whose model would compute a loss
    }


def _guarded(
    lm: LanguageModel, texts: list[str], pictures: list[Image.Image], guards: Sequence[Guard | None]
) -> tuple[list[str], ProcessorMixin]:
    """Texts in which control tokens have other names, and a processor that knows these names.

    Tokens of pictures, and those that the processor itself writes, keep their names.
    """
    controls = next(guard.controls for guard in guards if guard)
    written = model_inputs(lm, texts, pictures)["input_ids"].flatten().tolist()
    in_texts = {token for ids in lm.tokenizer(texts).input_ids for token in ids}
    controls = controls.without(frozenset(lm.image_ids() | ({*written} - in_texts)))
    masked = [
        controls.masked(text, guard.words if guard else ())[0]
        for text, guard in zip(texts, guards, strict=True)
    ]
    return masked, controls.processor(lm.processor)


def placeholder(lm: LanguageModel) -> str:
    """The placeholder of a picture in a prompt's text, with the start and end tokens it needs."""
    frame = [getattr(lm.model.config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    if None in frame:
        return lm.processor.image_token
    return lm.processor.image_token.join(lm.tokenizer.convert_ids_to_tokens(frame))


def check_text(lm: LanguageModel, example: Example, more: Iterable[str] = ()) -> None:
    """Raise UserError if the example's own words hold a token that stands for a picture.

    more: other words of its prompt.
    """
    tokens = lm.tokenizer.convert_ids_to_tokens(sorted(lm.image_ids()))
    reserved = {lm.processor.image_token, *filter(None, tokens)}
    turns = (text for _, text in example.turns)
    for text in (example.context, example.question, *turns, *example.choices, *more):
        for token in reserved:
            if token in text:
                raise UserError(
                    f"example {example.id}: its text holds '{token}', which stands for "
                    "a picture; take it out (the picture's place is before the text)"
                )


def starts_with_bos(lm: LanguageModel, text: str) -> bool:
    """Whether a rendered prompt already begins with the BOS token."""
    bos = lm.tokenizer.bos_token
    return bool(bos) and text.startswith(bos)


def token_boxes(
    lm: LanguageModel, inputs: dict, picture_size: tuple[int, int], count: int
) -> list[Box | None]:
    """The box of the picture, in pixels, that each image token of a prompt shows.

    inputs: the model's inputs for one prompt. picture_size: (width, height) in pixels.
    count: the number of image tokens.
    Returns a box or None for each: None for a token that shows no part of the picture (LLaVA-NeXT's
    row ends), and for all tokens of a family whose layout is unknown.
    Raises UserError if a known layout has another number of tokens.
    """
    kind = lm.model.config.model_type
    layout = LAYOUTS.get(kind)
    if layout is not None:
        boxes = layout(lm, inputs, picture_size, count)
    elif "image_grid_thw" in inputs:  # Qwen: merged patches, row by row
        merge = lm.model.config.vision_config.spatial_merge_size
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        boxes = _grid(rows // merge, columns // merge)
    else:
        return [None] * count
    if boxes is None:
        return [None] * count
    if len(boxes) != count:
        raise UserError(f"{lm.name}: {count} image tokens where its layout gives {len(boxes)}")
    width, height = picture_size
    return [
        None if box is None else (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        for box in boxes
    ]


def _grid(rows: int, columns: int) -> list[Box | None]:
    """The boxes of a grid over the unit square, row by row."""
    return [
        (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
        for r in range(rows)
        for c in range(columns)
    ]


def _square(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """One square grid over the whole picture, squeezed into a square (Gemma-3, PaliGemma)."""
    side = math.isqrt(count)
    cut = getattr(lm.processor.image_processor, "do_center_crop", None)
    if side**2 != count or inputs["pixel_values"].shape[0] != 1 or cut:
        return None
    return _grid(side, side)


def _cropped(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """LLaVA-1.5: one square grid over the middle of the picture; what lies outside is not seen."""
    side, pictures = math.isqrt(count), lm.processor.image_processor
    if "image_sizes" in inputs:  # with Pixtral's tower
        return _pixtral(lm, inputs, size, count)
    crop = pictures.crop_size
    squeezed = pictures.size.get("shortest_edge") == crop.get("height") == crop.get("width")
    if side**2 != count or not (pictures.do_center_crop and squeezed):
        return None
    width, height = size
    shown = min(width, height)
    left, top = (width - shown) / 2, (height - shown) / 2
    return [
        (
            (left + box[0] * shown) / width,
            (top + box[1] * shown) / height,
            (left + box[2] * shown) / width,
            (top + box[3] * shown) / height,
        )
        for box in _grid(side, side)
        if box
    ]


def _pixtral(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """Mistral-3 and Pixtral: a grid of the size to which the picture was scaled."""
    patch = getattr(lm.processor, "patch_size", None)
    merge = getattr(lm.processor, "spatial_merge_size", None)
    if patch is None or merge is None:
        return None
    height, width = (int(edge) // (patch * merge) for edge in inputs["image_sizes"][0])
    return _grid(height, width)


def _padded_square(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """DeepSeek-VL: one square grid over the picture, which is padded to a square on both sides."""
    side, pictures = math.isqrt(count), lm.processor.image_processor
    if side**2 != count or not (pictures.do_resize and pictures.do_pad):
        return None
    edge = pictures.size["height"]
    # Width and height of the scaled picture in pixels, and how far it is from the square's edges.
    scaled = [max(round(length * edge / max(size)), pictures.min_size) for length in size]
    whole = max(scaled)
    before = [(whole - length) // 2 for length in scaled]
    return [
        _clipped([(box[i] * whole - before[i % 2]) / scaled[i % 2] for i in range(4)])
        for box in _grid(side, side)
        if box
    ]


def _clipped(corners: list[float]) -> Box | None:
    """The part of a box that lies in the unit square, None if there is none."""
    left, top, right, bottom = (min(max(corner, 0.0), 1.0) for corner in corners)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _top_left_tiles(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """Llama 4: tiles, by the separators in the prompt, of a canvas in whose upper left corner the
    scaled picture lies; then, if there are several, the whole picture squeezed into a square."""
    # Needs torchvision, as the family's processor does.
    from transformers.models.llama4.image_processing_llama4 import get_max_res_without_distortion

    tokens = lm.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    rows = max(1, tokens.count(lm.processor.tile_global_token))
    columns = tokens.count(lm.processor.tile_token) // rows + 1
    several = rows * columns > 1
    views = rows * columns + several
    side = math.isqrt(count // views)
    if side**2 * views != count:
        return None
    pictures = lm.processor.image_processor
    edge, (width, height) = pictures.size["height"], size
    most = rows * edge, columns * edge
    if not pictures.resize_to_max_canvas:
        most = min(max(height, edge), most[0]), min(max(width, edge), most[1])
    scaled = get_max_res_without_distortion((height, width), most)
    # Of the canvas as a share of the scaled picture, across and down.
    canvas = columns * edge / max(scaled[1], 1), rows * edge / max(scaled[0], 1)
    tiles = _tiles(rows, columns, rows * columns * side**2, whole=False) or []
    boxes = [_clipped([box[i] * canvas[i % 2] for i in range(4)]) for box in tiles if box]
    return [*boxes, *_grid(side, side)] if several else boxes


def _pooled(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """Gemma-4: squares of patches, row by row, of a picture scaled to a multiple of them."""
    if "image_position_ids" not in inputs:
        return None
    merged = lm.processor.image_processor.pooling_kernel_size
    columns, rows = ((inputs["image_position_ids"][0].amax(0) + 1) // merged).tolist()
    return _grid(rows, columns)


def _rows_and_columns(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """Idefics3 and SmolVLM: tiles whose place stands in the prompt, then the whole picture."""
    text = lm.tokenizer.decode(inputs["input_ids"][0])
    places = [tuple(map(int, place)) for place in re.findall(r"<row_(\d+)_col_(\d+)>", text)]
    rows, columns = max(places, default=(0, 0))
    return _tiles(rows, columns, count, whole=True)


def _got_tiles(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """InternVL and Aya Vision: tiles of the grid that fits the picture best, then all of it."""
    # Model code is imported where a picture needs it: for words it takes long in vain.
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    pictures, tiles = lm.processor.image_processor, inputs["pixel_values"].shape[0]
    if tiles == 1:
        return _tiles(0, 0, count, whole=True)
    side = (pictures.size["height"], pictures.size["width"])
    columns, rows = get_optimal_tiled_canvas(
        (size[1], size[0]), side, pictures.min_patches, pictures.max_patches
    )
    whole = rows * columns > 1
    return _tiles(rows, columns, count, whole) if tiles == rows * columns + whole else None


def _tiles(rows: int, columns: int, count: int, whole: bool) -> list[Box | None] | None:
    """Tiles row by row, a square grid in each, and one over the whole picture at the end."""
    tiles = rows * columns + whole
    side = math.isqrt(count // tiles)
    if side**2 * tiles != count:
        return None
    inside: list[Box | None] = []
    for row in range(rows):
        for column in range(columns):
            inside += [
                (
                    (column + box[0]) / columns,
                    (row + box[1]) / rows,
                    (column + box[2]) / columns,
                    (row + box[3]) / rows,
                )
                for box in _grid(side, side)
                if box
            ]
    return [*inside, *_grid(side, side)] if whole else inside


def _llava_next(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """LLaVA-1.6: the whole picture, then tiles."""
    return _llava_next_boxes(lm, inputs["image_sizes"][0].tolist(), inputs["pixel_values"].shape[1])


def _llava_onevision(
    lm: LanguageModel, inputs: dict, size: tuple[int, int], count: int
) -> list[Box | None] | None:
    """LLaVA-OneVision: as LLaVA-1.6, its tiles made smaller where they would be too many."""
    boxes = _llava_next_boxes(
        lm, inputs["image_sizes"][0].tolist(), inputs["pixel_values"].shape[1]
    )
    config = lm.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    base, tiles = boxes[: side**2], boxes[side**2 :]
    rows = tiles.count(None)
    if inputs["pixel_values"].shape[1] == 1 or not rows:
        return boxes
    columns = len(tiles) // rows - 1
    most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (most * side**2))
    if ratio <= 1.1:
        return boxes
    # The features are interpolated to fewer: each stands for an equal part of what is shown.
    left, top = tiles[0][:2]  # type: ignore[index]
    right, bottom = tiles[-2][2:]  # type: ignore[index]
    rows, columns = int(rows // ratio), int(columns // ratio)
    smaller: list[Box | None] = []
    for index, box in enumerate(_grid(rows, columns)):
        assert box
        smaller.append(
            (
                left + box[0] * (right - left),
                top + box[1] * (bottom - top),
                left + box[2] * (right - left),
                top + box[3] * (bottom - top),
            )
        )
        if (index + 1) % columns == 0:
            smaller.append(None)
    return [*base, *smaller]


def _llava_next_boxes(lm: LanguageModel, size: list[int], views: int) -> list[Box | None]:
    """Boxes in the unit square: first the base view, then the tiles, row by row.

    The base view is the whole picture squeezed into a square. The tiles cover the picture scaled to
    fit the best resolution, and padded. The model removes the features of the padding; the boxes
    are removed with the same function of transformers.

    size: (height, width) of the picture in pixels; views: 1 + the number of tiles.
    """
    from transformers.models.llava_next.modeling_llava_next import (
        get_anyres_image_grid_shape,
        unpad_image,
    )

    config = lm.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    base = _grid(side, side)
    if views == 1:
        return [*base, None]
    rows, columns = get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    height, width = rows * side, columns * side
    patches = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    kept = unpad_image(patches, size)
    # The scaled picture lies in the middle of the padded canvas; all lengths are in patches.
    scale = min(height / size[0], width / size[1])
    scaled_height, scaled_width = size[0] * scale, size[1] * scale
    top, left = (height - scaled_height) / 2, (width - scaled_width) / 2
    boxes = list(base)
    for row in range(kept.shape[1]):
        for column in range(kept.shape[2]):
            y, x = kept[:, row, column].tolist()
            box = np.array(
                [
                    (x - left) / scaled_width,
                    (y - top) / scaled_height,
                    (x + 1 - left) / scaled_width,
                    (y + 1 - top) / scaled_height,
                ]
            ).clip(0, 1)
            boxes.append(tuple(box.tolist()))
        boxes.append(None)
    return boxes


# How the image tokens of a family lie over the picture, in the unit square; None if this picture
# or processor is laid out in a way that is not known.
LAYOUTS: dict[
    str, Callable[[LanguageModel, dict, tuple[int, int], int], list[Box | None] | None]
] = {
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "llava": _cropped,
    "vipllava": _cropped,
    "mistral3": _pixtral,
    "idefics3": _rows_and_columns,
    "smolvlm": _rows_and_columns,
    "internvl": _got_tiles,
    "aya_vision": _got_tiles,
    "deepseek_vl": _padded_square,
    "gemma4": _pooled,
    "llama4": _top_left_tiles,
    "gemma3": _square,
    "shieldgemma2": _square,
    "paligemma": _square,
}
