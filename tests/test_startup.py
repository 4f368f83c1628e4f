"""A script says what its flags are, and that one is wrong, without loading what takes seconds."""

import subprocess
import sys

import pytest
from helpers.command_line import SRC, child_environment

pytestmark = pytest.mark.slow

SCRIPTS = sorted(path.name for path in SRC.glob("*.py"))
HEAVY = ("numpy", "torch", "transformers", "datasets", "pandas", "sklearn", "scipy", "matplotlib")


@pytest.mark.parametrize("flag, code", [("--help", 0), ("--no_such_flag", 2)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_checked_without_the_libraries(script, flag, code):
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", SRC / script, flag], capture_output=True, text=True
    )
    assert ended.returncode == code
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in ended.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in imported and not imported.intersection(HEAVY)
    said = ended.stdout if flag == "--help" else ended.stderr
    assert "usage: " in said


def test_stages_do_without_what_transformers_imports_in_vain():
    """SciPy and scikit-learn are not imported with it, and are as installed as before."""
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import gc, sys\n"
            "from grains.cli import entry\n"
            "entry.import_libraries()\n"
            "import grains.generation, grains.stage1, grains.cli.stages, grains.tables\n"
            "print(*{name.partition('.')[0] for name in sys.modules}, gc.isenabled())\n"
            "import scipy.optimize, sklearn.metrics\n"
            "from transformers.utils import is_scipy_available, is_sklearn_available\n"
            "print(is_scipy_available(), is_sklearn_available(), scipy.optimize.milp.__name__)\n",
        ],
        cwd=SRC,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    loaded, found = ended.stdout.splitlines()
    assert {"torch", "transformers", "True"} <= {*loaded.split()}, ended.stderr
    assert not {"sklearn", "pandas", "datasets", "pyarrow", "matplotlib"} & {*loaded.split()}
    assert found == "True True milp"
