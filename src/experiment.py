"""Experiment: what steering gains on held-out questions, at what price, beside controls.

For every data set and seed: steering, validation and test questions that share none; stage 1 on the
steering examples; the vectors of every method at a grid of strengths. Gain and price (perplexity of
neutral text, accuracy on unrelated questions) are measured on validation; for every price allowed
the best configuration of each method is taken, and reported on test questions, and on those of the
other data sets (transfer). Controls go through the same choice: random directions, the ablation of
random tokens, gradients whose chosen and rejected answers are swapped at random.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

if __name__ == "__main__":
    from grains import ctrl_c

    ctrl_c.begin_imports()

import numpy as np
import pandas as pd
import torch

import token_ablation
from grains import cli, costs, data, prompts, runs, stats
from grains.errors import UserError
from grains.prompts import Encoded
from grains.scoring import Configuration, batches, rights, score
from grains.vectors import CONTROLS, METHODS, StatesFile

SCORES = ("token", "sum")
BUDGETS = [0.02, 0.05, 0.1, 0.25, 1.0]
STRENGTHS = [0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05]


def flags(kind: cli.Kind):
    parser = cli.parser(__doc__, kind)
    cli.add_model_flags(parser)
    cli.add_data_flags(parser)
    cli.add_stage1_flags(parser)
    cli.add_vector_flags(parser)
    cli.add_grid_flags(parser)
    cli.add_evaluation_flags(parser)
    parser.set_defaults(methods=[*METHODS], mode=["pos", "both"], alphas=STRENGTHS)
    group = parser.add_argument_group("experiment")
    group.add_argument("--datasets", nargs="+", metavar="NAME[=PATH]",
                       help="several data sets, in place of --dataset_name and --dataset_path")
    group.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                       help="each draws its own steering, validation and test questions")
    group.add_argument("--max_ppl_increase", nargs="+", type=cli.not_negative, default=BUDGETS,
                       help="prices allowed: how much the perplexity of neutral text may rise")
    group.add_argument("--max_unrelated_loss", type=cli.not_negative, default=0.02,
                       help="accuracy on unrelated questions that may be lost")
    return parser


def main(kind: cli.Kind = cli.LLM) -> None:
    args = flags(kind).parse_args()
    named = args.datasets or [args.dataset_name + (f"={args.dataset_path}" if args.dataset_path
                                                   else "")]
    datasets = dict((*name.split("=", 1), None)[:2] for name in named)
    lm = cli.load_model(args)
    stem = "_".join(["+".join(map(runs.slug, datasets)), runs.slug(args.model_name),
                     f"n{args.num_samples}", f"k{args.top_k}"])
    folder = cli.output_dir(args, "experiment")
    args.parts_dir = folder / f"{stem}_parts"
    args.steering_vectors_dir = args.steering_vectors_dir or args.parts_dir
    grids, answers = [], []
    for seed in args.seeds:
        studies = [study(lm, kind, args, name, path, seed) for name, path in datasets.items()]
        for one in studies:
            validated = validate(lm, one, args)
            chosen = choose(validated, args)
            tested = [test(lm, one, other, chosen, args) for other in studies]
            grids += [validated, *(table for table, _ in tested)]
            answers += [(chosen, table) for _, table in tested]
    if not runs.processes().is_main_process:
        return
    grid, table = pd.concat(grids), front(answers)
    runs.write_table(folder / f"{stem}_grid.csv", grid)
    runs.write_table(folder / f"{stem}_front.csv", table)
    report(table, args)
    print(f"every configuration: {folder / f'{stem}_grid.csv'}")
    print(f"gain over price:     {folder / f'{stem}_front.csv'}")


@dataclass(frozen=True)
class Study:
    """One data set with one seed: its questions, and the configurations made from its examples."""

    dataset: str
    seed: int
    parts: dict[str, list[data.Example]]
    configurations: list[Configuration]
    manifest: dict


def study(lm, kind, args, name: str, path: str | None, seed: int) -> Study:
    """Do stage 1 and make the vectors of one data set and seed."""
    words = [f"--{flag}={value}" for flag, value in (
        ("model_name", args.model_name), ("dataset_name", name), ("num_samples", args.num_samples),
        ("prompt_style", args.prompt_style), ("attribution", args.attribution),
        ("grad_method", args.grad_method), ("top_k", args.top_k), ("seed", seed),
        ("batch_tokens", args.batch_tokens),
        ("output_path_meta", args.parts_dir / f"{name}_seed{seed}.csv"),
        ("output_path_hidden", args.parts_dir / f"{name}_seed{seed}.safetensors"))]
    words += [f"--dataset_path={path}"] if path else []
    words += ["--split", args.split] if args.split else []
    words += ["--overwrite"] if args.overwrite else []
    print(f"\n{name}, seed {seed}: attribution and hidden states")
    stage1 = token_ablation.flags(kind).parse_args([*words, "--top", "pos", "neg", "rand"])
    states = {top: StatesFile(file) for top, file in token_ablation.run(stage1, lm).items()}
    args.dataset_name, args.dataset_path, args.seed = name, path, seed
    parts = cli.evaluation_parts(args, states)
    configurations, made = cli.configurations(args, lm, states)
    if runs.processes().is_main_process:
        for file, vectors in made.items():
            vectors.save(file)
    manifest = cli.evaluation_manifest(args, "experiment", lm, states, parts)
    return Study(name, seed, parts, configurations, manifest)


def validate(lm, one: Study, args) -> pd.DataFrame:
    """Gain on validation questions and price of every configuration."""
    questions = encode(lm, one.parts["validation"], args)
    neutral = [costs.continuation(lm, text) for text in costs.neutral_texts()]
    unrelated = [prompts.encode(lm, item, "qa") for item in costs.unrelated_examples()]
    items = [*questions, *neutral, *unrelated]
    scores = scores_of(lm, items, one.configurations, args, one,
                       f"{one.dataset}_seed{one.seed}_validation")
    of_questions = scores[:len(questions)]
    of_neutral = scores[len(questions):len(questions) + len(neutral)]
    table = grid_rows(one, one, "validation", [None, *one.configurations],
                      rights(questions, of_questions))
    perplexity = costs.perplexity_of(neutral, of_neutral)
    kept = {kind: right.mean(axis=0) for kind, right
            in rights(unrelated, scores[-len(unrelated):]).items()}
    return table.assign(
        perplexity=perplexity, perplexity_increase=perplexity / perplexity[0] - 1,
        unrelated_accuracy=kept["token"], unrelated_change=kept["token"] - kept["token"][0],
        unrelated_accuracy_sum=kept["sum"], unrelated_change_sum=kept["sum"] - kept["sum"][0])


def choose(validated: pd.DataFrame, args) -> pd.DataFrame:
    """For every method, mode, score and price: the configuration best on validation at that price.

    The base model is one of the choices: where no configuration is affordable and better, the row
    says base.
    """
    base, steered = validated.iloc[0], validated.iloc[1:]
    rows = []
    for (method, mode), table in steered.groupby(["method", "mode"], sort=False):
        for kind, budget in itertools.product(SCORES, args.max_ppl_increase):
            lost = -table[["unrelated_change", "unrelated_change_sum"]].min(axis=1)
            affordable = table[(table.perplexity_increase <= budget)
                               & (lost <= args.max_unrelated_loss + 1e-9)]
            best = affordable.sort_values([f"accuracy_{kind}", "perplexity_increase"],
                                          ascending=[False, True]).head(1)
            if not len(best) or best[f"accuracy_{kind}"].iloc[0] <= base[f"accuracy_{kind}"]:
                best = validated.head(1)
            found = best.iloc[0]
            rows.append({
                "method": method, "mode": mode, "score": kind, "max_ppl_increase": budget,
                "configuration": found.configuration, "alpha": found.alpha,
                "perplexity_increase": found.perplexity_increase,
                "unrelated_change": found.unrelated_change,
                "validation_gain": found[f"accuracy_{kind}"] - base[f"accuracy_{kind}"]})
    return pd.DataFrame(rows)


def test(lm, one: Study, other: Study, chosen: pd.DataFrame, args
         ) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The chosen configurations of one study on the test questions of it or another.

    Returns a row for each configuration, and a row for each configuration and question.
    """
    labels = set(chosen.configuration)
    configurations = [item for item in one.configurations if item.label in labels]
    used = {data.question_key(example) for part in ("validation",) for example in one.parts[part]}
    examples = [example for example in other.parts["test"]
                if data.question_key(example) not in used]
    items = encode(lm, examples, args)
    scores = scores_of(lm, items, configurations, args, one,
                       f"{one.dataset}_seed{one.seed}_test_{other.dataset}")
    right = rights(items, scores)
    every = [None, *configurations]
    rows = grid_rows(one, other, "test", every, right)
    questions = pd.concat([
        pd.DataFrame({"dataset": one.dataset, "evaluated_on": other.dataset, "seed": one.seed,
                      "configuration": item.label if item else "base",
                      "id": [example.id for example in examples],
                      **{kind: right[kind][:, index] for kind in SCORES}})
        for index, item in enumerate(every)])
    return rows, questions


