"""Gates: by hand, against scikit-learn on the model's own states, and wherever they steer."""

import copy
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny
from helpers.decoding import greedy, random_configuration, text_of
from helpers.reference import encoded, layer_outputs, own_loss_log_likelihood, relative, words
from sklearn.linear_model import LogisticRegression

from grains import data, models, prompts, splits
from grains.errors import UserError
from grains.generation import generate
from grains.runs import write_tensors
from grains.scoring import score, score_all
from grains.settings import AblationSettings, DataSettings, PromptSettings
from grains.steering import Direction, Gate, SteeringVectors, steer, steered
from grains.study import costs, gates

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line",)

W = words(120, seed=5)
QUESTIONS = [
    (W[:11], [W[20:24], W[30:33]]),
    (W[40:43], [W[20:22], W[22:25], W[60:61]]),
    (W[44:46], [W[24:36], W[36:40]]),
]


@pytest.fixture
def lm(make_tiny):
    return make_tiny("llama")


def a_gate(lm, seed=0):
    """Opens at some positions and not at others."""
    generator = torch.Generator().manual_seed(seed)
    return Gate(
        3 * torch.randn(len(lm.layers), lm.hidden_size, generator=generator),
        torch.randn(len(lm.layers), generator=generator),
    )


def questions(lm):
    return [encoded(lm, prompt, responses) for prompt, responses in QUESTIONS]


def test_steer_by_hand():
    """||h|| = 5; along = 0.6 * 2 = 1.2, bias ln 3 - 1.2: open 3/4; moved to (3 + 6, 4)."""
    gate = torch.tensor([2.0, 0.0]), torch.tensor(np.log(3) - 1.2)
    found = steer(torch.tensor([[3.0, 4.0]]), torch.tensor([8.0, 0.0]), gate)
    assert found[0].tolist() == pytest.approx([45 / 97**0.5, 20 / 97**0.5])


def test_an_open_gate_changes_nothing():
    states, vector = torch.randn(2, 5, 8), torch.randn(8)
    open_wide = torch.zeros(8), torch.tensor(torch.inf)
    assert torch.equal(steer(states, vector, open_wide), steer(states, vector))


def test_scores_are_those_of_hooks_on_every_sequence(lm):
    """Gated and not, the same layers, one of them the last, in one call."""
    layers = {"all": tuple(range(len(lm.layers))), "last": (len(lm.layers) - 1,)}
    first, second = a_gate(lm), a_gate(lm, 1)
    grid = [
        replace(random_configuration(lm, layers[name], 2.0, seed), gate=gate)
        for name, seed, gate in (
            ("all", 1, first),
            ("all", 1, None),
            ("all", 2, first),
            ("all", 1, second),
            ("last", 3, first),
        )
    ]
    found = score(lm, questions(lm), grid, 1000)
    for (prompt, responses), values in zip(QUESTIONS, found, strict=True):
        for row, item in enumerate(grid, start=1):
            opening = item.gate and {layer: item.gate.at(layer) for layer in item.layers}
            for column, response in enumerate(responses):
                with steered(lm, item.vectors, opening):
                    expected = own_loss_log_likelihood(lm, prompt, response)
                assert values[row, column] == pytest.approx(expected, abs=1e-3)
        assert (np.diff(np.sort(values[:, 0])) > 0.01).all()  # no two alike, nor like the base


def check_decoding(lm, layers, strength, late, prompts, tokens):
    """Base, gated, not gated and another layer: a batch writes what each prompt gets alone."""
    items = [encoded(lm, words(9 - size, seed=size), [[5]]) for size in range(prompts)]
    gated = replace(random_configuration(lm, layers, strength, 2), gate=a_gate(lm))
    plain = replace(gated, gate=None)
    found = generate(lm, items, [gated, plain, *late], tokens)
    opening = {layer: gated.gate.at(layer) for layer in gated.layers}
    steering = [({}, None), (gated.vectors, opening), (plain.vectors, None)]
    steering += [(item.vectors, None) for item in late]
    for texts, (vectors, gate) in zip(found, steering, strict=True):
        for prompt, text in zip(items, texts, strict=True):
            with steered(lm, vectors, gate):
                expected = greedy(lm, prompt.prompt_ids, {}, tokens)
            assert text == text_of(lm, expected)
    assert found[1] != found[2] and found[1] != found[0]


