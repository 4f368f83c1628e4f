"""Processor time of a whole experiment, by phase, against an earlier commit.

    git worktree add /tmp/earlier 319d0e2
    python benchmarks/whole_experiment.py --baseline /tmp/earlier --seeds 0    # about an hour

The experiment on misconceptions with SmolLM2-135M-Instruct, its controls, trained vectors and LoRA,
with the methods that both checkouts have. Both run at once, with a thread each, so that both see
the same load. Ours also tries the rotation of the trained vectors: five configurations more on
validation, and those chosen of them on test. Further flags (seeds, less of everything) go to both.

A phase has what its progress bar says; its time is read when the bar moves. Cells of both tables
are compared: gains, and changes on unrelated questions, that differ by more than a tenth of the
earlier interval.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil

SRC = Path(__file__).resolve().parents[1] / "src"
RUN = ["--model_name", "smollm2-135m-instruct", "--batch_tokens", "1024"]
RUN += ["--dataset_name", "misconceptions", "--lora", "dpo", "--methods"]
RUN += ["mean", "pca", "gradient", "caa", "repe", "random", "rand_tokens", "shuffled"]
BAR = re.compile(rb"([^\r\n]+?): +\d+%\|")
RUN_OF_PHASE = re.compile(r"_seed\d+|, run \d+ of \d+")
CELL = ["dataset", "evaluated_on", "method", "score", "max_ppl_increase"]
SHARE = 0.1  # of the earlier interval: a cell that differs by more has moved


def phases(src: Path, flags: list[str], folder: Path) -> Counter[str]:
    """Processor seconds of an experiment by phase; its tables lie in the folder."""
    process = subprocess.Popen(
        [sys.executable, "experiment.py", *RUN, *flags, "--output_dir", str(folder)],
        cwd=src,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    watched = psutil.Process(process.pid)
    seconds: Counter[str] = Counter()
    phase, before, said = "start", 0.0, b""
    while piece := os.read(process.stderr.fileno(), 65536):
        said = (said + piece)[-4096:]
        times = watched.cpu_times()
        seconds[phase] += times.user + times.system - before
        before = times.user + times.system
        if bars := BAR.findall(piece):
            phase = RUN_OF_PHASE.sub("", bars[-1].decode()).strip()
    if process.wait():
        sys.exit(f"{src / 'experiment.py'} failed: {said.decode(errors='replace')}")
    return seconds


def front(folder: Path) -> pd.DataFrame:
    """The gains by cell; the constraints, worded otherwise by earlier versions, by their number."""
    (path,) = folder.glob("*_front.csv")
    table = pd.read_csv(path, keep_default_na=False)
    table["constraint"] = table.groupby(CELL, sort=False).cumcount()
    return table.set_index([*CELL, "constraint"])


def differing(mine: pd.DataFrame, earlier: pd.DataFrame) -> list[str]:
    """The cells that have moved, a line each."""
    both = earlier.join(mine, rsuffix="_of_ours", how="inner")
    lines = []
    for name, low, high in (
        ("gain", "gain_low", "gain_high"),
        ("unrelated_change", "unrelated_change_low", "unrelated_change_high"),
    ):
        apart = (both[f"{name}_of_ours"] - both[name]).abs()
        for key in both.index[apart > SHARE * (both[high] - both[low]) + 1e-9]:
            row = both.loc[key]
            lines.append(
                f"{name} of {', '.join(map(str, key))}: {row[name]:+.3f} "
                f"[{row[low]:+.3f}, {row[high]:+.3f}], ours {row[f'{name}_of_ours']:+.3f}"
            )
    return [f"{len(lines)} of {2 * len(both)} cells differ", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", type=Path, required=True, help="checkout to compare with")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as threads:
        folders = {side: Path(name) / side for side in ("ours", "baseline")}
        sources = {"ours": SRC, "baseline": args.baseline.resolve() / "src"}
        running = {
            side: threads.submit(phases, sources[side], flags, folders[side]) for side in folders
        }
        seconds = {side: future.result() for side, future in running.items()}
        cells = differing(*map(front, folders.values()))
    print("| phase | ours, processor s | baseline | baseline / ours |\n|---|---|---|---|")
    for phase in [*(seconds["baseline"] | seconds["ours"]), "all"]:
        mine, earlier = (
            of.total() if phase == "all" else of[phase]
            for of in (seconds["ours"], seconds["baseline"])
        )
        ratio = f"{earlier / mine:.2f}" if mine else "-"
        print(f"| {phase} | {mine:.1f} | {earlier:.1f} | {ratio} |")
    print("\n".join(cells))


if __name__ == "__main__":
    main()
