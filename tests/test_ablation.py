"""Top-k selection by hand; hidden states, log-likelihoods and gradients against the model's own."""

import pytest
import torch
from helpers.reference import (
    embeds,
    encoded,
    example,
    layer_outputs,
    log_likelihood,
    no_hooks,
    relative,
    words,
)

from grains import prompts
from grains.ablation import batches_in_order, hidden_states, last_states, plain_states, select
from grains.attribution import attributed_positions
from grains.settings import TOPS

SCORES = torch.tensor([0.5, -2.0, 9.0, 0.1, 1.0, -0.4, 1.0, -3.0])
CANDIDATES = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1]).bool()  # the largest is no candidate


def chosen(top, k, seed=0, scores=SCORES, candidates=CANDIDATES):
    return select(scores, candidates, k, top, torch.Generator().manual_seed(seed))


def test_pos_takes_the_largest_in_order_and_ties_from_the_left():
    assert chosen("pos", 1) == [4]
    assert chosen("pos", 4) == [4, 6, 0, 3]


def test_neg_takes_the_smallest():
    assert chosen("neg", 3) == [7, 1, 5]


def test_abs_takes_the_largest_magnitude():
    assert chosen("abs", 4) == [7, 1, 4, 6]


@pytest.mark.parametrize("top", ["pos", "neg", "abs"])
def test_the_leftmost_of_equal_scores_comes_first(top):
    assert chosen(top, 3, scores=torch.ones(8)) == [0, 1, 3]


@pytest.mark.parametrize("top", TOPS)
def test_k_is_clamped_to_the_candidates(top):
    for k in (7, 8, 100):
        assert sorted(chosen(top, k)) == [0, 1, 3, 4, 5, 6, 7]
    assert chosen(top, 3, candidates=torch.zeros(8).bool()) == []


def test_rand_is_seeded_and_takes_every_candidate_alike():
    assert chosen("rand", 3, seed=4) == chosen("rand", 3, seed=4)
    draws = [chosen("rand", 3, seed) for seed in range(700)]
    assert all(len(set(draw)) == 3 for draw in draws)
    counts = torch.tensor(draws).flatten().bincount(minlength=8)
    assert counts[2] == 0
    # 300 expected of each, standard deviation 13
    assert counts[CANDIDATES].min() > 240 and counts[CANDIDATES].max() < 360


def test_an_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="expected pos, neg, abs, rand"):
        chosen("largest", 3)


@pytest.mark.parametrize("style", prompts.STYLES)
@pytest.mark.parametrize("scope", ["content", "all"])
def test_special_tokens_are_never_selected(make_tiny, style, scope):
    lm = make_tiny("llama")
    item = prompts.encode(lm, example("Who painted the Mona Lisa?", "Leonardo", "Raphael"), style)
    ids = torch.tensor(item.prompt_ids)
    special = torch.isin(ids, torch.tensor(lm.tokenizer.all_special_ids))
    assert bool(special.any()) == (style == "chat")
    candidates = item.words & attributed_positions(item, scope)
    assert candidates.any() and not (candidates & special).any()
    scores = torch.where(special, 100.0, torch.randn(len(ids)))
    scores[special.nonzero()[::2]] = -100.0
    for top in TOPS:
        assert not special[chosen(top, 1000, 0, scores, candidates)].any()
    if scope == "content":
        kept = lm.tokenizer.decode(ids[candidates]).strip()
        assert kept == "Who painted the Mona Lisa?"


# -- what one pass over an example yields --

W = words(60, seed=2)
PROMPT = W[:11]
PAIRS = {
    "different lengths": [W[20:24], W[30:32]],
    "common beginning": [W[20:23], W[20:22] + W[30:33]],
    "one a prefix of the other": [W[20:22], W[20:25]],
    "longer than the window": [W[20:30], W[40:52]],
    "single tokens": [W[20:21], W[30:31]],
}
ABLATED = [[1, 4, 5], [0], list(range(11)), []]


