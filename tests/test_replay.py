"""A replay of the decoder's layers is the model's own forward: values, gradients, batches."""

import dataclasses
import gc
import math

import pytest
import torch
from helpers.families import SIZES, SLIDING_WINDOW, randomise, tiny_config
from helpers.reference import embeds, encoded, layer_outputs, no_hooks, own_logits, relative, words
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from grains import logprobs, models, replay, selfcheck
from grains.errors import UserError
from grains.lm import LogitShape
from grains.logprobs import logits, token_log_probs
from grains.packing import pack
from grains.replay import capture, capture_pack, collate, extend

W = words(60)
LONG = W[: 2 * SLIDING_WINDOW]
SHORT = W[:3]
# (prompt, responses): every way in which answers can lie behind their prompt.
TRIES = {
    "two answers": (LONG, [W[20:25], W[30:33]]),
    "common beginning": (LONG, [W[20:24], W[20:22] + W[30:33]]),
    "one a prefix of the other": (LONG, [W[20:23], W[20:26]]),
    "the longer one first": (LONG, [W[20:26], W[20:23]]),
    "identical": (LONG, [W[20:23], W[20:23]]),
    "answers longer than the window": (LONG, [W[20:32], W[40:51], W[20:28] + W[52:55]]),
    "packed longer than the window": (SHORT, [W[20:23], W[30:33], W[40:43], W[20:22] + W[50:51]]),
    "all within the window": (SHORT, [W[20:22], W[30:32]]),
    "repeated words": (LONG[:4] * 3, [LONG[:4] + W[20:21], LONG[:4], LONG[1:4]]),
    "alone": (LONG, [W[20:25]]),
    "a prompt of one token": (W[:1], [W[20:31], W[30:33]]),
}


def inputs(ids):
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}


def capture_trie(lm, prompt, responses):
    packed = pack([prompt + response for response in responses])
    return packed, capture_pack(lm, inputs(prompt), packed)


def difference(found, expected):
    return (found - expected).abs().max().item()


@pytest.mark.parametrize("length", [3, SLIDING_WINDOW, 3 * SLIDING_WINDOW])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4])
def test_a_replay_from_any_layer_is_the_models_own_forward(tiny, start, length):
    with layer_outputs(tiny) as states:
        expected = own_logits(tiny, W[:length])
    captured = capture(tiny, inputs(W[:length]))
    assert torch.equal(captured.embeds, states[0])
    with torch.no_grad():
        final = replay.replay(tiny, states[start], captured.calls, start=start)
    assert difference(final, states[-1]) <= 1e-5
    assert difference(logits(tiny, final)[0], expected) <= 1e-4


def test_capturing_computes_no_logits(tiny, monkeypatch):
    shapes, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(
        "torch.nn.functional.linear",
        lambda states, weight, bias=None: (
            shapes.append(tuple(weight.shape)),
            linear(states, weight, bias),
        )[1],
    )
    capture(tiny, inputs(SHORT))
    assert not shapes
    own_logits(tiny, SHORT)
    assert tuple(tiny.head.weight.shape) in shapes


@pytest.mark.parametrize("case", TRIES)
def test_packed_answers_are_separate_sequences(tiny, case):
    prompt, responses = TRIES[case]
    packed, captured = capture_trie(tiny, prompt, responses)
    with torch.no_grad():
        found = logits(tiny, replay.replay(tiny, captured.embeds, captured.calls))[0]
    for path, response in zip(packed.paths, responses, strict=True):
        expected = own_logits(tiny, prompt + response)
        assert difference(found[path], expected) <= 1e-4


def test_a_batch_of_tries_is_every_sequence_alone_with_gradients(tiny):
    """Different lengths in one batch, two rows a sequence: logits, and gradients by autograd."""
    tries = [capture_trie(tiny, *TRIES[case]) for case in TRIES]
    batch = collate([captured for _, captured in tries])
    assert batch.lengths.tolist() == [len(packed) for packed, _ in tries]
    index = torch.arange(len(tries)).repeat(2)
    states = batch.embeds[index].clone().requires_grad_()
    found = tiny.norm(replay.replay(tiny, states, batch.calls.rows(index)))
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(len(index), SIZES["hidden_size"], generator=generator)
    total = sum(
        (found[row, path] @ weights[row]).tanh().sum() * order
        for row, item in enumerate(index)
        for order, path in enumerate(tries[item][0].paths, start=1)
    )
    (gradients,) = torch.autograd.grad(total, states)

    decoder = tiny.model.get_decoder()
    for number, (packed, _) in enumerate(tries):
        own = embeds(tiny, packed.tokens.tolist()).requires_grad_()
        states = [
            decoder(inputs_embeds=own[path][None], use_cache=False)[0][0] for path in packed.paths
        ]
        expected_logits = own_logits(tiny, packed.tokens[packed.paths[-1]].tolist())[-1]
        for row in (number, len(tries) + number):
            expected = torch.zeros(())
            for order, (path, normed) in enumerate(zip(packed.paths, states, strict=True), start=1):
                assert difference(found[row, path], normed) <= 1e-4
                expected = expected + (normed @ weights[row]).tanh().sum() * order
            (gradient,) = torch.autograd.grad(expected, own, retain_graph=True)
            assert relative(gradients[row, : len(own)], gradient) <= 1e-4
            assert not gradients[row, len(own) :].any()
            with torch.no_grad():
                last = tiny.head(found[row, packed.paths[-1][-1]])
                assert difference(last, expected_logits) <= 1e-4


