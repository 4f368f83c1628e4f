"""Attributions against captum, direct autograd, closed forms and many-point quadrature.

The expected values come from separate sequences through the model's own forward.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from helpers.families import tiny_model
from helpers.reference import embeds, encoded, example, log_likelihood, relative, words
from torch.autograd.graph import saved_tensors_hooks

from grains import models, prompts
from grains import replay as replay_module
from grains.attribution import (
    NOISE_REPEATS,
    PromptFunction,
    StraightPath,
    adaptive_simpson,
    attribute,
    gauss_legendre,
    text_baseline,
)
from grains.errors import UserError
from grains.logprobs import targets
from grains.packing import pack
from grains.replay import replay
from grains.settings import BASELINES, AttributionSettings

W = words(60, seed=1)
PROMPT = W[:11]  # longer than the sliding window
CONTENT = [2, 3, 5, 6, 7]
PAIRS = {
    "different": [W[20:24], W[30:33]],
    "common beginning": [W[20:24], W[20:22] + W[30:33]],
    "one a prefix of the other": [W[20:23], W[20:26]],
    "longer than the window": [W[20:30], W[40:52]],
}
MAX_TOKENS = 200
LOGITS = 2 * 1024 * 4096 * 4  # bytes that pieces of logits take of the memory


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(lm, item, weights=(1.0, -1.0)):
    """f of (R, P, D) prompt embeddings, each response a sequence of its own."""
    return lambda prompts: sum(
        weight * log_likelihood(lm, prompts, response)
        for weight, response in zip(weights, item.responses, strict=True)
        if weight
    )


def baseline_embedding(lm, kind):
    matrix = embeds(lm, range(lm.model.config.vocab_size))
    return {
        "zeros": torch.zeros(lm.hidden_size),
        "mean": matrix.mean(0),
        "pad": matrix[lm.tokenizer.pad_token_id],
        "unk": matrix[lm.tokenizer.unk_token_id],
    }[kind]


def start_of_path(lm, item, kind, scope):
    """(P, D) prompt embeddings, the baseline wherever a position moves."""
    prompt = embeds(lm, item.prompt_ids).clone()
    moves = slice(None) if scope == "all" else item.content
    prompt[moves] = baseline_embedding(lm, kind)
    return prompt


def captum_scores(lm, item, kind, scope, steps, weights=(1.0, -1.0)):
    prompt = embeds(lm, item.prompt_ids)
    scores = IntegratedGradients(objective(lm, item, weights)).attribute(
        prompt[None],
        start_of_path(lm, item, kind, scope)[None],
        n_steps=steps,
        method="gausslegendre",
        internal_batch_size=steps,
    )
    return scores[0].sum(-1)


@pytest.mark.parametrize("scope", ["all", "content"])
@pytest.mark.parametrize("kind", BASELINES)
def test_gauss_legendre_is_captums(tiny, kind, scope):
    item = encoded(tiny, PROMPT, PAIRS["common beginning"], CONTENT)
    settings = AttributionSettings(baseline=kind, attribute=scope, ig_steps=4)
    (found,) = attribute(tiny, item, settings, MAX_TOKENS, generator())
    expected = captum_scores(tiny, item, kind, scope, 4)
    assert relative(found.scores, expected) <= 1e-3
    assert found.points == 4
    still = [i for i in range(len(PROMPT)) if scope == "content" and i not in CONTENT]
    assert not found.scores[still].any()


@pytest.mark.parametrize("pair", PAIRS)
def test_gauss_legendre_is_captums_for_any_two_answers(family, pair):
    item = encoded(family, PROMPT, PAIRS[pair])
    settings = AttributionSettings(baseline="mean", attribute="all", ig_steps=5)
    (found,) = attribute(family, item, settings, MAX_TOKENS, generator())
    assert relative(found.scores, captum_scores(family, item, "mean", "all", 5)) <= 1e-3


def test_two_equal_answers_have_no_attribution(family):
    item = encoded(family, PROMPT, [W[20:23], W[20:23]])
    settings = AttributionSettings(baseline="mean", attribute="all", ig_steps=3)
    (found,) = attribute(family, item, settings, MAX_TOKENS, generator())
    assert found.difference == 0 and not found.scores.any()


def test_the_normal_objective_is_each_response_on_its_own(family):
    item = encoded(family, PROMPT, PAIRS["common beginning"], CONTENT)
    settings = AttributionSettings("normal", baseline="mean", ig_steps=6)
    found = attribute(family, item, settings, MAX_TOKENS, generator())
    assert len(found) == 2
    for result, weights in zip(found, [(1.0, 0.0), (0.0, 1.0)], strict=True):
        expected = captum_scores(family, item, "mean", "content", 6, weights)
        assert relative(result.scores, expected) <= 1e-3
        f = objective(family, item, weights)
        start = start_of_path(family, item, "mean", "content")
        with torch.no_grad():
            difference = f(embeds(family, PROMPT)) - f(start)
        assert result.difference == pytest.approx(difference.item(), abs=1e-3)


@pytest.mark.parametrize("scope", ["all", "content"])
@pytest.mark.parametrize("rule", [3, 60, None])
def test_completeness_error_is_what_it_says(family, rule, scope):
    item = encoded(family, PROMPT, PAIRS["common beginning"], CONTENT)
    settings = AttributionSettings(baseline="pad", attribute=scope, ig_steps=rule, max_points=400)
    (found,) = attribute(family, item, settings, MAX_TOKENS, generator())
    f = objective(family, item)
    with torch.no_grad():
        difference = (
            f(embeds(family, PROMPT)) - f(start_of_path(family, item, "pad", scope))
        ).item()
    assert found.difference == pytest.approx(difference, abs=1e-3)
    error = abs(found.scores.sum() - difference)
    assert found.completeness_error == pytest.approx(error, abs=2e-3)
    assert found.relative_error == pytest.approx(error / abs(difference), abs=1e-3)
    if rule is None:
        assert found.relative_error <= settings.tolerance


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_the_size_of_micro_batches_changes_nothing(family, max_tokens):
    item = encoded(family, PROMPT, PAIRS["different"])
    for method in ("integrated_gradients", "smoothgrad"):
        settings = AttributionSettings(
            grad_method=method, baseline="mean", attribute="all", ig_steps=6, smooth_samples=6
        )
        found, expected = (
            attribute(family, item, settings, size, generator())[0]
            for size in (max_tokens, MAX_TOKENS)
        )
        assert relative(found.scores, expected.scores) <= 1e-4


def held_for_backward(lm, item, prompts):
    """Bytes that autograd keeps of the decoder for R prompts at once, weights apart."""
    held = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    function = PromptFunction(lm, item, [1.0, -1.0], 10**6)
    states = torch.cat([prompts, function.fixed.expand(len(prompts), -1, -1)], 1).requires_grad_()
    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = replay(lm, states, function.captured.calls, checkpointed=function.checkpointed)
    kept = {weight.untyped_storage().data_ptr() for weight in lm.model.parameters()}
    del output
    return sum(size for place, size in held.items() if place not in kept)


def test_micro_batches_fit_the_memory(tiny):
    """Rows are as many as fit, by what the whole decoder really keeps; below one, layers are
    checkpointed, and the scores stay the same."""
    item = encoded(tiny, PROMPT, PAIRS["different"])
    prompts = embeds(tiny, PROMPT).expand(8, -1, -1)
    a_row = held_for_backward(tiny, item, prompts) / 8
    settings = AttributionSettings(baseline="mean", attribute="all", ig_steps=6)
    expected = attribute(tiny, item, settings, MAX_TOKENS, generator())[0].scores
    for rows in (0.4, 3, 7):
        small = replace(tiny, memory=int(LOGITS + rows * 1.3 * a_row))
        function = PromptFunction(small, item, [1.0, -1.0], 10**6)
        assert function.checkpointed == (rows < 1)
        if rows > 1:
            assert 0.6 * rows <= function.rows <= 1.3 * rows
            held = held_for_backward(small, item, prompts[: function.rows])
            assert held <= small.memory - LOGITS
        else:
            assert held_for_backward(small, item, prompts[:1]) < 0.5 * a_row
        found = attribute(small, item, settings, 10**6, generator())[0].scores
        assert relative(found, expected) <= 1e-4


def test_a_gradients_batch_is_a_share_of_the_positions(tiny, monkeypatch):
    """Of a model that keeps little, all of them."""
    item = encoded(tiny, PROMPT, PAIRS["different"])
    length = PromptFunction(tiny, item, [1.0, -1.0], 1).captured.embeds.shape[1]
    rows = [PromptFunction(tiny, item, [1.0, -1.0], 25 * length).rows]
    monkeypatch.setattr(replay_module, "GRADIENT_BYTES", 0)
    rows.append(PromptFunction(tiny, item, [1.0, -1.0], 25 * length).rows)
    assert rows == [25, 5]


def direct_gradient(lm, item, prompts, weights=(1.0, -1.0)):
    prompts = prompts.clone().requires_grad_()
    return torch.autograd.grad(objective(lm, item, weights)(prompts).sum(), prompts)[0]


@pytest.mark.parametrize("pair", PAIRS)
def test_vanilla_is_gradient_times_input(tiny, pair):
    item = encoded(tiny, PROMPT, PAIRS[pair])
    (found,) = attribute(
        tiny, item, AttributionSettings(grad_method="vanilla"), MAX_TOKENS, generator()
    )
    prompt = embeds(tiny, PROMPT)
    expected = (direct_gradient(tiny, item, prompt) * prompt).sum(-1)
    assert relative(found.scores, expected) <= 1e-4
    assert found.points == 1 and math.isnan(found.difference)


@pytest.mark.parametrize("kind", ["contrastive", "normal"])
def test_smoothgrad_is_the_mean_gradient_under_noise_times_input(family, kind):
    """Of each response's own objective, with noise as wide as its setting says."""
    item = encoded(family, PROMPT, PAIRS["common beginning"])
    settings = AttributionSettings(kind, "smoothgrad", smooth_samples=9, smooth_noise=0.3)
    found = attribute(family, item, settings, MAX_TOKENS, generator(5))
    prompt, noise = embeds(family, PROMPT), generator(5)
    terms = [(1.0, -1.0)] if kind == "contrastive" else [(1.0, 0.0), (0.0, 1.0)]
    for result, weights in zip(found, terms, strict=True):
        shape = (9, *prompt.shape)
        noisy = prompt + 0.3 * prompt.std() * torch.randn(shape, generator=noise)
        gradient = direct_gradient(family, item, noisy, weights).mean(0)
        assert relative(result.scores, (gradient * prompt).sum(-1)) <= 1e-4
        assert result.points == 9


