"""The experiment on a tiny model: its tables follow from each other and from the library."""

import itertools
import json
import random
import signal
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from pytest import approx
from reference import encoded, own_loss_log_likelihood, words
from test_lora import merged, random_adapter

import ablations
import experiment
import token_ablation
from grains import attribution, cli, costs, fronts, models, prompts, runs, stats, strengths
from grains.data import Example
from grains.errors import UserError
from grains.scoring import Configuration
from grains.vectors import Gate, SteeringVectors, steered

pytest_plugins = ("command_line",)

W = words(60, seed=4)

SEEDS, ALPHAS, BUDGETS, LIMIT = (0, 1), (0.02, 0.3), (0.01, 1000.0), 0.015
LINES = {
    ("mean", "pos"),
    ("mean", "pos gated"),
    ("gradient", ""),
    ("gradient", "gated"),
    ("random", ""),
    ("random", "gated"),
    ("shuffled", ""),
    ("trained", "gated"),
    ("trained_random", "gated"),
    ("lora", ""),
}


@pytest.fixture(scope="module")
def made(commands, tmp_path_factory):
    """The command, its result, its folder, the model's folder."""
    model = tiny.save_model(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048
    )
    rows = tiny.question_rows()
    data = tmp_path_factory.mktemp("data")
    first, second = (
        tiny.write_jsonl(data / name, part)
        for name, part in (("first.jsonl", rows[:14]), ("second.jsonl", rows[10:]))
    )
    folder = tmp_path_factory.mktemp("experiment")
    command = [
        "experiment.py",
        "--model_name",
        model,
        "--datasets",
        f"first={first}",
        f"second={second}",
        "--num_samples",
        3,
        "--num_validation",
        4,
        "--top_k",
        3,
        "--methods",
        "mean",
        "gradient",
        "random",
        "shuffled",
        "--mode",
        "pos",
        "--alphas",
        *ALPHAS,
        "--gated",
        "mean",
        "gradient",
        "random",
        "--seeds",
        *SEEDS,
        "--max_ppl_increase",
        *BUDGETS,
        "--lora",
        "dpo",
        "--max_unrelated_loss",
        LIMIT,
        "--num_generations",
        8,
        "--max_new_tokens",
        4,
        "--document",
        folder / "results.md",
        "--output_dir",
        folder,
    ]
    return command, commands.run(*command).ok(), folder, model


def given(command, **flags):
    """The command with other values for some of the flags that it has."""
    command = [str(item) for item in command]
    for flag, values in flags.items():
        place = command.index(f"--{flag}")
        after = next(
            (i for i in range(place + 1, len(command)) if command[i][:2] == "--"), len(command)
        )
        command[place + 1 : after] = values
    return command


def tables(folder):
    (grid,), (front,) = (list(folder.glob(f"*_{name}.csv")) for name in ("grid", "front"))
    return (
        pd.read_csv(grid, keep_default_na=False, na_values=["nan", ""]),
        pd.read_csv(front, keep_default_na=False),
    )


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
    texts, questions = costs.neutral_texts(), costs.unrelated_examples()
    tested = grid[(grid.part == "test") & (grid.dataset == grid.evaluated_on)]
    for rows, passages, asked in (
        (base, texts[::8], questions[::2]),
        (tested[tested.method == "base"], texts[1::4], questions[1::2]),
    ):
        expected = costs.perplexity(lm, passages, [], 4096)[0]
        assert rows.perplexity.to_numpy() == approx(expected, rel=1e-4)
        assert (rows.perplexity_increase == 0).all() and (rows.unrelated_change == 0).all()
        kept = costs.capability(lm, asked, [], 4096)
        assert rows.unrelated_accuracy.to_numpy() == approx(kept["token"][0])
    changed = validated[
        (validated.alpha == max(ALPHAS)) & ~validated.method.isin(experiment.LEARNT)
    ]
    assert len(changed) and (changed.perplexity_increase.abs() > 0.001).all()


def rows_of(folder, method, part="test"):
    """Rows of the ungated configurations of a method on questions of their own data."""
    grid = tables(folder)[0]
    return grid[
        (grid.method == method)
        & grid["mode"].isna()
        & (grid.part == part)
        & (grid.dataset == grid.evaluated_on)
    ]


def the_vectors(folder, row):
    (path,) = folder.glob(f"*_parts/{row.dataset}_seed{row.seed}_pos_{row.method}*.safetensors")
    return SteeringVectors.load(path)


