"""lm-eval's tasks, base and steered, against our own scores; run by `make interop`."""

import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.families import tiny_model
from transformers import AutoTokenizer

import grains
import harness as script
from grains import models
from grains.errors import UserError
from grains.export import harness, plan
from grains.steering import Gate, SteeringVectors

PAIRS = "red blue, cat dog, sun moon, tea milk, rain snow, car bus, gold iron, left right"
QUESTIONS = [
    (f"Which of them, {' or '.join(pair.split())}?", *pair.split()) for pair in PAIRS.split(", ")
]
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def lm():
    tokenizer = AutoTokenizer.from_pretrained(models.embedded_model())
    return models.wrap("tiny-llama", tiny_model("llama"), tokenizer)


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"question": question, "choices": [right, wrong], "label": 0}
        for question, right, wrong in QUESTIONS
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "capitals.yaml").write_text(TASK.format(path=data))
    return tmp_path


def vectors(lm, gate=None):
    generator = torch.Generator().manual_seed(1)
    shape = len(lm.layers), lm.hidden_size
    return SteeringVectors(
        torch.randn(shape, generator=generator), torch.full((4,), 99.0), {}, gate
    )


def test_a_local_task_is_what_we_score(lm, folder):
    gate = Gate(torch.zeros(4, lm.hidden_size), torch.full((4,), 0.4))
    plans = [plan.make(lm, vectors(lm, gate), "hf", alpha) for alpha in (2.0, -2.0)]
    output = folder / "out.csv"
    table, computed = harness.run(lm, plans, ["capitals"], output, str(folder / "tasks"))
    assert computed and [*table.configuration] == ["base", *(item.label for item in plans)]
    samples = pd.read_csv(folder / "out_samples.csv")
    right = {}
    for label, block in [("base", nullcontext()), *((item.label, item.steer()) for item in plans)]:
        with block:
            scores = [grains.score(lm, asked, answers) for asked, *answers in QUESTIONS]
        right[label] = [float(first > second) for first, second in scores]
        own = samples[samples.configuration == label].sort_values("doc")
        assert own.value.tolist() == right[label]
    assert len({*map(tuple, right.values())}) > 1
    for row in table.itertuples():
        assert row.examples == 8 and row.value == pytest.approx(np.mean(right[row.configuration]))
        expected = np.mean(right[row.configuration]) - np.mean(right["base"])
        assert row.change == pytest.approx(expected) and row.seconds > 0


def test_results_are_kept_by_steering_and_by_task(lm, folder):
    output, tasks = folder / "out.csv", str(folder / "tasks")
    plans = [plan.make(lm, vectors(lm), "hf", 0.5)]
    harness.run(lm, plans, ["capitals"], output, tasks)
    assert not harness.run(lm, plans, ["capitals"], output, tasks)[1]
    with pytest.raises(UserError, match="is from other settings"):
        harness.run(lm, [plan.make(lm, vectors(lm), "hf", 0.6)], ["capitals"], output, tasks)
    file = folder / "tasks" / "capitals.yaml"
    file.write_text(file.read_text().replace("Q: ", "Question: "))
    with pytest.raises(UserError, match=r"tasks\.capitals"):
        harness.run(lm, plans, ["capitals"], output, tasks)


def test_what_it_does_not_know(lm, folder):
    with pytest.raises(UserError, match="knows no task nothing"):
        harness.tasks(["nothing"], str(folder / "tasks"))
    with pytest.raises(UserError, match="is no folder"):
        harness.tasks(["capitals"], str(folder / "missing"))


def test_the_script(folder, monkeypatch, capsys):
    lm = models.load(models.EMBEDDED, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(1)
    v = SteeringVectors(torch.randn(30, 576, generator=generator), torch.full((30,), 9.0), {})
    v.save(folder / "v.safetensors")
    flags = ["--model_name", models.EMBEDDED, "--vectors", folder / "v.safetensors"]
    flags += ["--alphas", "0.1", "--layers", "10-12", "--tasks", "capitals", "--limit", "2"]
    flags += ["--include_path", folder / "tasks", "--output", folder / "table.csv"]
    monkeypatch.setattr("sys.argv", ["harness.py", *map(str, flags)])
    script.main()
    printed = capsys.readouterr().out
    assert "capitals acc (none)" in printed and "vectors @ 10-12 x 0.1 (relative)" in printed
    assert len(pd.read_csv(folder / "table.csv")) == 2 and lm.layers is not None
