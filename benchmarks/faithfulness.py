"""Faithfulness to a context: what steering gains, what it costs, and what the controls do.

Questions of src/data/faithfulness.jsonl, whose contexts contradict common knowledge. Vectors come
from steering pairs; the strength of each method is chosen on validation questions, among those
that raise the perplexity of validation prose by at most --budget; everything else is measured on
test questions, with facts that neither steered nor chose. Writes a row per question into
--folder, which a later run takes up, and tables between their markers of --document.

With --gated all vectors, the controls' too, steer behind one gate, fitted between the steering
pairs and training text that reports no cost. Prose then costs little by construction, so that a
strength must also hold what is asked where the gate may be open (see `within_all`). With
`--positions prompt` prose, which follows no prompt, costs nothing at all. With --own_words further
pairs steer beside these: in the model's own words, about the contrary and the agreeing contexts.

    python benchmarks/faithfulness.py --document docs/tables/faithfulness.md
    python benchmarks/faithfulness.py --gated --positions prompt --num_samples 80
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from grains import (  # noqa: E402
    data,
    manifests,
    models,
    prompts,
    runs,
    splits,
    stage1,
    stats,
    vectors,
)
from grains.cli import entry  # noqa: E402
from grains.cli.documents import print_tables  # noqa: E402
from grains.data import Example  # noqa: E402
from grains.generation import decoding_batches, generate  # noqa: E402
from grains.lm import LanguageModel  # noqa: E402
from grains.prompts import Encoded  # noqa: E402
from grains.scoring import margins, score_all  # noqa: E402
from grains.settings import (  # noqa: E402
    EMBEDDED,
    SCORES,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    GridSettings,
    PromptSettings,
)
from grains.states import StatesInMemory  # noqa: E402
from grains.steering import Configuration, Direction, directions  # noqa: E402
from grains.study import costs, gates  # noqa: E402
from grains.study.naming import core, names  # noqa: E402
from grains.study.own_words import in_own_words  # noqa: E402

METHODS = ("gradient", "mean", "pca", "caa")
CONTROLS = ("random", "shared_random", "rotated", "rand_tokens")
STRENGTHS = (0.003, 0.006, 0.01)
GATED_STRENGTHS = (0.006, 0.01, 0.02, 0.03)
# The methods that are also tried at the same price, with further strengths: weaker pushes.
PRICED, LARGER = ("mean", "caa", "random", "rotated"), (0.02, 0.03)
CONTRARY, AGREEING, BARE = "faithfulness", "faithfulness-agreeing", "faithfulness-bare"
UNRELATED, PROSE = "unrelated", "prose"
# The unrelated questions as the contexts' questions are asked, and so behind a passage of prose.
ALIKE, BEHIND, OWN = "unrelated-alike", "unrelated-behind", "own answers"
SHOWN = {
    CONTRARY: "contrary contexts",
    AGREEING: "agreeing contexts",
    BARE: "no context",
    UNRELATED: "unrelated questions",
}
GATED_SHOWN = {
    **SHOWN,
    ALIKE: "unrelated questions, asked alike",
    BEHIND: "unrelated questions behind a text",
}
MAX_TOKENS = AblationSettings().batch_tokens
BASE, CHOSEN, TURNED = "base", "gradient", "gradient, sign turned"
HARDEST = "rotated, same strength"
RESAMPLES = 4999
OWN_BUDGET = 0.10  # with --gated, the rise of the perplexity of the model's own answers


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    flags.add_argument("--model_name", default=EMBEDDED)
    flags.add_argument("--title", help="the model's name in the tables")
    flags.add_argument("--prompt_style", default="chat")
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--num_samples", type=int, default=40, help="steering pairs")
    flags.add_argument("--top_k", type=int, default=5)
    flags.add_argument("--grad_method", default="vanilla")
    flags.add_argument("--layers", nargs="+", default=["8-24"])
    flags.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    flags.add_argument("--gated", action="store_true", help="steer behind a gate")
    flags.add_argument("--own_words", action="store_true", help="also pairs in the model's words")
    flags.add_argument("--positions", default=GridSettings.positions, help="those that are steered")
    flags.add_argument(
        "--strengths",
        nargs="+",
        type=float,
        help=f"to choose from (default: {STRENGTHS}; behind a gate {GATED_STRENGTHS})",
    )
    flags.add_argument(
        "--priced",
        nargs="*",
        choices=(*METHODS, *CONTROLS),
        default=PRICED,
        help="tried at the same price, too",
    )
    flags.add_argument("--budget", type=float, default=0.02, help="rise of perplexity of prose")
    flags.add_argument("--num_validation", type=int, default=40, help="validation questions")
    flags.add_argument("--num_test", type=int, default=80, help="test questions, of each set")
    flags.add_argument("--num_generations", type=int, default=60, help="free answers to a set")
    flags.add_argument("--num_own", type=int, default=16, help="own answers to a set (--gated)")
    flags.add_argument("--max_new_tokens", type=int, default=24)
    flags.add_argument("--folder", type=Path, default=ROOT / "src" / "results" / "faithfulness")
    flags.add_argument("--document", type=Path, help="Markdown file of the tables")
    return flags


def main() -> None:
    args = parser().parse_args()
    title = args.title or Path(args.model_name).stem
    lm: list[LanguageModel] = []

    def model() -> LanguageModel:
        if not lm:
            lm.append(models.load(args.model_name))
        return lm[0]

    every = []
    parts = [title, args.grad_method, *variant(args)]
    for seed in args.seeds:
        path = args.folder / f"{'_'.join(parts)}_seed{seed}.csv"
        if not path.exists():
            runs.write_table(path, one_seed(model(), args, seed))
        every.append(pd.read_csv(path, keep_default_na=False, na_values=["nan", ""]))
    rows = pd.concat(every)
    print_tables(args.document, ", ".join(parts), summaries(rows, title), {"rows": args.folder})


def variant(args: argparse.Namespace) -> list[str]:
    """What tells the rows and tables from those of vectors that steer everywhere."""
    words = {
        "gated": args.gated,
        "own-words": args.own_words,
        args.positions: args.positions != GridSettings.positions,
    }
    return [word for word, differs in words.items() if differs]


# --- measuring ---


def one_seed(lm: LanguageModel, args: argparse.Namespace, seed: int) -> pd.DataFrame:
    """A row for each configuration and question of every set, and for each prose passage."""
    tops = ("pos", "rand")
    ablation = AblationSettings(
        AttributionSettings(grad_method=args.grad_method),
        tops,
        args.top_k,
        prompt=PromptSettings(args.prompt_style),
        seed=seed,
    )
    source = DataSettings(
        CONTRARY,
        num_samples=args.num_samples,
        num_validation=args.num_validation,
        num_test=args.num_test,
    )
    pairs = given = splits.steering_examples(source, seed)
    if args.own_words:
        agreeing = splits.steering_examples(replace(source, name=AGREEING), seed)
        both = [*given, *agreeing]
        pairs = given + in_own_words(lm, both, ablation.prompt, args.max_new_tokens)
    encoded = [encode(lm, example, args) for example in pairs]
    tensors, attributed = [], []
    for unit, item in enumerate(encoded):
        made, of_top = stage1.one_example(lm, item, ablation, unit, {})
        tensors.append(made)
        if unit < len(given):
            attributed.append(attribution_row(lm, item, of_top[0]) | {"seed": seed})
    info = manifests.stage1(lm, pairs, source, ablation, prompts.tally(encoded))
    states = {top: StatesInMemory(tensors, top, info) for top in tops}
    grid = GridSettings(
        (*args.methods, *CONTROLS), layers=tuple(args.layers), positions=args.positions
    )
    lines: dict[str, Direction] = {}
    for method, mode, made in vectors.make_all(states, grid, seed):
        (lines[method],) = directions(made, method, mode, grid)

    if args.gated:
        layers = [*lines["gradient"].layers]
        gate = gates.around(lm, pairs, ablation.prompt, layers, MAX_TOKENS, seed)
        lines = {
            method: replace(line, vectors=replace(line.vectors, gate=gate))
            for method, line in lines.items()
        }

    asked = asked_sets(lm, args, source, seed, info["data"]["questions"])
    own = {split: own_answers(lm, args, of) for split, of in asked.items()} if args.gated else {}
    chosen = choose(lm, args, lines, asked["validation"], own.get("validation", []))
    alpha = chosen["gradient"].alpha

    tested = {CHOSEN: chosen["gradient"], TURNED: lines["gradient"].at(-alpha)}
    for method in lines:
        if method != "gradient":
            tested[f"{method}, same strength"] = lines[method].at(alpha)
        if method in args.priced:
            tested[f"{method}, {'chosen alike' if args.gated else 'same price'}"] = chosen[method]
    rows = [{"set": "attribution", "configuration": "", **row} for row in attributed]
    return pd.DataFrame(rows + tested_rows(lm, args, seed, tested, asked["test"], own.get("test")))


def tested_rows(
    lm: LanguageModel,
    args: argparse.Namespace,
    seed: int,
    tested: dict[str, Configuration],
    sets: dict[str, list[Encoded]],
    own: list[Encoded] | None,
) -> list[dict]:
    """A row for each configuration and question, and for the costs and the free answers.

    tested: by their labels, `CHOSEN`, `TURNED` and `HARDEST` among them; the others are asked about
    contrary contexts, and what they cost in prose. sets, own: of the test split; own: None if not
    measured.
    """
    rows = []
    for name, items in sets.items():
        labels = [*tested] if name == CONTRARY else [CHOSEN, TURNED]
        asked_of, places = distinct({label: tested[label] for label in labels})
        leads = margins(items, score_all(lm, items, asked_of, MAX_TOKENS))
        rows += [
            {
                "seed": seed,
                "set": name,
                "configuration": label,
                "alpha": tested[label].alpha if label in tested else 0.0,
                "id": item.example.id,
                "fact": fact_of(item.example, name),
                **{kind: float(lead[place, index] > 0) for kind, lead in leads.items()},
            }
            for label, index in places.items()
            for place, item in enumerate(items)
        ]
    passages = costs.passages(lm, "test")
    asked_of, places = distinct(tested)
    rises = costs.perplexity_rise(passages, score_all(lm, passages, asked_of, MAX_TOKENS))
    rows += [
        {"seed": seed, "set": PROSE, "configuration": label, "rise": rises[index]}
        for label, index in places.items()
    ]
    if own is not None:
        labels = (CHOSEN, TURNED, HARDEST)
        scores = score_all(lm, own, [tested[label] for label in labels], MAX_TOKENS)
        rises = costs.perplexity_rise(own, scores)
        rows += [
            {"seed": seed, "set": OWN, "configuration": label, "rise": rise}
            for label, rise in zip((BASE, *labels), rises, strict=True)
        ]
    for name, labels in ((CONTRARY, (CHOSEN, TURNED, HARDEST)), (AGREEING, (CHOSEN,))):
        answering = {label: tested[label] for label in labels}
        items = sets[name][: args.num_generations]
        rows += free_answers(lm, args, seed, name, items, answering)
    return rows


def asked_sets(
    lm: LanguageModel,
    args: argparse.Namespace,
    source: DataSettings,
    seed: int,
    steering: list[str],
) -> dict[str, dict[str, list[Encoded]]]:
    """Split (validation, test) -> set -> its questions. steering: the keys of the pairs' questions.

    What a gate may cost is measured only with --gated: the sets ALIKE and BEHIND.
    """
    asked: dict[str, dict[str, list[Encoded]]] = {"validation": {}, "test": {}}
    for name in (CONTRARY, AGREEING, BARE):
        used = {"questions": steering if name == CONTRARY else []}
        for split, examples in splits.evaluation_examples(
            replace(source, name=name), seed, used
        ).items():
            asked[split][name] = [encode(lm, example, args) for example in examples]
    for split, sets in asked.items():
        sets[UNRELATED] = costs.unrelated_questions(lm, split)
        if args.gated:
            count = args.num_validation if split == "validation" else args.num_test
            examples = [item.example for item in sets[UNRELATED][:count]]
            texts = [item.example.question for item in costs.passages(lm, split)]
            sets[ALIKE] = [encode(lm, example, args) for example in examples]
            sets[BEHIND] = [
                encode(lm, replace(example, context=texts[number % len(texts)]), args)
                for number, example in enumerate(examples[::2])
            ]
    return asked


def own_answers(
    lm: LanguageModel, args: argparse.Namespace, sets: dict[str, list[Encoded]]
) -> list[Encoded]:
    """What the base model answers by itself to questions that steering should leave as they are."""
    answered = []
    for name in (AGREEING, BARE, ALIKE):
        items = sets[name][: args.num_own]
        for members in decoding_batches(items, [], args.max_new_tokens, MAX_TOKENS):
            batch = [items[index] for index in members]
            (texts,) = generate(lm, batch, [], args.max_new_tokens)
            answered += [
                replace(item.example, choices=(text,), label=0)
                for item, text in zip(batch, texts, strict=True)
                if text
            ]
    prompt = PromptSettings(args.prompt_style)
    return [prompts.encode(lm, example, prompt, finished=False, free=True) for example in answered]


def choose(
    lm: LanguageModel,
    args: argparse.Namespace,
    lines: dict[str, Direction],
    sets: dict[str, list[Encoded]],
    own: list[Encoded],
) -> dict[str, Configuration]:
    """Method -> its strength, chosen on validation.

    Of the gradient the best on contrary contexts (mean of both accuracies) within the budgets, of
    equal ones the weakest. Of the others without a gate the largest within the budget; behind a
    gate as of the gradient. If none is within, the smallest.
    sets, own: of the validation split.
    """
    strengths = sorted(args.strengths or (GATED_STRENGTHS if args.gated else STRENGTHS))
    larger = () if args.gated else LARGER
    tried = [
        line.at(alpha)
        for method, line in lines.items()
        for alpha in ((*strengths, *larger) if method in args.priced else strengths)
        if method in (CHOSEN, *args.priced)
    ]
    passages = costs.passages(lm, "validation")
    rises = costs.perplexity_rise(passages, score_all(lm, passages, tried, MAX_TOKENS))[1:]
    chosen: dict[str, Configuration] = {}
    for method in {item.method: None for item in tried}:
        own_line = [item for item in tried if item.method == method]
        within = [
            item
            for item, cost in zip(tried, rises, strict=True)
            if item.method == method and cost <= args.budget
        ]
        chosen[method] = within[-1] if within else own_line[0]
        if len(within) > 1 and (method == CHOSEN or args.gated):
            rates = right(lm, sets[CONTRARY], within)[:, 1:].mean(axis=0)
            best_first = [within[index] for index in np.argsort(-rates, kind="stable")]
            allowed = (item for item in best_first if not own or within_all(lm, item, sets, own))
            chosen[method] = next(allowed, own_line[0])
    return chosen


def right(lm: LanguageModel, items: list[Encoded], tried: list[Configuration]) -> np.ndarray:
    """(questions, 1 + C) whether a question is answered right, the mean of both scores."""
    leads = margins(items, score_all(lm, items, tried, MAX_TOKENS))
    return np.mean([lead > 0 for lead in leads.values()], axis=0)


def within_all(
    lm: LanguageModel, item: Configuration, sets: dict[str, list[Encoded]], own: list[Encoded]
) -> bool:
    """Whether a strength holds what else is asked, and the model's own answers.

    No set's change (of the mean of both accuracies) has a 95 % interval below zero, and the
    perplexity of own answers rises by at most `OWN_BUDGET`.
    """
    rise = costs.perplexity_rise(own, score_all(lm, own, [item], MAX_TOKENS))[1]
    if rise > OWN_BUDGET:
        print(f"refused: {item.label}: own answers {rise:+.1%}")
        return False
    for name in (ALIKE, BEHIND, BARE, AGREEING):
        base, steered = right(lm, sets[name], [item]).T
        change = steered - base
        if change.mean() + 1.96 * change.std(ddof=1) / len(change) ** 0.5 < 0:
            print(f"refused: {item.label}: {GATED_SHOWN[name]} {100 * change.mean():+.1f}")
            return False
    return True


def distinct(tested: dict[str, Configuration]) -> tuple[list[Configuration], dict[str, int]]:
    """The configurations that differ, and each label's place in their scores, base first."""
    unique = {(item.method, item.alpha): item for item in tested.values()}
    place = {key: 1 + index for index, key in enumerate(unique)}
    places = {label: place[item.method, item.alpha] for label, item in tested.items()}
    return [*unique.values()], {BASE: 0, **places}