def test_the_price_on_other_kinds_of_text_is_the_librarys(made):
    folder, lm = made[2], models.load(str(made[3]))
    texts = costs.neutral_texts(costs.VARIED)[1::4]
    base = costs.perplexity(lm, texts, [], 4096)[0]
    rows = rows_of(folder, "random")
    for row in rows.itertuples():
        with the_vectors(folder, row).apply(lm, row.alpha, [0, 1, 2]):
            paid = costs.perplexity(lm, texts, [], 4096)[0]
        assert row.varied_increase == approx(paid / base - 1, rel=1e-3)
    assert len(rows)


def test_the_price_on_own_answers_is_the_models(made):
    """Perplexity of what the base model wrote, from the model's own logits, steered by hooks."""
    folder, lm = made[2], models.load(str(made[3]))
    rows = pd.concat([rows_of(folder, "random", part) for part in ("validation", "test")])
    asked = {}
    for row in rows[rows.alpha == max(ALPHAS)].itertuples():
        base = pd.concat(
            pd.read_csv(path, keep_default_na=False)
            for path in folder.glob(
                f"*_parts/{row.dataset}_seed{row.seed}_{row.part}_answers_*.csv"
            )
        )
        base = base[(base.configuration == "base") & (base.text != "")].drop_duplicates("number")
        asked.setdefault((row.dataset, row.seed), []).append({*base.question})
        losses, tokens = np.zeros(2), 0
        for answer in base.itertuples():
            prompt = lm.tokenizer(f"Q: {answer.question}\nA:").input_ids
            example = Example("", answer.question, (answer.text,), 0)
            (response,) = prompts.encode(lm, example).responses
            ids = prompt + response
            for index, strength in enumerate((0.0, row.alpha)):
                with the_vectors(folder, row).apply(lm, strength, [0, 1, 2]), torch.no_grad():
                    log_probs = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
                losses[index] -= sum(
                    log_probs[place - 1, ids[place]].item()
                    for place in range(len(prompt), len(ids))
                )
            tokens += len(response)
        assert row.answers_increase == approx(
            np.exp((losses[1] - losses[0]) / tokens) - 1, rel=1e-3
        )
    assert any(len(parts) == 2 for parts in asked.values())
    assert all(not parts[0] & parts[-1] for parts in asked.values() if len(parts) == 2)


def test_answers_to_train_on_are_drawn_several_times(made):
    differing = 0
    for name in ("first", "second"):
        for seed in SEEDS:
            (path,) = made[2].glob(f"*_parts/{name}_seed{seed}_training_answers_*.csv")
            written = pd.read_csv(path, keep_default_na=False).sort_values("number")
            assert written.number.tolist() == [*range(3 * experiment.DRAWN)]
            one, other = written[:3], written[3:6]
            assert one.question.tolist() == other.question.tolist()
            assert one.question.nunique() == 3
            differing += (one.text.to_numpy() != other.text.to_numpy()).sum()
    assert differing > 6  # of 12; greedy ones would not differ at all


def test_own_answers_belong_to_their_questions(monkeypatch):
    examples = [Example(name, f"question {name}", ("yes", "no"), 0) for name in "ab"]
    written = pd.DataFrame({"number": [3, 0, 2, 1], "text": ["four", "one", "", "two"]})
    monkeypatch.setattr(experiment, "free_answers", lambda *_: written)
    found = experiment.own_answers(
        None, SimpleNamespace(parts={"training": examples}), "training", None
    )
    assert [(item.question, item.choices) for item in found] == [
        ("question a", ("one",)),
        ("question b", ("two",)),
        ("question b", ("four",)),
    ]


def test_answers_are_those_of_the_configurations(made):
    grid = tables(made[2])[0]
    (path,) = made[2].glob("*_generations.csv")
    written = pd.read_csv(path, keep_default_na=False)
    tested = grid[(grid.part == "test") & (grid.dataset == grid.evaluated_on)]
    for row in tested.itertuples():
        mine = written[
            (written.dataset == row.dataset)
            & (written.seed == row.seed)
            & (written.configuration == row.configuration)
        ]
        assert len(mine) == 7
        assert row.words == approx(mine.text.str.split().str.len().mean())
        assert row.repetition == approx(mine.repetition.mean())
    other = grid[grid.dataset != grid.evaluated_on]
    assert len(other) and other.words.isna().all() and other.perplexity.isna().all()