def test_smoothgrad_takes_its_noise_from_the_generator(family):
    item = encoded(family, PROMPT, PAIRS["different"])
    settings = AttributionSettings(grad_method="smoothgrad", smooth_samples=4)
    one, same, other = (
        attribute(family, item, settings, MAX_TOKENS, generator(seed))[0].scores
        for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same) and not np.allclose(one, other, rtol=1e-3)


@pytest.mark.parametrize("kind", BASELINES)
def test_baselines(family, kind):
    assert relative(text_baseline(family, kind) + 1, baseline_embedding(family, kind) + 1) <= 1e-6


def test_the_adaptive_rule_keeps_its_budget(family):
    item = encoded(family, PROMPT, PAIRS["different"])
    settings = AttributionSettings("normal", tolerance=1e-6, max_points=12)
    found = attribute(family, item, settings, MAX_TOKENS, generator())
    assert [9 <= result.points <= 12 for result in found] == [True, True]


def test_no_weight_gets_a_gradient(family):
    item = encoded(family, PROMPT, PAIRS["different"])
    attribute(family, item, AttributionSettings(ig_steps=2), MAX_TOKENS, generator())
    assert all(
        weight.grad is None and not weight.requires_grad for weight in family.model.parameters()
    )


def test_shared_words_are_scored_once_and_belong_to_both():
    sequences = [[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7]]
    terms = targets(pack(sequences), 2, [[7, 8], [7, 9], [7]])
    assert list(zip(terms.nodes.tolist(), terms.tokens.tolist(), strict=True)) == [
        (1, 7),
        (2, 8),
        (2, 9),
    ]
    assert terms.member.tolist() == [[1, 1, 0], [1, 0, 1], [1, 0, 0]]


