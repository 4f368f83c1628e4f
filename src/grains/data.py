"""Data sets: short names, loading from the hub or from files, and rows as `Example`s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from grains import chats, columns, files
from grains.chats import Turn
from grains.columns import Targets, pairs
from grains.errors import UserError, hub_trouble
from grains.files import Rows, described, text_of, whole_number

if TYPE_CHECKING:  # takes a second to import, and scripts check their flags before that
    from datasets import Dataset
    from PIL.Image import Image

    # A path, a dict with the file's path or bytes, a PIL image, or one left in the data set's file.
    Picture: TypeAlias = "str | Path | dict | Image | StoredPicture"

# The branch that holds the hub's own conversion of a data set to Parquet: `datasets` 5 runs no
# loading scripts, and some data sets have nothing else on their main branch.
CONVERTED = "refs/convert/parquet"


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
    question_type: the kind of question, as the data set names it; empty if it does not.
    turns: (role, content) of every turn before the answer, if they are more than the question; the
        question is then the last of the user's.
    targets: which choices are right, if several are.
    options: the choices that a prompt lists, if others than `choices` are compared.
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
    turns: tuple[Turn, ...] = ()
    targets: Targets | None = None
    options: tuple[str, ...] = ()

    @property
    def chosen(self) -> str:
        """The preferred response, y+."""
        return self.choices[self.label]

    @property
    def rejected(self) -> str:
        """The dispreferred response, y-: the first choice that is not right.

        Raises UserError if there is a single choice.
        """
        for index, choice in enumerate(self.choices):
            if index != self.label and index not in self.also_right:
                return choice
        raise UserError(f"example {self.id} has a single answer: no pair to attribute")

    @property
    def also_right(self) -> tuple[int, ...]:
        """The indices of the right choices beside the preferred one."""
        right = self.targets.right if self.targets else ()
        return tuple(index for index in right if index != self.label)

    def pair(self) -> Example:
        """The same question with only two choices: the preferred and the dispreferred response."""
        return replace(self, choices=(self.chosen, self.rejected), label=0, targets=None)


@dataclass(frozen=True)
class StoredPicture:
    """A picture that is read from the data set's file when needed: 100,000 exceed the memory.

    digest: its `picture_digest`; computed when it is asked for if empty.
    """

    rows: Rows
    index: int
    digest: bytes = b""

    def read(self) -> Any:
        """The picture, as the data set stores it."""
        return picture_of(self.rows[self.index])


@dataclass(frozen=True)
class Source:
    """Where a data set is stored and how its rows are read.

    path: a hub id, or an absolute local path.
    columns: the columns that must be present.
    read: a row -> question, choices, label and what else it has (see `grains.columns`).
    splits: the splits that steering, validation and test examples come from. If they name the same
        split, the seed divides it.
    config: the hub's configuration that holds the splits; a dict if it differs between splits.
    revision: the branch or commit on the hub; None: the main branch.
    rows: applied to a split before its rows are read; returns a list of rows, or `Rows`.
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
    rows: Callable[[Rows], Sequence[dict] | Rows] | None = None
    note: str = ""
    make: Callable[[Path], None] | None = None
    shared_prompts: bool = False


# This repository's texts and questions: grains/texts in an installed package, src/data in a clone.
PACKAGED = next(
    folder
    for folder in (Path(__file__).parent / "texts", Path(__file__).resolve().parents[1] / "data")
    if folder.is_dir()
)
DATASETS: dict[str, Source] = {
    "misconceptions": Source(
        str(PACKAGED / "misconceptions.jsonl"),
        ("question", "best_answer", "incorrect_answers"),
        columns.best_answer,
        ("steering", "validation", "test"),
    ),
    **{
        name: Source(
            str(PACKAGED / "faithfulness.jsonl"),
            ("question", "context", "agreeing_context", "context_answer", "common_answer"),
            read,
            ("steering", "validation", "test"),
        )
        for name, read in {
            "faithfulness": columns.contrary_context,
            "faithfulness-agreeing": columns.agreeing_context,
            "faithfulness-bare": columns.no_context,
        }.items()
    },
    "truthfulqa": Source(
        "EleutherAI/truthful_qa_binary",
        ("question", "choices", "label"),
        columns.questions,
        ("validation",) * 3,
        config="multiple_choice",
        revision=CONVERTED,
    ),
    "truthfulqa-mc": Source(
        "truthfulqa/truthful_qa",
        ("question", "mc1_targets", "mc2_targets"),
        columns.truthfulqa,
        ("validation",) * 3,
        config="multiple_choice",
    ),
    "truthfulqa-generation": Source(
        "truthfulqa/truthful_qa",
        ("question", "best_answer", "correct_answers", "incorrect_answers"),
        columns.best_answer,
        ("validation",) * 3,
        config="generation",
    ),
    "faitheval": Source(
        "Salesforce/FaithEval-counterfactual-v1.0",
        ("context", "question", "choices", "answerKey"),
        columns.faitheval,
        ("test",) * 3,
    ),
    "toxigen": Source(
        "toxigen/toxigen-data",
        columns.TOXIGEN,
        pairs,
        ("train", "train", "test"),
        config="annotated",
        rows=columns.toxigen_pairs,
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
        "DogNeverSleep/MMHal-Bench",
        ("image", "question", "gt_answer"),
        columns.mmhal,
        ("train",) * 3,
    ),
}


