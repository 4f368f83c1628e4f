"""Positions that never change are computed once: the rest is as in a whole forward."""

import copy
from functools import cache

import families
import pytest
import torch
import zoo
from helpers.families import randomise, tiny_config
from helpers.reference import (
    embeds,
    encoded,
    log_likelihood,
    own_logits,
    own_loss_log_likelihood,
    relative,
    words,
)
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from grains import models, scoring
from grains.ablation import hidden_states
from grains.attribution import PromptFunction, attribute
from grains.logprobs import logits
from grains.packing import pack
from grains.replay import capture_pack, replay, without_prefix
from grains.scoring import score
from grains.settings import AttributionSettings
from grains.steering import Configuration, Gate, steered

W = words(60, seed=4)
PROMPT = W[:20]  # longer than the sliding window
RESPONSES = [W[20:24], W[20:22] + W[30:33]]
FIRST = 13
# Llama 4 scales its queries by positions that it counts in the cache itself.
KEEP = ("llama", "gpt_neox", "gptj", "falcon", "gemma2", "cohere2", "phi3", "gpt_oss", "nanochat")


@cache
def model_of(name):
    return families.load(name).lm


def moved(lm, ids, seed=0):
    """Three rows of the prompt's embeddings (3, P, D), other ones from FIRST on."""
    noise = torch.randn(3, len(ids), lm.hidden_size, generator=torch.Generator().manual_seed(seed))
    noise[:, :FIRST] = 0
    return embeds(lm, ids) * (1 + 0.5 * noise)


def test_values_and_gradients_are_the_models_own(tiny):
    assert tiny.keeps_prefix
    item = encoded(tiny, PROMPT, RESPONSES)
    function = PromptFunction(tiny, item, [1.0, -1.0], 10_000, FIRST)
    assert function.captured.start == FIRST
    prompts = moved(tiny, PROMPT)
    values, gradients = function.values_and_grads(prompts)

    own = prompts.clone().requires_grad_()
    expected = log_likelihood(tiny, own, RESPONSES[0]) - log_likelihood(tiny, own, RESPONSES[1])
    (by_autograd,) = torch.autograd.grad(expected.sum(), own)
    assert relative(values, expected.detach()) <= 1e-5
    assert relative(function.values(prompts), expected.detach()) <= 1e-5
    # Sums in float32, in other orders on each processor: 4e-6 apart on one of them.
    assert relative(gradients[:, FIRST:], by_autograd[:, FIRST:]) <= 5e-5
    assert not gradients[:, :FIRST].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEP)
