"""The experiment on a tiny model: its tables follow from each other and from the library.

All read few and short passages and few questions that costs are measured on (`few_texts`): what is
computed of them does not depend on how many they are. test_costs.py and test_budget.py read all.
"""

import itertools
import json
import random
import signal
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import short_texts, tiny
from helpers.command_line import arguments_of
from helpers.costs import capability, perplexity
from helpers.lora import merged, random_adapter
from helpers.reference import encoded, own_loss_log_likelihood, words
from pytest import approx

import ablations
import experiment
import grains
from grains import attribution, models, prompts, runs, splits, stage1, stats
from grains.cli.flags import LLM
from grains.data import Example
from grains.errors import UserError
from grains.names import ExperimentNames, StudyNames
from grains.settings import (
    TRAINED_METHODS,
    AblationSettings,
    AttributionSettings,
    DataSettings,
    PromptSettings,
)
from grains.steering import Configuration, Gate, SteeringVectors, steered
from grains.study import costs, evaluate, learned, pareto, protocol, strengths, study, trained
from grains.study.lora import LoraConfiguration, LoraDirection

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line",)

W = words(60, seed=5)

SEEDS, ALPHAS, BUDGETS, LIMIT = (0, 1), (0.02, 0.3), (0.01, 1000.0), 0.015
LINES = {
    ("mean", "pos"),
    ("mean", "pos gated"),
    ("gradient", ""),
    ("random", ""),
    ("random", "gated"),
    ("shuffled", ""),
    ("trained", "gated"),
    ("trained_random", "gated"),
    ("trained_rotated", "gated"),
    ("lora", ""),
}
Made = namedtuple("Made", "flags result folder model")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A tiny model, two data sets with questions in common, few of everything."""
    model = tiny.save_model(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048
    )
    rows = tiny.question_rows()
    data = tmp_path_factory.mktemp("data")
    first, second = (
        tiny.write_jsonl(data / name, some)
        for name, some in (("first.jsonl", rows[:14]), ("second.jsonl", rows[10:]))
    )
    return {
        "model_name": model,
        "datasets": [f"first={first}", f"second={second}"],
        "num_samples": 3,
        "num_validation": 4,
        "top_k": 3,
        "ig_steps": 2,
        "methods": ["mean", "gradient", "random", "shuffled"],
        "mode": ["pos"],
        "alphas": ALPHAS,
        "gated": ["mean", "random"],
        "seeds": SEEDS,
        "max_ppl_increase": BUDGETS,
        "lora": "dpo",
        "max_unrelated_loss": LIMIT,
        "num_generations": 8,
        "max_new_tokens": 4,
    }


@pytest.fixture(scope="module")
def made(commands, flags, tmp_path_factory):
    """The flags, the command's result, its folder, the model's folder."""
    folder = tmp_path_factory.mktemp("experiment")
    flags = flags | {"document": folder / "results.md", "output_dir": folder}
    result = commands.run("experiment.py", *arguments_of(flags), short_texts=True).ok()
    return Made(flags, result, folder, flags["model_name"])


Again = namedtuple("Again", "changed result before middle after text")


@pytest.fixture(scope="module")
def again(made, commands):
    """An experiment with another method and other budgets in the same folder, then `made` again.

    changed: the result of the first. before, middle, after: time of the last change and content of
    every file, and between them.
    text: of the document at first.
    """
    document = made.flags["document"]
    text = document.read_text()

    def files():
        return {
            path: (path.stat().st_mtime_ns, path.read_bytes())
            for path in made.folder.rglob("*.*")
            if path.suffix in (".csv", ".safetensors")
        }

    before = files()
    changes = {
        "methods": ["caa", *made.flags["methods"]],
        "max_ppl_increase": [0.005, 1000],
        "seeds": [0],
        "document": made.folder / "changed.md",
    }
    changes = arguments_of(made.flags | changes)
    changed = commands.run("experiment.py", *changes, short_texts=True).ok()
    middle = files()
    document.write_text("before\n" + text + "after\n")
    result = commands.run("experiment.py", *arguments_of(made.flags), short_texts=True).ok()
    return Again(changed, result, before, middle, files(), text)


@pytest.fixture(scope="module")
def small(flags):
    """Flags of a run with everything that is learnt, but little of it."""
    return flags | {
        "seeds": 0,
        "methods": ["mean", "random"],
        "gated": "mean",
        "alphas": 0.3,
        "max_ppl_increase": 1000,
        "num_generations": 3,
    }


@pytest.fixture(scope="module")
def whole(commands, small, tmp_path_factory):
    """The folder of an undisturbed run of `small`."""
    folder = tmp_path_factory.mktemp("whole")
    words = arguments_of(small | {"output_dir": folder, "document": folder / "results.md"})
    commands.run("experiment.py", *words, short_texts=True).ok()
    return folder


def tables(folder):
    """The grid and the front of the one experiment in a folder, beside that of `again`."""
    (grid,), (front,) = (
        [path for path in folder.glob(f"*_{name}.csv") if "caa" not in path.name]
        for name in ("grid", "front")
    )
    return (
        pd.read_csv(grid, keep_default_na=False, na_values=["nan", ""]),
        pd.read_csv(front, keep_default_na=False),
    )


def test_every_configuration_steers_at_the_positions_alone(commands, small, tmp_path):
    """Scores, costs and trained vectors; the search of strengths by prose is refused."""
    flags = small | {
        "datasets": small["datasets"][:1],
        "positions": "last",
        "lora": "none",
        "output_dir": tmp_path,
    }
    asked = arguments_of(flags)
    commands.run("experiment.py", *asked, short_texts=True).ok()
    (path,) = tmp_path.glob("*positions-last*_grid.csv")
    grid = pd.read_csv(path, keep_default_na=False, na_values=["nan", ""])
    labels = grid.configuration[grid.method != "base"]
    assert len(labels) > 6 and all(label.endswith(" (last)") for label in labels)
    assert [*tmp_path.glob("*_parts/first_seed0_trained_last.safetensors")]
    row = rows_of(tmp_path, "random", "validation").iloc[0]
    lm = models.load(str(small["model_name"]))
    steering = the_vectors(tmp_path, row).at(0.3, positions="last")
    settings = experiment.study_settings(experiment.parser(LLM).parse_args(asked))
    leads = []
    for example in study.draw(settings, settings.sources[0], 0).evaluated["validation"]:
        scores = grains.score(lm, example.question, example.choices, steering=steering)
        sizes = [len(ids) for ids in prompts.encode(lm, example, "qa").responses]
        per_token = scores / sizes
        others = [value for i, value in enumerate(per_token) if i != example.label]
        leads.append(per_token[example.label] - max(others))
    assert row.margin_token == approx(np.mean(leads), abs=1e-3)
    assert row.accuracy_token == approx(np.mean(np.array(leads) > 0))
    with pytest.raises(UserError, match="positions last: of prose they are the first token"):
        experiment.study_settings(
            experiment.parser(LLM).parse_args(["--positions", "last", "--methods", "caa"])
        )


def test_every_question_is_in_one_split(made):
    folder = made.folder
    for name in ("first", "second"):
        for seed in SEEDS:
            (manifest,) = folder.glob(f"*_parts/{name}_seed{seed}.manifest.json")
            assert len(set(json.loads(manifest.read_text())["data"]["ids"])) == 3
    grid = tables(folder)[0]
    own = grid[grid.dataset == grid.evaluated_on]
    sizes = own.groupby(["dataset", "part"]).questions.unique()
    assert sizes["first", "validation"].tolist() == [4]
    assert sizes["first", "test"].tolist() == [14 - 3 - 4]


def test_costs_are_the_librarys(made, few_texts):
    grid = tables(made.folder)[0]
    lm = models.load(str(made.model))
    validated = grid[grid.part == "validation"]
    base = validated[validated.method == "base"]
    texts, questions = costs.neutral_texts(), costs.unrelated_examples()
    tested = grid[(grid.part == "test") & (grid.dataset == grid.evaluated_on)]
    for rows, passages, asked in (
        (base, texts[::8], questions[::2]),
        (tested[tested.method == "base"], texts[1::4], questions[1::2]),
    ):
        expected = perplexity(lm, passages, [], 4096)[0]
        assert rows.perplexity.to_numpy() == approx(expected, rel=1e-4)
        assert (rows.perplexity_increase == 0).all() and (rows.unrelated_change == 0).all()
        kept = capability(lm, asked, [], 4096)
        assert rows.unrelated_accuracy.to_numpy() == approx(kept["token"][0])
    changed = validated[(validated.alpha == max(ALPHAS)) & ~validated.method.isin(TRAINED_METHODS)]
    assert len(changed) and (changed.perplexity_increase.abs() > 0.001).all()


def rows_of(folder, method, split="test"):
    """Rows of the ungated configurations of a method on questions of their own data."""
    grid = tables(folder)[0]
    return grid[
        (grid.method == method)
        & grid["mode"].isna()
        & (grid.part == split)
        & (grid.dataset == grid.evaluated_on)
    ]


def the_vectors(folder, row):
    (path,) = folder.glob(f"*_parts/{row.dataset}_seed{row.seed}_pos_{row.method}*.safetensors")
    return SteeringVectors.load(path)


def test_the_cost_on_other_kinds_of_text_is_the_librarys(made, few_texts):
    folder, lm = made.folder, models.load(str(made.model))
    texts = costs.neutral_texts(costs.VARIED)[1::4]
    base = perplexity(lm, texts, [], 4096)[0]
    rows = rows_of(folder, "random")
    for row in rows.itertuples():
        with the_vectors(folder, row).apply(lm, row.alpha, [0, 1, 2]):
            paid = perplexity(lm, texts, [], 4096)[0]
        assert row.varied_increase == approx(paid / base - 1, rel=1e-3)
    assert len(rows)


def test_the_cost_on_own_answers_is_the_models(made):
    """Perplexity of what the base model wrote, from the model's own logits, steered by hooks."""
    folder, lm = made.folder, models.load(str(made.model))
    rows = pd.concat([rows_of(folder, "random", split) for split in ("validation", "test")])
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
    assert any(len(sets) == 2 for sets in asked.values())
    assert all(not sets[0] & sets[-1] for sets in asked.values() if len(sets) == 2)


