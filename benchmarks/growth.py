"""How the stages' cost grows: with examples, with prompt tokens, with configurations.

Each stage on a tiny model with random weights, so that what is measured is the stages' own work.
Examples go through the scripts, files included; tokens and configurations through the library.
Time is that of the processor, on one thread; memory is the most that a process has held. A power of
the size is fitted to both. Last, how soon the first of 93,258 examples with pictures is reached.

    python benchmarks/growth.py          # under 6 minutes; writes docs/img/growth_*.png and a table
    python benchmarks/growth.py --size tiny --folder /tmp/growth
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

# Imported before the measured processes begin: they are forked, and measure no imports.
import bench  # noqa: E402
import datasets  # noqa: E402, F401
import gpu  # noqa: E402
import llava  # noqa: E402
import pandas as pd  # noqa: E402
import side  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import demo.registered  # noqa: E402, F401
from grains import ablation, attribution, cpu, generation, models, prompts, scoring  # noqa: E402
from grains.data import Example  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.settings import AttributionSettings  # noqa: E402

STAGES = ("attribution", "scoring", "decoding")
AXES = ("examples", "prompt tokens", "configurations")
WORDS, ANSWER, NEW_TOKENS = 12, 4, 4  # of a prompt, of an answer, of a text
STEERING, STATES = 4, "states.safetensors"  # examples of the vectors, and where their states go
ROOM = 24  # rows beside the measured ones, for the other splits


@dataclass(frozen=True)
class Size:
    """What is measured: numbers of examples, tokens, configurations; rows with pictures.

    least: seconds of processor time that a measurement in the library lasts at least.
    """

    examples: tuple[int, ...]
    tokens: tuple[int, ...]
    configurations: tuple[int, ...]
    pictures: int
    least: float


SIZES = {
    "full": Size(
        (10, 100, 1000, 10_000),
        tuple(2**power for power in range(5, 13)),
        tuple(2**power for power in range(7)),
        93_258,
        0.3,
    ),
    "tiny": Size((2, 4, 8), (32, 64), (1, 2), 200, 0),
}


# --- processes of their own ---


def apart(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, computed in a forked process, whose memory counts from the fork on."""
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def compute() -> None:
        torch.set_num_threads(1)
        sender.send(work(*arguments))

    process = context.Process(target=compute)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit(f"{work.__name__} ended without a result")
    finally:
        process.join()


def processor() -> float:
    """Processor seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- growth with the number of examples: the scripts ---


def make_model(folder: Path) -> None:
    """A tiny Llama with random weights and made-up words."""
    shape = gpu.TINY | {"num_hidden_layers": 2, "max_position_embeddings": 8192}
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    llava.tokenizer(config.vocab_size).save_pretrained(folder)


def sentences(count: int, words: int, seed: int) -> Iterator[str]:
    draw = np.random.default_rng(seed)
    for _ in range(count):
        yield " ".join(f"w{number}" for number in draw.integers(0, 500, words))


def make_rows(path: Path, count: int) -> None:
    """So many questions with two answers each."""
    texts = zip(
        sentences(count, WORDS, 0),
        sentences(count, ANSWER, 1),
        sentences(count, ANSWER, 2),
        strict=True,
    )
    with open(path, "w") as file:
        for question, *choices in texts:
            print(json.dumps({"question": question, "choices": choices, "label": 0}), file=file)


def script(name: str, *arguments: object) -> None:
    """Run a script's main function on arguments, silently."""
    sys.argv = [f"{name}.py", *map(str, arguments)]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        importlib.import_module(name).main()


def stage_on(stage: str, folder: Path, count: int, place: Path) -> None:
    """One stage by its script on so many examples; its files go into `place`.

    Scoring and decoding read the states that attribution left in `folder`.
    """
    data = ["--model_name", folder / "model", "--dataset_name", "made"]
    data += ["--dataset_path", folder / "rows.jsonl", "--prompt_style", "qa"]
    if stage == "attribution":
        first = ["--num_samples", count, "--top", "pos", "--grad_method", "vanilla"]
        first += ["--output_path_meta", place / "tokens.csv"]
        script("token_ablation", *data, *first, "--output_path_hidden", place / STATES)
        return
    grid = ["--num_samples", STEERING, "--grad_method", "vanilla", "--methods", "gradient"]
    grid += ["--alphas", 0.01, "--num_validation", 4, "--output_dir", place]
    grid += ["--hidden_states_path", folder / STATES, "--steering_vectors_dir", place]
    if stage == "scoring":
        script("steering_mc", *data, *grid, "--mode", "pos", "--num_test", count)
    else:
        words = ["--num_prompts", count, "--num_test", count, "--max_new_tokens", NEW_TOKENS]
        script("steering_generation", *data, *grid, *words, "--layer_idxs", "all")


