"""How a script starts and ends: importing libraries, loading the model, error messages."""

from __future__ import annotations

import argparse
import gc
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from grains.errors import UserError

if TYPE_CHECKING:
    from grains.lm import LanguageModel
    from grains.settings import PromptSettings

INTERRUPTED = "interrupted: finished units are kept; run the same command again to go on"


def run(main: Callable[[], None]) -> None:
    """Run a script's main function.

    A UserError is printed as one line, with exit status 1, and so is what the system says about a
    path; Ctrl-C ends with status 130. With --debug, errors keep their traceback.
    """
    # An exception in the middle of an import prints a long traceback. Until the libraries are
    # imported, Ctrl-C therefore ends the process at once.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    for stream in (sys.stdout, sys.stderr):  # texts and names that a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv[1:]
    try:
        main()
    except UserError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\n{INTERRUPTED}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if debug or not error.filename:
            raise
        reason = UserError(f"'{error.filename}': {error.strerror}; check this path")
        sys.exit(f"error: {reason}")
    except Exception as error:
        if debug or not _is_out_of_memory(error):
            raise
        sys.exit(
            f"error: out of memory ({str(error).splitlines()[0]}); use a smaller "
            "--batch_tokens, --dtype bfloat16 or --device_map auto, and run the same "
            "command again: finished units are kept"
        )


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"\n{INTERRUPTED}\n".encode())
    os._exit(130)


def import_libraries() -> None:
    """Import the libraries that take seconds, and let them log only errors.

    Scripts call it after they have checked their flags.
    """
    import warnings

    with _without_collections():
        import huggingface_hub
        import torch  # noqa: F401

        from grains.cli import libraries

        libraries.import_models()
        import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    # `datasets` logs an error and then raises it. It is imported later, when data is read.
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # it is shrunk
    if signal.getsignal(signal.SIGINT) is _end:  # Ctrl-C is a KeyboardInterrupt again
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection in the block, which makes a great many objects that all stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # nor later of these


def say(text: str) -> None:
    """Print on the main process of a run."""
    from grains import runs

    runs.processes().print(text)


def say_prompt(lm: LanguageModel, prompt: PromptSettings) -> None:
    """Print what the prompts hold that no flag gave: the chat template's own system prompt."""
    from grains import rendering

    if prompt.style != "chat" or prompt.system is not None:
        return
    if written := rendering.default_system(lm, prompt):
        say(
            f"note: the chat template of {lm.name} writes a system prompt by itself: {written!r} "
            "(--system none turns it off)"
        )


def load_model(args: argparse.Namespace) -> LanguageModel:
    """Load the model that the flags of `flags.add_model` name."""
    from grains import runs

    runs.processes()  # gives each of several processes a device of its own
    return load_named(
        args, args.model_name, trust_remote_code=args.trust_remote_code, max_memory=args.max_memory
    )


def load_named(args: argparse.Namespace, name: str, **options: Any) -> LanguageModel:
    """Load a model where and in the precision that the flags of `flags.add_device` say.

    options: further ones of `models.load`.
    """
    from grains import cpu, models
    from grains.cli import libraries

    with _without_collections(), libraries.without_compiler():
        lm = models.load(
            name, args.dtype, args.device, args.device_map, quantize=args.quantize, **options
        )
    if lm.device.type == "cpu":
        cpu.keep_freed_memory()
    if not lm.packs:
        say(
            f"note: answers to a prompt cannot share a row in {name}: each is computed with the "
            "prompt again, which is slower"
        )
    return lm
