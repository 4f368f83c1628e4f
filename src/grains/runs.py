"""Reading and writing files: whole files, manifests, and runs that resume where they stopped.

A run is a list of units (an example, a batch of questions). Each finished unit is a small file in
the folder `<output>.parts`. When all are finished, they are merged into the outputs; then the
manifest is written and the folder removed. So a run that is killed at any moment resumes where it
stopped. Of several processes, each does every n-th unit.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from grains.errors import UserError
from grains.version import __version__

if TYPE_CHECKING:
    import pandas as pd

Unit = tuple[dict[str, Tensor], list[dict]]  # what a unit gives: tensors, and rows of tables
Units = Callable[[], Iterator[Unit]]  # all units of a run, in order
HEADER = "grains"  # the key of our metadata in the header of a safetensors file


@functools.cache
def versions() -> dict:
    """The versions of this package, of Python and of the libraries that results depend on."""
    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {
        "grains": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


LONGEST_NAME = 255  # bytes that a name may have in most file systems


def check_output(path: Path) -> None:
    """Raise UserError unless a file can be written at a path, with what lies beside it.

    It is better said before the computing than after it.
    """
    own = _temporary(path.with_name(f"{path.stem}.manifest.json")) if path.name else path
    excess = max(len(os.fsencode(name.name)) for name in (own, _temporary(path))) - LONGEST_NAME
    if excess > 0:
        room = len(os.fsencode(path.name)) - excess
        raise UserError(f"the name of '{path}' is too long: give one of at most {room} bytes")
    if folder := next((part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME), ""):
        raise UserError(f"'{path.parent}' cannot be: the name '{folder[:40]}...' is too long")
    if path.name in ("", "..") or path.is_dir():
        raise UserError(f"'{path}' is a folder: give the path of a file")


def _temporary(path: Path) -> Path:
    """What a file is called while it is written."""
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes were writing at a path, as far as its folder allows it."""
    begin = f".{path.name}."
    with suppress(OSError):
        for name in os.listdir(path.parent):
            process, _, end = name.removeprefix(begin).rpartition(".")
            is_one = name.startswith(begin) and end == "tmp" and process.isdecimal()
            if is_one and not psutil.pid_exists(int(process)):
                leftover = path.parent / name
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file completely or not at all: `write` fills a temporary file, which is then renamed.

    Raises UserError if it cannot be written.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"'{path}' could not be written: {error.strerror or error}; free some space or give "
            "another path, and run the same command again"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_tensors(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Write a safetensors file with `info` as JSON in its header."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {HEADER: json.dumps(info, sort_keys=True)}
    try:
        write_whole(path, lambda temporary: save_file(whole, temporary, header))
    except SafetensorError as error:  # raised if the disk is full
        raise UserError(
            f"'{path}' could not be written: {error}; free some space or give another path, and "
            "run the same command again"
        ) from error


def write_stacked(
    path: Path, names: dict[str, str], units: Callable[[], Iterator[dict]], count: int, info: dict
) -> None:
    """Write a safetensors file of arrays stacked from `count` units, with one unit in memory.

    names: array in the file -> its tensor in each unit, fp32.
    units: returns an iterator over the units' dicts of tensors; it is called twice.
    The format is the header's length (8 bytes), a JSON header with the offsets of every array, then
    the arrays.
    """
    first = next(units())
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
            for index, unit in enumerate(units()):
                for name, source in names.items():
                    offset = header[name]["data_offsets"][0] + index * sizes[name]
                    file.seek(8 + len(encoded) + offset)
                    file.write(unit[source].contiguous().numpy().astype("<f4").tobytes())

    write_whole(path, write)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the `info` of a file that `write_tensors` wrote. Raises as `read_header`."""
    info = read_header(path)
    return load_file(str(path)), info


def read_header(path: Path) -> dict:
    """The `info` in the header of a safetensors file.

    Raises UserError if the file is missing, cut short or has no such header, and for a header that
    is no JSON object.
    """
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
    return _object(header, f"the '{HEADER}' header of '{path}'", "make the file again")


def _object(text: str, what: str, todo: str) -> dict:
    """A JSON object from its text. what, todo: for the error. Raises UserError for another text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{what} cannot be read ({reason}): was it cut short? {todo}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{what}: expected a JSON object, found {str(content)[:40]}; was it changed? {todo}"
        )
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file with sorted keys."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