def encode(lm, examples: list[data.Example], args) -> list[Encoded]:
    if alone := next((example for example in examples if len(example.choices) < 2), None):
        raise UserError(f"example {alone.id} has a single answer: the experiment compares answers")
    return [prompts.encode(lm, example, args.prompt_style) for example in examples]


def scores_of(lm, items: list[Encoded], configurations, args, one: Study, name: str
              ) -> list[np.ndarray]:
    """(1 + C, choices) log-likelihoods of every item, kept in a file and taken up from there."""
    path = args.parts_dir / f"{name}_scores.safetensors"
    groups = batches([item.length for item in items], args.batch_tokens)
    manifest = one.manifest | {"configurations": [item.label for item in configurations],
                               "items": data.fingerprint([item.example for item in items])}
    work = runs.Run([path], manifest, args.overwrite)
    if not work.finished:
        for unit in work.todo(len(groups), name):
            found = score(lm, [items[i] for i in groups[unit]], configurations, args.batch_tokens)
            work.save(unit, {str(i): torch.from_numpy(values) for i, values
                             in zip(groups[unit], found, strict=True)}, [])
        if work.all_done():
            runs.write_tensors(path, {key: value for tensors, _ in work.units(len(groups))
                                      for key, value in tensors.items()}, manifest)
        work.finish()
    tensors, _ = runs.read_tensors(path)
    return [tensors[str(index)].numpy() for index in range(len(items))]


