"""Data files in every format that is read, written from the same rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from helpers.tiny import jsonl

DELIMITERS = {"csv": ",", "semicolons": ";", "tsv": "\t"}
# Format -> the ending of its file.
FORMATS = {
    "jsonl": ".jsonl",
    "json": ".json",
    "csv": ".csv",
    "semicolons": ".csv",
    "tsv": ".tsv",
    "parquet": ".parquet",
    "jsonl.gz": ".jsonl.gz",
    "jsonl.zst": ".jsonl.zst",
    "csv.gz": ".csv.gz",
}


def content(form: str, rows: list[dict]) -> bytes:
    """The bytes of a file; lists are written as JSON in tables."""
    if form == "parquet":
        buffer = io.BytesIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        columns = {name: [row.get(name) for row in rows] for name in names}
        parquet.write_table(pa.table(columns), buffer, row_group_size=3)
        return buffer.getvalue()
    kind, _, compression = form.partition(".")
    if kind in DELIMITERS:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=DELIMITERS[kind])
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name, "") for name in names]
            writer.writerow(json.dumps(c) if isinstance(c, (list, dict)) else c for c in cells)
        data = text.getvalue().encode()
    elif kind == "json":
        data = json.dumps(rows, indent=1).encode()
    else:
        data = jsonl(rows, ensure_ascii=False).encode()
    if compression == "gz":
        return gzip.compress(data)
    return pa.compress(data, codec="zstd", asbytes=True) if compression == "zst" else data


def write(folder: Path, form: str, rows: list[dict], name: str = "rows") -> str:
    """A file with these rows in a format of `FORMATS`."""
    path = folder / f"{name}{FORMATS[form]}"
    path.write_bytes(content(form, rows))
    return str(path)