# All text is quoted: by default pandas does not quote a carriage return, which then ends a row.
CSV = {"index": False, "quoting": csv.QUOTE_NONNUMERIC}


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a CSV."""
    write_whole(path, lambda temporary: table.to_csv(temporary, **CSV))


def write_rows(path: Path, chunks: Iterable[list[dict]]) -> None:
    """Write a CSV from chunks of rows, all with the same columns, with one chunk in memory."""
    import pandas as pd  # takes long, and only the end of a run needs it

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            for index, rows in enumerate(chunks):
                pd.DataFrame(rows).to_csv(file, header=not index, **CSV)

    write_whole(path, write)


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises UserError if the file is missing, not valid, or no object."""
    todo = "remove it and run the command again"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read ({error}): was it cut short? {todo}") from error
    return _object(text, f"'{path}'", todo)


def processes() -> PartialState:
    """The processes of this run: one, or those that `accelerate launch` or `torchrun` started.

    The timeout is long: when a run resumes, one process may have many units left and the others
    none, and these wait for it.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def summed(counts: Counter[str]) -> Counter[str]:
    """Counts of each process, summed over all."""
    return sum(gather_object([counts]), Counter())


# What a user is told last of the differences between two manifests: it follows from what they did.
TOLD_LAST = ("data", "hidden_states", "model", "versions")


def differences(expected: dict, recorded: dict, prefix: str = "") -> list[str]:
    """How two manifests differ: 'setting: recorded instead of expected' for each difference.

    Flags come first, then data, model and versions. Of long lists the lengths are said.
    prefix: put before the names of settings.
    """
    lines = []
    for key in sorted({*expected, *recorded}, key=lambda key: (key in TOLD_LAST, key)):
        wanted, actual = expected.get(key), recorded.get(key)
        if isinstance(wanted, dict) and isinstance(actual, dict):
            lines += differences(wanted, actual, f"{prefix}{key}.")
        elif isinstance(wanted, list) and isinstance(actual, list) and wanted != actual:
            lines.append(f"{prefix}{key}: {_list_difference(wanted, actual)}")
        elif wanted != actual:
            lines.append(f"{prefix}{key}: {_short(actual)} instead of {_short(wanted)}")
    return lines


def _list_difference(wanted: list, actual: list) -> str:
    if max(len(str(wanted)), len(str(actual))) <= LONGEST_VALUE:
        return f"{actual} instead of {wanted}"
    if len(wanted) != len(actual):
        return f"{len(actual)} instead of {len(wanted)}"
    others = sum(a != b for a, b in zip(wanted, actual, strict=True))
    return f"{others} of {len(wanted)} are others"


LONGEST_VALUE = 80  # characters of a value in an error


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def digest(content: Any) -> str:
    """Twelve hexadecimal digits of a hash of anything that can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# What a folder of parts holds: units, the manifest, and files that a kill left half written.
OWN_PART = re.compile(r"\d{7}-[0-9a-f]{12}\.safetensors|manifest\.json|\..*\.\d+\.tmp")


MEBIBYTE = 2**20


