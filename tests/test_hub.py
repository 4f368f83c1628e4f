"""The three shell scripts on a model and a data set of the hub, by their short names.

The real clients talk to a stand-in of the hub on the loopback interface (hub_stub.py).
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from helpers import tiny
from helpers.command_line import SRC
from helpers.families import small_tokenizer
from helpers.hub_stub import Hub
from safetensors import safe_open

pytest_plugins = ("helpers.command_line",)

STEERING, VALIDATION, TEST = 2, 3, 4
LAYERS, SIZE = 3, 32
STAGE1 = (
    f"truthfulqa_llama-3.1-8b-instruct_n{STEERING}_seed0_qa_contrastive_integrated_gradients_k10"
)
STEM = f"{STAGE1}_joint_all_mode-pos+both_validation-{VALIDATION}"


def folder_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truthfulqa_files() -> dict[str, bytes]:
    """The repository as it is published: two configurations with one split each."""
    rows = {
        "multiple_choice": {
            "question": "What is it?",
            "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]},
            "mc2_targets": {"choices": ["c", "b", "a"], "labels": [1, 1, 0]},
        },
        "generation": {
            "question": "Who is it?",
            "best_answer": "1950-01-05",
            "correct_answers": ["1950-01-05", "7"],
            "incorrect_answers": ["None"],
        },
    }
    card, files = ["---", "configs:"], {}
    for name, row in rows.items():
        path = f"{name}/validation-00000-of-00001.parquet"
        card += [f"- config_name: {name}", "  data_files:", "  - split: validation"]
        card += [f"    path: {name}/validation-*"]
        table = io.BytesIO()
        pd.DataFrame([row]).to_parquet(table)
        files[path] = table.getvalue()
    return files | {"README.md": "\n".join([*card, "---", ""]).encode()}


@pytest.fixture(scope="module")
def hub(hub_port, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny.llama(len(tokenizer), layers=LAYERS, hidden_size=SIZE).save_pretrained(folder)
    table = io.BytesIO()
    pd.DataFrame(tiny.question_rows(STEERING + VALIDATION + TEST)).to_parquet(table)
    files = folder_files(folder)
    with Hub(hub_port) as hub:
        hub.add("models", "meta-llama/Llama-3.1-8B-Instruct", files)
        hub.add("models", "meta-llama/Llama-3.1-8B", files, gated=True)
        script = {"truthful_qa_binary.py": b"raise SystemExit", "README.md": b"# a script\n"}
        hub.add("datasets", "EleutherAI/truthful_qa_binary", script)
        hub.add(
            "datasets",
            "EleutherAI/truthful_qa_binary",
            {"multiple_choice/validation/0000.parquet": table.getvalue()},
            revision="refs/convert/parquet",
        )
        hub.add("datasets", "truthfulqa/truthful_qa", truthfulqa_files())
        hub.add("datasets", "toxigen/toxigen-data", {"annotated/train.csv": b"text\n"}, gated=True)
        yield hub


@pytest.fixture(scope="module")
def commands(commands, hub, tmp_path_factory):
    """The server, whose hub is the stand-in."""
    given = {"PYTHON": sys.executable, "NUM_SAMPLES": str(STEERING)}
    with commands.at_home(tmp_path_factory.mktemp("home"), **given) as at_home:
        yield at_home


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def flags(out):
    """The three shell scripts, and further flags so that nothing is written into the repository."""
    vectors = [
        "--hidden_states_path",
        out / "states_pos.safetensors",
        "--hidden_states_neg_path",
        out / "states_neg.safetensors",
        "--steering_vectors_dir",
        out / "vectors",
        "--output_dir",
        out / "results",
        "--num_validation",
        VALIDATION,
    ]
    return {
        "run_token_ablation.sh": [
            "--output_path_meta",
            out / "tokens.csv",
            "--output_path_hidden",
            out / "states.safetensors",
        ],
        "run_steering_mc.sh": vectors,
        "run_steering_generation.sh": [
            *vectors,
            "--chosen_path",
            out / "results" / f"{STEM}_chosen.json",
            "--num_prompts",
            3,
            "--max_new_tokens",
            6,
        ],
    }


@pytest.fixture(scope="module")
def finished(hub, commands, flags, out):
    """What the three scripts printed, and what was asked of the hub meanwhile."""
    before = written_by_scripts()
    printed = {}
    for script, more in flags.items():
        printed[script] = commands.shell(f"llm/{script}", *more).ok().out
    assert written_by_scripts() == before
    return printed, list(hub.asked)


def written_by_scripts() -> set:
    """What the runs of this test would be called in the repository."""
    return {
        path
        for folder in ("data/llm", "data/vlm", "results")
        for path in (SRC / folder).rglob("*llama-3.1-8b-instruct*n4*")
    }


def test_stage_1(finished, out):
    table = pd.read_csv(out / "tokens.csv")
    assert len(table) == 2 * STEERING and set(table.top) == {"pos", "neg"}
    assert {
        "id",
        "question",
        "chosen",
        "rejected",
        "f",
        "f_ablated",
        "log_likelihood_pos",
        "log_likelihood_neg_ablated",
        "selected_tokens",
        "attributions",
        "completeness_error",
    } <= set(table.columns)
    for top in ("pos", "neg"):
        with safe_open(out / f"states_{top}.safetensors", framework="np") as file:
            for name in (
                "hidden_pos_response",
                "hidden_neg_response",
                "hidden_pos_response_ablated",
                "hidden_neg_response_ablated",
            ):
                assert file.get_slice(name).get_shape() == [STEERING, LAYERS + 1, SIZE]
            info = json.loads(file.metadata()["grains"])
        assert info["model"]["model"] == "llama-3.1-8b-instruct"
        assert info["data"]["ids"] == table.id[table.top == top].tolist()
    truth = {row["question"]: row["choices"][row["label"]] for row in tiny.question_rows()}
    assert [truth[question] for question in table.question] == table.chosen.tolist()


def generations(out):
    (path,) = (out / "results").glob(f"{STAGE1}_joint_0-2_methods-*.csv")
    return path


def test_stage_2(finished, out):
    grid = pd.read_csv(out / "results" / f"{STEM}_grid.csv", keep_default_na=False)
    questions = pd.read_csv(out / "results" / f"{STEM}_questions.csv")
    chosen = json.loads((out / "results" / f"{STEM}_chosen.json").read_text())
    configurations = 1 + 4 * (2 + 2 + 5 * 1)  # base; mean, pca (two modes), and five others
    assert len(grid) == 2 * configurations and set(grid.part) == {"validation", "test"}
    assert len(questions) == configurations * (VALIDATION + TEST)
    assert chosen["configuration"] in set(grid.configuration)
    assert len(list((out / "vectors").iterdir())) == 9
    assert grid[grid.part == "test"].questions.unique().tolist() == [TEST]


def test_no_steering_example_is_evaluated(finished, out):
    steering = set(pd.read_csv(out / "tokens.csv").id)
    questions = pd.read_csv(out / "results" / f"{STEM}_questions.csv")
    parts = {part: set(rows.id) for part, rows in questions.groupby("part")}
    generated = set(pd.read_csv(generations(out)).id)
    assert len(steering) == STEERING
    assert {part: len(ids) for part, ids in parts.items()} == {
        "validation": VALIDATION,
        "test": TEST,
    }
    assert not steering & (parts["validation"] | parts["test"])
    assert not parts["validation"] & parts["test"]
    assert generated <= parts["test"]


def test_stage_3(finished, out):
    table = pd.read_csv(generations(out), keep_default_na=False)
    chosen = json.loads((out / "results" / f"{STEM}_chosen.json").read_text())
    controls = {"random", "shared_random", "rotated"}
    assert len(table) == 4 * 3  # the chosen configuration and the controls
    assert set(table.method) == {chosen["method"], *controls}
    assert {"question", "base", "steered", "reference", "changed"} <= set(table.columns)
    assert set(table.prompt_style) == {"chat"}


def test_what_is_asked_of_the_hub(finished):
    asked = "\n".join(finished[1])
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert re.search(f"/meta-llama/Llama-3.1-8B-Instruct/resolve/[^/]+/{file}", asked)
    assert "refs%2Fconvert%2Fparquet" in asked
    assert "GET /storage/datasets/EleutherAI/truthful_qa_binary" in asked
    assert "truthful_qa_binary.py" not in asked


@pytest.mark.parametrize("script", ["token_ablation", "steering_mc", "steering_generation"])
def test_second_run_has_nothing_to_do(finished, commands, flags, out, script):
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    more = ["--mode", "pos", "both"] if script == "steering_mc" else []
    result = commands.run(
        f"{script}.py", "--num_samples", STEERING, *more, *flags[f"run_{script}.sh"]
    ).ok()
    assert "nothing to do" in result.out
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def model_error(commands, out, name: str, **options) -> str:
    return commands.run(
        "token_ablation.py",
        "--model_name",
        name,
        "--num_samples",
        2,
        "--output_path_meta",
        out / "other.csv",
        "--output_path_hidden",
        out / "other.safetensors",
        **options,
    ).error()


def test_gated_model(finished, commands, out):
    message = model_error(commands, out, "llama-3.1-8b")
    assert "gated" in message.lower() or "restricted" in message
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B " in message
    assert "hf auth login" in message


@pytest.mark.parametrize("name, status", [("qwen-2.5-7b", 401), ("nobody/nothing", 404)])
def test_missing_model(finished, hub, commands, out, name, status):
    hub.missing = status
    message = model_error(commands, out, name)
    assert f"model '{name}'" in message and "not a valid model identifier" in message
    assert "check its name" in message and "local folder" in message


def test_truthfulqa_as_published(finished, commands, tmp_path):
    script = tmp_path / "read.py"
    script.write_text("""