def test_the_document_has_every_gain_and_the_rest_of_the_file(made, commands):
    command, _, folder, _ = made
    path = folder / "results.md"
    written = path.read_text()
    front = tables(folder)[1]
    own = front[front.dataset == front.evaluated_on]
    sections = written.split("\n**")
    for names, rows in own.groupby(["dataset", "score", "limit", "method", "mode"]):
        (section,) = (
            part
            for part in sections
            if part.startswith("{}: gain in {} accuracy".format(*names))
            and f"chosen on validation {names[2]};" in part
        )
        cells = [
            f"{100 * r.gain:+.1f} [{100 * r.gain_low:+.1f}, {100 * r.gain_high:+.1f}]"
            for r in rows.sort_values("max_ppl_increase").itertuples()
        ]
        line = " ".join(names[3:]).strip()
        assert f"| {line} | {' | '.join(cells)} |" in section
    assert "--document results.md" in written and str(path) not in written
    path.write_text("before\n" + written + "after\n")
    commands.run(*command).ok()
    assert path.read_text() == "before\n" + written + "after\n"
    path.write_text(written)


@pytest.mark.parametrize(
    "given, trained",
    [("all", range(10, 30)), ("5-12", range(10, 13)), ("20-29", range(20, 30)), ("4", [4])],
)
def test_vectors_are_trained_behind_the_first_third(given, trained):
    lm, args = SimpleNamespace(layers=range(30)), SimpleNamespace(layer_idxs=[given])
    assert experiment.later_layers(lm, args) == [*trained]


def test_strengths_follow_a_power_between_what_was_tried():
    curve = [(0.0, 0.0), (1.0, 0.1), (2.0, 0.8)]
    # Aimed at is 0.925 of a target: of 0.1 a quarter for 0.025 / 0.925; 0.1 to 0.8 is a third
    # power, and so 0.2 / 0.925 at the third root of 2. 0.11 is paid by 1 closely, 9 never.
    assert strengths.between(curve, [0.025 / 0.925, 0.11, 0.2 / 0.925, 9.0]) == [
        0.5,
        approx(2 ** (1 / 3), abs=5e-3),
    ]
    assert strengths.between([(0.0, 0.0), (1.0, -0.1), (2.0, 0.2)], [0.1 / 0.925]) == [
        approx(3**0.5, abs=5e-3)
    ]


def test_the_strongest_that_costs_no_more_is_taken():
    # What follows a dearer one is not affordable, though it seems to cost less.
    curve = [(0.0, 0.0), (1.0, 0.1), (2.0, 0.05), (3.0, 0.8), (4.0, 0.4)]
    assert strengths.strongest(curve, [0.07, 0.1, 0.5, 0.8]) == [2.0, 4.0]
    # Too dear for all, but then its method stands in the tables, as the base model that is chosen.
    assert strengths.strongest(curve[:1] + curve[2:], [0.02]) == [2.0]


def test_strengths_are_set_by_the_price(made, commands, tmp_path):
    command = [str(item) for item in made[0]]
    place = command.index("--alphas")
    command = [*command[:place], *command[place + 1 + len(ALPHAS) :]]
    command += ["--strengths_at", "0.01", "0.04"]
    commands.run(
        *given(
            command,
            max_ppl_increase=["0.02", "0.08"],
            seeds=["0"],
            lora=["none"],
            output_dir=[str(tmp_path)],
        )
    ).ok()
    grid = tables(tmp_path)[0]
    validated = grid[(grid.part == "validation") & (grid.method != "base")]
    for dataset, method in itertools.product(("first", "second"), ("trained", "trained_random")):
        rows = validated[(validated.dataset == dataset) & (validated.method == method)]
        assert [*zip(rows.layers, rows.alpha, strict=True)] == [
            *itertools.product(["1 2"], experiment.SCALES)
        ]  # of three layers the later ones
    strongest = strengths.FIRST_STRENGTH * strengths.STEPS[1] ** (strengths.ROUNDS - 1)
    reached, shares = {}, []
    validated = validated[~validated.method.isin(experiment.LEARNT)]
    for (_, method, _), rows in validated.groupby(["dataset", "method", "mode"], dropna=False):
        # A price that even the strongest does not cost stands last, for all that it costs.
        paid = rows[rows.alpha < strongest].perplexity_bound.to_numpy()
        shares += [*(paid / [0.01, 0.04][: len(paid)])]
        assert len(paid) == 2 or rows.alpha.iloc[-1] == approx(strongest)
        assert (rows[rows.alpha == strongest].perplexity_bound < 0.04).all()
        reached[method] = max(len(paid), reached.get(method, 0))
    assert reached["gradient"] == 2 and reached["mean"]
    # One curve, of two methods, falls before it rises: three strengths between are too few for it.
    assert max(shares) <= 1 and sum(share < 0.84 for share in shares) <= 2 < len(shares) / 10