def test_answers_to_train_on_are_drawn_several_times(made):
    differing = 0
    for name in ("first", "second"):
        for seed in SEEDS:
            (path,) = made.folder.glob(f"*_parts/{name}_seed{seed}_training_answers_*.csv")
            written = pd.read_csv(path, keep_default_na=False).sort_values("number")
            assert written.number.tolist() == [*range(3 * evaluate.DRAWN)]
            first, second = written[:3], written[3:6]
            assert first.question.tolist() == second.question.tolist()
            assert first.question.nunique() == 3
            differing += (first.text.to_numpy() != second.text.to_numpy()).sum()
    assert differing > 6  # of 12; greedy ones would not differ at all


def test_own_answers_belong_to_their_questions(monkeypatch):
    examples = [Example(name, f"question {name}", ("yes", "no"), 0) for name in "ab"]
    written = pd.DataFrame({"number": [3, 0, 2, 1], "text": ["four", "one", "", "two"]})
    monkeypatch.setattr(evaluate, "free_answers", lambda *_: written)
    found = evaluate.own_answers(None, SimpleNamespace(splits={"training": examples}), "training")
    assert [(item.question, item.choices) for item in found] == [
        ("question a", ("one",)),
        ("question b", ("two",)),
        ("question b", ("four",)),
    ]


