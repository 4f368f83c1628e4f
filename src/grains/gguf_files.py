"""Models in GGUF files: read by transformers, mended where it drops what the file says, kept.

A model loaded from GGUF cannot be saved and loads slowly. So a plain model with the same weights is
written to the cache once (GRAINS_CACHE, by default ~/.cache/grains), with a tokenizer that is what
the file says: which tokens begin and end a text, how it is split. transformers 5.20.2 reads neither
from the file, nor how rotary embeddings are stretched.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from grains.errors import UserError, refusing

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
MAGIC = b"GGUF"
BLOCKS, BLOCK = 64, 1 << 16  # of a file, for its digest
# Part of the cache folder's name: raised when files are read differently.
VERSION = 1

# How a byte-level vocabulary cuts texts, by the file's name for it (tokenizer.ggml.pre).
# transformers knows the first; the others are cut by these expressions, in turn.
CUT_BY_TRANSFORMERS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    *("dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez", "qwen35"),
    *("gpt-4o", "llama4", "minimax-m2"),
    *("default", "gpt-2", "phi-2", "olmo", "jais", "exaone4"),  # as GPT-2 does
}
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EACH_DIGIT = (r"\p{N}", GPT2_WORDS)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUT = {
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), EACH_DIGIT),
    **dict.fromkeys(("exaone", "minerva-7b"), EACH_DIGIT),
    **dict.fromkeys(("stablelm2", "hunyuan"), (QWEN_WORDS,)),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_WORDS, "[0-9][0-9][0-9]"),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
# Vocabularies of which a whole word may be one token that no merges make, and texts begin with BOS
# unless the file says otherwise.
WHOLE_WORDS = {
    *("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "tekken",
}
SPECIAL = ("bos", "eos", "unk", "pad")
# Weights that are no parameters: how rotary embeddings are stretched.
STRETCH, LONGROPE = "rope_freqs.weight", ("rope_factors_long.weight", "rope_factors_short.weight")


def converted(path: Path, dtype: torch.dtype) -> Path:
    """The folder with the model and tokenizer of a GGUF file, its weights in a precision.

    Raises UserError for what is no whole GGUF file of a decoder that transformers can read, and for
    metadata that it cannot follow.
    """
    precision = str(dtype).removeprefix("torch.")
    folder = cache() / f"{path.stem}-{_digest(path)}-{precision}-{VERSION}"
    if folder.is_dir():
        return folder
    reader, metadata = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    _check(path, metadata)
    with refusing(f"{path}: transformers cannot read it", "give the model's folder or hub id"):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(loaded["missing_keys"]):
            raise UserError(
                f"{path}: it lacks weights of its model ({', '.join(missing[:3])}, ...)"
            )
        _check_all_read(path, model, tensors)
        plain = _without_quantization(model, path, metadata, tensors)
        read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        keep(folder, plain, described_tokenizer(read, metadata))
    return folder


def cache() -> Path:
    """The folder of converted models."""
    return Path(os.environ.get("GRAINS_CACHE", Path.home() / ".cache" / "grains"))


def keep(folder: Path, model: PreTrainedModel, tokens: PreTrainedTokenizerFast) -> None:
    """Write model and tokenizer to a folder of the cache, which appears whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        model.save_pretrained(whole)
        tokens.save_pretrained(whole)
        try:
            whole.rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise


def _digest(path: Path) -> str:
    """Of the size and of blocks spread over the file: other weights differ everywhere."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest = hashlib.sha256(str(size).encode())
            for index in range(BLOCKS):
                file.seek(index * max(size - BLOCK, 0) // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()[:16]


def reader_of(path: Path) -> GGUFReader:
    """gguf's reader of a file.

    Every word of a vocabulary is a slice of the file, and slices of a memory map take several times
    as long as those of the plain array over it.
    """
    import numpy as np
    from gguf import GGUFReader

    class Reader(GGUFReader):
        data: np.ndarray

        def _build_fields(self, *arguments: Any) -> int:
            self.data = np.asarray(self.data)
            return super()._build_fields(*arguments)

    return Reader(path)


def open_gguf(path: Path) -> tuple[GGUFReader, dict[str, Any]]:
    """A GGUF file, and its metadata by name. Raises UserError for what is no whole GGUF file."""
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise UserError(f"{path}: it does not begin as a GGUF file does; is it one, and whole?")
    try:
        reader = reader_of(path)
        return reader, {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:
        raise UserError(
            f"{path}: it cannot be read as GGUF ({type(error).__name__}: {error}); is it whole?"
        ) from error


def _check(path: Path, metadata: dict[str, Any]) -> None:
    """Raise UserError for what cannot be read from a file with this metadata."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if metadata.get("split.count", 1) > 1:
        raise UserError(
            f"{path}: it is one of {metadata['split.count']} parts of a model; join them with "
            "llama-gguf-split --merge"
        )
    architecture = str(metadata.get("general.architecture"))
    names = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    if names.get(architecture, architecture) not in known:
        raise UserError(
            f"{path}: transformers cannot read GGUF files of architecture '{architecture}', only "
            f"{', '.join(sorted(known))}; give the model's folder or hub id instead"
        )
    cut = metadata.get("tokenizer.ggml.pre", "default")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and cut not in CUT_BY_TRANSFORMERS | set(CUT):
        raise UserError(
            f"{path}: how its tokenizer cuts a text ('{cut}') is not known; give the model's "
            "folder or hub id instead"
        )


