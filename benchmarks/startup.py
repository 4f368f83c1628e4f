"""How long scripts take to start, against an earlier commit, in processor seconds.

    git worktree add /tmp/earlier 319d0e2
    python benchmarks/startup.py --baseline /tmp/earlier

Measured in turn, medians: `--help` and a mistake in a flag of every script, and each stage from its
start until it computes its first example (SmolLM2-135M-Instruct, misconceptions; the model is in
the cache). Processor time is that of the whole process, of all its threads; OMP_NUM_THREADS is 1.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

SRC = Path(__file__).resolve().parents[1] / "src"
SCRIPTS = (
    "token_ablation.py",
    "steering_mc.py",
    "steering_generation.py",
    "score_generations.py",
    "experiment.py",
    "ablations.py",
    "report.py",
)
RUN = ["--model_name", "smollm2-135m-instruct", "--dataset_name", "misconceptions"]
RUN += ["--num_samples", "2"]
# What a stage's progress bar says when its first example is computed.
STAGES = {
    "token_ablation.py": ("token ablation", ["--ig_steps", "4"]),
    "steering_mc.py": ("scoring", ["--num_validation", "4", "--num_test", "4"]),
    "steering_generation.py": (
        "generating",
        ["--num_prompts", "2", "--methods", "random", "--alphas", "0.01", "--max_new_tokens", "2"],
    ),
}


def ended(src: Path, script: str, *arguments: str) -> float:
    """Processor seconds of a script that ends at once."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, str(src / script), *arguments],
        cwd=src,
        env=environment(),
        capture_output=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def until_first_example(src: Path, script: str, *arguments: str) -> float:
    """Processor seconds of a stage when the bar of its units stands at the first."""
    bar = STAGES[script][0].encode()
    process = subprocess.Popen(
        [sys.executable, str(src / script), *RUN, *STAGES[script][1], *arguments],
        cwd=src,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = b""
    while bar not in said:
        piece = os.read(process.stderr.fileno(), 4096)
        if not piece:
            sys.exit(f"{script} ended before its first example: {said.decode()}")
        said += piece
    times = psutil.Process(process.pid).cpu_times()
    process.kill()
    process.wait()
    return times.user + times.system


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def stage1(src: Path, folder: Path) -> None:
    """Run stage 1, which the other stages start from."""
    paths = ["--output_path_meta", str(folder / "tokens.csv")]
    paths += ["--output_path_hidden", str(folder / "states.safetensors")]
    subprocess.run(
        [sys.executable, "token_ablation.py", *RUN, "--ig_steps", "4", *paths],
        cwd=src,
        env=environment(),
        check=True,
        capture_output=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sides = {"ours": SRC, "baseline": args.baseline / "src"}
        for side, src in sides.items():
            (folder / side).mkdir()
            stage1(src, folder / side)
        measured: dict[tuple[str, str], dict[str, list[float]]] = {}

        def note(what: str, script: str, side: str, seconds: float) -> None:
            measured.setdefault((what, script), {}).setdefault(side, []).append(seconds)

        for run in range(args.runs):
            for side, src in sides.items():
                for script in SCRIPTS:
                    note("--help", script, side, ended(src, script, "--help"))
                    note("a wrong flag", script, side, ended(src, script, "--no_such_flag"))
                for script in STAGES:
                    place = folder / f"{side}-{run}-{script}"
                    paths = {
                        "--output_path_meta": place / "tokens.csv",
                        "--output_path_hidden": place / "states.safetensors",
                    }
                    if script != "token_ablation.py":
                        paths = {
                            "--hidden_states_path": folder / side / "states_pos.safetensors",
                            "--output_dir": place,
                            "--steering_vectors_dir": place,
                        }
                    words = [str(word) for pair in paths.items() for word in pair]
                    note("first example", script, side, until_first_example(src, script, *words))
        for (what, script), seconds in measured.items():
            ours, baseline = (statistics.median(seconds[side]) for side in ("ours", "baseline"))
            rows.append(
                f"| {what} | {script} | {ours:.2f} | {baseline:.2f} | {ours / baseline:.0%} |"
            )
    print("| what | script | ours, processor s | baseline | ours / baseline |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
