"""Rows of data files as they are written: text to the letter, read when it is asked for.

JSON Lines, JSON, CSV (also with semicolons or tabs) and Parquet; the texts also behind gzip or
Zstandard; a folder of such files. No value's type is guessed: '1950-01-05', '007' and 'None' stay
text. A file is gone through once for what every row must have (UTF-8, a whole row, its split);
what stays in memory is where each row begins, except for a JSON list, which is read whole.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from grains.errors import UserError

if TYPE_CHECKING:  # it takes half a second to import, which a mistake in a flag need not wait for
    from pyarrow import Table

TEXTS = (".jsonl", ".json", ".csv", ".tsv")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
EXPECTED = ".jsonl, .json, .csv, .tsv (also .gz or .zst) or .parquet file, or a folder of them"
DELIMITERS = {",": "','", ";": "';'", "\t": "a tab", "|": "'|'"}
# Names that a split has in a folder; where none occurs, its files are the shards of one split.
SPLITS = ("steering", "train", "validation", "valid", "val", "dev", "test")
MEBIBYTE = 2**20
LONGEST_CELL = 2**31 - 1  # a long context is no broken file; csv takes 128 KiB by default


class Number(str):
    """A number of a JSON file, as it is written there."""

    __slots__ = ()


class Rows(Protocol):
    """Rows of one split.

    place: 'file, row N' for an error; the first row of a file is row 1, headers and blank lines
    do not count. repeats: whether several rows of the data have this id.
    """

    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def place(self, index: int) -> str: ...
    def repeats(self, identity: str) -> bool: ...


class FileRows(Protocol):
    """The rows of one file.

    splits: the value of each row's column `split`, if the file has one. ids: a digest of each
    row's `id`, 0 for none.
    """

    path: Path
    column_names: list[str]
    splits: list[Any]
    ids: array[int]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Listed:
    """Rows in memory, or of a `datasets.Dataset`."""

    def __init__(self, rows: Any, name: str, columns: Sequence[str] | None = None):
        self._rows, self._name = rows, name
        self.column_names = list(columns or (rows[0] if len(rows) else ()))
        self._repeated: frozenset[int] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[int(index)]

    def place(self, index: int) -> str:
        return f"{self._name}, row {index + 1}"

    def repeats(self, identity: str) -> bool:
        if self._repeated is None:
            ids: Iterable = ()
            if "id" in self.column_names:
                named = isinstance(self._rows, list)
                ids = (row.get("id") for row in self._rows) if named else self._rows["id"]
            self._repeated = _repeated([array("Q", map(_digest, ids))])
        return _digest(identity) in self._repeated


class LocalRows:
    """The rows of one split in one file or in the shards of a folder."""

    def __init__(self, path: Path, files: Iterable[FileRows], split: str):
        self._files = list(files)
        self.column_names = list(
            dict.fromkeys(c for file in self._files for c in file.column_names)
        )
        self._ends = list(accumulate(len(file) for file in self._files))
        self._repeated: frozenset[int] | None = None
        if not self._ends[-1]:
            raise UserError(f"'{path}' has no rows")
        self._chosen: Sequence[int] = range(self._ends[-1])
        if "split" in self.column_names:
            splits = [_split(file, index) for file in self._files for index in range(len(file))]
            self._chosen = array("Q", (i for i, value in enumerate(splits) if value == split))
            if not self._chosen:
                raise UserError(
                    f"'{path}' has no split '{split}': found {', '.join(dict.fromkeys(splits))}"
                )

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, place = self._find(index)
        return file[place]

    def place(self, index: int) -> str:
        file, place = self._find(index)
        return f"{file.path}, row {place + 1}"

    def repeats(self, identity: str) -> bool:
        if self._repeated is None:
            self._repeated = _repeated([file.ids for file in self._files])
        return _digest(identity) in self._repeated

    def _find(self, index: int) -> tuple[FileRows, int]:
        row = self._chosen[int(index)]
        number = bisect_right(self._ends, row)
        return self._files[number], row - (self._ends[number - 1] if number else 0)


def _split(file: FileRows, index: int) -> str:
    value = file.splits[index] if file.splits else None
    if isinstance(value, str) and value:
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):  # of a Parquet file
        return str(value)
    raise UserError(
        f"{file.path}, row {index + 1}: the split is {described(value)}, expected a name; "
        "write one in every row, or take the column out"
    )


def _digest(identity: Any) -> int:
    """8 bytes that tell an id from others; 0 for none."""
    if identity is None or identity == "":
        return 0
    text = str(identity).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _repeated(digests: list[array[int]]) -> frozenset[int]:
    seen: set[int] = set()
    again: set[int] = set()
    for ids in digests:
        for digest in ids:
            (again if digest in seen else seen).add(digest)
    return frozenset(again - {0})


# --- one file or a folder ---


def load(path: Path, split: str) -> LocalRows:
    """One split of a file or of a folder of files.

    Raises UserError for a file that cannot be read, a split that does not exist and no rows.
    """
    if path.is_dir():
        return LocalRows(path, [open_file(file) for file in shards(path, split)], split)
    if _format(path) is None:
        raise UserError(f"'{path}': expected a {EXPECTED}")
    return LocalRows(path, [open_file(path)], split)


def shards(path: Path, split: str) -> list[Path]:
    """The files of a split in a folder, named as the hub's are: train-00000-of-00002.parquet.

    The split is the first word of a file's name, or the folder that it is in (test/0000.parquet).
    Where neither names a split, all files are shards of the split train.
    """
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and _format(file)
        and not any(component.startswith((".", "_")) for component in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(
            f"'{path}' holds no data files ({EXPECTED}), nor a data set written by save_to_disk"
        )
    formats = list(dict.fromkeys(filter(None, map(_format, files))))
    if len(formats) > 1:
        raise UserError(
            f"'{path}' holds files of several kinds ({', '.join(formats)}): give the file, or a "
            "folder with those of one kind"
        )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        name = file.name.split(".")[0].split("-")[0]
        beginning = name.split("_")[0]  # of train_0, and not of yes_no
        folders = [part for part in file.relative_to(path).parts[:-1] if part in (*SPLITS, split)]
        own = beginning if beginning in SPLITS else name
        by_split.setdefault(folders[-1] if folders else own, []).append(file)
    if split in by_split:
        return by_split[split]
    if split == "train" and not any(name in by_split for name in SPLITS):
        return files
    raise UserError(f"'{path}' has no split '{split}': found {', '.join(by_split)}")


def _format(path: Path) -> str | None:
    """The ending that says what a file is, that of its compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes[-1:] and suffixes[-1] in COMPRESSED:
        suffixes = [suffix for suffix in suffixes[:-1] if suffix in TEXTS]
    return suffixes[-1] if suffixes and suffixes[-1] in (*TEXTS, ".parquet") else None


