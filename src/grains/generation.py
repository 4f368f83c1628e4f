"""Batched decoding, base and steered configurations as rows of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from grains import vision
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.scoring import batches
from grains.steering import Configuration, steered

# Decoding keeps keys and values only, far less than the activations of a whole forward, and is
# bound by reading the weights: so that many times more positions go into a batch.
WIDTH = 8


def decoding_batches(
    encoded: list[Encoded],
    configurations: list[Configuration],
    max_new_tokens: int,
    max_tokens: int,
) -> list[list[int]]:
    """Indices of prompts that are continued together, unsteered and under each configuration.

    max_tokens: positions of a batch in a whole forward (see `batches`).
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
    """Continue every prompt, unsteered and under each configuration.

    The prompts are padded on the left; each (configuration, prompt) is a row of one batch with
    its own steering vectors, zero for the base. temperature 0 is greedy.
    Prompts with a picture and prompts without make batches of their own.
    Returns 1 + C lists of texts, the base first.
    """
    rows = 1 + len(configurations)
    shown = [bool(item.image.any()) for item in encoded]
    if any(shown) and not all(shown):
        parts = [
            generate(
                lm,
                [item for item, here in zip(encoded, shown, strict=True) if here == part],
                configurations,
                max_new_tokens,
                temperature,
                seed,
            )
            for part in (False, True)
        ]
        return [
            [next(texts[here]) for here in shown]
            for texts in (tuple(map(iter, pair)) for pair in zip(*parts, strict=True))
        ]
    if any(shown):
        inputs = vision.model_inputs(
            lm,
            [item.text for item in encoded],
            [vision.open_image(item.example) for item in encoded],
        )
    else:
        inputs = pad_left(lm, [item.inputs for item in encoded])
    inputs = {key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    vectors, gates = _by_row(configurations, len(encoded))
    sampling = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    torch.manual_seed(seed)
    pad = lm.replacement_id("pad")
    with steered(lm, vectors, gates):
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


def pad_left(lm: LanguageModel, inputs: list[dict]) -> dict:
    """Text prompts of one row each as one batch; padding is masked."""

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
    """layer -> (rows, 1, D): zero for the base and where a configuration leaves a layer alone.

    And layer -> the gates (rows, 1, D), (rows, 1, 1), where there are any; without one, it is open.
    """
    layers = sorted({layer for item in configurations for layer in item.layers})
    is_gated = any(item.gate for item in configurations)

    def rows(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).view(len(parts), 1, -1).repeat_interleave(prompts, 0)

    by_row, gates = {}, {}
    for layer in layers:
        zero = torch.zeros_like(
            next(item.vectors[layer] for item in configurations if layer in item.vectors)
        )
        by_row[layer] = rows([zero, *(item.vectors.get(layer, zero) for item in configurations)])
        if is_gated:
            open_wide = zero, torch.tensor(torch.inf)
            one_each = [
                open_wide,
                *(
                    item.gate.at(layer) if item.gate and layer in item.vectors else open_wide
                    for item in configurations
                ),
            ]
            gates[layer] = tuple(rows(list(parts)) for parts in zip(*one_each, strict=True))
    return by_row, gates
