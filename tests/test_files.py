"""Files as people have them: every format, text to the letter, faults named with their row."""

from __future__ import annotations

import gzip
import io
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from helpers import data_files
from helpers.tiny import write_jsonl
from PIL import Image as Picture

from grains import data, files
from grains.errors import UserError
from grains.vision import open_image

LOOKS_LIKE = [
    *("1950-01-05", "1950-01-05T10:00:00Z", "7", "007", "1.0", "1.50", "1e5", "-0", "TRUE"),
    *("False", "true", "null", "None", "NA", "N/A", "nan", "NaN", "Infinity", "0x10", "1_000"),
    *("12345678901234567890", '"quoted"', "a;b,c\td", "two\nlines", "é ü", "[1, 2]", '{"a": 1}'),
]
PAIRS = [
    {"prompt": f"Question {i}?", "chosen": text, "rejected": f"not {text}"}
    for i, text in enumerate(LOOKS_LIKE)
]


def load(path, name="mine", split="train"):
    rows, source = data.load(name, split, str(path))
    return [data.read(rows, source, index) for index in range(len(rows))]


def message(path, **options):
    """The one line of the error that a file raises, on loading or on reading its rows."""
    with pytest.raises(UserError) as caught:
        rows, source = data.load(options.get("name", "mine"), "train", str(path))
        data.examples(rows, source, 0)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


# -- every format --


@pytest.mark.parametrize("form", data_files.FORMATS)
def test_text_stays_text(tmp_path, form):
    path = data_files.write(tmp_path, form, PAIRS)
    items = load(path)
    assert [item.question for item in items] == [row["prompt"] for row in PAIRS]
    assert [item.chosen for item in items] == LOOKS_LIKE
    assert [item.rejected for item in items] == [f"not {text}" for text in LOOKS_LIKE]
    drawn = data.examples(*data.load("mine", "train", path), 0)
    assert {item.chosen for item in drawn} == set(LOOKS_LIKE)


@pytest.mark.parametrize("form", data_files.FORMATS)
def test_choices_stay_text(tmp_path, form):
    rows = [{"question": "Which?", "choices": LOOKS_LIKE, "label": 3, "id": "007"}]
    (item,) = load(data_files.write(tmp_path, form, rows))
    assert (item.choices, item.label, item.id) == (tuple(LOOKS_LIKE), 3, "007")


@pytest.mark.parametrize("form", data_files.FORMATS)
def test_splits_of_a_column(tmp_path, form):
    rows = [row | {"split": "test" if i % 3 else "train"} for i, row in enumerate(PAIRS)]
    path = data_files.write(tmp_path, form, rows)
    assert [item.chosen for item in load(path)] == LOOKS_LIKE[::3]
    rows, _ = data.load("mine", "test", path)
    assert len(rows) == len(LOOKS_LIKE) - len(LOOKS_LIKE[::3])
    assert rows.place(2) == f"{path}, row 5"  # of the file, not of the split
    with pytest.raises(UserError, match="no split 'dev': found train, test"):
        data.load("mine", "dev", path)


@pytest.mark.parametrize("form", data_files.FORMATS)
def test_shards_of_a_folder(tmp_path, form):
    for number in range(3):
        rows = PAIRS[number * 9 : number * 9 + 9]
        data_files.write(tmp_path, form, rows, f"train-0000{number}-of-00003")
    data_files.write(tmp_path, form, PAIRS[:1], "test-00000-of-00001")
    (tmp_path / "README.md").write_text("About the data.")
    (tmp_path / ".cache").mkdir()
    data_files.write(tmp_path / ".cache", form, PAIRS[:1], "train-9")
    assert [item.chosen for item in load(tmp_path)] == LOOKS_LIKE
    assert [item.chosen for item in load(tmp_path, split="test")] == LOOKS_LIKE[:1]
    rows, _ = data.load("mine", "train", str(tmp_path))
    assert rows.place(10).endswith(f"train-00001-of-00003{data_files.FORMATS[form]}, row 2")
    with pytest.raises(UserError, match="no split 'dev': found test, train"):
        data.load("mine", "dev", str(tmp_path))


