"""The rows of the paper's main tables: our settings and the published ones, one after the other.

Runs the scripts of the stages for every model and data set, and writes one table with our figures
beside the published ones. First it says how many GPU hours that takes. A row that is finished is
not run again, and within a row the scripts go on where they were.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from demo import registered  # noqa: F401  the drawn scenes, by their short name
from grains.cli import entry, flags
from grains.cli.flags import LLM, Kind
from grains.errors import UserError
from grains.settings import OF_TOWER

if TYPE_CHECKING:
    import pandas as pd

METHODS = (
    *("mean", "pca", "gradient", "caa", "repe", "icv", "iti", "nl_iti"),
    *("random", "shared_random", "rotated"),
)
IMAGE_METHODS = (*METHODS, OF_TOWER)
# The last layer (31 of Llama-3.1-8B and LLaVA-1.6-7B) and one strength, on all questions.
PUBLISHED_STAGE1 = ("--ig_baseline", "zeros", "--attribute", "all", "--ig_steps", "20")
PUBLISHED_GRID = (
    *("--methods", "pca", "--layer_idxs", "-1"),
    *("--alpha_units", "absolute", "--evaluate_on", "all"),
)
PUBLISHED_ALPHA = {"llm": "40", "vlm": "100"}
FREE = ("--temperature", "0.1", "--max_new_tokens", "256")
UNKNOWN = "see the paper"
# Model and data set -> base and GrAInS, from the paper's abstract and text.
PUBLISHED = {
    ("llama-3.1-8b-instruct", "truthfulqa"): ("34.15 %", "47.37 %"),
    ("llava-1.6-7b", "spa-vl"): ("40.24 %", "48.35 %"),
    ("llava-1.6-7b", "mmhal-bench"): ("0.624", "0.514"),
}


@dataclass(frozen=True)
class Row:
    """One model on one data set.

    settings: ours or published. stage1: further flags, which stage 2 takes too; evaluated: stage
        2's own. vectors: for free answers, the data set whose row gives vectors and configuration;
        None: choices are compared. label: names another way of asking. prompt_tokens, questions:
        for the estimate.
    """

    model: str
    dataset: str
    settings: str
    prompt_tokens: int
    questions: int
    stage1: tuple[str, ...] = ()
    evaluated: tuple[str, ...] = ()
    vectors: str | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return "_".join(filter(None, (self.dataset, self.model, self.settings, self.label)))


def rows_of(kind: Kind) -> list[Row]:
    """The rows of the language or of the vision-language tables; those that give vectors first."""
    rows = []
    published = {
        "settings": "published",
        "stage1": PUBLISHED_STAGE1,
        "evaluated": (*PUBLISHED_GRID, "--alphas", PUBLISHED_ALPHA[kind.name]),
    }
    if kind.images:
        image = {"stage1": (*PUBLISHED_STAGE1, "--image_baseline", "zeros")}
        for model in ("llava-1.6-7b", "qwen-2.5-vl-7b-instruct", "gemma-3-12b"):
            rows += [
                Row(model, "spa-vl", "ours", 2900, 500),
                Row(model, "spa-vl", prompt_tokens=2900, questions=500, **published | image),
                Row(model, "mmhal-bench", "ours", 2900, 96, vectors="spa-vl"),
            ]
        return rows
    lettered = ("--prompt_style", "instruct", "--letters", "letter")
    targets = ("--score", "mc1", "mc2")
    for model in ("llama-3.1-8b-instruct", "qwen-2.5-7b-instruct", "gemma-3-12b"):
        for dataset, tokens, questions in (
            ("truthfulqa", 60, 817),
            ("toxigen", 60, 470),
            ("faitheval", 400, 1000),
        ):
            rows += [
                Row(model, dataset, "ours", tokens, questions),
                Row(model, dataset, prompt_tokens=tokens, questions=questions, **published),
                Row(model, dataset, "ours", tokens, questions, lettered, label="letters"),
            ]
        rows += [
            Row(model, "truthfulqa-mc", "ours", 60, 817, (), targets),
            Row(model, "truthfulqa-generation", "ours", 60, 100, vectors="truthfulqa"),
        ]
    return rows


def parser(kind: Kind) -> argparse.ArgumentParser:
    parser = flags.parser(__doc__, kind)
    every = rows_of(kind)
    for name, choices in (
        ("models", [*dict.fromkeys(row.model for row in every)]),
        ("datasets", [*dict.fromkeys(row.dataset for row in every)]),
    ):
        parser.add_argument(f"--{name}", nargs="+", choices=choices, default=choices)
    parser.add_argument(
        "--settings", nargs="+", choices=("ours", "published"), default=["ours", "published"]
    )
    parser.add_argument("--estimate", action="store_true", help="say what it takes, and stop")
    parser.add_argument(
        "--tflops",
        type=flags.positive_float,
        default=150,
        help="for the estimate: what a GPU computes, in 10^12 operations a second",
    )
    parser.add_argument("--num_samples", type=flags.positive, default=50, help="steering examples")
    parser.add_argument(
        "--num_validation", type=flags.positive, default=150, help="questions that choose"
    )
    parser.add_argument(
        "--num_test",
        type=flags.positive,
        help="test questions (default: as many as the data has, at most 500 with pictures)",
    )
    parser.add_argument(
        "--num_prompts", type=flags.positive, default=96, help="questions answered freely"
    )
    parser.add_argument("--dtype", default="bfloat16", help="precision of the models")
    parser.add_argument("--judge", metavar="MODEL", help="judge of free answers (its name there)")
    parser.add_argument(
        "--judge_url", metavar="URL", help="OpenAI-compatible interface of the judge"
    )
    parser.add_argument(
        "--output_dir",
        type=flags.path,
        default=f"results/{kind.name}/paper_tables",
        help="folder of the rows and of the table",
    )
    return parser


def main(kind: Kind = LLM) -> None:
    args = parser(kind).parse_args()
    if bool(args.judge) != bool(args.judge_url):
        raise UserError("--judge and --judge_url go together: the judge's name and its address")
    every = [
        row for row in rows_of(kind) if row.model in args.models and row.settings in args.settings
    ]
    needed = {row.vectors for row in every if row.dataset in args.datasets}
    rows = [row for row in every if row.dataset in {*args.datasets, *needed}]
    print(estimate(rows, args))
    if not args.estimate:
        run_all(rows, args, run)


def run(command: Sequence[str]) -> None:
    """Run a script of a stage. Raises UserError if it fails, after what it says itself."""
    done = subprocess.run([sys.executable, *command], check=False)
    if done.returncode:
        raise UserError(
            f"{command[0]} ended with status {done.returncode} (see above); run the same command "
            "again to go on"
        )


def run_all(
    rows: list[Row], args: argparse.Namespace, run: Callable[[Sequence[str]], None]
) -> None:
    """Run the rows that are not finished, and write the table after each."""
    entry.import_libraries()
    import pandas as pd

    from grains import runs
    from grains.cli.documents import markdown

    root = Path(args.output_dir)
    tables: list[pd.DataFrame] = []
    for row in rows:
        folder = root / row.name
        finished = folder / "row.csv"
        if not finished.exists():
            print(f"\n{row.name}")
            runs.write_table(finished, measured(row, folder, root, args, run))
        tables.append(pd.read_csv(finished, keep_default_na=False, dtype=str))
        every = pd.concat(tables)
        runs.write_table(root / "table.csv", every)
        text = "\n".join(markdown([*every.columns], every.to_numpy())) + "\n"
        runs.write_whole(
            root / "table.md", lambda file, text=text: file.write_text(text, encoding="utf-8")
        )
    print(f"\ntable: {root / 'table.md'}")


# --- a row ---


def methods(kind: Kind) -> tuple[str, ...]:
    """The methods that rows of our settings compare."""
    return IMAGE_METHODS if kind.images else METHODS


def measured(
    row: Row,
    folder: Path,
    root: Path,
    args: argparse.Namespace,
    run: Callable[[Sequence[str]], None],
) -> pd.DataFrame:
    """Run the scripts of a row; returns a line for each method and score."""
    import pandas as pd

    giving = folder if row.vectors is None else root / f"{row.vectors}_{row.model}_{row.settings}"
    ending = "_vlm.py" if args.kind.images else ".py"
    model = ["--model_name", row.model, "--dtype", args.dtype]
    states = [
        *("--hidden_states_path", str(giving / "states_pos.safetensors")),
        *("--hidden_states_neg_path", str(giving / "states_neg.safetensors")),
        *("--steering_vectors_dir", str(giving / "vectors")),
    ]
    examples = ["--dataset_name", row.dataset, "--num_samples", str(args.num_samples)]
    # What is answered freely chose nothing; of another data set one question is left out.
    elsewhere = row.vectors is not None and args.kind.images
    size = ["--num_validation", "1" if elsewhere else str(args.num_validation)]
    if row.vectors is None:
        run(
            [
                f"token_ablation{ending}",
                *model,
                *examples,
                *row.stage1,
                *("--output_path_meta", str(folder / "tokens.csv")),
                *("--output_path_hidden", str(folder / "states.safetensors")),
            ]
        )
        num_test = args.num_test or (500 if args.kind.images else None)
        size += ["--num_test", str(num_test)] if num_test else []
        grid = [] if "--methods" in row.evaluated else ["--methods", *methods(args.kind)]
        results = folder / "results"
        run(
            [
                f"steering_mc{ending}",
                *model,
                *examples,
                *size,
                *("--mode", "pos", "both"),
                *grid,
                *row.stage1,
                *row.evaluated,
                *states,
                *("--output_dir", str(results)),
            ]
        )
        return of_choices(pd.read_csv(only(results, "_grid.csv")), row)
    run(
        [
            f"steering_generation{ending}",
            *model,
            *examples,
            *size,
            *FREE,
            *("--num_prompts", str(args.num_prompts)),
            *states,
            *("--chosen_path", str(only(giving / "results", "_chosen.json"))),
            *("--output_dir", str(folder)),
        ]
    )
    (texts,) = (path for path in folder.glob("*.csv") if path.name != "row.csv")
    judge = ["--judge", args.judge, "--judge_url", args.judge_url] if args.judge else []
    scores = folder / "scores"
    run(
        [
            f"score_generations{ending}",
            *("--generations", str(texts), "--output_dir", str(scores)),
            *judge,
        ]
    )
    return of_texts(pd.read_csv(only(scores, "_summary.csv")), row)


def only(folder: Path, ending: str) -> Path:
    """The one file of a folder with an ending."""
    files = [*folder.glob(f"*{ending}")]
    if len(files) != 1:
        raise UserError(
            f"'{folder}' holds {len(files)} files *{ending}, expected one: remove the folder "
            f"'{folder.parent}' to make this row again"
        )
    return files[0]


def of_choices(grid: pd.DataFrame, row: Row) -> pd.DataFrame:
    """Accuracies in %, base and of every method; its configuration is the best on validation, or on
    all questions with the published settings."""
    chosen_on, shown_on = ("all", "all") if "all" in set(grid.part) else ("validation", "test")
    wanted = ("mc1", "mc2") if "mc1" in row.evaluated else ("token", "sum")
    lines = []
    for method, of_method in grid.groupby("method", sort=False):
        asked = of_method[of_method.part == chosen_on]
        best = asked.sort_values(f"accuracy_{wanted[0]}", ascending=False, kind="stable").iloc[0]
        measured_row = of_method[
            (of_method.part == shown_on) & (of_method.configuration == best.configuration)
        ].iloc[0]
        lines += [
            line(
                row,
                method,
                f"{score} accuracy, %",
                *(100 * measured_row[f"accuracy_{score}{end}"] for end in ("", "_low", "_high")),
                measured_row.questions,
                best.configuration,
            )
            for score in wanted
        ]
    return as_table(lines, row)


def of_texts(summary: pd.DataFrame, row: Row) -> pd.DataFrame:
    """Scores of free answers, base and steered."""
    kept = ("bleu_margin", "rouge_l_margin", "f1", "judge_rating", "judge_hallucination")
    lines = [
        line(
            row,
            measured_row.method,
            measured_row.score,
            measured_row.mean,
            measured_row.low,
            measured_row.high,
            measured_row.n,
            measured_row.configuration,
        )
        for measured_row in summary.itertuples()
        if measured_row.score in kept
    ]
    return as_table(lines, row)


def line(
    row: Row,
    method: str,
    score: str,
    mean: float,
    low: float,
    high: float,
    n: int,
    configuration: str,
) -> dict:
    return {
        "data": row.dataset,
        "model": row.model,
        "settings": " ".join(filter(None, (row.settings, row.label))),
        "method": method,
        "score": score,
        "ours": f"{mean:.3g} [{low:.3g}, {high:.3g}]",
        "questions": int(n),
        "configuration": configuration,
    }


def as_table(lines: list[dict], row: Row) -> pd.DataFrame:
    """The lines with the published figures of base and GrAInS beside them."""
    import pandas as pd

    table = pd.DataFrame(lines)
    base, steered = PUBLISHED.get((row.model, row.dataset), (UNKNOWN, UNKNOWN))
    known = {"base": base, "mean": steered, "pca": steered}
    return table.assign(published=[known.get(method, UNKNOWN) for method in table.method])


# --- the estimate ---

POINTS = {"ours": 60, "published": 20}  # gradients an example
PARAMETERS = {"gemma-3-12b": 12e9}  # of the others 8e9
STRENGTHS = 4  # of the default grid, in the modes pos and both


def hours(row: Row, args: argparse.Namespace) -> float:
    """GPU hours of a row: 2 operations a weight and position forward, 6 with the gradient."""
    weights, tokens = PARAMETERS.get(row.model, 8e9), row.prompt_tokens
    if row.vectors is not None:
        operations = 2 * weights * args.num_prompts * 2 * (tokens + 256)
    else:
        attributed = 6 * weights * args.num_samples * POINTS[row.settings] * tokens
        tried = 2 if row.settings == "published" else (len(methods(args.kind)) + 2) * STRENGTHS
        asked = min(row.questions, args.num_validation + (args.num_test or row.questions))
        operations = attributed + 2 * weights * asked * (1 + tried) * (tokens + 40)
    return operations / (args.tflops * 1e12) / 3600


def estimate(rows: list[Row], args: argparse.Namespace) -> str:
    lines = [f"{row.name:60} {hours(row, args):6.2f} GPU hours" for row in rows]
    total = sum(hours(row, args) for row in rows)
    return "\n".join(
        [
            f"Estimate for {len(rows)} rows at {args.tflops:g} TFLOP/s, loading and tokens of free "
            "answers one by one not counted:",
            *lines,
            f"{'together':60} {total:6.2f} GPU hours",
        ]
    )


if __name__ == "__main__":
    entry.run(main)
