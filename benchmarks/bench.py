"""How fast the stages are: against an earlier commit, plain code, peers, the machine's limit.

Every job runs in a process of its own. What is compared alternates, on the same work with the same
threads, and the medians of the repetitions are reported; outputs are compared too. Plain code is
slow, so it gets a part of each job's work, and ours the same part and then all of it.

    git worktree add /tmp/earlier 319d0e2
    python benchmarks/bench.py --baseline /tmp/earlier       # an hour and a half on 2 idle cores
    python benchmarks/bench.py --only steering_mc long_prompt
    python benchmarks/bench.py --all            # all of the work for plain code too: hours

RESULTS.md holds no row that was measured with other code than this: such rows are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import llava  # noqa: E402
import plain  # noqa: E402
import side  # noqa: E402

import demo.registered  # noqa: E402, F401
import grains  # noqa: E402
from grains import cpu, data, models, prompts, runs  # noqa: E402
from grains.ablation import hidden_states, select  # noqa: E402
from grains.attribution import (  # noqa: E402
    PromptFunction,
    attribute,
    attributed_positions,
    baseline_embeddings,
)
from grains.cli import documents  # noqa: E402
from grains.generation import generate  # noqa: E402
from grains.packing import pack  # noqa: E402
from grains.scoring import Configuration, score_all  # noqa: E402
from grains.settings import AttributionSettings  # noqa: E402
from grains.study import costs  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
STEPS, K, REPEATS = 20, 10, 3
MAX_TOKENS = 2048
LONG_PROMPT, BUDGET_GIB = 2900, 2.0
# The published setting: what captum integrates, so that the numbers can be compared.
PUBLISHED = AttributionSettings(
    baseline="zeros", image_baseline="zeros", attribute="all", ig_steps=STEPS
)


@dataclass
class Job:
    """One stage's work, done by ours and by plain code.

    part: how many units plain code gets, `repeats` times. ours, plain: units of work -> their
    numbers. agree: both numbers -> what is to be reported of their difference. flops: units -> the
    fewest floating-point operations that give the numbers.
    """

    stage: str
    work: str
    target: float
    part: int
    repeats: int
    units: list
    ours: Callable
    plain: Callable
    agree: Callable
    flops: Callable


def pairs_of(lm, dataset: str, count: int, style: str) -> list:
    rows, source = data.load(dataset, data.default_split(dataset, "steering"))
    return [
        prompts.encode(lm, example.pair(), style)
        for example in data.examples(rows, source, 0, count)
    ]


def ablation_job(lm, dataset: str, count: int, style: str, stage: str, part: int) -> Job:
    units = pairs_of(lm, dataset, count, style)

    def ours(items):
        results = []
        for item in items:
            scores = torch.from_numpy(attribute(lm, item, PUBLISHED, MAX_TOKENS, None)[0].scores)
            candidates = item.words | item.image
            sets = [select(scores, candidates, K, top, None) for top in ("pos", "neg")]
            states = hidden_states(lm, item, sets, MAX_TOKENS)
            results.append(
                {
                    "scores": scores.numpy(),
                    "last": states.last,
                    "log_likelihoods": states.log_likelihoods.numpy(),
                }
            )
        return results

    def by_plain_code(items):
        results = []
        for item in items:
            replacement = baseline_embeddings(
                lm, item, plain.embed(lm, item.inputs)[0], "pad", "mean"
            )
            results.append(
                plain.token_ablation(lm, item, item.words | item.image, K, STEPS, replacement)
            )
        return results

    def agree(mine, theirs):
        scores = max(
            np.abs(a["scores"] - b["scores"]).max() / np.abs(b["scores"]).max()
            for a, b in zip(mine, theirs, strict=True)
        )
        plain_row = max(
            np.abs(a["log_likelihoods"][0] - b["log_likelihoods"][0]).max()
            for a, b in zip(mine, theirs, strict=True)
        )
        return f"scores within {scores:.1g} of the largest, log-likelihoods within {plain_row:.1g}"

    def flops(items):
        total = 0
        for item in items:
            packed = pack(item.sequences())
            shorter = item.packed_length
            scored = sum(map(len, item.responses))
            # forward and backward of every point; the plain pass with its gradients; two ablated
            total += 2 * STEPS * (layer_flops(lm, shorter) + scored * head_flops(lm))
            total += 4 * (layer_flops(lm, len(packed)) + scored * head_flops(lm))
        return total

    return Job(
        stage,
        f"{count} pairs, {STEPS} steps, k={K}, both signs",
        6,
        part,
        REPEATS,
        units,
        ours,
        by_plain_code,
        agree,
        flops,
    )


def mc_job(lm, grid: dict[int, int], stage: str, target: float, part: int, count: int = 100) -> Job:
    """grid: layer -> how many configurations steer there."""
    units = pairs_of(lm, "misconceptions", count, "qa")
    configurations = directions(
        lm, units[0], [(layer,) for layer, n in grid.items() for _ in range(n)]
    )

    def ours(items):
        return score_all(lm, items, configurations, MAX_TOKENS)

    def flops(items):
        total = 0
        for item in items:
            length = item.packed_length
            above = sum(len(lm.layers) - 1 - c.layers[0] for c in configurations)
            total += layer_flops(lm, length) * (1 + above / len(lm.layers))
            total += (1 + len(configurations)) * sum(map(len, item.responses)) * head_flops(lm)
        return total

    layers = ", ".join(map(str, grid))
    return Job(
        stage,
        f"base and {len(configurations)} configurations on layers {layers}, "
        f"{count} questions x 2 choices",
        target,
        part,
        REPEATS,
        units,
        ours,
        lambda items: [plain.steering_mc(lm, item, configurations) for item in items],
        largest_difference,
        flops,
    )


def generation_job(lm, count: int = 32, new_tokens: int = 64) -> Job:
    units = pairs_of(lm, "misconceptions", count, "chat")
    every = tuple(range(len(lm.layers)))
    configurations = directions(lm, units[0], [every] * 3)

    def ours(items):
        return list(zip(*generate(lm, items, configurations, new_tokens), strict=True))

    def agree(mine, theirs):
        pairs = [
            (a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)
        ]
        return f"{sum(a == b for a, b in pairs)} of {len(pairs)} texts the same"

    def flops(items):
        return sum(
            (len(item.prompt_ids) + new_tokens) * 4 * layer_flops(lm, 1)
            + new_tokens * 4 * head_flops(lm)
            for item in items
        )

    # The ratio depends on how many prompts share a batch: plain code gets all of them, once.
    return Job(
        "steering_generation",
        f"{count} prompts x base and 3 configurations, {new_tokens} new tokens",
        6,
        count,
        1,
        units,
        ours,
        lambda items: [plain.generation(lm, item, configurations, new_tokens) for item in items],
        agree,
        flops,
    )


def directions(lm, item, layers: list[tuple[int, ...]]) -> list[Configuration]:
    """Configurations with random directions, each a hundredth of the activations' norm."""
    norms = hidden_states(lm, item, [], MAX_TOKENS).norms[1:]
    generator = torch.Generator().manual_seed(0)
    made = []
    for group in layers:
        vectors = {
            layer: 0.01
            * norms[layer]
            * nn.functional.normalize(torch.randn(lm.hidden_size, generator=generator), dim=-1)
            for layer in group
        }
        made.append(Configuration("random", "", group, 0.01, vectors))
    return made


