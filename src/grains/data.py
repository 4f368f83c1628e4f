"""Data sets: short names, loading from the hub or from files, and rows as `Example`s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from grains.errors import UserError, hub_trouble

if TYPE_CHECKING:  # takes a second to import, and scripts check their flags before that
    from datasets import Dataset
    from PIL.Image import Image

    # A path, a dict with the file's path or bytes, a PIL image, or one left in the data set's file.
    Picture: TypeAlias = "str | Path | dict | Image | StoredPicture"

# The branch that holds the hub's own conversion of a data set to Parquet: `datasets` 5 runs no
# loading scripts, and some data sets have nothing else on their main branch.
CONVERTED = "refs/convert/parquet"
TOXIC_ABOVE = 5.5  # toxicity_ai + toxicity_human, each 1 to 5 (ToxiGen's own threshold)


@dataclass(frozen=True)
class Example:
    """A question with its choices, or a prompt with a chosen and a rejected response.

    id: the same in every run and on every machine.
    choices: the answers; choices[label] is the preferred one.
    context: a text to answer from; empty if there is none.
    image: the picture as the data set stores it (a path, a dict with the file's bytes, a PIL
        image), or where it is stored (`StoredPicture`). It is opened when it is needed.
    shared_prompt: many examples have this prompt, and only their answers differ.
    references: further right answers.
    objects: the names of everything in the picture, if the data set gives them.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int
    context: str = ""
    image: Picture | None = field(default=None, compare=False, repr=False)
    shared_prompt: bool = False
    references: tuple[str, ...] = ()
    objects: tuple[str, ...] | None = None
    question_type: str = ""

    @property
    def chosen(self) -> str:
        """The preferred response, y+."""
        return self.choices[self.label]

    @property
    def rejected(self) -> str:
        """The dispreferred response, y-: the first choice that is not the preferred one.

        Raises UserError if there is a single choice.
        """
        for index, choice in enumerate(self.choices):
            if index != self.label:
                return choice
        raise UserError(f"example {self.id} has a single answer: no pair to attribute")

    def pair(self) -> Example:
        """The same question with only two choices: the preferred and the dispreferred response."""
        return replace(self, choices=(self.chosen, self.rejected), label=0)


@dataclass(frozen=True)
class StoredPicture:
    """A picture that is read from the data set's file when needed: 100,000 exceed the memory."""

    rows: Dataset
    index: int

    def read(self) -> dict:
        return self.rows[self.index]["image"]


@dataclass(frozen=True)
class Source:
    """Where a data set is stored and how its rows are read.

    path: a hub id, or an absolute local path.
    columns: the columns that must be present.
    read: a row -> question, choices, label (and context, references, objects, if it has them).
    splits: the splits that steering, validation and test examples come from. If they name the same
        split, the seed divides it.
    config: the hub's configuration that holds the splits; a dict if it differs between splits.
    revision: the branch or commit on the hub; None: the main branch.
    rows: applied to a split before its rows are read.
    note: added to the error if the data set cannot be loaded.
    make: writes the data set to its path if it does not exist there.
    shared_prompts: whether many examples have the same prompt.
    """

    path: str
    columns: tuple[str, ...]
    read: Callable[[dict], dict]
    splits: tuple[str, str, str]
    config: str | dict[str, str] | None = None
    revision: str | None = None
    rows: Callable[[Dataset], Dataset] | None = None
    note: str = ""
    make: Callable[[Path], None] | None = None
    shared_prompts: bool = False


def _questions(row: dict) -> dict:
    choices = row["choices"]
    if isinstance(choices, str):
        choices = json.loads(choices)
    return {
        "question": row["question"],
        "choices": choices,
        "label": row["label"],
        "context": row.get("context") or "",
    }


def pairs(row: dict) -> dict:
    """Read a row with the columns prompt (or question), chosen and rejected (see `Source`)."""
    prompt = row["prompt"] if "prompt" in row else row["question"]
    return {"question": prompt, "choices": [row["chosen"], row["rejected"]], "label": 0}


def _faitheval(row: dict) -> dict:
    choices = row["choices"]
    return {
        "question": row["question"],
        "context": row["context"],
        "choices": choices["text"],
        "label": list(choices["label"]).index(row["answerKey"]),
    }