def test_padding_sees_itself_alone_and_is_seen_by_nothing(tiny):
    captures = [
        capture_trie(tiny, prompt, responses)[1]
        for prompt, responses in (TRIES["two answers"], TRIES["all within the window"])
    ]
    long, short = captures[0].embeds.shape[1], captures[1].embeds.shape[1]
    padding = torch.arange(long) >= short
    for layer, alone in zip(collate(captures).calls.layers, captures[1].calls.layers, strict=True):
        mask, own = layer["attention_mask"][1, 0], alone["attention_mask"][0, 0]
        sees = mask if mask.dtype == torch.bool else mask == 0
        assert not sees[~padding][:, padding].any() and not sees[padding][:, ~padding].any()
        assert torch.equal(sees[padding][:, padding], torch.eye(long - short).bool())
        assert torch.equal(mask[:short, :short], own)


def test_smollm2(smollm2):
    """The same on a real model: packed and batched answers, from layer 0 and from the middle."""
    texts = [
        ("Q: What is the capital of France?\nA:", [" Paris", " Paris, of course."]),
        ("Q: Why?\nA:", [" Because it is so.", " Because nobody knows."]),
    ]
    tries = []
    for prompt, answers in texts:
        tries.append(
            (
                smollm2.tokenizer(prompt).input_ids,
                [smollm2.tokenizer(answer).input_ids for answer in answers],
            )
        )
    captures = [capture_trie(smollm2, *item) for item in tries]
    batch = collate([captured for _, captured in captures])
    states = batch.embeds.clone().requires_grad_()
    middle = replay.replay(smollm2, states, batch.calls, stop=15)
    found = logits(smollm2, replay.replay(smollm2, middle, batch.calls, start=15))
    total = sum(
        found[row, path].log_softmax(-1)[:, 5000].sum()
        for row, (packed, _) in enumerate(captures)
        for path in packed.paths
    )
    (gradients,) = torch.autograd.grad(total, states)
    for row, (packed, _) in enumerate(captures):
        own = embeds(smollm2, packed.tokens.tolist()).requires_grad_()
        expected = torch.zeros(())
        for path in packed.paths:
            with layer_outputs(smollm2) as outputs:
                scores = smollm2.model(inputs_embeds=own[path][None], use_cache=False).logits[0]
            assert relative(found[row, path].detach(), scores.detach()) <= 1e-5
            assert relative(middle[row, path].detach(), outputs[15][0].detach()) <= 1e-4
            expected = expected + scores.log_softmax(-1)[:, 5000].sum()
        (gradient,) = torch.autograd.grad(expected, own)
        assert relative(gradients[row, : len(own)], gradient) <= 1e-4


def test_after_reads_and_changes_every_output(tiny):
    captured = capture(tiny, inputs(LONG))
    seen = []

    def after(layer, states):
        seen.append(layer)
        return states + 1 if layer == 2 else None

    with torch.no_grad():
        found = replay.replay(tiny, captured.embeds, captured.calls, after=after)
        middle = replay.replay(tiny, captured.embeds, captured.calls, stop=3)
        expected = replay.replay(tiny, middle + 1, captured.calls, start=3)
    assert seen == [0, 1, 2, 3]
    assert torch.equal(found, expected)


def test_pack_by_hand():
    packed = pack([[5, 6, 7, 8], [5, 6, 9], [5, 6, 7], [5, 6, 9, 8]])
    assert packed.tokens.tolist() == [5, 6, 7, 8, 9, 8]
    assert packed.depth.tolist() == [0, 1, 2, 3, 2, 3]
    assert [path.tolist() for path in packed.paths] == [
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 2],
        [0, 1, 4, 5],
    ]
    assert packed.same_path.int().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("vocabulary_slice", [1000, 4096, 10**6])
