"""A script says what its flags are, and that one is wrong, without loading what takes seconds."""

import subprocess
import sys

import pytest
from helpers import tiny
from helpers.command_line import SRC, child_environment
from transformers import models

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


def test_stages_do_without_what_transformers_imports_in_vain(tmp_path):
    """SciPy, scikit-learn and torch's compiler are not imported with it, nor to load a model, and
    are as installed as before; transformers exports what it always does."""
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "import gc, sys\n"
            "from grains.cli import entry\n"
            "entry.import_libraries()\n"
            "import grains.generation, grains.stage1, grains.cli.stages, grains.tables\n"
            "from transformers import AutoModelForCausalLM, models\n"
            "from grains.cli import libraries\n"
            "with libraries.without_compiler():\n"
            f"    AutoModelForCausalLM.from_pretrained({str(tiny.save_model(tmp_path))!r})\n"
            "print(*{name.partition('.')[0] for name in sys.modules}, gc.isenabled())\n"
            "print(*sys.modules)\n"
            "print(len(models.__all__), models.LlamaForCausalLM.__name__)\n"
            "import torch\n"
            "from transformers.masking_utils import TransformGetItemToIndex\n"
            "with TransformGetItemToIndex():\n"
            "    pick = torch.vmap(lambda i: torch.arange(3, 5)[i])\n"
            "    print(pick(torch.tensor([1, 0])).tolist())\n"
            "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())\n"
            "import scipy.optimize, sklearn.metrics\n"
            "from transformers.utils import is_scipy_available, is_sklearn_available\n"
            "print(is_scipy_available(), is_sklearn_available(), scipy.optimize.milp.__name__)\n",
        ],
        cwd=SRC,
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    loaded, modules, exports, picked, compiled, found = ended.stdout.splitlines()
    assert {"torch", "transformers", "True"} <= {*loaded.split()}, ended.stderr
    assert not {"sklearn", "pandas", "datasets", "pyarrow", "matplotlib"} & {*loaded.split()}
    assert not {"torch._dynamo", "torch.distributed.tensor"} & {*modules.split()}
    assert exports == f"{len(models.__all__)} LlamaForCausalLM"
    assert (picked, compiled) == ("[4, 3]", "2.0")
    assert found == "True True milp"
