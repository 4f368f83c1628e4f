"""Stage 1: find the prompt tokens that push the model to one answer or the other, and what the
hidden states lose when those tokens are ablated.

For every steering example (a prompt with a preferred and a dispreferred answer) the prompt's
tokens are attributed once; for each --top the k selected tokens are ablated, and the last-position
hidden states of all layers are kept, plain and ablated.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.settings import NO_ATTRIBUTION, AttributionSettings


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, kind)
    flags.add_model(parser)
    flags.add_data(parser)
    flags.add_attribution(parser, top=True)
    flags.add_seed(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_path_meta",
        type=flags.file,
        help="CSV of attributions and log-likelihoods "
        f"(default: results/{kind.name}/token_attribution/...)",
    )
    group.add_argument(
        "--output_path_hidden",
        type=flags.file,
        help="safetensors file of hidden states (default: "
        f"data/{kind.name}/hidden_states/...); with several --top the selection is "
        "put before its ending",
    )
    return parser


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    source, settings = flags.data_settings(args), flags.ablation_settings(args)

    entry.import_libraries()
    from grains import data, runs, splits, stage1

    names = flags.names_of(args)
    attributions = Path(args.output_path_meta or names.attributions())
    states = names.states(settings.tops, args.output_path_hidden)

    examples = [example.pair() for example in splits.steering_examples(source, settings.seed)]
    if len(examples) < source.num_samples:
        entry.say(f"note: {source.num_samples} steering examples asked for, {len(examples)} found")
    keys = map(data.question_key, examples)
    prompt = splits.with_shots(settings.prompt, source, settings.seed, keys)
    settings = replace(settings, prompt=prompt)
    lm = entry.load_model(args)
    entry.say_prompt(lm, settings.prompt)
    if not stage1.run(
        lm, examples, source, settings, attributions, states, args.overwrite, say=entry.say
    ):
        entry.say("nothing to do: these results are already there")
    if runs.processes().is_main_process:
        summary(attributions, states, settings.attribution, settings.top_k)


def summary(
    attributions: Path, states: dict[str, Path], settings: AttributionSettings, top_k: int
) -> None:
    import pandas as pd

    if settings.grad_method == NO_ATTRIBUTION:
        print("nothing was attributed or ablated: for methods that need neither")
        print(f"log-likelihoods: {attributions}")
        print(f"hidden states:   {states['pos']}")
        return
    shown = [
        "id",
        "top",
        "k",
        "f",
        "f_ablated",
        "completeness_error_relative_worst",
        "gradients_computed",
    ]
    table = pd.read_csv(attributions, usecols=shown, converters={"id": str})
    examples = table.drop_duplicates("id")
    if settings.grad_method == "integrated_gradients":
        errors = examples.completeness_error_relative_worst
        above = int((errors > settings.tolerance).sum())
        print(
            f"completeness error |sum a - (f(x) - f(b))| / |f(x) - f(b)|: median "
            f"{errors.median():.1%}, {above} of {len(errors)} examples above "
            f"{settings.tolerance:.0%}; gradients an example: median "
            f"{examples.gradients_computed.median():.0f}"
        )
    short = int((examples.k < top_k).sum())
    if short:
        print(
            f"warning: {short} prompts have fewer candidate tokens than --top_k; all of theirs "
            "were ablated"
        )
    for top, rows in table.groupby("top", sort=False):
        change = (rows.f_ablated - rows.f).mean()
        print(f"ablating top '{top}': mean change of f = log P(y+) - log P(y-): {change:+.3f}")
    print(f"attributions:  {attributions}")
    for top, path in states.items():
        print(f"hidden states: {path} ({top})")


if __name__ == "__main__":
    entry.run(main)
