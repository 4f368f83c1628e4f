"""Tiny models with tokenizers and chat templates of the shapes that published ones have."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from grains.lm import LanguageModel
from grains.models import wrap
from helpers import tiny
from helpers.families import tiny_model

DEFAULT_SYSTEM = "You are Kiwi, a model of the test laboratory."
# A system prompt of its own, turns between two tokens (the shape of Qwen2.5's).
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thoughts in a block before the answer, which earlier answers lose (the shape of Qwen3's).
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set words = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n{% endif %}{{ words }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
    "{% endif %}"
)
# The generation prompt opens a block of thoughts, answers have none (the shape of DeepSeek-R1's).
OPENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# The generation prompt opens a block of thoughts, answers have its end alone (the shape of
# GLM-4.7's).
CLOSES = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}{% endif %}</think>"
    "{{ m.content }}<|end|>{% else %}<|user|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|bot|><think>{% endif %}"
)
# Answers have an empty block before them, and no message has thoughts (the shape of Kimi-K2's).
EMPTY = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|><think></think>{{ m.content }}"
    "<|end|>{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>{% endif %}"
)
# The model opens its thoughts by itself, unless it is told to leave them out (as SmolLM3's).
TOLD_OFF = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{{ m.content }}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}"
    "{% endif %}"
)
# The last answer stands in the block that the prompt opens (the shape of Nemotron-Nano-v2's).
WITHIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|><think>\n{{ m.content }}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
# Channels: thoughts in one, the answer in another, a system turn of its own before the user's
# (the shape of GPT-OSS').
CHANNELS = (
    "<|start|>system<|message|>" + DEFAULT_SYSTEM + "<|end|>"
    "{% for m in messages %}{% if m.role == 'system' %}<|start|>developer<|message|>{{ m.content }}"
    "<|end|>{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% else %}"
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Marks that are words, the system prompt within the first turn (the shape of Llama 2's).
BRACKETS = (
    "{% set start = 0 %}{% if messages[0].role == 'system' %}{% set start = 1 %}{% endif %}"
    "{% for m in messages[start:] %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and start %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n{% endif %}"
    "{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
# A date that stands in every system turn (the shape of Llama 3.1's).
DATED = (
    "{{ bos_token }}<|im_start|>system\n\nToday Date: 26 Jul 2024\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n\n"
    "{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# No system prompts (the shape of Gemma's).
REFUSES = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
MARKERS = [
    "<|user|>",
    "<|bot|>",
    "<|end|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
]


def byte_level(base, template: str):
    """SmolLM2's tokenizer with the tokens of the templates; those of thoughts are not special."""
    tokenizer = copy.deepcopy(base)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def _texts():
    return [text for row in tiny.QUESTIONS for text in row] + ["INST [ ] < > / s | im_end im_start"]


SPECIAL = ["<unk>", "<s>", "</s>"]


def sentencepiece_like(kind: str, template: str = BRACKETS) -> PreTrainedTokenizerFast:
    """A tokenizer with blanks as part of words, control tokens in its vocabulary, and a BOS.

    kind: unigram, or bpe, whose merges can make the letters of a control token (as Llama 2's).
    """
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(_texts(), trainer)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        trainer = BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
        tokenizer.train_from_iterator([*_texts(), *["</s>"] * 50], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        chat_template=template,
    )


def model(tokenizer, name: str = "tiny-chat") -> LanguageModel:
    """A random Llama with a tokenizer."""
    return wrap(name, tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, self_check=False)


def reciter(tokenizer, text: str, start: str) -> LanguageModel:
    """A model that writes `text` behind `start`, each of its tokens after the one before it.

    No token may occur twice in both. All it reads is the last token, as its layers add little.
    """
    network = tiny.llama(len(tokenizer), layers=2)
    ids = tokenizer(start, add_special_tokens=False).input_ids[-1:]
    ids += tokenizer(text, add_special_tokens=False).input_ids
    assert len(set(ids)) == len(ids), tokenizer.convert_ids_to_tokens(ids)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight *= 1e-3
            layer.mlp.down_proj.weight *= 1e-3
        network.model.norm.weight.fill_(1.0)
        rows = normalize(network.model.embed_tokens.weight, dim=1)
        network.lm_head.weight.zero_()
        network.lm_head.weight[ids[1:]] = 20 * rows[ids[:-1]]  # drawn tokens are the same
    return wrap("reciter", network, tokenizer)
