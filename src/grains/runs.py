"""Files of a run: names, manifests, whole writes, finished units that a later run takes up.

A run is a list of units (an example, a batch of questions). Each finished unit is a small file in
a folder `<output>.parts`; when all are there they are merged into the outputs, the manifest is
written last and the folder removed. So a run that is killed at any moment goes on where it was,
and several processes share the units by doing every n-th.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grains.errors import UserError
from grains.version import __version__

HEADER = "grains"


def versions() -> dict:
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "grains": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"'{path}' could not be written: {error.strerror or error}; free some "
            "space or choose another place, and run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """A safetensors file with `info` as JSON in its header."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {HEADER: json.dumps(info, sort_keys=True)}
    try:
        write_whole(path, lambda temporary: save_file(whole, temporary, header))
    except SafetensorError as error:  # a full disk comes as this
        raise UserError(
            f"'{path}' could not be written: {error}; free some space or choose "
            "another place, and run the same command again"
        ) from error


def write_stacked(
    path: Path, names: dict[str, str], parts: Callable[[], Iterator[dict]], count: int, info: dict
) -> None:
    """A safetensors file of arrays that are stacked from `count` parts, one part in memory.

    names: array in the file -> tensor of each part. parts: begins the parts' dicts of tensors.
    The format is a length (8 bytes), a JSON header with every array's place, then the arrays.
    """
    first = next(parts())
    header: dict[str, dict] = {"__metadata__": {HEADER: json.dumps(info, sort_keys=True)}}
    sizes, end = {}, 0
    for name, source in names.items():
        tensor = first[source]
        if tensor.dtype != torch.float32:
            raise ValueError(f"{source}: expected float32, found {tensor.dtype}")
        sizes[name] = tensor.nbytes
        header[name] = {
            "dtype": "F32",
            "shape": [count, *tensor.shape],
            "data_offsets": [end, end + count * tensor.nbytes],
        }
        end += count * tensor.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for index, part in enumerate(parts()):
                for name, source in names.items():
                    place = header[name]["data_offsets"][0] + index * sizes[name]
                    file.seek(8 + len(encoded) + place)
                    file.write(part[source].contiguous().numpy().astype("<f4").tobytes())

    write_whole(path, write)


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
        raise UserError(
            f"'{path}' is not a whole safetensors file ({error}): was it cut short? make it again"
        ) from error
    if header is None:
        raise UserError(f"'{path}' has no '{HEADER}' header: it was not written by these scripts")
    return json.loads(header)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


# All text is quoted: the default leaves a lone carriage return bare, which then ends a row.
CSV = {"index": False, "quoting": csv.QUOTE_NONNUMERIC}


def write_table(path: Path, table: pd.DataFrame) -> None:
    write_whole(path, lambda temporary: table.to_csv(temporary, **CSV))


def write_rows(path: Path, parts: Iterable[list[dict]]) -> None:
    """A table from parts of a few rows with the same columns each, one part in memory."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            for index, rows in enumerate(parts):
                pd.DataFrame(rows).to_csv(file, header=not index, **CSV)

    write_whole(path, write)


def read_json(path: Path) -> dict:
    """Raises UserError if the file is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read ({error}): was it cut short? remove it and run "
            "the command again"
        ) from error


def processes() -> PartialState:
    """The processes of this run: one, or those that `accelerate launch` or `torchrun` started.

    They wait for each other as long as it takes: an unfinished run may leave one more to do.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


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


def digest(content) -> str:
    """Twelve hexadecimal digits that stand for what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


