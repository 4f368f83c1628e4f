"""LoRA against peft's own model, trained and run on separate sequences, and merged by hand."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import vlm_models
from helpers.lora import MODULES, RANK, merged, random_adapter
from helpers.reference import embeds, encoded, example, log_likelihood, own_logits, relative, words
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from grains import models, prompts
from grains.errors import UserError
from grains.runs import write_tensors
from grains.scoring import score
from grains.settings import LORA_OBJECTIVES
from grains.study import lora

pytestmark = pytest.mark.slow

W = words(80, seed=5)
PAIRS = [
    (W[:11], [W[20:24], W[30:33]]),
    (W[40:43], [W[20:22], W[20:23]]),
    (W[44:46], [W[24:36], W[24:30] + W[60:66]]),
    (W[46:53], [W[60:61], W[70:75]]),
    (W[53:60], [W[62:66], W[21:22]]),
]


def encode_all(lm, pairs=PAIRS):
    return [encoded(lm, prompt, responses) for prompt, responses in pairs]


def peft_model(lm, adapter, rank=RANK):
    """peft's own wrapper around a copy of the model, the adapter loaded."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[name for names in MODULES.values() for name in names],
    )
    tuned = get_peft_model(copy.deepcopy(lm.model), config)
    result = set_peft_model_state_dict(
        tuned, {f"base_model.model.model.layers.{name}": tensor for name, tensor in adapter.items()}
    )
    assert not result.unexpected_keys
    return tuned


def own_values(model, items):
    """(n, C) log-likelihoods, every response a sequence of its own, differentiable."""
    lm = SimpleNamespace(model=model)
    return torch.stack(
        [
            torch.stack(
                [
                    log_likelihood(lm, embeds(lm, item.prompt_ids), response)
                    for response in item.responses
                ]
            )
            for item in items
        ]
    )


def by_hand(objective, values, reference, items):
    """The mean loss from (n, 2) log-likelihoods."""
    if objective == "sft":
        return sum(
            -row[0] / len(item.responses[0]) for row, item in zip(values, items, strict=True)
        ) / len(items)
    losses = []
    for (chosen, rejected), (base_chosen, base_rejected) in zip(values, reference, strict=True):
        reward = 0.1 * ((chosen - base_chosen) - (rejected - base_rejected))
        losses.append(torch.log(1 + torch.exp(-reward)))
    return sum(losses) / len(losses)


def state(lm):
    """All that must be as before: modules, their hooks, weights, flags."""
    return (
        [
            (
                name,
                id(module),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                "forward" in vars(module),
                hasattr(module, "peft_config"),
            )
            for name, module in lm.model.named_modules()
        ],
        {
            name: (id(tensor), tensor.requires_grad, tensor.detach().clone())
            for name, tensor in lm.model.named_parameters()
        },
    )


def same_state(lm, before):
    modules, tensors = state(lm)
    return (
        modules == before[0]
        and tensors.keys() == before[1].keys()
        and all(tensor.grad is None for tensor in lm.model.parameters())
        and all(
            now[:2] == then[:2] and torch.equal(now[2], then[2])
            for now, then in zip(tensors.values(), before[1].values(), strict=True)
        )
    )


@pytest.fixture
def lm(make_tiny):
    return make_tiny("llama")


# -- an adapter in place --


def test_scale_one_is_pefts_own_model(tiny):
    adapter = random_adapter(tiny)
    tuned = peft_model(tiny, adapter)
    base = own_logits(tiny, W[:20])
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([W[:20]])).logits[0]
    with lora.adapted(tiny, adapter):
        found = own_logits(tiny, W[:20])
    assert relative(found, expected) <= 1e-6
    assert relative(base, expected) > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_scores_and_generation_are_those_of_merged_weights(family, scale):
    adapter = random_adapter(family)
    model = merged(family, adapter, scale)
    items = encode_all(family)
    with torch.no_grad():
        expected = own_values(model, items)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 2}
    ids = torch.tensor([W[:9]])
    with lora.adapted(family, adapter) as set_scale:
        set_scale(7.0)
        set_scale(scale)
        found = torch.tensor(np.concatenate(score(family, items, [], 10_000)))
        written = family.model.generate(ids, **options)
    assert relative(found, expected) <= 1e-5
    assert torch.equal(written, model.generate(ids, **options))


