"""Writes steering pairs in the model's own words, beside those of a data set.

The answers of many data sets are a word or two, while a model answers in sentences; vectors made
from bare answers alone move its free answers little. The file that is written is a data set of its
own (docs/data.md): the pairs as they are, and again as sentences of the model's free answers that
name one of the two answers; with --also so the pairs of further data sets, such as texts that agree
with what the model remembers; and the validation and test questions.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags
from grains.cli.flags import LLM
from grains.errors import UserError

if TYPE_CHECKING:
    from grains.data import Example
    from grains.runs import Unit, Units

GROUP = 16  # pairs that are answered together, and kept when a run is killed


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, LLM)
    flags.add_model(parser)
    flags.add_data(parser)
    flags.add_questions(parser)
    flags.add_seed(parser)
    group = parser.add_argument_group("own words")
    group.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME[=PATH]",
        help="further data sets, whose pairs are added in the model's own words",
    )
    group.add_argument(
        "--num_given",
        type=flags.whole,
        help="pairs that are written as they are, too (default: all); in a mean over gradients one "
        "of bare answers weighs as much as three sentences",
    )
    group.add_argument(
        "--max_new_tokens", type=flags.positive, default=24, help="longest free answer, in tokens"
    )
    group.add_argument(
        "--output_path", type=flags.file, required=True, help="JSON Lines file that is written"
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    source, prompt = flags.data_settings(args), flags.prompt_settings(args)
    sources = [source, *flags.named_sources(source, args.also)]
    output = Path(args.output_path)

    entry.import_libraries()
    from grains import data, manifests, prompts, runs, splits
    from grains.study.own_words import in_own_words

    drawn = [[pair.pair() for pair in splits.steering_examples(of, args.seed)] for of in sources]
    every = [pair for pairs in drawn for pair in pairs]
    given = drawn[0][: args.num_given]
    keys = [data.question_key(pair) for pair in every]
    prompt = splits.with_shots(prompt, source, args.seed, keys)
    shots = [shot.key for shot in prompt.shots]
    evaluated = splits.evaluation_examples(source, args.seed, {"questions": keys}, shots)
    for example in (*every, *chain(*evaluated.values())):
        if example.image is not None or example.turns:
            raise UserError(
                f"example {example.id} has a picture or a conversation: expected questions with "
                "answers in text"
            )
    lm = entry.load_model(args)
    entry.say_prompt(lm, prompt)
    counts = prompts.tally(prompts.encode(lm, pair, prompt) for pair in every)
    manifest = {
        "stage": "own_words",
        "model": manifests.model(lm),
        "data": {
            "names": [of.name for of in sources],
            "given": data.fingerprint(given),
            "pairs": [data.fingerprint(pairs) for pairs in drawn],
            **{split: data.fingerprint(asked) for split, asked in evaluated.items()},
        },
        "settings": manifests.prompt(lm, prompt, counts)
        | {"max_new_tokens": args.max_new_tokens, "batch_tokens": args.batch_tokens},
        "seed": args.seed,
        "versions": runs.versions(),
    }

    groups = [
        (of.name, pairs[begin : begin + GROUP])
        for of, pairs in zip(sources, drawn, strict=True)
        for begin in range(0, len(pairs), GROUP)
    ]

    def make(unit: int) -> Unit:
        name, pairs = groups[unit]
        made = in_own_words(lm, pairs, prompt, args.max_new_tokens, args.batch_tokens)
        return {}, [row(pair, "steering", f" own words {name}") for pair in made]

    def write(units: Units) -> None:
        written = [item for _, rows in units() for item in rows]
        if not written:
            raise UserError(
                f"no free answer of {lm.name} names one answer of a pair and not the other: "
                "expected answers of a few words, which a free answer can name"
            )
        lines = [row(pair, "steering") for pair in given] + written
        lines += [row(asked, split) for split in evaluated for asked in evaluated[split]]
        text = "".join(
            json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in lines
        )
        runs.write_whole(output, lambda path: path.write_text(text, encoding="utf-8"))

    if not runs.resume([output], manifest, len(groups), make, write, "own words", args.overwrite):
        entry.say("nothing to do: the file is already there")
    if runs.processes().is_main_process:
        steering = sum(
            json.loads(line)["split"] == "steering" for line in output.open(encoding="utf-8")
        )
        print(
            f"{steering} steering pairs, {steering - len(given)} of them in the words of "
            f"{lm.name}: {output}"
        )
        print(
            f"next: token_ablation.py --dataset_name own_words --dataset_path {output} "
            f"--split steering --num_samples {steering}; where questions are asked, too: "
            "--validation_split validation --test_split test"
        )


def row(example: Example, split: str, about: str = "") -> dict:
    """A line of the file. about: added to the id."""
    return {
        "id": example.id + about,
        "question": example.question,
        "context": example.context,
        "choices": list(example.choices),
        "label": example.label,
        "split": split,
    }


if __name__ == "__main__":
    entry.run(main)
