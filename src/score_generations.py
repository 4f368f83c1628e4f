"""Scores of generations: overlap with the reference answers, false objects, repetition, a judge.

Reads a table of steering_generation.py or its _vlm twin and the data set that it is from, and
scores the base text and every steered one. No model is needed, but for --judge: a chat model on
this machine, or one behind an OpenAI-compatible interface (--judge_url), which rates every text
from 0 to 6, as the judge of MMHal-Bench does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import numpy as np
import pandas as pd

from grains import cli, costs, data, judging, models, runs, stats
from grains.data import Example
from grains.errors import UserError

TEXT = ("id", "question", "configuration", "method", "base", "steered", "reference")
COLUMNS = ("prompt", *TEXT, "alpha")
MEANINGS = {
    "f1": "words shared with a right answer, 0 to 1 (SQuAD's F1)",
    "f1_margin": "f1, minus that with a wrong answer",
    "object_hallucination": "share of the objects named that are not in the picture",
    "text_hallucination": "share of the texts that name such an object",
    "repetition": "share of three-word sequences that occurred before in the text",
    "words": "length of the text",
    "judge_rating": "0 to 6, by the judge",
    "judge_hallucination": f"share of the texts that it rates below {judging.HALLUCINATION_BELOW}",
}


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument(
        "--generations",
        type=Path,
        required=True,
        metavar="FILE",
        help="table that steering_generation.py or steering_generation_vlm.py wrote",
    )
    parser.add_argument(
        "--dataset_name",
        help="short name (" + ", ".join(data.DATASETS) + "), or "
        "any label together with --dataset_path (default: as in the manifest "
        "beside the table)",
    )
    parser.add_argument("--dataset_path", help="local file or folder (default: likewise)")
    parser.add_argument(
        "--split",
        help="split of the questions (default: the data set's for test "
        "questions, and the others where some are not in it)",
    )
    parser.add_argument(
        "--output_dir", type=Path, help="folder of the tables (default: scores/ beside the table)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="do a run anew whose outputs exist from other settings",
    )
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge",
        metavar="MODEL",
        help="chat model that rates the texts: short name ("
        + ", ".join([models.EMBEDDED, *models.MODELS])
        + "), hub id or local "
        "folder; with --judge_url the name it has there",
    )
    group.add_argument(
        "--judge_url",
        metavar="URL",
        help="OpenAI-compatible interface, such as http://localhost:8000/v1; its "
        "key is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument(
        "--judge_max_tokens", type=cli.positive, default=256, help="longest answer of the judge"
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *models.DTYPES],
        help="auto: the checkpoint's on an accelerator, float32 on a CPU",
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the accelerator if any)")
    group.add_argument(
        "--device_map", choices=["auto"], help="auto: spread the layers over all devices"
    )
    group.add_argument(
        "--batch_tokens",
        type=cli.positive,
        default=16384,
        help="positions that a local judge computes at a time",
    )
    return parser


def main() -> None:
    args = flags().parse_args()
    if args.judge_url and not args.judge:
        raise UserError("--judge_url needs --judge MODEL, the name that the model has there")
    generations = read_generations(args.generations)
    take_data_set(args)
    examples, objects = find_examples(generations, args)
    texts = list_texts(generations)
    judge, prompts, groups = None, [], []
    if args.judge:
        judge = judging.load_judge(
            args.judge,
            args.judge_url,
            args.judge_max_tokens,
            args.batch_tokens,
            args.dtype,
            args.device,
            args.device_map,
        )
        texts["prompt_of_judge"] = [
            judging.judge_prompt(examples[row.id], row.text) for row in texts.itertuples()
        ]
        prompts = list(dict.fromkeys(texts.prompt_of_judge))  # what is written twice, asked once
        groups = judge.groups(prompts)
    outputs = output_paths(args)
    manifest = manifest_of(args, examples, objects, judge, prompts)
    run = runs.Run(list(outputs.values()), manifest, args.overwrite)
    if run.finished:
        run.state.print("nothing to do: these results are already there")
    else:
        if judge:
            for unit in run.todo(len(groups), "judging"):
                answers = judge.ask([prompts[i] for i in groups[unit]])
                run.save(
                    unit,
                    {},
                    [
                        {"prompt": i, "answer": answer}
                        for i, answer in zip(groups[unit], answers, strict=True)
                    ],
                )
        if run.all_done():
            answers = {
                prompts[row["prompt"]]: row["answer"]
                for _, rows in run.units(len(groups))
                for row in rows
            }
            scores = score_texts(texts, examples, objects, answers)
            runs.write_table(outputs["scores"], scores)
            runs.write_table(outputs["summary"], summary(scores))
        run.finish()
    if run.state.is_main_process:
        show(pd.read_csv(outputs["summary"]))
        if judge:
            rated = pd.read_csv(outputs["scores"]).judge_rating.notna()
            print(
                f"judge: {args.judge}; {(~rated).sum()} of {len(rated)} texts have no rating, "
                "for its answer states none"
            )
        print(f"every text: {outputs['scores']}")
        print(f"summary:    {outputs['summary']}")


# --- what was generated, from what ---


def read_generations(path: Path) -> pd.DataFrame:
    """The table, a row per prompt and configuration.

    Raises UserError if it cannot be read, or is not what steering_generation.py writes.
    """
    expected = "give a table that steering_generation.py or steering_generation_vlm.py wrote"
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXT, str), keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"'{path}' cannot be read as a CSV ({str(error).splitlines()[0]}); {expected}"
        ) from error
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise UserError(
            f"'{path}': column{'s' * (len(missing) > 1)} {', '.join(missing)} missing, "
            f"found {', '.join(table.columns)}; {expected}"
        )
    if not len(table):
        raise UserError(f"'{path}' has no rows; {expected}")
    if table.duplicated(["prompt", "configuration"]).any() or table.groupby("prompt")[
        ["id", "base"]
    ].nunique().gt(1).any(axis=None):
        raise UserError(
            f"'{path}' holds several runs: a prompt has more than one base text, or a "
            "configuration twice; give the table of one run"
        )
    return table


def take_data_set(args) -> None:
    """Fill in the data set that the manifest beside the table names, where no flag does."""
    path = args.generations.with_suffix(".manifest.json")
    if args.dataset_name is None:
        known = runs.read_json(path).get("data", {}) if path.is_file() else {}
        if "name" not in known:
            raise UserError(
                f"no manifest '{path}' says which data set the generations are from: "
                "give --dataset_name (and --dataset_path)"
            )
        args.dataset_name = known["name"]
        args.dataset_path = args.dataset_path or known.get("path")


def find_examples(generations: pd.DataFrame, args) -> tuple[dict[str, Example], judging.Objects]:
    """The examples by their ids, and all objects that are in the pictures of their splits."""
    wanted = set(generations.id)
    found: dict[str, Example] = {}
    names: set[str] = set()
    for part in [0] if args.split else [2, 1, 0]:
        rows, source = cli.load_split(args, part)
        for index in range(len(rows)):
            example = data.read(rows, source, index)
            names.update(example.objects or ())
            if example.id in wanted:
                # Whether there is a picture counts here; its bytes need not stay in memory.
                image = None if example.image is None else data.StoredPicture(rows, index)
                found.setdefault(example.id, replace(example, image=image))
        if len(found) == len(wanted):
            break
    missing = sorted(wanted - set(found))
    advice = "give --dataset_name, --dataset_path and --split as they were for the generations"
    if missing:
        raise UserError(
            f"{len(missing)} of {len(wanted)} examples of '{args.generations}' are not "
            f"in data set '{args.dataset_name}' ({', '.join(missing[:3])}); {advice}"
        )
    for row in generations.itertuples():
        example = found[row.id]
        if _plain(row.question) != _plain(example.question) or _plain(row.reference) != _plain(
            example.chosen
        ):
            raise UserError(
                f"example {row.id} of '{args.generations}' has another question or "
                f"answer in data set '{args.dataset_name}'; {advice}"
            )
    return found, judging.Objects(names)


def _plain(text: str) -> str:
    return " ".join(text.split())


def list_texts(generations: pd.DataFrame) -> pd.DataFrame:
    """A row per prompt and configuration, the base first."""
    base = generations.drop_duplicates("prompt").assign(
        configuration="base", method="base", alpha=0.0, text=lambda table: table.base
    )
    steered = generations.assign(text=generations.steered)
    return pd.concat([base, steered], ignore_index=True)[
        ["prompt", "id", "configuration", "method", "alpha", "text"]
    ]


def output_paths(args) -> dict[str, Path]:
    """Not in the folder of the generations: whatever table is there is taken for one of them."""
    folder = args.output_dir or args.generations.parent / "scores"
    stem = args.generations.stem + (f"_{runs.slug(args.judge)}" if args.judge else "")
    return {kind: folder / f"{stem}_{kind}.csv" for kind in ("scores", "summary")}


def manifest_of(
    args, examples: dict[str, Example], objects: judging.Objects, judge, prompts: list[str]
) -> dict:
    """What the scores depend on."""
    beside = args.generations.with_suffix(".manifest.json")
    known = [[example.references, example.objects] for example in examples.values()]
    return {
        "stage": "score_generations",
        "generations": {
            "file": args.generations.name,
            "sha256": hashlib.sha256(args.generations.read_bytes()).hexdigest(),
        },
        "model": runs.read_json(beside).get("model") if beside.is_file() else None,
        "data": {
            "name": args.dataset_name,
            "path": args.dataset_path,
            "split": args.split,
            "fingerprint": data.fingerprint(list(examples.values())),
            "known": digest([known, objects.forms]),
        },
        "judge": judge and judge.identity | {"prompts": digest(prompts)},
        "versions": runs.versions(),
    }


def digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# --- scores ---


def score_texts(
    texts: pd.DataFrame,
    examples: dict[str, Example],
    objects: judging.Objects,
    answers: dict[str, str],
) -> pd.DataFrame:
    """A row per text with its scores; NaN where there is none.

    answers: of the judge, by its prompts. Columns of objects or of a judge are there if those are.
    """
    rows = []
    for row in texts.itertuples():
        example = examples[row.id]
        f1, margin = judging.overlap(example, row.text)
        scores = {"f1": f1}
        if len(example.choices) > 1:
            scores["f1_margin"] = margin
        if example.objects is not None:
            named, false = objects.count(row.text, example.objects)
            scores |= {
                "objects_named": named,
                "objects_false": false,
                "text_hallucination": float(false > 0),
            }
        scores |= {"repetition": costs.repetition(row.text), "words": len(row.text.split())}
        if answers:
            answer = answers[row.prompt_of_judge]
            rating = judging.rating(answer)
            below = float(rating < judging.HALLUCINATION_BELOW)
            scores |= {
                "judge_rating": rating,
                "judge_answer": answer,
                "judge_hallucination": np.nan if np.isnan(rating) else below,
            }
        rows.append(
            {
                "prompt": row.prompt,
                "id": row.id,
                "configuration": row.configuration,
                "method": row.method,
                "alpha": row.alpha,
                **scores,
                "text": row.text,
            }
        )
    return pd.DataFrame(rows)


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """A row per score and configuration.

    mean over n texts, with a bootstrap interval; difference: of the texts that have the score from
    the base's to the same prompts (pairs of them), with a bootstrap interval and the p-value of a
    paired permutation test.
    """
    parts = {
        name: table.set_index("prompt")
        for name, table in scores.groupby("configuration", sort=False)
    }
    rows = []
    for score in MEANINGS:
        if score not in scores and not (
            score == "object_hallucination" and "objects_named" in scores
        ):
            continue
        values = {name: values_of(table, score) for name, table in parts.items()}
        for name, table in parts.items():
            here = values[name].dropna().to_numpy()
            low, high = stats.bootstrap_interval(here)
            row = {
                "score": score,
                "configuration": name,
                "method": table.method.iloc[0],
                "alpha": table.alpha.iloc[0],
                "n": len(here),
                "mean": here.mean() if len(here) else np.nan,
                "low": low,
                "high": high,
            }
            if name != "base":
                gains = (values[name] - values["base"]).dropna().to_numpy()
                low, high = stats.bootstrap_interval(gains)
                row |= {
                    "pairs": len(gains),
                    "difference": gains.mean() if len(gains) else np.nan,
                    "difference_low": low,
                    "difference_high": high,
                    "p_value": stats.sign_flip_p_value(gains) if len(gains) else np.nan,
                }
            rows.append(row)
    return pd.DataFrame(rows)


def values_of(table: pd.DataFrame, score: str) -> pd.Series:
    """A value per text whose mean is the score of a configuration.

    The share of false objects is that of all objects named, in whatever text (CHAIR's): a ratio of
    two sums. Its value per text is the share, plus the text's own part in it to first order.
    """
    if score != "object_hallucination":
        return table[score].astype(float)
    false, named = table.objects_false.astype(float), table.objects_named.astype(float)
    if not named.sum():
        return named * np.nan
    share = false.sum() / named.sum()
    return share + (false - share * named) / named.mean()


def show(table: pd.DataFrame) -> None:
    for score, rows in table.groupby("score", sort=False):
        print(f"\n{score}: {MEANINGS[score]}")
        print(f"  {'':40}{'mean':>32}{'n':>6}{'against base':>14}{'p':>9}")
        for row in rows.itertuples():
            mean = f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"
            against = (
                ""
                if row.configuration == "base"
                else (f"{row.difference:>+14.3f}{row.p_value:>9.2g}")
            )
            print(f"  {row.configuration:40}{mean:>32}{row.n:>6}{against}")
    print()


if __name__ == "__main__":
    cli.main(main)