def test_a_stronger_strength_is_tried_where_the_square_law_says():
    first, least, most = strengths.FIRST_STRENGTH, *strengths.STEPS
    assert strengths.stronger([(0.0, 0.0)], 0.3) == first
    # 0.1 paid 0.05: 0.3 is reached at sqrt(6) times as much; steps are neither too large nor small
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.05)], 0.3) == approx(0.1 * 6**0.5, abs=5e-4)
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.001)], 0.3) == approx(0.1 * most)
    assert strengths.stronger([(0.0, 0.0), (0.1, -0.1)], 0.3) == approx(0.1 * most)
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.29)], 0.3) == approx(0.1 * least)


def test_a_strength_given_twice_and_layers_from_one_on(made, commands, tmp_path):
    """--alphas 0.02 0.02: one configuration. Layer 2 is not named, and has a gate."""
    command = given(
        made[0],
        alphas=["0.02", "0.02"],
        seeds=["0"],
        methods=["random"],
        lora=["none"],
        output_dir=[str(tmp_path)],
    )
    commands.run(
        *command,
        "--no-train_vectors",
        "--gated",
        "random",
        "--layer_mode",
        "from",
        "--layer_idxs",
        1,
    ).ok()
    grid = tables(tmp_path)[0]
    validated = grid[(grid.part == "validation") & (grid.dataset == "first")]
    assert validated.configuration.tolist() == [
        "base",
        "random @ 1-2 x 0.02",
        "random gated @ 1-2 x 0.02",
    ]
    assert validated.perplexity.nunique() == 3 and validated.margin_sum.notna().all()


def test_other_prices_score_only_what_is_new(made, commands):
    """The same folder, more methods and another price: old scores are read, files are added."""
    command, _, folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*_scores_*.safetensors")}
    grid, front = (
        path.read_bytes()
        for path in (next(folder.glob("*_grid.csv")), next(folder.glob("*_front.csv")))
    )
    # Other prices may choose other configurations, and ask them freely.
    commands.run(
        *given(
            command,
            methods=["caa", "mean", "gradient", "random", "shuffled"],
            max_ppl_increase=["0.005", "1000"],
        )
    ).ok()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    added = [
        path for path in folder.rglob("*_validation_*_scores_*.safetensors") if path not in before
    ]
    for path in added:
        base, *scored = runs.read_header(path)["configurations"]
        assert base == "base" and [name.rpartition(" ")[0] for name in scored] == [
            f"caa @ 0-2 x {alpha:g}" for alpha in ALPHAS
        ]
    assert added
    commands.run(*command).ok()
    assert (
        next(folder.glob("*_grid.csv")).read_bytes(),
        next(folder.glob("*_front.csv")).read_bytes(),
    ) == (grid, front)


