"""Stage 3: free generation, base and steered side by side from the same prompts.

Without --methods, --layer_idxs and --alphas the configuration that steering_mc.py chose is used,
with the random control of the same strength beside it.
"""

from __future__ import annotations

import textwrap

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import pandas as pd

from grains import cli, data, prompts, runs
from grains.generation import decoding_batches, generate

SHOWN = 3


def flags(kind: cli.Kind):
    parser = cli.evaluation_parser(__doc__, kind, chosen_by_default=True)
    group = parser.add_argument_group("generation")
    group.add_argument("--num_prompts", type=cli.positive, default=32, help="test questions used")
    group.add_argument(
        "--generation_style",
        choices=prompts.STYLES,
        help="prompt style (default: chat where the model has a chat template, "
        "otherwise --prompt_style)",
    )
    group.add_argument("--max_new_tokens", type=cli.positive, default=64)
    group.add_argument("--temperature", type=cli.not_negative, default=0.0, help="0: greedy")
    return parser


def main(kind: cli.Kind = cli.LLM) -> None:
    args = flags(kind).parse_args()
    configured = cli.take_chosen_configuration(args)
    states = cli.hidden_states_files(args)
    parts = cli.evaluation_parts(args, states)
    questions = parts["test" if "test" in parts else "all"][: args.num_prompts]
    lm = cli.load_model(args)
    configurations, _ = cli.configurations(args, lm, states)
    style = args.generation_style or ("chat" if lm.tokenizer.chat_template else args.prompt_style)

    encoded = [prompts.encode(lm, example, style) for example in questions]
    groups = decoding_batches(encoded, configurations, args.max_new_tokens, args.batch_tokens)
    output = cli.output_dir(args, "steering_generation") / f"{cli.evaluation_stem(args)}.csv"
    manifest = cli.evaluation_manifest(
        args, "steering_generation", lm, states, {"prompts": questions}
    ) | {
        "generation_style": style,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
    }
    run = runs.Run([output], manifest, args.overwrite)
    if run.finished:
        run.state.print("nothing to do: these results are already there")
    else:
        for unit in run.todo(len(groups), "generating"):
            members = groups[unit]
            texts = generate(
                lm,
                [encoded[i] for i in members],
                configurations,
                args.max_new_tokens,
                args.temperature,
                args.seed + unit,
            )
            run.save(
                unit,
                {},
                [
                    row(i, questions[i], configuration, style, *pair)
                    for configuration, steered in zip(configurations, texts[1:], strict=True)
                    for i, *pair in zip(members, texts[0], steered, strict=True)
                ],
            )
        if run.all_done():
            table = pd.DataFrame([row for _, rows in run.units(len(groups)) for row in rows])
            runs.write_table(output, table.sort_values(["prompt", "configuration"]))
        run.finish()
    if run.state.is_main_process:
        show(pd.read_csv(output, keep_default_na=False))
        if configured:
            print(f"configuration: as chosen in {configured}")
        print(f"generations: {output}")


def row(index: int, example: data.Example, configuration, style, base: str, steered: str) -> dict:
    return {
        "prompt": index,
        "id": example.id,
        "question": example.question,
        "prompt_style": style,
        "configuration": configuration.label,
        "method": configuration.method,
        "alpha": configuration.alpha,
        "base": base,
        "steered": steered,
        "reference": example.chosen,
        "changed": base != steered,
    }


def show(table: pd.DataFrame) -> None:
    """Print the first prompts with what the base and the steered models answer."""
    print()
    for _, answers in list(table.groupby("prompt"))[:SHOWN]:
        print(f"question: {answers.question.iloc[0]}")
        texts = {"base": answers.base.iloc[0]} | dict(
            zip(answers.configuration, answers.steered, strict=True)
        )
        for name, text in texts.items():
            print(textwrap.indent(textwrap.fill(f"{name}: {text!r}", 96), "  "))
        print()


if __name__ == "__main__":
    cli.main(main)