def open_file(path: Path) -> FileRows:
    """The rows of one file, in the format that its ending and its first byte say.

    Raises UserError if it cannot be read.
    """
    kind = _format(path)
    try:
        if kind == ".parquet":
            return ParquetFile(path)
        file = _open(path)
        if kind in (".csv", ".tsv"):
            return CsvFile(path, file, "\t" if kind == ".tsv" else None)
        if _first_byte(file) == b"[":
            return ListFile(path, file)
        return JsonLinesFile(path, file)
    except UserError:
        raise
    except (OSError, ValueError, csv.Error, NotImplementedError) as error:
        raise _unreadable(f"'{path}'", error) from error


def _unreadable(place: str, error: BaseException) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{place} could not be read: {reason}; is it whole, and of the kind its name says?"
    )


def _open(path: Path) -> IO[bytes]:
    """The bytes of a text file at its beginning, behind a byte order mark.

    What is compressed is written to a temporary file first: its rows are read in any order.
    """
    compression = COMPRESSED.get(path.suffix.lower())
    if compression:
        import pyarrow

        file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (stays open as long as its rows)
        with pyarrow.input_stream(str(path), compression=compression) as stream:
            while block := stream.read(MEBIBYTE):
                file.write(block)
        file.seek(0)
    else:
        file = path.open("rb")
    mark = file.read(4)
    if mark.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"'{path}' is UTF-16: save it as UTF-8")
    file.seek(3 if mark.startswith(b"\xef\xbb\xbf") else 0)
    return file