def test_shards_without_the_name_of_a_split(tmp_path):
    for number in range(2):
        data_files.write(tmp_path, "jsonl", PAIRS[number::2], f"part{number}")
    assert {item.chosen for item in load(tmp_path)} == set(LOOKS_LIKE)
    with pytest.raises(UserError, match="no split 'test': found part0, part1"):
        data.load("mine", "test", str(tmp_path))
    data_files.write(tmp_path, "csv", PAIRS, "part2")
    with pytest.raises(UserError, match=r"several kinds \(\.jsonl, \.csv\)"):
        data.load("mine", "train", str(tmp_path))


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "tsv", "jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path, form):
    plain = data_files.content(form.partition(".")[0], PAIRS)
    marked = b"\xef\xbb\xbf" + plain
    path = tmp_path / f"rows{data_files.FORMATS[form]}"
    path.write_bytes(gzip.compress(marked) if form.endswith("gz") else marked)
    items = load(path)
    assert [item.chosen for item in items] == LOOKS_LIKE
    path.write_bytes("prompt,chosen,rejected\na,b,c\n".encode("utf-16"))
    if form != "jsonl.gz":
        assert "is UTF-16: save it as UTF-8" in message(path)


def test_rows_that_are_compressed_in_several_pieces(tmp_path):
    pieces = [data_files.content("jsonl", PAIRS[i : i + 9]) for i in range(0, len(PAIRS), 9)]
    for ending, codec in ((".gz", "gzip"), (".zst", "zstd")):
        path = tmp_path / f"rows.jsonl{ending}"
        path.write_bytes(b"".join(pa.compress(p, codec=codec, asbytes=True) for p in pieces))
        assert [item.chosen for item in load(path)] == LOOKS_LIKE
        path.write_bytes(path.read_bytes()[:-9])
        assert "could not be read" in message(path)


def test_tables_of_other_programs(tmp_path):
    """pandas' quoting, DOS line ends, a blank last line, quoted line ends, extra columns."""
    table = pd.DataFrame(PAIRS).assign(note="a, b")
    table.to_csv(tmp_path / "p.csv", index=False)
    table.to_csv(tmp_path / "q.csv", quoting=1)
    table.to_csv(tmp_path / "r.csv", index=False, sep=";", lineterminator="\r\n")
    for name in ("p.csv", "q.csv", "r.csv"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + b"\n")
        assert [item.chosen for item in load(tmp_path / name)] == LOOKS_LIKE
    table.to_json(tmp_path / "p.jsonl", orient="records", lines=True)
    table.to_json(tmp_path / "p.json", orient="records")
    table.to_parquet(tmp_path / "p.parquet")
    for ending in ("jsonl", "json", "parquet"):
        assert [item.chosen for item in load(tmp_path / f"p.{ending}")] == LOOKS_LIKE


