"""Whatever a data file holds: its texts come back to the letter, or one UserError is raised.

20,000 files: GRAINS_DATA_FILES=20000 python -m pytest tests/test_any_data.py
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest
from helpers import data_files
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grains import data
from grains.errors import UserError

pytestmark = pytest.mark.slow

FILES = int(os.environ.get("GRAINS_DATA_FILES", "240"))
GENERATED = settings(
    max_examples=FILES // 4,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
LOOKS = ["1950-01-05", "1950-01-05T00:00:00Z", "7", "007", "1.0", "1.50", "1e5", "-0", "TRUE"]
LOOKS += ["False", "true", "null", "None", "NA", "nan", "NaN", "Infinity", "", " ", '"', "=1+1"]
LOOKS += ['"7"', "a\nb", "a\r\nb", "a\rb", "\u2028", "\ufeff", "a;b,c\td|e", "[1, 2]", '{"a": 1}']
LOOKS += ["\x00", "\x1a", "é", "\U0001f600", "12345678901234567890", "#", "\\n", "'", "''"]
# The csv module of Python 3.10 refuses a null character.
NULL = "\x00" if sys.version_info < (3, 11) else ""
texts = st.one_of(
    st.sampled_from([text for text in LOOKS if text != (NULL or None)]),
    st.text(st.characters(codec="utf-8", exclude_characters=NULL), max_size=12),
    st.text(st.sampled_from("\"',;\t|\r\n\\ ae0"), max_size=12),
)
forms = st.sampled_from(list(data_files.FORMATS))
pairs = st.fixed_dictionaries(
    {"prompt": texts, "chosen": texts, "rejected": texts}, optional={"id": texts}
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


def read_all(path):
    """Every row that can be read, by its number; None for one that is refused."""
    try:
        rows, source = data.load("mine", "train", str(path))
    except UserError as error:
        assert "\n" not in str(error)
        return None
    found = {}
    for index in range(len(rows)):
        try:
            found[index] = data.read(rows, source, index)
        except UserError as error:
            assert "\n" not in str(error) and f"row {index + 1}" in str(error)
            found[index] = None
    return found


def draw(path):
    """The whole way to the examples."""
    try:
        rows, source = data.load("mine", "train", str(path))
        return data.examples(rows, source, 0)
    except UserError as error:
        assert "\n" not in str(error)
        return None


def is_valid(row):
    stripped = [row[name].strip() for name in ("prompt", "chosen", "rejected")]
    return all(stripped) and stripped[1] != stripped[2]


@GENERATED
@given(form=forms, rows=st.lists(pairs, min_size=1, max_size=7))
@example(form="csv", rows=[{"prompt": "a\rb", "chosen": "7", "rejected": "07"}])
def test_texts_come_back_to_the_letter(folder, form, rows):
    found = read_all(data_files.write(folder, form, rows))
    assert found is not None, "a whole file was refused"
    assert len(found) == len(rows)
    for index, row in enumerate(rows):
        if not is_valid(row):
            assert found[index] is None
            continue
        item = found[index]
        assert item.question == row["prompt"].strip()
        assert item.choices == (row["chosen"].strip(), row["rejected"].strip())
        if row.get("id") and sum(other.get("id") == row["id"] for other in rows) == 1:
            assert item.id == row["id"]


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system"]),
                "content": st.one_of(texts, st.none(), st.just([{"type": "text", "text": "a"}])),
            }
        ),
        scalars,
    ),
    max_size=4,
)
values = st.recursive(
    st.one_of(scalars, messages),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
names = ["prompt", "question", "chosen", "rejected", "choices", "label", "context", "image", "id"]
names += ["split", "images", "completion", "mc1_targets", "mc2_targets", "best_answer"]
names += ["incorrect_answers", "correct_answers", "image_content", "question_type"]
forms_of_rows = [["prompt", "chosen", "rejected"], ["question", "choices", "label"]]
forms_of_rows += [["chosen", "rejected"], ["prompt", "completion", "label"]]
forms_of_rows += [["question", "mc1_targets", "mc2_targets"]]
odd_rows = st.sampled_from(forms_of_rows).flatmap(
    lambda columns: st.lists(
        st.fixed_dictionaries(
            dict.fromkeys(columns, values),
            optional=dict.fromkeys(sorted(set(names) - set(columns)), values),
        ),
        min_size=1,
        max_size=4,
    )
)


@GENERATED
@given(form=st.sampled_from(["jsonl", "json", "csv", "parquet"]), rows=odd_rows)
def test_values_of_any_type_are_read_or_refused(folder, form, rows):
    try:
        path = data_files.write(folder, form, rows)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # this format cannot
        return
    read_all(path)
    draw(path)


@GENERATED
@given(form=forms, rows=st.lists(pairs, max_size=4), data_=st.data())
def test_damaged_files_are_read_or_refused(folder, form, rows, data_):
    whole = data_files.content(form, rows or [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    place = data_.draw(st.integers(0, len(whole)))
    inserted = data_.draw(st.sampled_from([b"", b"\xe9", b"\xed\xa0\x80", b"\x00", b'"', b"\n"]))
    removed = data_.draw(st.integers(0, 8))
    path = folder / f"damaged{data_files.FORMATS[form]}"
    path.write_bytes(whole[:place] + inserted + whole[place + removed :])
    read_all(path)
    draw(path)


@GENERATED
@given(
    ending=st.sampled_from([*data_files.FORMATS.values(), ".tsv.zst", ".json.gz"]),
    content=st.one_of(
        st.binary(max_size=60),
        st.text(st.sampled_from('{}[]":,\\u0d8 \n\t;|aeprompt'), max_size=80).map(str.encode),
        st.integers(1, 3000).map(lambda depth: b"[" * depth * 100),
        st.integers(1, 3000).map(lambda depth: b'{"prompt": ' + b"[" * depth * 100 + b"\n"),
    ),
)
def test_bytes_of_any_kind_are_refused(folder, ending, content):
    path = folder / f"any{ending}"
    path.write_bytes(content)
    read_all(path)
    draw(path)


def test_numbers_are_written_as_in_the_file(folder):
    """JSON's numbers, of any size and form, and Parquet's."""
    written = ["1.50", "-0", "1e5", "1E+400", "12345678901234567890", "0.1000000000000000055511151"]
    lines = [f'{{"prompt": "p{i}", "chosen": {w}, "rejected": "x"}}' for i, w in enumerate(written)]
    for name, text in (("n.jsonl", "\n".join(lines)), ("n.json", f"[{','.join(lines)}]")):
        (folder / name).write_text(text)
        assert [item.chosen for item in read_all(folder / name).values()] == written
    numbers = np.array([1.5, 0.1, 1e16], np.float32)
    rows = [{"prompt": "p", "chosen": n, "rejected": 12345678901234567} for n in numbers]
    path = data_files.write(folder, "parquet", rows)
    assert [item.chosen for item in read_all(path).values()] == ["1.5", "0.1", "1e+16"]
    assert read_all(path)[0].rejected == "12345678901234567"


def test_the_letters_of_the_file_not_of_its_neighbours(folder):
    """A number in one row changes nothing about the text in the same column of another."""
    written = ['"1"', "1", '"true"', '"null"', '"2.50"', '"1950-01-05"', "9007199254740993", "0.5"]
    lines = [f'{{"prompt": "p{i}", "chosen": {w}, "rejected": "x"}}' for i, w in enumerate(written)]
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    found = [item.chosen for item in read_all(folder / "mixed.jsonl").values()]
    assert found == [str(json.loads(w, parse_float=str)) for w in written]
