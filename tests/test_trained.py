"""Trained vectors against a loop of one's own: separate sequences, hooks, losses by hand."""

from dataclasses import replace

import pytest
import torch
from helpers.reference import embeds, encoded, hooked, log_likelihood, no_hooks, relative, words

from grains.errors import UserError
from grains.steering import Gate
from grains.study import trained

pytestmark = pytest.mark.slow

W = words(120, seed=9)
PAIRS = [
    (W[:11], [W[20:24], W[30:33]]),
    (W[40:43], [W[20:22], W[22:25]]),
    (W[44:46], [W[24:36], W[36:40]]),
]
# The texts hold rejected answers, so that what the pairs teach costs them.
TEXTS = [(W[:11], [W[30:33]]), (W[40:43], [W[22:25]]), (W[44:46], [W[36:40]])]
QUESTIONS = [(W[95:100], [W[1:3], W[3:6], W[6:7]]), (W[100:104], [W[7:9], W[9:10], W[11:14]])]
ANSWERS = [(W[50:55], [W[60:64]]), (W[56:59], [W[66:69]])]
LAYERS = [1, 3]


@pytest.fixture
def lm(make_tiny):
    return make_tiny("llama")


def items(lm):
    return [
        [encoded(lm, prompt, responses) for prompt, responses in group]
        for group in (PAIRS, TEXTS, QUESTIONS, ANSWERS)
    ]


def norms(lm):
    return torch.arange(1.0, 1.0 + len(lm.layers))


def own_values(lm, group, added=None, last=False):
    """(n, C) log-likelihoods, every response a sequence of its own, vectors added by hooks.

    last: whether they are added at the last position of the prompt alone.
    """
    length = 0

    def steered(layer, vector):
        def steer(output):
            weight, bias = gate(lm).at(layer)
            unit = output / output.norm(dim=-1, keepdim=True)
            moved = output + vector / (1 + torch.exp(-(unit @ weight + bias)))[..., None]
            moved = moved * output.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
            if last:
                before, behind = output[..., : length - 1, :], output[..., length:, :]
                moved = torch.cat([before, moved[..., length - 1 : length, :], behind], -2)
            return moved

        return steer

    changes = {lm.layers[layer]: steered(layer, vector) for layer, vector in (added or {}).items()}
    values = []
    with hooked(changes):
        for item in group:
            prompt, length = embeds(lm, item.prompt_ids), len(item.prompt_ids)
            values.append(
                torch.stack([log_likelihood(lm, prompt, response) for response in item.responses])
            )
    return torch.stack(values)


def own_loss(pairs, texts, questions, answers, base, lengths, own_answers):
    """The loss as the module's description writes it, from log-likelihoods."""

    def kl(one, other):
        return (one.exp() * (one - other)).sum(1)

    per_token = (pairs / lengths[0]).unbind(1)
    loss = (
        -trained.PAIR_WEIGHT
        / 2
        * (
            torch.sigmoid((per_token[0] - per_token[1]) / 1.5).log().mean()
            + torch.sigmoid((pairs[:, 0] - pairs[:, 1]) / 24).log().mean()
        )
    )
    rises = (base[1] - texts)[:, 0] / lengths[1][:, 0]
    loss = loss + trained.TEXT_WEIGHT * torch.relu(rises).mean()
    for scale in (1.0, 0.3 * lengths[2]):
        loss = (
            loss
            + trained.QUESTION_WEIGHT
            * kl((base[2] / scale).log_softmax(1), (questions / scale).log_softmax(1)).mean()
        )
    rises = (base[3] - answers)[:, 0] / lengths[3][:, 0]
    aim = trained.AIMS[own_answers]
    return loss + aim.weight * torch.relu(rises - aim.allowed).mean()


def own_training(lm, groups, rate, kept, last=False, own_answers="change"):
    """kept: for every run and step what the layers' vectors are multiplied by."""
    made = [own_run(lm, groups, rate, of_run, last, own_answers) for of_run in kept]
    return sum(made) / len(made)


def own_run(lm, groups, rate, kept, last, own_answers):
    lengths = [
        torch.tensor([[len(response) for response in item.responses] for item in group])
        for group in groups
    ]
    with torch.no_grad():
        base = [own_values(lm, group) for group in groups]
    vectors = torch.zeros(len(LAYERS), lm.hidden_size, requires_grad=True)
    optimizer = torch.optim.Adam([vectors], lr=rate, betas=(0.9, 0.95))
    for step, factors in enumerate(kept):
        optimizer.param_groups[0]["lr"] = rate * (len(kept) - step) / len(kept)
        values = [
            own_values(
                lm,
                group,
                {
                    layer: stretch * factors[row] * norms(lm)[layer] * vectors[row]
                    for row, layer in enumerate(LAYERS)
                },
                last,
            )
            for group, stretch in zip(groups, (1, 1.5, 1.5, 1), strict=True)
        ]
        optimizer.zero_grad()
        own_loss(*values, base, lengths, own_answers).backward()
        optimizer.step()
    return vectors.detach() * norms(lm)[LAYERS, None]


