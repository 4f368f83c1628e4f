"""The benchmark of growth runs whole at tiny size: every stage and size, figures and table."""

import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "growth.py"
sys.path.insert(0, str(SCRIPT.parent))

pytest_plugins = ("helpers.command_line",)


def test_the_exponent_of_a_power():
    import growth

    sizes = [10.0, 100.0, 1000.0]
    assert growth.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [2.0, 2.0, 2.0]) == pytest.approx(0, abs=1e-9)


def test_every_stage_is_measured(commands, tmp_path):
    commands.run(SCRIPT, "--size", "tiny", "--folder", tmp_path).ok()
    text = (tmp_path / "tables" / "growth.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[:3] for row in rows[1:]] == [
        ["attribution", "examples", "4 / 8"],
        ["attribution", "prompt tokens", "32 / 64"],
        *(
            [stage, axis, sizes]
            for stage in ("scoring", "decoding")
            for axis, sizes in (
                ("examples", "4 / 8"),
                ("prompt tokens", "32 / 64"),
                ("configurations", "1 / 2"),
            )
        ),
    ]
    for stage in ("attribution", "scoring", "decoding"):
        assert (tmp_path / "img" / f"growth_{stage}.png").stat().st_size > 5000
    assert "Of 200 rows with pictures" in text
