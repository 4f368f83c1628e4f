"""Any task of lm-eval, base and steered side by side: does steering hurt other abilities?

The steered model keeps the norm and its gates, as everywhere here. The tasks' own data come from
the hub, or with --include_path from a folder of task files with local data, without a network.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grains.cli import entry, flags
from grains.cli.flags import LLM
from grains.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, LLM)
    flags.add_model(parser)
    group = parser.add_argument_group("steering")
    flags.add_vectors(group)
    group.add_argument(
        "--alphas", nargs="+", type=flags.finite, required=True, help="strengths to try"
    )
    group = parser.add_argument_group("tasks")
    group.add_argument("--tasks", nargs="+", required=True, help="lm-eval's names, such as mmlu")
    group.add_argument("--include_path", type=flags.path, help="folder of task files of your own")
    group.add_argument("--limit", type=flags.positive, help="examples of each task (default: all)")
    group.add_argument(
        "--num_fewshot", type=int, help="examples in the prompt (default: the task's)"
    )
    group.add_argument("--apply_chat_template", action="store_true", help="prompts as a chat")
    group.add_argument("--batch_size", type=flags.positive, default=1, help="requests at a time")
    flags.add_seed(group)
    group.add_argument(
        "--output",
        type=flags.file,
        help="table (default: results/llm/harness/<vectors>_<tasks>.csv); every example goes into "
        "a table beside it",
    )
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError("num_fewshot: expected 0 or more")

    entry.import_libraries()
    from grains import names
    from grains.export import harness, plan
    from grains.steering import BASE, SteeringVectors

    vectors = SteeringVectors.load(args.vectors)
    harness.tasks(args.tasks, args.include_path)
    lm = entry.load_model(args)
    plans = [
        # What holds everything: norm and gates.
        plan.make(lm, vectors, "hf", alpha, args.layers, args.alpha_units)
        for alpha in dict.fromkeys(args.alphas)
    ]
    own = names.stem([Path(args.vectors).stem, "+".join(args.tasks)])
    output = Path(args.output or Path("results", "llm", "harness", f"{own}.csv"))
    table, computed = harness.run(
        lm,
        plans,
        [*dict.fromkeys(args.tasks)],
        output,
        args.include_path,
        args.overwrite,
        limit=args.limit,
        shots=args.num_fewshot,
        chat=args.apply_chat_template,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    if not computed:
        entry.say("nothing to do: these results are already there")
    for row in table.itertuples():
        change = (
            ""
            if row.configuration == BASE.label
            else (f"{row.change:+.3f} [{row.change_low:+.3f}, {row.change_high:+.3f}]")
        )
        name = f"{row.task} {row.metric} ({row.filter})"
        print(f"{name:40} {row.value:8.3f} {change:28} {row.seconds:8.1f} s  {row.configuration}")
    print(f"table: {output}")


if __name__ == "__main__":
    entry.run(main)