def test_scale_zero_is_the_model_without(family):
    items = encode_all(family)
    before = score(family, items, [], 10_000)
    with lora.adapted(family, random_adapter(family)) as set_scale:
        set_scale(0.0)
        found = score(family, items, [], 10_000)
    assert all(np.array_equal(one, other) for one, other in zip(found, before, strict=True))


def test_an_adapter_of_another_model_is_refused(lm, make_tiny):
    before = state(lm)
    for other in (make_tiny("llama", hidden_size=32), make_tiny("llama", num_hidden_layers=2)):
        with (
            pytest.raises(UserError, match="of another model than tiny-llama"),
            lora.adapted(lm, random_adapter(other)),
        ):
            pass
    for adapter in ({}, {"vectors": torch.ones(4, 48)}):
        with pytest.raises(UserError, match="no LoRA adapter"), lora.adapted(lm, adapter):
            pass
    assert same_state(lm, before)


def test_gradients_are_of_the_prompt_alone(lm):
    """Inside, as outside, no weight asks for a gradient: attribution costs what it did."""
    with lora.adapted(lm, random_adapter(lm)):
        assert not any(tensor.requires_grad for tensor in lm.model.parameters())


# -- training --


def test_losses_are_those_of_the_models_own_logits(tiny):
    items = encode_all(tiny)
    with torch.no_grad():
        reference = own_values(tiny.model, items)
        found_reference = lora.log_likelihoods(tiny, items)
        with lora.adapted(tiny, random_adapter(tiny)):
            values, found = own_values(tiny.model, items), lora.log_likelihoods(tiny, items)
    assert relative(found, values) <= 1e-5
    losses = lora.dpo_losses(found, found_reference)
    assert losses.mean() == pytest.approx(by_hand("dpo", values, reference, items), rel=1e-4)
    assert (losses - np.log(2)).abs().max() > 0.1