def test_a_batch_decodes_gated_and_not_side_by_side(lm):
    check_decoding(lm, (1, 2, 3), 1.0, [random_configuration(lm, (3,), 5.0, 3)], 3, 5)


def test_smollm2_decodes_gated_and_not(smollm2):
    check_decoding(smollm2, tuple(range(10, 30)), 0.5, [], 2, 3)


def own_states(lm, items):
    """layer -> (n, D) unit states of the model's own forward, each node of the answers once."""
    found = []
    for item in items:
        for number, response in enumerate(item.responses):
            ids = torch.tensor([item.prompt_ids + response[:-1]])
            with torch.no_grad(), layer_outputs(lm) as read:
                lm.model(ids, use_cache=False)
            found.append(torch.stack(read[1:])[:, 0, len(item.prompt_ids) * (number > 0) :])
    return torch.nn.functional.normalize(torch.cat(found, 1), dim=-1).numpy()


@pytest.mark.parametrize("max_tokens", [1, 2048])
def test_a_gate_is_the_logistic_regression_of_the_states(lm, max_tokens):
    """No two answers of an item begin alike, so every node is in one of them."""
    steering = questions(lm)
    others = [encoded(lm, W[60 + 5 * i : 65 + 5 * i], [W[100 + i : 104 + i]]) for i in range(8)]
    layers = [0, 1]
    gate = gates.fit(lm, steering, others, layers, max_tokens)
    mine, theirs = own_states(lm, steering), own_states(lm, others)
    for layer in layers:
        states = np.concatenate([mine[layer], theirs[layer]]).astype(float)
        labels = np.repeat([1, 0], [len(mine[layer]), len(theirs[layer])])
        mean, spread = states.mean(0), states.std(0)
        expected = (
            LogisticRegression(C=gates.PENALTY, class_weight="balanced", max_iter=10_000, tol=1e-8)
            .fit((states - mean) / spread, labels)
            .predict_proba((states - mean) / spread)[:, 1]
        )
        weight, bias = gate.at(layer)
        found = torch.sigmoid(torch.from_numpy(states).float() @ weight + bias)
        assert found.numpy() == pytest.approx(expected, abs=2e-3)
        assert found[labels == 1].mean() > found[labels == 0].mean() + 0.1
    assert gate.weights[2:].isnan().all() and gate.biases[2:].isnan().all()


def test_states_of_items_that_begin_alike_are_their_own(lm):
    """Their beginning is computed once, in a batch of their own; one more item begins otherwise."""
    begin = W[:12]
    items = [encoded(lm, begin + W[20 : 23 + i], [[W[40 + i]], W[50 + i : 53]]) for i in range(3)]
    items.insert(1, encoded(lm, W[60:72], [W[80:84]]))
    assert gates._by_beginning(items) == [[0, 2, 3], [1]]
    states = gates._states(lm, items, [0, 2], 2048, torch.Generator().manual_seed(0), "")
    expected = own_states(lm, items)
    ranks = np.random.default_rng(0).standard_normal(lm.hidden_size)
    for layer, found in states.items():
        rows, own = found.numpy(), expected[layer]
        assert rows.shape == own.shape == (sum(item.packed_length for item in items), len(ranks))
        # Those of the common beginning are there once for each item.
        in_order = (values[np.argsort(values @ ranks)] for values in (rows, own))
        assert relative(*in_order) < 1e-4
    assert sorted(states) == [0, 2]


