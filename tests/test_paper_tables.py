"""The rows of the paper's tables on a tiny model and small data, from a stand-in of the hub."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import pandas as pd
import pytest
from helpers import tiny
from helpers.families import small_tokenizer
from helpers.hub_stub import Hub

import paper_tables
from grains.cli.flags import LLM, VLM
from grains.errors import UserError

pytest_plugins = ("helpers.command_line",)

MODEL = "llama-3.1-8b-instruct"
STEERING, VALIDATION, TEST = 2, 2, 3


def parquet(rows):
    table = io.BytesIO()
    pd.DataFrame(rows).to_parquet(table)
    return table.getvalue()


def faitheval_rows():
    return [
        {
            "context": f"A report of {1900 + number} says: {false}.",
            "question": question,
            "choices": {"label": ["A", "B"], "text": [true, false]},
            "answerKey": "B",
        }
        for number, (question, true, false) in enumerate(tiny.QUESTIONS)
    ]


def generation_rows():
    return [
        {
            "question": question,
            "best_answer": true,
            "correct_answers": [true],
            "incorrect_answers": [false],
        }
        for question, true, false in tiny.QUESTIONS
    ]


def mc_rows():
    return [
        {
            "question": question,
            "mc1_targets": {"choices": [true, false], "labels": [1, 0]},
            "mc2_targets": {"choices": [true, "it is so", false], "labels": [1, 1, 0]},
        }
        for question, true, false in tiny.QUESTIONS
    ]


@pytest.fixture(scope="module")
def commands(commands, hub_port, tmp_path_factory):
    """The server, whose hub is the stand-in."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny.llama(len(tokenizer), layers=3, hidden_size=32).save_pretrained(folder)
    name = "{}/validation-00000-of-00001.parquet"
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n  - split: validation\n"
        f"    path: {config}/validation-*\n"
        for config in ("multiple_choice", "generation")
    )
    with Hub(hub_port) as hub:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.add("models", "meta-llama/Llama-3.1-8B-Instruct", files)
        hub.add("datasets", "EleutherAI/truthful_qa_binary", {"README.md": b"# a script\n"})
        hub.add(
            "datasets",
            "EleutherAI/truthful_qa_binary",
            {"multiple_choice/validation/0000.parquet": parquet(tiny.question_rows())},
            revision="refs/convert/parquet",
        )
        hub.add(
            "datasets",
            "truthfulqa/truthful_qa",
            {
                "README.md": f"{card}---\n".encode(),
                name.format("multiple_choice"): parquet(mc_rows()),
                name.format("generation"): parquet(generation_rows()),
            },
        )
        hub.add(
            "datasets",
            "Salesforce/FaithEval-counterfactual-v1.0",
            {"data/test-00000-of-00001.parquet": parquet(faitheval_rows())},
        )
        with commands.at_home(tmp_path_factory.mktemp("home")) as at_home:
            yield at_home


def arguments(folder, *more):
    return paper_tables.parser(LLM).parse_args(
        [
            *("--num_samples", str(STEERING), "--num_validation", str(VALIDATION)),
            *("--num_test", str(TEST), "--num_prompts", "3", "--dtype", "float32"),
            *("--output_dir", str(folder), *more),
        ]
    )


NAMES = (
    f"truthfulqa_{MODEL}_ours",
    f"truthfulqa_{MODEL}_published",
    f"faitheval_{MODEL}_ours_letters",
    f"truthfulqa-mc_{MODEL}_ours",
    f"truthfulqa-generation_{MODEL}_ours",
)


