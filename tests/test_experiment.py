"""The experiment on a tiny model: its tables follow from each other and from the library."""

import json

import numpy as np
import pandas as pd
import pytest
import tiny

from grains import costs, models

pytest_plugins = ("command_line",)

SEEDS, ALPHAS, BUDGETS = (0, 1), (0.02, 0.3), (0.01, 1000.0)


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory):
    """The command, its result, its folder, the model's folder."""
    model = tiny.save_model(tmp_path_factory.mktemp("models") / "tiny",
                            max_position_embeddings=2048)
    rows = tiny.question_rows()
    data = tmp_path_factory.mktemp("data")
    first, second = (tiny.write_jsonl(data / name, part) for name, part in (
        ("first.jsonl", rows[:14]), ("second.jsonl", rows[10:])))
    folder = tmp_path_factory.mktemp("experiment")
    command = ["experiment.py", "--model_name", model, "--datasets", f"first={first}",
               f"second={second}", "--num_samples", 3, "--num_validation", 4, "--top_k", 3,
               "--methods", "mean", "gradient", "random", "shuffled", "--mode", "pos", "--alphas",
               *ALPHAS, "--seeds", *SEEDS, "--max_ppl_increase", *BUDGETS,
               "--max_unrelated_loss", 1, "--output_dir", folder]
    return command, commands.run(*command).ok(), folder, model


def tables(folder):
    (grid,), (front,) = (list(folder.glob(f"*_{name}.csv")) for name in ("grid", "front"))
    return (pd.read_csv(grid, keep_default_na=False, na_values=["nan", ""]),
            pd.read_csv(front, keep_default_na=False))


def test_every_question_is_in_one_part(made):
    folder = made[2]
    for name in ("first", "second"):
        for seed in SEEDS:
            (part,) = folder.glob(f"*_parts/{name}_seed{seed}.manifest.json")
            assert len(set(json.loads(part.read_text())["data"]["ids"])) == 3
    grid = tables(folder)[0]
    own = grid[grid.dataset == grid.evaluated_on]
    sizes = own.groupby(["dataset", "part"]).questions.unique()
    assert sizes["first", "validation"].tolist() == [4]
    assert sizes["first", "test"].tolist() == [14 - 3 - 4]


def test_prices_are_the_librarys(made):
    grid = tables(made[2])[0]
    lm = models.load(str(made[3]))
    validated = grid[grid.part == "validation"]
    base = validated[validated.method == "base"]
    expected = costs.perplexity(lm, costs.neutral_texts(), [], 4096)[0]
    assert base.perplexity.to_numpy() == pytest.approx(expected, rel=1e-4)
    assert (base.perplexity_increase == 0).all() and (base.unrelated_change == 0).all()
    kept = costs.capability(lm, costs.unrelated_examples(), [], 4096)
    assert base.unrelated_accuracy.to_numpy() == pytest.approx(kept["token"][0])
    changed = validated[validated.alpha == max(ALPHAS)]
    assert (changed.perplexity_increase.abs() > 0.001).all()


def test_the_front_follows_from_the_grid(made):
    """What is chosen is affordable and best on validation; its test accuracy is the grid's."""
    grid, front = tables(made[2])
    own = front[front.dataset == front.evaluated_on]
    assert len(own) == 2 * 4 * 2 * len(BUDGETS) and len(front) == 2 * len(own)
    for row in own.itertuples():
        gains, accuracies = [], []
        for seed, label in zip(SEEDS, (row.configuration.split("; ") * 2)[:2], strict=True):
            of_seed = grid[(grid.dataset == row.dataset) & (grid.seed == seed)
                           & (grid.evaluated_on == row.dataset)]
            validated = of_seed[of_seed.part == "validation"].set_index("configuration")
            tested = of_seed[of_seed.part == "test"].set_index("configuration")
            column = f"accuracy_{row.score}"
            mine = validated[(validated.method == row.method)
                             & (validated.perplexity_increase <= row.max_ppl_increase)]
            best = max([validated[column]["base"], *mine[column]])
            assert validated[column][label] == best
            gains.append(tested[column][label] - tested[column]["base"])
            accuracies.append(tested[column][label])
        assert row.is_control == (row.method in ("random", "shuffled"))
        assert row.gain_low <= row.gain <= row.gain_high
        # A question that both seeds test counts once, so the mean over seeds is not exact.
        assert row.gain == pytest.approx(np.mean(gains), abs=0.15)
        assert row.accuracy - row.base_accuracy == pytest.approx(row.gain, abs=1e-9)


def test_what_is_done_is_not_done_again(made, commands):
    command, result, folder, _ = made
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    again = commands.run(*command).ok()
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
    assert "scores: " not in again.err
    assert result.out.splitlines()[-2:] == again.out.splitlines()[-2:]


def test_an_answer_alone_is_refused(made, commands, tmp_path):
    command = made[0]
    single = [row | {"choices": row["choices"][:1], "label": 0} if index == 7 else row
              for index, row in enumerate(tiny.question_rows())]
    path = tiny.write_jsonl(tmp_path / "single.jsonl", single)
    place = command.index("--datasets")
    changed = [*command[:place + 1], f"single={path}", *command[place + 3:-1], tmp_path]
    result = commands.run(*changed)
    assert result.code != 0 and "single answer" in result.err and "Traceback" not in result.err
