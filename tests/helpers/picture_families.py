"""Tiny random image-text models of more families, beside those of `vlm_models`.

Each has its own processor, made of its pieces, and SmolLM2's tokenizer with the family's tokens.
"""

from __future__ import annotations

import importlib.util

from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    CLIPVisionConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLProcessor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import (
    DeepseekVLImageProcessorPil,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from grains import models
from helpers.families import SIZES, randomise, small_tokenizer

SIDE, PATCH = 28, 7  # pixels of a tile and of a patch, where there are tiles of one size
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
ROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 100.0}


def tokenizer_of(tokens: dict[str, str], *more: str):
    """SmolLM2's tokenizer with these tokens, which it has by name, and more."""
    tokenizer = small_tokenizer(extra_special_tokens=tokens)
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens.values(), *more]})
    return tokenizer


def decoder(tokenizer, kind: str = "llama", **changes) -> dict:
    return SIZES | {"model_type": kind, "vocab_size": len(tokenizer)} | changes


def llava(local: bool):
    tokenizer = tokenizer_of({"image_token": "<image>"})
    vision = CLIPVisionConfig(**VISION, num_hidden_layers=1 if local else 3)
    config = LlavaConfig(
        vision_config=vision,
        text_config=decoder(tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


def mistral3(local: bool):
    # transformers' processor imports torchvision, which nothing else here needs.
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    tokenizer = tokenizer_of({}, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    config = Mistral3Config(
        vision_config=VISION
        | {"model_type": "pixtral", "image_size": 140, "num_hidden_layers": 0 if local else 2},
        text_config=decoder(tokenizer, "mistral"),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pictures = PixtralImageProcessorPil(size={"longest_edge": 140}, patch_size=PATCH)
    processor = PixtralProcessor(pictures, tokenizer, patch_size=PATCH, spatial_merge_size=2)
    return Mistral3ForConditionalGeneration(config), processor


def idefics3(local: bool):
    return _tiled(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, local)


def smolvlm(local: bool):
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    def kind(*pieces, **options):
        return SmolVLMProcessor(*pieces, SmolVLMVideoProcessor(), **options)

    # Its features of a tile must be a multiple of the patch's pixels.
    return _tiled(SmolVLMConfig, SmolVLMForConditionalGeneration, kind, local, 32, 4)


def _tiled(config_kind, model_kind, processor_kind, local: bool, side=SIDE, patch=PATCH):
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tokenizer = tokenizer_of({"image_token": "<image>"}, *special, *rows)
    config = config_kind(
        vision_config=VISION
        | {"image_size": side, "patch_size": patch, "num_hidden_layers": 0 if local else 2},
        text_config=decoder(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side}
    )
    processor = processor_kind(pictures, tokenizer, image_seq_len=(side // patch // 2) ** 2)
    return model_kind(config), processor


def internvl(local: bool):
    tokenizer = tokenizer_of(
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    )
    config = InternVLConfig(
        vision_config=VISION
        | {
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
            "num_hidden_layers": 0 if local else 2,
        },
        text_config=decoder(tokenizer, "qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(SIDE // PATCH // 2) ** 2,
        downsample_ratio=0.5,
    )
    pictures = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    kind = models.without_videos(InternVLProcessor)
    processor = kind(pictures, tokenizer, image_seq_length=(SIDE // PATCH // 2) ** 2)
    return InternVLForConditionalGeneration(config), processor


def aya_vision(local: bool):
    tokenizer = tokenizer_of(
        {"image_token": "<image>"},
        *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
        *("TILE", "TILE_GLOBAL"),
    )
    vision = SiglipVisionConfig(**VISION, num_hidden_layers=1 if local else 3)
    config = AyaVisionConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, "cohere2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        vision_feature_layer=-2,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
    )
    pictures = GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    processor = AyaVisionProcessor(
        pictures, tokenizer, patch_size=PATCH, img_size=SIDE, downsample_factor=2
    )
    return AyaVisionForConditionalGeneration(config), processor


def llava_onevision(local: bool):
    tokenizer = tokenizer_of({"image_token": "<image>", "video_token": "<video>"})
    vision = SiglipVisionConfig(**VISION, num_hidden_layers=1 if local else 3)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=decoder(tokenizer, "qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    pictures = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = models.without_videos(LlavaOnevisionProcessor)(
        pictures,
        tokenizer,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def glm4v(local: bool):
    tokenizer = tokenizer_of(
        {"image_token": "<|image|>", "video_token": "<|video|>"},
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    )
    token = tokenizer.convert_tokens_to_ids
    config = Glm4vConfig(
        vision_config={
            "depth": 0 if local else 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "image_size": 56,
            "spatial_merge_size": 2,
            "out_hidden_size": SIZES["hidden_size"],
        },
        text_config=decoder(tokenizer, "glm4v_text", rope_parameters=ROPE),
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )
    pictures = Glm4vImageProcessorPil(
        size={"shortest_edge": 4 * 28**2, "longest_edge": 20 * 28**2}, patch_size=14, merge_size=2
    )
    processor = models.without_videos(Glm4vProcessor)(pictures, tokenizer)
    return Glm4vForConditionalGeneration(config), processor


def qwen_tokenizer():
    """A tokenizer with Qwen's marks of pictures, and their ids as a config names them."""
    names = ("vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer = tokenizer_of({}, *(f"<|{name}|>" for name in names))
    return tokenizer, {
        f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in names
    }


def qwen2_vl(local: bool):
    tokenizer, ids = qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config={
            "depth": 0 if local else 2,
            "embed_dim": 32,
            "hidden_size": SIZES["hidden_size"],
            "num_heads": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        text_config=decoder(tokenizer, "qwen2_vl_text", rope_parameters=ROPE),
        **ids,
    )
    pictures = Qwen2VLImageProcessorPil(min_pixels=4 * 28**2, max_pixels=20 * 28**2)
    processor = models.without_videos(Qwen2VLProcessor)(pictures, tokenizer)
    return Qwen2VLForConditionalGeneration(config), processor


def qwen3_vl(local: bool):
    tokenizer, ids = qwen_tokenizer()
    config = Qwen3VLConfig(
        vision_config={
            "depth": 0 if local else 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 14,
            "out_hidden_size": SIZES["hidden_size"],
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [] if local else [0, 1],
        },
        text_config=decoder(tokenizer, "qwen3_vl_text", rope_parameters=ROPE, head_dim=12),
        **ids,
    )
    pictures = Qwen2VLImageProcessorPil(patch_size=14, min_pixels=4 * 28**2, max_pixels=20 * 28**2)
    processor = models.without_videos(Qwen3VLProcessor)(pictures, tokenizer)
    return Qwen3VLForConditionalGeneration(config), processor


def paligemma(local: bool):
    tokenizer = tokenizer_of({}, "<image>", "<bos>")
    tokenizer.bos_token = "<bos>"
    config = PaliGemmaConfig(
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "num_hidden_layers": 0 if local else 2},
        text_config=decoder(tokenizer, "gemma", head_dim=12, vocab_size=len(tokenizer) + 1200),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=SIZES["hidden_size"],
    )
    pictures = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pictures.image_seq_length = (SIDE // PATCH) ** 2
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(pictures, tokenizer)


def deepseek_vl(local: bool):
    tokenizer = tokenizer_of({"image_token": "<image>"})
    config = DeepseekVLConfig(
        vision_config=VISION
        | {"model_type": "siglip_vision_model", "num_hidden_layers": 0 if local else 2},
        text_config=decoder(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    pictures = DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE}, min_size=PATCH)
    processor = DeepseekVLProcessor(pictures, tokenizer, num_image_tokens=(SIDE // PATCH) ** 2)
    return DeepseekVLForConditionalGeneration(config), processor


def gemma4(local: bool):
    from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
    from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
    from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor

    tokenizer = tokenizer_of(
        {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
        | {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"},
        "<|video|>",
    )
    token = tokenizer.convert_tokens_to_ids
    config = Gemma4Config(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "patch_size": PATCH,
            "pooling_kernel_size": 2,
            "num_hidden_layers": 0 if local else 2,
        },
        text_config=decoder(
            tokenizer,
            "gemma4_text",
            head_dim=12,
            global_head_dim=12,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=len(tokenizer),
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        audio_config=None,
        image_token_id=token("<|image|>"),
        boi_token_id=token("<|image>"),
        eoi_token_id=token("<image|>"),
        video_token_id=token("<|video|>"),
        audio_token_id=token("<|audio|>"),
    )
    pictures = Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=2)
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), pictures, tokenizer, Gemma4VideoProcessor()
    )
    return Gemma4ForConditionalGeneration(config), processor


def gemma3n(local: bool):
    from transformers.models.gemma3n.feature_extraction_gemma3n import Gemma3nAudioFeatureExtractor
    from transformers.models.gemma3n.processing_gemma3n import Gemma3nProcessor

    names = ("image", "boi", "eoi", "audio", "boa", "eoa")
    tokenizer = tokenizer_of({f"{name}_token": f"<{name}>" for name in names})
    token = tokenizer.convert_tokens_to_ids
    words = len(tokenizer)
    config = Gemma3nConfig(
        vision_config={
            "architecture": "test_efficientnet",  # of timm's own tests
            "hidden_size": 256,
            "vocab_offset": words,
            "vocab_size": 8,
        },
        audio_config={
            "vocab_offset": words + 8,
            "vocab_size": 8,
            "hidden_size": 24,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
        },
        text_config=decoder(
            tokenizer,
            "gemma3n_text",
            head_dim=12,
            vocab_size=words + 16,
            vocab_size_per_layer_input=words,
            hidden_size_per_layer_input=8,
            laurel_rank=8,
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0],
        ),
        vision_soft_tokens_per_image=4,
        **{f"{name}_token_id": token(f"<{name}>") for name in names},
    )
    pictures = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(), pictures, tokenizer, image_seq_length=4
    )
    return Gemma3nForConditionalGeneration(config), processor


def llama4(local: bool):
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor
    from transformers.models.llama4.processing_llama4 import Llama4Processor

    names = ("image", "image_start", "image_end", "patch", "tile_x_separator", "tile_y_separator")
    tokenizer = tokenizer_of({}, *(f"<|{name}|>" for name in names))
    token = tokenizer.convert_tokens_to_ids
    config = Llama4Config(
        vision_config=VISION
        | {
            "num_hidden_layers": 0 if local else 2,
            "intermediate_size": 96,  # four patches of 24 are put together
            **dict.fromkeys(("vision_output_dim", "projector_input_dim"), 24),
            "projector_output_dim": 24,
        },
        text_config=decoder(
            tokenizer,
            "llama4_text",
            head_dim=12,
            intermediate_size_mlp=80,
            num_local_experts=2,
            attention_chunk_size=12,
        ),
        image_token_index=token("<|patch|>"),
        boi_token_index=token("<|image_start|>"),
        eoi_token_index=token("<|image_end|>"),
    )
    pictures = Llama4ImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=6)
    processor = Llama4Processor(pictures, tokenizer, patch_size=PATCH, pixel_shuffle_ratio=0.5)
    return Llama4ForConditionalGeneration(config), processor


# transformers cannot load their processors without these packages, which nothing else here needs.
NEEDS = {
    "mistral3": ("torchvision",),
    "gemma3n": ("timm", "torchvision"),
    "gemma4": ("torchvision",),
    "llama4": ("torchvision",),
    "smolvlm": ("torchvision", "num2words"),
}
FAMILIES = {
    make.__name__: make
    for make in (
        *(llava, mistral3, idefics3, smolvlm, internvl, aya_vision, llava_onevision),
        *(glm4v, qwen2_vl, qwen3_vl, paligemma, deepseek_vl, gemma3n, gemma4, llama4),
    )
}


def available(family: str) -> bool:
    """Whether the packages that its processor needs are installed."""
    return all(importlib.util.find_spec(package) for package in NEEDS.get(family, ()))


def parts(family: str, local: bool = False, seed: int = 0):
    """A random model of a family and its processor.

    local: a vision tower without attention, so that an image token depends on its own patch of the
        picture alone.
    """
    model, processor = FAMILIES[family](local)
    return randomise(model, seed).eval(), processor


def make(family: str, local: bool = False) -> models.LanguageModel:
    """A tiny model of a family; it has passed the self-check."""
    model, processor = parts(family, local)
    return models.wrap(f"tiny-{family}", model, processor.tokenizer, processor)