def largest_difference(mine, theirs) -> str:
    worst = max(
        np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in zip(mine, theirs, strict=True)
    )
    return f"log-likelihoods within {worst:.1g}"


def layer_flops(lm, length: int) -> float:
    """Of one forward of all decoder layers on a sequence of `length` positions."""
    weights = sum(
        module.weight.numel() for module in lm.layers.modules() if isinstance(module, nn.Linear)
    )
    config = lm.model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return 2 * length * weights + len(lm.layers) * 2 * 2 * width * length * (length + 1) / 2


def head_flops(lm) -> float:
    """Of the vocabulary projection of one position."""
    return 2 * lm.head.weight.numel()


@torch.inference_mode()
def matrix_rate(seconds: float = 1.0) -> float:
    """FLOP/s of (1024 x 576) (576 x 1536) in fp32, as a model's layers are multiplied here, kept
    up for so long."""
    states, layer = torch.randn(1024, 576), nn.Sequential(nn.Linear(576, 1536, bias=False))
    cpu.use_onednn(layer.requires_grad_(False))
    layer(states)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + seconds:
        layer(states)
        count += 1
    return count * 2 * 1024 * 576 * 1536 / (time.perf_counter() - begin)


LONG = "long_prompt"
JOBS = {
    "token_ablation": lambda: ablation_job(
        models.load(models.EMBEDDED), "misconceptions", 50, "qa", "token_ablation", 2
    ),
    "steering_mc": lambda: mc_job(
        models.load(models.EMBEDDED), {14: 12, 29: 12}, "steering_mc", 10, 5
    ),
    "steering_mc_late": lambda: mc_job(
        models.load(models.EMBEDDED),
        {26: 12, 27: 12, 28: 12, 29: 12},
        "steering_mc, late layers",
        18,
        3,
    ),
    "steering_generation": lambda: generation_job(models.load(models.EMBEDDED)),
    "token_ablation_vlm": lambda: ablation_job(
        models.load("shapes-vlm"), "shapes", 20, "chat", "token_ablation_vlm", 6
    ),
}


