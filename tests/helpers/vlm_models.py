"""Tiny random image-text models of three families, each with its own processor and chat template.

The configuration, model and processor classes are the families' own; the tokenizer is SmolLM2's
with the family's special tokens. What makes a family difficult is kept: LLaVA-NeXT cuts pictures
into tiles and drops their padding, Qwen2.5-VL gives image tokens rows and columns as positions,
Gemma-3's image tokens see each other both ways, in layers with a sliding window and without.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from grains import models
from grains.data import Example
from helpers.families import SIZES, randomise, small_tokenizer, tiny_config

FAMILIES = ("llava-next", "qwen2.5-vl", "gemma-3")
TILE, PATCH = 28, 7  # LLaVA-NeXT: pixels of a tile, of a patch
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MERGED = 28  # Qwen2.5-VL: pixels that one token stands for, two by two patches
MAX_TOKENS = 20  # Qwen2.5-VL: of a picture at most
GRID = 4  # Gemma-3: image tokens along a side, whatever the picture

VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<start_of_image>' }}{% else %}{{ content['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# New special tokens, those that the processor finds by name, the token put before every text.
TOKENS = {
    "llava-next": (["<s>", "</s>", "<unk>", "<pad>", "<image>"], {"image_token": "<image>"}, "<s>"),
    "qwen2.5-vl": (
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        {},
        None,
    ),
    "gemma-3": (
        [
            "<bos>",
            "<eos>",
            "<pad>",
            "<unk>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ],
        {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "<bos>",
    ),
}
NAMED = {
    "llava-next": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
    "qwen2.5-vl": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma-3": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
}
TEMPLATES = {"llava-next": VICUNA, "qwen2.5-vl": CHATML, "gemma-3": TURNS}


def tokenizer_of(family: str):
    tokens, by_name, bos = TOKENS[family]
    tokenizer = small_tokenizer(extra_special_tokens=by_name)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens, **NAMED[family]})
    tokenizer.chat_template = TEMPLATES[family]
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    else:
        tokenizer.bos_token = None
    return tokenizer


def processor_of(family: str, tokenizer):
    template = TEMPLATES[family]
    if family == "llava-next":
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": TILE},
                crop_size={"height": TILE, "width": TILE},
                image_grid_pinpoints=PINPOINTS,
            ),
            tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "qwen2.5-vl":
        pictures = Qwen2VLImageProcessorPil(
            min_pixels=4 * MERGED**2, max_pixels=MAX_TOKENS * MERGED**2
        )
        # The video processor, which no picture passes through, cannot be made without torchvision.
        return models.without_videos(Qwen2_5_VLProcessor)(
            pictures, tokenizer, chat_template=template
        )
    return Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 56, "width": 56}),
        tokenizer,
        image_seq_length=GRID**2,
        chat_template=template,
    )


def config_of(family: str, tokenizer, local: bool = False, **changes):
    """local: a vision tower without attention, so that an image token depends on its own patch
    of the picture alone."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    sizes = SIZES | {"vocab_size": len(tokenizer), **special, **changes}
    token = tokenizer.convert_tokens_to_ids
    if family == "llava-next":
        vision = CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=1 if local else 3,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
        )
        return LlavaNextConfig(
            vision_config=vision,
            text_config=LlamaConfig(**sizes),
            image_token_index=token("<image>"),
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=(TILE // PATCH) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            **special,
        )
    if family == "qwen2.5-vl":
        vision = {
            "depth": 0 if local else 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [] if local else [1],
            "out_hidden_size": sizes["hidden_size"],
        }
        rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 100.0}
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=sizes | {"rope_parameters": rope},
            image_token_id=token("<|image_pad|>"),
            video_token_id=token("<|video_pad|>"),
            vision_start_token_id=token("<|vision_start|>"),
            vision_end_token_id=token("<|vision_end|>"),
            **special,
        )
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=0 if local else 2,
        num_attention_heads=2,
        image_size=56,
        patch_size=7,
    )
    return Gemma3Config(
        vision_config=vision,
        text_config=tiny_config("gemma3", **sizes),
        mm_tokens_per_image=GRID**2,
        image_token_index=token("<image_soft_token>"),
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        tie_word_embeddings=False,  # a random head that is tied repeats the last word
        **special,
    )


def parts(family: str, attention: str = "sdpa", seed: int = 0, **changes):
    """A random model of a family and its processor; `changes` to the decoder's config."""
    tokenizer = tokenizer_of(family)
    config = config_of(family, tokenizer, **changes)
    config._attn_implementation = attention
    kind = {
        "llava-next": LlavaNextForConditionalGeneration,
        "qwen2.5-vl": Qwen2_5_VLForConditionalGeneration,
        "gemma-3": Gemma3ForConditionalGeneration,
    }[family]
    return randomise(kind(config), seed).eval(), processor_of(family, tokenizer)


def make(family: str, attention: str = "sdpa", local: bool = False) -> models.LanguageModel:
    """A tiny model of a family, the same one for all tests; it has passed the self-check."""
    return _made(family, attention, local)


@cache
def _made(family: str, attention: str, local: bool) -> models.LanguageModel:
    model, processor = parts(family, attention, local=local)
    return models.wrap(f"tiny-{family}", model, processor.tokenizer, processor)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse coloured noise: every part of it differs from every other."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def with_object(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A grey picture with one red rectangle, box = (x0, y0, x1, y1) in pixels."""
    drawn = Image.new("RGB", size, (128, 128, 128))
    if box:
        ImageDraw.Draw(drawn).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(255, 0, 0))
    return drawn


def asked(
    image,
    question="What is on the table?",
    choices=("Two red cups", "A dog, I think"),
    label=0,
    id="one",
) -> Example:
    """An example with a picture; the first choice is the preferred one."""
    return Example(id, question, tuple(choices), label, image=image)


def saved(image, form="PNG", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return {"bytes": file.getvalue(), "path": None}


def rotated(image):
    """Stored on its side, with the note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    return saved(image.transpose(Image.Transpose.ROTATE_90), exif=exif)