def test_text_families(name):
    """Every layer's states behind the prefix, for rows that share it, against the whole rows."""
    lm = model_of(name)
    assert lm.keeps_prefix
    torch.manual_seed(0)
    prompt = torch.randint(20, zoo.VOCABULARY, (20,)).tolist()
    ids = torch.tensor([prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    packed = pack([[*prompt, 30, 31], [*prompt, 32]])
    whole = capture_pack(lm, inputs, packed)
    rest = without_prefix(lm, whole, FIRST)
    assert rest.start == FIRST
    rows = whole.embeds.repeat(3, 1, 1)
    rows[:, FIRST:] *= 1 + 0.5 * torch.randn(3, len(packed) - FIRST, 1)
    seen, expected = [], []
    with torch.no_grad():
        replay(lm, rows[:, FIRST:], rest.calls, after=lambda _, states: seen.append(states))
        for row in rows:
            for path in packed.paths:
                expected.append(lm.model(inputs_embeds=row[path][None], use_cache=False).logits[0])
    final = logits(lm, seen[-1])
    for index, own in enumerate(expected):
        path = packed.paths[index % 2][FIRST:] - FIRST
        if lm.own_embeddings:  # what enters the model is not what enters its layers
            continue
        assert relative(final[index // 2, path], own[FIRST:]) <= 1e-5
    with torch.no_grad():
        plain = []
        replay(lm, rows, whole.calls, after=lambda _, states: plain.append(states[:, FIRST:]))
    for kept, own in zip(seen, plain, strict=True):
        assert relative(kept, own) <= 1e-5


class Counted:
    """How many positions pass through the layers' MLPs, rows included."""

    def __init__(self, lm):
        self.positions = [0] * len(lm.layers)
        self.handles = [
            layer.mlp.register_forward_hook(
                lambda module, args, output, index=index: self.note(index, args[0])
            )
            for index, layer in enumerate(lm.layers)
        ]

    def note(self, index, states):
        self.positions[index] += states[..., 0].numel()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_the_prefix_is_computed_once(family):
    """6 points and both ends of the path: every one passes the positions from FIRST on alone."""
    item = encoded(family, PROMPT, RESPONSES, content=[FIRST, FIRST + 2])
    packed = len(pack(item.sequences(without_last=True)))
    settings = AttributionSettings(baseline="pad", ig_steps=6)
    with Counted(family) as counted:
        attribute(family, item, settings, 10_000, torch.Generator())
    # A row of one layer more: how much of it is kept for a gradient is measured on it.
    expected = FIRST + (packed - FIRST) * (6 + 2)
    assert counted.positions == [expected + packed - FIRST, *[expected] * (len(family.layers) - 1)]


def test_ablated_prompts_share_their_prefix(family):
    item = encoded(family, PROMPT, RESPONSES)
    ablated = [[FIRST, FIRST + 1], [FIRST + 3], []]
    with Counted(family) as counted:
        found = hidden_states(family, item, ablated, 10_000, gradients=False)
    twin = copy.deepcopy(family.model)  # transformers leaves hooks where it reads hidden states
    packed = len(pack(item.sequences()))
    assert counted.positions[-1] == packed + FIRST + 3 * (packed - FIRST)
    pad = embeds(family, [family.tokenizer.pad_token_id])
    for row, positions in enumerate([[], *ablated]):
        prompt = embeds(family, PROMPT).clone()
        prompt[positions] = pad
        expected = torch.stack([log_likelihood(family, prompt, r) for r in RESPONSES]).detach()
        assert relative(found.log_likelihoods[row], expected) <= 1e-5
        for answer, response in enumerate(RESPONSES):
            behind = embeds(family, response)
            outputs = twin(
                inputs_embeds=torch.cat([prompt, behind])[None],
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
            # The last of transformers' hidden states is behind the final norm.
            assert (
                relative(
                    found.last[row, answer, :-1], torch.stack([h[0, -1] for h in outputs[:-1]])
                )
                <= 1e-5
            )


class Forgets(LlamaDecoderLayer):
    """Never looks into its cache."""

    def forward(self, hidden_states, past_key_values=None, cache=None, **kwargs):
        return super().forward(hidden_states, **kwargs)


class Blind(LlamaDecoderLayer):
    """Gives its keys and values to the cache, and attends to what it has itself."""

    def forward(
        self, hidden_states, past_key_values=None, attention_mask=None, cache=None, **kwargs
    ):
        past_key_values = past_key_values or cache  # transformers 5.24 calls it so
        if past_key_values is not None:
            shape = (*hidden_states.shape[:-1], -1, self.self_attn.head_dim)
            normed = self.input_layernorm(hidden_states)
            keys, values = (
                project(normed).view(shape).transpose(1, 2)
                for project in (self.self_attn.k_proj, self.self_attn.v_proj)
            )
            past_key_values.update(keys, values, 0)
            if attention_mask is not None:
                attention_mask = attention_mask[..., -hidden_states.shape[1] :]
        return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("layer", [Forgets, Blind])
def test_layers_that_keep_nothing_are_replayed_whole(tokenizer, layer):
    model = LlamaForCausalLM(tiny_config("llama"))
    model.model.layers = nn.ModuleList(layer(model.config, index) for index in range(4))
    lm = models.wrap("forgetful", randomise(model).eval(), tokenizer)
    assert lm.packs and not lm.keeps_prefix
    item = encoded(lm, PROMPT, RESPONSES)
    function = PromptFunction(lm, item, [1.0, -1.0], 10_000, FIRST)
    assert function.captured.start == 0
    assert own_logits(lm, PROMPT).isfinite().all()
    prompts = moved(lm, PROMPT)
    expected = log_likelihood(lm, prompts, RESPONSES[0]) - log_likelihood(lm, prompts, RESPONSES[1])
    assert relative(function.values(prompts), expected.detach()) <= 1e-5


# --- scoring: what all prompts of a batch begin with is computed once for each configuration ---

ALIKE = 11
QUESTIONS = [
    (W[:ALIKE] + W[20:26], [W[30:33], W[33:38]]),
    (W[:ALIKE] + W[26:29], [W[30:33], W[30:32] + W[40:41]]),
    (W[:ALIKE] + W[41:50], [W[50:52], W[53:54]]),
]


def configurations_of(lm, gate=None, positions="all"):
    """Every layer, some, the last alone: two configurations of each kind."""
    generator = torch.Generator().manual_seed(1)
    count = len(lm.layers)
    size = 2 * lm.embed.weight.norm(dim=-1).median() / lm.hidden_size**0.5
    made = []
    for layers in (tuple(range(count)), (1, count - 1), (count - 1,)) * 2:
        vectors = {
            layer: size * torch.randn(lm.hidden_size, generator=generator) for layer in layers
        }
        made.append(Configuration("some", "", layers, 1.0, vectors, gate, positions))
    return made


def widths(monkeypatch, compute):
    """What `compute` returns, and how many positions it replays of each row, in order."""
    seen = []

    def noted(lm, states, *args, own=scoring.replay, **kwargs):
        seen.append(tuple(states.shape[:2]))
        return own(lm, states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "replay", noted)
        return compute(), seen


def test_scores_behind_a_shared_beginning_are_those_of_hooked_forwards(tiny, monkeypatch):
    items = [encoded(tiny, *question) for question in QUESTIONS]
    configurations = configurations_of(tiny)
    found, seen = widths(monkeypatch, lambda: score(tiny, items, configurations, 10_000))
    longest = max(item.packed_length for item in items)
    assert {length for _, length in seen} == {longest - ALIKE}
    for (prompt, responses), values in zip(QUESTIONS, found, strict=True):
        for column, response in enumerate(responses):
            expected = [own_loss_log_likelihood(tiny, prompt, response)]
            for item in configurations:
                with steered(tiny, item.vectors):
                    expected.append(own_loss_log_likelihood(tiny, prompt, response))
            assert values[:, column] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("positions", "shared"), [("prompt", ALIKE), ("last", ALIKE), ("-12:", 0), ("2:", ALIKE)]
)
def test_steered_positions_and_gates_behind_a_shared_beginning(
    tiny, monkeypatch, positions, shared
):
    """Counted from the end, other positions of the beginning are steered in each prompt."""
    items = [encoded(tiny, *question) for question in QUESTIONS]
    generator = torch.Generator().manual_seed(2)
    gate = Gate(
        torch.randn(len(tiny.layers), tiny.hidden_size, generator=generator),
        torch.randn(len(tiny.layers), generator=generator),
    )
    configurations = configurations_of(tiny, gate, positions)
    found, seen = widths(monkeypatch, lambda: score(tiny, items, configurations, 10_000))
    assert seen[0][1] == max(item.packed_length for item in items) - shared
    for item, values in zip(items, found, strict=True):
        (alone,) = score(tiny, [item], configurations, 10_000)
        assert relative(values, alone) <= 5e-5  # sums in float32, in batches of other shapes
        assert not relative(values[1:], values[:1]) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", KEEP)
def test_scores_of_text_families(name):
    lm = model_of(name)

    def known(ids):
        return [20 + token % (zoo.VOCABULARY - 20) for token in ids]

    items = [
        encoded(lm, known(prompt), [*map(known, responses)]) for prompt, responses in QUESTIONS
    ]
    configurations = configurations_of(lm)
    for item, values in zip(items, score(lm, items, configurations, 10_000), strict=True):
        (alone,) = score(lm, [item], configurations, 10_000)
        assert relative(values, alone) <= 5e-5  # sums in float32, in batches of other shapes
