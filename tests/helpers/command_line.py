"""Run the scripts as processes of their own, without paying for their imports every time.

A server process imports the libraries once; every command is a fork of it that runs one script as
`python script.py ...` would, with its own arguments, environment, output files and signals. This
file is the server (when run), its client, and a pytest plugin with both.
"""

from __future__ import annotations

import copy
import gc
import importlib
import itertools
import json
import os
import random
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2].absolute() / "src"
# What some scripts import late: once for all, when the first of them is run.
LATE = {
    ("experiment", "ablations"): ("peft", "sklearn.linear_model", "grains.study.protocol"),
    ("score_generations",): (
        *("openai.resources.chat", "grains.judge.generations"),
        *("grains.judge.judges", "grains.judge.scores"),
    ),
    ("report",): ("grains.report.page",),
}
FEW_COPIES = 5


@dataclass(frozen=True)
class Result:
    """code: exit status, or minus the signal that killed the process."""

    code: int
    out: str
    err: str

    def ok(self) -> Result:
        assert self.code == 0, self.err + self.out
        return self

    def error(self) -> str:
        """The one line of a user's mistake."""
        lines = [
            line
            for line in self.err.splitlines()
            if line.strip() and not re.search(r"it/s|unit/s|s/unit|\?unit", line)
        ]
        assert self.code not in (0, None) and self.code > 0, (self.code, self.out, self.err)
        assert "Traceback" not in self.err, self.err
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


class Process:
    def __init__(self, commands: Commands, pid: int, folder: Path):
        self.commands, self.pid, self.folder = commands, pid, folder
        self.result: Result | None = None

    def running(self) -> bool:
        if self.result is None:
            self._ask(block=False)
        return self.result is None

    def kill(self, with_signal: int = signal.SIGKILL) -> None:
        os.kill(self.pid, with_signal)

    def wait(self) -> Result:
        if self.result is None:
            self._ask(block=True)
        return self.result

    def _ask(self, block: bool) -> None:
        status = self.commands.ask({"wait": self.pid, "block": block})["status"]
        if status is not None:
            self.result = Result(
                os.waitstatus_to_exitcode(status),
                *((self.folder / name).read_text() for name in ("out", "err")),
            )


class Commands:
    """The client of a server with the given environment variables.

    library: what the server imports: stages, or runs alone, whose processes start faster.
    """

    def __init__(self, library: str = "stages", **environment: str):
        self.environment = child_environment(**environment)
        self.folder = tempfile.TemporaryDirectory(prefix="commands-")
        self.count = itertools.count()
        self.given: dict[str, str] = {}
        self.server = subprocess.Popen(
            [sys.executable, __file__, library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
            start_new_session=True,
            cwd=SRC,
        )

    def ask(self, request: dict) -> dict:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(
        self,
        script: str,
        *arguments,
        env: dict | None = None,
        die_after: int | None = None,
        largest_file: int | None = None,
        seconds: int = 120,
        short_texts: bool = False,
        few_copies: bool = False,
    ) -> Process:
        """Start src/`script`.

        die_after: kill the process when it has put that many files in place (renamed them).
        largest_file: bytes a file may have at most (the write after that fails).
        seconds: of CPU time, after which it is killed.
        short_texts: the experiment measures costs on less text (see `helpers.short_texts`).
        few_copies: the method vti compares a picture with FEW_COPIES of it, instead of 50.
        """
        folder = Path(self.folder.name) / str(next(self.count))
        folder.mkdir()
        pid = self.ask(
            {
                "run": [str(SRC / script), *map(str, arguments)],
                "env": self.given | (env or {}),
                "out": str(folder / "out"),
                "err": str(folder / "err"),
                "die_after": die_after,
                "largest_file": largest_file,
                "seconds": seconds,
                "short_texts": short_texts,
                "few_copies": few_copies,
            }
        )["pid"]
        return Process(self, pid, folder)

    def run(self, script: str, *arguments, **options) -> Result:
        return self.start(script, *arguments, **options).wait()

    @staticmethod
    def free_port() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def shell(
        self, script: str, *arguments, few_copies: bool = False, **environment: str
    ) -> Result:
        """Run src/scripts/`script`, and the script that it starts as a process of the server.

        What the shell script calls `$PYTHON` with is written down, and then run.
        """
        recorder, called = (Path(self.folder.name) / name for name in ("recorder", "called"))
        recorder.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {called}\n')
        recorder.chmod(0o755)
        subprocess.run(
            ["bash", f"scripts/{script}", *map(str, arguments)],
            cwd=SRC,
            env=self.environment | {"PYTHON": str(recorder)} | environment,
            check=True,
        )
        name, *words = called.read_text().split("\0")[:-1]
        return self.run(name, *words, few_copies=few_copies)

    def together(self, script: str, *arguments, **options) -> list[Process]:
        """Start a command as two processes that know of each other, as a launcher does."""
        port = self.free_port()
        return [
            self.start(
                script,
                *arguments,
                env={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
                **options,
            )
            for rank in range(2)
        ]

    @contextmanager
    def at_home(self, folder: Path, **environment: str) -> Iterator[Commands]:
        """This server with another home folder, its cache of the hub in it, and variables.

        A started server keeps the path of the cache: it is a link, which leads to the folder.
        """
        given = {"HOME": str(folder), **environment}
        moved = copy.copy(self)
        moved.given, moved.environment = given, self.environment | given
        before = Path(self.environment["HF_HOME"]).readlink()
        self._link(folder)
        try:
            yield moved
        finally:
            self._link(before)

    def _link(self, folder: Path) -> None:
        link = Path(self.environment["HF_HOME"])
        link.unlink(missing_ok=True)
        link.symlink_to(folder)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.folder.cleanup()

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def interruptible() -> None:
    """Ctrl-C reaches a child, also where this process was started in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def child_environment(**changes: str) -> dict[str, str]:
    """The environment of a child: one thread, no token, nothing of the hub but `changes`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "HUGGING_FACE", "ACCELERATE"))
        and "proxy" not in key.lower()
        and key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return (
        kept
        | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONDONTWRITEBYTECODE": "1",
            "DATASETS_VERBOSITY": "critical",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        | changes
    )


