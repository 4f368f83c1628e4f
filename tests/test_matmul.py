"""Gradients of products in bfloat16 against rounding by hand, and what must stay as it is."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from helpers.families import tiny_model
from helpers.reference import embeds, encoded, log_likelihood, relative, words
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grains import data, manifests, models, stage1
from grains.attribution import PromptFunction, attribute
from grains.errors import UserError
from grains.matmul import rounded_gradients
from grains.names import Names
from grains.settings import AblationSettings, AttributionSettings, DataSettings

W = words(40, seed=8)
PROMPT, ANSWERS = W[:11], [W[20:24], W[20:22] + W[30:33]]
MEDIUM = {"matmul_precision": "medium"}


def generator():
    return torch.Generator().manual_seed(0)


def rounded(values):
    """fp32 numbers to the nearest with 8 bits, ties to even: bfloat16 by hand."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


class ByHand(torch.autograd.Function):
    """x W^T in fp32. Its gradient: both factors rounded, summed in fp64, the result rounded."""

    @staticmethod
    def forward(ctx, states, weight):
        ctx.weight = rounded(weight.detach().numpy()).astype(np.float64)
        return states @ weight.T

    @staticmethod
    def backward(ctx, grad):
        product = rounded(grad.numpy()).astype(np.float64) @ ctx.weight
        return torch.from_numpy(rounded(product)), None


