"""A language model and where its decoder's parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grains.errors import UserError


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal or image-text language model and where its decoder's parts are.

    layers: the L decoder layers; norm: the final norm; head: hidden states -> logits.
    embed: token ids -> the embeddings that enter layer 0.
    processor: the image-text processor, or None for a text-only model.
    memory: bytes that activations kept for a gradient may take.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    embed: nn.Embedding
    processor: Any = None
    memory: int = 4 * 2**30

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        hook = getattr(self.embed, "_hf_hook", None)
        where = getattr(hook, "execution_device", None)
        return torch.device(where) if where is not None else self.embed.weight.device

    @property
    def hidden_size(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was made for, None where its config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def image_token_id(self) -> int | None:
        """The placeholder that stands in the token ids for each image feature."""
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        return token if token is not None else getattr(config, "image_token_index", None)

    def image_ids(self) -> set[int]:
        """Token ids that stand for an image: placeholders that the image features replace."""
        config = self.model.config
        names = (
            "image_token_id",
            "image_token_index",
            "video_token_id",
            "vision_start_token_id",
            "vision_end_token_id",
            "boi_token_id",
            "eoi_token_id",
        )
        return {
            getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)
        }

    def special_ids(self) -> set[int]:
        """Token ids that are no words of the prompt: BOS, chat-template markers, padding."""
        return set(self.tokenizer.all_special_ids)

    def replacement_id(self, kind: str = "pad") -> int:
        """The token that stands for 'no word here': pad or unk, the other where one is missing."""
        for name in (kind, "unk" if kind == "pad" else "pad", "eos"):
            token = getattr(self.tokenizer, f"{name}_token_id")
            if token is not None:
                return token
        raise UserError(
            f"{self.name}: its tokenizer has no pad, unk or end-of-text token to replace words with"
        )

    def identity(self) -> dict[str, Any]:
        """What ties an artifact to this model: name, layers, hidden size, and a few weights."""
        with align_module_device(self.norm):  # brings a norm that was put off to a disk
            weight = self.norm.get_parameter("weight")
            mark = f"{weight.detach().double().sum().item():.9e}"
        return {
            "model": self.name,
            "num_layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "vocab_size": self.head.weight.shape[0],
            "final_norm_sum": mark,
        }
