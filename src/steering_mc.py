"""Stage 2: steering vectors from hidden-state shifts, tried on multiple-choice questions.

Every choice is scored by its log-likelihood given the question, by the base model and under every
configuration of a grid (methods x modes x layers x strengths). The configuration is chosen on
validation questions and reported on test questions; the examples that the vectors come from are
in neither.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.errors import UserError
from grains.settings import CONTROLS, SCORE_TITLES, SCORES, TARGET_SCORES, GridSettings

if TYPE_CHECKING:
    import pandas as pd

SCORED = SCORES[::-1]  # the order of the columns
ROW = (
    "configuration",
    "method",
    "mode",
    "layers",
    "alpha",
    "alpha_units",
    "part",
    "questions",
    "includes_steering_examples",
)
PER_SCORE = ("accuracy_{}", "accuracy_{}_low", "accuracy_{}_high", "p_value_{}", "margin_{}")
COLUMNS = [*ROW, *(name.format(score) for score in SCORED for name in PER_SCORE)]


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = flags.evaluation_parser(__doc__, kind)
    flags.add_score(parser)
    return parser


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    if not set(args.methods) - {*CONTROLS}:
        raise UserError(
            f"--methods {' '.join(args.methods)}: all are controls, of which none is chosen; add a "
            "method that is none"
        )
    source, settings = flags.data_settings(args), flags.ablation_settings(args, ("pos",))
    grid = flags.grid_settings(args)

    entry.import_libraries()
    import torch

    from grains import manifests, prompts, runs, tables
    from grains.cli import stages
    from grains.scoring import margins, question_batches, score, target_scores
    from grains.steering import BASE
    from grains.study import costs, gates

    budget = args.max_ppl_increase
    outputs = flags.names_of(args).multiple_choice(
        grid, flags.GRID, args.score, args.output_dir, budget
    )
    states = stages.states_files(args, grid)
    settings, examples = stages.questions(source, settings, states["pos"])
    lm = entry.load_model(args)
    entry.say_prompt(lm, settings.prompt)
    stages.say_other_prompts(states["pos"], settings.prompt)
    configurations, made = stages.configurations(args, lm, grid, states, gates.around)

    asked = [example for questions in examples.values() for example in questions]
    if alone := next((example for example in asked if len(example.choices) < 2), None):
        raise UserError(
            f"example {alone.id} has a single answer: multiple choice needs two; use "
            "steering_generation.py for this data"
        )
    # Thousands of pictures do not fit in memory: a batch's own are opened when it is scored.
    encoded = [prompts.encode(lm, e, settings.prompt).without_picture() for e in asked]
    counts = prompts.tally(encoded)
    for line in prompts.notes(counts):
        entry.say(line)
    columns = COLUMNS
    if all(example.targets for example in asked):
        columns = [*COLUMNS, *(name.format(s) for s in TARGET_SCORES for name in PER_SCORE)]
    elif unknown := [score for score in args.scores or () if score in TARGET_SCORES]:
        raise UserError(
            f"score {unknown[0]} needs to know every right choice (columns mc1_targets and "
            f"mc2_targets), which data set '{source.name}' does not say: use score token or sum"
        )
    groups = question_batches(encoded, settings.batch_tokens)
    # Beside the questions, the passages by which the budget is measured.
    passages = [] if budget is None else costs.passages(lm, "validation")
    groups += [
        [len(asked) + index for index in members]
        for members in question_batches(passages, settings.batch_tokens)
    ]
    split_of = [split for split, questions in examples.items() for _ in questions]

    def make(unit: int) -> runs.Unit:
        members = groups[unit]
        batch = [
            prompts.encode(lm, asked[i], settings.prompt)
            if i < len(asked)
            else passages[i - len(asked)]
            for i in members
        ]
        scores = score(lm, batch, configurations, settings.batch_tokens)
        return {
            str(index): torch.from_numpy(values)
            for index, values in zip(members, scores, strict=True)
        }, []

    def write(units: runs.Units) -> None:
        import pandas as pd  # takes long, and only the end of a run needs it

        scores = {int(i): s.numpy() for tensors, _ in units() for i, s in tensors.items()}
        scored = [scores[index] for index in range(len(encoded))]
        read = [scores[len(encoded) + index] for index in range(len(passages))]
        every = [BASE, *configurations]
        questions = tables.question_table(split_of, encoded, every, scored)
        accuracies = []
        for split in examples:
            own = [index for index, name in enumerate(split_of) if name == split]
            leads = margins([encoded[i] for i in own], [scored[i] for i in own])
            targets = target_scores([encoded[i] for i in own], [scored[i] for i in own])
            accuracies.append(tables.accuracy_table(every, leads, targets).assign(part=split))
        # The splits of one configuration stand below each other.
        table = (
            pd.concat(accuracies)
            .sort_index(kind="stable")
            .assign(alpha_units=grid.units, includes_steering_examples=source.evaluate_on == "all")[
                columns
            ]
        )
        if budget is not None:
            labels = [configuration.label for configuration in every]
            increase = dict(zip(labels, costs.perplexity_rise(passages, read), strict=True))
            table["perplexity_increase"] = table.configuration.map(increase)
        runs.write_table(outputs["questions"], questions)
        runs.write_table(outputs["grid"], table)
        runs.write_json(outputs["chosen"], chosen(table, grid, args.score, budget))

    manifest = manifests.evaluation(
        "steering_mc", lm, states["pos"], source, settings, grid, examples, counts
    )
    manifest["flags"]["score"] = args.score
    if budget is not None:
        manifest["flags"]["max_ppl_increase"] = budget
    if not runs.resume(
        [*outputs.values()],
        manifest,
        len(groups),
        make,
        write,
        "scoring",
        args.overwrite,
        inputs=[source.path, *(file.path for file in states.values())],
        shared={path: vectors.content() for path, vectors in made.items()},
    ):
        entry.say("nothing to do: these results are already there")
    if runs.processes().is_main_process:
        report(outputs["grid"], grid, args.score, budget, args.scores)
        print(f"all configurations: {outputs['grid']}")
        print(f"every question:     {outputs['questions']}")
        print(f"chosen:             {outputs['chosen']}")
        print(f"steering vectors:   {next(iter(made)).parent}")


def chosen(
    table: pd.DataFrame, grid: GridSettings, score: str, budget: float | None = None
) -> dict:
    """The configuration with the best validation accuracy; of equal ones the weakest.

    budget: how much it may raise the perplexity of prose, if that was measured.
    Raises UserError if every configuration raises it more.
    """
    from grains.steering import BASE

    split = "all" if "all" in set(table.part) else "validation"
    candidates = table[(table.part == split) & ~table.method.isin([BASE.method, *CONTROLS])]
    if budget is not None:
        least = candidates.perplexity_increase.min()
        candidates = candidates[candidates.perplexity_increase <= budget]
        if candidates.empty:
            raise UserError(
                f"every configuration raises the perplexity of prose by {least:.1%} or more, "
                f"expected at most {budget:.1%}: give smaller alphas or a larger max_ppl_increase"
            )
    best = (
        candidates.assign(strength=candidates.alpha.abs())
        .sort_values(
            [f"accuracy_{score}", "strength", f"margin_{score}"], ascending=[False, True, False]
        )
        .iloc[0]
    )
    return {
        "configuration": best.configuration,
        "method": best.method,
        "mode": best["mode"].removesuffix("gated").strip(),
        "layers": [int(layer) for layer in best.layers.split()],
        "alpha": float(best.alpha),
        "alpha_units": grid.units,
        **({"positions": grid.positions} if grid.positions != "all" else {}),
        **({"gate": True} if grid.gate else {}),
        "chosen_on": split,
        "controls": [method for method in grid.methods if method in CONTROLS],
    }


def report(
    path: Path,
    grid: GridSettings,
    score: str,
    budget: float | None = None,
    scores: Sequence[str] | None = None,
) -> None:
    """Print base, the chosen configuration and the control on the questions that count.

    path: of the grid. score: the one that chooses. scores: those that are printed; None: all that
    the table has.
    """
    import pandas as pd

    from grains.steering import BASE

    table = pd.read_csv(path, keep_default_na=False)
    best = chosen(table, grid, score, budget)
    split = "all" if best["chosen_on"] == "all" else "test"
    rows = table[table.part == split]
    same = (rows.layers == " ".join(map(str, best["layers"]))) & (rows.alpha == best["alpha"])
    lines = {
        BASE.label: rows[rows.method == BASE.method],
        "steered (chosen)": rows[rows.configuration == best["configuration"]],
        **{f"control ({name})": rows[same & (rows.method == name)] for name in CONTROLS},
    }
    count = int(rows.questions.iloc[0])
    if split == "all":
        print(
            f"\nAll {count} questions, the steering examples included, and the configuration "
            "chosen on them too (the authors' way): no held-out result"
        )
    else:
        print(f"\n{count} test questions; configuration chosen on validation questions")
    titles = {score: f"{title} accuracy" for score, title in SCORE_TITLES.items()}
    titles |= {score: score.upper() for score in TARGET_SCORES}
    shown = scores or [score for score in titles if f"accuracy_{score}" in table.columns]
    print(f"{'':22}" + "".join(f"{titles[score]:>30}{'p':>8}" for score in shown))
    for name, part in lines.items():
        for row in part.itertuples():
            cells = "".join(
                f"{f'{a:.1%} [{low:.1%}, {high:.1%}]':>30}{p:>8.2g}"
                for a, low, high, p in (
                    (
                        getattr(row, f"accuracy_{score}"),
                        getattr(row, f"accuracy_{score}_low"),
                        getattr(row, f"accuracy_{score}_high"),
                        getattr(row, f"p_value_{score}"),
                    )
                    for score in shown
                )
            )
            print(f"{name:22}{cells}  {row.configuration}")
    print()


if __name__ == "__main__":
    entry.run(main)
