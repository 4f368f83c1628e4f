"""A causal model whose decoder layers are steered: h' = (h + g v) ||h|| / ||h + g v||.

v is a layer's vector with its strength included, g a gate sigmoid(w . h / ||h|| + b), or 1. Both
are buffers of the model. Written by GrAInS (arXiv 2507.18043).

Where not all positions are steered, the model must know where a prompt ends. `generate` does. Give
`forward` the number of a prompt's tokens, as in `model(input_ids, prompt_length=12)`: it refuses to
guess.
"""

import inspect
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel as Base

# Which positions of the forward that runs are steered, (B, W) bool; how many columns the prompts
# that are continued have.
STEERED: ContextVar[Any] = ContextVar("steered", default=None)
PROMPT: ContextVar[Any] = ContextVar("prompt", default=None)


class SteeredModel(Base):
    """The base model, steered at `config.steering["layers"]` of `config.steering["modules"]`.

    positions: `config.steering["positions"]`: all; prompt; response (those that a response's tokens
    are predicted from: the last of the prompt, and its own); last (of the prompt); image (the
    picture's); or a slice of the prompt as in Python, such as 0:10 or -5:.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        steering = config.steering
        count, size = len(steering["layers"]), config.get_text_config().hidden_size
        self.register_buffer("steering_vectors", torch.zeros(count, size))
        if steering["gated"]:
            self.register_buffer("steering_gate_weights", torch.zeros(count, size))
            self.register_buffer("steering_gate_biases", torch.zeros(count))
        layers = self.get_submodule(steering["modules"])
        for index, layer in enumerate(steering["layers"]):
            layers[layer].register_forward_hook(self._hook(index))

    @wraps(Base.forward)
    def forward(self, *args: Any, prompt_length: Any = None, **kwargs: Any) -> Any:
        """The base model's forward. prompt_length: int or (B,), the tokens of each row's prompt,
        padding not counted; within `generate` it is known."""
        token = STEERED.set(self._steered(args, kwargs, prompt_length))
        try:
            return super().forward(*args, **kwargs)
        finally:
            STEERED.reset(token)

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The base model's. All that is given is the prompt."""
        prompts = [kwargs.get("inputs_embeds"), kwargs.get("input_ids"), inputs]
        columns = next((item.shape[1] for item in prompts if item is not None), 1)
        token = PROMPT.set(columns)
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            PROMPT.reset(token)

    def _steered(self, args: tuple, kwargs: dict, length: Any) -> Any:
        """(B, W) bool, which of the W positions of a forward are steered; None: all."""
        positions = self.config.steering["positions"]
        if positions == "all":
            return None
        given = inspect.signature(Base.forward).bind_partial(self, *args, **kwargs).arguments
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        named = given | kwargs  # transformers 5.24 says cache, and takes both names
        cache = next(
            (named[name] for name in ("past_key_values", "cache") if named.get(name) is not None),
            None,
        )
        rows, width = (given["inputs_embeds"] if ids is None else ids).shape[:2]
        before = 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones(rows, before + width, device=self.steering_vectors.device)
        if tuple(mask.shape) != (rows, before + width):
            raise ValueError(
                f"positions '{positions}': expected an attention_mask ({rows}, {before + width}) "
                f"of all tokens, found {tuple(mask.shape)}"
            )
        if positions == "image":
            if ids is None:
                raise ValueError("positions 'image': give input_ids, which say where a picture is")
            names = ("image_token_id", "image_token_index")
            tokens = [getattr(self.config, name, None) for name in names]
            steered = ids == next(token for token in tokens if token is not None)
        else:
            if length is None and (columns := PROMPT.get()) and columns <= before + width:
                length = mask[:, :columns].sum(-1)
            if length is None:
                raise ValueError(unknown(positions))
            length = torch.as_tensor(length, device=mask.device).expand(rows)[:, None]
            first, stop = bounds(positions, length)
            number = mask.cumsum(-1) - 1  # of each token in its row, padding not counted
            steered = ((number >= first) & (number < stop) & mask.bool())[:, -width:]
        if not before and not steered.any(-1).all():
            raise ValueError(f"positions '{positions}' name nothing in a prompt")
        return steered

    def _hook(self, index: int) -> Any:
        positions = self.config.steering["positions"]

        def steer(module: nn.Module, args: tuple, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            before = states.float()
            vector = self.steering_vectors[index].to(before)
            size = before.norm(dim=-1, keepdim=True)
            tiny = torch.finfo(torch.float32).tiny
            if self.config.steering["gated"]:
                weight = self.steering_gate_weights[index].to(before)
                bias = self.steering_gate_biases[index].to(before)
                along = (before * weight).sum(dim=-1, keepdim=True) / size.clamp_min(tiny)
                vector = torch.sigmoid(along + bias) * vector
            shifted = before + vector
            length = shifted.norm(dim=-1, keepdim=True).clamp_min(tiny)
            changed = (shifted * (size / length)).to(states.dtype)
            if positions != "all":
                if (steered := STEERED.get()) is None:  # not called by this model's forward
                    raise ValueError(unknown(positions))
                changed = torch.where(steered.to(changed.device)[..., None], changed, states)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return steer


def bounds(positions: str, length: Any) -> tuple[Any, Any]:
    """The first of the steered positions, and the one behind the last. length: (B, 1)."""
    if positions in ("prompt", "last", "response"):
        first = 0 if positions == "prompt" else length - 1
        return first, torch.inf if positions == "response" else length
    start, stop = (int(text) if text else None for text in positions.split(":"))
    first = start or 0
    last = length if stop is None else length + stop if stop < 0 else length.clamp(max=stop)
    return length + first if first < 0 else first, last


def unknown(positions: str) -> str:
    return (
        f"positions '{positions}': where the prompt ends is not known here; use generate(), or "
        "give this model's forward prompt_length, the number of each prompt's tokens"
    )