def arguments_of(flags: dict) -> list[str]:
    """{'top_k': 5, 'top': ['pos', 'neg'], 'overwrite': True} -> command-line arguments."""
    words = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def stage1_flags(model: Path, questions: Path, folder: Path, **changes) -> dict:
    """Flags of stage 1 on a few questions, its outputs in a folder; `changes` to them."""
    return {
        "model_name": model,
        "dataset_name": "questions",
        "dataset_path": questions,
        "num_samples": 4,
        "top_k": 3,
        "ig_steps": 4,
        "output_path_meta": folder / "tokens.csv",
        "output_path_hidden": folder / "states.safetensors",
        **changes,
    }


@pytest.fixture(scope="session")
def server_with():
    """Makes a server with the given environment variables."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(Commands(**options))


@pytest.fixture(scope="session")
def hub_port():
    """Where the hub is for the server: nobody listens unless a test's stand-in does.

    Below those that systems give to whoever asks for any.
    """
    for port in random.Random().sample(range(20_000, 32_000), 100):
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


@pytest.fixture(scope="session")
def commands(server_with, hub_port, tmp_path_factory):
    """A server that has no network, for all tests: those of the hub give it a home of their own."""
    home = tmp_path_factory.mktemp("home")
    (home / "link").symlink_to(home)
    (home / "certificates").mkdir()  # none: a process that asks the hub would read all of a system
    return server_with(
        HF_HOME=str(home / "link"),
        HF_ENDPOINT=f"http://127.0.0.1:{hub_port}",
        SSL_CERT_DIR=str(home / "certificates"),
    )


def _serve(library: str = "stages") -> None:
    sys.path.insert(0, str(SRC))
    gc.disable()  # while the libraries are imported, which make nothing that could be freed
    # Imported late by the scripts: here once for all.
    import multiprocessing.synchronize  # noqa: F401

    import numpy.ctypeslib
    import numpy.rec  # noqa: F401
    import pandas  # noqa: F401

    import grains.cli.entry
    import grains.runs  # noqa: F401

    if library == "stages":
        _import_stages()
    gc.enable()
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            for scripts, modules in LATE.items():
                if Path(request["run"][0]).stem.startswith(scripts):
                    for module in modules:
                        importlib.import_module(module)
            if Path(request["run"][0]).stem.endswith("_vlm"):
                _import_pictures()
            gc.freeze()  # no child searches for garbage in it, which would copy its pages
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        else:
            done, status = os.waitpid(request["wait"], 0 if request["block"] else os.WNOHANG)
            answer = {"status": status if done else None}
        print(json.dumps(answer), flush=True)


def _import_stages() -> None:
    import datasets.packaged_modules.json.json  # noqa: F401
    import pandas.io.formats.csvs  # noqa: F401
    import scipy.io  # what datasets imports for a parquet file
    import scipy.linalg
    import scipy.stats  # noqa: F401
    import sklearn.decomposition  # noqa: F401
    import transformers.generation.utils
    import transformers.models.encoder_decoder
    import transformers.models.llama.modeling_llama
    import transformers.tokenization_utils_sentencepiece  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import grains.cli.libraries
    import grains.cli.stages
    import grains.generation
    import grains.models
    import grains.stage1
    import grains.study.costs
    import grains.tables

    # Names of weights in older files: 880 patterns, which the first model that is loaded compiles.
    get_checkpoint_conversion_mapping("llama")
    grains.runs.versions()  # reads the libraries' long descriptions


def _import_pictures() -> None:
    import PIL.Image
    import transformers.models.llava_next.image_processing_pil_llava_next
    import transformers.models.llava_next.modeling_llava_next
    import transformers.models.llava_next.processing_llava_next  # noqa: F401

    import grains.vti  # noqa: F401

    PIL.Image.init()


def _child(request: dict) -> None:
    code = 1
    try:
        os.setsid()
        interruptible()
        for number, path in ((0, "/dev/null"), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.environ.update(request["env"])
        resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"],) * 2)
        if request["largest_file"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
        if request["die_after"]:
            _die_after(request["die_after"])
        if request["short_texts"]:
            import short_texts  # beside this file, which is run as a script

            short_texts.install()
        if request["few_copies"]:
            import grains.vti

            grains.vti.COPIES = FEW_COPIES
        sys.argv = request["run"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _die_after(count: int) -> None:
    replace = os.replace

    def replace_and_die(*args, **kwargs):
        nonlocal count
        replace(*args, **kwargs)
        count -= 1
        if not count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


if __name__ == "__main__":
    _serve(*sys.argv[1:])