def gate(lm):
    generator = torch.Generator().manual_seed(4)
    return Gate(
        2 * torch.randn(len(lm.layers), lm.hidden_size, generator=generator),
        torch.randn(len(lm.layers), generator=generator),
    )


def quick(epochs, rate=1e-2, own_answers="change"):
    return trained.AIMS[own_answers]._replace(epochs=epochs, learning_rate=rate)


def train(lm, epochs=3, rate=1e-2, own_answers="change", **options):
    aim = quick(epochs, rate, own_answers)
    run = trained.trainer(lm, *items(lm), norms(lm), gate(lm), LAYERS, aim, **options)
    return sum(map(run, range(aim.runs))) / aim.runs


@pytest.mark.parametrize(
    ("weight", "where", "own_answers"),
    [(0.0, "all", "change"), (3.0, "all", "keep"), (3.0, "last", "change")],
)
def test_training_is_that_of_separate_sequences(lm, monkeypatch, weight, where, own_answers):
    """So few items make one group each. At the start the texts' loss has an edge, which rounding
    falls on either side of: its weight begins to count in a second test, from other vectors."""
    monkeypatch.setattr(trained, "TEXT_WEIGHT", weight)
    kept = torch.tensor(
        [[[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]], [[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]]
    )
    for name, aim in trained.AIMS.items():  # so that answers count at all
        monkeypatch.setitem(trained.AIMS, name, aim._replace(allowed=-9.0, runs=len(kept)))
    monkeypatch.setattr(trained, "QUESTION_WEIGHT", 300.0)  # and questions, whose loss begins at 0
    if weight:
        monkeypatch.setattr(
            trained,
            "text_losses",
            lambda values, base, lengths: ((base - values) / lengths)[:, 0] + 1,
        )  # a loss of 0 would not be learnt from
        monkeypatch.setattr(torch, "relu", lambda rises: rises)
    steps = iter(kept.flatten(0, 1))
    monkeypatch.setattr(trained, "dropout", lambda layers, generator: next(steps))
    found = train(lm, where=where, own_answers=own_answers)
    expected = own_training(lm, items(lm), 1e-2, kept, where == "last", own_answers)
    assert relative(found[LAYERS], expected) <= 0.02
    assert (found[[0, 2]] == 0).all()
    assert no_hooks(lm)


@pytest.mark.parametrize(
    ("own_answers", "steps", "rate", "runs"), [("change", 5, 4e-4, 4), ("keep", 32, 2e-4, 1)]
)
def test_an_aim_has_its_own_steps(lm, monkeypatch, own_answers, steps, rate, runs):
    """From a constant gradient Adam takes steps of the rate: their sum is the vectors' length."""
    monkeypatch.setattr(trained, "dropout", lambda layers, generator: torch.ones(layers))
    monkeypatch.setattr(
        trained._Term,
        "backward",
        lambda term, group, checkpointed, vectors, after: (vectors.sum() / 4).backward() or 1.0,
    )
    aim = trained.AIMS[own_answers]
    found = trained.trainer(lm, *items(lm), norms(lm), gate(lm), LAYERS, aim)(0)
    # The rate falls evenly from the whole to 1 / steps of it.
    expected = -rate * (steps + 1) / 2 * norms(lm)[LAYERS, None].expand(-1, lm.hidden_size)
    assert torch.allclose(found[LAYERS], expected, rtol=1e-4)
    made = trained.recipe(aim)
    assert (made["epochs"], made["learning_rate"], made["runs"]) == (steps, rate, runs)


def test_the_pairs_are_preferred_or_the_texts_are_kept(lm, monkeypatch):
    pairs, texts, *_ = items(lm)
    rises, margins = {}, {}
    with torch.no_grad():
        base = [own_values(lm, group) for group in (pairs, texts)]
    for weight in (0.0, 100.0):
        monkeypatch.setattr(trained, "TEXT_WEIGHT", weight)
        found = train(lm, epochs=10, rate=0.05)
        with torch.no_grad():
            values = [
                own_values(lm, group, dict(zip(LAYERS, found[LAYERS], strict=True)))
                for group in (pairs, texts)
            ]
        margins[weight] = ((values[0] - base[0])[:, 0] - (values[0] - base[0])[:, 1]).mean()
        rises[weight] = (base[1] - values[1]).clamp_min(0).sum()
    assert margins[0.0] > 0.5
    assert rises[0.0] > 0.1 and rises[100.0] < 0.2 * rises[0.0]


def test_dropout_keeps_the_mean_and_a_single_layer():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([trained.dropout(30, generator) for _ in range(3000)])
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5 * 29 / 30, abs=0.01)
    assert all(trained.dropout(1, generator).item() == 1 for _ in range(50))