def _misconceptions(row: dict) -> dict:
    return {
        "question": row["question"],
        "choices": [row["best_answer"], *row["incorrect_answers"]],
        "label": 0,
        "references": row.get("correct_answers") or [],
    }


def _mmhal(row: dict) -> dict:
    return {"question": row["question"], "choices": [row["gt_answer"]], "label": 0}


def _names(objects: list[str] | str | None) -> tuple[str, ...] | None:
    """Names from a list, from a JSON list as text, or from a text with commas."""
    if isinstance(objects, str):
        objects = json.loads(objects) if objects.startswith("[") else objects.split(",")
    return None if objects is None else tuple(name.strip() for name in objects)


def _toxigen_pairs(rows: Dataset) -> Dataset:
    """Pair a benign with a toxic statement about the same group, in the order of the file."""
    from datasets import Dataset

    table = rows.to_pandas()
    toxic = table.toxicity_ai + table.toxicity_human > TOXIC_ABOVE
    pairs = []
    for group, statements in table.groupby("target_group", sort=True):
        is_toxic = toxic[statements.index]
        benign, harmful = statements.text[~is_toxic], statements.text[is_toxic]
        pairs += [
            {"prompt": f"Say something about this group: {group}.", "chosen": good, "rejected": bad}
            for good, bad in zip(benign, harmful, strict=False)
        ]
    return Dataset.from_list(pairs)


# This repository's texts and questions: grains/texts in an installed package, src/data in a clone.
PACKAGED = next(
    folder
    for folder in (Path(__file__).parent / "texts", Path(__file__).resolve().parents[1] / "data")
    if folder.is_dir()
)
DATASETS = {
    "misconceptions": Source(
        str(PACKAGED / "misconceptions.jsonl"),
        ("question", "best_answer", "incorrect_answers"),
        _misconceptions,
        ("steering", "validation", "test"),
    ),
    "truthfulqa": Source(
        "EleutherAI/truthful_qa_binary",
        ("question", "choices", "label"),
        _questions,
        ("validation",) * 3,
        config="multiple_choice",
        revision=CONVERTED,
    ),
    "faitheval": Source(
        "Salesforce/FaithEval-counterfactual-v1.0",
        ("context", "question", "choices", "answerKey"),
        _faitheval,
        ("test",) * 3,
    ),
    "toxigen": Source(
        "toxigen/toxigen-data",
        ("text", "target_group", "toxicity_ai", "toxicity_human"),
        pairs,
        ("train", "train", "test"),
        config="annotated",
        rows=_toxigen_pairs,
        shared_prompts=True,
        note="access may have to be asked for on its page",
    ),
    "spa-vl": Source(
        "sqrti/SPA-VL",
        ("image", "question", "chosen", "rejected"),
        pairs,
        ("train", "validation", "validation"),
        config={"train": "default", "validation": "validation", "harm": "test", "help": "test"},
    ),
    "mmhal-bench": Source(
        "DogNeverSleep/MMHal-Bench", ("image", "question", "gt_answer"), _mmhal, ("train",) * 3
    ),
}


def register(name: str, source: Source) -> None:
    """Add a data set under a short name, for `load` and the scripts."""
    DATASETS[name] = source


def load(
    name: str, split: str, path: str | None = None, revision: str | None = None
) -> tuple[Dataset, Source]:
    """One split of a data set, and how its rows are read.

    name: a short name, or any label for a user's own file.
    path: a local file (JSON Lines, CSV, Parquet) or folder (of Parquet files, or written by
        `datasets`) to read instead of the hub.
    revision: a branch or commit on the hub.
    Raises UserError for an unknown name, split or column, and for data that cannot be loaded.
    """
    source = DATASETS.get(name)
    if path:
        rows = _local(Path(path), split)
        source = replace(source, path=str(path)) if source else _columns_of(rows, path)
    elif source is None:
        raise UserError(
            f"unknown data set '{name}': expected {', '.join(DATASETS)}, or any name "
            "with a dataset_path"
        )
    elif (file := Path(source.path)).is_absolute():
        if source.make and not file.exists():
            source.make(file)
        rows = _local(file, split)
    else:
        rows = _hub(name, source, split, revision)
    missing = [column for column in source.columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{source.path}: column{'s' * (len(missing) > 1)} "
            f"{', '.join(missing)} missing; expected {', '.join(source.columns)}, "
            f"found {', '.join(rows.column_names)}"
        )
    if source.rows:
        rows = source.rows(rows)
    from datasets import Image

    if "image" in rows.column_names and isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image(decode=False))
    return rows, source