# -- the adaptive rule on functions whose integrals are known --


class Known:
    """f(x) = sum_i g_i(x_i) of P positions of one dimension, moved from 0 to 1."""

    rows = 3
    prompt = torch.ones(3, 1, dtype=torch.float64)
    steep = torch.tensor([400.0, -1.0, 60.0], dtype=torch.float64)
    place = torch.tensor([0.31, 0.5, 0.77], dtype=torch.float64)

    def __init__(self):
        self.asked = []

    def parts(self, prompts):
        return torch.tanh(self.steep * (prompts[..., 0] - self.place))

    def values_and_grads(self, prompts):
        assert len(prompts) <= self.rows
        self.asked += prompts[:, 0, 0].tolist()
        prompts = prompts.detach().requires_grad_()
        values = self.parts(prompts).sum(-1)
        return values.detach(), torch.autograd.grad(values.sum(), prompts)[0]

    def values(self, prompts):
        return self.parts(prompts).sum(-1)

    def path(self):
        return StraightPath(self, torch.zeros_like(self.prompt))

    def expected(self):
        return (self.parts(self.prompt) - self.parts(torch.zeros_like(self.prompt))).numpy()


@pytest.mark.parametrize("tolerance", [0.2, 0.02, 1e-4])
def test_adaptive_refines_until_complete_and_no_point_is_computed_twice(tolerance):
    known = Known()
    found = adaptive_simpson(known.path(), tolerance, 10_000)
    assert found.relative_error <= tolerance
    assert found.difference == pytest.approx(known.expected().sum())
    assert len(known.asked) == len(set(known.asked)) == found.points
    if tolerance <= 0.02:
        assert found.points > 9
    if tolerance == 1e-4:
        assert found.scores == pytest.approx(known.expected(), abs=5e-3)


