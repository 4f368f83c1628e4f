"""What configurations score, cost and write, kept in files that a later experiment takes up."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from grains import data, prompts, runs, stats, tables, thinking
from grains.data import Example
from grains.errors import UserError
from grains.generation import decoding_batches, draw_together, generate
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.sampling import end_tokens
from grains.scoring import margins, question_batches, score
from grains.settings import SCORES, PromptSettings
from grains.steering import BASE, Configuration
from grains.study import costs, lora
from grains.study.lora import LoraConfiguration
from grains.study.pareto import UNRELATED
from grains.study.study import Study

DRAWN = 4  # answers of the model itself to a steering question, to train on
STRIPPED = 2  # tokens of white space that an answer which was cut off may have lost at its end
Place = tuple[Path, int]  # of a configuration's scores: the file, and the row in its arrays


def evaluate(
    lm: LanguageModel,
    study: Study,
    target: Study,
    split: str,
    configurations: Sequence[Configuration],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Configurations of a study on the questions of `target`: the same study, or another data set.

    Returns a row for each configuration, the base model first, and a row for each configuration
    and question. On the study's own questions, the first have the costs, and the second the
    unrelated questions as well.
    """
    examples = target.splits[split]
    if split == "test":
        examples = study.tested(examples)
    encoded = [prompts.encode(lm, example, study.ablation.prompt) for example in examples]
    scores = scores_of(lm, study, encoded, configurations, f"{split}_{target.source.name}")
    leads = margins(encoded, scores)
    grid = grid_rows(study, target.source.name, split, configurations, leads)
    questions = question_rows(study, target.source.name, configurations, examples, leads)
    if target is not study:
        return grid, questions
    columns, unrelated = costs_of(lm, study, split, configurations)
    return grid.assign(**columns), pd.concat([questions, unrelated])


def costs_of(
    lm: LanguageModel, study: Study, split: str, configurations: Sequence[Configuration]
) -> tuple[dict[str, np.ndarray], pd.DataFrame]:
    """The columns (1 + C,) of costs, and a row for each configuration and unrelated question."""

    def scored(items: list[Encoded], name: str) -> list[np.ndarray]:
        return scores_of(lm, study, costs.may_stay(items), configurations, f"{split}_{name}")

    def increase(items: list[Encoded], name: str) -> np.ndarray:
        return costs.perplexity_rise(items, scored(items, name))

    neutral, unrelated = costs.passages(lm, split), costs.unrelated_questions(lm, split)
    neutral_scores = scored(neutral, "texts")
    leads = margins(unrelated, scored(unrelated, "unrelated"))
    accuracy = costs.accuracy_of(leads)
    answers = encode_answers(lm, own_answers(lm, study, split), study.ablation.prompt)
    columns = {
        "perplexity": costs.perplexity_of(neutral, neutral_scores),
        "perplexity_increase": costs.perplexity_rise(neutral, neutral_scores),
        "perplexity_bound": costs.perplexity_bound(neutral, neutral_scores),
        "answers_increase": increase(answers, "answers"),
        "unrelated_accuracy": accuracy["token"],
        "unrelated_change": accuracy["token"] - accuracy["token"][0],
        "unrelated_accuracy_sum": accuracy["sum"],
        "unrelated_change_sum": accuracy["sum"] - accuracy["sum"][0],
    }
    if split == "test":
        columns["varied_increase"] = increase(costs.passages(lm, split, costs.VARIED), "varied")
    examples = [item.example for item in unrelated]
    return columns, question_rows(study, UNRELATED, configurations, examples, leads)


def grid_rows(
    study: Study,
    evaluated_on: str,
    split: str,
    configurations: Sequence[Configuration],
    leads: dict[str, np.ndarray],
) -> pd.DataFrame:
    """A row for each configuration, the base model first: accuracies on the questions of a split.

    leads: see `tables.accuracy_table`.
    """
    origin = {
        "dataset": study.source.name,
        "evaluated_on": evaluated_on,
        "seed": study.seed,
        "part": split,
    }
    table = tables.accuracy_table([BASE, *configurations], leads)
    return table.assign(**origin)[[*origin, *table.columns]]


