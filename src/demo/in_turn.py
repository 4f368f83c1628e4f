"""Runs scripts one after another in one process, which imports their libraries once.

    python demo/in_turn.py token_ablation.py --top pos -- token_ablation.py --num_samples 2

Each is run as on a command line of its own; the first that fails ends them all.
"""

from __future__ import annotations

import runpy
import sys
from itertools import groupby


def main(words: list[str]) -> None:
    for is_end, command in groupby(words, lambda word: word == "--"):
        if not is_end:
            sys.argv = [*command]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                if end.code:
                    raise


if __name__ == "__main__":
    main(sys.argv[1:])