def _first_byte(file: IO[bytes]) -> bytes:
    """The first byte that is no white space; the file stays where it is."""
    start = file.tell()
    while (byte := file.read(1)) and byte.isspace():
        pass
    file.seek(start)
    return byte


class _Catalogue:
    """What is noted of every row: the columns, its split, its id."""

    def __init__(self) -> None:
        self.columns: dict[str, None] = {}
        self.splits: list[Any] = []
        self.ids: array[int] = array("Q")

    def add(self, row: dict) -> None:
        if not row.keys() <= self.columns.keys():
            self.columns.update(dict.fromkeys(row))
        self.splits.append(row.get("split"))
        self.ids.append(_digest(row.get("id")))


class _TextFile:
    """Rows that each begin at a known byte of a file."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path, self._file = path, file
        self._starts: array[int] = array("Q")
        catalogue = _Catalogue()
        for start, row in self._rows():
            self._starts.append(start)
            catalogue.add(row)
        self.column_names = list(catalogue.columns)
        self.splits = catalogue.splits if "split" in catalogue.columns else []
        self.ids = catalogue.ids

    def _rows(self) -> Iterator[tuple[int, dict]]:
        """Where each row begins, and the row."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._starts)

    def where(self) -> str:
        """The row that is being read, for an error."""
        return f"{self.path}, row {len(self._starts) + 1}"


class JsonLinesFile(_TextFile):
    """A file with a JSON object a line."""

    def _rows(self) -> Iterator[tuple[int, dict]]:
        while True:
            start = self._file.tell()
            line = self._file.readline()
            if not line:
                return
            if line.strip():
                yield start, json_object(decoded(line, self.where()), self.where())

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[index])
        place = f"{self.path}, row {index + 1}"
        return json_object(decoded(self._file.readline(), place), place)


@contextmanager
def _long_cells() -> Iterator[None]:
    """The csv module takes long cells within the block; the limit is one of the whole process."""
    limit = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class ListFile:
    """A JSON list of objects, in memory."""

    def __init__(self, path: Path, file: IO[bytes]):
        self.path = path
        content = decoded(file.read(), f"'{path}'")
        try:
            values = parse_json(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' is not valid JSON: {_reason(error)}") from error
        for number, value in enumerate(values, start=1):
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}, row {number}: expected an object with the columns, "
                    f"found {described(value)}"
                )
        self._values = values
        catalogue = _Catalogue()
        for row in values:
            catalogue.add(row)
        self.column_names = list(catalogue.columns)
        self.splits = catalogue.splits if "split" in catalogue.columns else []
        self.ids = catalogue.ids

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._values[index])