from grains import data
for name in ("truthfulqa-mc", "truthfulqa-generation"):
    rows, source = data.load(name, data.default_split(name, "test"))
    (item,) = data.examples(rows, source, 0)
    print(item.question, item.choices, item.label, item.also_right, item.references)
""")
    assert commands.run(str(script)).ok().out.splitlines() == [
        "What is it? ('a', 'b', 'c') 1 (2,) ()",
        "Who is it? ('1950-01-05', 'None') 0 () ('1950-01-05', '7')",
    ]


def test_gated_data(finished, commands, out):
    message = commands.run("token_ablation.py", "--dataset_name", "toxigen").error()
    assert "https://huggingface.co/datasets/toxigen/toxigen-data" in message
    assert "hf auth login" in message and "dataset_path" in message


def test_missing_data(finished, commands):
    message = commands.run("token_ablation.py", "--dataset_name", "faitheval").error()
    assert "doesn't exist" in message and "dataset_path" in message


def test_wrong_split(finished, commands):
    message = commands.run("token_ablation.py", "--split", "training").error()
    assert "training" in message and "validation" in message and "split" in message


def test_cache_is_enough(finished, commands, flags):
    more = map(str, flags["run_token_ablation.sh"])
    ended = subprocess.run(
        ["bash", "scripts/llm/run_token_ablation.sh", *more],
        cwd=SRC,
        env=commands.environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "nothing to do" in ended.stdout


def test_without_network(finished, hub, commands, tmp_path):
    """The last of this file: the stand-in closes."""
    hub.close()
    model = commands.start(
        "token_ablation.py",
        "--model_name",
        "gemma-3-4b",
        "--num_samples",
        2,
        "--output_path_meta",
        tmp_path / "tokens.csv",
        "--dataset_name",
        "misconceptions",
    )
    message = commands.run("token_ablation.py", "--dataset_name", "faitheval").error()
    assert "network" in message and "dataset_path" in message
    message = model.wait().error()
    assert "network" in message and "local folder" in message