def _check_all_read(path: Path, model: PreTrainedModel, tensors: dict[str, Any]) -> None:
    """Raise UserError if the file holds more weights than the model: some were left out."""
    ignored = {STRETCH, *LONGROPE}
    if model.config.tie_word_embeddings:
        ignored.add("output.weight")
    stored = sum(int(tensor.n_elements) for name, tensor in tensors.items() if name not in ignored)
    read = sum(weight.numel() for weight in model.parameters())
    if stored != read:
        raise UserError(
            f"{path}: it holds {stored:,} weights, of which transformers makes a model with "
            f"{read:,}; such files are not supported"
        )


def _without_quantization(
    model: PreTrainedModel, path: Path, metadata: dict[str, Any], tensors: dict[str, Any]
) -> PreTrainedModel:
    """A model with the same weights that can be saved."""
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config = type(model.config)(**config)
    config.rope_parameters = _rope(path, config, metadata, tensors)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    if len(ends) > 1:
        plain.generation_config.eos_token_id = ends
    return plain


def _rope(
    path: Path, config: PretrainedConfig, metadata: dict[str, Any], tensors: dict[str, Any]
) -> dict | None:
    """`config.rope_parameters` with what the file says of stretched rotary embeddings."""
    rope = getattr(config, "rope_parameters", None)
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    kind = metadata.get(f"{prefix}type", "none")
    factor = metadata.get(f"{prefix}factor")
    change: dict[str, Any] = {}
    if LONGROPE[0] in tensors or (kind == "longrope"):
        raise UserError(f"{path}: its rotary embeddings (longrope) are not read from GGUF files")
    if STRETCH in tensors:
        change = _llama3(path, config, tensors[STRETCH].data)
    elif kind == "linear" or (kind == "none" and factor not in (None, 0.0, 1.0)):
        change = {"rope_type": "linear", "factor": float(factor or 1)}
    elif kind == "yarn":
        change = {
            "rope_type": "yarn",
            "factor": float(factor or 1),
            "original_max_position_embeddings": metadata.get(
                f"{prefix}original_context_length", config.max_position_embeddings
            ),
        }
        options = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
        for name, option in options.items():
            if prefix + name in metadata:
                change[option] = float(metadata[prefix + name])
    elif kind != "none":
        raise UserError(f"{path}: its rotary embeddings ({kind}) are not read from GGUF files")
    if not change or rope is None:
        return rope
    if "full_attention" in rope:  # Gemma-3 stretches those of its full attention alone
        return rope | {"full_attention": rope["full_attention"] | change}
    return rope | change


def _llama3(path: Path, config: PretrainedConfig, stretch: Any) -> dict[str, Any]:
    """The settings that give Llama-3.1's rotary embeddings, of which the file has the frequencies.

    stretch: by how much each frequency is divided. They must follow from these settings.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {
        "rope_type": "llama3",
        "factor": float(stretch.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stretched = type(config)(**config.to_dict())
    stretched.rope_parameters = config.rope_parameters | settings
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](stretched, torch.device("cpu"))
    width = 2 * len(frequencies)
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    expected = torch.tensor(stretch.copy(), dtype=torch.float64)
    if not torch.allclose(plain / frequencies, expected, rtol=1e-3):
        raise UserError(f"{path}: its rotary embeddings are stretched in an unknown way")
    return settings


def described_tokenizer(
    read: PreTrainedTokenizerFast, metadata: dict[str, Any]
) -> PreTrainedTokenizerFast:
    """A tokenizer that transformers made of a GGUF file, as the file says it must be."""
    tokens = {f"{name}_token": getattr(read, f"{name}_token") for name in SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=mend(read.backend_tokenizer, metadata),
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        **tokens,
    )


def mend(backend: Tokenizer, metadata: dict[str, Any]) -> Tokenizer:
    """Cutting, spaces, BOS and EOS of a tokenizer (tokenizers) as the metadata of its file says."""
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    model, cut = ggml.get("model"), ggml.get("pre", "default")
    if model == "gpt2":
        if cut in CUT:
            steps = [pre_tokenizers.Split(Regex(words), "isolated") for words in CUT[cut]]
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, byte_level])
        backend.model.ignore_merges = cut in WHOLE_WORDS
    elif model == "llama" and not metadata["general.architecture"].startswith("gemma"):
        _sentencepiece(backend, ggml.get("add_space_prefix", True))
    begins = ggml.get("add_bos_token", model == "llama" or cut in WHOLE_WORDS)
    ends = ggml.get("add_eos_token", False)
    frame = [
        (backend.id_to_token(ggml[f"{name}_token_id"]), ggml[f"{name}_token_id"])
        for name, wanted in (("bos", begins), ("eos", ends))
        if wanted and f"{name}_token_id" in ggml
    ]
    if frame:
        before = f"{frame[0][0]}:0 " if begins else ""
        after = f" {frame[-1][0]}:0" if ends else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before}$A:0{after}",
            pair=f"{before}$A:0{after} {before.replace(':0', ':1')}$B:1{after.replace(':0', ':1')}",
            special_tokens=frame,
        )
    elif model == "gpt2":
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    else:
        backend.post_processor = None
    return backend


def _sentencepiece(backend: Tokenizer, prefix: bool) -> None:
    """Spaces as sentencepiece's merges need them: each is a character, and a text begins with one
    if `prefix`."""
    space = "\u2581"
    before = [normalizers.Prepend(space)] if prefix else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", space)])
    backend.pre_tokenizer = None
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