def question_rows(
    study: Study,
    evaluated_on: str,
    configurations: Sequence[Configuration],
    examples: Sequence[Example],
    leads: dict[str, np.ndarray],
) -> pd.DataFrame:
    """A row for each configuration and question: whether the answer is right, by each score."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "dataset": study.source.name,
                    "evaluated_on": evaluated_on,
                    "seed": study.seed,
                    "configuration": configuration.label,
                    "id": [example.id for example in examples],
                    **{kind: leads[kind][:, index] > 0 for kind in SCORES},
                }
            )
            for index, configuration in enumerate([BASE, *configurations])
        ]
    )


# --- scores ---


def scores_of(
    lm: LanguageModel,
    study: Study,
    items: list[Encoded],
    configurations: Sequence[Configuration],
    name: str,
) -> list[np.ndarray]:
    """(1 + C, choices) log-likelihoods of every item, base and steered, kept in files.

    A configuration that was scored on these items before is not scored again. name: of the items,
    in the names of the files.
    """
    manifest = study.manifest | {"items": data.fingerprint([item.example for item in items])}
    wanted = [BASE.label, *map(identity, configurations)]
    kept = kept_scores(study, name, manifest)
    missing = {
        key: configuration
        for key, configuration in zip(wanted[1:], configurations, strict=True)
        if key not in kept
    }
    adapted = {
        key: configuration
        for key, configuration in missing.items()
        if isinstance(configuration, LoraConfiguration)
    }
    steered = {key: item for key, item in missing.items() if key not in adapted}
    max_tokens = study.ablation.batch_tokens

    def keep(keys: list[str], compute: Callable[[list[Encoded]], list[np.ndarray]]) -> None:
        path = study.names.scores(name, runs.digest([manifest, keys]))
        write_scores(study, items, compute, path, manifest | {"configurations": keys})
        kept.update({key: (path, row) for row, key in enumerate(keys)})

    if steered or BASE.label not in kept:
        keep(
            [BASE.label, *steered], lambda batch: score(lm, batch, [*steered.values()], max_tokens)
        )
    if adapted:
        with with_lora(lm, [*adapted.values()]) as at_each_scale:
            keep(
                [*adapted],
                lambda batch: [
                    np.concatenate(rows)
                    for rows in zip(*at_each_scale(score, batch, [], max_tokens), strict=True)
                ],
            )
    places = [kept[key] for key in wanted]
    arrays = {path: runs.read_tensors(path)[0] for path in {path for path, _ in places}}
    return [
        np.stack([arrays[path][str(index)].numpy()[row] for path, row in places])
        for index in range(len(items))
    ]


def kept_scores(study: Study, name: str, manifest: dict) -> dict[str, Place]:
    """Where earlier runs kept scores of this manifest, by the configurations' identity."""
    kept: dict[str, Place] = {}
    for path in study.names.all_scores(name):
        whole = path.with_suffix(".manifest.json").is_file()
        if study.overwrite or not whole or path.with_suffix(".parts").exists():
            continue  # killed just before its end, which the run of this file comes to
        info = runs.read_header(path)
        keys = info.pop("configurations")
        if runs.digest(info) == runs.digest(manifest):
            kept |= {key: (path, row) for row, key in enumerate(keys)}
    return kept


def write_scores(
    study: Study,
    items: list[Encoded],
    compute: Callable[[list[Encoded]], list[np.ndarray]],
    path: Path,
    manifest: dict,
) -> None:
    """Write the log-likelihoods of every item to `path`, by its number, in resumable batches.

    compute: gives the (rows, choices) of each of a list of items.
    """
    groups = question_batches(items, study.ablation.batch_tokens)

    def make(unit: int) -> runs.Unit:
        scores = compute([items[index] for index in groups[unit]])
        return {
            str(index): torch.from_numpy(values)
            for index, values in zip(groups[unit], scores, strict=True)
        }, []

    def write(units: runs.Units) -> None:
        arrays = {key: value for tensors, _ in units() for key, value in tensors.items()}
        runs.write_tensors(path, arrays, manifest)

    description = path.stem.partition("_scores")[0]
    runs.resume([path], manifest, len(groups), make, write, description, study.overwrite)