def replaced(lm, positions, kind):
    prompt = embeds(lm, PROMPT).clone()
    matrix = embeds(lm, range(lm.model.config.vocab_size))
    token = {"pad": lm.tokenizer.pad_token_id, "unk": lm.tokenizer.unk_token_id}
    prompt[positions] = matrix.mean(0) if kind == "mean" else matrix[token[kind]]
    return prompt


@torch.no_grad()
def own_forward(lm, prompt, response):
    """(L+1, T, D) what enters layer 0 and every layer's output, of one sequence, and log P."""
    with layer_outputs(lm) as outputs:
        value = log_likelihood(lm, prompt, response).item()
    return torch.stack(outputs)[:, 0], value


@pytest.mark.parametrize(
    ("pair", "kind"), zip(PAIRS, ["pad", "unk", "mean", "pad", "unk"], strict=True)
)
def test_last_hidden_states_and_log_likelihoods(tiny, pair, kind):
    item = encoded(tiny, PROMPT, PAIRS[pair])
    found = hidden_states(tiny, item, ABLATED, max_tokens=50, text=kind)
    assert found.last.shape == (5, 2, len(tiny.layers) + 1, tiny.hidden_size)
    for row, positions in enumerate([[], *ABLATED[:3]]):
        prompt = replaced(tiny, positions, kind)
        for column, response in enumerate(item.responses):
            states, value = own_forward(tiny, prompt, response)
            for layer, expected in enumerate(states[:, -1]):  # the last too is before the norm
                assert relative(found.last[row, column, layer], expected) <= 1e-4
            assert found.log_likelihoods[row, column].item() == pytest.approx(value, abs=1e-3)
    assert relative(found.last[4], found.last[0]) <= 1e-5  # nothing replaced
    assert relative(found.log_likelihoods[4], found.log_likelihoods[0]) <= 1e-5


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_at_every_layer(tiny, pair):
    """Of log P(y+)/|y+| - log P(y-)/|y-|, summed over the prompt's positions."""
    item = encoded(tiny, PROMPT, PAIRS[pair])
    found = hidden_states(tiny, item, [], max_tokens=50).gradients
    expected = 0
    for sign, response in zip([1, -1], item.responses, strict=True):
        prompt = embeds(tiny, PROMPT).requires_grad_()
        with layer_outputs(tiny) as outputs:
            value = log_likelihood(tiny, prompt, response)
        gradients = torch.autograd.grad(sign * value / len(response), outputs)
        expected = expected + torch.stack([g[0, : len(PROMPT)].sum(0) for g in gradients])
    assert found.shape == expected.shape
    for layer in range(len(expected)):
        assert relative(found[layer], expected[layer]) <= 1e-4


@pytest.mark.parametrize("pair", PAIRS)
def test_norms_are_medians_over_the_plain_positions(tiny, pair):
    """Over the prompt and both answers, what they share counted once."""
    item = encoded(tiny, PROMPT, PAIRS[pair])
    found = hidden_states(tiny, item, ABLATED[:1], max_tokens=50).norms
    first, second = item.sequences()
    shared = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
        min(len(first), len(second)),
    )
    prompt = embeds(tiny, PROMPT)
    states = torch.cat(
        [
            own_forward(tiny, prompt, item.responses[0])[0],
            own_forward(tiny, prompt, item.responses[1])[0][:, shared:],
        ],
        dim=1,
    )
    expected = states.norm(dim=-1).median(dim=1).values
    assert found.shape == expected.shape
    assert relative(found, expected) <= 1e-5


