"""A steered model's folder loaded without a process that imports the libraries once more."""

from __future__ import annotations

import sys
from types import SimpleNamespace

from transformers import dynamic_module_utils

from grains.export import folders


def load_in_this_process(monkeypatch) -> None:
    """Run the program that loads a folder here, with its arguments and its cache of code."""

    def run(command, *, env, **options):
        _, flag, program, *arguments = command
        assert flag == "-c" and program == folders.LOAD
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [flag, *map(str, arguments)])
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", env["HF_MODULES_CACHE"])
            exec(program, {})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(folders, "subprocess", SimpleNamespace(run=run))