class CsvFile(_TextFile):
    """A table with a header, quoted where a text holds the delimiter, a quote or a line end."""

    def __init__(self, path: Path, file: IO[bytes], delimiter: str | None):
        self.path = path
        start = file.tell()
        header = decoded(file.readline(), f"'{path}', header").split("\r")[0]
        file.seek(start)
        with _long_cells():
            self._delimiter = delimiter or max(
                DELIMITERS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), ()))
            )
            super().__init__(path, file)

    def _rows(self) -> Iterator[tuple[int, dict]]:
        lines = _Lines(self._file)
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        try:
            self._header = next(reader, [])
            repeated = {name for name in self._header if self._header.count(name) > 1}
            if repeated:
                raise UserError(
                    f"'{self.path}' has several columns named {', '.join(sorted(repeated))}: "
                    "rename or remove all but the one to read"
                )
            while True:
                start = lines.position
                cells = next(reader, None)
                if cells is None:
                    return
                if cells:
                    yield start, self._row(cells, self.where())
        except (csv.Error, UnicodeDecodeError) as error:
            if isinstance(error, UnicodeDecodeError):
                raise _undecodable(error, self.where()) from error
            reason = str(error)
            if "new-line character" in reason:
                reason = "a bare carriage return outside quotes"
            raise UserError(
                f"{self.where()}: {reason}; is the file whole, and every text with a "
                f"{DELIMITERS[self._delimiter]}, a quote or a line end in quotes?"
            ) from error

    def _row(self, cells: list[str], place: str) -> dict[str, str]:
        if len(cells) != len(self._header):
            raise UserError(
                f"{place}: {len(cells)} cells where the header has {len(self._header)} "
                f"(the delimiter is {DELIMITERS[self._delimiter]}); put texts that hold it "
                "in quotes"
            )
        return dict(zip(self._header, cells, strict=True))

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._file.seek(self._starts[index])
        with _long_cells():
            cells = next(csv.reader(_Lines(self._file), delimiter=self._delimiter, strict=True))
        return self._row(cells, f"{self.path}, row {index + 1}")


class _Lines:
    """Lines of a file from where it stands, as text. position: the byte behind the last one."""

    def __init__(self, file: IO[bytes]):
        self._file, self.position = file, file.tell()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        return line.decode()


class ParquetFile:
    """A Parquet file, a row group at a time; its pictures one by one.

    The pictures of a row group are laid into a temporary file when the first of them is asked
    for: a group may hold gigabytes of them, and they are asked for in any order.
    """

    def __init__(self, path: Path):
        import pyarrow.parquet as parquet

        self.path = path
        self._file = parquet.ParquetFile(str(path), buffer_size=MEBIBYTE, pre_buffer=False)
        schema = self._file.schema_arrow
        self.column_names = list(schema.names)
        repeated = {name for name in schema.names if schema.names.count(name) > 1}
        if repeated:
            raise UserError(
                f"'{path}' has several columns named {', '.join(sorted(repeated))}: "
                "rename or remove all but the one to read"
            )
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))
        self._picture = "image" in schema.names and _holds_bytes(schema.field("image").type)
        self._texts = [n for n in schema.names if n != "image" or not self._picture]
        self._group: tuple[int, Table | None] = (-1, None)
        self._pictures: dict[int, list[tuple[int, int, str | None] | None]] = {}
        self._spool: IO[bytes] | None = None
        self.splits = self._column("split")
        self.ids = array("Q", map(_digest, self._column("id")))

    def _column(self, name: str) -> list[Any]:
        if name not in self.column_names:
            return []
        return self._file.read(columns=[name]).column(name).to_pylist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect_right(self._ends, index)
        place = index - (self._ends[group - 1] if group else 0)
        try:
            if self._group[0] != group:
                self._group = (group, self._file.read_row_group(group, columns=self._texts))
            rows = self._group[1]
            row = _plain(rows, place)
            if self._picture:
                row["image"] = self.picture(group, place)
            return row
        except UnicodeDecodeError as error:
            raise _undecodable(error, f"{self.path}, row {index + 1}") from error
        except (OSError, ValueError, NotImplementedError) as error:
            raise _unreadable(f"{self.path}, row {index + 1}", error) from error

    def picture(self, group: int, place: int) -> dict[str, Any] | None:
        """bytes and path of the picture in a row of a row group; None for a row without one."""
        if group not in self._pictures:
            self._pictures[group] = list(self._laid_out(group))
        stored = self._pictures[group][place]
        if stored is None:
            return None
        start, size, path = stored
        if not size or self._spool is None:
            return {"bytes": None, "path": path}
        self._spool.seek(start)
        return {"bytes": self._spool.read(size), "path": path}

    def _laid_out(self, group: int) -> Iterator[tuple[int, int, str | None] | None]:
        """Where the pictures of a row group lie in the temporary file, and their names."""
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the rows)
        for batch in self._file.iter_batches(16, row_groups=[group], columns=["image"]):
            for value in batch.column(0).to_pylist():
                if isinstance(value, bytes):
                    value = {"bytes": value}
                content = value and value.get("bytes")
                start = self._spool.seek(0, 2)
                self._spool.write(content or b"")
                yield value and (start, len(content or b""), value.get("path"))


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    def binary(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    return binary(kind) or (
        types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and binary(kind.field("bytes").type)
    )


def _plain(rows: Any, index: int) -> dict[str, Any]:
    """A row of a table; numbers of single precision with their own digits, 0.1 not 0.100000001."""
    from pyarrow import types

    (row,) = rows.slice(index, 1).to_pylist()
    for field in rows.schema:
        if types.is_float32(field.type) and row[field.name] is not None:
            import numpy as np

            row[field.name] = float(str(np.float32(row[field.name])))
    return row


# --- values ---


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        again = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {again!r} stands twice in one object")
    return values


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number
)


