"""Scores of generations: overlap with the reference answers, false objects, repetition, a judge.

Reads the tables that steering_generation.py or its _vlm twin wrote with the same flags, or the one
that --generations names, and the data set that it is from; scores the base text and every steered
one. No model is needed, but for --judge: a chat model on this machine, or one behind an
OpenAI-compatible interface (--judge_url), which rates every text from 0 to 6, as the judge of
MMHal-Bench does.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from demo import registered  # noqa: F401  the drawn scenes, by their short name
from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.errors import UserError
from grains.settings import EMBEDDED, MODELS

if TYPE_CHECKING:
    import pandas as pd

    from grains.data import Example
    from grains.judge.judges import Judge
    from grains.judge.metrics import Objects
    from grains.settings import DataSettings


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, kind)
    parser.add_argument(
        "--generations",
        type=flags.path,
        metavar="FILE",
        help="table that steering_generation.py or steering_generation_vlm.py wrote "
        "(default: all that they wrote with the flags below)",
    )
    parser.add_argument(
        "--output_dir",
        type=flags.path,
        help="folder of the tables (default: scores/ beside the table)",
    )
    flags.add_overwrite(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name", default=kind.model, help="the model that wrote the texts")
    flags.add_seed(group)
    flags.add_data(
        parser,
        split="split of the questions, or of the steering examples as steering_generation.py had "
        "it (default: the splits of its run; first that of the test questions)",
    )
    flags.add_attribution(parser)
    # Where a table is given, the manifest beside it names the data set.
    parser.set_defaults(dataset_name=None)
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge",
        metavar="MODEL",
        help="chat model that rates the texts: short name ("
        + ", ".join([EMBEDDED, *MODELS])
        + "), hub id or local folder; with --judge_url the name it has there",
    )
    group.add_argument(
        "--judge_url",
        metavar="URL",
        help="OpenAI-compatible interface, such as http://localhost:8000/v1; its "
        "key is read from the environment variable OPENAI_API_KEY",
    )
    group.add_argument(
        "--judge_max_tokens", type=flags.positive, default=256, help="longest answer of the judge"
    )
    flags.add_device(group)
    group.add_argument(
        "--batch_tokens",
        type=flags.positive,
        default=16384,
        help="positions that a local judge computes at a time",
    )
    return parser


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    if args.judge_url and not args.judge:
        raise UserError("--judge_url needs --judge MODEL, the name that the model has there")
    tables = [Path(args.generations)] if args.generations else tables_of(args)

    entry.import_libraries()
    from grains.judge import generations

    sources = {}
    for table in tables:
        written = generations.read(table)
        source = generations.source_of(table, args.dataset_name, args.dataset_path, args.split)
        sources[table] = written, source, *generations.find_examples(written, source, table)
    judge = load_judge(args) if args.judge else None
    for table, parts in sources.items():
        score(table, *parts, args, judge)


def tables_of(args: argparse.Namespace) -> list[Path]:
    """The tables that steering_generation.py wrote with these flags. Raises UserError for none."""
    dataset = args.dataset_name or args.kind.dataset
    names = flags.names_of(args, dataset)
    tables = names.all_generations()
    if not tables and args.split:  # it may be the questions' own, which is in no name
        tables = replace(names, data=replace(names.data, split=None)).all_generations()
    if not tables:
        raise UserError(
            f"no generations of {args.model_name} on {dataset}: run "
            "steering_generation.py with the same model, data and settings of stage 1 first, or "
            "give its table with --generations"
        )
    return tables


def load_judge(args: argparse.Namespace) -> Judge:
    from grains import runs
    from grains.judge import judges

    if args.judge_url:
        return judges.Endpoint(args.judge_url, args.judge, args.judge_max_tokens, entry.say)
    runs.processes()  # of several processes every one takes a device of its own
    lm = entry.load_named(args, args.judge)
    return judges.LocalJudge(lm, args.judge_max_tokens, args.batch_tokens)


def score(
    table: Path,
    written: pd.DataFrame,
    source: DataSettings,
    examples: dict[str, Example],
    objects: Objects,
    args: argparse.Namespace,
    judge: Judge | None,
) -> None:
    """Score a table that was read, with what it is from, and print the summary."""
    import pandas as pd

    from grains import runs
    from grains.judge import generations, judges, scores
    from grains.names import slug

    texts = generations.texts(written)
    asked, groups = [], []
    if judge:
        texts["prompt_of_judge"] = [
            judges.judge_prompt(examples[row.id], row.text) for row in texts.itertuples()
        ]
        asked = list(dict.fromkeys(texts.prompt_of_judge))  # a text written twice is rated once
        groups = judge.groups(asked)

    # Not in the folder of the generations: whatever table is there is taken for one of them.
    folder = Path(args.output_dir or table.parent / "scores")
    stem = table.stem + (f"_{slug(args.judge)}" if judge else "")
    outputs = {kind: folder / f"{stem}_{kind}.csv" for kind in ("scores", "summary")}

    def make(unit: int):
        members = groups[unit]
        answers = judge.ask([asked[i] for i in members])
        return {}, [
            {"prompt": i, "answer": answer} for i, answer in zip(members, answers, strict=True)
        ]

    def write(units) -> None:
        answers = {asked[row["prompt"]]: row["answer"] for _, rows in units() for row in rows}
        scored = scores.score_texts(texts, examples, objects, answers)
        runs.write_table(outputs["scores"], scored)
        runs.write_table(outputs["summary"], scores.summary(scored))

    manifest = generations.manifest(
        table, source, examples, objects, judge and judge.identity, asked
    )
    if not runs.resume(
        [*outputs.values()],
        manifest,
        len(groups),
        make,
        write,
        "judging",
        args.overwrite,
        inputs=[table, source.path],
    ):
        entry.say("nothing to do: these results are already there")
    if runs.processes().is_main_process:
        show(pd.read_csv(outputs["summary"]), scores.MEANINGS)
        if judge:
            rated = pd.read_csv(outputs["scores"]).judge_rating.notna()
            print(
                f"judge: {args.judge}; {(~rated).sum()} of {len(rated)} texts have no rating, "
                "for its answer states none"
            )
        print(f"every text: {outputs['scores']}")
        print(f"summary:    {outputs['summary']}")


def show(table: pd.DataFrame, meanings: dict[str, str]) -> None:
    """Print the summary, a block for each score."""
    from grains.steering import BASE

    for name, rows in table.groupby("score", sort=False):
        print(f"\n{name}: {meanings[name]}")
        print(f"  {'':40}{'mean':>32}{'n':>6}{'against base':>14}{'p':>9}")
        for row in rows.itertuples():
            mean = f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}]"
            against = (
                ""
                if row.configuration == BASE.label
                else f"{row.difference:>+14.3f}{row.p_value:>9.2g}"
            )
            print(f"  {row.configuration:40}{mean:>32}{row.n:>6}{against}")
    print()


if __name__ == "__main__":
    entry.run(main)