def encode(lm: LanguageModel, example: Example, args: argparse.Namespace) -> Encoded:
    return prompts.encode(lm, example, args.prompt_style)


def fact_of(example: Example, name: str) -> str:
    """The fact that an example is about: what intervals are drawn over."""
    if name in (UNRELATED, ALIKE, BEHIND):
        return example.id
    return facts()[example.id]


@cache
def facts() -> dict[str, str]:
    """The fact of every test question, by its id."""
    rows, _ = data.load(CONTRARY, "test")
    return {rows[index]["id"]: rows[index]["fact"] for index in range(len(rows))}


def attribution_row(lm: LanguageModel, item: Encoded, row: dict) -> dict:
    """Where the attribution of one example lies, and how complete it is.

    share: of the positive attribution, on the context's answer. tokens: the answer's share of the
    content tokens. top: whether the largest attribution lies on it.
    """
    scores = np.array(json.loads(row["attributions"])[0])
    offsets, end = characters(lm, item), context_span(item)[1]
    spans = [
        match.span()
        for match in re.finditer(re.escape(core(item.example.chosen)), item.text, re.IGNORECASE)
        if match.end() <= end
    ]
    on_answer = np.array(
        [any(begin < last and stop > first for first, last in spans) for begin, stop in offsets]
    )
    content = item.content.numpy()
    positive = np.clip(scores, 0, None) * content
    return {
        "id": item.example.id,
        "share": positive[on_answer].sum() / max(positive.sum(), 1e-12),
        "tokens": (on_answer & content).sum() / content.sum(),
        "top": float(on_answer[np.where(content, scores, -np.inf).argmax()]),
        "completeness_error": row["completeness_error_relative"],
        "points": row["gradients_computed"],
    }


