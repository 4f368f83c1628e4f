"""Experiment: what steering gains on held-out questions, and what it costs, beside controls.

For every data set and seed, steering, validation and test questions share none. Stage 1 and the
vectors of every method come from the steering questions. Each method is tried at strengths that
raise the perplexity of neutral text by certain amounts; within each perplexity budget, the
configuration that is best on validation is reported on test, and on the test questions of the
other data sets (transfer). Controls go through the same choice: random directions, the ablation of
random tokens, gradients whose chosen and rejected answers are swapped at random. Beside them stand
vectors trained on the same examples, random directions of their length, and LoRA.

Costs are the rise of perplexity on prose, on other kinds of text and on the model's own free
answers, and the accuracy lost on unrelated questions. Passages are split into train, validation
and test; costs are reported on test only.

Methods may also be "gated": they steer only where hidden states look like those of the steering
examples. Trained vectors always are, and so are the random directions of their length.
"""

from __future__ import annotations

import argparse

from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.names import ExperimentNames
from grains.settings import (
    LORA_OBJECTIVES,
    METHODS,
    MODES,
    OWN_ANSWERS,
    STUDY_GRID,
    STUDY_SEEDS,
    StudySettings,
    selections,
)

CONTENTS = {"grid": "every configuration", "front": "gain and cost", "generations": "free answers"}


def parser(kind: Kind, description: str | None = __doc__) -> argparse.ArgumentParser:
    parser = flags.parser(description, kind)
    flags.add_model(parser)
    flags.add_data(parser)
    flags.add_attribution(parser)
    flags.add_grid(parser)
    flags.add_positions(parser)
    flags.add_evaluation(parser)
    parser.set_defaults(methods=[*STUDY_GRID.methods], alphas=None)
    group = parser.add_argument_group("experiment")
    group.add_argument(
        "--datasets",
        nargs="+",
        metavar="NAME[=PATH]",
        help="several data sets, in place of --dataset_name and --dataset_path",
    )
    group.add_argument(
        "--seeds",
        nargs="+",
        type=flags.whole,
        default=[*STUDY_SEEDS],
        help="each draws its own steering, validation and test questions",
    )
    group.add_argument(
        "--max_ppl_increase",
        nargs="+",
        type=flags.positive_float,
        default=[*StudySettings.budgets],
        help="perplexity budgets: how much the perplexity of neutral text may rise",
    )
    group.add_argument(
        "--strengths_at",
        nargs="+",
        type=flags.positive_float,
        help="without --alphas: the rises of perplexity whose strengths are searched (default: "
        "every second budget); trained vectors and LoRA are tried at fixed multiples of their "
        "length instead",
    )
    group.add_argument(
        "--max_unrelated_loss",
        type=flags.not_negative,
        default=StudySettings.max_unrelated_loss,
        help="accuracy that may be lost on unrelated questions; results are given under three "
        "constraints: none; this one; also the same perplexity budget on the base model's own "
        "answers",
    )
    group.add_argument(
        "--gated",
        nargs="*",
        choices=METHODS,
        metavar="METHOD",
        help="those of --methods that are also tried behind a gate, which lets them steer only "
        "where hidden states look like those of the steering examples (default: none)",
    )
    group.add_argument(
        "--train_vectors",
        action=argparse.BooleanOptionalAction,
        default=StudySettings.train_vectors,
        help="also train one vector a layer on the same examples, behind the gate, with penalties "
        "for changing other text, unrelated questions and the model's own answers",
    )
    group.add_argument(
        "--own_answers",
        default=StudySettings.own_answers,
        choices=OWN_ANSWERS,
        help="whether trained vectors may change what the model itself answers, or are trained to "
        "keep it: less is gained, at a cost that can be deployed",
    )
    group.add_argument(
        "--lora",
        default=StudySettings.lora,
        choices=("none", *LORA_OBJECTIVES),
        help="also train LoRA on the same examples",
    )
    group.add_argument(
        "--num_generations",
        type=flags.positive,
        default=StudySettings.num_generations,
        help="questions answered freely, on validation and on test",
    )
    group.add_argument(
        "--max_new_tokens",
        type=flags.positive,
        default=StudySettings.max_new_tokens,
        help="longest free answer, in tokens",
    )
    group.add_argument(
        "--document", type=flags.file, help="Markdown file that the tables are also written into"
    )
    return parser


def study_settings(args: argparse.Namespace) -> StudySettings:
    source = flags.data_settings(args)
    sources = flags.named_sources(source, args.datasets) if args.datasets else [source]
    return StudySettings(
        tuple(sources),
        tuple(dict.fromkeys(args.seeds)),
        flags.ablation_settings(args, selections(METHODS, MODES)),
        flags.grid_settings(args),
        tuple(args.max_ppl_increase),
        tuple(args.strengths_at or ()),
        args.max_unrelated_loss,
        tuple(args.gated or ()),
        args.train_vectors,
        args.own_answers,
        args.lora,
        args.num_generations,
        args.max_new_tokens,
    )


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    settings = study_settings(args)

    entry.import_libraries()
    from grains import runs
    from grains.cli.documents import check_document, print_tables
    from grains.generation import check_limit
    from grains.study import pareto, protocol

    names = ExperimentNames(
        kind.name, args.model_name, settings, args.output_dir, args.steering_vectors_dir
    )
    check_document(args.document)
    lm = entry.load_model(args)
    check_limit(lm, args.max_new_tokens)
    entry.say_prompt(lm, settings.ablation.prompt)
    front = protocol.run(lm, settings, names, args.overwrite, say=entry.say)
    if runs.processes().is_main_process:
        files = {CONTENTS[name]: path for name, path in names.tables().items()}
        print_tables(args.document, names.stem, pareto.summaries(front), files)


if __name__ == "__main__":
    entry.run(main)