def test_adaptive_beats_the_fixed_rule_on_a_step():
    fixed = gauss_legendre(Known().path(), 60)
    refined = adaptive_simpson(Known().path(), 1e-3, 60)
    assert refined.points <= 60
    assert refined.completeness_error < 0.1 * fixed.completeness_error


def test_adaptive_is_exact_at_once_for_a_cubic():
    class Cubic(Known):
        def parts(self, prompts):
            return prompts[..., 0] ** 3 * self.place

    known = Cubic()
    found = adaptive_simpson(known.path(), 1e-6, 200)
    assert found.points == 9
    assert found.scores == pytest.approx(known.expected())


@pytest.mark.parametrize(("noise", "points"), [(0.3, 40), (10.0, 9)])
def test_a_cell_that_rounding_may_make_wrong_is_not_halved(noise, points):
    class Rounded(StraightPath):
        def ends(self):
            return super().ends()[0], 0.0, noise

    known = Known()
    path = Rounded(known, torch.zeros_like(known.prompt))
    found = adaptive_simpson(path, 1e-9, 10_000)
    assert found.points <= points
    if noise < 1:  # the steps are 2 high
        assert found.scores == pytest.approx(known.expected(), abs=2 * noise)


@pytest.mark.parametrize("max_points", [9, 10, 11, 20, 57])
def test_adaptive_never_spends_more_than_its_points(max_points):
    known = Known()
    found = adaptive_simpson(known.path(), 1e-12, max_points)
    assert found.points == len(known.asked) <= max_points
    if max_points >= 20:
        assert found.points >= max_points - 8


@pytest.mark.parametrize("max_points", [1, 5, 8])
def test_a_budget_below_the_first_cells_is_kept_or_refused(max_points):
    known = Known()
    try:
        adaptive_simpson(known.path(), 1e-12, max_points)
    except (ValueError, UserError):
        assert not known.asked
    else:
        assert len(known.asked) <= max_points


def test_gauss_legendre_on_known_polynomials():
    class Power(Known):
        def parts(self, prompts):
            return prompts[..., 0] ** torch.tensor([1.0, 3.0, 8.0])

    exact = gauss_legendre(Power().path(), 4)  # degree 7 is the derivative's
    assert exact.scores == pytest.approx([1, 1, 1])
    assert exact.completeness_error == pytest.approx(0, abs=1e-6)
    rough = gauss_legendre(Power().path(), 2)
    assert rough.scores[:2] == pytest.approx([1, 1])
    assert rough.completeness_error == pytest.approx(1 - rough.scores[2]) != 0


