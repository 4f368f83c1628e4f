"""The script for accelerators runs whole on a CPU, with tiny models of both kinds."""

import sys
from dataclasses import replace

import gpu
import pytest

pytestmark = pytest.mark.slow


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, words)])
    gpu.main()


def test_every_stage_of_both_models_is_measured(monkeypatch, tmp_path):
    """Of plain code one unit, and few tokens: how long it all takes is not what is looked at."""
    monkeypatch.setattr(gpu, "SMALL", replace(gpu.SMALL, seconds=0.0))
    monkeypatch.setattr(gpu, "NEW_TOKENS", 3)
    page = tmp_path / "page.md"
    run(monkeypatch, "--size", "tiny", "--device", "cpu", "--output", page)
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


def test_the_full_size_asks_for_a_device(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="no CUDA device"):
        run(monkeypatch, "--device", "cpu", "--output", tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()