def content_mark(path: Path) -> str:
    """What tells a file's content from another's: its size, and a digest of both its ends.

    The ends hold a tensor file's manifest and a table's first and last rows; a file of hidden
    states can have many gigabytes between them.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        ends = file.read(MEBIBYTE)
        file.seek(max(0, size - MEBIBYTE))
        ends += file.read(MEBIBYTE)
    return f"{size} {hashlib.sha256(ends).hexdigest()[:16]}"


Shared = dict[Path, tuple[dict[str, Tensor], dict]]  # path -> the tensors and `info` of its file


def write_shared(
    path: Path, tensors: dict[str, Tensor], info: dict, overwrite: bool = False
) -> None:
    """Write a tensor file that several runs make alike, unless it is there already.

    What a run has not made is NaN: each adds what it made to what is there.

    Raises UserError if another file is at the path: one that these scripts wrote with the same
    `stage` is replaced with `overwrite`, any other one is not.
    """
    check_output(path)
    with _locked(path):
        remove_leftovers(path)
        if path.exists():
            try:
                kept, recorded = read_tensors(path)
            except UserError:
                kept, recorded = {}, {}
            different = differences(json.loads(json.dumps(info)), recorded)
            if not different and _alike(tensors, kept):
                whole = {
                    name: torch.where(kept[name].isnan(), tensor, kept[name])
                    for name, tensor in tensors.items()
                }
                if any(not torch.equal(whole[name].isnan(), kept[name].isnan()) for name in kept):
                    write_tensors(path, whole, info)
                return
            if recorded.get("stage") != info.get("stage"):
                raise UserError(_not_ours(path))
            if not overwrite:
                reason = "; ".join(different[:4]) or "other values"
                raise UserError(
                    f"'{path}' is from another run ({reason}): give another folder, or overwrite "
                    "to replace it"
                )
        write_tensors(path, tensors, info)


FOLDERS_MANIFEST = "grains.json"


def write_folder(
    path: Path, manifest: dict, fill: Callable[[Path], Any], overwrite: bool = False
) -> bool:
    """Make a folder that appears whole or not at all, with its manifest in grains.json.

    fill: writes all of it into the empty folder that it is given.
    Returns False if the folder is there already for exactly this manifest.
    Raises UserError if it is from another manifest (unless `overwrite`), and if it is not ours or
    holds files that are not.
    """
    check_output(path / FOLDERS_MANIFEST)
    manifest = json.loads(json.dumps(manifest))
    with _locked(path):
        remove_leftovers(path)
        if path.exists():
            marker = path / FOLDERS_MANIFEST
            recorded = read_json(marker) if marker.is_file() else {}
            files = recorded.pop("files", [])
            if {_relative(path, file) for file in _files(path)} - {*files, FOLDERS_MANIFEST}:
                raise UserError(_not_ours(path))
            different = differences(manifest, recorded)
            if not different and all((path / file).is_file() for file in files):
                return False
            if different and not overwrite:
                raise UserError(
                    f"'{path}' is from other settings ({'; '.join(different[:4])}): give another "
                    "folder, or overwrite to replace it"
                )
        temporary = _temporary(path)
        try:
            temporary.mkdir()
            fill(temporary)
            files = sorted(_relative(temporary, file) for file in _files(temporary))
            write_json(temporary / FOLDERS_MANIFEST, manifest | {"files": files})
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def _relative(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from a path for a moment; waits for one that has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(_lock_of(path), timeout=60):
            try:
                yield
            finally:
                with suppress(OSError):
                    _lock_of(path).unlink()
    except Timeout as error:
        raise UserError(f"another run is writing '{path}': wait for it") from error
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written: {error.strerror}; give another path"
        ) from error


def _lock_of(path: Path) -> Path:
    """The file that is locked for a path. Raises UserError for a file with something in it."""
    lock = path.with_suffix(".lock")
    if lock.is_file() and lock.stat().st_size:
        raise UserError(_not_ours(lock))
    return lock


def _alike(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether tensors are the same where none is NaN, but for rounding on another machine."""

    def near(values: Tensor, kept: Tensor) -> bool:
        difference = values - kept
        both = ~difference.isnan()
        return bool(difference[both].norm() <= 1e-3 * values[both].norm())

    return first.keys() == second.keys() and all(
        first[name].shape == second[name].shape and near(first[name], second[name])
        for name in first
    )


def _not_ours(path: Path) -> str:
    return (
        f"'{path}' was not written by these scripts, so it is not replaced: move it away, or give "
        "other output paths"
    )


def _without_outputs(manifest: dict) -> dict:
    return {name: value for name, value in manifest.items() if name != "outputs"}


def _outputs_of(manifest: Path) -> list[str] | None:
    """The names of the outputs that a manifest names; none for a file that is no manifest.

    None where it does not say: it is damaged, or of an earlier version.
    """
    try:
        content = read_json(manifest)
    except UserError:
        return None
    return list(content["outputs"]) if "outputs" in content else None if "stage" in content else []