def test_a_configuration_is_more_than_its_label():
    gate = Gate(torch.ones(3, 4), torch.ones(3))
    one = Configuration("m", "", (0, 2), 0.1, {0: torch.ones(4), 2: torch.ones(4)}, gate)
    same = replace(
        one, gate=Gate(torch.tensor([1.0, 9.0, 1.0])[:, None].expand(3, 4).clone(), torch.ones(3))
    )  # differs at a layer that is not steered
    assert experiment.identity(one) == experiment.identity(same)
    others = [
        replace(one, gate=None),
        replace(one, gate=Gate(torch.ones(3, 4), torch.zeros(3))),
        replace(one, vectors={0: torch.ones(4), 2: torch.zeros(4)}),
        *(
            experiment.Tuned("m", "", (), 0.1, adapter={"a": torch.ones(2, dtype=dtype)})
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ]
    assert len({experiment.identity(item) for item in [one, *others]}) == 6


def test_random_directions_are_as_long_as_the_vectors():
    lengths = torch.tensor([[0.0], [0.5], [3.0], [7.0]])
    vectors = SteeringVectors(lengths * torch.eye(4, 300), torch.ones(4), {}, "the gate")
    one, other = (experiment.random_like(vectors, seed) for seed in (0, 1))
    for drawn in (one, other):
        assert drawn.vectors.norm(dim=-1).tolist() == approx(lengths[:, 0].tolist())
        assert drawn.gate == "the gate"
        assert drawn.info["method"] == "trained_random"
        cosines = torch.cosine_similarity(drawn.vectors[1:], vectors.vectors[1:], dim=-1)
        assert cosines.abs().max() < 0.3
    assert (one.vectors - other.vectors).norm(dim=-1)[1:].min() > 0.5


def test_the_front_follows_from_the_grid(made):
    """What is chosen is affordable and best on validation; its test accuracy is the grid's."""
    grid, front = tables(made[2])
    own = front[front.dataset == front.evaluated_on]
    # of data sets, methods, scores, prices and limits
    assert len(own) == 2 * len(LINES) * 2 * len(BUDGETS) * 3 and len(front) == 2 * len(own)
    free, _, strictest = front.limit.unique()
    assert set(zip(own.method, own["mode"], strict=True)) == LINES
    for row in own.itertuples():
        gains, accuracies = [], []
        for seed, label in zip(SEEDS, (row.configuration.split("; ") * 2)[:2], strict=True):
            of_seed = grid[
                (grid.dataset == row.dataset)
                & (grid.seed == seed)
                & (grid.evaluated_on == row.dataset)
            ]
            validated = of_seed[of_seed.part == "validation"].set_index("configuration")
            tested = of_seed[of_seed.part == "test"].set_index("configuration")
            column = f"accuracy_{row.score}"
            validated["both"] = validated.accuracy_sum + validated.accuracy_token
            lost = -validated[["unrelated_change", "unrelated_change_sum"]].min(axis=1)
            mine = validated[
                (validated.method == row.method)
                & (validated["mode"].fillna("") == row.mode)
                & (validated.perplexity_bound <= row.max_ppl_increase)
            ]
            if row.limit != free:
                mine = mine[lost[mine.index] <= float(LIMIT)]
            if row.limit == strictest:
                mine = mine[mine.answers_increase <= row.max_ppl_increase]
            best = max([validated.both["base"], *mine.both])
            assert validated.both[label] == approx(best, abs=1e-12)
            gains.append(tested[column][label] - tested[column]["base"])
            accuracies.append(tested[column][label])
        assert row.is_control == (row.method in ("random", "shuffled", "trained_random"))
        assert row.gain_low <= row.gain <= row.gain_high
        # A question that both seeds test counts once, so the mean over seeds is not exact.
        assert row.gain == approx(np.mean(gains), abs=0.15)
        assert row.accuracy - row.base_accuracy == approx(row.gain, abs=1e-9)
        assert (
            row.unrelated_change_low - 1e-9
            <= row.unrelated_change
            <= row.unrelated_change_high + 1e-9
        )
    assert (own.unrelated_change_low < own.unrelated_change_high).any()


def test_what_unrelated_questions_lose_by_hand():
    """Two seeds; ids of the data set's questions are those of unrelated ones as well."""
    answers = []
    for seed, right in enumerate(([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1])):
        chosen = pd.DataFrame(
            [
                {
                    "method": "m",
                    "mode": "",
                    "score": "token",
                    "max_ppl_increase": 0.1,
                    "limit": "none",
                    "configuration": "m x 1",
                    **dict.fromkeys(fronts.PRICES, 0.0),
                }
            ]
        )
        rows = [
            {
                "dataset": "d",
                "evaluated_on": tested,
                "seed": seed,
                "id": str(number),
                "configuration": configuration,
                "token": bool(is_right),
                "sum": False,
            }
            for tested, configuration, answered in (
                ("d", "base", [0, 0]),
                ("d", "m x 1", [1, 1]),
                (fronts.UNRELATED, "base", [1, 1, 1, 1, 1, 0]),
                (fronts.UNRELATED, "m x 1", right),
            )
            for number, is_right in enumerate(answered)
        ]
        answers.append((chosen, pd.DataFrame(rows)))
    (row,) = fronts.front(answers).itertuples()
    assert row.evaluated_on == "d" and row.gain == 1 and row.questions == 2
    low, high = stats.bootstrap_interval(np.array([-1, -0.5, 0, 0, 0, 0.5]))
    assert low < -1 / 6 < high
    assert (row.unrelated_change_low, row.unrelated_change_high) == (approx(low), approx(high))


def test_what_is_chosen_by_hand():
    """Of six strengths: too dear, loses other questions and breaks free answers, breaks these,
    loses those, best, safe."""
    validated = pd.DataFrame(
        {
            "configuration": ["base", "dear", "breaks", "reckless", "loses", "best", "safe"],
            "method": ["base", *["m"] * 6],
            "mode": "",
            "accuracy_token": [0.3, 0.9, 0.8, 0.75, 0.7, 0.6, 0.5],
            "accuracy_sum": 0.4,
            "perplexity_bound": [0.0, 0.2, 0.05, 0.05, 0.05, 0.05, 0.01],
            "perplexity_increase": [0.0, 0.1, 0.04, 0.04, 0.04, 0.04, 0.0],
            "answers_increase": [0.0, 0.0, 0.2, 0.2, 0.05, 0.05, 0.01],
            "unrelated_change": [0.0, 0.0, -0.03, 0.0, 0.0, -0.02, 0.0],
            "unrelated_change_sum": [0.0, 0.0, 0.0, 0.0, -0.03, 0.0, 0.0],
        }
    )
    chosen = fronts.choose(validated, budgets=[0.005, 0.02, 0.1, 0.3], max_unrelated_loss=0.02)
    for limit, expected in zip(
        fronts.limits(0.02),
        (
            ["base", "safe", "breaks", "dear"],
            ["base", "safe", "reckless", "dear"],
            ["base", "safe", "best", "dear"],
        ),
        strict=True,
    ):
        rows = chosen[(chosen.limit == limit) & (chosen.score == "sum")]
        assert rows.configuration.tolist() == expected
    assert chosen[chosen.score == "token"].validation_gain.tolist() == approx(
        [*[0.0] * 3, *[0.2] * 3, 0.5, 0.45, 0.3, *[0.6] * 3]
    )


def test_what_is_done_is_not_done_again(made, commands):
    command, result, folder, _ = made
    learnt = ("gate", "trained", "lora", "scores")
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.safetensors")
        if any(what in path.name for what in learnt)
    }
    assert all(any(what in path.name for path in before) for what in learnt)
    again = commands.run(*command).ok()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for what in ("training vectors", "LoRA (dpo)", "gates", "_test_", "free answers"):
        assert what in result.err and what not in again.err
    assert result.out.splitlines()[-2:] == again.out.splitlines()[-2:]


