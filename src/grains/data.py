"""Data sets: short names, loading from the hub or from files, and splits that never overlap."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from grains.errors import UserError, hub_trouble

if TYPE_CHECKING:  # it takes a second to import, which a mistake in a flag need not wait for
    from datasets import Dataset

# The branch that holds the hub's own conversion of a data set to Parquet.
CONVERTED = "refs/convert/parquet"
TOXIC_ABOVE = 5.5  # toxicity_ai + toxicity_human, each 1 to 5 (ToxiGen's own threshold)


@dataclass(frozen=True)
class Example:
    """A question with its choices, or a prompt with a chosen and a rejected response.

    choices[label] is the preferred answer. id is stable over runs and machines. image is what
    the data set stores (a path, or a dict with the file's bytes), or where it stores it
    (`StoredPicture`); it is opened when it is needed.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    label: int
    context: str = ""
    image: object = field(default=None, compare=False, repr=False)
    shared_prompt: bool = False  # many examples ask the same; their answers tell them apart
    references: tuple[str, ...] = ()  # further right answers
    objects: tuple[str, ...] | None = None  # all that the picture holds, where the data set tells
    question_type: str = ""

    @property
    def chosen(self) -> str:
        return self.choices[self.label]

    @property
    def rejected(self) -> str:
        """The dispreferred response: the first choice that is not the preferred one."""
        for index, choice in enumerate(self.choices):
            if index != self.label:
                return choice
        raise UserError(f"example {self.id} has a single answer: no pair to attribute")

    def pair(self) -> Example:
        """The same question with the chosen and the rejected response alone."""
        return replace(self, choices=(self.chosen, self.rejected), label=0)


@dataclass(frozen=True)
class StoredPicture:
    """A picture left where it is, in the data set's file: 100,000 of them do not fit in memory."""

    rows: Dataset
    index: int

    def read(self) -> dict:
        return self.rows[self.index]["image"]


@dataclass(frozen=True)
class Source:
    """Where a data set lies and how its rows are read.

    splits: the splits that steering, validation and test examples come from; where they name the
        same split it is cut by the seed.
    config: the hub's configuration that a split lies in, by split if they differ.
    read: a row -> question, choices, label (and context, references, objects).
    rows: what is done to a split first.
    make: writes the data set to its path where it is not there yet.
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
    """Names from a list, which may be written as JSON or with commas."""
    if isinstance(objects, str):
        objects = json.loads(objects) if objects.startswith("[") else objects.split(",")
    return None if objects is None else tuple(name.strip() for name in objects)


def _toxigen_pairs(rows: Dataset) -> Dataset:
    """Pair a benign with a toxic statement about the same group, in the order of the file."""
    from datasets import Dataset

    table = rows.to_pandas()
    toxic = table.toxicity_ai + table.toxicity_human > TOXIC_ABOVE
    pairs = []
    for group, part in table.groupby("target_group", sort=True):
        benign, harmful = part.text[~toxic[part.index]], part.text[toxic[part.index]]
        pairs += [
            {"prompt": f"Say something about this group: {group}.", "chosen": good, "rejected": bad}
            for good, bad in zip(benign, harmful, strict=False)
        ]
    return Dataset.from_list(pairs)


# The texts and questions of this repository: src/data in a checkout, grains/texts once installed.
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
    """Make a data set known by a short name, beside those of this module."""
    DATASETS[name] = source


def load(
    name: str, split: str, path: str | None = None, revision: str | None = None
) -> tuple[Dataset, Source]:
    """One split of a data set and how to read it.

    name: a short name, or any label for a user's own file.
    path: a local file (JSON Lines, CSV, Parquet) or folder (of such files, or written by
        `datasets`) that takes the hub's place.
    Raises UserError for an unknown name, split or column.
    """
    source = DATASETS.get(name)
    if source is None and path is None:
        raise UserError(
            f"unknown data set '{name}': expected {', '.join(DATASETS)}, or any name "
            "with a dataset_path"
        )
    if path is None and Path(source.path).is_absolute():
        path = source.path
        if source.make and not Path(path).exists():
            source.make(Path(path))
    rows = _local(Path(path), split) if path else _hub(name, source, split, revision)
    if source is None:
        source = _columns_of(rows, path)
    elif path:
        source = replace(source, path=str(path))
    missing = [column for column in source.columns if column not in rows.column_names]
    if missing:
        raise UserError(
            f"{path or source.path}: column{'s' * (len(missing) > 1)} "
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
    """The split that a data set's steering, validation or test examples come from."""
    return DATASETS[name].splits[ROLES.index(role)] if name in DATASETS else "train"


def _columns_of(rows: Dataset, path: str) -> Source:
    """A user's own columns: prompt/chosen/rejected, or question/choices/label."""
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
    from datasets import DatasetDict, load_dataset, load_from_disk

    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if not path.exists():
        raise UserError(f"data file '{path}' does not exist")
    try:
        if path.is_dir():
            found = load_from_disk(str(path)) if list(path.glob("*.json")) else _folder(path, split)
        elif path.suffix in formats:
            found = load_dataset(formats[path.suffix], data_files=str(path), split="train")
        else:
            raise UserError(f"'{path}': expected a .jsonl, .csv or .parquet file, or a folder")
    except UserError:
        raise
    except Exception as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' could not be read: {reason}; is it whole, and of the kind its name says?"
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise UserError(f"'{path}' has no split '{split}': found {', '.join(found)}")
        found = found[split]
    if "split" in found.column_names:
        splits = list(dict.fromkeys(found["split"]))
        if split not in splits:
            raise UserError(f"'{path}' has no split '{split}': found {', '.join(splits)}")
        found = found.select([i for i, value in enumerate(found["split"]) if value == split])
    if not len(found):
        raise UserError(f"'{path}' has no rows")
    return found


def _folder(path: Path, split: str) -> Dataset:
    """A split from a folder of Parquet files named as the hub's are (train-00000-of-00001...)."""
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
            "missing": f"see whether {page} is still there, or give a copy as dataset_path",
            "network": "check the network, or give a local copy as dataset_path",
            "": "give a local copy as dataset_path",
        }[hub_trouble(error)]
        if "split" in reason.lower():
            todo = "give a split that exists as split"
        note = f" ({source.note})" if source.note else ""
        raise UserError(
            f"data set '{name}' ({source.path}) could not be loaded: {reason}; {todo}{note}"
        ) from error