def register(name: str, source: Source) -> None:
    """Add a data set under a short name, for `load` and the scripts."""
    DATASETS[name] = source


def load(
    name: str, split: str, path: str | None = None, revision: str | None = None
) -> tuple[Rows, Source]:
    """One split of a data set, and how its rows are read.

    name: a short name, or any label for a user's own file.
    path: a local file or folder to read instead of the hub: what `grains.files` reads, or what
        `datasets` saved with save_to_disk.
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
        made: Any = source.rows(rows)
        rows = made if hasattr(made, "place") else files.Listed(made, source.path)
    return rows, source


ROLES = ("steering", "validation", "test")


def default_split(name: str, role: str) -> str:
    """The split that examples with a role in `ROLES` come from, unless the user names one."""
    return DATASETS[name].splits[ROLES.index(role)] if name in DATASETS else "train"


def _columns_of(rows: Rows, path: str) -> Source:
    """How to read a user's own columns (`grains.columns.FORMS`). Raises UserError for others."""
    for form, read in columns.FORMS.items():
        if set(form) <= set(rows.column_names):
            pair_up = chats.Paired if form == columns.UNPAIRED else None
            return Source(str(path), form, read, ("train",) * 3, rows=pair_up)
    best = max(columns.FORMS, key=lambda form: len(set(form) & set(rows.column_names)))
    missing = [column for column in best if column not in rows.column_names]
    raise UserError(
        f"{path}: column{'s' * (len(missing) > 1)} {', '.join(missing)} missing; "
        "expected prompt, chosen, rejected or question, choices, label (and image), "
        f"found {', '.join(rows.column_names)}"
    )


def _local(path: Path, split: str) -> Rows:
    """A split from a file or folder; a file has splits if it has a column 'split'."""
    if not path.exists():
        raise UserError(f"data file '{path}' does not exist")
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return files.load(path, split)
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"'{path}' could not be read: {reason}; is it whole, as save_to_disk wrote it?"
        ) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"'{path}' has no split '{split}': found {', '.join(saved)}")
        saved = saved[split]
    if "split" in saved.column_names:
        splits = list(map(str, saved["split"]))
        if split not in splits:
            known = ", ".join(dict.fromkeys(splits))
            raise UserError(f"'{path}' has no split '{split}': found {known}")
        saved = saved.select([i for i, value in enumerate(splits) if value == split])
    if not len(saved):
        raise UserError(f"'{path}' has no rows")
    return _undecoded(saved, str(path))


def _undecoded(rows: Dataset, name: str) -> Rows:
    """The rows of `datasets`, their pictures as they are stored."""
    from datasets import Image

    if "image" in rows.column_names and isinstance(rows.features["image"], Image):
        rows = rows.cast_column("image", Image(decode=False))
    return files.Listed(rows, name, rows.column_names)


def _hub(name: str, source: Source, split: str, revision: str | None) -> Rows:
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
        rows = load_dataset(source.path, config, split=split, revision=revision)
        return _undecoded(rows, source.path)
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


