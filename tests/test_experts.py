"""Integrated Gradients of mixtures of experts whose choice is fixed along the path."""

from __future__ import annotations

import pytest
import torch
import zoo
from helpers import tiny
from torch.nn import functional

from grains import models, prompts
from grains.attribution import PromptFunction, attribute
from grains.data import Example
from grains.errors import UserError
from grains.settings import AttributionSettings

PAIR = Example("a", "Is glass a slow liquid?", ("No, it is not", "No, glass is solid"), 0)


class FixedRouter(torch.nn.Module):
    """Mixtral's router, written anew, that notes the experts it chooses and keeps them."""

    def __init__(self, router):
        super().__init__()
        self.weight, self.k, self.kept = router.weight, router.top_k, None

    def forward(self, states):
        scores = functional.linear(states.reshape(-1, states.shape[-1]), self.weight)
        shares = scores.softmax(-1)
        if self.kept is None:
            self.kept = shares.argsort(-1, descending=True)[:, : self.k]
        chosen = torch.stack([row[index] for row, index in zip(shares, self.kept, strict=True)])
        return scores, chosen / chosen.sum(-1, keepdim=True), self.kept


def reference(item, prompt: torch.Tensor) -> tuple[float, torch.Tensor]:
    """f and its gradient at embeddings (P, D), each answer in a forward of its own, by a model
    whose routers keep what they choose for the prompt as it is."""
    value, gradient = 0.0, torch.zeros_like(prompt)
    for sign, response in zip((1, -1), item.responses, strict=True):
        model = zoo.make("mixtral").requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.gate = FixedRouter(layer.mlp.gate)
        ids = torch.tensor([item.prompt_ids + response])
        model(input_ids=ids)
        moving = prompt.clone().requires_grad_()
        behind = model.get_input_embeddings()(ids[0, len(prompt) :])
        logits = model(inputs_embeds=torch.cat([moving, behind])[None]).logits[0]
        log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        own = sign * log_probs.gather(-1, torch.tensor(response)[:, None]).sum()
        gradient += torch.autograd.grad(own, moving)[0]
        value += own.item()
    return value, gradient


@pytest.fixture(scope="module")
def lm():
    return models.wrap("mixtral", zoo.make("mixtral"), tiny.byte_tokenizer())


@pytest.fixture(scope="module")
def item(lm):
    return prompts.encode(lm, PAIR)


@pytest.mark.parametrize("first", [0, 5], ids=["whole", "prefix"])
def test_the_choice_is_that_of_the_prompt(lm, item, first):
    fixed = PromptFunction(lm, item, [1.0, -1.0], 2048, first, fixed_experts=True)
    free = PromptFunction(lm, item, [1.0, -1.0], 2048, first)
    generator = torch.Generator().manual_seed(0)
    points = fixed.prompt * torch.tensor([1.0, 0.4, -0.5])[:, None, None]
    points[1:] += 0.3 * torch.randn(points[1:].shape, generator=generator)
    points[:, :first] = fixed.prompt[:first]
    values, gradients = fixed.values_and_grads(points)
    for point, value, gradient in zip(points, values.tolist(), gradients, strict=True):
        expected, by_prompt = reference(item, point)
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-3)
        by_prompt[:first] = 0
        # Weights this large multiply the rounding of sums in another order.
        assert (gradient - by_prompt).norm() < 5e-3 * by_prompt.norm()
    ordinary = free.values(points).tolist()
    assert values[0] == pytest.approx(ordinary[0], abs=1e-3)  # the prompt itself
    assert max(abs(values[1:] - torch.tensor(ordinary[1:]))) > 0.1  # other experts elsewhere


def test_its_path_is_complete(lm):
    blind = prompts.encode(lm, Example("b", "Are bats blind?", ("No, they can see", "Yes"), 0))
    found = {}
    for experts in (None, "fixed"):
        settings = AttributionSettings(experts=experts)
        (found[experts],) = attribute(lm, blind, settings, 2048, torch.Generator())
    assert found["fixed"].relative_error <= 0.05 and found["fixed"].points < 200
    assert found[None].relative_error > 0.3


@pytest.mark.parametrize("name", ["granitemoehybrid", "llama"])
def test_a_model_without_experts_is_refused(name):
    lm = models.wrap(name, zoo.make(name), tiny.byte_tokenizer())
    with pytest.raises(UserError, match="no experts that could be fixed"):
        PromptFunction(lm, prompts.encode(lm, PAIR), [1.0, -1.0], 2048, fixed_experts=True)


# Deepseek's groups, gpt-oss's bias, Llama 4's single expert, Granite's own router, rows.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["deepseek_v3", "gpt_oss", "llama4_text", "granitemoe", "qwen3_moe", "qwen3_next"]
)
def test_routers_of_other_families(name):
    lm = models.wrap(name, zoo.make(name), tiny.byte_tokenizer())
    item = prompts.encode(lm, PAIR)
    function = PromptFunction(lm, item, [1.0, -1.0], 2048, fixed_experts=True)
    free = PromptFunction(lm, item, [1.0, -1.0], 2048)
    both = torch.stack([function.prompt, function.prompt])
    assert function.values(both)[1].item() == pytest.approx(free.values(both)[1].item(), abs=2e-3)
    # Along a short step through many borders the fixed function does not jump.
    far = function.prompt * 0.5
    steps = far + torch.linspace(0, 1e-3, 8)[:, None, None] * function.prompt
    slopes = function.values(steps).diff()
    assert slopes.std() <= 0.2 * slopes.abs().mean() + 2e-4