def test_a_training_is_taken_up_after_its_last_whole_run(tmp_path):
    made, saved = [], []

    def make(unit):
        if len(made) == 2 and unit == 2:
            made.append("stopped")
            raise UserError("stopped")
        made.append(unit)
        return {"a": torch.full((2,), float(unit))}

    def once():
        experiment.once(
            tmp_path / "a.safetensors",
            {},
            SimpleNamespace(overwrite=False),
            "runs",
            make,
            lambda units: saved.append([unit["a"].tolist() for unit in units]),
            4,
        )

    with suppress(UserError):
        once()
    once()
    assert made == [0, 1, "stopped", 2, 3]
    assert saved == [[[0, 0], [1, 1], [2, 2], [3, 3]]]


def test_a_run_killed_again_and_again_makes_the_tables_of_one_that_was_not(
    made, commands, tmp_path
):
    """Each process puts a few files in place, then SIGKILL."""
    command, chance, kills = made[0], random.Random(0), 0
    first = command[command.index("--datasets") + 1]

    def run(folder, **how):
        return commands.run(
            *given(
                command,
                datasets=[first],
                seeds=["0"],
                output_dir=[str(folder)],
                document=[str(folder / "results.md")],
            ),
            **how,
        )

    def files(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.*")
            if path.suffix in (".csv", ".safetensors")
        }

    run(tmp_path / "whole").ok()
    while (result := run(tmp_path / "killed", die_after=chance.randint(5, 15))).code:
        assert result.code == -signal.SIGKILL, result
        kills += 1
    assert kills > 5
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not [*tmp_path.rglob("*.parts"), *tmp_path.rglob("*.lock"), *tmp_path.rglob(".*")]