def _converted(source: Source, split: str) -> Rows:
    """A split of the hub's conversion: the files {config}/{split}/0000.parquet, 0001.parquet, ...

    They are read as plain files: that branch has no card, in which `datasets` would look for the
    configurations.
    """
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            source.path,
            repo_type="dataset",
            revision=CONVERTED,
            allow_patterns=f"{source.config}/*/*.parquet",
        )
    )
    by_split: dict[str, list[Path]] = {}
    for file in sorted((folder / str(source.config)).glob("*/*.parquet")):
        by_split.setdefault(file.parent.name, []).append(file)
    if split not in by_split:
        raise UserError(
            f"data set '{source.path}' has no split '{split}': found "
            f"{', '.join(by_split) or 'none'}; give one of them as split"
        )
    return files.LocalRows(Path(source.path), map(files.open_file, by_split[split]), split)


def read(rows: Rows, source: Source, index: int) -> Example:
    """Row `index` as an Example.

    Without an id of its own, an example's id is a digest of its content. An id that several rows
    have gets a digest of its row's content behind it, so that no two examples share it.
    Raises UserError, naming the row, for an empty text, a value that is no text, answers that are
    the same, and a label that names no choice.
    """
    index = int(index)
    row = rows[index]
    for column in source.columns:
        if row.get(column) is None and column in rows.column_names:
            raise UserError(
                f"{rows.place(index)}: an empty {column}; fill it in or take the row out"
            )
    try:
        return _example(row, source, rows.repeats)
    except UserError as error:
        raise UserError(f"{rows.place(index)}{_named(row)}: {error}") from error
    except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{rows.place(index)}: {error}; expected the columns {', '.join(source.columns)}"
        ) from error


def _named(row: dict) -> str:
    identity = row.get("id")
    return f" (id {files.shortened(identity)})" if isinstance(identity, (str, int)) else ""


def _example(row: dict, source: Source, repeats: Callable[[str], bool]) -> Example:
    content = source.read(row)
    if isinstance(content["question"], (list, tuple)):
        raise UserError("the question is a list; messages are read from a column prompt")
    question = text_of(content["question"], "question")
    answers = [text_of(answer, "answer") for answer in content["choices"]]
    for kind, text in [("question", question), *(("answer", answer) for answer in answers)]:
        if not text.strip():
            raise UserError(f"an empty {kind}; fill it in or take the row out")
    label = whole_number(content["label"], "label")
    if not 0 <= label < len(answers):
        raise UserError(f"label {label} does not name one of {len(answers)} choices")
    choices = tuple(answer.strip() for answer in answers)
    if (twice := columns.repeated(choices)) is not None:
        raise UserError(
            f"two answers are the same ({files.shortened(repr(twice))}); change one or take the "
            "row out"
        )
    context = text_of(content.get("context", ""), "context")
    turns = content.get("turns", ())
    picture = picture_of(row)

    texts = json.dumps([question, context, *answers, label, *([turns] if turns else [])])
    digest = hashlib.sha256(texts.encode() + picture_digest(picture)).hexdigest()
    identity = row.get("id")
    if identity is None or identity == "":
        name = digest[:12]
    else:
        name = text_of(identity, "id")
        name += f"-{digest[:8]}" if repeats(name) else ""

    path = picture["path"] if _is_path(picture) else picture
    origin = Path(source.path)
    if isinstance(path, str) and not Path(path).is_absolute() and origin.exists():
        picture = str((origin if origin.is_dir() else origin.parent) / path)
    return Example(
        name,
        question.strip(),
        choices,
        label,
        context.strip(),
        picture,
        source.shared_prompts,
        tuple(text_of(text, "reference") for text in content.get("references", ())),
        columns.object_names(content.get("objects", row.get("image_content"))),
        text_of(row.get("question_type") or "", "question_type"),
        turns,
        content.get("targets"),
    )


def picture_of(row: dict) -> Any:
    """The picture of a row: a path, a dict with path and bytes, a PIL image, or None.

    It stands in the column image, or as the only one in the list images.
    Raises UserError for another type and for several pictures.
    """
    picture = row.get("image")
    if picture is None and row.get("images"):
        several = columns.listed(row["images"], "images")
        if len(several) > 1:
            raise UserError(f"the row has {len(several)} pictures, expected one")
        picture = several[0]
    if isinstance(picture, bytes):
        picture = {"bytes": picture}
    if isinstance(picture, str) and not isinstance(picture, files.Number):
        return text_of(picture, "image") or None
    if isinstance(picture, dict):
        stored, path = picture.get("bytes"), picture.get("path")
        if not isinstance(stored, (bytes, type(None))):
            raise UserError(
                f"the image's bytes are {described(stored)}, expected bytes (which Parquet can "
                "hold), or a path alone"
            )
        path = path if path is None else text_of(path, "image's path")
        if not stored and not path:
            raise UserError(f"the image is {described(picture)}, with neither bytes nor a path")
        return {"bytes": stored, "path": path}
    if picture is None or hasattr(picture, "tobytes"):
        return picture
    raise UserError(f"the image is {described(picture)}, expected a path, or bytes in Parquet")