def test_losses_by_hand():
    lengths = torch.tensor([[2.0, 4.0]])
    values, base = torch.tensor([[-4.0, -10.0]]), torch.tensor([[-5.0, -9.0]])
    # per token -2 and -2.5: 0.5 / 1.5; in sum 6 / 24
    expected = (
        torch.log1p(torch.exp(torch.tensor(-0.5 / 1.5)))
        + torch.log1p(torch.exp(torch.tensor(-6 / 24)))
    ) / 2
    assert trained.pair_losses(values, base, lengths)[0] == pytest.approx(expected.item())
    texts = trained.text_losses(
        torch.tensor([[-6.0], [-4.0]]), torch.tensor([[-5.0], [-5.0]]), torch.tensor([[2], [2]])
    )
    assert texts.tolist() == [0.5, 0.0]
    answers = trained.answer_losses(
        torch.tensor([[-8.0], [-7.0]]),
        torch.tensor([[-5.0], [-5.0]]),
        torch.tensor([[2], [2]]),
        allowed=1.2,
    )
    assert answers.tolist() == pytest.approx([0.3, 0.0])  # rises of 1.5 and 1, 1.2 allowed
    assert trained.question_losses(base, base, lengths).item() == pytest.approx(0, abs=1e-6)
    assert trained.question_losses(values, base, lengths).item() > 0.01


@pytest.mark.parametrize("change", ["one at a time", "checkpointed"])
def test_the_size_of_micro_batches_changes_nothing(lm, monkeypatch, change):
    monkeypatch.setattr(trained, "TEXT_WEIGHT", 0.0)
    expected = train(lm, epochs=2)
    if change == "one at a time":
        found = train(lm, epochs=2, max_tokens=1)
    else:
        found = train(replace(lm, memory=0), epochs=2)
    assert relative(found, expected) <= 0.02


def test_the_seed_decides(lm, monkeypatch):
    """By the order of the items alone, and by the layers that are left out."""
    seeds = torch.stack([train(lm, epochs=1, seed=seed) for seed in (1, 2)])
    assert not torch.equal(*seeds)
    monkeypatch.setattr(trained, "dropout", lambda layers, generator: torch.ones(layers))
    monkeypatch.setattr(trained, "PAIRS", 1)
    one, same, other = (train(lm, epochs=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_run_is_the_same_wherever_it_is_made(lm):
    first, second = (
        trained.trainer(lm, *items(lm), norms(lm), gate(lm), LAYERS, quick(2)) for _ in range(2)
    )
    made = [first(number) for number in range(quick(2).runs)]
    assert torch.equal(second(len(made) - 1), made[-1]) and torch.equal(second(0), made[0])
    assert not torch.equal(made[0], made[-1])


def test_no_step_computes_what_no_vector_changes(lm):
    """Up to the first steered layer the base model's states are those of every step."""
    run = trained.trainer(lm, *items(lm), norms(lm), gate(lm), LAYERS, quick(2))
    calls = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(lm.layers)
    ]
    run(0)
    for handle in handles:
        handle.remove()
    assert {*calls} == {2, 3} and len(calls) == 2 * 2 * 4  # layers, steps, kinds of items


def test_what_is_kept_for_all_steps_is_known_before(lm):
    pairs = items(lm)[0]
    part = trained._Term(lm, 1, 10**6, "all", pairs, 1, 1.0, 1.0, trained.pair_losses)
    kept = sum(
        batch.states.nbytes + batch.calls.layers[0]["attention_mask"].nbytes
        for (batch,) in part.groups
    )
    # Told from lengths, without what the packs leave out: each last token, beginnings shared.
    assert kept <= trained._kept_bytes(lm, pairs) <= 1.5 * kept


def test_a_single_layer_and_the_last_one_are_trained(lm):
    for layer in (0, len(lm.layers) - 1):
        found = trained.trainer(lm, *items(lm), norms(lm), gate(lm), [layer], quick(1))(0)
        assert found.norm(dim=-1).nonzero().flatten().tolist() == [layer]


def test_what_is_missing_is_refused(lm):
    for index, name in enumerate(("pairs", "texts", "questions", "answers")):
        groups = items(lm)
        groups[index] = []
        with pytest.raises(UserError, match=f"found no {name}"):
            trained.trainer(lm, *groups, norms(lm), gate(lm), LAYERS, quick(1))