def test_scores_are_kept_by_configuration(make_tiny, tmp_path, monkeypatch):
    """Against full forwards with hooks, and with LoRA merged into the weights; what is there is
    read, also after a kill when all but the manifest was written."""
    lm = make_tiny("llama")
    questions = [(W[:9], [W[20:24], W[30:33]]), (W[40:43], [W[20:22], W[22:25]])]
    items = [encoded(lm, *question) for question in questions]
    generator = torch.Generator().manual_seed(0)
    steered_ones = [
        Configuration("some", "", (1,), 1.0, {1: torch.randn(lm.hidden_size, generator=generator)})
        for _ in range(2)
    ]
    steered_ones[1] = replace(steered_ones[1], method="other")
    adapter = random_adapter(lm)
    tuned = [experiment.Lora(adapter).at(scale) for scale in (0.5, 2.0, -1.0)]
    args = SimpleNamespace(parts_dir=tmp_path, overwrite=False, batch_tokens=64)
    one = SimpleNamespace(name="one", manifest={})

    def check(configurations):
        found = experiment.scores_of(lm, items, configurations, args, one, "some")
        for (prompt, responses), values in zip(questions, found, strict=True):
            assert values.shape == (1 + len(configurations), len(responses))
            for column, response in enumerate(responses):
                expected = [own_loss_log_likelihood(lm, prompt, response)]
                for item in configurations:
                    if item.layers:
                        with steered(lm, item.vectors):
                            expected.append(own_loss_log_likelihood(lm, prompt, response))
                    else:
                        expected.append(
                            own_loss_log_likelihood(
                                SimpleNamespace(
                                    model=merged(lm, adapter, item.alpha), device=lm.device
                                ),
                                prompt,
                                response,
                            )
                        )
                assert values[:, column] == approx(np.array(expected), abs=1e-3)
                assert (np.diff(np.sort(values[:, column])) > 2e-3).all()  # no two alike

    finish = runs.Run.finish

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.Run, "finish", killed)
    with suppress(KeyboardInterrupt):
        check([steered_ones[0]])
    monkeypatch.setattr(runs.Run, "finish", finish)
    for lock in tmp_path.glob("*.lock"):  # which a killed process does not hold
        lock.unlink()
    check([steered_ones[0], *tuned[:2]])
    check([*steered_ones, *tuned])
    monkeypatch.setattr(experiment, "write_scores", None)
    check([steered_ones[1], tuned[1]])
    check([])
    assert not [*tmp_path.glob("*.parts"), *tmp_path.glob("*.lock")]
    assert len([*tmp_path.glob("*.safetensors")]) == len([*tmp_path.glob("*.json")]) == 4


def test_two_processes_make_the_tables_of_one(made, commands, tmp_path):
    command, _, folder, _ = made
    for process in commands.together(
        *given(command, document=[str(tmp_path / "results.md")], output_dir=[str(tmp_path)])
    ):
        process.wait().ok()
    for kind in ("grid", "front", "generations"):
        (path,), (alone,) = (list(place.glob(f"*_{kind}.csv")) for place in (tmp_path, folder))
        assert path.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.rglob("*.parts")) and not list(tmp_path.rglob("*.lock"))


def test_scenes_through_a_chat_template(commands, tmp_path):
    """The embedded vision-language model: pictures train, choose and are answered freely."""
    commands.run(
        "experiment_vlm.py",
        "--model_name",
        "shapes-vlm",
        "--dataset_name",
        "shapes",
        "--num_samples",
        3,
        "--num_validation",
        3,
        "--num_test",
        4,
        "--seeds",
        0,
        "--top_k",
        3,
        "--methods",
        "random",
        "--alphas",
        0.1,
        "--max_ppl_increase",
        1000,
        "--num_generations",
        2,
        "--max_new_tokens",
        4,
        "--output_dir",
        tmp_path,
    ).ok()
    grid = tables(tmp_path)[0]
    validated = grid[grid.part == "validation"].set_index("configuration")
    assert len(validated) == 2 + 2 * len(experiment.SCALES)
    assert validated.answers_increase["base"] == 0
    assert (validated.answers_increase.drop("base").abs() > 1e-9).all()
    assert set(grid[grid.part == "test"].questions) == {4}
    written = pd.read_csv(next(tmp_path.glob("*_generations.csv")), keep_default_na=False)
    assert set(written.number) == {0, 1} and (written.text != "").all()


def test_an_answer_alone_is_refused(made, commands, tmp_path):
    command = made[0]
    single = [
        row | {"choices": row["choices"][:1], "label": 0} if index == 7 else row
        for index, row in enumerate(tiny.question_rows())
    ]
    path = tiny.write_jsonl(tmp_path / "single.jsonl", single)
    place = command.index("--datasets")
    changed = [*command[: place + 1], f"single={path}", *command[place + 3 : -1], tmp_path]
    result = commands.run(*changed)
    assert result.code != 0 and "single answer" in result.err and "Traceback" not in result.err


