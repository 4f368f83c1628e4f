"""Files of vectors alone: llama.cpp's control vector, a PEFT adapter, lm-eval's steering file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from grains.errors import UserError
from grains.export.plan import Plan, adding, logits
from grains.gguf_files import open_gguf
from grains.lm import LanguageModel

if TYPE_CHECKING:
    from gguf import GGUFWriter

GGUF, LM_EVAL = "vectors.gguf", "steer.pt"


def write_gguf(plan: Plan, folder: Path) -> None:
    """llama.cpp's control vector: direction.N is added to the output of block N, from 0.

    Every block from 1 on has one, zero where nothing is added: a file with fewer is read too, but
    the interface in C keeps what was set before for those that are missing.
    """
    from gguf import GGUFWriter

    config = plan.lm.model.config
    writer = GGUFWriter(folder / GGUF, "controlvector")
    writer.add_string("controlvector.model_hint", config.get_text_config().model_type)
    writer.add_uint32("controlvector.layer_count", len(plan.lm.layers) - 1)
    for layer in range(1, len(plan.lm.layers)):
        vector = plan.added.get(layer, torch.zeros(plan.lm.hidden_size))
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    write_all(writer)


def write_all(writer: GGUFWriter) -> None:
    """Write what was added to a GGUF file, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_directions(path: Path) -> dict[int, Tensor]:
    """Block -> what a control vector's file adds to its output, (D,) in fp32.

    Raises UserError for a file that is no control vector in GGUF.
    """
    reader, _ = open_gguf(path)
    tensors = {str(item.name): item for item in reader.tensors}
    blocks = {
        int(name.removeprefix("direction.")): item
        for name, item in tensors.items()
        if name.removeprefix("direction.").isdecimal()
    }
    if not blocks or len(blocks) < len(tensors):
        raise UserError(f"'{path}' is no control vector: it holds {', '.join([*tensors][:3])}")
    if wrong := next((item for item in blocks.values() if item.tensor_type.name != "F32"), None):
        raise UserError(
            f"'{path}': {wrong.name} is {wrong.tensor_type.name}: control vectors are F32"
        )
    return {block: torch.tensor(item.data).flatten() for block, item in sorted(blocks.items())}


def gguf_logits(lm: LanguageModel, folder: Path, ids: Tensor) -> Tensor:
    """(T, V) logits with what the file says, as llama.cpp applies it."""
    directions = gguf_directions(folder / GGUF)
    with adding({lm.layers[block]: vector for block, vector in directions.items()}):
        return logits(lm.model, ids)


def down_projection(lm: LanguageModel, layer: int) -> tuple[str, nn.Linear]:
    """The module whose output a layer adds to its state last, and its name in the model.

    Raises UserError for a layer that does not end in one, as far as names say: what is written is
    compared with our own logits in any case.
    """
    module = getattr(getattr(lm.layers[layer], "mlp", None), "down_proj", None)
    if not isinstance(module, nn.Linear):
        raise UserError(
            f"{lm.name}: its layers have no mlp.down_proj that could hold a vector as its bias; "
            "export to gguf, lm-eval or hf"
        )
    return next(name for name, part in lm.model.named_modules() if part is module), module


def write_peft(plan: Plan, folder: Path) -> None:
    """A BEFT adapter: each vector is the bias of its layer's down_proj."""
    from peft import BeftConfig

    names = {layer: down_projection(plan.lm, layer)[0] for layer in plan.added}
    BeftConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=plan.lm.model.config._name_or_path or plan.lm.name,
        target_modules=[*names.values()],
        inference_mode=True,
    ).save_pretrained(folder)
    tensors = {
        f"base_model.model.{names[layer]}.beft_bias": vector[None].contiguous()
        for layer, vector in plan.added.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def peft_logits(lm: LanguageModel, folder: Path, ids: Tensor) -> Tensor:
    """(T, V) logits of the model with the adapter as peft loads it."""
    import warnings

    from peft import PeftModel

    trainable = [(weight, weight.requires_grad) for weight in lm.model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected that the base layer has no bias")
        adapted = PeftModel.from_pretrained(lm.model, folder)
    try:
        return logits(adapted, ids)
    finally:
        adapted.unload()
        vars(lm.model).pop("peft_config", None)
        for weight, flag in trainable:
            weight.requires_grad_(flag)


def write_lm_eval(plan: Plan, folder: Path) -> None:
    """lm-eval's `--model steered`: what is added to each module, by its name in the decoder."""
    decoder = {module: name for name, module in plan.lm.model.base_model.named_modules()}
    content = {}
    for layer, vector in plan.added.items():
        name = decoder.get(plan.lm.layers[layer])
        if name is None:
            raise UserError(f"{plan.lm.name}: its layers are not in its base_model; export to hf")
        content[name] = {
            "steering_vector": vector[None],
            "steering_coefficient": 1.0,
            "action": "add",
        }
    torch.save(content, folder / LM_EVAL)


def lm_eval_logits(lm: LanguageModel, folder: Path, ids: Tensor) -> Tensor:
    """(T, V) logits with what the file says, as lm-eval applies it."""
    content = torch.load(folder / LM_EVAL, weights_only=True)
    modules = {
        lm.model.base_model.get_submodule(name): item["steering_coefficient"]
        * item["steering_vector"][0]
        for name, item in content.items()
    }
    with adding(modules):
        return logits(lm.model, ids)
