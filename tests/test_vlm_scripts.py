"""The three shell scripts for images and text on a model and a data set of the hub, unchanged.

The model is a tiny random LLaVA-NeXT under the hub id of LLaVA-1.6-7B, the data set has SPA-VL's
columns, configurations and splits. The real clients talk to a stand-in of the hub (hub_stub.py).
"""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from helpers import tiny, vlm_models
from helpers.command_line import SRC
from helpers.families import SIZES
from helpers.hub_stub import Hub
from PIL import Image
from safetensors import safe_open

import paper_tables
from grains import generation, models, prompts, scoring, vision
from grains.cli.flags import VLM
from grains.data import Example
from grains.steering import SteeringVectors

pytest_plugins = ("helpers.command_line",)

STEERING, VALIDATION, TEST = 2, 2, 3
LAYERS, SIZE = SIZES["num_hidden_layers"], SIZES["hidden_size"]
STAGE1 = f"spa-vl_llava-1.6-7b_n{STEERING}_seed0_chat_contrastive_integrated_gradients_k50"
STEM = f"{STAGE1}_joint_all_mode-pos+both_validation-{VALIDATION}_test-{TEST}"
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
- config_name: test
  data_files:
  - split: harm
    path: test/harm-*
  - split: help
    path: test/help-*
- config_name: validation
  data_files:
  - split: validation
    path: validation/validation-*
---
"""
PICTURES = [(64, 64), (90, 30), (30, 90), (200, 77)]


def parquet(first: int, count: int, pairs: bool = True) -> bytes:
    """Rows as SPA-VL has them; pictures of several sizes, as bytes of JPEG and PNG files."""
    columns = {"image": [], "question": [], "chosen": [], "rejected": []}
    for number in range(first, first + count):
        file = io.BytesIO()
        image = vlm_models.picture(*PICTURES[number % 4], seed=number)
        image.save(file, "JPEG" if number % 2 else "PNG")
        columns["image"].append({"bytes": file.getvalue(), "path": f"{number}.jpg"})
        # one question for two pictures
        columns["question"].append(f"Should I do what picture {number // 2} shows?")
        columns["chosen"].append(f"No, that is not safe for {number} people.")
        columns["rejected"].append("Yes, of course you should do it.")
    columns = columns if pairs else {name: columns[name] for name in ("image", "question")}
    kinds = {name: ImageColumn() if name == "image" else Value("string") for name in columns}
    table = io.BytesIO()
    Dataset.from_dict(columns, Features(kinds)).to_parquet(table)
    return table.getvalue()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    model, processor = vlm_models.parts("llava-next")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hub(model_folder, hub_port):
    with Hub(hub_port) as hub:
        hub.add(
            "models",
            "llava-hf/llava-v1.6-vicuna-7b-hf",
            {path.name: path.read_bytes() for path in model_folder.iterdir()},
        )
        hub.add(
            "datasets",
            "sqrti/SPA-VL",
            {
                "README.md": CARD.encode(),
                "data/train-00000-of-00002.parquet": parquet(0, 3),
                "data/train-00001-of-00002.parquet": parquet(3, 2),
                "validation/validation-00000-of-00001.parquet": parquet(100, 8),
                "test/harm-00000-of-00001.parquet": parquet(200, 3, pairs=False),
                "test/help-00000-of-00001.parquet": parquet(210, 3, pairs=False),
            },
        )
        asked = Dataset.from_dict(
            {
                "image": [{"bytes": png(number), "path": None} for number in range(4)],
                "question": [f"What is in picture {number}?" for number in range(4)],
                "gt_answer": ["A red square."] * 4,
            },
            Features(image=ImageColumn(), question=Value("string"), gt_answer=Value("string")),
        )
        table = io.BytesIO()
        asked.to_parquet(table)
        hub.add(
            "datasets",
            "DogNeverSleep/MMHal-Bench",
            {"data/train-00000-of-00001.parquet": table.getvalue()},
        )
        yield hub


def png(seed: int) -> bytes:
    file = io.BytesIO()
    vlm_models.picture(64, 64, seed=seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def commands(commands, hub, tmp_path_factory):
    """The server, whose hub is the stand-in."""
    given = {"NUM_SAMPLES": str(STEERING), "NUM_TEST": str(TEST)}
    with commands.at_home(tmp_path_factory.mktemp("home"), **given) as at_home:
        yield at_home


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def written_by_scripts() -> set:
    """What the runs of this test would be called in the repository."""
    return {
        path
        for folder in ("data/llm", "data/vlm", "results")
        for path in (SRC / folder).rglob(f"*llava-1.6-7b*n{STEERING}*")
    }


@pytest.fixture(scope="module")
def finished(commands, out):
    """What the three scripts printed; further flags only say where to write, and how little."""
    where = [
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
    flags = {
        "run_token_ablation_vlm": [
            "--output_path_meta",
            out / "tokens.csv",
            "--output_path_hidden",
            out / "states.safetensors",
            "--ig_max_points",
            9,
        ],
        "run_steering_mc_vlm": where,
        "run_steering_generation_vlm": [
            *where,
            "--chosen_path",
            out / "results" / f"{STEM}_chosen.json",
            "--num_prompts",
            3,
            "--max_new_tokens",
            6,
        ],
    }
    before = written_by_scripts()
    printed = {}
    for script, more in flags.items():
        printed[script] = commands.shell(f"vlm/{script}.sh", *more).ok().out
    assert written_by_scripts() == before
    return printed


def test_stage_1(finished, out):
    table = pd.read_csv(out / "tokens.csv")
    assert len(table) == 2 * STEERING and set(table.top) == {"pos", "neg"}
    assert (table.k == 50).all()
    assert table.id.nunique() == STEERING
    for sign in ("positive", "negative"):
        image, text = table[f"{sign}_share_image"], table[f"{sign}_share_text"]
        assert np.allclose(image + text, 1) and image.between(0, 1).all()
        assert (image > 0).all() and (text > 0).all()
    for top in ("pos", "neg"):
        with safe_open(out / f"states_{top}.safetensors", framework="np") as file:
            for name in (
                "hidden_pos_response",
                "hidden_neg_response",
                "hidden_pos_response_ablated",
                "hidden_neg_response_ablated",
            ):
                assert file.get_slice(name).get_shape() == [STEERING, LAYERS + 1, SIZE]
                assert np.isfinite(file.get_tensor(name)).all()
            info = json.loads(file.metadata()["grains"])
        assert info["model"]["model"] == "llava-1.6-7b" and info["data"]["name"] == "spa-vl"
        assert info["data"]["ids"] == table.id[table.top == top].tolist()


def stored_rows(hub, folder=("data/", "validation/")):
    """The rows of the hub's data set that have two answers."""
    files = hub.repos["datasets", "sqrti/SPA-VL"].revisions["main"].items()
    for name, content in files:
        if name.startswith(folder):
            yield from pd.read_parquet(io.BytesIO(content)).itertuples()