def test_an_answer_that_ended_has_its_end_and_one_cut_off_has_none(make_tiny):
    lm, prompt = make_tiny("llama"), PromptSettings("qa")
    usual = lm.tokenizer.eos_token_id
    lm.model.generation_config.eos_token_id = [usual + 1, usual]
    texts = [" ".join(["it is"] * count) for count in (1, 2, 3, 4)]
    answered = [Example("", "What is it?", (text,), 0) for text in texts]
    plain = evaluate.encode_answers(lm, answered, prompt)
    lengths = [len(item.responses[0]) for item in plain]
    assert lengths == sorted({*lengths}) and lengths[1] + 2 < lengths[3]
    found = evaluate.encode_answers(lm, answered, prompt, longest=lengths[3])
    for item, before in zip(found, plain, strict=True):
        (whole,) = before.responses
        cut_off = len(whole) >= lengths[3] - 2  # white space may be gone
        assert item.responses == [whole if cut_off else [*whole, usual]]
        assert item.prompt_ids == before.prompt_ids
    assert found[0].responses != plain[0].responses and found[3].responses == plain[3].responses


def test_answers_are_those_of_the_configurations(made):
    grid = tables(made.folder)[0]
    (path,) = made.folder.glob("*_generations.csv")
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
    front = protocol.read_front(next(made.folder.glob("*_front.csv")))
    own = front.dataset == front.evaluated_on
    changes = front[[f"repetition_change{end}" for end in ("", "_low", "_high")]]
    # Four tokens repeat no three words, so nothing changes; no questions of other data are asked.
    assert (changes[own] == 0).all(axis=None) and changes[~own].isna().all(axis=None)
    assert "/ 0.00, +0.00 [+0.00, +0.00] |" in made.flags["document"].read_text()
    transferred = grid[grid.dataset != grid.evaluated_on]
    assert len(transferred) and transferred.words.isna().all()
    assert transferred.perplexity.isna().all()


def test_the_repetition_of_an_answer_stands_beside_its_question():
    """Three test questions, of which two are answered freely; an unrelated one with their name."""
    asked = [("d", "base", name) for name in "abc"] + [("d", "m", name) for name in "abc"]
    asked += [(pareto.UNRELATED, "base", "a"), (pareto.UNRELATED, "m", "a")]
    questions = pd.DataFrame(asked, columns=["evaluated_on", "configuration", "id"])
    written = [("m", "b", 0.4), ("base", "a", 0.1), ("m", "a", 0.3), ("base", "b", 0.2)]
    answers = pd.DataFrame(written, columns=["configuration", "id", "repetition"])
    found = protocol.with_repetition(questions.assign(token=True), answers.assign(dataset="d"))
    assert found[questions.columns].equals(questions) and found.token.all()
    expected = [0.1, 0.2, np.nan, 0.3, 0.4, np.nan, np.nan, np.nan]
    assert found.repetition.tolist() == approx(expected, nan_ok=True)


def test_the_document_has_every_gain_and_the_rest_of_the_file(made, again):
    written = again.text
    front = tables(made.folder)[1]
    own = front[front.dataset == front.evaluated_on]
    sections = written.split("\n**")
    for names, rows in own.groupby(["dataset", "score", "limit", "method", "mode"]):
        (section,) = (
            some
            for some in sections
            if some.startswith("{}: gain in {} accuracy".format(*names))
            and f"chosen on validation, constraint: {names[2]};" in some
        )
        cells = [
            f"{100 * r.gain:+.1f} [{100 * r.gain_low:+.1f}, {100 * r.gain_high:+.1f}]"
            for r in rows.sort_values("max_ppl_increase").itertuples()
        ]
        line = " ".join(names[3:]).strip()
        assert f"| {line} | {' | '.join(cells)} |" in section
    document = made.flags["document"]
    assert "--document results.md" in written and str(document) not in written
    assert document.read_text() == "before\n" + written + "after\n"


@pytest.mark.parametrize(
    "given, trained",
    [("all", range(10, 30)), ("5-12", range(10, 13)), ("20-29", range(20, 30)), ("4", [4])],
)
def test_vectors_are_trained_behind_the_first_third(given, trained):
    assert learned.later_layers([given], 30) == [*trained]


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


def test_what_is_learnt_is_tried_at_multiples_of_its_length(made):
    grid = tables(made.folder)[0]
    validated = grid[(grid.part == "validation") & (grid.seed == 0)]
    for dataset, method in itertools.product(("first", "second"), TRAINED_METHODS):
        rows = validated[(validated.dataset == dataset) & (validated.method == method)]
        layers = "" if method == "lora" else "1 2"  # of three layers the later ones
        assert [*zip(rows.layers.fillna(""), rows.alpha, strict=True)] == [
            *itertools.product([layers], learned.SCALES["change"])
        ]