def examples_of(stage: str, folder: Path, count: int, least: int) -> list[tuple[float, float]]:
    """(processor seconds, MiB) of each example beyond the first `least`."""
    spent, most = [], []
    # The first run is to warm up; what `least` examples take is taken off.
    for number, size in enumerate((least, least, count)):
        before = processor()
        stage_on(stage, folder, size, folder / f"{stage}-{count}-{number}")
        spent.append(processor() - before)
        most.append(side.memory()[1])
    more = count - least
    return [((spent[2] - spent[1]) / more, (most[2] - most[1]) / more)]


# --- growth with tokens and configurations: the library ---


def item_of(lm: LanguageModel, words: int, number: int = 0) -> Encoded:
    (question,) = sentences(1, words, 10 + number)
    answers = tuple(sentences(2, ANSWER, 1000 + number))
    return prompts.encode(lm, Example(str(number), question, answers, 0), "plain")


def library(stage: str, lm: LanguageModel, items: list[Encoded], count: int) -> Callable[[], Any]:
    """One stage on items, under `count` configurations of all layers."""
    every = tuple(range(len(lm.layers)))
    if stage == "attribution":
        settings = AttributionSettings(ig_steps=4)

        def work() -> None:
            for item in items:
                (attributed,) = attribution.attribute(lm, item, settings, bench.MAX_TOKENS, None)
                scores = torch.from_numpy(attributed.scores)
                chosen = ablation.select(scores, item.words, bench.K, "pos", None)
                ablation.hidden_states(lm, item, [chosen], bench.MAX_TOKENS)

        return work
    configurations = bench.directions(lm, items[0], [every] * count)
    if stage == "scoring":
        return lambda: scoring.score_all(lm, items, configurations, bench.MAX_TOKENS)
    return lambda: generation.generate(lm, items, configurations, NEW_TOKENS)


def measured(work: Callable[[], Any], least: float) -> tuple[float, float]:
    """Processor seconds of work, repeated until `least` have passed, and MiB beside what was."""
    work()
    held = side.memory()[0]
    _, _, most = bench.peak_memory(work)
    before, times = processor(), 0
    while not times or processor() - before < least:
        work()
        times += 1
    return (processor() - before) / times, most - held


def by_library(
    stage: str, folder: Path, axis: str, sizes: tuple[int, ...], least: float
) -> list[tuple]:
    """(seconds, MiB) at each size."""
    cpu.return_freed_memory()  # so that each measurement begins with what it needs
    lm = models.load(str(folder / "model"))
    values = []
    for size in sizes:
        if axis == "prompt tokens":
            work = library(stage, lm, [item_of(lm, size)], 4)
        else:
            work = library(stage, lm, [item_of(lm, WORDS, n) for n in range(8)], size)
        values.append(measured(work, least))
    return values


# --- pictures ---


def make_pictures(folder: Path, count: int) -> None:
    """Parquet files of so many rows, each with a picture of its own."""
    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    draw = np.random.default_rng(0)
    folder.mkdir()
    shards = np.array_split(np.arange(count), 8)
    for number, rows in enumerate(shards):
        pictures = []
        for noise in draw.integers(0, 256, (len(rows), 6, 6, 3), dtype=np.uint8):
            file = io.BytesIO()
            Image.fromarray(noise).save(file, format="png")
            pictures.append({"bytes": file.getvalue(), "path": None})
        table = {
            "image": pictures,
            "question": [f"Which squares are in picture {row}?" for row in rows],
            "chosen": ["a red square"] * len(rows),
            "rejected": ["a blue square"] * len(rows),
        }
        name = f"train-{number:05}-of-{len(shards):05}.parquet"
        parquet.write_table(pyarrow.table(table), folder / name)


def first_picture(folder: Path, place: Path) -> tuple[float, float]:
    """Seconds until stage 1 computes its first example, and the most memory until then, MiB."""
    from grains import stage1
    from grains.cli import flags

    class Reached(Exception):
        pass

    def reached(*_: Any) -> None:
        raise Reached

    token_ablation = importlib.import_module("token_ablation")
    stage1.one_example = reached
    sys.argv = ["token_ablation_vlm.py", "--model_name", "shapes-vlm", "--dataset_name", "made"]
    sys.argv += ["--dataset_path", str(folder), "--output_path_meta", str(place / "tokens.csv")]
    sys.argv += ["--output_path_hidden", str(place / "states.safetensors")]
    begin = time.perf_counter()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            token_ablation.main(flags.VLM)
    except Reached:
        pass
    return time.perf_counter() - begin, side.memory()[1]


# --- figures and the table ---


def exponent(sizes: list[float], values: list[float]) -> float:
    """Of the power of the size that fits the values best, in logarithms."""
    kept = [(size, value) for size, value in zip(sizes, values, strict=True) if value > 0]
    if len(kept) < 2:
        return float("nan")
    return float(np.polyfit(*np.log(kept).T, 1)[0])


