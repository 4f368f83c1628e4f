"""PaliGemma: the words of a prompt see each other; those of an answer see what is before them."""

from __future__ import annotations

import pytest
import torch
from helpers import picture_families, vlm_models

from grains import prompts
from grains.attribution import PromptFunction
from grains.data import Example
from grains.generation import generate
from grains.scoring import score

TEXT = Example("a", "Is glass a slow liquid?", ("No, not", "Yes"), 0)


@pytest.fixture(scope="module")
def lm():
    return picture_families.make("paligemma")


@pytest.fixture(scope="module")
def model():
    """The same model, untouched."""
    return picture_families.parts("paligemma")[0]


@pytest.fixture(params=["words", "picture"])
def item(request, lm):
    if request.param == "words":
        return prompts.encode(lm, TEXT)
    return prompts.encode(lm, vlm_models.asked(vlm_models.picture(160, 90)), "plain")


def stepwise(model, item, response: list[int], add: torch.Tensor | None = None) -> float:
    """The log-likelihood of a response by the model's own cache, a token at a time; nothing of it
    is there when the prompt is read. add: to what enters layer 0 for the prompt, (P, D)."""
    inputs = item.inputs | {"token_type_ids": torch.zeros_like(item.inputs["input_ids"])}

    def change(module, args, kwargs):
        if args[0].shape[1] == len(item.prompt_ids) and add is not None:
            return (args[0] + add, *args[1:]), kwargs
        return None

    handle = model.model.language_model.layers[0].register_forward_pre_hook(
        change, with_kwargs=True
    )
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        total = 0.0
        for token in response:
            total += output.logits[0, -1].float().log_softmax(-1)[token].item()
            output = model(
                input_ids=torch.tensor([[token]]),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    handle.remove()
    return total


def test_likelihoods_are_those_of_its_own_decoding(lm, model, item):
    assert lm.marks_prompts and lm.packs
    found = score(lm, [item], [], 2048)[0][0]
    expected = [stepwise(model, item, response) for response in item.responses]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=2e-3)


def test_values_at_other_embeddings(lm, model, item):
    function = PromptFunction(lm, item, [1.0, -1.0], 2048)
    shift = 0.3 * torch.randn(function.prompt.shape, generator=torch.Generator().manual_seed(0))
    found = function.values((function.prompt + shift)[None]).item()
    plus, minus = (stepwise(model, item, response, shift) for response in item.responses[:2])
    assert found == pytest.approx(plus - minus, rel=1e-4, abs=2e-3)


def test_greedy_text_is_its_own(lm, model, item):
    (text,) = generate(lm, [item], [], 3)[0]
    own = model.generate(
        **item.inputs | {"token_type_ids": torch.zeros_like(item.inputs["input_ids"])},
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=lm.replacement_id(),
    )[0, len(item.prompt_ids) :]
    assert text == lm.tokenizer.decode(own, skip_special_tokens=True).strip()
