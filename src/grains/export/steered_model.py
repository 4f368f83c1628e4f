"""A causal model whose decoder layers are steered: h' = (h + g v) ||h|| / ||h + g v||.

v is a layer's vector with its strength included, g a gate sigmoid(w . h / ||h|| + b), or 1. Both
are buffers of the model. Written by GrAInS (arXiv 2507.18043).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel as Base


class SteeredModel(Base):
    """The base model, steered at `config.steering["layers"]` of `config.steering["modules"]`."""

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

    def _hook(self, index: int) -> Any:
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
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return steer