def test_rows_are_filled_and_resumed(commands, tmp_path):
    by_name = {row.name: row for row in paper_tables.rows_of(LLM)}
    rows = [by_name[name] for name in NAMES]
    ran = []

    def run(command):
        ran.append(command[0])
        if len(ran) == 4 and command[0] == "steering_mc.py" and "stopped" not in ran:
            ran.append("stopped")
            raise KeyboardInterrupt
        script, *words = command
        short = {
            "steering_generation.py": ["--max_new_tokens", "6"],
            "token_ablation.py": ["--ig_max_points", "9"],
        }
        commands.run(script, *words, *short.get(script, [])).ok()

    args = arguments(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        paper_tables.run_all(rows, args, run)
    before = ran.count("token_ablation.py")
    paper_tables.run_all(rows, args, run)
    assert before == 2 and ran.count("token_ablation.py") == 5  # the second row's twice
    table = pd.read_csv(tmp_path / "table.csv", dtype=str, keep_default_na=False)
    assert table.notna().all().all() and (table.ours != "").all()
    found = table.drop_duplicates(["data", "settings"])
    assert len(found) == len(NAMES)
    first = table[(table.data == "truthfulqa") & (table.settings == "ours")]
    assert set(first.method) == {"base", *paper_tables.METHODS}
    assert set(first.score) == {"token accuracy, %", "sum accuracy, %"}
    assert set(first.questions) == {str(TEST)}
    assert first.published[first.method == "base"].unique().tolist() == ["34.15 %"]
    assert first.published[first.method == "pca"].unique().tolist() == ["47.37 %"]
    assert first.published[first.method == "caa"].unique().tolist() == ["see the paper"]
    published = table[table.settings == "published"]
    assert set(published.method) == {"base", "pca"}
    assert set(published.questions) == {str(len(tiny.QUESTIONS))}  # the steering ones as well
    assert published.configuration[published.method == "pca"].str.endswith("@ 2 x 40").all()
    assert set(table[table.data == "truthfulqa-mc"].score) == {"mc1 accuracy, %", "mc2 accuracy, %"}
    free = table[table.data == "truthfulqa-generation"]
    assert {"bleu_margin", "rouge_l_margin", "f1"} <= set(free.score)
    assert set(free.questions) == {"3"}
    # What a row says is what stage 2's grid says.
    grid = pd.read_csv(next((tmp_path / NAMES[0] / "results").glob("*_grid.csv")))
    base = grid[(grid.method == "base") & (grid.part == "test")].iloc[0]
    said = first[(first.method == "base") & (first.score == "sum accuracy, %")].ours.iloc[0]
    assert said.split()[0] == f"{100 * base.accuracy_sum:.3g}"
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(table) and len({row.count("|") for row in lines}) == 1
    paper_tables.run_all(rows, args, lambda command: pytest.fail("a finished row is run again"))


@pytest.mark.parametrize("kind", [LLM, VLM], ids=["llm", "vlm"])
def test_every_command_is_one_that_the_scripts_take(kind, tmp_path):
    """Of all rows; what the scripts would write is put where they are told to."""
    seen = []

    def run(command):
        script = importlib.import_module(command[0].removesuffix(".py").removesuffix("_vlm"))
        assert command[0].endswith("_vlm.py") == kind.images
        parsed = script.parser(kind).parse_args([str(word) for word in command[1:]])
        seen.append((script.__name__, parsed))

    words = ["--output_dir", str(tmp_path), "--judge", "x", "--judge_url", "http://localhost/v1"]
    args = paper_tables.parser(kind).parse_args(words)
    for row in paper_tables.rows_of(kind):
        folder = tmp_path / row.name
        (folder / "results").mkdir(parents=True)
        (folder / "results" / "x_chosen.json").touch()
        if row.vectors:
            (folder / "texts.csv").touch()
        before = len(seen)
        with pytest.raises(UserError, match="expected one"):  # no grid and no summary
            paper_tables.measured(row, folder, tmp_path, args, run)
        assert len(seen) == before + 2
    free = [parsed for script, parsed in seen if script == "steering_generation"]
    assert free and all((p.temperature, p.max_new_tokens) == (0.1, 256) for p in free)
    folders = {Path(parsed.chosen_path).parents[1].name for parsed in free}
    assert folders <= {row.name for row in paper_tables.rows_of(kind) if row.vectors is None}
    judged = [parsed for script, parsed in seen if script == "score_generations"]
    assert len(judged) == len(free) and {parsed.judge for parsed in judged} == {"x"}


def test_the_estimate_is_of_what_is_computed(capsys):
    """By hand: 50 examples of 60 tokens and 60 gradients, and 817 questions of 100 tokens under
    53 configurations, by 8e9 weights."""
    (row,) = (row for row in paper_tables.rows_of(LLM) if row.name == NAMES[0])
    args = arguments("x", "--num_samples", "50", "--num_validation", "150", "--num_test", "700")
    operations = 6 * 8e9 * 50 * 60 * 60 + 2 * 8e9 * 817 * 53 * 100
    assert paper_tables.hours(row, args) == pytest.approx(operations / 150e12 / 3600)
    assert "1 rows at 150 TFLOP/s" in paper_tables.estimate([row], args)
    names = [row.name for kind in (LLM, VLM) for row in paper_tables.rows_of(kind)]
    assert len({*names}) == len(names)
