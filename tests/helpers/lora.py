"""LoRA adapters with random weights, and models with an adapter merged into their weights."""

import copy

import torch

MODULES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
RANK = 3


def random_adapter(lm, rank=RANK, seed=0):
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for index, layer in enumerate(lm.layers):
        for part, names in MODULES.items():
            for name in names:
                outputs, inputs = getattr(getattr(layer, part), name).weight.shape
                adapter[f"{index}.{part}.{name}.lora_A.weight"] = (
                    torch.randn(rank, inputs, generator=generator) / inputs**0.5
                )
                adapter[f"{index}.{part}.{name}.lora_B.weight"] = 0.3 * torch.randn(
                    outputs, rank, generator=generator
                )
    return adapter


def merged(lm, adapter, scale):
    """A copy of the model with weights W + scale * 2 B A."""
    model = copy.deepcopy(lm.model)
    layers = model.get_decoder().layers
    with torch.no_grad():
        for name in adapter:
            if name.endswith(".lora_A.weight"):
                module = name.removesuffix(".lora_A.weight")
                layers.get_submodule(module).weight += (
                    scale * 2 * adapter[f"{module}.lora_B.weight"] @ adapter[name]
                )
    return model