@pytest.mark.parametrize("bias", [False, True])
def test_token_log_probs_with_gradients_in_pieces(tiny, monkeypatch, vocabulary_slice, bias):
    monkeypatch.setattr(logprobs, "LOGIT_ROWS", 3)
    monkeypatch.setattr(logprobs, "VOCABULARY_SLICE", vocabulary_slice)
    generator = torch.Generator().manual_seed(0)
    if bias:  # as wide as the logits, so that the maximum rises from slice to slice
        monkeypatch.setattr(
            tiny.head,
            "bias",
            torch.nn.Parameter(
                30 * torch.randn(len(tiny.head.weight), generator=generator), requires_grad=False
            ),
        )
    states = torch.randn(8, tiny.hidden_size, generator=generator, requires_grad=True)
    tokens, weights = torch.tensor(W[:8]), torch.randn(8, generator=generator)
    found = token_log_probs(tiny, states, tokens)
    expected = tiny.head(tiny.norm(states)).log_softmax(-1)[range(8), tokens]
    assert difference(found, expected) <= 1e-4
    (gradient,) = torch.autograd.grad(found @ weights, states)
    (by_autograd,) = torch.autograd.grad(expected @ weights, states)
    # Sums in float32, in other orders on each processor: 7e-6 apart on one of them.
    assert relative(gradient, by_autograd) <= 5e-5


@pytest.mark.parametrize(("scale", "cap"), [(0.5, math.inf), (2.0, 5.0)])
def test_token_log_probs_of_scaled_and_capped_logits(make_tiny, monkeypatch, scale, cap):
    monkeypatch.setattr(logprobs, "VOCABULARY_SLICE", 1000)
    lm = dataclasses.replace(make_tiny("llama"), logit_shape=LogitShape(scale, cap))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(8, lm.hidden_size, generator=generator, requires_grad=True)
    tokens, weights = torch.tensor(W[:8]), torch.randn(8, generator=generator)
    plain = scale * lm.head(lm.norm(states))
    shaped = plain if cap == math.inf else cap * torch.tanh(plain / cap)
    assert cap == math.inf or plain.abs().max() > cap
    expected = shaped.log_softmax(-1)[range(8), tokens]
    found = token_log_probs(lm, states, tokens)
    assert difference(found, expected) <= 1e-4
    (gradient,) = torch.autograd.grad(found @ weights, states)
    (by_autograd,) = torch.autograd.grad(expected @ weights, states)
    assert relative(gradient, by_autograd) <= 1e-4  # sums in float32, in other orders


