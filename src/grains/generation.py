"""Decoding in batches: each row is a prompt under the base model or a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from grains import positions, vision
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.scoring import batches
from grains.selfcheck import can_pad
from grains.steering import Configuration, steered

# Decoding keeps only keys and values, much less than the activations of a whole forward, and its
# time is spent on reading the weights. So its batches hold this many times more positions.
WIDTH = 8


def decoding_batches(
    encoded: list[Encoded],
    configurations: list[Configuration],
    max_new_tokens: int,
    max_tokens: int,
) -> list[list[int]]:
    """Indices of prompts that are continued together, by the base and all configurations.

    max_tokens: the number of positions in a batch of a whole forward (see `scoring.batches`).
    """
    rows = 1 + len(configurations)
    return batches(
        [rows * (len(item.prompt_ids) + max_new_tokens) for item in encoded], WIDTH * max_tokens
    )


@torch.inference_mode()
def generate(
    lm: LanguageModel,
    encoded: list[Encoded],
    configurations: list[Configuration],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[list[str]]:
    """Continue every prompt, by the base model and under each configuration.

    The prompts are padded on the left. Each pair of configuration and prompt is a row of one batch
    with its own steering vectors, zero for the base. Prompts with and without a picture are
    continued in separate batches, and so are prompts of different lengths by a model that cannot
    take padding.

    temperature: 0 decodes greedily. seed: of the sampling.
    Returns 1 + len(configurations) lists of texts, the base first.
    """
    rows = 1 + len(configurations)
    # Batched are prompts that all have a picture or all have none, and of one length if need be.
    lengths = {len(item.prompt_ids) for item in encoded}
    apart = len(lengths) > 1 and not can_pad(lm)
    kinds = [(bool(item.image.any()), len(item.prompt_ids) if apart else 0) for item in encoded]
    if len(set(kinds)) > 1:
        of_kind = {
            kind: generate(
                lm,
                [item for item, own in zip(encoded, kinds, strict=True) if own == kind],
                configurations,
                max_new_tokens,
                temperature,
                seed,
            )
            for kind in dict.fromkeys(sorted(kinds))
        }
        texts_of = [
            {kind: iter(texts[row]) for kind, texts in of_kind.items()} for row in range(rows)
        ]
        return [[next(texts[kind]) for kind in kinds] for texts in texts_of]
    if encoded[0].image.any():
        inputs = vision.model_inputs(
            lm,
            [item.text for item in encoded],
            [vision.open_image(item.example) for item in encoded],
            [item.guard for item in encoded],
        )
    else:
        inputs = pad_left(lm, [item.inputs for item in encoded])
    inputs = {key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    vectors, gates = _by_row(configurations, len(encoded))
    words = ["all", *(item.positions for item in configurations)]
    steered_between = positions.while_decoding(words, encoded, inputs["input_ids"].shape[1])
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    pad = lm.replacement_id("pad")
    with (
        _computed(lm) as stop,
        steered(
            lm,
            vectors,
            gates,
            steered_between and (lambda count: steered_between(stop[0] - count, stop[0])),
        ),
    ):
        output = lm.model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )
    texts = lm.tokenizer.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    count = len(encoded)
    return [
        [text.strip() for text in texts[row * count : (row + 1) * count]] for row in range(rows)
    ]


@contextmanager
def _computed(lm: LanguageModel) -> Iterator[list[int]]:
    """A list of one number: the positions of a row after the forward that runs, P at first."""
    stop = [0]

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        new = kwargs["input_ids"].shape[1]  # the newest alone with a cache, all without
        stop[0] = stop[0] + 1 if new == 1 else new

    handle = lm.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield stop
    finally:
        handle.remove()


def pad_left(lm: LanguageModel, inputs: list[dict]) -> dict:
    """Inputs of B text prompts as one batch (B, P), padded on the left; padding is masked."""

    def pad(key: str, value: int) -> Tensor:
        rows = [item[key][0] for item in inputs]
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

    return {
        "input_ids": pad("input_ids", lm.replacement_id("pad")),
        "attention_mask": pad("attention_mask", 0),
    }


def _by_row(
    configurations: list[Configuration], prompts: int
) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
    """Vectors and gates of R rows: base and configurations, `prompts` rows each.

    Returns layer -> vectors (R, 1, D), zero for the base and for a configuration that does not
    steer the layer; and layer -> gates, (R, 1, D) and (R, 1, 1), empty if no configuration is
    gated. A row without a gate has an open one: a bias of infinity.
    """
    layers = sorted({layer for item in configurations for layer in item.layers})
    is_gated = any(item.gate for item in configurations)

    def rows(values: list[Tensor]) -> Tensor:
        return torch.stack(values).view(len(values), 1, -1).repeat_interleave(prompts, 0)

    by_row, gates = {}, {}
    for layer in layers:
        zero = torch.zeros_like(
            next(item.vectors[layer] for item in configurations if layer in item.vectors)
        )
        by_row[layer] = rows([zero, *(item.vectors.get(layer, zero) for item in configurations)])
        if is_gated:
            open_gate = zero, torch.tensor(torch.inf)
            pairs = [
                open_gate,
                *(
                    item.gate.at(layer) if item.gate and layer in item.vectors else open_gate
                    for item in configurations
                ),
            ]
            weights, biases = zip(*pairs, strict=True)
            gates[layer] = rows(list(weights)), rows(list(biases))
    return by_row, gates
