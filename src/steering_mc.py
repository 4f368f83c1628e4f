"""Stage 2: steering vectors from hidden-state shifts, tried on multiple-choice questions.

Every choice is scored by its log-likelihood given the question, by the base model and under every
configuration of a grid (methods x modes x layers x strengths). The configuration is chosen on
validation questions and reported on test questions; the examples that the vectors come from are
in neither.
"""

from __future__ import annotations

import json

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import numpy as np
import pandas as pd
import torch

from grains import cli, prompts, runs, stats
from grains.errors import UserError
from grains.scoring import Configuration, correct, question_batches, score
from grains.vectors import CONTROLS

BASE = Configuration("base", "", (), 0.0)


def main(kind: cli.Kind = cli.LLM) -> None:
    args = cli.evaluation_parser(__doc__, kind).parse_args()
    states = cli.hidden_states_files(args)
    parts = cli.evaluation_parts(args, states)
    lm = cli.load_model(args)
    configurations, made = cli.configurations(args, lm, states)

    asked = [example for examples in parts.values() for example in examples]
    if alone := next((example for example in asked if len(example.choices) < 2), None):
        raise UserError(
            f"example {alone.id} has a single answer: multiple choice needs two; use "
            "steering_generation.py for this data"
        )
    # Thousands of pictures do not fit in memory: a batch's own are opened when it is scored.
    encoded = [
        prompts.encode(lm, example, args.prompt_style).without_picture() for example in asked
    ]
    groups = question_batches(encoded, args.batch_tokens)
    outputs = cli.mc_paths(args)
    manifest = cli.evaluation_manifest(args, "steering_mc", lm, states, parts)
    run = runs.Run(list(outputs.values()), manifest, args.overwrite)
    if run.finished:
        run.state.print("nothing to do: these results are already there")
    else:
        for unit in run.todo(len(groups), "scoring"):
            members = groups[unit]
            batch = [prompts.encode(lm, asked[i], args.prompt_style) for i in members]
            scores = score(lm, batch, configurations, args.batch_tokens)
            run.save(
                unit,
                {
                    str(index): torch.from_numpy(values)
                    for index, values in zip(members, scores, strict=True)
                },
                [],
            )
        if run.all_done():
            scores = {
                int(i): s.numpy()
                for tensors, _ in run.units(len(groups))
                for i, s in tensors.items()
            }
            questions = question_table(parts, encoded, [BASE, *configurations], scores)
            grid = grid_table(questions, [BASE, *configurations], args)
            for path, vectors in made.items():
                vectors.save(path)
            runs.write_table(outputs["questions"], questions)
            runs.write_table(outputs["grid"], grid)
            runs.write_json(outputs["chosen"], chosen(grid, args))
        run.finish()
    if run.state.is_main_process:
        report(pd.read_csv(outputs["grid"], keep_default_na=False), args)
        print(f"all configurations: {outputs['grid']}")
        print(f"every question:     {outputs['questions']}")
        print(f"chosen:             {outputs['chosen']}")
        print(f"steering vectors:   {cli.vectors_dir(args)}")


def question_table(parts, encoded, configurations, scores) -> pd.DataFrame:
    """A row per question and configuration."""
    part_of = [part for part, examples in parts.items() for _ in examples]
    rows = []
    for index, (item, part) in enumerate(zip(encoded, part_of, strict=True)):
        lengths = np.array([len(response) for response in item.responses])
        for configuration, values in zip(configurations, scores[index], strict=True):
            by_sum, margin_sum = correct(values, item.example.label)
            by_token, margin_token = correct(values, item.example.label, lengths)
            rows.append(
                {
                    "configuration": configuration.label,
                    "part": part,
                    "id": item.example.id,
                    "correct_sum": by_sum,
                    "correct_token": by_token,
                    "margin_sum": margin_sum,
                    "margin_token": margin_token,
                    "log_likelihoods": json.dumps(values.round(6).tolist()),
                    "tokens": json.dumps(lengths.tolist()),
                    "label": item.example.label,
                }
            )
    return pd.DataFrame(rows)