def examples(
    rows: Rows,
    source: Source,
    seed: int,
    limit: int | None = None,
    exclude: frozenset[str] = frozenset(),
) -> list[Example]:
    """Examples of a split, shuffled by the seed; at most `limit`, or all if it is None.

    exclude: question keys of examples to leave out, such as those that the vectors were made from.
    A question that occurs twice with the same answers is taken once.
    """
    import numpy as np  # not needed to check a flag

    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    chosen: list[Example] = []
    seen: set[str] = set()
    begin = 0
    while begin < len(order) and (limit is None or len(chosen) < limit):
        # As many rows as are needed at least, read in the order of the file: a file's rows, and
        # their pictures, can be read quickly only in blocks.
        end = len(order) if limit is None else begin + limit - len(chosen)
        drawn, begin = order[begin:end], end
        left = {index: _left_in_file(rows, source, index) for index in sorted(drawn)}
        for index in drawn:
            example, key = left[index]
            pair = f"{key} {answers_digest(example)}"
            if key not in exclude and pair not in seen:
                seen.add(pair)
                chosen.append(example)
    return chosen


def _left_in_file(rows: Rows, source: Source, index: int) -> tuple[Example, str]:
    """A row as an Example that keeps no bytes of a picture, and its question key."""
    example = read(rows, source, index)
    key = question_key(example)
    picture = example.image
    if not (picture is None or isinstance(picture, str) or _is_path(picture)):
        stored = StoredPicture(rows, index, picture_digest(picture))
        example = replace(example, image=stored)
    return example, key


def _is_path(picture: Any) -> bool:
    return isinstance(picture, dict) and not picture["bytes"]


def question_key(example: Example) -> str:
    """A digest of context, question, picture and turns: equal for two rows that ask the same.

    If many examples share a prompt by design, the answers are part of it.
    """
    digest = hashlib.sha256(f"{example.context}\n{example.question}".lower().encode())
    digest.update(picture_digest(example.image))
    if example.turns:
        digest.update(json.dumps(example.turns).lower().encode())
    if example.shared_prompt:
        digest.update(json.dumps(sorted(example.choices)).encode())
    return digest.hexdigest()[:12]


def answers_digest(example: Example) -> str:
    """A digest of the answers, in any order, and of which is preferred."""
    others = sorted(set(example.choices) - {example.chosen})
    return hashlib.sha256(json.dumps([example.chosen, *others]).encode()).hexdigest()[:12]


def picture_digest(image: Picture | bytes | None) -> bytes:
    """A digest of a picture, in any form in which an `Example` keeps it; b'' for None.

    For a picture that is given by its path, the digest is of the path.
    """
    from PIL.Image import Image

    if image is None:
        return b""
    if isinstance(image, StoredPicture):
        return image.digest or picture_digest(image.read())
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or ""
    if isinstance(image, Image):
        image = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(image if isinstance(image, bytes) else str(image).encode()).digest()


def pictures_digest(examples: list[Example]) -> str:
    """A digest of the pictures' contents, of files that a data set only names too; '' for none."""
    pictures = [example.image for example in examples if example.image is not None]
    digest = hashlib.sha256()
    for picture in pictures:
        path: Any = picture
        if isinstance(picture, dict):
            path = None if picture.get("bytes") else picture.get("path")
        if isinstance(path, (str, Path)) and Path(path).is_file():
            picture = {"bytes": Path(path).read_bytes()}
        digest.update(picture_digest(picture))
    return digest.hexdigest()[:16] if pictures else ""


def fingerprint(chosen: list[Example]) -> str:
    """A digest of the ids and texts of examples, for the manifest."""
    text = json.dumps(
        [
            [e.id, e.context, e.question, *e.choices, e.label, *([e.turns] if e.turns else [])]
            for e in chosen
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]