def test_positions_are_drawn_where_there_are_many(lm, monkeypatch):
    others = [encoded(lm, W[60:100], [W[100:104]])]
    whole = gates.fit(lm, questions(lm), others, [1])
    monkeypatch.setattr(gates, "POSITIONS", 20)
    drawn = [
        len(gates._states(lm, items, [1], 2048, torch.Generator().manual_seed(0), "")[1])
        for items in (questions(lm), others)
    ]
    assert all(10 <= count <= 30 for count in drawn)
    one, same, other = (
        gates.fit(lm, questions(lm), others, [1], seed=seed).weights[1] for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert relative(one, other) > 0.01 < relative(one, whole.weights[1])


@pytest.mark.parametrize("missing", [0, 1])
def test_a_gate_needs_both_kinds(lm, missing):
    groups = [questions(lm), questions(lm)]
    groups[missing] = []
    with pytest.raises(UserError, match="found no " + ("steering examples", "other text")[missing]):
        gates.fit(lm, *groups, [0])


def test_states_that_are_no_numbers_are_refused(lm):
    broken = copy.deepcopy(lm)
    with torch.no_grad():
        broken.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(UserError, match="layer 1 are NaN or infinite"):
        gates.fit(broken, questions(lm), questions(lm), [0, 1])


def test_half_a_gate_is_refused(tmp_path):
    path = tmp_path / "v.safetensors"
    write_tensors(
        path,
        {"vectors": torch.ones(2, 3), "norms": torch.ones(2), "gate_biases": torch.ones(2)},
        {},
    )
    with pytest.raises(UserError, match="gate_biases, norms, vectors: these are no steering"):
        SteeringVectors.load(path)


def test_layers_without_a_gate_are_refused_and_the_others_named():
    weights = torch.ones(5, 3)
    weights[1] = weights[4] = torch.nan
    made = SteeringVectors(torch.ones(5, 3), torch.ones(5), {}, Gate(weights, weights[:, 0]))
    assert list(made.scaled(0.1, ["2-3"])) == [2, 3]
    with pytest.raises(UserError, match=r"give layers that have a gate \(0 2-3\)$"):
        made.scaled(0.1)


def test_vectors_keep_their_gate(lm, tmp_path):
    path, gate = tmp_path / "v.safetensors", a_gate(lm)
    drawn = torch.Generator().manual_seed(0)
    made = SteeringVectors(
        torch.randn(len(lm.layers), lm.hidden_size, generator=drawn),
        torch.ones(len(lm.layers)),
        {"method": "trained"},
        gate,
    )
    made.save(path)
    read = SteeringVectors.load(path)
    assert torch.equal(read.gate.weights, gate.weights)
    assert torch.equal(read.gate.biases, gate.biases)
    layers = tuple(range(len(lm.layers)))
    configuration = Direction("trained", "", layers, read).at(0.8)
    assert configuration.gated and configuration.label == "trained gated @ 0-3 x 0.8"
    (prompt, responses), item = QUESTIONS[0], questions(lm)[0]
    values = score(lm, [item], [configuration, replace(configuration, gate=None)], 1000)[0]
    with read.apply(lm, 0.8, list(layers)):
        expected = own_loss_log_likelihood(lm, prompt, responses[0])
    assert values[1, 0] == pytest.approx(expected, abs=1e-3)
    assert (np.diff(np.sort(values[:, 0])) > 0.01).all()


def test_the_scripts_steer_behind_a_gate(commands, few_texts, tmp_path):
    """Stage 2 fits it once, at the layers that it steers, and keeps it with the vectors of all
    methods. A run at another layer adds that one, and stage 3 takes it up."""
    model = tiny.save_model(tmp_path / "tiny", max_position_embeddings=2048)
    rows = [row | {"context": f"It is said: {row['question']}"} for row in tiny.question_rows()]
    questions = tiny.write_jsonl(tmp_path / "q.jsonl", rows)
    flags = ["--model_name", model, "--dataset_name", "q", "--dataset_path", questions]
    flags += ["--num_samples", 4]
    states, folder = tmp_path / "states.safetensors", tmp_path / "vectors"
    commands.run(
        *("token_ablation.py", *flags, "--grad_method", "none"),
        *("--output_path_meta", tmp_path / "t.csv", "--output_path_hidden", states),
    ).ok()
    stage2 = ["steering_mc.py", *flags, "--grad_method", "none", "--methods", "gradient", "rotated"]
    stage2 += ["--alphas", 0.5, "--layer_idxs", 0, 1, "--num_validation", 4, "--num_test", 4]
    stage2 += ["--hidden_states_path", states, "--steering_vectors_dir", folder]
    stage2 += ["--output_dir", tmp_path / "out"]
    commands.run(*stage2).ok()
    commands.run(*stage2, "--gate", short_texts=True).ok()
    files = {path.stem: path for path in folder.glob("*.safetensors")}
    gated = {name: path for name, path in files.items() if name.endswith("_gated")}
    assert len(files) == 4 and len(gated) == 2
    made = {name: SteeringVectors.load(path) for name, path in files.items()}
    by_method = {made[name].info["method"]: made[name] for name in gated}
    gate = by_method["gradient"].gate
    assert torch.equal(gate.weights[:2], by_method["rotated"].gate.weights[:2])
    # The same gate from the library, and what it does to a test question.
    lm = models.load(str(model))
    drawn = splits.steering_examples(DataSettings("q", str(questions), 4), 0)
    pairs = [example.pair() for example in drawn]
    asked = [prompts.encode(lm, pair) for pair in pairs]
    background = costs.gate_background(lm, pairs, PromptSettings())
    assert sum("It is said" in item.text for item in background) == 0
    assert sum(pair.question in item.text for pair in pairs for item in background) >= 4
    size = AblationSettings().batch_tokens  # positions are drawn batch by batch
    expected = gates.fit(lm, asked, background, [*range(len(lm.layers))], size)
    assert gate.biases.isnan().tolist() == [False, False, True]
    assert torch.allclose(gate.weights[:2], expected.weights[:2], rtol=1e-3, atol=1e-3)
    again = [*stage2, "--gate", "--layer_idxs", 1, 2]  # the last of two flags counts
    commands.run(*again, short_texts=True).ok()
    grown = SteeringVectors.load(next(iter(gated.values()))).gate
    assert torch.equal(grown.weights[:2], gate.weights[:2])
    assert torch.allclose(grown.weights[2], expected.weights[2], rtol=1e-3, atol=1e-3)
    (grid,) = (tmp_path / "out").glob("*joint_0+1*gate-True*_grid.csv")
    table = pd.read_csv(grid, keep_default_na=False)
    own = table[(table.method == "gradient") & (table.part == "test")].iloc[0]
    assert own["mode"] == "gated"
    (answers,) = (tmp_path / "out").glob("*joint_0+1*gate-True*_questions.csv")
    asked = pd.read_csv(answers, keep_default_na=False)
    asked = asked[asked.part == "test"].groupby("configuration")
    steered_rows = asked.get_group(own.configuration)
    by_id = {
        example.id: example for example in data.examples(*data.load("q", "train", questions), 0)
    }
    items = [prompts.encode(lm, by_id[name]) for name in steered_rows.id]
    vectors = replace(by_method["gradient"], gate=expected)
    scored = score_all(lm, items, [vectors.at(0.5, [0, 1])], 4096)
    for values, written in zip(scored, steered_rows.log_likelihoods, strict=True):
        assert relative(json.loads(written), values[1]) < 1e-3
    plain = replace(vectors, gate=None).at(0.5, [0, 1])
    assert relative(score_all(lm, items, [plain], 4096)[0][1], scored[0][1]) > 1e-3
    # Stage 3 takes the chosen configuration, with its gate.
    (chosen,) = (tmp_path / "out").glob("*joint_0+1*gate-True*_chosen.json")
    assert json.loads(chosen.read_text())["gate"] is True
    commands.run(
        *("steering_generation.py", *flags, "--grad_method", "none", "--chosen_path", chosen),
        *("--num_validation", 4, "--num_test", 4, "--num_prompts", 2, "--max_new_tokens", 5),
        *("--hidden_states_path", states, "--steering_vectors_dir", folder),
        *("--output_dir", tmp_path / "texts"),
    ).ok()
    (texts,) = (tmp_path / "texts").glob("*.csv")
    written = pd.read_csv(texts, keep_default_na=False)
    assert written.configuration.str.contains("gradient gated").any()