def identity(configuration: Configuration) -> str:
    """A configuration's label, and a digest of all that it changes in the model."""
    tensors = (
        configuration.adapter
        if isinstance(configuration, LoraConfiguration)
        else {f"{layer}": vector for layer, vector in configuration.vectors.items()}
    )
    if configuration.gate:
        tensors = tensors | {
            f"{layer} {name}": tensor
            for layer in configuration.layers
            for name, tensor in zip("wb", configuration.gate.at(layer), strict=True)
        }
    if configuration.tower:
        added = configuration.tower.added()
        tensors = tensors | {f"tower {layer}": vector for layer, vector in added.items()}
    digests = {
        name: hashlib.sha256(
            tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, tensor in tensors.items()
    }
    return f"{configuration.label} {runs.digest(digests)}"


@contextmanager
def with_lora(
    lm: LanguageModel, adapted: Sequence[LoraConfiguration]
) -> Iterator[Callable[..., list[Any]]]:
    """LoRA in the model within the block; putting it in takes as long as scoring a batch.

    adapted: an adapter at several scales.
    Yields a function: (compute, *arguments) -> [compute(lm, *arguments) at each scale].
    """
    with lora.adapted(lm, adapted[0].adapter) as set_scale:

        def at_each_scale(compute: Callable[..., Any], *arguments: Any) -> list[Any]:
            results = []
            for configuration in adapted:
                set_scale(configuration.alpha)
                results.append(compute(lm, *arguments))
            return results

        yield at_each_scale


# --- free answers ---


def free_answers(
    lm: LanguageModel, study: Study, split: str, configurations: Sequence[Configuration]
) -> pd.DataFrame:
    """Free answers to questions of a split, base and steered, with their length and repetition.

    Greedy ones to the first `num_generations`; to train on, several to each, drawn at temperature
    1 and otherwise by the model's generation settings (by default, of the 50 likeliest tokens).
    number: of the question in its split, counted on through its repetitions.
    """
    settings, ablation = study.settings, study.ablation
    examples, repeated, sampling = study.splits[split], DRAWN, {"temperature": 1.0}
    if split != "training":
        examples, repeated, sampling = examples[: settings.num_generations], 1, {}
    manifest = study.manifest | sampling
    manifest |= {
        "configurations": [*map(identity, configurations)],
        "items": data.fingerprint(examples * repeated),
        "max_new_tokens": settings.max_new_tokens,
    }
    marks = thinking.thoughts(lm, ablation.prompt)
    if marks:  # older files have them in their texts
        manifest |= {"thoughts": dataclasses.astuple(marks)}
    path = study.names.answers(split, runs.digest(manifest))
    encoded = [prompts.encode(lm, example, ablation.prompt, free=True) for example in examples]
    encoded *= repeated
    groups = decoding_batches(
        encoded, [*configurations], settings.max_new_tokens, ablation.batch_tokens
    )
    adapted = [item for item in configurations if isinstance(item, LoraConfiguration)]
    steered = [item for item in configurations if not isinstance(item, LoraConfiguration)]
    labels = [item.label for item in (BASE, *steered, *adapted)]

    def make(unit: int) -> runs.Unit:
        batch = [encoded[index] for index in groups[unit]]
        seed = 1000 * study.seed + unit
        if split == "training":
            drawn = draw_together(lm, batch, settings.max_new_tokens, seed=seed, **sampling)
            texts = [drawn]
        else:
            texts = generate(lm, batch, steered, settings.max_new_tokens)
        if adapted:
            with with_lora(lm, adapted) as at_each_scale:
                for answers in at_each_scale(generate, batch, [], settings.max_new_tokens):
                    texts += answers
        return {}, [
            row(number, label, text)
            for label, answers in zip(labels, texts, strict=True)
            for number, text in zip(groups[unit], answers, strict=True)
        ]

    def row(number: int, label: str, text: str) -> dict:
        thought, answer = marks.split(text) if marks else ("", text)
        return {
            "dataset": study.source.name,
            "seed": study.seed,
            "number": number,
            "id": encoded[number].example.id,
            "question": encoded[number].example.question,
            "configuration": label,
            **({"thinking": thought} if marks else {}),
            "text": answer,
            "repetition": stats.repetition(answer),
            "words": len(answer.split()),
        }

    runs.resume(
        [path],
        manifest,
        len(groups),
        make,
        lambda units: runs.write_rows(path, (rows for _, rows in units())),
        f"{study.name} {split} free answers",
        study.overwrite,
    )
    texts = dict.fromkeys(("id", "thinking", "text"), str)
    table = pd.read_csv(path, keep_default_na=False, dtype=texts)
    if marks and (note := thinking.cut_off([*zip(table.thinking, table.text, strict=True)])):
        warnings.warn(f"{study.name} {split}: {note}", stacklevel=2)
    return table


def own_answers(lm: LanguageModel, study: Study, split: str) -> list[Example]:
    """Questions of a split whose only choice is what the model itself, unsteered, answers.

    A prompt that all examples share (ToxiGen's) has the same answer in validation and test.
    """
    answers = free_answers(lm, study, split, []).sort_values("number")
    examples = study.splits[split]
    return [
        dataclasses.replace(asked, choices=(row.text,), label=0, options=asked.choices)
        for row in answers.itertuples()
        if row.text and (asked := examples[row.number % len(examples)])
    ]


def encode_answers(
    lm: LanguageModel,
    answered: Sequence[Example],
    prompt: PromptSettings,
    longest: int | None = None,
) -> list[Encoded]:
    """Answers of the model, which may be cut off; without those that cannot be encoded again.

    Of a model that thinks they stand where the chat template puts a final answer, as those of the
    data do.
    longest: the most tokens that were written. If given, an answer that has fewer has the token
        that ends it as its last. (Not of a model that thinks, whose thoughts are among them.)
    Raises UserError if none is left.
    """
    thinks = thinking.thoughts(lm, prompt) is not None
    end = [] if thinks or longest is None else end_of_answer(lm)
    encoded = []
    for example in answered:
        try:
            item = prompts.encode(lm, example, prompt, finished=False, free=not thinks)
        except UserError as error:
            warnings.warn(f"left out an answer of {lm.name}: {error}", stacklevel=2)
            continue
        (response,) = item.responses
        if longest is not None and len(response) < longest - STRIPPED:
            item = dataclasses.replace(item, responses=[response + end])
        encoded.append(item)
    if not encoded:
        todo = (
            "a larger max_new_tokens, as its thoughts take these up, or template_args that turn "
            "them off (such as enable_thinking=false)"
        )
        raise UserError(
            f"{lm.name} answers no question in words, so the cost of steering on its free answers "
            f"cannot be measured: give {todo if thinks else 'another prompt_style'}"
        )
    return encoded


def end_of_answer(lm: LanguageModel) -> list[int]:
    """The token with which the model ends what it writes: the tokenizer's, if it has several."""
    ends, usual = end_tokens(lm), lm.tokenizer.eos_token_id
    return [usual] if usual in ends else ends[:1]