def test_a_path_keeps_its_points():
    known = Known()
    path = known.path()
    path.compute([0.5, 0.25, 0.5, 1.0])
    path.compute([0.25, 0.75])
    assert known.asked == [0.5, 0.25, 1.0, 0.75]
    assert path.value(0.25) == pytest.approx(known.parts(known.prompt * 0.25).sum().item())


# -- SmolLM2 --

SHORT = example("Is it?", "Yes", "No")  # a path that few points integrate
ALIKE = example("Is it?", "No idea", "No")  # answers that begin alike


@pytest.mark.parametrize(
    ("kind", "scope", "style"), [("zeros", "all", "qa"), ("mean", "content", "chat")]
)
def test_smollm2_gauss_legendre_is_captums(smollm2, kind, scope, style):
    question = prompts.encode(smollm2, ALIKE, style)
    settings = AttributionSettings(baseline=kind, attribute=scope, ig_steps=2)
    (found,) = attribute(smollm2, question, settings, 128, generator())
    assert relative(found.scores, captum_scores(smollm2, question, kind, scope, 2)) <= 1e-3


def test_smollm2_vanilla_and_completeness(smollm2):
    question = prompts.encode(smollm2, ALIKE, "instruct")
    (found,) = attribute(
        smollm2, question, AttributionSettings(grad_method="vanilla"), 128, generator()
    )
    prompt = embeds(smollm2, question.prompt_ids)
    expected = (direct_gradient(smollm2, question, prompt) * prompt).sum(-1)
    assert relative(found.scores, expected) <= 1e-4


def test_smollm2_adaptive_converges_to_many_points(smollm2):
    question = prompts.encode(smollm2, SHORT, "qa")
    start = start_of_path(smollm2, question, "mean", "content")
    function = PromptFunction(smollm2, question, [1.0, -1.0], 256)
    compute, asked = function.values_and_grads, []

    def counted(inputs):
        asked.extend(row.numpy().tobytes() for row in inputs)
        return compute(inputs)

    function.values_and_grads = counted
    found = adaptive_simpson(StraightPath(function, start), 0.02, 150)
    assert 9 < found.points == len(asked) == len(set(asked)) <= 150
    assert found.relative_error <= 0.02
    many = gauss_legendre(StraightPath(function, start), 24)
    assert many.relative_error <= 0.02
    norms = np.linalg.norm(found.scores) * np.linalg.norm(many.scores)
    cosine = found.scores @ many.scores / norms
    print(
        f"{found.points} points, error {found.relative_error:.2%}, cosine {cosine:.4f}; "
        f"24 points, error {many.relative_error:.2%}"
    )
    assert cosine >= 0.98
    f = objective(smollm2, question)
    with torch.no_grad():
        difference = f(embeds(smollm2, question.prompt_ids)) - f(start)
    assert found.difference == pytest.approx(difference.item(), abs=1e-3)


def test_a_path_from_zeros_everywhere_has_finite_scores(smollm2):
    """There the slope of the first point overflows; the rest of the path is still integrated."""
    item = prompts.encode(smollm2, SHORT, "qa")
    settings = AttributionSettings(baseline="zeros", attribute="all", max_points=17)
    (found,) = attribute(smollm2, item, settings, MAX_TOKENS, generator())
    assert np.isfinite(found.scores).all() and np.isfinite(found.difference)
    assert found.scores.any() and 9 < found.points <= 17


@pytest.mark.slow
def test_in_bfloat16_the_rule_stops_at_the_rounding_noise(tokenizer):
    """f(x) - f(b) of the rounded model in fp32 lies within the noise, which fp32 has none of."""
    settings = AttributionSettings(tolerance=1e-6, max_points=400)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", seed=1).to(torch.bfloat16).to(dtype)
        lm = models.wrap("tiny-llama", model, tokenizer)
        item = encoded(lm, PROMPT, PAIRS["different"], CONTENT)
        (results[dtype],) = attribute(lm, item, settings, MAX_TOKENS, generator())
    exact, rounded = results[torch.float32], results[torch.bfloat16]
    assert exact.noise == 0 < rounded.noise
    assert abs(rounded.difference - exact.difference) <= 2 * rounded.noise
    # It may stop where no cell misses by more than rounding makes of a difference of two points.
    between_points = rounded.noise * (NOISE_REPEATS + 1) ** 0.5
    assert rounded.completeness_error <= between_points and rounded.points < 400