def _converted(source: Source, split: str) -> Dataset:
    """A split of the hub's conversion: the files {config}/{split}/0000.parquet and so on.

    They are read as files: that branch has no card, so `datasets` knows of no configurations.
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
    for file in sorted((folder / source.config).glob("*/*.parquet")):
        files.setdefault(file.parent.name, []).append(str(file))
    if split not in files:
        raise UserError(
            f"data set '{source.path}' has no split '{split}': found "
            f"{', '.join(files) or 'none'}; give one of them as split"
        )
    return load_dataset("parquet", data_files=files[split], split="train")


def read(rows: Dataset, source: Source, index: int) -> Example:
    """Row `index` as an Example.

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
    where = f"{source.path}, row {index} (id {identity})"
    for what, text in [("question", content["question"]), *(("answer", c) for c in choices)]:
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: an empty {what}; fill it in or take the row out")
    if not 0 <= label < len(choices):
        raise UserError(f"{where}: label {label} does not name one of {len(choices)} choices")
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
    """Examples of a split in an order shuffled by the seed, the first `limit` of them.

    exclude: ids and question keys that must not occur (those the vectors were made from). A
        question that stands twice in the data is taken once.
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
    """What two rows share that ask the same: a digest of context, question and picture."""
    digest = hashlib.sha256(f"{example.context}\n{example.question}".lower().encode())
    digest.update(picture_digest(example.image))
    if example.shared_prompt:
        digest.update(json.dumps(sorted(example.choices)).encode())
    return digest.hexdigest()[:12]


def picture_digest(image) -> bytes:
    """What tells one stored picture from another, in any form an Example keeps it; b'' for none.

    A file that a data set only names is told by its name.
    """
    if image is None:
        return b""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    if hasattr(image, "tobytes"):  # a PIL picture
        image = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(image if isinstance(image, bytes) else str(image).encode()).digest()


def fingerprint(chosen: list[Example]) -> str:
    """A digest of the examples' ids and texts, for the manifest."""
    text = json.dumps([[e.id, e.context, e.question, *e.choices, e.label] for e in chosen])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
