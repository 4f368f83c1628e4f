"""Text families beside the three of conftest: each against a model of its own, loaded apart.

What is expected comes from that model's own forward, one answer at a time, with hooks of the test.
"""

from __future__ import annotations

import pytest
import torch
from helpers import tiny, zoo

from grains import models, prompts
from grains.ablation import hidden_states
from grains.attribution import PromptFunction
from grains.calls import first_tensor
from grains.data import Example
from grains.generation import generate
from grains.scoring import score
from grains.steering import Configuration

# (families that pack, families whose sequences are computed one by one)
PACKED = (
    "llama",
    "gpt_neox",
    "gptj",
    "falcon",
    "gemma2",
    "cohere2",
    "granite",
    "phi",
    "phi3",
    "llama4_text",
    "gpt_oss",
    "olmo2",
    "nanochat",
)
APART = (
    "gpt2",
    "gpt_neo",
    "opt",
    "bloom",
    "mpt",
    "qwen3_next",
    "qwen3_5_text",
    "gemma4_text",
    "granitemoehybrid",
    "lfm2",
    "minimax",
    "mamba2",
)
OWN_END = ("gemma2", "cohere2", "granite", "nanochat")
OWN_EMBEDDINGS = ("gpt2", "gpt_neo", "opt", "bloom", "granite", "nanochat")
ASKED = [
    Example("a", "Is glass a slow liquid, as old windows are said to show?", ("No, not", "Yes"), 0),
    Example("b", "Are bats blind?", ("No, they can see", "No, they", "All of them are"), 2),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.byte_tokenizer()


@pytest.fixture(scope="module", params=[*PACKED, *APART])
def family(request, tokenizer):
    """The family's name, a model as it is loaded here, and the same model untouched."""
    name = request.param
    return name, models.wrap(name, zoo.make(name), tokenizer), zoo.make(name)


def layers_of(model):
    """The only list of four modules that a tiny model has at its top."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)


def own_log_likelihood(model, prompt, response, added=None, layer=None):
    """sum log P(response | prompt) by the model's own forward; `added` steers a layer's output."""

    def steer(module, args, output):
        states = first_tensor(output)
        moved = states + added
        moved = moved * states.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = layers_of(model)[layer].register_forward_hook(steer) if added is not None else None
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    finally:
        if handle:
            handle.remove()
    log_probs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(-1, torch.tensor(response)[:, None]).sum().item()


def encode(lm):
    return [prompts.encode(lm, example) for example in ASKED]


def test_how_it_is_replayed(family):
    name, lm, _ = family
    assert lm.packs == (name in PACKED)
    assert lm.batches == (name != "bloom")
    assert lm.own_end == (name in OWN_END)
    assert lm.own_embeddings == (name in OWN_EMBEDDINGS)


def test_scores_base_and_steered(family):
    name, lm, model = family
    items = encode(lm)
    added = {
        layer: torch.randn(48, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)
    }
    grid = [Configuration("x", "", (layer,), 1.0, {layer: v}) for layer, v in added.items()]
    found = score(lm, items, grid, 2048)
    for item, scores in zip(items, found, strict=True):
        for column, response in enumerate(item.responses):
            expected = [own_log_likelihood(model, item.prompt_ids, response)]
            expected += [
                own_log_likelihood(model, item.prompt_ids, response, vector, layer)
                for layer, vector in added.items()
            ]
            assert scores[:, column] == pytest.approx(expected, abs=2e-3), name
        assert abs(scores[1] - scores[0]).max() > 0.01


def test_gradients_are_those_of_the_own_forward(family):
    """Of f by the embeddings that enter layer 0, taken by a hook of the test."""
    name, lm, model = family
    item = encode(lm)[0]
    function = PromptFunction(lm, item, [1.0, -1.0], 2048)
    values, grads = function.values_and_grads(function.prompt[None])
    layers = layers_of(model)
    expected, total = torch.zeros_like(grads[0]), 0.0
    for sign, response in zip((1, -1), item.responses, strict=True):
        entering = []

        def keep(module, args, kwargs, entering=entering):
            states = args[0].detach().requires_grad_()
            entering.append(states)
            return (states, *args[1:]), kwargs

        handle = layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        logits = model(input_ids=torch.tensor([item.prompt_ids + response]), use_cache=False).logits
        handle.remove()
        log_probs = logits[0].float().log_softmax(-1)[len(item.prompt_ids) - 1 : -1]
        value = sign * log_probs.gather(-1, torch.tensor(response)[:, None]).sum()
        (gradient,) = torch.autograd.grad(value, entering[0])
        expected += gradient[0, : len(item.prompt_ids)]
        total += value.item()
    assert values.item() == pytest.approx(total, abs=1e-3)
    assert (grads[0] - expected).norm() <= 2e-3 * expected.norm(), name


def test_hidden_states_with_a_word_ablated(family):
    name, lm, model = family
    item = encode(lm)[1]
    pair = prompts.encode(lm, ASKED[1].pair())
    states = hidden_states(lm, pair, [[4]], 2048)
    layers = layers_of(model)
    for column, response in enumerate(pair.responses):
        read = []
        handles = [
            layer.register_forward_hook(
                lambda module, args, output, read=read: read.append(first_tensor(output)[0, -1])
            )
            for layer in layers
        ]
        with torch.no_grad():
            model(input_ids=torch.tensor([pair.prompt_ids + response]), use_cache=False)
        for handle in handles:
            handle.remove()
        plain = states.last[0, column, 1:]
        assert (plain - torch.stack(read)).norm() <= 1e-3 * torch.stack(read).norm(), name
        assert (states.last[1, column, 1:] - plain).norm() > 1e-3 * plain.norm()
    assert item.prompt_ids == pair.prompt_ids


def test_an_ablated_word_is_what_the_model_makes_of_the_pad_token(family):
    """Its embedding with scales, norms and positions: the own forward of the prompt with it."""
    name, lm, model = family
    pair = prompts.encode(lm, ASKED[0].pair())
    states = hidden_states(lm, pair, [[3, 7]], 2048)
    ids = list(pair.prompt_ids)
    ids[3] = ids[7] = lm.replacement_id("pad")
    if "gemma4" in name:
        pytest.skip("its layers also take embeddings of the token ids, which stay")
    found = states.log_likelihoods[1].tolist()
    expected = [own_log_likelihood(model, ids, response) for response in pair.responses]
    assert found == pytest.approx(expected, abs=2e-3), name


def test_generation_steered_in_a_batch(family):
    name, lm, model = family
    items = encode(lm)
    vector = torch.randn(48, generator=torch.Generator().manual_seed(5))
    item = Configuration("x", "", (2,), 1.0, {2: vector})
    texts = generate(lm, items, [item], 5)
    for row, added in enumerate((None, vector)):
        for item, text in zip(items, texts[row], strict=True):
            ids = list(item.prompt_ids)
            for _ in range(5):
                scores = [own_next(model, ids, added)]
                ids.append(int(scores[0].argmax()))
                if ids[-1] == lm.tokenizer.eos_token_id:
                    break
            expected = lm.tokenizer.decode(ids[len(item.prompt_ids) :], skip_special_tokens=True)
            assert text == expected.strip(), name


def own_next(model, ids, added):
    def steer(module, args, output):
        states = first_tensor(output)
        moved = states + added
        moved = moved * states.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    layers = layers_of(model)
    handle = layers[2].register_forward_hook(steer) if added is not None else None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    if handle:
        handle.remove()
    return logits
