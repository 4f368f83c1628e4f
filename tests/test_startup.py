"""A script says what its flags are, and that one is wrong, without loading what takes seconds."""

import subprocess
import sys

import pytest
from helpers.command_line import SRC

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