ROLES = ("steering", "validation", "test")


def default_split(name: str, role: str) -> str:
    """The split that examples with a role in `ROLES` come from, unless the user names one."""
    return DATASETS[name].splits[ROLES.index(role)] if name in DATASETS else "train"


def _columns_of(rows: Dataset, path: str) -> Source:
    """How to read a user's own columns: prompt (or question), chosen, rejected, or question,
    choices, label. Raises UserError for other columns."""
    forms = {
        ("prompt", "chosen", "rejected"): pairs,
        ("question", "chosen", "rejected"): pairs,
        ("question", "choices", "label"): _questions,
    }
    for columns, read in forms.items():
        if set(columns) <= set(rows.column_names):
            return Source(str(path), columns, read, ("train",) * 3)
    best = max(forms, key=lambda columns: len(set(columns) & set(rows.column_names)))
    missing = [column for column in best if column not in rows.column_names]
    raise UserError(
        f"{path}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; "
        "expected prompt, chosen, rejected or question, choices, label (and image), "
        f"found {', '.join(rows.column_names)}"
    )


def _local(path: Path, split: str) -> Dataset:
    """A split from a file or folder; a file has splits if it has a column 'split'."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if not path.exists():
        raise UserError(f"data file '{path}' does not exist")
    try:
        if path.is_dir():
            rows = load_from_disk(str(path)) if list(path.glob("*.json")) else _folder(path, split)
        elif path.suffix in formats:
            rows = load_dataset(formats[path.suffix], data_files=str(path), split="train")
        else:
            raise UserError(f"'{path}': expected a .jsonl, .csv or .parquet file, or a folder")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' could not be read: {reason}; is it whole, and does its ending name its "
            "format?"
        ) from error
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise UserError(f"'{path}' has no split '{split}': found {', '.join(rows)}")
        rows = rows[split]
    if "split" in rows.column_names:
        splits = list(dict.fromkeys(rows["split"]))
        if split not in splits:
            raise UserError(f"'{path}' has no split '{split}': found {', '.join(splits)}")
        rows = rows.select([i for i, value in enumerate(rows["split"]) if value == split])
    if not len(rows):
        raise UserError(f"'{path}' has no rows")
    return rows


def _folder(path: Path, split: str) -> Dataset:
    """A split from a folder of Parquet files with the hub's names (train-00000-of-00001...)."""
    from datasets import load_dataset

    files: dict[str, list[str]] = {}
    for file in sorted(path.rglob("*.parquet")):
        files.setdefault(file.stem.split("-")[0], []).append(str(file))
    if not files:
        raise UserError(
            f"'{path}' holds neither Parquet files nor a data set written by save_to_disk"
        )
    if split not in files:
        raise UserError(f"'{path}' has no split '{split}': found {', '.join(files)}")
    return load_dataset("parquet", data_files=files[split], split="train")


def _hub(name: str, source: Source, split: str, revision: str | None) -> Dataset:
    from datasets import load_dataset

    revision = revision or source.revision
    try:
        if revision == CONVERTED:
            return _converted(source, split)
        config = source.config
        if isinstance(config, dict):
            if split not in config:
                raise UserError(
                    f"data set '{source.path}' has no split '{split}': found "
                    f"{', '.join(config)}; give one of them as split"
                )
            config = config[split]
        return load_dataset(source.path, config, split=split, revision=revision)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        page = f"https://huggingface.co/datasets/{source.path}"
        todo = {
            "gated": f"ask for access at {page} and log in with 'hf auth login', or give a copy "
            "as dataset_path",
            "missing": f"check that {page} still exists, or give a copy as dataset_path",
            "network": "check the network, or give a local copy as dataset_path",
            "": "give a local copy as dataset_path",
        }[hub_trouble(error)]
        if "split" in reason.lower():
            todo = "give the name of an existing split as split"
        note = f" ({source.note})" if source.note else ""
        raise UserError(
            f"data set '{name}' ({source.path}) could not be loaded: {reason}; {todo}{note}"
        ) from error


