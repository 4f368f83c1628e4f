"""Whole models: with the vectors as biases, or with code that steers; GGUF files with biases."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from grains.errors import UserError
from grains.export.files import down_projection, write_all
from grains.export.plan import Plan, adding, logits
from grains.gguf_files import open_gguf, reader_of
from grains.lm import LanguageModel

MODEL_GGUF, CODE = "model.gguf", "modeling_steered.py"


def write_hf_bias(plan: Plan, folder: Path) -> None:
    """The model with `mlp_bias`, its vectors in the biases of down_proj, zeros in the others."""
    model = plan.lm.model
    if plan.lm.processor is not None or getattr(model.config, "mlp_bias", None) is not False:
        raise UserError(
            f"{plan.lm.name}: its config has no mlp_bias that could be turned on; export to hf"
        )
    config = type(model.config)(**model.config.to_dict() | {"mlp_bias": True})
    with torch.device("meta"):
        biased = type(model)(config)
    state = model.state_dict()
    for name, weight in biased.named_parameters():
        if name not in state:
            state[name] = torch.zeros(weight.shape, dtype=plan.lm.dtype)
    for layer, vector in plan.added.items():
        state[f"{down_projection(plan.lm, layer)[0]}.bias"] = vector.to(plan.lm.dtype)
    biased.load_state_dict(state, assign=True)
    biased.tie_weights()
    biased.generation_config = model.generation_config
    biased.save_pretrained(folder)
    write_tokenizer(plan.lm, folder)


def hf_bias_logits(lm: LanguageModel, folder: Path, ids: Tensor) -> Tensor:
    """(T, V) logits of the folder's model as transformers loads it, without code of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=lm.dtype)
    return logits(model.eval(), ids.cpu())


def write_hf(plan: Plan, folder: Path) -> None:
    """The model, the vectors as buffers of it, and code that steers its layers by them.

    Whoever loads it must pass trust_remote_code=True: the code is `steered_model.py` as it is here.
    """
    model = plan.lm.model
    gate = plan.vectors.gate
    layers = [*plan.added]
    buffers = {"steering_vectors": torch.stack([*plan.added.values()])}
    if gate:
        buffers |= {
            "steering_gate_weights": gate.weights[layers].float().cpu(),
            "steering_gate_biases": gate.biases[layers].float().cpu(),
        }
    path = next(name for name, part in model.named_modules() if part is plan.lm.layers)
    config, before = model.config, dict(vars(model.config))
    try:
        for name, tensor in buffers.items():
            model.register_buffer(name, tensor)
        # Under the names of this class: for code of its own, transformers converts no older ones.
        model.save_pretrained(folder, save_original_format=False)
        write_tokenizer(plan.lm, folder)
        saved = type(config).from_pretrained(folder)
        saved.steering = {
            "modules": path,
            "layers": layers,
            "gated": gate is not None,
            "positions": plan.positions,
        }
        saved.auto_map = {auto_class(plan.lm): f"{CODE.removesuffix('.py')}.SteeredModel"}
        saved.architectures = ["SteeredModel"]
        saved.save_pretrained(folder)
    finally:
        for name in buffers:
            model._buffers.pop(name, None)
            model._non_persistent_buffers_set.discard(name)
        vars(config).clear()
        vars(config).update(before)
    template = Path(__file__).with_name("steered_model.py").read_text(encoding="utf-8")
    code = template.replace("PreTrainedModel as Base", f"{type(model).__name__} as Base")
    (folder / CODE).write_text(code, encoding="utf-8")


def write_tokenizer(lm: LanguageModel, folder: Path) -> None:
    """The tokenizer, or the processor that holds it, without what its last call left in it."""
    lm.forget_padding()
    (lm.processor or lm.tokenizer).save_pretrained(folder)


def auto_class(lm: LanguageModel) -> str:
    """The class of transformers that loads such a model."""
    return "AutoModelForImageTextToText" if lm.processor else "AutoModelForCausalLM"


LOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
name, folder, inputs, output, dtype = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(
    folder, trust_remote_code=True, dtype=getattr(torch, dtype)
).eval()
with torch.no_grad():
    logits = model(**load_file(inputs), use_cache=False).logits[0]
save_file({"logits": logits.float()}, output)
"""


def hf_logits(lm: LanguageModel, folder: Path, ids: Tensor, **inputs: Tensor) -> Tensor:
    """(T, V) logits of the folder's model, loaded by transformers in a process of its own.

    inputs: what its forward is given beside the ids.
    """
    with tempfile.TemporaryDirectory() as temporary:
        given, output = Path(temporary, "inputs"), Path(temporary, "logits")
        tensors = {"input_ids": ids, **inputs}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, given)
        precision = str(lm.dtype).removeprefix("torch.")
        ended = subprocess.run(
            [
                sys.executable,
                "-c",
                LOAD,
                auto_class(lm),
                folder.resolve(),
                given,
                output,
                precision,
            ],
            capture_output=True,
            text=True,
            env=_offline(temporary),
        )
        if ended.returncode:
            raise UserError(
                f"the folder cannot be loaded again: {ended.stderr.strip().splitlines()[-1]}"
            )
        return load_file(output)["logits"]


def _offline(modules: str) -> dict[str, str]:
    """The environment of a process that copies a model's code to a folder that goes away."""
    import os

    return os.environ | {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}


def write_gguf_bias(plan: Plan, folder: Path, source: Path) -> None:
    """A copy of a model in GGUF with each vector as `blk.N.ffn_down.bias`.

    source: the model's GGUF file, in any precision.
    Raises UserError for a file of another model or architecture.
    """
    copy_gguf(
        source,
        folder / MODEL_GGUF,
        plan.lm,
        {f"blk.{layer}.ffn_down.bias": vector for layer, vector in plan.added.items()},
    )


def copy_gguf(
    source: Path,
    path: Path,
    lm: LanguageModel,
    more: dict[str, Tensor] | None = None,
    full: bool = False,
) -> None:
    """Copy a GGUF file of this model. more: tensors added in F32. full: all tensors in F32."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize

    reader, fields = open_gguf(source)
    architecture = fields.get("general.architecture")
    sizes = [fields.get(f"{architecture}.{key}") for key in ("block_count", "embedding_length")]
    if architecture != "llama" or sizes != [len(lm.layers), lm.hidden_size]:
        raise UserError(
            f"'{source}' is a model of architecture {architecture} with {sizes[0]} blocks of size "
            f"{sizes[1]}: expected llama with {len(lm.layers)} of size {lm.hidden_size}"
        )
    norm = next(item for item in reader.tensors if item.name == "output_norm.weight")
    expected = next(lm.norm.parameters()).detach().float().cpu().numpy()
    if not np.allclose(dequantize(norm.data, norm.tensor_type), expected, rtol=1e-2, atol=1e-3):
        raise UserError(f"'{source}' is another model than {lm.name}: its last norm differs")
    writer = GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name == "general.architecture" or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == GGUFValueType.ARRAY else None
        value = int(GGMLQuantizationType.F32) if full and name == "general.file_type" else None
        writer.add_key_value(
            name, fields[name] if value is None else value, kind, sub_type=sub_type
        )
    for item in reader.tensors:
        if full:
            data = dequantize(item.data, item.tensor_type).astype(np.float32)
            writer.add_tensor(item.name, np.ascontiguousarray(data))
        else:
            writer.add_tensor(item.name, item.data, raw_dtype=item.tensor_type)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor.float().cpu().numpy())
    write_all(writer)


def gguf_bias_logits(lm: LanguageModel, folder: Path, ids: Tensor) -> Tensor:
    """(T, V) logits of the model here with the biases that the file holds."""
    ending = ".ffn_down.bias"
    biases = {
        int(item.name.removesuffix(ending).removeprefix("blk.")): torch.tensor(item.data)
        for item in reader_of(folder / MODEL_GGUF).tensors
        if item.name.endswith(ending)
    }
    with adding({down_projection(lm, layer)[1]: bias for layer, bias in biases.items()}):
        return logits(lm.model, ids)
