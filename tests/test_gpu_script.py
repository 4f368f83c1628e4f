"""The script for accelerators runs whole on a CPU, with tiny models of both kinds."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def test_every_stage_of_both_models_is_measured(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, SCRIPT, "--size", "tiny", "--device", "cpu", "--output", page]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = [line.split(" | ") for line in page.read_text().splitlines() if "| random" in line]
    assert [row[0].removeprefix("| ") for row in rows] == (
        ["random Llama"] * 3 + ["random LLaVA-NeXT"] * 3
    )
    assert [row[1].split(",")[0] for row in rows] == (
        ["token_ablation", "steering_mc", "steering_generation"] * 2
    )
    for row in rows:
        assert float(row[4]) > 0 and float(row[5]) > 0
    # In fp32 the choices do not depend on how many questions share a batch.
    assert "9 of 9 choices the same" in page.read_text()
    assert "6 of 6 choices the same" in page.read_text()


def test_the_full_size_asks_for_a_device(tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "--output", tmp_path / "page.md"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "no CUDA device" in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "page.md").exists()
