"""Tables on the screen and in a Markdown document."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from grains import runs
from grains.errors import UserError


def check_document(path: str | None) -> None:
    """Raise UserError unless tables can be written into a document: better now than at the end."""
    if path:
        runs.check_output(Path(path))
        _text_of(Path(path))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"'{path}' cannot be read as text in UTF-8 ({error}): give another document"
        ) from error


def print_tables(
    document: str | Path | None,
    stem: str,
    tables: Sequence[tuple[str, pd.DataFrame]],
    files: dict[str, Path],
) -> None:
    """Print tables with their titles, write them into a document, say where the files are.

    stem: names the tables' place in the document. files: by what they hold.
    """
    for title, table in tables:
        print(f"\n{title}\n{table.to_string()}")
    if document:
        write_document(Path(document), stem, tables)
        files = {"tables": Path(document)} | files
    print()
    for content, path in files.items():
        print(f"{content + ':':20} {path}")


def markdown(titles: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """The lines of a table in Markdown."""
    every = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(map(str, row)) + " |" for row in every]


def write_document(path: Path, stem: str, tables: Sequence[tuple[str, pd.DataFrame]]) -> None:
    """Write tables and this command into a Markdown file, in place of the same stem's before.

    The rest of the file stays as it is.
    """
    command = [
        Path(sys.argv[0]).name,
        *(word.replace(str(path), path.name) for word in sys.argv[1:]),
    ]
    lines = ["```", "python " + shlex.join(command), "```"]
    for title, table in tables:
        rows = zip(table.index, table.to_numpy(), strict=True)
        body = markdown(["", *table.columns], ([name, *cells] for name, cells in rows))
        lines += ["", f"**{title}**", "", *body]
    write_between(path, stem, lines)


def write_between(path: Path, stem: str, lines: Iterable[str]) -> None:
    """Write lines between a document's marks of a stem, or with new marks at its end."""
    begin, end = f"<!-- {stem}: begin -->", f"<!-- {stem}: end -->"
    before, _, after = _text_of(path).partition(begin)
    after = after.partition(end)[2] or "\n"
    text = before + "\n".join([begin, *lines, end]) + after
    runs.write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))