def _converted(source: Source, split: str) -> Dataset:
    """A split of the hub's conversion: the files {config}/{split}/0000.parquet, 0001.parquet, ...

    They are read as plain files: that branch has no card, in which `datasets` would look for the
    configurations.
    """
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            source.path,
            repo_type="dataset",
            revision=CONVERTED,
            allow_patterns=f"{source.config}/*/*.parquet",
        )
    )
    files: dict[str, list[str]] = {}
    for file in sorted((folder / str(source.config)).glob("*/*.parquet")):
        files.setdefault(file.parent.name, []).append(str(file))
    if split not in files:
        raise UserError(
            f"data set '{source.path}' has no split '{split}': found "
            f"{', '.join(files) or 'none'}; give one of them as split"
        )
    return load_dataset("parquet", data_files=files[split], split="train")


def read(rows: Dataset, source: Source, index: int) -> Example:
    """Row `index` as an Example.

    Without an id of its own, an example's id is a digest of its content.
    Raises UserError, naming the row, for an empty question or answer and a label out of range.
    """
    row = rows[int(index)]
    for column in source.columns:
        if row.get(column) is None and column in row:
            raise UserError(
                f"{source.path}, row {index}: an empty {column}; fill it in or take the row out"
            )
    try:
        content = source.read(row)
        choices = tuple(content["choices"])
        label = int(content["label"])
        objects = _names(content.get("objects", row.get("image_content")))
    except (KeyError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{source.path}, row {index}: {error}; expected the columns {', '.join(source.columns)}"
        ) from error
    image = row.get("image")
    origin = Path(source.path)
    if isinstance(image, str) and image and not Path(image).is_absolute() and origin.exists():
        image = str((origin if origin.is_dir() else origin.parent) / image)
    identity = row.get("id")
    if identity in (None, ""):
        text = json.dumps([content["question"], content.get("context", ""), *choices, label])
        identity = hashlib.sha256(text.encode() + picture_digest(row.get("image"))).hexdigest()[:12]
    row_name = f"{source.path}, row {index} (id {identity})"
    for kind, text in [("question", content["question"]), *(("answer", c) for c in choices)]:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{row_name}: an empty {kind}; fill it in or take the row out")
    if not 0 <= label < len(choices):
        raise UserError(f"{row_name}: label {label} does not name one of {len(choices)} choices")
    return Example(
        str(identity),
        content["question"].strip(),
        tuple(c.strip() for c in choices),
        label,
        content.get("context", "").strip(),
        image,
        source.shared_prompts,
        tuple(content.get("references", ())),
        objects,
        row.get("question_type") or "",
    )


def examples(
    rows: Dataset,
    source: Source,
    seed: int,
    limit: int | None = None,
    exclude: frozenset[str] = frozenset(),
) -> list[Example]:
    """Examples of a split, shuffled by the seed; at most `limit`, or all if it is None.

    exclude: ids and question keys of examples to leave out, such as those that the vectors were
        made from.
    A question that occurs twice in the data is taken once.
    """
    import numpy as np  # not needed to check a flag

    order = np.random.default_rng(seed).permutation(len(rows))
    chosen: list[Example] = []
    seen: set[str] = set()
    for index in order:
        if limit is not None and len(chosen) >= limit:
            break
        example = read(rows, source, index)
        key = question_key(example)
        if example.id in exclude or key in exclude or key in seen:
            continue
        seen.add(key)
        if isinstance(example.image, dict) and example.image.get("bytes"):
            example = replace(example, image=StoredPicture(rows, int(index)))
        chosen.append(example)
    return chosen


def question_key(example: Example) -> str:
    """A digest of context, question and picture: equal for two rows that ask the same.

    If many examples share a prompt, the answers are part of it.
    """
    digest = hashlib.sha256(f"{example.context}\n{example.question}".lower().encode())
    digest.update(picture_digest(example.image))
    if example.shared_prompt:
        digest.update(json.dumps(sorted(example.choices)).encode())
    return digest.hexdigest()[:12]


def picture_digest(image: Picture | bytes | None) -> bytes:
    """A digest of a picture, in any form in which an `Example` keeps it; b'' for None.

    For a picture that is given by its path, the digest is of the path.
    """
    from PIL.Image import Image

    if image is None:
        return b""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    if isinstance(image, Image):
        image = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(image if isinstance(image, bytes) else str(image).encode()).digest()


def fingerprint(chosen: list[Example]) -> str:
    """A digest of the ids and texts of examples, for the manifest."""
    text = json.dumps([[e.id, e.context, e.question, *e.choices, e.label] for e in chosen])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