class LinearByHand(TorchFunctionMode):
    """Linear layers with these weights have gradients by hand within the block."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {id(weight) for weight in weights}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is functional.linear and id(args[1]) in self.weights:
            states, weight, bias = (*args, None)[:3] if len(args) < 3 else args
            output = ByHand.apply(states, weight)
            return output if bias is None else output + bias
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_rounded_gradients(bias):
    torch.manual_seed(0)
    layer = nn.Linear(96, 64, bias=bias).requires_grad_(False)
    states = torch.randn(2, 30, 96, requires_grad=True)
    upstream = torch.randn(2, 30, 64)
    with rounded_gradients(layer):
        output = layer(states)
        (grad,) = torch.autograd.grad(output, states, upstream)
    assert torch.equal(output, layer(states))
    (exact,) = torch.autograd.grad(layer(states), states, upstream)
    (expected,) = torch.autograd.grad(ByHand.apply(states, layer.weight), states, upstream)
    # A sum in fp32 may lie on the other side of a boundary of rounding: few do, by a last bit.
    assert grad.dtype == torch.float32
    assert (grad == expected).float().mean() > 0.98
    torch.testing.assert_close(grad, expected, rtol=2**-7, atol=1e-6)
    assert (grad == exact).float().mean() < 0.02  # it is not what fp32 gives


@contextmanager
def by_hand(lm):
    """The model with torch's own layers, whose products are made by hand within the block."""
    model = copy.deepcopy(lm.model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = nn.Linear
    with LinearByHand(model.model.layers.parameters()):  # the head is none of them
        yield replace(lm, model=model)


# In sums of another order a number is now and then rounded to its other neighbour, which later
# layers see: half a hundredth of the gradients here, and more or less on another processor.
OTHER_ORDER = 0.02


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_models_gradients_are_those_of_its_own_forward_by_hand(family, checkpointed):
    item = encoded(family, PROMPT, ANSWERS)
    exact = PromptFunction(family, item, [1.0, -1.0], 200)
    products = partial(rounded_gradients, family.layers)
    function = PromptFunction(family, item, [1.0, -1.0], 200, products=products)
    function.checkpointed = checkpointed
    prompt = function.prompt[None].clone()
    values, grads = function.values_and_grads(prompt)
    own = prompt.clone().requires_grad_()
    with by_hand(family) as alone:
        f = log_likelihood(alone, own, ANSWERS[0]) - log_likelihood(alone, own, ANSWERS[1])
        (expected,) = torch.autograd.grad(f.sum(), own)
    exact_values, exact_grads = exact.values_and_grads(prompt)
    assert (grads - expected).norm() / expected.norm() < OTHER_ORDER
    assert (exact_grads - expected).norm() / expected.norm() > 0.003  # fp32 gives others
    assert torch.equal(values, exact_values)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_scores_are_captums_by_hand_and_their_difference_is_fp32(make_tiny, name):
    lm = make_tiny(name)
    item = encoded(lm, PROMPT, ANSWERS)
    settings = AttributionSettings(baseline="zeros", attribute="all", ig_steps=7)
    (exact,) = attribute(lm, item, settings, 200, generator())
    (found,) = attribute(lm, item, replace(settings, **MEDIUM), 200, generator())
    with by_hand(lm) as alone:
        prompt = embeds(alone, PROMPT)[None]
        expected = IntegratedGradients(
            lambda rows: (
                log_likelihood(alone, rows, ANSWERS[0]) - log_likelihood(alone, rows, ANSWERS[1])
            )
        ).attribute(prompt, n_steps=7, method="gausslegendre", internal_batch_size=7)
    assert relative(found.scores, expected[0].sum(-1)) < 4 * OTHER_ORDER  # it is steep at zero
    assert relative(found.scores, exact.scores) > 0.005
    assert found.difference == exact.difference


def test_the_adaptive_rule_sees_f_as_it_is(family):
    item = encoded(family, PROMPT, ANSWERS)
    settings = AttributionSettings(baseline="zeros", attribute="all", tolerance=1e-9, max_points=9)
    (exact,) = attribute(family, item, settings, 200, generator())
    (found,) = attribute(family, item, replace(settings, **MEDIUM), 200, generator())
    assert (found.difference, found.points) == (exact.difference, exact.points)
    assert 0 < relative(found.scores, exact.scores) < 0.05


def test_states_and_log_likelihoods_are_the_same_to_the_bit(family):
    item = encoded(family, PROMPT, ANSWERS)
    made = {}
    for precision in ("highest", "medium"):
        attribution = AttributionSettings(ig_steps=3, matmul_precision=precision)
        settings = AblationSettings(attribution, ("pos", "neg"), top_k=len(PROMPT))
        made[precision] = stage1.one_example(family, item, settings, 0, {})
    (exact, exact_rows), (medium, medium_rows) = made.values()
    assert exact.keys() == medium.keys()
    for name, tensor in exact.items():
        assert torch.equal(tensor, medium[name]), name
    same = [name for name in exact_rows[0] if name.startswith(("f", "log_likelihood"))]
    for before, after in zip(exact_rows, medium_rows, strict=True):
        assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert exact_rows[0]["attributions"] != medium_rows[0]["attributions"]


def test_the_model_leaves_the_block_as_it_came(family):
    before = [vars(module).copy() for module in family.model.modules()]
    weights = copy.deepcopy(family.model.state_dict())
    with pytest.raises(RuntimeError, match="in the block"), rounded_gradients(family.layers):
        assert [vars(module) for module in family.model.modules()] != before
        raise RuntimeError("in the block")
    assert [vars(module) for module in family.model.modules()] == before
    assert all(torch.equal(weights[name], w) for name, w in family.model.state_dict().items())


def test_weights_that_change_are_rounded_anew():
    layer = nn.Linear(8, 8, bias=False).requires_grad_(False)
    states = torch.zeros(8, 8, requires_grad=True)
    for value in (1.0, 3.0):
        layer.weight.fill_(value)
        with rounded_gradients(layer):
            (grad,) = torch.autograd.grad(layer(states), states, torch.eye(8))
        assert torch.equal(grad, torch.full((8, 8), value))


def test_layers_in_training_keep_their_gradients():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    states = torch.randn(5, 8)
    with rounded_gradients(layer):
        (grad,) = torch.autograd.grad(layer(states).square().sum(), layer.weight)
    torch.testing.assert_close(grad, 2 * layer(states).detach().T @ states)


@pytest.mark.parametrize(
    ("dtype", "precision", "message"),
    [
        (
            torch.bfloat16,
            "medium",
            "matmul_precision medium is for weights in float32: .* bfloat16",
        ),
        (torch.float32, "high", "unknown matmul_precision 'high': expected highest or medium"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer, dtype, precision, message):
    lm = models.wrap("tiny", tiny_model("llama").to(dtype), tokenizer)
    settings = AttributionSettings(matmul_precision=precision)
    with pytest.raises(UserError, match=message):
        attribute(lm, encoded(lm, PROMPT, ANSWERS), settings, 200, generator())


def test_manifests_and_names_hold_it_where_it_is_not_the_default(family):
    source = DataSettings("mine", "mine.jsonl")
    examples = [data.Example("1", "Is it?", ("Yes", "No"), 0)]
    default, medium = AblationSettings(), AblationSettings(AttributionSettings(**MEDIUM))
    settings = [
        manifests.stage1(family, examples, source, each, {})["settings"]
        for each in (default, medium)
    ]
    assert "matmul_precision" not in settings[0]
    assert settings[1] == settings[0] | {"matmul_precision": "medium"}
    names = [
        Names("llm", "m", source, each, "train").attributions().name for each in (default, medium)
    ]
    assert "matmul-medium" in names[1] and "matmul" not in names[0]