def pefts_own_training(lm, start, objective, items, rate, steps):
    """A few full steps of AdamW on peft's model, from an adapter: the adapter and the losses."""
    tuned = peft_model(lm, start)
    with torch.no_grad(), tuned.disable_adapter():
        reference = own_values(tuned, items)
    parameters = [tensor for tensor in tuned.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = by_hand(objective, own_values(tuned, items), reference, items)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = get_peft_model_state_dict(tuned)
    return {
        name.removeprefix("base_model.model.model.layers."): tensor.detach()
        for name, tensor in trained.items()
    }, losses


def moved(adapter, start):
    return torch.cat([(adapter[name] - start[name]).flatten() for name in start])


@pytest.mark.parametrize("objective", LORA_OBJECTIVES)
def test_training_is_pefts_own_on_separate_sequences(family, objective):
    """Few pairs make one step an epoch. The first leaves A as it began, for B is zero."""
    items, rate = encode_all(family, PAIRS[:3]), 1e-3
    first, third = (
        lora.train(family, items, objective, RANK, rate, epochs, seed=4) for epochs in (1, 3)
    )
    start = {
        name: tensor if ".lora_A." in name else torch.zeros_like(tensor)
        for name, tensor in first.items()
    }
    expected, losses = pefts_own_training(family, start, objective, items, rate, 3)
    assert third.keys() == expected.keys() == random_adapter(family).keys()
    # 1e-4 here; 0.01 and more with a beta of 0.12.
    assert relative(moved(third, start), moved(expected, start)) <= 5e-3
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("change", ["one pair at a time", "checkpointed"])
def test_the_size_of_micro_batches_changes_nothing(lm, change):
    items = encode_all(lm)
    expected = lora.train(lm, items, "dpo", RANK, 1e-3, 2)
    if change == "checkpointed":
        found = lora.train(replace(lm, memory=0), items, "dpo", RANK, 1e-3, 2)
    else:
        found = lora.train(lm, items, "dpo", RANK, 1e-3, 2, max_tokens=1)
    start = {name: torch.zeros_like(tensor) for name, tensor in expected.items() if "_B." in name}
    assert relative(moved(found, start), moved(expected, start)) <= 0.02


def test_the_seed_decides(lm):
    items = encode_all(lm) * 3
    random_state = torch.get_rng_state()
    one, same, other = (lora.train(lm, items, "dpo", RANK, 1e-3, 2, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_model_in_bfloat16_is_trained_in_float32(lm):
    model = copy.deepcopy(lm.model).bfloat16()
    half = models.wrap("half", model, lm.tokenizer)
    adapter = lora.train(half, encode_all(half), "dpo", RANK, 1e-4, 2)
    for tensor in adapter.values():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all()
        assert not torch.equal(tensor, tensor.bfloat16().float())


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_model_leaves_as_it_came(make_tiny, requires_grad):
    lm = make_tiny("gemma3")
    lm.model.requires_grad_(requires_grad)
    try:
        before = state(lm)
        adapter = lora.train(lm, encode_all(lm), "dpo", RANK, 1e-3, 1)
        assert same_state(lm, before)
        with lora.adapted(lm, adapter):
            assert not same_state(lm, before)
        assert same_state(lm, before)
        with pytest.raises(KeyError), lora.adapted(lm, adapter):
            raise KeyError
        assert same_state(lm, before)
        with pytest.raises(UserError, match=r"became (nan|inf).*rate than 1e\+30"):
            lora.train(lm, encode_all(lm), "dpo", RANK, 1e30, 3)
        assert same_state(lm, before)
    finally:
        lm.model.requires_grad_(False)


def test_no_pairs_are_refused(lm):
    with pytest.raises(UserError, match="needs pairs"):
        lora.train(lm, [])


def test_pictures():
    """The decoder alone is trained; the picture's features enter it as they are."""
    lm = vlm_models.make("llava-next")
    items = [
        prompts.encode(lm, vlm_models.asked(vlm_models.picture(*size)), "chat")
        for size in ((90, 30), (30, 90))
    ]
    before = state(lm)
    base = lora.log_likelihoods(lm, items)
    adapter = lora.train(lm, items, "dpo", RANK, 1e-3, 2)
    assert same_state(lm, before)
    assert all(name.split(".")[0] in "0123" for name in adapter)
    with lora.adapted(lm, adapter):
        gains = lora.log_likelihoods(lm, items) - base
    assert (gains[:, 0] > gains[:, 1]).all()


SMOLLM2 = [
    example("What is the capital of Australia?", "Canberra is", "Sydney is"),
    example("Is a tomato a fruit?", "Yes, botanically it is one", "No, never"),
]


def test_smollm2(smollm2, tmp_path):
    """DPO prefers the chosen answers more, and more so at scale 1 than at 1/2; SFT makes them
    likelier."""
    items = [prompts.encode(smollm2, item, "qa") for item in SMOLLM2]
    base = np.concatenate(score(smollm2, items, [], 2048))
    adapter = lora.train(smollm2, items, "dpo", 4, 1e-3, 1)
    lora.save(tmp_path / "dpo.safetensors", adapter, {"model": smollm2.identity()})
    adapter, _ = lora.load(tmp_path / "dpo.safetensors")
    margins, losses = [np.zeros(2)], [np.log(2)]
    for scale in (0.5, 1.0):
        with lora.adapted(smollm2, adapter) as set_scale:
            set_scale(scale)
            gains = np.concatenate(score(smollm2, items, [], 2048)) - base
        margins.append(gains[:, 0] - gains[:, 1])
        losses.append(np.log1p(np.exp(-0.1 * margins[-1])).mean())
    assert (margins[2] > margins[1]).all() and (margins[1] > margins[0]).all()
    assert losses[2] < losses[1] < losses[0]

    with lora.adapted(smollm2, lora.train(smollm2, items, "sft", 4, 1e-3, 1)):
        found = np.concatenate(score(smollm2, items, [], 2048))
    assert (found[:, 0] > base[:, 0] + 0.5).all()


# -- files --


def test_save_and_load(lm, tmp_path):
    adapter, info = random_adapter(lm), {"model": lm.identity(), "seed": 3}
    lora.save(tmp_path / "one.safetensors", adapter, info)
    found, found_info = lora.load(tmp_path / "one.safetensors")
    assert found.keys() == adapter.keys() and info.items() <= found_info.items()
    assert all(torch.equal(found[name], adapter[name]) for name in adapter)


def test_another_file_is_refused(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"vectors": torch.ones(3)}, {"stage": "vectors"})
    with pytest.raises(UserError, match="holds no LoRA adapter"):
        lora.load(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        lora.load(tmp_path / "y.safetensors")