def parse_json(text: str) -> Any:
    """JSON, its numbers as they are written (`Number`). Raises ValueError or RecursionError."""
    return _DECODER.decode(text)


def json_object(text: str, place: str) -> dict[str, Any]:
    """An object from its JSON. place: where it stands. Raises UserError for anything else."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{place}: not valid JSON: {_reason(error)}; expected an object a line, or one list "
            "of objects"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object a line, found {described(value)}")
    return value


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]


def decoded(line: bytes, place: str) -> str:
    """UTF-8 as text. place: where it stands. Raises UserError for bytes that are no UTF-8."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _undecodable(error, place) from error


def _undecodable(error: UnicodeDecodeError, place: str) -> UserError:
    return UserError(
        f"{place}: byte 0x{error.object[error.start]:02x} is not UTF-8 (is the file Latin-1?); "
        "save it as UTF-8"
    )


def described(value: Any) -> str:
    """A value's type as a user knows it, and the value where it is short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, (Number, int, float)):
        return f"a number ({shortened(value)})"
    if isinstance(value, str):
        return f"text ({shortened(repr(value))})" if value else "empty text"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"a {type(value).__name__} ({shortened(value)})"


def shortened(value: Any) -> str:
    """A value as text of at most 40 characters, for an error."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def text_of(value: Any, what: str) -> str:
    """A text as it is written in its file, also where it is written as a number.

    what: its name in errors. Raises UserError for another type and for half a surrogate pair.
    """
    from decimal import Decimal

    if isinstance(value, str):
        if isinstance(value, Number) and re.fullmatch(r"NaN|-?Infinity", value):
            raise UserError(f"the {what} is {value}, expected text; put it in quotes")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise UserError(
                f"the {what} holds half of a surrogate pair (\\u{ord(half):04x}), which is no "
                "character; mend the text or take the row out"
            ) from error
        return str(value)
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if value != value or value in (float("inf"), -float("inf")):
            raise UserError(f"the {what} is {value}, expected text; fill it in")
        return str(value)
    raise UserError(
        f"the {what} is {described(value)}, expected text; put it in quotes or take the row out"
    )


def whole_number(value: Any, what: str) -> int:
    """A whole number, written as a number or as text; 1.0 is one, 0.7 and true are not."""
    if not isinstance(value, bool):
        text = str(value).strip()
        if isinstance(value, (str, int, float)) and re.fullmatch(r"[+-]?\d{1,18}(\.0*)?", text):
            return int(text.partition(".")[0])
    raise UserError(f"the {what} is {described(value)}, expected a whole number")
