"""LLaVA-NeXT with random weights, of any size: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

# Of llava-hf/llava-v1.6-vicuna-7b-hf, in pixels of its tiles of 336.
TILE = 336
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Made-up words, as many as the model has embeddings, with a BOS before every text."""
    special = ["<s>", "</s>", "<pad>", "<unk>", "<image>", "user", "assistant", "Q:", "A:"]
    words = [*special, *(f"w{number}" for number in range(vocabulary - len(special)))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    made.chat_template = CHAT
    return made


def parts(text: dict, clip: dict) -> tuple[LlavaNextConfig, LlavaNextProcessor]:
    """The configuration and the processor of a model.

    text, clip: the fields of the decoder's and of the vision tower's configuration. Pictures are
    cut as the 7B model does, into tiles of clip's image_size.
    """
    tile, patch = clip["image_size"], clip["patch_size"]
    pinpoints = [[round(side * tile / TILE) for side in pinpoint] for pinpoint in PINPOINTS]
    words = tokenizer(text["vocab_size"])
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**clip),
        text_config=LlamaConfig(**text, bos_token_id=0, eos_token_id=1, pad_token_id=2),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=(tile // patch) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=pinpoints,
    )
    processor = LlavaNextProcessor(
        pictures,
        words,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return config, processor


# 121 tokens of the whole picture and 506 of its four tiles.
SMALL_TEXT = {
    "vocab_size": 600,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
SMALL_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 77,
    "patch_size": 7,
}
WORDS_BEFORE = 64  # of a prompt, before the picture, as a system prompt


def save_small(folder: Path) -> None:
    """A small model with 627 tokens for a square picture and words before it."""
    config, processor = parts(SMALL_TEXT, SMALL_CLIP)
    words = " ".join(f"w{word}" for word in range(WORDS_BEFORE))
    processor.chat_template = "{{ '" + words + " ' }}" + CHAT
    torch.manual_seed(0)
    LlavaNextForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