def characters(lm: LanguageModel, item: Encoded) -> list[tuple[int, int]]:
    """The characters (begin, end) of every token of a prompt, in its text."""
    offsets = lm.tokenizer(item.text, return_offsets_mapping=True).offset_mapping
    if len(offsets) == len(item.prompt_ids):
        return offsets
    # A BOS that the template has written already.
    made = lm.tokenizer(item.text, return_offsets_mapping=True, add_special_tokens=False)
    return made.offset_mapping


def context_span(item: Encoded) -> tuple[int, int]:
    """The characters (begin, end) of the context in a prompt's text."""
    begin = item.text.rfind(item.example.context)
    return begin, begin + len(item.example.context)


def free_answers(
    lm: LanguageModel,
    args: argparse.Namespace,
    seed: int,
    name: str,
    items: list[Encoded],
    answering: dict[str, Configuration],
) -> list[dict]:
    """A row for each configuration and question: what is answered, and which answer it holds."""
    rows = []
    groups = decoding_batches(items, [*answering.values()], args.max_new_tokens, 2048)
    for members in groups:
        batch = [items[index] for index in members]
        texts = generate(lm, batch, [*answering.values()], args.max_new_tokens)
        for label, answers in zip([BASE, *answering], texts, strict=True):
            rows += [
                {
                    "seed": seed,
                    "set": f"{name} free",
                    "configuration": label,
                    "id": item.example.id,
                    "fact": fact_of(item.example, name),
                    "holds": float(names(text, item.example.chosen)),
                    "holds_other": float(names(text, item.example.rejected)),
                    "repetition": stats.repetition(text),
                    "question": item.example.question,
                    "answer": text,
                }
                for item, text in zip(batch, answers, strict=True)
            ]
    return rows


