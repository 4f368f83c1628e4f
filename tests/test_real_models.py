"""The tables of several models, and the variants of faithfulness, on a tiny model and by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import faithfulness_trained
import faithfulness_variants as variants
import gain_figure
import pandas as pd
import pytest
import real_models
import torch
from faithfulness import (
    AGREEING,
    ALIKE,
    BARE,
    BASE,
    BEHIND,
    CHOSEN,
    CONTRARY,
    HARDEST,
    OWN,
    PROSE,
    TURNED,
    UNRELATED,
)
from helpers.reference import embeds, relative
from pytest import approx

from grains import prompts, splits
from grains.cli.documents import write_document
from grains.logprobs import logits
from grains.scoring import margins, score_all
from grains.settings import AblationSettings, DataSettings, PromptSettings
from grains.states import POS, POS_ABLATED
from grains.study import costs, learned
from grains.study.naming import core
from grains.vectors import SteeringVectors


def measured(gain, rise):
    """What one seed gives of four questions, of which the base model gets two right."""
    right = {BASE: [1, 0, 1, 0], CHOSEN: [1, 0, 1, 0]}
    right[CHOSEN][1] += gain
    rows = [
        {
            "seed": 0,
            "set": CONTRARY,
            "configuration": label,
            "alpha": 0.003 if label == CHOSEN else 0.0,
            "id": f"q{number}",
            "fact": f"f{number}",
            "sum": float(value),
            "token": 1.0,
        }
        for label, values in right.items()
        for number, value in enumerate(values)
    ]
    rises = {BASE: 0.0, CHOSEN: rise}
    rows += [
        {"seed": 0, "set": PROSE, "configuration": label, "rise": value}
        for label, value in rises.items()
    ]
    return pd.DataFrame(rows)


def test_gains_of_models_stand_side_by_side():
    steered = {"one": measured(1, 0.015), "two": measured(0, 0.04)}
    table = real_models.gains(steered)
    assert table.loc[CHOSEN, "one: summed"].startswith("+25.0 [")
    assert table.loc[CHOSEN, "two: summed"] == "+0.0 [+0.0, +0.0]"
    assert table.loc[CHOSEN, ["one: per token", "one: prose, %", "two: prose, %"]].tolist() == [
        "+0.0 [+0.0, +0.0]",
        "+1.5",
        "+4.0",
    ]


def test_the_figure_is_of_the_tables(tmp_path):
    """The same gains read from a document with three models' columns, and from one model's own."""
    document = tmp_path / "models.md"
    steered = {"one": measured(1, 0.015), "two": measured(0, 0.04)}
    write_document(document, "models", [("points gained over base", real_models.gains(steered))])
    found = gain_figure.gains(document)
    rise, by_score = found["one"][CHOSEN]
    assert rise == 1.5 and by_score["summed"][0] == 25 and by_score["per token"] == (0, 0, 0)
    assert found["two"][CHOSEN][0] == 4.0
    table = Path(__file__).parents[1] / "docs" / "tables" / "faithfulness.md"
    own = gain_figure.gains(table)["smollm2-135m-instruct"]
    assert own[CHOSEN][1]["summed"][0] > 10 > own["rotated, same strength"][1]["summed"][2]
    assert {gain_figure.look_of(name) for name in own} <= {*gain_figure.LOOKS}
    path = tmp_path / "figure.png"
    gain_figure.draw(found, path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.fixture
def material(make_tiny, tmp_path):
    args = SimpleNamespace(seed=0, budget=0.02, ig_steps=3, folder=tmp_path)
    source = DataSettings(CONTRARY, num_samples=2, num_validation=2, num_test=3)
    prompt = PromptSettings("qa")
    made = variants.Material(args, source, AblationSettings(tops=("pos",), prompt=prompt))
    made.lm = make_tiny("llama")
    made.asked |= {"validation prose": made.asked["test"], "test prose": made.asked["test"]}
    return made


def test_the_whole_context_is_ablated(material):
    """Against the model's own forward on embeddings in which the context's tokens are padding."""
    lm, item = material.lm, material.steering[0]
    before, context, after = item.text.partition(item.example.context)
    assert context and not before.strip()
    states = material.context_ablated
    behind = lm.tokenizer(after, add_special_tokens=False).input_ids
    ids = item.prompt_ids + item.responses[0]
    length = len(item.prompt_ids) - len(behind)
    assert lm.tokenizer.decode(ids[:length]).strip() == context
    rows = embeds(lm, ids)
    rows[:length] = embeds(lm, [lm.replacement_id()])[0]
    with torch.no_grad():
        own = lm.model(inputs_embeds=rows[None], use_cache=False).logits[0, -1].float()
    last = torch.from_numpy(next(iter(states.layer(POS_ABLATED, states.layers - 1)))[0])
    assert relative(logits(lm, last.float()[None])[0], own) < 1e-4
    plain = torch.from_numpy(next(iter(states.layer(POS, states.layers - 1)))[0])
    assert relative(plain, last) > 0.01


def test_a_variant_is_chosen_within_the_budget_on_validation(material):
    variant = variants.Variant("gradient", "all")
    costs = {alpha: 0.001 * number for number, alpha in enumerate(variants.STRENGTHS)}
    material.args.budget = 0.0025  # the third strength is the last within it
    material.rises = lambda split, tried: [costs[item.alpha] for item in tried]
    asked = []

    def right(split, tried):
        asked.append((split, [item.alpha for item in tried]))
        values = torch.zeros(3, 1 + len(tried)).bool().numpy()
        values[0, -2 if len(tried) > 1 else -1] = True  # the second of three is the best
        return {"sum": values, "token": values}

    material.right = right
    rows = material.measured(variant)
    second = variants.STRENGTHS[1]
    assert asked == [("validation", [*variants.STRENGTHS[:3]]), ("test", [second])]
    assert set(rows.alpha) == {second} and rows.within.all()
    assert rows.sum_after.tolist() == [1, 0, 0] and rows.sum_before.tolist() == [0, 0, 0]
    table = variants.gain_table(rows)
    assert table.loc[variant.name, "summed"].startswith("+33.3 [")
    assert table.loc[variant.name, "prose, %"] == "+0.1"


def test_shares_are_of_the_attribution_on_the_answer(material):
    """Of Integrated Gradients, against the words that the tokens of stage 1's table spell."""
    rows = material.shares("integrated_gradients")
    table = pd.read_csv(material.files("integrated_gradients", variants.TOP_K)[0])
    compared = 0
    for item, row, kept in zip(
        material.steering, rows.itertuples(), table.itertuples(), strict=True
    ):
        scores, tokens = json.loads(kept.attributions)[0], json.loads(kept.tokens)
        answer = material.lm.tokenizer.tokenize(f" {core(item.example.chosen)}")
        content = item.content.tolist()
        begins = [i for i in range(len(tokens)) if tokens[i : i + len(answer)] == answer]
        if not begins:  # the answer is written otherwise in this context
            continue
        compared += 1
        own = {place + i for place in begins for i in range(len(answer))}
        positive = {i: max(scores[i], 0) for i in range(len(tokens)) if content[i]}
        expected = sum(positive[i] for i in own) / sum(positive.values())
        assert row.share == approx(expected, abs=1e-6)
        assert row.tokens == approx(len(own) / sum(content))
    assert compared
    shown = variants.share_table({"integrated_gradients": rows})
    assert shown.loc["steering pairs", "IG"] == "2" and shown.loc["gradients a pair", "IG"] == "3"