def test_what_datasets_writes(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(PAIRS)
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    rows.save_to_disk(tmp_path / "rows")
    rows.to_json(tmp_path / "p.jsonl")
    rows.to_csv(tmp_path / "p.csv")
    rows.to_parquet(tmp_path / "p.parquet")
    for name in ("dict", "rows", "p.jsonl", "p.csv", "p.parquet"):
        assert [item.chosen for item in load(tmp_path / name)] == LOOKS_LIKE


def test_lists_that_lost_their_commas_are_refused(tmp_path):
    """As a Python literal what `Dataset.to_csv` wrote would be one answer of two."""
    from datasets import Dataset

    rows = Dataset.from_list([QUESTION] * 3)
    rows.to_csv(tmp_path / "p.csv")
    pd.DataFrame([QUESTION] * 3).to_csv(tmp_path / "q.csv")
    for name in ("p.csv", "q.csv"):
        text = message(tmp_path / name)
        assert "row 1: choices is no valid JSON" in text and "use JSON Lines or Parquet" in text
    rows.to_json(tmp_path / "p.jsonl")
    assert load(tmp_path / "p.jsonl")[0].choices == tuple(QUESTION["choices"])


# -- rows are read when they are asked for --


def test_a_row_is_read_alone(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(200)]
    path = data_files.write(tmp_path, "jsonl", rows)
    loaded, source = data.load("mine", "train", path)
    parsed = []
    parse = files.parse_json
    monkeypatch.setattr(files, "parse_json", lambda text: parsed.append(text) or parse(text))
    assert data.read(loaded, source, 150).chosen == "c150"
    assert len(parsed) == 1
    assert len(data.examples(loaded, source, 0, 10)) == 10 and len(parsed) == 11


def picture(colour):
    buffer = io.BytesIO()
    Picture.new("RGB", (4, 3), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_are_read_a_row_group_at_a_time(tmp_path, monkeypatch):
    colours = [(i, 0, 255 - i) for i in range(24)]
    rows = [
        {
            "image": {"bytes": picture(c), "path": None},
            "prompt": "?",
            "chosen": "a",
            "rejected": "b",
        }
        for c in colours
    ]
    path = data_files.write(tmp_path, "parquet", rows)  # three rows a group
    loaded, source = data.load("mine", "train", path)
    groups = []
    laid_out = files.ParquetFile._laid_out
    monkeypatch.setattr(
        files.ParquetFile,
        "_laid_out",
        lambda self, group: groups.append(group) or laid_out(self, group),
    )
    (item,) = data.examples(loaded, source, 0, 1)
    assert len(groups) == 1
    items = data.examples(loaded, source, 0)
    assert len(items) == 24 and sorted(groups) == list(range(8))  # each once, whatever the order
    for item in items[::-1]:
        assert np.asarray(open_image(item))[0, 0].tolist() in list(map(list, colours))
    assert {np.asarray(open_image(item))[0, 0, 0] for item in items} == set(range(24))


@pytest.mark.parametrize("form", ["struct", "bytes", "path", "images"])
def test_forms_of_pictures(tmp_path, form):
    (tmp_path / "a.png").write_bytes(picture("red"))
    column = {
        "struct": {"image": {"bytes": picture("red"), "path": "a.png"}},
        "bytes": {"image": picture("red")},
        "path": {"image": {"bytes": None, "path": "a.png"}},
        "images": {"images": [{"bytes": picture("red"), "path": None}]},
    }[form]
    row = {"prompt": "?", "chosen": "a", "rejected": "b"} | column
    path = data_files.write(tmp_path, "parquet", [row])
    (item,) = data.examples(*data.load("mine", "train", path), 0)
    assert np.asarray(open_image(item))[0, 0].tolist() == [255, 0, 0]


# -- faults: the row, what it holds, what to do --

PAIR = {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."}
QUESTION = {"question": "How many?", "choices": ["one", "two"], "label": 1}
NESTED = "[" * 100_000 + "]" * 100_000
SURROGATE = '{"prompt": "a", "chosen": "half \\ud83d", "rejected": "b"}'


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR | {"prompt": True}, "the question is a boolean (true), expected text"),
        (PAIR | {"chosen": ["a"]}, "the answer is a list of 1, expected text"),
        (PAIR | {"rejected": {"text": "a"}}, "the answer is an object with text, expected text"),
        (PAIR | {"prompt": []}, "the question is a list"),
        (PAIR | {"rejected": "Hello! "}, "two answers are the same ('Hello!')"),
        (PAIR | {"id": True}, "the id is a boolean (true), expected text"),
        (PAIR | {"id": ["a"]}, "the id is a list of 1, expected text"),
        (
            PAIR | {"image": {"bytes": "text"}},
            "the image's bytes are text ('text'), expected bytes",
        ),
        (PAIR | {"image": {}}, "the image is an object with no keys"),
        (PAIR | {"image": 5}, "the image is a number (5), expected a path"),
        (PAIR | {"image": ["a.png"]}, "the image is a list of 1, expected a path"),
        (PAIR | {"images": ["a.png", "b.png"]}, "2 pictures, expected one"),
        (PAIR | {"image_content": 5}, "objects is a number (5), expected a list"),
        (PAIR | {"image_content": [["a"]]}, "the object is a list of 1, expected text"),
        (SURROGATE, "the answer holds half of a surrogate pair (\\ud83d)"),
        ('{"prompt": "a", "chosen": NaN, "rejected": "b"}', "the answer is NaN, expected text"),
        ('{"prompt": "a", "prompt": "b", "chosen": "c"}', "the key 'prompt' stands twice"),
        ('{"prompt": "a", "chosen"', "not valid JSON"),
        ('["prompt", "a"]', "expected an object a line, found a list of 2"),
        ('"prompt"', "expected an object a line, found text"),
        (NESTED, "nested too deeply"),
        (QUESTION | {"label": 0.7}, "the label is a number (0.7), expected a whole number"),
        (QUESTION | {"label": "a"}, "the label is text ('a'), expected a whole number"),
        (QUESTION | {"label": True}, "the label is a boolean (true), expected a whole number"),
        (QUESTION | {"label": [1]}, "the label is a list of 1, expected a whole number"),
        (
            '{"question": "a", "choices": ["b", "c"], "label": Infinity}',
            "the label is a number (Infinity), expected a whole number",
        ),
        (QUESTION | {"label": 10**30}, "the label is a number (1000"),
        (QUESTION | {"choices": "ab"}, "choices is text ('ab'), expected a list"),
        (
            QUESTION | {"choices": {"a": 1, "b": 2}},
            "choices is an object with a, b, expected a list",
        ),
        (QUESTION | {"choices": 5}, "choices is a number (5), expected a list"),
        (QUESTION | {"choices": '["a", '}, "choices is no valid JSON"),
        (QUESTION | {"choices": ["a", ["b"]]}, "the answer is a list of 1, expected text"),
        (QUESTION | {"choices": ["same", "same "]}, "two answers are the same ('same')"),
        (QUESTION | {"context": ["a"]}, "the context is a list of 1, expected text"),
        (QUESTION | {"context": {"a": 1}}, "the context is an object with a, expected text"),
        (QUESTION | {"context": True}, "the context is a boolean (true), expected text"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 100 else "row",
)
def test_a_fault_is_named_with_its_row(tmp_path, row, expected):
    good = QUESTION | {"question": "fine"} if "question" in row else PAIR | {"prompt": "fine"}
    text = message(write_jsonl(tmp_path / "rows.jsonl", [good, good | {"id": "b"}, row]))
    assert "row 3" in text and expected in text


def test_numbers_for_text_are_written_as_in_the_file(tmp_path):
    row = '{"question": 1.50, "choices": [12345678901234567890, -0, 1e5], "label": 1.0, "id": 7, '
    path = write_jsonl(tmp_path / "rows.jsonl", [row + '"context": 2.0}'])
    (item,) = load(path)
    assert (item.question, item.context, item.id, item.label) == ("1.50", "2.0", "7", 1)
    assert item.choices == ("12345678901234567890", "-0", "1e5")


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_bytes_that_are_not_utf_8(tmp_path, form):
    """Named wherever they lie, also in a row that is never drawn."""
    rows = [{"prompt": f"p{i}", "chosen": "caf\u00e9", "rejected": "b"} for i in range(30)]
    whole = data_files.content(form, rows)
    e_acute = "\u00e9".encode()
    place = [i for i in range(len(whole)) if whole.startswith(e_acute, i)][20]
    path = tmp_path / f"rows{data_files.FORMATS[form]}"
    path.write_bytes(whole[:place] + b"\xe9" + whole[place + 2 :])
    with pytest.raises(UserError, match=r"row 21: byte 0xe9 is not UTF-8 .*Latin-1"):
        data.load("mine", "train", str(path))
    path.write_bytes(whole[:place] + b"\xed\xa0\xbd" + whole[place + 2 :])  # a raw surrogate
    with pytest.raises(UserError, match="row 21: byte 0xed is not UTF-8"):
        data.load("mine", "train", str(path))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[" * 99_999, "not valid JSON: nested too deeply"),
        ("a.csv", "prompt,chosen,rejected,chosen\na,b,c,d\n", "several columns named chosen"),
        ("a.csv", "prompt,chosen,rejected\na,b,c\na,b\n", "row 2: 2 cells where the header has 3"),
        ("a.csv", "prompt;chosen;rejected\na,b,c\n", "row 1: 1 cells .*the delimiter is ';'"),
        ("a.csv", 'prompt,chosen,rejected\na,b,"c\n', "row 1: unexpected end of data"),
        ("a.csv", 'prompt,chosen,rejected\na,b,"c"d\n', "row 1: ',' expected after '\"'"),
        ("a.csv", "prompt,chosen,rejected\ra,b,c\r", "a bare carriage return"),
        ("a.csv", "prompt,chosen,rejected\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n \n", "has no rows"),
        ("a.json", "", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"prompt": "a"}, 5]', "row 2: expected an object .*found a number"),
        ("a.json", '{"prompt": {"0": "a"},\n"chosen": {}}', "not valid JSON"),
        ("a.parquet", "", "could not be read"),
        ("a.parquet", "PAR1PAR1", "could not be read"),
        ("a.jsonl.gz", "no gzip", "could not be read"),
        ("a.jsonl.zst", "no zstd", "could not be read"),
        ("a.jsonl", '{"text": "a"}', "columns prompt, chosen, rejected missing.*found text"),
        ("a.txt", "a", "expected a .jsonl, .json, .csv, .tsv"),
        ("a.gz", "a", "expected a .jsonl, .json, .csv, .tsv"),
    ],
    ids=lambda value: value if len(value) < 60 else "long",
)
def test_files_that_are_refused(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_text(content, newline="")
    assert re.search(expected, message(path))


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", None], "row 2: the split is nothing (null), expected a name"),
        (["train", True], "row 2: the split is a boolean (true)"),
        (["train", ["a"]], "row 2: the split is a list of 1"),
        ([1, 2], "no split 'train': found 1, 2"),
    ],
)
def test_odd_split_columns(tmp_path, splits, expected):
    rows = [PAIR | {"split": split} for split in splits]
    assert expected in message(write_jsonl(tmp_path / "rows.jsonl", rows))
    if splits == [1, 2]:
        assert expected in message(data_files.write(tmp_path, "parquet", rows))
        assert len(load(tmp_path / "rows.parquet", split="2")) == 1