def _is_own_tensors(path: Path) -> bool:
    try:
        read_header(path)
    except UserError:
        return False
    return True


class Run:
    """The units of a resumable run, and the lock that keeps other runs away from its outputs.

    outputs: the files that the run will write. manifest: everything that they depend on.
    overwrite: replace outputs of another manifest, or do this run again.
    expected_bytes: the space that the run needs.
    inputs: files and folders that the run reads; None and names that are no path are passed over.
    shared: files that other runs make alike; they are written at the start (see `write_shared`).
    finished: whether the outputs already exist for exactly this manifest.
    Raises UserError if the outputs belong to another manifest (unless `overwrite`), if they are
    files that these scripts did not write, or inputs, if another run is writing them, or if space
    or permission is missing.
    """

    def __init__(
        self,
        outputs: Sequence[Path],
        manifest: dict,
        overwrite: bool = False,
        expected_bytes: int = 0,
        inputs: Iterable[str | Path | None] = (),
        shared: Shared | None = None,
    ):
        self.outputs = [Path(path) for path in outputs]
        for path in self.outputs:
            check_output(path)
        self.manifest = json.loads(json.dumps(manifest))
        self.key = digest(manifest)
        self.state = processes()
        first = self.outputs[0]
        self.manifest_path = first.with_suffix(".manifest.json")
        self.parts = first.with_suffix(".parts")
        self.shared = shared or {}
        self._check_paths([Path(path) for path in inputs if path])
        self.locks: list[FileLock] = []
        # The main process opens the run for all; if it cannot, all of them end.
        problem: UserError | None = None
        outcome = [False, False]  # finished, failed
        if self.state.is_main_process:
            try:
                outcome[0] = self._open(overwrite, expected_bytes)
            except UserError as error:
                problem, outcome[1] = error, True
        broadcast_object_list(outcome)
        self.finished, failed = outcome
        if problem:
            raise problem
        if failed:
            raise SystemExit(1)

    def _check_paths(self, inputs: list[Path]) -> None:
        """Raise UserError for two outputs with one path, and for an output that is an input."""
        written = [*self.outputs, *self.shared, self.manifest_path, self.parts]
        if len({path.resolve() for path in written}) < len(written):
            raise UserError(
                f"two outputs have one path ({', '.join(map(str, written))}), so one would "
                "replace the other: give each its own"
            )
        for path in written:
            for source in inputs:
                same = path.exists() and source.exists() and path.samefile(source)
                if same or (source.is_dir() and path.resolve().is_relative_to(source.resolve())):
                    raise UserError(
                        f"'{path}' {'is' if same else 'lies in'} '{source}', which this run reads: "
                        "give other output paths"
                    )

    def _open(self, overwrite: bool, expected_bytes: int) -> bool:
        """Lock the outputs and make the folder of parts. Returns whether the run is finished."""
        try:
            for path in [*self.outputs, self.parts]:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Each, as two runs may share any of them; outputs of one stem have one lock.
            locked = {str(_lock_of(path)): path for path in self.outputs}
            for file in locked:
                lock = FileLock(file)
                lock.acquire(timeout=0)
                self.locks.append(lock)
        except Timeout as error:
            self._unlock()
            path = locked[error.lock_file]
            if not Path(error.lock_file).exists():  # as in /proc, where nothing can be made
                raise UserError(
                    f"'{path.parent}' cannot be written: give other output paths"
                ) from error
            raise UserError(
                f"another run is writing '{path}': wait for it, or give other output paths"
            ) from error
        except OSError as error:
            self._unlock()
            raise UserError(
                f"'{self.outputs[0].parent}' cannot be written: {error.strerror}; "
                "give other output paths"
            ) from error
        try:
            finished = self._prepare(overwrite, expected_bytes)
            for path in [*self.outputs, self.manifest_path]:
                remove_leftovers(path)
            for path, (tensors, info) in self.shared.items():
                write_shared(path, tensors, info, overwrite)
        except BaseException:
            self._unlock()
            raise
        if finished:
            self._unlock()
        return finished

    def _prepare(self, overwrite: bool, expected_bytes: int) -> bool:
        """Check outputs and parts of earlier runs. Returns whether the run is finished."""
        marker = self.parts / "manifest.json"
        if self.parts.exists() and not self._holds_parts_alone():
            raise UserError(
                f"'{self.parts}' is no folder of unfinished results: give other output paths, or "
                "move it away"
            )
        if self.manifest_path.is_dir():
            raise UserError(f"'{self.manifest_path}' is a folder: give other output paths")
        begun = True  # whether the parts that are there may be taken up
        if overwrite:
            self._check_replaceable(marker)
            # Parts of this run without outputs are from an overwrite that was killed: keep them.
            begun = self._is_ours(marker) and not self.manifest_path.is_file()
        elif self.manifest_path.is_file():
            recorded = read_json(self.manifest_path)
            written = recorded.pop("outputs", {})
            self._check_manifest(recorded, self.outputs[0])
            if all(path.is_file() for path in self.outputs):
                for path in self.outputs:
                    if written.get(path.name) not in (None, content_mark(path)):
                        raise UserError(
                            f"'{path}' was changed or replaced since this run wrote it: give other "
                            "output paths, or overwrite to make it again"
                        )
                shutil.rmtree(self.parts, ignore_errors=True)
                return True
        elif marker.is_file():
            self._check_manifest(_without_outputs(read_json(marker)), self.parts)
        else:
            for path in self.outputs:
                if path.exists():
                    todo = "overwrite to replace it" if _is_own_tensors(path) else "move it away"
                    raise UserError(
                        f"'{path}' exists already, and no manifest beside it says how it was made: "
                        f"give other output paths, or {todo}"
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
                f"'{self.parts.parent}' has {free / 2**20:.0f} MiB free, the run needs about "
                f"{needed / 2**20:.0f} MiB: free some space or give other output paths"
            )
        # The marker says whose the outputs are from now on; only then may the old manifest go.
        write_json(marker, self.manifest | {"outputs": [path.name for path in self.outputs]})
        if not begun:
            for path in self.parts.iterdir():
                if path != marker:
                    path.unlink()
        if overwrite:
            self.manifest_path.unlink(missing_ok=True)
        return False

    def _check_replaceable(self, marker: Path) -> None:
        """Raise UserError if the run would replace a file that these scripts did not write."""
        beside = self.outputs[0].parent
        recorded = [_outputs_of(path) for path in (self.manifest_path, marker) if path.is_file()]
        for path in self.outputs:
            own = any(names is None or path.name in names for names in recorded)
            if path.exists() and not (own and path.parent == beside) and not _is_own_tensors(path):
                raise UserError(_not_ours(path))
        if self.manifest_path.is_file() and _outputs_of(self.manifest_path) == []:
            raise UserError(_not_ours(self.manifest_path))

    def _holds_parts_alone(self) -> bool:
        """Whether the folder of parts has nothing in it that these scripts do not write."""
        return self.parts.is_dir() and all(
            OWN_PART.fullmatch(path.name) for path in self.parts.iterdir()
        )

    def _is_ours(self, marker: Path) -> bool:
        """Whether the parts are of this manifest."""
        try:
            return _without_outputs(read_json(marker)) == self.manifest
        except UserError:
            return False

    def _check_manifest(self, recorded: dict, path: Path) -> None:
        """Raise UserError unless `recorded`, the manifest of `path`, is this run's."""
        different = differences(self.manifest, recorded)
        if different:
            raise UserError(
                f"'{path}' is from other settings ({'; '.join(different[:4])}): give other output "
                "paths, or overwrite to replace it"
            )

    def _part(self, unit: int) -> Path:
        # The key keeps parts of other settings apart: those that a killed overwrite has not removed
        # yet, or that a process of a killed run still writes.
        return self.parts / f"{unit:07d}-{self.key}.safetensors"

    def todo(self, count: int, description: str) -> Iterator[int]:
        """The units that this process still has to do, with a progress bar."""
        shard, missing = self.shard(count), self.missing(count)
        with tqdm(
            total=len(shard),
            initial=len(shard) - len(missing),
            desc=description,
            disable=not (count and self.state.is_main_process),
            unit="unit",
        ) as bar:
            for unit in missing:
                yield unit
                bar.update()

    def shard(self, count: int) -> range:
        """The units of this process."""
        return range(self.state.process_index, count, self.state.num_processes)

    def missing(self, count: int) -> list[int]:
        """The units that this process still has to do."""
        return [unit for unit in self.shard(count) if not self._is_whole(unit)]

    def save(self, unit: int, tensors: dict[str, Tensor], rows: list[dict]) -> None:
        """Keep one finished unit: tensors, and rows for the tables."""
        write_tensors(self._part(unit), tensors, {"rows": rows, "unit": unit})

    def _is_whole(self, unit: int) -> bool:
        """Whether the part of a unit is there, whole, and that unit's."""
        try:
            return read_header(self._part(unit)).get("unit") == unit
        except UserError:
            return False

    def all_done(self) -> bool:
        """Wait for all processes. Returns True on the main process, which merges the units."""
        self._wait()
        return self.state.is_main_process

    def units(self, count: int) -> Iterator[Unit]:
        """The tensors and rows of all units, in order, read one by one."""
        for unit in range(count):
            tensors, info = read_tensors(self._part(unit))
            yield tensors, info["rows"]

    def finish(self) -> None:
        """After the outputs are written: write the manifest, remove the parts, release the lock."""
        if self.state.is_main_process:
            marks = {path.name: content_mark(path) for path in self.outputs}
            write_json(self.manifest_path, self.manifest | {"outputs": marks})
            shutil.rmtree(self.parts, ignore_errors=True)
        self._wait()
        if self.state.is_main_process:
            self._unlock()

    def _wait(self) -> None:
        """Wait for the other processes. Raises UserError if one of them has stopped."""
        try:
            self.state.wait_for_everyone()
        except RuntimeError as error:
            raise UserError(
                "another process of this run has stopped, its own message says why: finished units "
                "are kept; run the same command again to go on"
            ) from error

    def _unlock(self) -> None:
        # The file is removed while it is locked: once released, it may be another run's lock.
        for lock in self.locks:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()
        self.locks.clear()


