"""Flags' values that mean nothing are refused with what was expected; nothing is started."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from grains import models
from grains.cli import documents, entry, flags
from grains.errors import UserError
from grains.report import page

HUGE = "1" + "0" * 23


@pytest.mark.parametrize("text", ["1.5", "x", "", "nan", HUGE, "-" + HUGE, "1" * 5000, "-1"])
@pytest.mark.parametrize(
    "kind, least", [(flags.positive, 1), (flags.whole, 0), (flags.ig_steps, 1)]
)
def test_whole_numbers(kind, least, text):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        kind(text)
    assert str(error.value) == f"{text[:40]}: expected a whole number from {least} to 2147483647"


def test_whole_numbers_at_their_ends():
    assert flags.positive("1") == 1 and flags.positive("2147483647") == 2**31 - 1
    assert flags.whole("0") == 0
    for kind, text in ((flags.positive, "0"), (flags.positive, "2147483648"), (flags.whole, "-1")):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    "kind, text, expected",
    [
        *((flags.finite, text, "a finite number") for text in ("nan", "-inf", "1e999", "x", "")),
        *((flags.positive_float, text, "a finite number") for text in ("nan", "inf")),
        *((flags.positive_float, text, "more than 0") for text in ("0", "-1", "1e-999")),
        (flags.not_negative, "-0.1", "0 or more"),
    ],
)
def test_numbers(kind, text, expected):
    with pytest.raises(argparse.ArgumentTypeError, match=f"expected {expected}"):
        kind(text)


@pytest.mark.parametrize("text", [".", "/", "..", "a/", "a/..", "a/."])
def test_a_file_is_no_folder(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a file, not a folder"):
        flags.file(text)


@pytest.mark.parametrize("kind", [flags.file, flags.path])
def test_paths(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    assert kind("~/a.csv") == "/home/her/a.csv" and kind("a/ü.csv") == "a/ü.csv"
    with pytest.raises(argparse.ArgumentTypeError, match=r"\?\.csv: expected a name in UTF-8"):
        kind("\udcff.csv")  # a byte that is no UTF-8, as Python hands it on


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used .*give cpu"):
        models.load("/", device=device)


@pytest.mark.parametrize("memory", [float("nan"), float("inf"), 0.0, -1.0, 1e300])
def test_memory(memory):
    with pytest.raises(UserError, match=r"max_memory .*: expected GiB, more than 0"):
        models.load("/", device="cpu", max_memory=memory)


# --- what the system says about a path ---


def ended(main, capsys) -> tuple[str, str]:
    with pytest.raises(SystemExit) as end:
        entry.run(main)
    return str(end.value.code), capsys.readouterr().err


def test_what_the_system_says_about_a_path_is_one_line(capsys):
    message, _ = ended(lambda: Path("n" * 300).is_dir(), capsys)
    assert message == f"error: '{'n' * 300}': File name too long; check this path"

    def without_path():
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        entry.run(without_path)


# --- files that are written without a manifest ---


def test_a_report_replaces_nothing_but_a_report(tmp_path):
    path = tmp_path / "notes.html"
    page.check_output(path)
    path.write_text("<html><title>Notes</title></html>")
    with pytest.raises(UserError, match=r"notes\.html' is no report, so it is not replaced"):
        page.check_output(path)
    path.write_text("<!doctype html><title>GrAInS report: things</title>")
    page.check_output(path)
    with pytest.raises(UserError, match="is a folder"):
        page.check_output(tmp_path)


def test_a_document_that_is_no_text_is_refused_at_the_start(tmp_path):
    path = tmp_path / "a.md"
    documents.check_document(None)
    documents.check_document(str(path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as text in UTF-8"):
        documents.check_document(str(path))
    with pytest.raises(UserError, match="too long"):
        documents.check_document(str(tmp_path / ("n" * 250)))