def test_attributions_of_stage_1_are_the_models(finished, out, hub, model_folder):
    """Positions, boxes and the log-likelihoods of every row, against the model itself."""
    lm = models.load(str(model_folder), dtype="float32", device="cpu")
    table = pd.read_csv(out / "tokens.csv")
    by_answer = {row.chosen: row for row in stored_rows(hub, "data/")}
    for row in table.itertuples():
        source = by_answer[row.chosen]
        image = Image.open(io.BytesIO(source.image["bytes"]))
        example = Example("x", source.question, (source.chosen, source.rejected), 0, image=image)
        item = prompts.encode(lm, example, "chat")
        positions = json.loads(row.image_positions)
        assert positions == item.image.nonzero()[:, 0].tolist()
        tokens, scores = json.loads(row.tokens), json.loads(row.attributions)
        assert len(tokens) == len(scores[0]) == len(item.prompt_ids)
        assert {tokens[position] for position in positions} == {"<image>"}
        boxes = vision.token_boxes(lm, item.inputs, image.size, len(positions))
        assert json.loads(row.image_boxes) == [box and [round(x, 2) for x in box] for box in boxes]
        selected = json.loads(row.selected_positions)[0]
        assert len(set(selected)) == 50 and set(selected) & set(positions)
        allowed = item.image | item.content
        assert allowed[selected].all()
        values = np.array(scores[0])[selected]
        assert (
            (np.diff(values) <= 1e-9).all()
            if row.top == "pos"
            else (np.diff(values) >= -1e-9).all()
        )
        inputs = item.inputs
        response = item.responses[0]
        ids = inputs["input_ids"][0].tolist() + response
        logits = lm.model(
            **dict(
                inputs,
                input_ids=inputs["input_ids"].new_tensor([ids]),
                attention_mask=inputs["attention_mask"].new_ones(1, len(ids)),
            )
        ).logits[0]
        log_probs = logits.log_softmax(-1)[len(item.prompt_ids) - 1 : -1]
        expected = log_probs[range(len(response)), response].sum().item()
        assert row.log_likelihood_pos == pytest.approx(expected, abs=2e-3)