# --- tables ---


def interval(values: pd.DataFrame) -> tuple[float, float, float]:
    """Mean and 95 % interval of value, bootstrapped over facts; a question counts once.

    values: columns id, fact, value, a row for each seed and question.
    """
    by_question = values.groupby(["fact", "id"]).value.mean()
    by_fact = by_question.groupby("fact").agg(["sum", "count"]).to_numpy()
    picks = np.random.default_rng(0).integers(len(by_fact), size=(RESAMPLES, len(by_fact)))
    sums = by_fact[picks].sum(axis=1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return float(by_question.mean()), float(low), float(high)


def cell(values: tuple[float, float, float], sign: str = "") -> str:
    mean, low, high = (100 * value for value in values)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def level(rows: pd.DataFrame, name: str, label: str, column: str) -> str:
    """Accuracy in %, with its interval."""
    of = rows[(rows.set == name) & (rows.configuration == label)]
    return cell(interval(of.assign(value=of[column]))) if len(of) else "-"


def gain(rows: pd.DataFrame, name: str, label: str, column: str) -> str:
    """Points over the base model on the same questions, with the interval."""
    of = rows[(rows.set == name) & (rows.configuration == label)]
    if of.empty:
        return "-"
    base = rows[(rows.set == name) & (rows.configuration == BASE)].set_index(["seed", "id"])
    was = base.loc[pd.MultiIndex.from_frame(of[["seed", "id"]]), column].to_numpy()
    return cell(interval(of.assign(value=of[column].to_numpy() - was)), "+")


def shown_of(rows: pd.DataFrame) -> dict[str, str]:
    """The sets of questions that were measured, with their titles."""
    return GATED_SHOWN if (rows.set == OWN).any() else SHOWN


def summaries(rows: pd.DataFrame, title: str) -> list[tuple[str, pd.DataFrame]]:
    """The tables with their titles."""
    attributed = f"{title}: where the attribution of the steering pairs lies"
    return [*asked_tables(rows, title), (attributed, attribution_table(rows))]


def asked_tables(rows: pd.DataFrame, title: str) -> list[tuple[str, pd.DataFrame]]:
    """The accuracies, and what is gained and paid, with their titles."""
    seeds = rows.seed.nunique()
    tested = rows[(rows.set == CONTRARY)]
    chosen = tested[tested.configuration == CHOSEN].drop_duplicates("seed")
    strengths = ", ".join(f"{alpha:g}" for alpha in chosen.sort_values("seed").alpha)
    about = (
        f"{title}, {seeds} seed{'s' * (seeds > 1)}, {tested.id.nunique()} contrary contexts over "
        f"{tested.fact.nunique()} facts of test"
    )
    shown = shown_of(rows)
    gated = shown is GATED_SHOWN
    both = {}
    for label in (BASE, CHOSEN, TURNED, HARDEST):
        both[label] = {
            **{
                f"{shown[name]}, {'summed' if kind == 'sum' else 'per token'}": level(
                    rows, name, label, kind
                )
                for name in shown
                for kind in SCORES[::-1]
            },
            "free answers that hold the context's answer": level(
                rows, f"{CONTRARY} free", label, "holds"
            ),
            "free answers that hold the common answer": level(
                rows, f"{CONTRARY} free", label, "holds_other"
            ),
            "free answers to agreeing contexts that hold the answer": level(
                rows, f"{AGREEING} free", label, "holds"
            ),
            "rise of the perplexity of prose, %": prose(rows, label),
        }
        if gated:
            both[label]["rise of the perplexity of own answers, %"] = prose(rows, label, OWN)
    main_table = pd.DataFrame(both)
    gains = {
        label: {
            "strength": ", ".join(
                f"{a:g}"
                for a in tested[tested.configuration == label].alpha.drop_duplicates().sort_values()
            ),
            **{
                f"{shown[CONTRARY]}, {'summed' if kind == 'sum' else 'per token'}": gain(
                    rows, CONTRARY, label, kind
                )
                for kind in SCORES[::-1]
            },
            "free answers": gain(rows, f"{CONTRARY} free", label, "holds"),
            **{
                f"{shown[name]}, per token": gain(rows, name, label, SCORES[0])
                for name in shown
                if name != CONTRARY
            },
            "prose, %": prose(rows, label),
            **({"own answers, %": prose(rows, label, OWN)} if gated else {}),
        }
        for label in dict.fromkeys(tested.configuration)
        if label != BASE
    }
    return [
        (f"{about}: accuracy in %, chosen strength {strengths}", main_table),
        (f"{about}: points gained over base", pd.DataFrame(gains).T),
    ]


def attribution_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the steering pairs."""
    attributed = rows[rows.set == "attribution"]
    return pd.DataFrame(
        {
            "": {
                **{
                    name: f"{100 * attributed[column].mean():.1f} %"
                    for name, column in (
                        ("positive attribution on the context's answer", "share"),
                        ("the answer's share of the tokens of context and question", "tokens"),
                        ("the largest attribution is on the context's answer", "top"),
                    )
                },
                "steering pairs": str(len(attributed)),
            }
        }
    )


def prose(rows: pd.DataFrame, label: str, name: str = PROSE) -> str:
    of = rows[(rows.set == name) & (rows.configuration == label)]
    return f"{100 * of.rise.mean():+.1f}" if len(of) else "-"


if __name__ == "__main__":
    entry.run(main)
