"""`where` names the files that the stages write with the same flags, and loads nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import steering_generation
import steering_mc
import token_ablation
from demo import registered  # noqa: F401  the data set shapes, by its short name
from grains import data
from grains.cli import flags, where
from grains.errors import UserError

SRC = Path(__file__).parents[1] / "src"
STAGE_1 = ["--model_name", "org/m", "--dataset_name", "truthfulqa", "--top_k", "7", "--seed", "3"]
GRID = ["--methods", "mean", "--alphas", "0.1", "--layer_mode", "each", "--num_test", "9"]


def printed(capsys, monkeypatch, *words) -> str:
    monkeypatch.setattr(sys, "argv", ["where", *words])
    where.main()
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", [flags.LLM, flags.VLM], ids=lambda kind: kind.name)
def test_the_files_of_the_stages(capsys, monkeypatch, kind):
    args = token_ablation.parser(kind).parse_args([*STAGE_1, "--top", "pos", "rand"])
    expected = str(flags.names_of(args).attributions())
    assert printed(capsys, monkeypatch, kind.name, "attributions", *STAGE_1) == expected

    words = [*STAGE_1, *GRID, "--score", "sum", "--output_dir", "out"]
    args = steering_mc.parser(kind).parse_args(words)
    files = flags.names_of(args).multiple_choice(
        flags.grid_settings(args), flags.GRID, args.score, args.output_dir
    )
    assert set(files) == {"grid", "questions", "chosen"}
    for file, path in files.items():
        assert printed(capsys, monkeypatch, kind.name, *words, file) == str(path)


def test_a_data_set_that_is_not_known(capsys, monkeypatch):
    with pytest.raises(UserError, match="unknown data set 'nothing'"):
        printed(capsys, monkeypatch, "llm", "grid", "--dataset_name", "nothing")
    words = ("llm", "grid", "--dataset_name", "own", "--dataset_path", "own.jsonl")
    assert "own_" in printed(capsys, monkeypatch, *words)


def test_the_text_demo_takes_the_files_of_its_own_stages(tmp_path):
    """A stand-in for Python writes down what it is called with, and runs `where` alone."""
    calls, python = tmp_path / "calls", tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$1" != -m ] || exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "TOP_K": "7", "SEED": "3"}
    subprocess.run(
        ["bash", "scripts/llm/demo.sh"], cwd=SRC, env=environment, check=True, capture_output=True
    )
    called = {}
    for line in calls.read_text().splitlines():
        for command in line.removeprefix("demo/in_turn.py ").split(" -- "):
            script, *words = command.removeprefix("-- ").split()
            called.setdefault(script, []).append(words)
    first, shown = map(token_ablation.parser(flags.LLM).parse_args, called["token_ablation.py"])
    chosen, *beside = map(steering_mc.parser(flags.LLM).parse_args, called["steering_mc.py"])
    grids = [
        flags.names_of(args).multiple_choice(
            flags.grid_settings(args),
            flags.GRID,
            args.score,
            args.output_dir,
            args.max_ppl_increase,
        )
        for args in (chosen, *beside)
    ]
    figure = called["demo/text_figure.py"][0]
    attributions = str(flags.names_of(shown).attributions())
    assert figure[:3] == [attributions, str(grids[0]["grid"]), str(grids[0]["chosen"])]
    names = ("faithfulness-agreeing", "faithfulness-bare", "unrelated")
    assert figure[-3:] == [f"{n}={g['grid']}" for n, g in zip(names, grids[1:], strict=True)]
    (generation,) = called["steering_generation.py"]
    stage_3 = steering_generation.parser(flags.LLM).parse_args(generation)
    assert stage_3.chosen_path == str(grids[0]["chosen"])
    states = flags.names_of(first).states(first.top)
    for args in beside:  # the vectors of the first, on other questions
        assert args.hidden_states_path == str(states["pos"])
        assert args.alphas == chosen.alphas and args.layer_idxs == chosen.layer_idxs
        assert args.gate and chosen.gate  # one gate, in the file of the first one's vectors
    for args in (first, shown, chosen, *beside):
        assert args.top_k == 7 and args.seed == 3 and args.prompt_style == "chat"


def test_the_states_of_each_selection(capsys, monkeypatch):
    args = token_ablation.parser(flags.LLM).parse_args(STAGE_1)
    every = flags.names_of(args).states(("pos", "neg", "rand"))
    words = ("llm", "states", *STAGE_1)
    assert printed(capsys, monkeypatch, *words).splitlines() == [
        str(every["pos"]),
        str(every["neg"]),
    ]
    assert printed(capsys, monkeypatch, *words, "--top", "rand") == str(every["rand"])


@pytest.mark.parametrize("folder", [None, "out"])
def test_all_generations_of_these_settings(capsys, monkeypatch, tmp_path, folder):
    monkeypatch.chdir(tmp_path)
    written = []
    for seed, alpha in (("3", 0.1), ("3", 0.2), ("4", 0.1)):
        args = steering_generation.parser(flags.LLM).parse_args([*STAGE_1, "--seed", seed])
        grid = replace(flags.GRID, alphas=(alpha,))
        path = flags.names_of(args).generations(grid, flags.GRID, (), folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written.append(str(path))
    words = ["llm", "generations", *STAGE_1, *(["--output_dir", folder] if folder else [])]
    assert printed(capsys, monkeypatch, *words).splitlines() == written[:2]
    assert printed(capsys, monkeypatch, *words, "--top_k", "8") == ""


def test_a_data_set_that_the_demo_registers(capsys, monkeypatch):
    """It is known to the demo's scripts alone; stage 1's names hold its split."""
    shapes = data.DATASETS["shapes"]
    words = ("--model_name", "shapes-vlm", "--dataset_name", "shapes")
    args = token_ablation.parser(flags.VLM).parse_args(words)
    expected = str(flags.names_of(args).attributions())
    assert "_steering_" in expected
    assert printed(capsys, monkeypatch, "vlm", "attributions", *words) == expected
    args = steering_mc.parser(flags.VLM).parse_args(words)
    grid = flags.names_of(args).multiple_choice(flags.GRID, flags.GRID, "token")["grid"]

    monkeypatch.delitem(data.DATASETS, "shapes")
    assert printed(capsys, monkeypatch, "vlm", "grid", *words) == str(grid)
    with pytest.raises(UserError, match="unknown data set 'shapes': give --split"):
        printed(capsys, monkeypatch, "vlm", "attributions", *words)
    words = (*words, "--split", shapes.splits[0])
    assert printed(capsys, monkeypatch, "vlm", "attributions", *words) == expected


@pytest.mark.slow
def test_it_is_light():
    code = (
        "import sys; sys.argv = ['where', 'llm', 'grid']; from grains.cli import where; "
        "where.main(); assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SRC, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("_grid.csv\n"), done.stderr