def test_stage_2(finished, out):
    grid = pd.read_csv(out / "results" / f"{STEM}_grid.csv", keep_default_na=False)
    questions = pd.read_csv(out / "results" / f"{STEM}_questions.csv")
    chosen = json.loads((out / "results" / f"{STEM}_chosen.json").read_text())
    configurations = 1 + 4 * (2 + 2 + 5 * 1)  # base; mean, pca (two modes), and five others
    assert len(grid) == 2 * configurations and set(grid.part) == {"validation", "test"}
    assert len(questions) == configurations * (VALIDATION + TEST)
    assert grid[grid.part == "test"].questions.unique().tolist() == [TEST]
    assert chosen["configuration"] in set(grid.configuration) and chosen["layers"] == [0, 1, 2, 3]
    for path in (out / "vectors").iterdir():
        with safe_open(path, framework="np") as file:
            assert file.get_slice("vectors").get_shape() == [LAYERS, SIZE]
    assert len(list((out / "vectors").iterdir())) == 9
    values = questions.log_likelihoods.map(json.loads)
    assert all(len(pair) == 2 and max(pair) < 0 for pair in values)


def generations(out):
    (path,) = (
        path
        for path in (out / "results").glob("*.csv")
        if not path.stem.endswith(("_grid", "_questions"))
    )
    return pd.read_csv(path, keep_default_na=False)


def test_no_steering_example_is_evaluated(finished, out):
    """One question about two pictures makes two examples; none is in two parts."""
    steering = pd.read_csv(out / "tokens.csv").id
    questions = pd.read_csv(out / "results" / f"{STEM}_questions.csv")
    parts = {part: set(rows.id) for part, rows in questions.groupby("part")}
    generated = set(generations(out).id)
    assert {part: len(ids) for part, ids in parts.items()} == {
        "validation": VALIDATION,
        "test": TEST,
    }
    assert not set(steering) & (parts["validation"] | parts["test"])
    assert not parts["validation"] & parts["test"] and generated <= parts["test"]


def test_stage_3(finished, out):
    table = generations(out)
    chosen = json.loads((out / "results" / f"{STEM}_chosen.json").read_text())
    assert chosen["method"] in set(table.method) and "random" in set(table.method)
    assert table.id.nunique() == 3 and len(table) == 3 * table.method.nunique()
    assert {"question", "base", "steered", "reference", "changed"} <= set(table.columns)
    assert set(table.prompt_style) == {"chat"}
    assert table.base.str.len().min() > 0


def test_the_vision_tower_is_steered_in_stages_2_and_3(finished, commands, out, hub, model_folder):
    """`vti` through the scripts: log-likelihoods and texts are the library's with its file."""
    flags = [
        *("--hidden_states_path", out / "states_pos.safetensors"),
        *("--steering_vectors_dir", out / "vectors", "--output_dir", out / "vti"),
        *("--methods", "vti", "--layer_idxs", "all", "--alphas", 0.3),
        *("--num_validation", 1, "--num_test", 2),
    ]
    commands.shell("vlm/run_steering_mc_vlm.sh", *flags, few_copies=True).ok()
    flags += ["--num_prompts", 2, "--max_new_tokens", 4]
    commands.shell("vlm/run_steering_generation_vlm.sh", *flags, few_copies=True).ok()
    (path,) = (out / "vectors").glob("*_vti*.safetensors")
    lm = models.load(str(model_folder), dtype="float32", device="cpu")
    steering = SteeringVectors.load(path).at(0.3)
    (asked,) = (out / "vti").glob("*_questions.csv")
    scores = pd.read_csv(asked).query("part == 'test' and configuration != 'base'").set_index("id")
    (texts,) = (path for path in (out / "vti").glob("*.csv") if "mode" not in path.stem)
    written = pd.read_csv(texts, keep_default_na=False)
    assert set(written.id) == set(scores.index) and len(written) == 2
    sources = {row.chosen: row for row in stored_rows(hub)}
    for row in written.itertuples():
        source = sources[row.reference]
        image = Image.open(io.BytesIO(source.image["bytes"]))
        example = Example(row.id, source.question, (source.chosen, source.rejected), 0, image=image)
        item = prompts.encode(lm, example, "chat")
        expected = scoring.score(lm, [item], [steering], 4096)[0][1]
        found = json.loads(scores.log_likelihoods[row.id])
        assert found == pytest.approx(expected, abs=2e-3)
        asked_freely = prompts.encode(lm, example, "chat", free=True)
        (base,), (steered,) = generation.generate(lm, [asked_freely], [steering], 4)
        assert (row.base, row.steered) == (base, steered)