def grid_table(questions, configurations, args) -> pd.DataFrame:
    """A row per configuration and part: accuracies with intervals, p-values, margins."""
    rows = []
    tables = dict(list(questions.groupby("configuration", sort=False)))
    base = tables[BASE.label]
    for configuration in configurations:
        table = tables[configuration.label]
        for part in dict.fromkeys(table.part):
            here, there = table[table.part == part], base[base.part == part]
            row = {
                "configuration": configuration.label,
                "method": configuration.method,
                "mode": configuration.mode,
                "layers": " ".join(map(str, configuration.layers)),
                "alpha": configuration.alpha,
                "alpha_units": args.alpha_units,
                "part": part,
                "questions": len(here),
                "includes_steering_examples": args.evaluate_on == "all",
            }
            for kind in ("sum", "token"):
                is_right = here[f"correct_{kind}"].to_numpy(bool)
                was_right = there[f"correct_{kind}"].to_numpy(bool)
                accuracy, low, high = stats.accuracy_interval(is_right)
                row |= {
                    f"accuracy_{kind}": accuracy,
                    f"accuracy_{kind}_low": low,
                    f"accuracy_{kind}_high": high,
                    f"p_value_{kind}": stats.paired_p_value(is_right, was_right),
                    f"margin_{kind}": here[f"margin_{kind}"].mean(),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def chosen(grid: pd.DataFrame, args) -> dict:
    """The configuration with the best validation accuracy; of equal ones the weakest."""
    part = "validation" if args.evaluate_on == "held_out" else "all"
    candidates = grid[(grid.part == part) & ~grid.method.isin(["base", *CONTROLS])]
    best = candidates.sort_values(
        [f"accuracy_{args.score}", "alpha", f"margin_{args.score}"], ascending=[False, True, False]
    ).iloc[0]
    return {
        "configuration": best.configuration,
        "method": best.method,
        "mode": best["mode"],
        "layers": [int(layer) for layer in best.layers.split()],
        "alpha": float(best.alpha),
        "alpha_units": args.alpha_units,
        "chosen_on": part,
        "controls": [method for method in args.methods if method in CONTROLS],
    }


def report(grid: pd.DataFrame, args) -> None:
    """Print base, the chosen configuration and the control on the questions that count."""
    best = chosen(grid, args)
    part = "test" if args.evaluate_on == "held_out" else "all"
    here = grid[grid.part == part]
    same = (here.layers == " ".join(map(str, best["layers"]))) & (here.alpha == best["alpha"])
    lines = {
        "base": here[here.method == "base"],
        "steered (chosen)": here[here.configuration == best["configuration"]],
        **{f"control ({name})": here[same & (here.method == name)] for name in CONTROLS},
    }
    count = int(here.questions.iloc[0])
    if args.evaluate_on == "all":
        print(
            f"\nAll {count} questions, the steering examples included, and the configuration "
            "chosen on them too (the authors' way): no held-out result"
        )
    else:
        print(f"\n{count} test questions; configuration chosen on validation questions")
    print(f"{'':22}{'per-token accuracy':>30}{'p':>8}{'summed accuracy':>30}{'p':>8}")
    for name, rows in lines.items():
        for row in rows.itertuples():
            cells = "".join(
                f"{f'{a:.1%} [{low:.1%}, {high:.1%}]':>30}{p:>8.2g}"
                for a, low, high, p in (
                    (
                        row.accuracy_token,
                        row.accuracy_token_low,
                        row.accuracy_token_high,
                        row.p_value_token,
                    ),
                    (
                        row.accuracy_sum,
                        row.accuracy_sum_low,
                        row.accuracy_sum_high,
                        row.p_value_sum,
                    ),
                )
            )
            print(f"{name:22}{cells}  {row.configuration}")
    print()


if __name__ == "__main__":
    cli.main(main)