def peak_memory(work: Callable) -> tuple[object, float, float]:
    """work()'s result, its seconds, and the most memory of the process meanwhile, MiB (Linux)."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak counts from now on
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text() if reset.exists() else "VmHWM: 0 kB"
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    return result, seconds, peak / 2**20


def long_prompt() -> dict:
    """Attribution of a prompt of LONG_PROMPT tokens within a memory budget of BUDGET_GIB."""
    lm = models.load(models.EMBEDDED, max_memory=BUDGET_GIB)
    ids = lm.tokenizer(" ".join(costs.neutral_texts())).input_ids[:LONG_PROMPT]
    item = prompts.encode(
        lm,
        data.Example("long", lm.tokenizer.decode(ids), (" It is so.", " It is not so."), 0),
        "plain",
    )
    unlimited = STEPS * LONG_PROMPT  # so that memory alone decides how many rows there are
    function = PromptFunction(lm, item, [1.0, -1.0], unlimited)
    loaded = psutil.Process().memory_info().rss / 2**20
    attributed, _, peak = peak_memory(lambda: attribute(lm, item, PUBLISHED, unlimited, None)[0])
    return {
        "tokens": len(item.prompt_ids),
        "rows": function.rows,
        "checkpointed": function.checkpointed,
        "peak": peak - loaded,
        "finite": bool(np.isfinite(attributed.scores).all()),
        "threads": torch.get_num_threads(),
    }


def run_job(name: str, everything: bool) -> dict:
    job = JOBS[name]()
    loaded = psutil.Process().memory_info().rss / 2**20
    count = len(job.units) if everything else job.part
    some = job.units[:: max(1, len(job.units) // count)][:count]
    job.ours(some[:1]), job.plain(some[:1])
    times, rates = {"ours": [], "plain": []}, []
    for repeat in range(job.repeats):
        rates.append(matrix_rate())
        mine, seconds, _ = peak_memory(lambda: job.ours(some))
        times["ours"].append(seconds)
        theirs, seconds, plain_peak = peak_memory(lambda: job.plain(some))
        times["plain"].append(seconds)
        print(
            f"{name} {repeat + 1}/{job.repeats}: ours {times['ours'][-1]:.1f} s, "
            f"plain {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    _, whole, peak = peak_memory(lambda: job.ours(job.units))
    rates.append(matrix_rate())
    rate = statistics.median(rates)
    ours, by_plain = (statistics.median(times[key]) for key in ("ours", "plain"))
    return {
        "stage": job.stage,
        "threads": torch.get_num_threads(),
        "work": job.work,
        "target": job.target,
        "part": count,
        "units": len(job.units),
        "ours": ours,
        "plain": by_plain,
        "ratio": by_plain / ours,
        "times": times,
        "whole": whole,
        "rate": rate,
        "limit": job.flops(job.units) / rate,
        "agree": job.agree(mine, theirs),
        "ours_peak": peak - loaded,
        "plain_peak": plain_peak - loaded,
    }


MEASURING = ("bench", "llava", "peers", "plain", "side")  # the programs behind the rows
PRECISION = "bfloat16"  # the row that compares the two precisions
# What a row of side.py is, and the ratio that it should reach.
AGAINST = {
    "chat": ("token_ablation, style chat, default attribution", "1.8x"),
    "shots": ("token_ablation, six shots before each question, default attribution", "4x"),
    "qa": ("token_ablation, style qa, default attribution", "1.4x"),
    "published": ("token_ablation, style qa, 20 points, all positions", "half the memory"),
    "vectors": ("states for gradient, caa and repe alone", "15x"),
    "vlm": ("token_ablation of the small image-text model, default attribution", "1.5x"),
    "llava": (
        "token_ablation of a small LLaVA-NeXT with random weights, 627 image tokens behind 64 "
        "words, default attribution",
        "1.5x",
    ),
}
# Rows once more with gradients in this precision, ours alone.
MEDIUM, AS_MEDIUM = "-medium", ", `--matmul_precision medium`"
AGAINST |= {
    row + MEDIUM: (AGAINST[row][0] + AS_MEDIUM, AGAINST[row][1])
    for row in ("chat", "qa", "vlm", "llava")
}


def against(row: str, baseline: Path, folder: Path) -> dict:
    """One row of both checkouts in turn."""
    own = ["--matmul_precision", "medium"] if row.endswith(MEDIUM) else []
    row = row.removesuffix(MEDIUM)
    model: list[str] = []
    if row == "llava":
        llava.save_small(folder / row)
        model = ["--model", str(folder / row)]
    more = {"ours": own, "baseline": []}
    counts = dict(zip(("baseline", "ours"), side.ROWS[row][3:], strict=True))
    return in_turn(
        row,
        {
            name: ["--src", str(src), "--count", str(counts[name]), *model, *more[name]]
            for name, src in {"ours": ROOT / "src", "baseline": baseline.resolve() / "src"}.items()
        },
        folder,
    )


def precision(folder: Path) -> dict:
    """The published attribution in float32 and in bfloat16 in turn."""
    count = str(side.ROWS["published"][-1])
    sides = {
        name: ["--src", str(ROOT / "src"), "--count", count, "--dtype", name]
        for name in ("bfloat16", "float32")
    }
    return in_turn("published", sides, folder)


def in_turn(row: str, sides: dict[str, list[str]], folder: Path) -> dict:
    """One row of side.py for both sides in turn, each time in a process of its own.

    sides: name -> its arguments; the numbers of the first are compared with those of the second.
    """
    measured: dict[str, list[dict]] = {name: [] for name in sides}
    for repeat in range(REPEATS):
        for name, arguments in sides.items():
            command = [sys.executable, str(ROOT / "benchmarks" / "side.py"), row, *arguments]
            command += ["--output", str(folder / f"{name}.pt")]
            done = subprocess.run(
                command,
                cwd=arguments[arguments.index("--src") + 1],
                check=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            measured[name].append(json.loads(done.stdout.splitlines()[-1]))
            last = measured[name][-1]
            print(
                f"{row} {repeat + 1}/{REPEATS} {name}: {last['seconds']:.1f} s, {last['pairs']} "
                "pairs",
                file=sys.stderr,
                flush=True,
            )
    mine, theirs = (torch.load(folder / f"{name}.pt") for name in sides)
    apart = {
        key: max(
            ((a[key] - b[key]).norm() / b[key].norm()).item()
            for a, b in zip(mine, theirs, strict=False)  # the baseline may have fewer
        )
        for key in ("scores", "last", "gradients")
        if key in mine[0]
    }
    return {
        "sides": {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            for name, runs in measured.items()
        },
        "apart": apart,
        "threads": torch.get_num_threads(),
    }


def peer_pairs(lm, count: int, style: str, settings: AttributionSettings) -> tuple[list, list]:
    """Pairs as ours takes them and as peers.py does."""
    items = pairs_of(lm, "misconceptions", count, style)
    pairs = [
        {
            "prompt": item.text,
            "chosen": ("" if style == "chat" else " ") + item.example.chosen,
            "rejected": ("" if style == "chat" else " ") + item.example.rejected,
            "prompt_ids": item.prompt_ids,
            "chosen_ids": item.responses[0],
            "rejected_ids": item.responses[1],
            "moves": attributed_positions(item, settings.attribute).tolist(),
        }
        for item in items
    ]
    return items, pairs


@dataclass
class Peer:
    """A peer's job: what it is, how many pairs, and ours on the same pairs.

    settings: of the attribution; style: of the prompts.
    """

    what: str
    pairs: int
    ours: Callable
    style: str = "qa"
    settings: AttributionSettings = PUBLISHED


def scores_of(lm, items, settings) -> list:
    return [attribute(lm, item, settings, MAX_TOKENS, None)[0].scores for item in items]


def fitted(method: str) -> Callable:
    """Vectors from pairs, as users make them: encoding, forwards, and what reduces the states."""
    return lambda lm, items, _: grains.fit(lm, [item.example for item in items], method)


CONTENT = replace(PUBLISHED, attribute="content")
PEERS = {
    "captum": Peer(f"attribution, {STEPS} points, style qa, all positions", 2, scores_of),
    "captum-chat": Peer(
        f"attribution, {STEPS} points, chat template, the user's words",
        2,
        scores_of,
        "chat",
        CONTENT,
    ),
    "captum-medium": Peer(
        f"attribution, {STEPS} points, style qa, all positions{AS_MEDIUM}",
        2,
        scores_of,
        settings=replace(PUBLISHED, matmul_precision="medium"),
    ),
    "captum-chat-medium": Peer(
        f"attribution, {STEPS} points, chat template, the user's words{AS_MEDIUM}",
        2,
        scores_of,
        "chat",
        replace(CONTENT, matmul_precision="medium"),
    ),
    "inseq": Peer(f"attribution, {STEPS} points", 2, scores_of),
    "steering-vectors-mean": Peer("mean-difference vectors", 50, fitted("caa")),
    "nnsight-mean": Peer("mean-difference vectors", 50, fitted("caa")),
    "repeng-pca": Peer("PCA vectors", 50, fitted("repe")),
}


def peer_row(name: str, python: str, folder: Path) -> dict:
    """A peer's own job and ours on the same pairs, alternating."""
    job = PEERS[name]
    peer = name.removesuffix(MEDIUM).removesuffix("-chat")
    lm = models.load(models.EMBEDDED)
    items, pairs = peer_pairs(lm, job.pairs, job.style, job.settings)
    (folder / "pairs.json").write_text(json.dumps(pairs))
    job.ours(lm, items[:2], job.settings)
    mine, theirs, result = [], [], {}
    for repeat in range(REPEATS):
        begin = time.perf_counter()
        job.ours(lm, items, job.settings)
        mine.append((time.perf_counter() - begin) / len(items))
        command = [python, ROOT / "benchmarks" / "peers.py", peer]
        command += ["--model", models.resolve(models.EMBEDDED), "--pairs", folder / "pairs.json"]
        command += ["--threads", torch.get_num_threads(), "--steps", STEPS]
        command += ["--output", folder / "peer.json"]
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        result = json.loads((folder / "peer.json").read_text())
        theirs.append(result["seconds"][0] / len(items))
        print(
            f"{name} {repeat + 1}/{REPEATS}: ours {mine[-1]:.2f}, theirs {theirs[-1]:.2f} s a pair",
            file=sys.stderr,
            flush=True,
        )
    package, release = next(iter(result["versions"].items()))
    what = job.what
    if name.endswith(MEDIUM):
        exact = job.ours(lm, items, replace(job.settings, matmul_precision="highest"))
        off = max(
            np.linalg.norm(a - b) / np.linalg.norm(b)
            for a, b in zip(job.ours(lm, items, job.settings), exact, strict=True)
        )
        what += f" (scores differ from those of fp32 by {off:.1%} of their norm at most)"
    return {
        "peer": f"{package} {release}",
        "what": what,
        "pairs": len(items),
        "ours": statistics.median(mine),
        "theirs": statistics.median(theirs),
        "threads": torch.get_num_threads(),
    }