def resume(
    outputs: Sequence[Path],
    manifest: dict,
    count: int,
    make: Callable[[int], Unit],
    write: Callable[[Units], None],
    what: str,
    overwrite: bool = False,
    expected_bytes: int = 0,
    inputs: Iterable[str | Path | None] = (),
    shared: Shared | None = None,
) -> bool:
    """Do a run: compute the units that are missing, then write its outputs.

    outputs, manifest, overwrite, expected_bytes, inputs, shared: see `Run`.
    count: the number of units.
    make: number of a unit -> its tensors, and its rows for tables.
    write: writes `outputs`; its argument returns an iterator over all units in order.
    what: the progress bar's text.
    Returns False if the outputs exist already for exactly this manifest. Raises as `Run`.
    """
    run = Run(outputs, manifest, overwrite, expected_bytes, inputs, shared)
    if run.finished:
        return False
    # Nothing else holds the iterator: after an error it ends, and its bar with it, before the
    # error is printed.
    for unit in run.todo(count, what):
        run.save(unit, *make(unit))
    _merge(run, count, write)
    return True


def resume_together(
    outputs: Sequence[Path],
    manifest: dict,
    count: int,
    make: Callable[[list[int]], Iterable[tuple[int, Unit]]],
    write: Callable[[Units], None],
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
) -> bool:
    """As `resume`, for units that are made together and are finished in any order.

    make: numbers of the units that are missing -> each number and what the unit gives.
    """
    run = Run(outputs, manifest, overwrite, inputs=inputs)
    if run.finished:
        return False
    for unit, (tensors, rows) in make(run.missing(count)):
        run.save(unit, tensors, rows)
    _merge(run, count, write)
    return True


def _merge(run: Run, count: int, write: Callable[[Units], None]) -> None:
    """Wait for all units, and write the outputs."""
    if run.all_done():
        write(lambda: run.units(count))
    run.finish()