def test_parquet_columns_that_are_no_text(tmp_path):
    dates = pd.to_datetime(["1950-01-05"])
    table = pd.DataFrame({"prompt": ["When?"], "chosen": dates, "rejected": ["1951-01-05"]})
    table.to_parquet(tmp_path / "rows.parquet")
    assert "row 1: the answer is a datetime" in message(tmp_path / "rows.parquet").replace(
        "Timestamp", "datetime"
    )
    rows = pa.table([["a"], ["b"], ["c"], ["d"]], names=["prompt", "chosen", "rejected", "chosen"])
    parquet.write_table(rows, tmp_path / "rows.parquet")
    assert "several columns named chosen" in message(tmp_path / "rows.parquet")


# -- ids and repeated prompts --


def test_an_id_that_stands_twice_names_two_examples(tmp_path):
    rows = [{"id": i % 6, "prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(24)]
    for form in ("jsonl", "csv", "parquet"):
        items = load(data_files.write(tmp_path, form, rows))
        names = [item.id for item in items]
        assert len(set(names)) == 24
        assert [name.partition("-")[0] for name in names] == [str(i % 6) for i in range(24)]
    again = load(data_files.write(tmp_path, "jsonl", rows[::-1]))
    assert [item.id for item in again] == names[::-1]  # of the content, whatever the order


def test_an_id_is_repeated_also_in_another_split_or_shard(tmp_path):
    rows = [
        {"id": "1", "prompt": split, "chosen": "a", "rejected": "b", "split": split}
        for split in ("train", "test")
    ]
    path = data_files.write(tmp_path, "jsonl", rows)
    (train,), (test,) = load(path), load(path, split="test")
    assert train.id != test.id and {train.id[:2], test.id[:2]} == {"1-"}
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, row in enumerate(rows):
        data_files.write(
            folder, "csv", [{k: v for k, v in row.items() if k != "split"}], str(number)
        )
    assert len({item.id for item in load(folder)}) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test.jsonl"),
        ("train_0.jsonl", "train_1.jsonl", "test_0.jsonl"),
        ("train/0000.jsonl", "train/0001.jsonl", "test/0000.jsonl"),
    ],
)
def test_the_splits_of_a_folder_stay_apart(tmp_path, names):
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'{{"prompt": "{number}"}}\n')
    rows = {split: files.load(tmp_path, split) for split in ("train", "test")}
    assert [row["prompt"] for row in rows["train"]] == ["0", "1"]
    assert [row["prompt"] for row in rows["test"]] == ["2"]


def test_a_split_of_another_name_is_one_of_its_own(tmp_path):
    for name in ("train_0.jsonl", "yes_no.jsonl"):
        (tmp_path / name).write_text(f'{{"prompt": "{name}"}}\n')
    for split, name in (("train", "train_0.jsonl"), ("yes_no", "yes_no.jsonl")):
        rows = files.load(tmp_path, split)
        assert [rows[n]["prompt"] for n in range(len(rows))] == [name]
