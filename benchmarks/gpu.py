"""All stages on an accelerator: Llama-3.1-8B's and LLaVA-1.6-7B's shapes with random weights.

Nothing is downloaded: the weights are drawn on the device, the tokenizer's words are made up, the
pairs have the lengths of real ones. Random weights take the same time as trained ones, but say
nothing about accuracy. Plain code (`benchmarks/plain.py`) gets as many units of the same work as
fit in its share of the time.

    python benchmarks/gpu.py                     # about 8 minutes; writes RESULTS-GPU.md
    python benchmarks/gpu.py --size tiny --output /tmp/page.md    # a CPU: does it run?
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import llava  # noqa: E402
import plain  # noqa: E402
from bench import PUBLISHED, STEPS, K, directions, head_flops, layer_flops  # noqa: E402
from PIL import Image  # noqa: E402

from grains import attribution, generation, models, prompts, runs, scoring  # noqa: E402
from grains.ablation import hidden_states, select  # noqa: E402
from grains.data import Example  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.packing import pack  # noqa: E402
from grains.prompts import Encoded  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS-GPU.md"
NEW_TOKENS = 64
# What stands in the configurations of meta-llama/Llama-3.1-8B and of the language model of
# llava-hf/llava-v1.6-vicuna-7b-hf.
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
VICUNA = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TINY = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


@dataclass(frozen=True)
class Size:
    """How much is computed.

    pairs, image_pairs: units of each stage. words, answer: words of a prompt and of an answer.
    picture: (width, height) in pixels. positions: token positions computed at a time.
    seconds: plain code stops after so long in each stage, but does at least one unit.
    """

    pairs: int
    image_pairs: int
    words: int
    answer: int
    picture: tuple[int, int]
    positions: int
    seconds: float


FULL = Size(32, 6, 90, 12, (640, 480), 16384, 15.0)
SMALL = Size(3, 2, 12, 4, (56, 42), 256, 1.0)


def text_model(size: Size, device: str, dtype: torch.dtype) -> LanguageModel:
    """Llama-3.1-8B's shape, or a tiny Llama, with random weights."""
    config = LlamaConfig(
        **(LLAMA if size is FULL else TINY), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return models.wrap("random Llama", model, llava.tokenizer(config.vocab_size))


def image_model(size: Size, device: str, dtype: torch.dtype) -> LanguageModel:
    """LLaVA-1.6-Vicuna-7B's shape, or a tiny one, with random weights."""
    config, processor = llava.parts(*((VICUNA, CLIP) if size is FULL else (TINY, TINY_CLIP)))
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return models.wrap("random LLaVA-NeXT", model, processor.tokenizer, processor)


def pairs(lm: LanguageModel, size: Size) -> list[Encoded]:
    """Prompts of made-up words with two answers, of lengths that vary by a quarter."""
    draw = np.random.default_rng(0)
    first = lm.tokenizer.convert_tokens_to_ids("w0")
    last = len(lm.tokenizer) - 1

    def text(words: int) -> str:
        count = int(words * draw.uniform(0.75, 1.25))
        return " ".join(lm.tokenizer.convert_ids_to_tokens(draw.integers(first, last, count)))

    made = []
    for number in range(size.pairs if lm.processor is None else size.image_pairs):
        picture = None
        if lm.processor is not None:
            width, height = size.picture
            noise = draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        answers = text(size.answer), text(size.answer)
        example = Example(str(number), text(size.words), answers, 0, image=picture)
        made.append(prompts.encode(lm, example, "chat"))
    return made


def seconds(lm: LanguageModel, work: Callable[[], object]) -> tuple[float, object, float]:
    """Seconds of work, its result, and the most memory meanwhile beside the model, GiB.

    Memory is 0 without CUDA, where allocations are not counted.
    """
    cuda = lm.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    begin = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return took, result, (peak - before) / 2**30


def matrix_rate(device: str, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of (width x width) products: the most that a model's layers could reach."""
    left = torch.randn(width, width, device=device, dtype=dtype)
    rates = []
    for _ in range(10):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        begin = time.perf_counter()
        left @ left
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        rates.append(2 * width**3 / (time.perf_counter() - begin))
    return max(rates)


def stages(lm: LanguageModel, items: list[Encoded], size: Size) -> dict[str, tuple]:
    """Stage -> ours (all units), plain (one unit), positions and operations of one unit."""
    count = len(lm.layers)
    every = [tuple(range(count))]
    grid = directions(
        lm, items[0], [(layer,) for layer in (count // 2, count - 1) for _ in range(4)]
    )
    strong = directions(lm, items[0], every * 3)

    def ablate() -> list:
        done = []
        for item in items:
            (attributed,) = attribution.attribute(lm, item, PUBLISHED, size.positions, None)
            scores = torch.from_numpy(attributed.scores)
            sets = [select(scores, item.words | item.image, K, top, None) for top in ("pos", "neg")]
            done.append(hidden_states(lm, item, sets, size.positions).log_likelihoods)
        return done

    def ablate_plainly(item: Encoded) -> object:
        replacement = attribution.baseline_embeddings(
            lm, item, plain.embed(lm, item.inputs)[0], "pad", "mean"
        )
        return plain.token_ablation(lm, item, item.words | item.image, K, STEPS, replacement)

    def ablation_flops(item: Encoded) -> float:
        packed = len(pack(item.sequences()))
        head = sum(map(len, item.responses)) * head_flops(lm)
        return (2 * STEPS + 4) * (layer_flops(lm, packed) + head)

    def grid_flops(item: Encoded) -> float:
        forward = layer_flops(lm, item.packed_length)
        above = sum(count - 1 - configuration.layers[0] for configuration in grid)
        head = (1 + len(grid)) * sum(map(len, item.responses)) * head_flops(lm)
        return forward * (1 + above / count) + head

    def decoding_flops(item: Encoded) -> float:
        length = len(item.prompt_ids)
        rows = 1 + len(strong)
        step = layer_flops(lm, 1) + head_flops(lm)
        return rows * (layer_flops(lm, length) + NEW_TOKENS * step)

    return {
        "token_ablation": (ablate, ablate_plainly, ablation_flops),
        f"steering_mc, base and {len(grid)} configurations": (
            lambda: scoring.score_all(lm, items, grid, size.positions),
            lambda item: plain.steering_mc(lm, item, grid),
            grid_flops,
        ),
        f"steering_generation, base and {len(strong)} configurations, {NEW_TOKENS} tokens": (
            lambda: generated(lm, items, strong, size.positions),
            lambda item: plain.generation(lm, item, strong, NEW_TOKENS),
            decoding_flops,
        ),
    }


def generated(lm: LanguageModel, items: list[Encoded], configurations: list, positions: int) -> int:
    """Continue all prompts in the stage's own batches; returns how many texts there are."""
    texts = 0
    for members in generation.decoding_batches(items, configurations, NEW_TOKENS, positions):
        batch = [items[index] for index in members]
        texts += sum(map(len, generation.generate(lm, batch, configurations, NEW_TOKENS)))
    return texts


def same_choices(lm: LanguageModel, items: list[Encoded], size: Size) -> str:
    """Whether base and steered models choose alike at two batch sizes."""
    count = len(lm.layers)
    grid = directions(lm, items[0], [(layer,) for layer in (count // 2, count - 1)])
    wide, narrow = (
        np.stack(scoring.score_all(lm, items, grid, positions))
        for positions in (size.positions, size.positions // 8)
    )
    alike = wide.argmax(-1) == narrow.argmax(-1)
    return (
        f"{alike.sum()} of {alike.size} choices the same with {size.positions} and with "
        f"{size.positions // 8} positions a batch; log-likelihoods within "
        f"{np.abs(wide - narrow).max():.1g} nats"
    )


def measure(lm: LanguageModel, size: Size, rate: float) -> tuple[list[str], str]:
    """Rows of the page's table for one model, and the sentence about batch sizes."""
    items = pairs(lm, size)
    rows = []
    for stage, (ours, by_plain, flops) in stages(lm, items, size).items():
        ours()  # once before, so that kernels are chosen
        mine, _, peak = seconds(lm, ours)
        theirs, plain_peak = [], 0.0
        for item in items:
            took, _, most = seconds(lm, partial(by_plain, item))
            theirs.append(took)
            plain_peak = max(plain_peak, most)
            if sum(theirs) > size.seconds:
                break
        a_unit, plain_unit = mine / len(items), sum(theirs) / len(theirs)
        positions = sum(item.packed_length for item in items) / len(items)
        done = sum(flops(item) for item in items)
        print(f"{lm.name}, {stage}: {a_unit:.3f} s a unit, plain {plain_unit:.3f} s", flush=True)
        rows.append(
            f"| {lm.name} | {stage} | {len(items)} / {len(theirs)} | {positions:.0f} | "
            f"{a_unit:.3f} | {plain_unit:.3f} | {plain_unit / a_unit:.1f}x | "
            f"{positions / a_unit:,.0f} | {done / mine / rate:.0%} | {peak:.1f} / "
            f"{plain_peak:.1f} |"
        )
    return rows, f"{lm.name}: {same_choices(lm, items, size)}."


def page(device: str, dtype: torch.dtype, rows: Sequence[str], notes: Sequence[str]) -> str:
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else f"a CPU ({platform.processor()})"
    versions = ", ".join(
        f"{key} {value}"
        for key, value in runs.versions().items()
        if key in ("torch", "transformers")
    )
    lines = [
        "# On an accelerator",
        "",
        "Written by `python benchmarks/gpu.py`: random weights in the shapes of Llama-3.1-8B and "
        "LLaVA-1.6-Vicuna-7B, made-up words, lengths of real pairs. *Plain* is "
        "`benchmarks/plain.py` on as many of the same units as its share of the time allows. The "
        "rate of operations counts what the numbers need (see RESULTS.md) and is given as a share "
        "of a large matrix product's, measured in the same run.",
        "",
        f"Measured {time.strftime('%Y-%m-%d')} on {name}, {str(dtype).removeprefix('torch.')}, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB of main memory, Python "
        f"{platform.python_version()}, {versions}.",
        "",
        "| model | stage | units, ours / plain | positions a unit | ours, s a unit | "
        "plain, s a unit | ratio | positions a second | share of the matrix rate | "
        "memory beside the model, ours / plain, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        *notes,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.size == "full" and not args.device.startswith("cuda"):
        sys.exit(
            "benchmarks/gpu.py: no CUDA device, and models of 8 billion weights would take days on "
            "a CPU: give --size tiny to try the script"
        )
    size = FULL if args.size == "full" else SMALL
    dtype = torch.bfloat16 if args.size == "full" else torch.float32
    torch.manual_seed(0)
    rate = matrix_rate(args.device, dtype, 8192 if size is FULL else 512)
    rows, notes = [], []
    for make in (text_model, image_model):
        lm = make(size, args.device, dtype)
        measured, note = measure(lm, size, rate)
        rows += measured
        notes += [note, ""]
        del lm
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    args.output.write_text(page(args.device, dtype, rows, notes[:-1]))
    print(f"results: {args.output}")


if __name__ == "__main__":
    main()