def test_examples_together_are_each_alone(tiny):
    """Prompts and answers of several lengths: one forward a batch, and each example as alone."""
    items = [
        encoded(tiny, W[start : start + length], PAIRS[pair])
        for (start, length), pair in zip([(0, 11), (3, 4), (7, 19)], PAIRS, strict=False)
    ]
    counted = []
    handle = tiny.layers[-1].register_forward_hook(
        lambda module, args, output: counted.append(len(args[0])) if output.any() else None
    )
    by_size = []
    for max_tokens, batches in ((1, [1, 1, 1]), (70, [2, 1]), (10_000, [3])):
        found = []
        for states_of in (plain_states, last_states):
            counted.clear()
            found.append([*states_of(tiny, items, max_tokens)])
            assert counted == batches
        by_size.append(zip(*found, strict=True))
    handle.remove()
    for item, *found in zip(items, *by_size, strict=True):
        alone = hidden_states(tiny, item, [], 50)
        prompt = embeds(tiny, item.prompt_ids).requires_grad_()
        total = 0
        gradients = torch.zeros_like(alone.gradients)
        for column, response in enumerate(item.responses):
            with layer_outputs(tiny) as outputs:
                value = log_likelihood(tiny, prompt, response)
            last = torch.stack([output[0, -1] for output in outputs]).detach()
            for states, (last_alone, _) in found:
                assert relative(states.last[0, column], last) <= 1e-5
                assert relative(last_alone[column], last) <= 1e-5
                likely = states.log_likelihoods[0, column].item()
                assert likely == pytest.approx(value.item(), abs=1e-4)
            total = (1 - 2 * column) * value / len(response)
            by_layer = torch.autograd.grad(total, outputs)
            gradients += torch.stack([g[0, : len(prompt)].sum(0) for g in by_layer])
        for states, (_, norms) in found:
            # Both are sums in float32; on some processors Gemma's two agree to 1.3e-5 only.
            assert relative(states.gradients, gradients) <= 5e-5
            assert relative(states.norms, alone.norms) <= 1e-5
            assert relative(norms, alone.norms) <= 1e-5


def test_batches_in_order_by_hand():
    found = batches_in_order([3, 5, 4, 10, 1, 1, 30, 2], 15)
    assert [list(group) for group in found] == [[0, 1, 2], [3], [4, 5], [6], [7]]


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_the_size_of_micro_batches_changes_nothing(family, max_tokens):
    item = encoded(family, PROMPT, PAIRS["common beginning"])
    found, expected = (hidden_states(family, item, ABLATED, size) for size in (max_tokens, 40))
    assert relative(found.last, expected.last) <= 1e-5
    assert relative(found.log_likelihoods, expected.log_likelihoods) <= 1e-5
    assert torch.equal(found.norms, expected.norms)


def test_the_model_leaves_as_it_came(family):
    before = {name: weight.clone() for name, weight in family.model.state_dict().items()}
    hidden_states(family, encoded(family, PROMPT, PAIRS["different lengths"]), ABLATED, 100)
    assert no_hooks(family)
    assert all(
        torch.equal(before[name], weight) for name, weight in family.model.state_dict().items()
    )


def test_smollm2(smollm2):
    item = prompts.encode(
        smollm2,
        example("What is the capital of Australia?", "Canberra is", "Sydney, of course"),
        "qa",
    )
    positions = item.content.nonzero()[:, 0].tolist()[1:4]
    found = hidden_states(smollm2, item, [positions], max_tokens=512)
    gradients = 0
    for row in range(2):
        prompt = embeds(smollm2, item.prompt_ids).clone()
        if row:
            prompt[positions] = embeds(smollm2, [smollm2.tokenizer.pad_token_id])
        for column, response in enumerate(item.responses):
            with layer_outputs(smollm2) as outputs:
                value = log_likelihood(smollm2, prompt.requires_grad_(), response)
            last = torch.stack([output[0, -1] for output in outputs])
            assert relative(found.last[row, column].detach(), last.detach()) <= 1e-4
            assert found.log_likelihoods[row, column].item() == pytest.approx(
                value.item(), abs=1e-3
            )
            if not row:
                sign = (1 - 2 * column) / len(response)
                by_layer = torch.autograd.grad(sign * value, outputs)
                gradients = gradients + torch.stack(
                    [g[0, : len(item.prompt_ids)].sum(0) for g in by_layer]
                )
            prompt = prompt.detach()
    for layer in range(31):
        assert relative(found.gradients[layer], gradients[layer]) <= 1e-3