def measure(size: Size, folder: Path) -> pd.DataFrame:
    """A row for each stage, axis and size: seconds and MiB, of each example or in all."""
    apart(make_model, folder / "model")
    make_rows(folder / "rows.jsonl", max(size.examples) + ROOM)
    apart(stage_on, "attribution", folder, STEERING, folder)
    least, *counts = size.examples
    # Two at a time, those that take longest first: it is processor time that is measured.
    with ThreadPoolExecutor(2) as pool:
        jobs: dict[tuple[str, str, tuple[int, ...]], Future] = {}
        for count in reversed(counts):
            for stage in STAGES:
                job = pool.submit(apart, examples_of, stage, folder, count, least)
                jobs[stage, "examples", (count,)] = job
        for stage in STAGES:
            for axis, sizes in (
                ("prompt tokens", size.tokens),
                ("configurations", size.configurations),
            ):
                if stage != "attribution" or axis != "configurations":
                    job = pool.submit(apart, by_library, stage, folder, axis, sizes, size.least)
                    jobs[stage, axis, sizes] = job
        rows = [
            (stage, axis, number, *values)
            for (stage, axis, sizes), job in jobs.items()
            for number, values in zip(sizes, job.result(), strict=True)
        ]
    made = pd.DataFrame(rows, columns=["stage", "axis", "size", "seconds", "MiB"])
    order = {name: place for place, name in enumerate((*STAGES, *AXES))}
    return made.sort_values(
        ["stage", "axis", "size"],
        key=lambda column: column.map(order) if column.name != "size" else column,
    )


def table(rows: pd.DataFrame, size: Size, pictures: tuple[float, float, float]) -> str:
    """Markdown: what was measured, and the exponents."""
    lines = [
        "# How cost grows",
        "",
        "Written by `python benchmarks/growth.py`: a tiny Llama with random weights, processor "
        "time on one thread. With the number of examples, what each further example takes, the "
        f"script's files included; prompts of {WORDS} words. With tokens and configurations, the "
        "whole of one prompt, and of 8 short ones. The exponent is of the power of the size that "
        "fits best: 0 is flat, 1 is in proportion.",
        "",
        "| stage | with | sizes | time | exponent | memory, MiB | exponent |",
        "|---|---|---|---|---|---|---|",
    ]
    for (stage, axis), group in rows.groupby(["stage", "axis"], sort=False):
        sizes = group["size"].tolist()
        unit = "ms an example" if axis == "examples" else "ms"
        times = " / ".join(f"{1000 * value:.3g}" for value in group.seconds)
        memory = " / ".join(f"{value:.2g}" for value in group.MiB)
        lines.append(
            f"| {stage} | {axis} | {' / '.join(map(str, sizes))} | {times} {unit} | "
            f"{exponent(sizes, group.seconds.tolist()):.2f} | {memory} | "
            f"{exponent(sizes, group.MiB.tolist()):.2f} |"
        )
    seconds, least, most = pictures
    lines += [
        "",
        f"Of {size.pictures:,} rows with pictures in Parquet files stage 1 draws 50 and computes "
        f"the first {seconds:.1f} s after its libraries are imported; the model (shapes-vlm) is "
        f"loaded in that time. Until then the process held {most:.0f} MiB at most, "
        f"{most - least:.0f} more than with 100 rows.",
    ]
    return "\n".join(lines) + "\n"


def draw(rows: pd.DataFrame, stage: str, path: Path) -> None:
    from matplotlib.figure import Figure

    from grains.report import figures

    own = rows[rows.stage == stage]
    axes_of = [axis for axis in AXES if (own["axis"] == axis).any()]
    with figures.style("light"):
        figure = Figure(figsize=(3.4 * len(axes_of), 2.9), layout="constrained")
        for axes, axis in zip(np.ravel(figure.subplots(1, len(axes_of))), axes_of, strict=True):
            group = own[own["axis"] == axis]
            power = exponent(group["size"].tolist(), group.seconds.tolist())
            colour, marker = figures.PALETTE[0]
            axes.plot(group["size"], 1000 * group.seconds, color=colour, marker=marker, ms=4)
            axes.set(xscale="log", yscale="log", xlabel=axis)
            per = "an example" if axis == "examples" else "in all"
            axes.set_ylabel(f"processor time {per}, ms")
            axes.set_title(f"{stage}: time ~ size^{power:.2f}")
            if axis == "examples" and (most := 1000 * group.seconds.max()) > 0:
                axes.set_ylim(most / 100, most * 10)
        figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="gets img/ and tables/")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    size = SIZES[args.size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = measure(size, folder)
        reached = []
        for count in (100, size.pictures):
            apart(make_pictures, folder / f"pictures-{count}", count)
            reached.append(apart(first_picture, folder / f"pictures-{count}", folder / f"p{count}"))
    for place in ("img", "tables"):
        (args.folder / place).mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        draw(rows, stage, args.folder / "img" / f"growth_{stage}.png")
    text = table(rows, size, (reached[1][0], reached[0][1], reached[1][1]))
    (args.folder / "tables" / "growth.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