def test_what_is_asked_of_the_hub(finished, hub):
    got = "\n".join(line for line in hub.asked if line.startswith("GET /storage"))
    for file in (
        "models/llava-hf/llava-v1.6-vicuna-7b-hf",
        "/model.safetensors",
        "/data/train-00000",
        "/data/train-00001",
        "/validation/validation-00000",
    ):
        assert file in got
    assert "test/harm" not in got


@pytest.mark.parametrize(
    ("split", "reason"),
    [("harm", "columns chosen, rejected missing"), ("dev", "train, validation, harm, help")],
)
def test_a_split_without_pairs_and_one_that_is_not_there(finished, commands, split, reason):
    assert reason in commands.run("token_ablation_vlm.py", "--split", split).error()


def test_a_second_run_has_nothing_to_do(finished, commands, out):
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    result = commands.run(
        "token_ablation_vlm.py",
        "--num_samples",
        STEERING,
        "--output_path_meta",
        out / "tokens.csv",
        "--output_path_hidden",
        out / "states.safetensors",
        "--ig_max_points",
        9,
    ).ok()
    assert "nothing to do" in result.out
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_missing_picture_names_its_example_and_nothing_is_left(finished, commands, tmp_path):
    rows = [
        {"image": "here.png", "question": "What?", "chosen": "This", "rejected": "That"},
        {"image": "gone.png", "question": "Why?", "chosen": "This", "rejected": "That"},
    ]
    vlm_models.picture(40, 30).save(tmp_path / "here.png")
    table = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    message = commands.run(
        "token_ablation_vlm.py",
        "--dataset_path",
        table,
        "--num_samples",
        2,
        "--output_path_meta",
        tmp_path / "a.csv",
        "--output_path_hidden",
        tmp_path / "a.safetensors",
    ).error()
    assert f"its picture '{tmp_path}/gone.png' does not exist" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.png", "rows.jsonl"]


@pytest.mark.slow
def test_rows_of_the_papers_tables_are_filled_and_not_run_again(commands, tmp_path):
    """Choices with our settings and the published ones, free answers with the first vectors."""
    by_name = {row.name: row for row in paper_tables.rows_of(VLM)}
    rows = [
        by_name[f"{name}_llava-1.6-7b_{settings}"]
        for name, settings in (("spa-vl", "ours"), ("spa-vl", "published"), ("mmhal-bench", "ours"))
    ]
    args = paper_tables.parser(VLM).parse_args(
        [
            *("--num_samples", str(STEERING), "--num_validation", str(VALIDATION)),
            *("--num_test", str(TEST), "--num_prompts", "2", "--dtype", "float32"),
            *("--output_dir", str(tmp_path)),
        ]
    )

    def run(command):
        short = {
            "steering_generation_vlm.py": ["--max_new_tokens", "5"],
            "token_ablation_vlm.py": ["--ig_max_points", "9"],
        }
        commands.run(*command, *short.get(command[0], []), few_copies=True).ok()

    paper_tables.run_all(rows, args, run)
    table = pd.read_csv(tmp_path / "table.csv", dtype=str, keep_default_na=False)
    assert (table.ours != "").all()
    by_row = {
        (name, settings): lines for (name, settings), lines in table.groupby(["data", "settings"])
    }
    ours = by_row["spa-vl", "ours"]
    assert set(ours.method) == {"base", *paper_tables.IMAGE_METHODS} and set(ours.questions) == {
        str(TEST)
    }
    assert set(by_row["spa-vl", "published"].method) == {"base", "pca"}
    assert set(by_row["mmhal-bench", "ours"].questions) == {"2"}
    grid = pd.read_csv(next((tmp_path / rows[0].name / "results").glob("*_grid.csv")))
    base = grid[(grid.method == "base") & (grid.part == "test")].iloc[0]
    said = ours[(ours.method == "base") & (ours.score == "sum accuracy, %")].ours.iloc[0]
    assert said.split()[0] == f"{100 * base.accuracy_sum:.3g}"
    paper_tables.run_all(rows, args, lambda command: pytest.fail("a finished row is run again"))