def test_ablations_are_experiments_with_one_setting_changed(made, commands, tmp_path):
    command = given(
        made[0],
        seeds=["0"],
        methods=["mean", "gradient"],
        lora=["none"],
        alphas=["0.3", "2"],
        max_ppl_increase=["1000"],
    )
    command = [*command[: command.index("--gated")], *command[command.index("--seeds") :]]
    command = given(command, document=[str(tmp_path / "results.md")], output_dir=[str(tmp_path)])
    settings = ("grad_method=vanilla", "top_k=1", "num_samples=2")
    result = commands.run("ablations.py", *command[1:], "--change", *settings).ok()
    (path,) = tmp_path.glob("*_ablations.csv")
    table = pd.read_csv(path, keep_default_na=False)
    assert [*table.setting.unique()] == [ablations.GIVEN, *settings]
    for setting in table.setting.unique():
        alone = tmp_path / setting
        changed = [f"--{setting}"] if setting != ablations.GIVEN else []
        commands.run(
            *given(command, output_dir=[str(alone)], document=[str(alone / "own.md")]),
            "--no-train_vectors",
            *changed,
        ).ok()
        expected = tables(alone)[1]
        found = table[table.setting == setting].drop(columns="setting").reset_index(drop=True)
        pd.testing.assert_frame_equal(found, expected)
    own = table[(table.dataset == table.evaluated_on) & (table.limit == fronts.UNLIMITED)]
    written = (tmp_path / "results.md").read_text()
    for (dataset, score), rows in own.groupby(["dataset", "score"]):
        (section,) = (
            part
            for part in written.split("\n**")
            if part.startswith(f"{dataset}: gain in {score} accuracy")
        )
        lines = section.strip().splitlines()[2 : 5 + len(settings)]
        assert lines[0] == "|  | mean pos | gradient |" and len(lines) == 2 + 1 + len(settings)
        for line, (setting, here) in zip(
            lines[2:], rows.groupby("setting", sort=False), strict=True
        ):
            cells = " | ".join(fronts.points(row) for row in here.itertuples())
            assert line == f"| {setting} | {cells} |"
    grids = {path.read_bytes() for path in tmp_path.glob("*_grid.csv")}
    assert len(grids) == 1 + len(settings) and own.gain.any()  # settings do differ here
    assert result.out.splitlines()[-1].endswith(str(path))


@pytest.mark.parametrize("method", ["smoothgrad", "integrated_gradients"])
def test_what_is_attributed_alike_is_attributed_once(method, made, tmp_path, monkeypatch):
    """By all k, numbers of examples and seeds, unless the seed draws noise."""
    counted = []

    def attribute(*rest):
        counted.append(rest)
        return attribution.attribute(*rest)

    monkeypatch.setattr(token_ablation, "attribute", attribute)
    lm, path = models.load(str(made[3])), made[0][made[0].index("--datasets") + 1]
    written, examples = {}, {0: set(), 1: set()}
    for known in (None, {}):
        for k, count, seed in ((3, 3, 0), (1, 3, 0), (1, 7, 0), (1, 7, 1)):
            folder = tmp_path / f"{known is None}{k}{count}{seed}"
            files = token_ablation.run(
                token_ablation.flags(cli.LLM).parse_args(
                    [
                        "--dataset_name",
                        "first",
                        "--dataset_path",
                        path.partition("=")[2],
                        "--top_k",
                        str(k),
                        "--num_samples",
                        str(count),
                        "--grad_method",
                        method,
                        "--seed",
                        str(seed),
                        "--top",
                        "pos",
                        "rand",
                        "--output_path_meta",
                        str(folder / "meta.csv"),
                        "--output_path_hidden",
                        str(folder / "states.safetensors"),
                        "--model_name",
                        str(made[3]),
                    ]
                ),
                lm,
                known,
            )
            examples[seed] |= {*pd.read_csv(folder / "meta.csv").id}
            written.setdefault((k, count, seed), []).append(
                [file.read_bytes() for file in (folder / "meta.csv", *files.values())]
            )
        both = examples[0] | examples[1]
        assert 7 < len(both) < 14
        once = 7 + 7 if method == "smoothgrad" else len(both)
        assert len(counted) == (3 + 3 + 7 + 7 if known is None else once)
        counted.clear()
    for one, other in written.values():
        assert one == other


def test_only_settings_that_have_files_of_their_own_are_changed(commands, tmp_path):
    for setting, says in (
        ("seed=1", "grad_method, attribution, top_k, num_samples"),
        ("grad_method=none", "invalid choice"),
        ("top_k=0", "at least 1"),
    ):
        result = commands.run("ablations.py", "--change", setting, "--output_dir", tmp_path)
        assert result.code == 2 and says in result.err
    assert not list(tmp_path.iterdir())