def test_vectors_that_keep_answers_keep_where_they_end(flags, few_texts, tmp_path, monkeypatch):
    """Answers end for these vectors alone, which are tried at finer lengths."""
    trained_on = {}

    def stand_in(lm, pairs, texts, questions, answers, norms, gate, layers, *rest, **options):
        trained_on[own_answers] = [item.responses[0][-1] for item in answers]
        return lambda run: torch.ones(len(lm.layers), lm.hidden_size)

    monkeypatch.setattr(trained, "trainer", stand_in)
    changes = {"datasets": flags["datasets"][0], "methods": "random", "gated": None, "lora": "none"}
    tried = {}
    for own_answers in ("change", "keep"):
        folder = tmp_path / own_answers
        more = {"own_answers": own_answers, "max_new_tokens": 20, "output_dir": folder}
        settings = settings_of(flags | changes | more)
        (source,) = settings.sources
        lm = models.load(str(flags["model_name"]))
        names = ExperimentNames("llm", "tiny", settings, str(folder)).study(source.name, 0)
        current = study.begin(lm, settings, source, 0, names)
        answered = [
            Example("", example.question, (text,), 0)
            for example in current.splits["training"]
            for text in ("it is", "it is " * 20)
        ]
        monkeypatch.setattr(learned, "own_answers", lambda *which, a=answered: a)
        current = replace(current, directions=learned.learn(lm, current))
        tried[own_answers] = {item.alpha for item in protocol.with_strengths(lm, current)}
    end = lm.tokenizer.eos_token_id
    assert [token == end for token in trained_on["keep"]] == [True, False] * 3
    assert end not in trained_on["change"]
    assert tried["change"] == {0.35, 0.7, 1.0, 1.5, 2.5}
    assert tried["keep"] == {0.35, 0.7, 1.0, 1.25, 1.5, 1.75, 2.0}


def test_strengths_are_set_by_the_cost(flags, few_texts, tmp_path, monkeypatch):
    """Of two data sets' directions, gated and not, none of what is learnt.

    Of few passages the bound of a cost is so wide that it falls before it rises: more of them."""
    monkeypatch.setattr(short_texts, "PASSAGES", 64)
    monkeypatch.setattr(short_texts, "WORDS", 40)
    changes = {"seeds": 0, "max_ppl_increase": [0.02, 0.08], "strengths_at": [0.04, 0.01]}
    changes |= {"alphas": None, "lora": "none", "no-train_vectors": True, "ig_steps": None}
    changes["gated"] = ["mean", "gradient", "random"]
    settings = settings_of(flags | changes)
    assert settings.grid.alphas == ()
    names = ExperimentNames("llm", "tiny", settings, str(tmp_path))
    lm = models.load(str(flags["model_name"]))
    strongest = strengths.FIRST_STRENGTH * strengths.STEPS[1] ** (strengths.ROUNDS - 1)
    reached, shares = {}, []
    for source in settings.sources:
        begun = study.begin(lm, settings, source, 0, names.study(source.name, 0))
        current = replace(begun, directions=[*begun.directions, *learned.learn(lm, begun)])
        configurations = protocol.with_strengths(lm, current)
        passages = costs.passages(lm, "validation")
        scores = evaluate.scores_of(lm, current, passages, configurations, "validation_texts")
        bounds = costs.perplexity_bound(passages, scores)[1:]
        lines = {}
        for item, bound in zip(configurations, bounds, strict=True):
            lines.setdefault((item.method, item.variant), []).append((item.alpha, bound))
        assert len(lines) == 7
        for (method, _), points in lines.items():
            # A cost that even the strongest does not reach stands last, whatever it is.
            paid = [bound for alpha, bound in points if alpha < strongest]
            shares += [*(np.array(paid) / [0.01, 0.04][: len(paid)])]
            assert len(paid) == 2 or points[-1][0] == approx(strongest)
            assert all(bound < 0.04 for alpha, bound in points if alpha == strongest)
            reached[method] = max(len(paid), reached.get(method, 0))
    assert reached["gradient"] == 2 and reached["mean"]
    # Curves that fall before they rise: three strengths between are too few for them.
    assert max(shares) <= 1 and sum(share < 0.84 for share in shares) <= 2 < len(shares) / 10


def settings_of(flags):
    return experiment.study_settings(experiment.parser(LLM).parse_args(arguments_of(flags)))


def test_a_stronger_strength_is_tried_where_the_square_law_says():
    first, least, most = strengths.FIRST_STRENGTH, *strengths.STEPS
    assert strengths.stronger([(0.0, 0.0)], 0.3) == first
    # 0.1 paid 0.05: 0.3 is reached at sqrt(6) times as much; steps are neither too large nor small
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.05)], 0.3) == approx(0.1 * 6**0.5, abs=5e-4)
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.001)], 0.3) == approx(0.1 * most)
    assert strengths.stronger([(0.0, 0.0), (0.1, -0.1)], 0.3) == approx(0.1 * most)
    assert strengths.stronger([(0.0, 0.0), (0.1, 0.29)], 0.3) == approx(0.1 * least)