def code() -> str:
    """A digest of the code that is measured, and of what measures it."""
    digest = hashlib.sha256()
    measuring = [ROOT / "benchmarks" / f"{name}.py" for name in MEASURING]
    for path in sorted([*ROOT.glob("src/grains/*.py"), *measuring]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def report(results: dict[str, dict]) -> str:
    """RESULTS.md between its markers: the tables, and when and where each row was measured."""
    if not results:
        return "Nothing is measured with this code yet: run `make bench`."
    jobs = [results[name] for name in JOBS if name in results]
    measured: dict[str, list[str]] = {}
    for name, row in results.items():
        measured.setdefault(row["measured"], []).append(name)
    lines = [
        f"Measured {text}{': ' + ', '.join(names) if len(measured) > 1 else ''}."
        for text, names in measured.items()
    ]
    lines += [f"What is compared alternates on the same work; medians of {REPEATS}."]
    if compared := [name for name in AGAINST if name in results]:
        lines += [
            "",
            "| against 319d0e2 | pairs, ours and its | ours, s a pair | its | ratio | by processor "
            "time | at least | memory beside the model, MiB, ours and its | gradients a pair | "
            "scores, states, gradients differ by |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
    for name in compared:
        what, target = AGAINST[name]
        row = results[name]
        ours, its = row["sides"]["ours"], row["sides"]["baseline"]
        wall, processor = (
            (its[key] / its["pairs"]) / (ours[key] / ours["pairs"])
            for key in ("seconds", "processor")
        )
        lines.append(
            f"| {what} | {ours['pairs']}, {its['pairs']} | {ours['seconds'] / ours['pairs']:.2f} | "
            f"{its['seconds'] / its['pairs']:.2f} | {wall:.1f}x | {processor:.1f}x | {target} | "
            f"{ours['peak']:.0f}, {its['peak']:.0f} | {ours['points']:.0f} | "
            + ", ".join(f"{value:.0e}" for value in row["apart"].values())
            + " |"
        )
    if row := results.get(PRECISION):
        bf16, fp32 = row["sides"]["bfloat16"], row["sides"]["float32"]
        lines += [
            "",
            f"In bfloat16, {STEPS} points, style qa, {bf16['pairs']} pairs: "
            f"{fp32['seconds'] / bf16['seconds']:.1f}x as fast as in fp32 (by processor time "
            f"{fp32['processor'] / bf16['processor']:.1f}x), memory {bf16['peak']:.0f} and "
            f"{fp32['peak']:.0f} MiB beside the model; scores, states, gradients differ by "
            + ", ".join(f"{value:.0e}" for value in row["apart"].values())
            + " of their norm.",
        ]
    if jobs:
        rates = [job["rate"] / 1e9 for job in jobs]
        lines += [
            "",
            "Matrix products (1024 x 576)(576 x 1536), measured beside each job: "
            f"{min(rates):.0f} to {max(rates):.0f} GFLOP/s.",
            "",
            "| stage | work | compared on | ours, s | plain, s | ratio | at least | the same? |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for job in jobs:
        lines.append(
            f"| {job['stage']} | {job['work']} | {job['part']} of {job['units']}, "
            f"{len(job['times']['ours'])} times | "
            f"{job['ours']:.1f} | {job['plain']:.1f} | {job['ratio']:.1f}x | {job['target']}x | "
            f"{job['agree']} |"
        )
    if jobs:
        lines += [
            "",
            "| ours, all of the work, once | s | the limit, s | % of the limit | "
            "memory beside the model, MiB | plain's, MiB |",
            "|---|---|---|---|---|---|",
        ]
    for job in jobs:
        lines.append(
            f"| {job['stage']} | {job['whole']:.1f} | {job['limit']:.1f} | "
            f"{job['limit'] / job['whole']:.0%} | "
            f"{job['ours_peak']:.0f} | {job['plain_peak']:.0f} |"
        )
    if long := results.get(LONG):
        lines += [
            "",
            f"Attribution of a prompt of {long['tokens']} tokens, {STEPS} points, with "
            f"`--max_memory {BUDGET_GIB:g}`: {long['rows']} row(s) of the batch at a time, "
            f"layers {'' if long['checkpointed'] else 'not '}checkpointed, "
            f"at most {long['peak'] / 1024:.2f} GiB beside the model; every score "
            f"{'finite' if long['finite'] else 'NOT FINITE'}.",
        ]
    if peers := [results[name] for name in PEERS if name in results]:
        lines += [
            "",
            "| peer | its job | pairs | peer, s a pair | ours, s a pair | ratio |",
            "|---|---|---|---|---|---|",
        ]
    for row in peers:
        lines.append(
            f"| {row['peer']} | {row['what']} | {row['pairs']} | "
            f"{row['theirs']:.2f} | {row['ours']:.2f} | "
            f"{row['theirs'] / row['ours']:.1f}x |"
        )
    return "\n".join(lines)


def circumstances(threads: int) -> str:
    """When, on what and with what something is measured."""
    versions = ", ".join(
        f"{name} {version}"
        for name, version in runs.versions().items()
        if name in ("torch", "transformers")
    )
    return (
        f"{time.strftime('%Y-%m-%d')} on {machine()}, {threads} thread{'s' * (threads > 1)}, fp32, "
        f"Python {platform.python_version()}, {versions}"
    )


def machine() -> str:
    names = (
        [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    memory = psutil.virtual_memory().total / 2**30
    name = names[0] if names else platform.processor()
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="*",
        choices=[*AGAINST, PRECISION, *JOBS, LONG, *PEERS],
        help="the rows that are measured; without it all for which there is what they need",
    )
    parser.add_argument("--all", action="store_true", help="give plain code all of the work")
    parser.add_argument("--baseline", type=Path, help="checkout of the commit to compare with")
    parser.add_argument(
        "--peers",
        help="Python of an environment with requirements-peers.txt; "
        "without it the peers are left out",
    )
    parser.add_argument("--output", default=RESULTS, type=Path)
    # A job's own process.
    parser.add_argument("--job", choices=[*JOBS, LONG], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        cpu.keep_freed_memory()  # as the stages do
        print(json.dumps(long_prompt() if args.job == LONG else run_job(args.job, args.all)))
        return
    wanted = args.only
    if wanted is None:
        wanted = [
            *(AGAINST if args.baseline else ()),
            PRECISION,
            *JOBS,
            LONG,
            *(PEERS if args.peers else ()),
        ]
    needs = {"baseline": AGAINST, "peers": PEERS}
    for flag, rows in needs.items():
        if any(name in rows for name in wanted) and not getattr(args, flag):
            parser.error(f"{', '.join(name for name in wanted if name in rows)} need --{flag}")
    kept = args.output.with_suffix(".json")  # so that a part can be measured anew
    results = json.loads(kept.read_text()) if kept.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            if name in AGAINST:
                row = against(name, args.baseline, Path(folder))
            elif name == PRECISION:
                row = precision(Path(folder))
            elif name in PEERS:
                row = peer_row(name, args.peers, Path(folder))
            else:
                command = [sys.executable, __file__, "--job", name, *(["--all"] * args.all)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row = json.loads(done.stdout.splitlines()[-1])
            results[name] = row | {"code": code(), "measured": circumstances(row["threads"])}
            write(results, kept, args.output)
    print(f"results: {args.output}")


def write(results: dict[str, dict], kept: Path, output: Path) -> None:
    """Write both files, without the rows that other code was measured for."""
    for name in [name for name, row in results.items() if row.get("code") != code()]:
        del results[name]
    kept.write_text(json.dumps(results, indent=1) + "\n")
    documents.write_between(output, "measured", [report(results)])


if __name__ == "__main__":
    main()