def test_rows_of_trained_vectors(make_tiny):
    """Every set is asked; right answers and the price of prose are those under the hooks."""
    lm = make_tiny("llama")
    drawn = torch.randn(len(lm.layers), lm.hidden_size, generator=torch.Generator().manual_seed(3))
    info = {"seed": 5, "method": "trained", "data": {"questions": []}}
    vectors = SteeringVectors(0.3 * drawn, torch.ones(len(lm.layers)), info)
    words = "--vectors f=2 --prompt_style qa --num_test 4 --num_generations 1"
    args = faithfulness_trained.parser().parse_args(words.split())
    rows = faithfulness_trained.measured(lm, args, vectors, 2.0)
    sets = {CONTRARY, AGREEING, BARE, UNRELATED, ALIKE, BEHIND, PROSE, OWN}
    assert set(rows.set) == sets | {f"{CONTRARY} free", f"{AGREEING} free"}
    assert set(rows.seed) == {5}
    asked = rows[rows.set == CONTRARY]
    assert set(asked.groupby("configuration").size()) == {4}

    used = DataSettings(CONTRARY, num_validation=1, num_test=4)
    examples = splits.evaluation_examples(used, 5, {"questions": []})["test"]
    items = [prompts.encode(lm, example, "qa") for example in examples]
    passages = costs.passages(lm, "test")
    before = score_all(lm, passages, [], 2048)
    for label, of, strength in (
        (CHOSEN, vectors, 2.0),
        (TURNED, vectors, -2.0),
        (HARDEST, learned.rotated(vectors, 5), 2.0),
        (faithfulness_trained.RANDOM, learned.random_like(vectors, 5), 2.0),
    ):
        with of.apply(lm, strength, units="absolute"):
            leads = margins(items, score_all(lm, items, [], 2048))
            after = score_all(lm, passages, [], 2048)
        mine = asked[asked.configuration == label].set_index("id")
        for kind, lead in leads.items():
            own = dict(zip([item.example.id for item in items], lead[:, 0] > 0, strict=True))
            assert mine[kind].to_dict() == own
        tokens = sum(len(item.responses[0]) for item in passages)
        lost = sum(float(b[0, 0] - a[0, 0]) for a, b in zip(after, before, strict=True)) / tokens
        (rise,) = rows[(rows.set == PROSE) & (rows.configuration == label)].rise
        assert rise == approx(math.expm1(lost), rel=1e-3, abs=1e-5)
