"""Files of a run: names, manifests, whole writes, finished units that a later run takes up.

A run is a list of units (an example, a batch of questions). Each finished unit is a small file in
a folder `<output>.parts`; when all are there they are merged into the outputs, the manifest is
written last and the folder removed. So a run that is killed at any moment goes on where it was,
and several processes share the units by doing every n-th.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grains import __version__
from grains.errors import UserError

HEADER = "grains"


def slug(name: str) -> str:
    """A model or data set name as part of a file name: the last part of a path or hub id."""
    return Path(name.rstrip("/")).name.replace(" ", "-")


def versions() -> dict:
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {"grains": __version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages}}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"'{path}' could not be written: {error.strerror or error}; free some "
                        "space or choose another place, and run the same command again"
                        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A safetensors file with `info` as JSON in its header."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {HEADER: json.dumps(info, sort_keys=True)}
    try:
        write_whole(path, lambda temporary: save_file(whole, temporary, header))
    except SafetensorError as error:  # a full disk comes as this
        raise UserError(f"'{path}' could not be written: {error}; free some space or choose "
                        "another place, and run the same command again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and header of a file that `write_tensors` wrote."""
    info = read_header(path)
    return load_file(str(path)), info


def read_header(path: Path) -> dict:
    """The `info` of a safetensors file. Raises UserError if there is none or it is cut short."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a whole safetensors file ({error}): was it cut short? "
                        "make it again") from error
    if header is None:
        raise UserError(f"'{path}' has no '{HEADER}' header: it was not written by these scripts")
    return json.loads(header)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False))


def differences(expected: dict, found: dict, prefix: str = "") -> list[str]:
    """What differs between two manifests, as 'flag: expected, found'."""
    lines = []
    for key in sorted({*expected, *found}):
        here, there = expected.get(key), found.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            lines += differences(here, there, f"{prefix}{key}.")
        elif here != there:
            lines.append(f"{prefix}{key} {there} there, {here} now")
    return lines


class Run:
    """The units of one run, kept and resumed.

    outputs: the files the run will write; manifest: all that they depend on. `finished` is true
    when they are already there for exactly this manifest.
    Raises UserError when the outputs belong to another manifest (unless `overwrite`), when another
    run is writing them, or when there is no space or no permission for them.
    """

    def __init__(self, outputs: Sequence[Path], manifest: dict, overwrite: bool = False,
                 expected_bytes: int = 0):
        self.outputs = [Path(path) for path in outputs]
        self.manifest = json.loads(json.dumps(manifest))
        self.state = PartialState()
        first = self.outputs[0]
        self.manifest_path = first.with_suffix(".manifest.json")
        self.parts = first.with_suffix(".parts")
        if self.state.is_main_process:
            self._open(overwrite, expected_bytes)
        self.state.wait_for_everyone()
        self.finished = self.manifest_path.is_file()

    def _open(self, overwrite: bool, expected_bytes: int) -> None:
        try:
            for path in self.outputs:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.parts.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.parts.with_suffix(".lock"))
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another run is writing '{self.outputs[0]}': wait for it, or give "
                            "other output paths") from None
        except OSError as error:
            raise UserError(f"'{self.outputs[0].parent}' cannot be written: {error.strerror}; "
                            "give other output paths") from error
        if overwrite:
            self.manifest_path.unlink(missing_ok=True)
            shutil.rmtree(self.parts, ignore_errors=True)
        if self.manifest_path.is_file():
            self._same(json.loads(self.manifest_path.read_text()), self.outputs[0])
            if all(path.is_file() for path in self.outputs):
                return
            self.manifest_path.unlink()
        self.parts.mkdir(exist_ok=True)
        marker = self.parts / "manifest.json"
        if marker.is_file():
            self._same(json.loads(marker.read_text()), self.parts)
        write_json(marker, self.manifest)
        free = shutil.disk_usage(self.parts).free
        if free < expected_bytes:
            raise UserError(f"'{self.parts.parent}' has {free / 2**20:.0f} MiB free, the run needs "
                            f"about {expected_bytes / 2**20:.0f} MiB: free some, or give other "
                            "output paths")

    def _same(self, found: dict, where: Path) -> None:
        different = differences(self.manifest, found)
        if different:
            raise UserError(f"'{where}' is from other settings ({'; '.join(different[:4])}): give "
                            "other output paths, or --overwrite to do it anew")

    def _part(self, unit: int) -> Path:
        return self.parts / f"{unit:07d}.safetensors"

    def todo(self, count: int, description: str) -> Iterator[int]:
        """The units this process still has to do, under a progress bar."""
        mine = range(self.state.process_index, count, self.state.num_processes)
        missing = [unit for unit in mine if not self._part(unit).is_file()]
        with tqdm(total=len(mine), initial=len(mine) - len(missing), desc=description,
                  disable=not self.state.is_main_process, unit="unit") as bar:
            for unit in missing:
                yield unit
                bar.update()

    def save(self, unit: int, tensors: dict[str, Tensor], rows: list[dict]) -> None:
        """Keep one finished unit: tensors, and rows for the tables."""
        write_tensors(self._part(unit), tensors, {"rows": rows})

    def merge(self, count: int) -> Iterator[tuple[dict[str, Tensor], list[dict]]] | None:
        """All units in order, once every process is done; None but on the main process."""
        self.state.wait_for_everyone()
        if not self.state.is_main_process:
            return None
        return ((tensors, info["rows"]) for tensors, info in
                (read_tensors(self._part(unit)) for unit in range(count)))

    def finish(self) -> None:
        """The outputs are written: write the manifest, drop the parts, let others in."""
        if self.state.is_main_process:
            write_json(self.manifest_path, self.manifest)
            shutil.rmtree(self.parts, ignore_errors=True)
        self.close()

    def close(self) -> None:
        self.state.wait_for_everyone()
        if self.state.is_main_process:
            self.lock.release()
            Path(self.lock.lock_file).unlink(missing_ok=True)