def grid_rows(one: Study, other: Study, part: str, configurations, right) -> pd.DataFrame:
    rows = []
    for index, item in enumerate(configurations):
        row = {"dataset": one.dataset, "evaluated_on": other.dataset, "seed": one.seed,
               "part": part, "configuration": item.label if item else "base",
               "method": item.method if item else "base", "mode": item.mode if item else "",
               "layers": " ".join(map(str, item.layers)) if item else "",
               "alpha": item.alpha if item else 0.0, "questions": len(right["sum"])}
        for kind in SCORES:
            here, base = right[kind][:, index], right[kind][:, 0]
            accuracy, low, high = stats.accuracy_interval(here)
            row |= {f"accuracy_{kind}": accuracy, f"accuracy_{kind}_low": low,
                    f"accuracy_{kind}_high": high,
                    f"p_value_{kind}": stats.paired_p_value(here, base),
                    f"worse_{kind}": (base & ~here).sum() / max(base.sum(), 1)}
        rows.append(row)
    return pd.DataFrame(rows)


def front(answers: list[tuple[pd.DataFrame, pd.DataFrame]]) -> pd.DataFrame:
    """A row per data set, method, score and price: test accuracy and gain over all seeds.

    A question that several seeds test counts once, with its mean over them; intervals are
    bootstrapped over questions, the p-value flips the signs of their gains.
    """
    parts = []
    for chosen, questions in answers:
        base = questions[questions.configuration == "base"].set_index("id")
        for row in chosen.itertuples():
            here = questions[questions.configuration == row.configuration].set_index("id")
            parts.append(pd.DataFrame({
                "dataset": here.dataset, "evaluated_on": here.evaluated_on, "seed": here.seed,
                "method": row.method, "mode": row.mode, "score": row.score,
                "max_ppl_increase": row.max_ppl_increase, "configuration": row.configuration,
                "perplexity_increase": row.perplexity_increase,
                "unrelated_change": row.unrelated_change,
                "right": here[row.score].astype(float), "was": base[row.score].astype(float)}))
    every = pd.concat(parts).reset_index()
    keys = ["dataset", "evaluated_on", "method", "mode", "score", "max_ppl_increase"]
    rows = []
    for names, table in every.groupby(keys, sort=False):
        by_question = table.groupby("id")[["right", "was"]].mean()
        gains = (by_question.right - by_question.was).to_numpy()
        by_seed = table.groupby("seed")[["right", "was"]].mean()
        row = dict(zip(keys, names, strict=True))
        accuracy_low, accuracy_high = stats.bootstrap_interval(by_question.right.to_numpy())
        gain_low, gain_high = stats.bootstrap_interval(gains)
        seeds = table.drop_duplicates("seed")
        rows.append(row | {
            "is_control": row["method"] in CONTROLS, "seeds": len(seeds),
            "questions": len(gains), "configuration": "; ".join(dict.fromkeys(seeds.configuration)),
            "base_accuracy": by_question.was.mean(), "accuracy": by_question.right.mean(),
            "accuracy_low": accuracy_low, "accuracy_high": accuracy_high, "gain": gains.mean(),
            "gain_low": gain_low, "gain_high": gain_high,
            "gain_seed_sd": (by_seed.right - by_seed.was).std(ddof=1) if len(seeds) > 1 else 0.0,
            "p_value": stats.sign_flip_p_value(gains),
            "perplexity_increase": seeds.perplexity_increase.mean(),
            "unrelated_change": seeds.unrelated_change.mean()})
    return pd.DataFrame(rows)


def report(table: pd.DataFrame, args) -> None:
    """Print the gains on each data set's own test questions at every price."""
    own = table[table.dataset == table.evaluated_on]
    for (dataset, kind), rows in own.groupby(["dataset", "score"], sort=False):
        print(f"\n{dataset}: gain in {kind} accuracy on test questions (base "
              f"{rows.base_accuracy.iloc[0]:.1%}), by the rise of perplexity allowed")
        cells = rows.assign(
            name=(rows.method + " " + rows["mode"]).str.strip(),
            cell=[f"{100 * r.gain:+.1f} [{100 * r.gain_low:+.1f}, {100 * r.gain_high:+.1f}]"
                  for r in rows.itertuples()])
        print(cells.pivot(index="name", columns="max_ppl_increase", values="cell")
              .reindex(cells.name.unique()).rename(columns=lambda b: f"+{b:.0%}").to_string())
    print()


if __name__ == "__main__":
    cli.main(main)