def test_layers_from_one_on_in_the_papers_setting(commands, flags, tmp_path):
    """--alphas 0.02 0.02: one configuration. Layer 2 is not named, and has a gate. What is
    attributed, how and from where reaches stage 1."""
    changes = {"datasets": flags["datasets"][0], "seeds": 0, "output_dir": tmp_path}
    changes |= {"alphas": [0.02, 0.02], "methods": "random", "gated": "random", "lora": "none"}
    changes |= {"no-train_vectors": True, "layer_mode": "from", "layer_idxs": 1}
    changes |= {"ig_baseline": "zeros", "ig_steps": 2, "attribute": "all"}
    commands.run("experiment.py", *arguments_of(flags | changes), short_texts=True).ok()
    grid = tables(tmp_path)[0]
    validated = grid[grid.part == "validation"]
    assert validated.configuration.tolist() == [
        "base",
        "random @ 1-2 x 0.02",
        "random gated @ 1-2 x 0.02",
    ]
    assert validated["mode"].fillna("").tolist() == ["", "", "gated"]
    assert validated.perplexity.nunique() == 3 and validated.margin_sum.notna().all()
    (manifest,) = tmp_path.glob(
        "*_baseline-zeros_attribute-all_steps-2_*_parts/*_seed0.manifest.json"
    )
    settings = json.loads(manifest.read_text())["settings"]
    assert (settings["baseline"], settings["ig_steps"], settings["attribute"]) == (
        "zeros",
        2,
        "all",
    )
    attributed = pd.read_csv(manifest.with_name("first_seed0.csv"))
    assert set(attributed.gradients_computed) == {2}


def test_settings_are_those_of_the_flags(flags):
    settings = settings_of(flags | {"ig_steps": 20, "ig_baseline": "zeros", "attribute": "all"})
    first, second = (item.partition("=") for item in flags["datasets"])
    assert settings.sources == tuple(
        DataSettings(name, path, num_samples=3, num_validation=4)
        for name, _, path in (first, second)
    )
    assert settings.seeds == SEEDS and settings.budgets == BUDGETS
    assert settings.ablation.attribution == AttributionSettings(
        baseline="zeros", attribute="all", ig_steps=20
    )
    assert settings.ablation.top_k == 3 and settings.grid.alphas == ALPHAS
    assert (settings.gated, settings.lora, settings.max_unrelated_loss) == (
        ("mean", "random"),
        "dpo",
        LIMIT,
    )
    assert (settings.num_generations, settings.max_new_tokens) == (8, 4)


@pytest.mark.parametrize(
    "unknown",
    [
        ["--evaluate_on", "all"],
        ["--score", "sum"],
        ["--hidden_states_path", "x"],
        ["--hidden_states_neg_path", "x"],
        ["--hidden_states_rand_path", "x"],
    ],
)
def test_flags_without_effect_are_no_flags(unknown, capsys):
    with pytest.raises(SystemExit) as end:
        experiment.parser(LLM).parse_args(unknown)
    assert end.value.code == 2 and unknown[0] in capsys.readouterr().err


def test_a_gated_method_is_one_of_the_methods(commands, tmp_path):
    result = commands.run(
        "experiment.py", "--gated", "mean", "--methods", "caa", "--output_dir", tmp_path
    )
    assert "mean is not among the methods (caa)" in result.error()
    with pytest.raises(UserError, match="are not all different"):
        settings_of({"datasets": ["a=x.jsonl", "a=y.jsonl"]})


def test_what_was_scored_is_read_and_what_is_new_is_added(made, again):
    """The same folder, another method and budget: other tables. Then as before."""
    scores = {path for path in again.before if "_scores_" in path.name}
    assert scores and all(again.before[path] == again.after[path] for path in scores)
    added = [
        path
        for path in again.middle
        if "_validation_" in path.name and "_scores_" in path.name and path not in again.before
    ]
    for path in added:
        base, *scored = runs.read_header(path)["configurations"]
        assert base == "base" and [name.rpartition(" ")[0] for name in scored] == [
            f"caa @ 0-2 x {alpha:g}" for alpha in ALPHAS
        ]
    assert added
    for name in ("grid", "front", "generations"):
        path, other = sorted(made.folder.glob(f"*_{name}.csv"), key=lambda path: "caa" in path.name)
        assert again.before[path] == again.middle[path] == again.after[path]
        assert other not in again.before and again.middle[other] == again.after[other]
        assert again.middle[other][1] != again.before[path][1]
    assert "nothing to do" in again.result.out and "nothing to do" not in again.changed.out
    (manifest,) = made.folder.glob("*caa*_grid.manifest.json")
    assert json.loads(manifest.read_text())["experiment"]["budgets"] == [0.005, 1000]


def test_a_configuration_is_more_than_its_label():
    gate = Gate(torch.ones(3, 4), torch.ones(3))
    item = Configuration("m", "", (0, 2), 0.1, {0: torch.ones(4), 2: torch.ones(4)}, gate)
    same = replace(
        item, gate=Gate(torch.tensor([1.0, 9.0, 1.0])[:, None].expand(3, 4).clone(), torch.ones(3))
    )  # differs at a layer that is not steered
    assert evaluate.identity(item) == evaluate.identity(same)
    others = [
        replace(item, gate=None),
        replace(item, gate=Gate(torch.ones(3, 4), torch.zeros(3))),
        replace(item, vectors={0: torch.ones(4), 2: torch.zeros(4)}),
        *(
            LoraConfiguration("m", "", (), 0.1, adapter={"a": torch.ones(2, dtype=dtype)})
            for dtype in (torch.bfloat16, torch.float32)
        ),
    ]
    assert len({evaluate.identity(each) for each in [item, *others]}) == 6


def test_random_directions_are_as_long_as_the_vectors():
    lengths = torch.tensor([[0.0], [0.5], [3.0], [7.0]])
    gate = Gate(torch.ones(4, 300), torch.zeros(4))
    vectors = SteeringVectors(lengths * torch.eye(4, 300), torch.ones(4), {}, gate)
    first, second = (learned.random_like(vectors, seed) for seed in (0, 1))
    for drawn in (first, second):
        assert drawn.vectors.norm(dim=-1).tolist() == approx(lengths[:, 0].tolist())
        assert drawn.gate is gate
        assert drawn.info["method"] == "trained_random"
        cosines = torch.cosine_similarity(drawn.vectors[1:], vectors.vectors[1:], dim=-1)
        assert cosines.abs().max() < 0.3
    assert (first.vectors - second.vectors).norm(dim=-1)[1:].min() > 0.5