def test_extend():
    prompt = {
        "input_ids": torch.tensor([[1, 2]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "token_type_ids": torch.tensor([[1, 1]]),
        "pixel_values": torch.ones(1, 3),
    }
    longer = extend(prompt, [7, 8, 9])
    assert longer["input_ids"].tolist() == [[1, 2, 7, 8, 9]]
    assert longer["attention_mask"].tolist() == [[1, 1, 1, 1, 1]]
    assert longer["token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]
    assert longer["pixel_values"] is prompt["pixel_values"]
    assert prompt["input_ids"].tolist() == [[1, 2]]


def test_the_model_leaves_as_it_came(family):
    before = {name: weight.clone() for name, weight in family.model.state_dict().items()}
    capture_trie(family, *TRIES["two answers"])
    assert no_hooks(family)
    with pytest.raises(TypeError):
        capture(family, inputs(LONG) | {"input_ids": "no tensor"})
    assert no_hooks(family)
    assert all(
        torch.equal(before[name], weight) for name, weight in family.model.state_dict().items()
    )


# -- models that a replay of the layers cannot stand for are refused --


class Shifting(LlamaModel):
    """Adds something to the hidden states between its layers."""

    def forward(self, *args, **kwargs):
        layers, self.layers = (
            self.layers,
            torch.nn.ModuleList(Scaled(layer, index) for index, layer in enumerate(self.layers)),
        )
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = layers


class Scaled(torch.nn.Module):
    def __init__(self, layer, index):
        super().__init__()
        self.layer, self.index = layer, index

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **kwargs) * (1.5 if self.index == 1 else 1.0)


class TupleLayer(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return (super().forward(hidden_states, **kwargs),)


class Unpacking(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, **kwargs)[0]


class TupleModel(LlamaModel):
    """Layers that return tuples, as before transformers 4.54."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            TupleLayer(config, index) for index in range(config.num_hidden_layers)
        )

    def forward(self, *args, **kwargs):
        layers, self.layers = self.layers, torch.nn.ModuleList(map(Unpacking, self.layers))
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = layers


class ByPosition(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        return self.layer(hidden_states, attention_mask, **kwargs)


class PositionalModel(LlamaModel):
    """Calls its layers with the mask by position."""

    def forward(self, *args, **kwargs):
        layers, self.layers = self.layers, torch.nn.ModuleList(map(ByPosition, self.layers))
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = layers


class Gates(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states, gates=hidden_states.mean(-1), **kwargs)


class TakesGates(LlamaDecoderLayer):
    def forward(self, hidden_states, gates=None, **kwargs):
        return super().forward(hidden_states + gates[..., None], **kwargs)


class GatedModel(LlamaModel):
    """Hands its layers a tensor per position that nothing is known of."""

    def __init__(self, config):
        super().__init__(config)
        self.layers = torch.nn.ModuleList(
            TakesGates(config, index) for index in range(config.num_hidden_layers)
        )

    def forward(self, *args, **kwargs):
        layers, self.layers = self.layers, torch.nn.ModuleList(map(Gates, self.layers))
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.layers = layers


def llama_with(decoder):
    model = LlamaForCausalLM(tiny_config("llama"))
    model.model = decoder(model.config)
    return randomise(model)


class ScaledLogits(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0.7
        return output


def granite():
    return randomise(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)))


def gemma2():
    return randomise(
        Gemma2ForCausalLM(
            Gemma2Config(
                **SIZES, head_dim=12, query_pre_attn_scalar=12, final_logit_softcapping=5.0
            )
        )
    )


def plain_llama():
    return llama_with(LlamaModel)


# What a forward may do beside its layers and their plain end, and still be replayed.
ACCEPTED = {
    "plain": plain_llama,
    "scaled logits": lambda: randomise(ScaledLogits(tiny_config("llama"))),
    "Granite's scaled logits": granite,
    "Gemma-2's capped logits": gemma2,
    "tuples": lambda: llama_with(TupleModel),
    "arguments by position": lambda: llama_with(PositionalModel),
}
REFUSED = {
    "between layers": lambda: llama_with(Shifting),
    "a tensor made from the hidden states": lambda: llama_with(GatedModel),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_a_forward_does_beside_its_layers_is_replayed(case, tokenizer):
    lm = models.wrap(case, ACCEPTED[case]().eval(), tokenizer)
    prompt, responses = TRIES["two answers"]
    packed, captured = capture_trie(lm, prompt, responses)
    found = logits(lm, replay.replay(lm, captured.embeds, captured.calls))[0]
    for path, response in zip(packed.paths, responses, strict=True):
        expected = own_logits(lm, prompt + response)
        assert difference(found[path], expected) <= 1e-4
        targets = torch.tensor(response)
        before = path[len(prompt) - 1 : -1]
        states = replay.replay(lm, captured.embeds, captured.calls)[0, before]
        log_probs = expected.log_softmax(-1)[len(prompt) - 1 : -1]
        assert torch.allclose(
            token_log_probs(lm, states, targets),
            log_probs.gather(-1, targets[:, None])[:, 0],
            atol=1e-4,
        )


@pytest.mark.parametrize("case", REFUSED)
def test_check_replay_refuses(case, tokenizer):
    model = REFUSED[case]().eval()
    with pytest.raises(UserError, match="does more than its layers do"):
        models.wrap(case, model, tokenizer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_whose_forward_fails_is_refused(tokenizer):
    model = plain_llama()
    model.model.norm = None
    with pytest.raises(UserError, match="its forward fails on a short text"):
        models.wrap("headless", model, tokenizer)


def test_encoded_sequences_without_their_last_token(family):
    item = encoded(family, SHORT, [[7, 8], [9]])
    assert item.sequences() == [[*SHORT, 7, 8], [*SHORT, 9]]
    assert item.sequences(without_last=True) == [[*SHORT, 7], SHORT]
    assert item.length == 6


@pytest.mark.parametrize("case", TRIES)
def test_the_packed_length_is_that_of_the_trie(family, case):
    item = encoded(family, *TRIES[case])
    assert item.packed_length == len(pack(item.sequences(without_last=True)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_embedded_model_passes_the_self_check_in_lower_precision(dtype):
    assert models.load(models.EMBEDDED, dtype=dtype).dtype == models.DTYPES[dtype]


def test_a_replay_that_gives_nan_is_no_replay():
    same = torch.zeros(2, 5)
    assert selfcheck._distance(same, same) == 0
    broken = same.clone()
    broken[1, 3] = torch.nan
    assert selfcheck._distance(broken, same) == torch.inf
    assert max(0.1, selfcheck._distance(broken, same)) == torch.inf


@pytest.mark.slow
def test_measuring_what_a_row_keeps_leaves_nothing_behind(tiny):
    """Tensors that autograd's nodes hold are seen by no garbage collector, but their count is."""
    _, captured = capture_trie(tiny, LONG, [W[20:25]])

    def tensors():
        replay.gradient_rows(tiny, captured)
        gc.collect()
        return sum(isinstance(item, torch.Tensor) for item in gc.get_objects())

    assert tensors() == tensors()
