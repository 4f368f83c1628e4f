"""A language model and where its decoder's parts are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grains.errors import UserError
from grains.quantized import method, values_of


def execution_device(module: nn.Module) -> torch.device:
    """Where a module with a weight computes: accelerate may keep the weight elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(device) if device is not None else next(module.parameters()).device


@dataclass(frozen=True)
class LogitShape:
    """What a model makes of each logit z that its head gives: cap tanh(scale z / cap)."""

    scale: float = 1.0
    cap: float = math.inf

    def __call__(self, logits: Tensor) -> Tensor:
        scaled = self.scale * logits
        return scaled if self.cap == math.inf else self.cap * (scaled / self.cap).tanh()

    def slope(self, shaped: Tensor) -> Tensor:
        """The derivative by z, where the result is `shaped`."""
        return self.scale * (1 - (shaped / self.cap).square())


SAMPLED = 64  # values of every tensor that its digest takes


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal or image-text language model and where its decoder's parts are.

    name: the name it was loaded by. model, tokenizer: as transformers gives them.
    layers: the L decoder layers. norm: the final norm.
    head: final hidden states (..., D) -> logits (..., V).
    embed: token ids (...) -> the embeddings (..., D) that enter layer 0.
    processor: transformers' image-text processor, or None for a text-only model.
    memory: how many bytes the activations that are kept for a gradient may take.
    width: the values of a token's hidden state between layers, where they were seen.
    layer_outputs: items of the tuple that a layer returns, hidden states first; 0 if it returns a
        tensor.
    streams: where a layer passes on several hidden states for each token, side by side (Gemma-3n's
        AltUp): the dimension of its tensor in which they lie, and how many they are. Everywhere
        else here they are one state of D values, one after the other (see `joined`).
    resumes: whether a replay can start at any layer; if not, layers hand more than hidden states to
        those above (keys and values, in Gemma-4), so it starts at the first.
    packs: whether several sequences may be packed in one row; if not, each is computed alone.
    keeps_prefix: whether positions that never change may be computed once, and their keys and
        values kept in the layers' cache.
    batches: whether several rows may be computed together; if not, they are one at a time.
    logit_shape: what the model does to each logit behind the head; None: nothing.
    own_head: whether the model's own forward turns the last hidden states into logits, as it does
        more than apply the norm, the head and a `logit_shape`.
    own_embeddings: whether more than a look-up makes the embeddings that enter layer 0.
    marks_prompts: whether the words of a prompt see each other, so that its forward must be given
        which these are: `token_type_ids`, 0 in the prompt and 1 behind it.
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
    width: int | None = None
    layer_outputs: int = 0
    streams: tuple[int, int] | None = None
    resumes: bool = True
    packs: bool = True
    keeps_prefix: bool = False
    batches: bool = True
    logit_shape: LogitShape | None = None
    own_head: bool = False
    own_embeddings: bool = False
    marks_prompts: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device that inputs go to: that of the embeddings."""
        return execution_device(self.embed)

    @property
    def quantization(self) -> str:
        """What the weights are quantised by; '' if they are not."""
        return method(self.model.config)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.width or self.model.config.get_text_config().hidden_size

    def joined(self, states: Tensor) -> Tensor:
        """A layer's hidden states as (B, T, D): those side by side in one (see `streams`)."""
        return states.movedim(self.streams[0], -2).flatten(-2) if self.streams else states

    def side_by_side(self, states: Tensor) -> Tensor:
        """Hidden states (B, T, D) as a layer takes and returns them."""
        if not self.streams:
            return states
        dimension, count = self.streams
        return states.unflatten(-1, (count, -1)).movedim(-2, dimension)

    @property
    def max_positions(self) -> int | None:
        """The length of context in tokens; None if the model's config does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def image_token_id(self) -> int | None:
        """The token that holds the place of each image feature in a prompt, None without one."""
        config = self.model.config
        token = getattr(config, "image_token_id", None)
        return token if token is not None else getattr(config, "image_token_index", None)

    def image_ids(self) -> set[int]:
        """The ids of all tokens that mark an image or video, or hold the place of its features."""
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
        """The ids of tokens that are no words: BOS, chat-template markers, padding."""
        return set(self.tokenizer.all_special_ids)

    def replacement_id(self, kind: str = "pad") -> int:
        """The id of the token that replaces an ablated word.

        kind: pad or unk. If the tokenizer lacks it, the other one is used, then end-of-text.
        Raises UserError if the tokenizer has none of them.
        """
        for name in (kind, "unk" if kind == "pad" else "pad", "eos"):
            token = getattr(self.tokenizer, f"{name}_token_id")
            if token is not None:
                return token
        raise UserError(
            f"{self.name}: its tokenizer has no pad, unk or end-of-text token to replace words with"
        )

    def forget_padding(self) -> None:
        """Take padding and truncation of its last call out of the tokenizer.

        A fast tokenizer keeps them, and has them in its `tokenizer.json` (transformers 5.20.2),
        where other programs obey them. The next call sets its own.
        """
        if self.tokenizer.is_fast:
            self.tokenizer.backend_tokenizer.no_padding()
            self.tokenizer.backend_tokenizer.no_truncation()

    def identity(self) -> dict[str, Any]:
        """What a file records of the model it was made with: name, sizes, digest of the weights.

        The digest is of the names, the sizes and a few values of every tensor. It tells a model
        from one with other weights in the same folder, and from itself in another precision.
        """
        digest = hashlib.sha256()
        total = 0.0
        for name, module in self.model.named_modules():
            if not module._parameters:
                continue
            with align_module_device(module):  # loads what accelerate keeps elsewhere
                for key, weight in module.named_parameters(recurse=False):
                    flat = values_of(weight.detach()).flatten()
                    places = torch.linspace(0, len(flat) - 1, SAMPLED, dtype=torch.float64).long()
                    values = flat[places.to(flat.device)].double().cpu()
                    digest.update(f"{name}.{key} {tuple(weight.shape)} ".encode())
                    digest.update(values.numpy().tobytes())
                    total += values.abs().sum().item()
        return {
            "model": self.name,
            "num_layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "vocab_size": self.head.out_features,
            "weights": digest.hexdigest()[:16],
            "weights_sum": f"{total:.9e}",
        }


Value = TypeVar("Value")


def kept_with_model(function: Callable[[LanguageModel], Value]) -> Callable[[LanguageModel], Value]:
    """A function whose value for a model is computed once, and kept as long as the model is."""
    known: WeakKeyDictionary[LanguageModel, Value] = WeakKeyDictionary()

    @wraps(function)
    def value(lm: LanguageModel) -> Value:
        if lm not in known:
            known[lm] = function(lm)
        return known[lm]

    return value
