"""The wheel, built and used: from any folder, with its texts, and nothing written beside it."""

from __future__ import annotations

import json
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers import tiny
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

USE = """
import json, sys
import grains
from grains import data
from grains.study import costs

lm = grains.load(sys.argv[1])
rows, source = data.load("misconceptions", "test")
pairs = [("Are bats blind?", "No, they see", "Yes, all of them"),
         ("Is a peanut a nut?", "No, a legume", "Yes, a nut")]
vectors = grains.fit(lm, pairs, method="mean")
vectors.save("mean.safetensors")
with grains.SteeringVectors.load("mean.safetensors").apply(lm, 0.05):
    steered = grains.score(lm, *pairs[0][:1], pairs[0][1:])
print(json.dumps({"file": grains.__file__, "version": grains.__version__, "rows": len(rows),
                  "texts": len(costs.neutral_texts()), "steered": steered.tolist()}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment with the wheel in it; its dependencies are this one's."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"  # a build leaves files beside what it builds
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("results", "vlm"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, source)
    venv.create(folder / "env", with_pip=False)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    # It builds the wheel, and installs what is in it.
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--no-compile", "--target", str(packages), str(source)]
    subprocess.run(install, cwd=folder, check=True)
    return folder / "env" / "bin" / "python"


@pytest.fixture(scope="module")
def used(python, tmp_path_factory):
    """What USE prints in a folder of its own, and that folder."""
    folder = tmp_path_factory.mktemp("anywhere")
    model = tiny.save_model(tmp_path_factory.mktemp("models") / "tiny")
    done = subprocess.run(
        [python, "-c", USE, str(model)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_it_is_the_wheel_that_is_used(python, used):
    assert Path(used[0]["file"]).is_relative_to(python.parents[1])
    assert used[0]["version"] == "0.3.0"


def test_the_packaged_data_are_all_there(used):
    lines = [
        len((ROOT / "src/data" / name).read_text().splitlines())
        for name in ("misconceptions.jsonl", "neutral_text.jsonl")
    ]
    assert used[0]["rows"] == 133 < lines[0] == 333 and used[0]["texts"] == lines[1]
    assert all(value < 0 for value in used[0]["steered"])


def test_files_go_to_the_working_folder_alone(python, used):
    assert [path.name for path in used[1].iterdir()] == ["mean.safetensors"]
    (package,) = python.parents[1].glob("lib/python*/site-packages/grains")
    assert not list(package.rglob("*.safetensors"))


def test_every_requirement_is_declared_with_its_version(python):
    ask = (
        "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('grains')))"
    )
    asked = subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True, cwd=python.parent
    )
    declared = {
        str(Requirement(line)) for line in json.loads(asked.stdout) if "extra ==" not in line
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    listed = {str(Requirement(line)) for line in lines if line and not line.startswith("#")}
    assert declared == listed
    assert any(line.startswith("torch==") for line in declared)