def test_trained_vectors_rotate_as_one():
    lengths = torch.tensor([[0.0], [0.5], [3.0], [7.0]])
    gate = Gate(torch.ones(4, 300), torch.zeros(4))
    vectors = SteeringVectors(
        lengths * torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) + 0.1,
        torch.ones(4),
        {},
        gate,
    )
    for seed in (0, 1):
        rotated = learned.rotated(vectors, seed)
        assert torch.allclose(
            rotated.vectors @ rotated.vectors.T, vectors.vectors @ vectors.vectors.T, rtol=1e-5
        )
        assert torch.cosine_similarity(rotated.vectors, vectors.vectors, dim=-1).abs().max() < 0.3
        assert rotated.gate is gate and rotated.info["method"] == "trained_rotated"
    first, second = (learned.rotated(vectors, seed).vectors for seed in (0, 1))
    assert (first - second).norm() > 1


def test_the_front_follows_from_the_grid(made):
    """What is chosen is affordable and best on validation; its test accuracy is the grid's."""
    grid, front = tables(made.folder)
    own = front[front.dataset == front.evaluated_on]
    # of data sets, methods, scores, budgets and constraints
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
        controls = ("random", "shuffled", "trained_random", "trained_rotated")
        assert row.is_control == (row.method in controls)
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


