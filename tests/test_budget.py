"""steering_mc.py --max_ppl_increase: the cost is the library's, and the choice keeps within it."""

import json

import pandas as pd
import pytest
from helpers import short_texts, tiny
from helpers.costs import perplexity
from pytest import approx

from grains import models
from grains.steering import SteeringVectors
from grains.study import costs

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line",)


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    model = tiny.save_model(folder / "tiny", max_position_embeddings=2048)
    questions = tiny.write_jsonl(folder / "q.jsonl", tiny.question_rows())
    flags = ["--model_name", model, "--dataset_name", "q", "--dataset_path", questions]
    flags += ["--num_samples", 4]
    states = folder / "states.safetensors"
    commands.run(
        *("token_ablation.py", *flags, "--top_k", 3, "--top", "pos"),
        *("--grad_method", "vanilla", "--output_path_meta", folder / "tokens.csv"),
        *("--output_path_hidden", states),
    ).ok()

    def stage2(name, *more, short=True):
        return commands.run(
            *("steering_mc.py", *flags, "--num_validation", 8, "--layer_idxs", 1),
            *("--methods", "gradient", "rotated", "--alphas", 0.01, 0.3, -0.3),
            *("--hidden_states_path", states, "--steering_vectors_dir", folder / "vectors"),
            *("--output_dir", folder / name, *more),
            short_texts=short,
        )

    return stage2, folder, model


def result(folder, ending):
    (path,) = folder.glob(f"*_{ending}")
    return path


def test_the_choice_keeps_within_the_budget(run):
    stage2, folder, model = run
    stage2("free").ok()
    free = pd.read_csv(result(folder / "free", "grid.csv"))
    assert "perplexity_increase" not in free
    # The cost of the model's own forward, steered by hooks, on the validation passages.
    lm = models.load(str(model))
    texts = costs.neutral_texts()[: short_texts.PASSAGES : 8]
    texts = [" ".join(text.split()[: short_texts.WORDS]) for text in texts]
    (path,) = (folder / "vectors").glob("*gradient*.safetensors")
    vectors = SteeringVectors.load(path)
    base = perplexity(lm, texts, [], 4096)[0]
    paid = {}
    for alpha in (0.01, 0.3, -0.3):
        with vectors.apply(lm, alpha, [1]):
            paid[alpha] = perplexity(lm, texts, [], 4096)[0] / base - 1
    budget = sorted(paid.values())[1] * 1.001
    stage2("within", "--max_ppl_increase", budget).ok()
    grid = pd.read_csv(result(folder / "within", "grid.csv"))
    own = grid[(grid.method == "gradient") & (grid.part == "validation")].set_index("alpha")
    for alpha, value in paid.items():
        assert own.perplexity_increase[alpha] == approx(value, rel=2e-3, abs=1e-6)
    assert (grid[grid.method == "base"].perplexity_increase == 0).all()
    assert grid.drop(columns="perplexity_increase").equals(free)
    within = own[own.perplexity_increase <= budget]
    assert len(within) == 2
    chosen = json.loads(result(folder / "within", "chosen.json").read_text())
    assert chosen["method"] == "gradient"
    assert own.accuracy_token[chosen["alpha"]] == within.accuracy_token.max()
    assert chosen["alpha"] in within.index


def test_no_strength_within_the_budget_is_an_error(run):
    stage2, _, _ = run
    message = stage2("none", "--max_ppl_increase", "1e-9", short=False).error()
    assert "every configuration raises the perplexity of prose" in message