class Run:
    """The units of one run, kept and resumed.

    outputs: the files the run will write; manifest: all that they depend on. `finished` is true
    when they are already there for exactly this manifest.
    Raises UserError when the outputs belong to another manifest (unless `overwrite`), when another
    run is writing them, or when there is no space or no permission for them.
    """

    def __init__(
        self,
        outputs: Sequence[Path],
        manifest: dict,
        overwrite: bool = False,
        expected_bytes: int = 0,
    ):
        self.outputs = [Path(path) for path in outputs]
        self.manifest = json.loads(json.dumps(manifest))
        self.key = digest(manifest)
        self.state = processes()
        first = self.outputs[0]
        self.manifest_path = first.with_suffix(".manifest.json")
        self.parts = first.with_suffix(".parts")
        # The main process opens the run for all; if it cannot, all of them end.
        outcome = [False, None]
        if self.state.is_main_process:
            try:
                outcome[0] = self._open(overwrite, expected_bytes)
            except UserError as error:
                outcome[1] = str(error)
        broadcast_object_list(outcome)
        self.finished, problem = outcome
        if problem is not None:
            raise UserError(problem) if self.state.is_main_process else SystemExit(1)

    def _open(self, overwrite: bool, expected_bytes: int) -> bool:
        """Lock the outputs and make the folder of parts. Returns whether all is done already."""
        try:
            for path in [*self.outputs, self.parts]:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.parts.with_suffix(".lock"))
            self.lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another run is writing '{self.outputs[0]}': wait for it, or give "
                "other output paths"
            ) from None
        except OSError as error:
            raise UserError(
                f"'{self.outputs[0].parent}' cannot be written: {error.strerror}; "
                "give other output paths"
            ) from error
        try:
            finished = self._prepare(overwrite, expected_bytes)
        except BaseException:
            self._unlock()
            raise
        for path in [*self.outputs, self.manifest_path]:  # what a killed run was writing
            for left in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.tmp"):
                left.unlink(missing_ok=True)
        if finished:
            self._unlock()
        return finished

    def _prepare(self, overwrite: bool, expected_bytes: int) -> bool:
        marker = self.parts / "manifest.json"
        if overwrite:
            # Parts of this very run without results are what an earlier overwrite left off at.
            if self.manifest_path.is_file() or not self._is_ours(marker):
                shutil.rmtree(self.parts, ignore_errors=True)
            self.manifest_path.unlink(missing_ok=True)
        elif self.manifest_path.is_file():
            self._same(read_json(self.manifest_path), self.outputs[0])
            if all(path.is_file() for path in self.outputs):
                shutil.rmtree(self.parts, ignore_errors=True)
                return True
        elif marker.is_file():
            self._same(read_json(marker), self.parts)
        else:
            for path in self.outputs:
                if path.exists():
                    raise UserError(
                        f"'{path}' is there already, and no manifest beside it says "
                        "what it is from: give other output paths, or overwrite to "
                        "replace it"
                    )
        try:
            self.parts.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(
                f"'{self.parts}' cannot be written: {error.strerror}; free some space "
                "or give other output paths"
            ) from error
        kept = [*self.parts.iterdir(), *self.outputs] if marker.is_file() else []
        needed = expected_bytes - sum(path.stat().st_size for path in kept if path.is_file())
        free = shutil.disk_usage(self.parts).free
        if free < needed:
            raise UserError(
                f"'{self.parts.parent}' has {free / 2**20:.0f} MiB free, the run needs "
                f"about {needed / 2**20:.0f} MiB: free some, or give other output "
                "paths"
            )
        write_json(marker, self.manifest)
        return False

    def _is_ours(self, marker: Path) -> bool:
        try:
            return read_json(marker) == self.manifest
        except UserError:
            return False

    def _same(self, found: dict, where: Path) -> None:
        different = differences(self.manifest, found)
        if different:
            raise UserError(
                f"'{where}' is from other settings ({'; '.join(different[:4])}): give "
                "other output paths, or overwrite to do it anew"
            )

    def _part(self, unit: int) -> Path:
        # The key keeps other settings' parts out: what an overwrite that was killed has not
        # removed yet, or what a process that outlived its run still writes.
        return self.parts / f"{unit:07d}-{self.key}.safetensors"

    def todo(self, count: int, description: str) -> Iterator[int]:
        """The units this process still has to do, under a progress bar."""
        mine = range(self.state.process_index, count, self.state.num_processes)
        missing = [unit for unit in mine if not self._part(unit).is_file()]
        with tqdm(
            total=len(mine),
            initial=len(mine) - len(missing),
            desc=description,
            disable=not self.state.is_main_process,
            unit="unit",
        ) as bar:
            for unit in missing:
                yield unit
                bar.update()

    def save(self, unit: int, tensors: dict[str, Tensor], rows: list[dict]) -> None:
        """Keep one finished unit: tensors, and rows for the tables."""
        write_tensors(self._part(unit), tensors, {"rows": rows})

    def all_done(self) -> bool:
        """Wait until every process is done. True on the main process, which merges the units."""
        self._wait()
        return self.state.is_main_process

    def units(self, count: int) -> Iterator[tuple[dict[str, Tensor], list[dict]]]:
        """The tensors and rows of all units in order, read one at a time."""
        for unit in range(count):
            tensors, info = read_tensors(self._part(unit))
            yield tensors, info["rows"]

    def finish(self) -> None:
        """The outputs are written: write the manifest, drop the parts, let others in."""
        if self.state.is_main_process:
            write_json(self.manifest_path, self.manifest)
            shutil.rmtree(self.parts, ignore_errors=True)
        self._wait()
        if self.state.is_main_process:
            self._unlock()

    def _wait(self) -> None:
        """Wait for the other processes. Raises UserError if one of them ended before its time."""
        try:
            self.state.wait_for_everyone()
        except RuntimeError as error:
            raise UserError(
                "another process of this run has stopped, its own message says why: "
                "what is finished is kept; run the same command again to go on"
            ) from error

    def _unlock(self) -> None:
        # In this order: the name goes while the lock is held, so that nobody takes what vanishes.
        with suppress(OSError):
            Path(self.lock.lock_file).unlink()
        self.lock.release()


def resume(
    outputs: Sequence[Path],
    manifest: dict,
    count: int,
    make: Callable[[int], tuple[dict[str, Tensor], list[dict]]],
    write: Callable[[Callable[[], Iterator[tuple[dict[str, Tensor], list[dict]]]]], None],
    what: str,
    overwrite: bool = False,
    expected_bytes: int = 0,
) -> bool:
    """Make the units of a run that are missing, then its outputs; a killed run goes on so.

    count: of the units. make: the number of a unit -> its tensors, and rows for the tables.
    write: writes `outputs`; it is given what begins to read all units in order.
    what: the units, for the progress bar. overwrite, expected_bytes: see `Run`.
    Returns False if the outputs were there already for exactly this manifest.
    """
    run = Run(outputs, manifest, overwrite, expected_bytes)
    if run.finished:
        return False
    for unit in run.todo(count, what):
        run.save(unit, *make(unit))
    if run.all_done():
        write(lambda: run.units(count))
    run.finish()
    return True