def test_what_unrelated_questions_lose_and_repetition_rises_by_hand():
    """Two seeds; ids of the data set's questions are those of unrelated ones as well. The first
    seed answers both questions freely, the second the first one alone."""
    answers = []
    for seed, right in enumerate(([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1])):
        base_repeats, repeats = [[0.1, 0.5], [0.2, np.nan]][seed], [[0.4, 0.2], [0.7, np.nan]][seed]
        chosen = pd.DataFrame(
            [
                {
                    "method": "m",
                    "mode": "",
                    "score": "token",
                    "max_ppl_increase": 0.1,
                    "limit": "none",
                    "configuration": "m x 1",
                    **dict.fromkeys(pareto.COSTS, 0.0),
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
                "repetition": repeated,
            }
            for tested, configuration, answered, repetitions in (
                ("d", "base", [0, 0], base_repeats),
                ("d", "m x 1", [1, 1], repeats),
                (pareto.UNRELATED, "base", [1, 1, 1, 1, 1, 0], [np.nan] * 6),
                (pareto.UNRELATED, "m x 1", right, [np.nan] * 6),
            )
            for number, (is_right, repeated) in enumerate(zip(answered, repetitions, strict=True))
        ]
        answers.append((chosen, pd.DataFrame(rows)))
    (row,) = pareto.front(answers).itertuples()
    assert row.evaluated_on == "d" and row.gain == 1 and row.questions == 2
    low, high = stats.bootstrap_interval(np.array([-1, -0.5, 0, 0, 0, 0.5]))
    assert low < -1 / 6 < high
    assert (row.unrelated_change_low, row.unrelated_change_high) == (approx(low), approx(high))
    # The first question repeats 0.3 and 0.5 more, the second 0.3 less: each counts once.
    assert row.repetition_change == approx((0.4 - 0.3) / 2)
    assert (row.repetition_change_low, row.repetition_change_high) == (approx(-0.3), approx(0.4))


def test_what_is_chosen_by_hand():
    """Of six strengths: too costly; loses unrelated questions and breaks free answers; breaks
    these; loses those; best; safe."""
    validated = pd.DataFrame(
        {
            "configuration": ["base", "costly", "breaks", "reckless", "loses", "best", "safe"],
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
    chosen = pareto.choose(validated, budgets=[0.005, 0.02, 0.1, 0.3], max_unrelated_loss=0.02)
    for limit, expected in zip(
        pareto.constraints(0.02),
        (
            ["base", "safe", "breaks", "costly"],
            ["base", "safe", "reckless", "costly"],
            ["base", "safe", "best", "costly"],
        ),
        strict=True,
    ):
        rows = chosen[(chosen.limit == limit) & (chosen.score == "sum")]
        assert rows.configuration.tolist() == expected
    assert chosen[chosen.score == "token"].validation_gain.tolist() == approx(
        [*[0.0] * 3, *[0.2] * 3, 0.5, 0.45, 0.3, *[0.6] * 3]
    )


def test_what_is_done_is_not_done_again(made, again):
    kinds = ("gate", "trained", "lora", "scores")
    kept = [path for path in again.before if any(kind in path.name for kind in kinds)]
    kept = [path for path in kept if path.suffix == ".safetensors"]
    assert all(any(kind in path.name for path in kept) for kind in kinds)
    assert all(again.after[path] == again.before[path] for path in kept)
    for name in ("training vectors", "LoRA (dpo)", "gates", "_test_", "free answers"):
        assert name in made.result.err and name not in again.result.err
    for name in ("training vectors", "LoRA (dpo)", "gates"):
        assert name not in again.changed.err
    assert made.result.out.splitlines()[-2:] == again.result.out.splitlines()[-2:]


def test_a_training_is_taken_up_after_its_last_whole_run(tmp_path):
    made, saved = [], []

    def make(unit):
        if len(made) == 2 and unit == 2:
            made.append("stopped")
            raise UserError("stopped")
        made.append(unit)
        return {"a": torch.full((2,), float(unit))}

    def save(units):
        saved.append([unit["a"].tolist() for unit in units])
        (tmp_path / "a.safetensors").touch()

    def compute_once():
        learned.compute_once(tmp_path / "a.safetensors", {}, False, "runs", make, save, 4)

    with suppress(UserError):
        compute_once()
    compute_once()
    assert made == [0, 1, "stopped", 2, 3]
    assert saved == [[[0, 0], [1, 1], [2, 2], [3, 3]]]


def test_a_run_killed_again_and_again_makes_the_files_of_one_that_was_not(
    commands, small, whole, tmp_path
):
    """Each process puts a few files in place, then SIGKILL."""
    chance, kills = random.Random(0), 0
    arguments = arguments_of(small | {"output_dir": tmp_path, "document": tmp_path / "results.md"})

    def run():
        after = chance.randint(25, 55)
        return commands.run("experiment.py", *arguments, die_after=after, short_texts=True)

    def files(folder):
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*.*")
            if path.suffix in (".csv", ".safetensors")
        }

    while (result := run()).code:
        assert result.code == -signal.SIGKILL, result
        kills += 1
    assert kills > 3
    assert files(tmp_path) == files(whole)
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
    adapted = [LoraDirection(adapter).at(scale) for scale in (0.5, 2.0, -1.0)]
    current = SimpleNamespace(
        names=StudyNames(tmp_path, tmp_path, "one", 0),
        manifest={},
        overwrite=False,
        ablation=AblationSettings(batch_tokens=64),
    )

    def check(configurations):
        found = evaluate.scores_of(lm, current, items, configurations, "some")
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
    check([steered_ones[0], *adapted[:2]])
    check([*steered_ones, *adapted])
    monkeypatch.setattr(evaluate, "write_scores", None)
    check([steered_ones[1], adapted[1]])
    check([])
    assert not [*tmp_path.glob("*.parts"), *tmp_path.glob("*.lock")]
    assert len([*tmp_path.glob("*.safetensors")]) == len([*tmp_path.glob("*.json")]) == 4


def test_two_processes_make_the_tables_of_one(commands, small, whole, tmp_path):
    arguments = arguments_of(small | {"output_dir": tmp_path, "document": tmp_path / "results.md"})
    for process in commands.together("experiment.py", *arguments, short_texts=True):
        process.wait().ok()
    for kind in ("grid", "front", "generations"):
        (path,), (alone,) = (list(folder.glob(f"*_{kind}.csv")) for folder in (tmp_path, whole))
        assert path.read_bytes() == alone.read_bytes()
    assert not list(tmp_path.rglob("*.parts")) and not list(tmp_path.rglob("*.lock"))


def test_scenes_through_a_chat_template(commands, tmp_path):
    """The embedded vision-language model: pictures train, choose and are answered freely."""
    flags = {
        "model_name": "shapes-vlm",
        "dataset_name": "shapes",
        "num_samples": 2,
        "num_validation": 2,
        "num_test": 2,
        "seeds": 0,
        "top_k": 3,
        "methods": ["random", "vti"],
        "alphas": 0.1,
        "max_ppl_increase": 1000,
        "num_generations": 2,
        "max_new_tokens": 4,
        "output_dir": tmp_path,
    }
    options = {"short_texts": True, "few_copies": True}
    commands.run("experiment_vlm.py", *arguments_of(flags), **options).ok()
    grid = tables(tmp_path)[0]
    validated = grid[grid.part == "validation"].set_index("configuration")
    assert len(validated) == 3 + 3 * len(learned.SCALES["change"])  # trained and its two controls
    assert validated.answers_increase["base"] == 0
    assert (validated.answers_increase.drop("base").abs() > 1e-9).all()
    assert set(grid[grid.part == "test"].questions) == {2}
    written = pd.read_csv(next(tmp_path.glob("*_generations.csv")), keep_default_na=False)
    assert set(written.number) == {0, 1} and (written.text != "").all()


def test_an_answer_alone_is_refused_before_anything_is_computed(commands, flags, tmp_path):
    single = [
        row | {"choices": row["choices"][:1], "label": 0} if index == 7 else row
        for index, row in enumerate(tiny.question_rows())
    ]
    path = tiny.write_jsonl(tmp_path / "single.jsonl", single)
    folder = tmp_path / "results"
    changes = {"datasets": f"single={path}", "seeds": 0, "output_dir": folder}
    result = commands.run("experiment.py", *arguments_of(flags | changes))
    assert "single answer" in result.error() and not folder.exists()


@pytest.mark.parametrize("script", ["experiment.py", "ablations.py"])
def test_a_file_of_the_users_own_is_no_table(commands, flags, tmp_path, script):
    flags = flags | {"seeds": 0, "gated": None, "lora": "none", "output_dir": tmp_path}
    more = ["--change", "top_k=1"] if script == "ablations.py" else []
    arguments = [*arguments_of(flags), *more]
    module = ablations if more else experiment
    parsed = module.parser(LLM).parse_args([str(word) for word in arguments])
    names = ExperimentNames(
        "llm",
        str(parsed.model_name),
        experiment.study_settings(parsed),
        tmp_path,
        default=experiment.study_settings(module.parser(LLM).parse_args([])),
    )
    for path in (names.ablations(["top_k=1"]),) if more else names.tables().values():
        own = b"\xff\x00"
        path.write_bytes(own)
        for more, says in (([], "no manifest"), (["--overwrite"], "not written by these scripts")):
            result = commands.run(script, *arguments, *more)
            assert says in result.error() and path.name in result.error()
            assert path.read_bytes() == own
        path.unlink()
    assert not list(tmp_path.glob("*_parts"))


def test_ablations_are_experiments_with_one_setting_changed(commands, flags, tmp_path):
    """Each setting's tables are those of an experiment with that flag."""
    changes = {"seeds": 0, "methods": ["mean", "gradient"], "gated": None, "lora": "none"}
    changes |= {"alphas": [0.3, 2], "max_ppl_increase": 1000, "num_generations": 2}
    changes["ig_steps"] = None  # what they attribute differs more between the settings
    flags = flags | changes
    settings = ("grad_method=vanilla", "top_k=1", "num_samples=2")
    result = commands.run(
        "ablations.py",
        *arguments_of(flags | {"document": tmp_path / "results.md", "output_dir": tmp_path}),
        "--change",
        *settings,
        short_texts=True,
    ).ok()
    (path,) = tmp_path.glob("*_ablations.csv")
    table = pd.read_csv(path, keep_default_na=False)
    assert [*table.setting.unique()] == [ablations.GIVEN, *settings]
    for setting in table.setting.unique():
        alone = tmp_path / setting
        name, _, value = setting.partition("=")
        changed = {name: value} if value else {}
        commands.run(
            "experiment.py",
            *arguments_of(flags | {"no-train_vectors": True, "output_dir": alone} | changed),
            short_texts=True,
        ).ok()
        expected = tables(alone)[1]
        rows = table[table.setting == setting].drop(columns="setting").reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, expected)
        (grid,) = alone.glob("*_grid.csv")
        assert grid.read_bytes() in {path.read_bytes() for path in tmp_path.glob("*_grid.csv")}
    own = table[(table.dataset == table.evaluated_on) & (table.limit == pareto.UNCONSTRAINED)]
    written = (tmp_path / "results.md").read_text()
    for (dataset, score), rows in own.groupby(["dataset", "score"]):
        (section,) = (
            some
            for some in written.split("\n**")
            if some.startswith(f"{dataset}: gain in {score} accuracy")
        )
        lines = section.strip().splitlines()[2 : 5 + len(settings)]
        assert lines[0] == "|  | mean pos | gradient |" and len(lines) == 2 + 1 + len(settings)
        for line, (setting, of_setting) in zip(
            lines[2:], rows.groupby("setting", sort=False), strict=True
        ):
            cells = " | ".join(pareto.points(row) for row in of_setting.itertuples())
            assert line == f"| {setting} | {cells} |"
    grids = {path.read_bytes() for path in tmp_path.glob("*_grid.csv")}
    assert len(grids) == 1 + len(settings) and own.gain.any()  # settings do differ here
    assert result.out.splitlines()[-1].endswith(str(path))


def test_one_setting_is_changed_and_no_other(flags):
    settings = settings_of(flags)
    ablation, attributed = settings.ablation, settings.ablation.attribution
    for text, expected in (
        ("top_k=7", replace(settings, ablation=replace(ablation, top_k=7))),
        (
            "num_samples=2",
            replace(
                settings,
                sources=tuple(replace(source, num_samples=2) for source in settings.sources),
            ),
        ),
        (
            "attribution=normal",
            replace(
                settings,
                ablation=replace(ablation, attribution=replace(attributed, objective="normal")),
            ),
        ),
        (
            "grad_method=vanilla",
            replace(
                settings,
                ablation=replace(ablation, attribution=replace(attributed, grad_method="vanilla")),
            ),
        ),
    ):
        assert ablations.changed(settings, text) == expected != settings


@pytest.mark.parametrize("method", ["smoothgrad", "integrated_gradients"])
def test_what_is_attributed_alike_is_attributed_once(method, flags, tmp_path, monkeypatch):
    """By all k, numbers of examples and seeds, unless the seed draws noise."""
    counted = []

    def attribute(*rest):
        counted.append(rest)
        return attribution.attribute(*rest)

    monkeypatch.setattr(stage1, "attribute", attribute)
    lm, path = models.load(str(flags["model_name"])), flags["datasets"][0].partition("=")[2]
    written, examples = {}, {0: set(), 1: set()}
    for known in (None, {}):
        for k, count, seed in ((3, 3, 0), (1, 3, 0), (1, 7, 0), (1, 7, 1)):
            folder = tmp_path / f"{known is None}{k}{count}{seed}"
            source = DataSettings("first", path, count)
            settings = AblationSettings(
                AttributionSettings(grad_method=method, ig_steps=2), ("pos", "rand"), k, seed=seed
            )
            pairs = [example.pair() for example in splits.steering_examples(source, seed)]
            files = {top: folder / f"states_{top}.safetensors" for top in settings.tops}
            stage1.run(lm, pairs, source, settings, folder / "attributions.csv", files, known=known)
            examples[seed] |= {example.id for example in pairs}
            written.setdefault((k, count, seed), []).append(
                [file.read_bytes() for file in (folder / "attributions.csv", *files.values())]
            )
        both = examples[0] | examples[1]
        assert 7 < len(both) < 14
        expected = 7 + 7 if method == "smoothgrad" else len(both)
        assert len(counted) == (3 + 3 + 7 + 7 if known is None else expected)
        counted.clear()
    for alone, shared in written.values():
        assert alone == shared


def test_only_settings_that_have_files_of_their_own_are_changed(commands, tmp_path):
    for setting, says in (
        ("seed=1", "grad_method, attribution, top_k, num_samples"),
        ("grad_method=gradient", "invalid choice"),
        ("top_k=0", "from 1 to"),
    ):
        result = commands.run("ablations.py", "--change", setting, "--output_dir", tmp_path)
        assert result.code == 2 and says in result.err
    assert not list(tmp_path.iterdir())
