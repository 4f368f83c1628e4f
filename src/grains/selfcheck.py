"""The self-check at load time: does a replay of the layers give the model's own results?"""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from grains import prompts
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.logprobs import logits
from grains.packing import pack
from grains.replay import capture_pack, extend, replay

# How much a replay's log-probabilities may differ from the model's own: root mean square over the
# vocabulary, at the worst position, in nats. SmolLM2's own forward changes by 0.1 in bfloat16 (by
# 0.6 for the worst of its 49,152 words) and by 0.01 in float16 when more text follows.
SELF_CHECK_TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


def check_replay(lm: LanguageModel) -> None:
    """Raise UserError for a model whose forward does more than its layers do.

    A short text goes through the model's own forward, and through a replay of two packed sequences
    that stops and resumes in the middle. Both must give the same log-probabilities, and every layer
    must return its hidden states as one tensor. For an image-text model this is repeated with a
    picture in the prompt.
    """
    vocabulary = min(lm.head.weight.shape[0], lm.embed.weight.shape[0])
    special = lm.special_ids() | lm.image_ids()
    # Nine ordinary tokens: the first ids of a vocabulary are often special or single bytes.
    ids_in_order = list(range(vocabulary // 7, vocabulary)) + list(range(vocabulary // 7))
    words = [token for token in ids_in_order if token not in special][:9]
    responses = [words[4:6], words[6:9]]
    ids = torch.tensor([words[:4]], device=lm.device)
    _check_replay(lm, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, responses, "")
    if lm.processor is not None:
        # Only the second response is compared: it is the one packed behind another.
        _check_replay(lm, _picture_prompt(lm), responses, " with a picture", compared=(1,))


def _picture_prompt(lm: LanguageModel) -> dict:
    """The model's inputs for a prompt with a small picture, three times as wide as high."""
    across, down = Image.linear_gradient("L").resize((96, 32)), Image.radial_gradient("L")
    picture = Image.merge(
        "RGB", (across, across.transpose(Image.Transpose.ROTATE_180), down.resize((96, 32)))
    )
    try:
        encoded = prompts.encode(lm, Example("self-check", "?", ("?",), 0, image=picture), "plain")
    except Exception as error:
        raise UserError(
            f"{lm.name}: its processor cannot be given a picture "
            f"({type(error).__name__}: {error}); not supported"
        ) from error
    if not encoded.image.any():
        raise UserError(
            f"{lm.name}: the tokens that stand for a picture are not found in its prompt; this "
            "architecture is not supported"
        )
    return encoded.inputs


@torch.no_grad()
def _check_replay(
    lm: LanguageModel,
    prompt: dict,
    responses: list[list[int]],
    prompt_kind: str,
    compared: tuple[int, ...] = (0, 1),
) -> None:
    """Compare the responses numbered in `compared` with the model's own forward.

    prompt_kind: what the error says of the prompt.
    """
    outputs = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        for layer in lm.layers
    ]
    try:
        expected = {
            index: lm.model(**extend(prompt, responses[index]), use_cache=False).logits[0].float()
            for index in compared
        }
    finally:
        for handle in handles:
            handle.remove()
    if not all(isinstance(output, Tensor) for output in outputs):
        raise UserError(
            f"{lm.name}: its decoder layers do not return a tensor of hidden states; "
            "this architecture is not supported"
        )

    ids = prompt["input_ids"][0].tolist()
    packed = pack([ids + response for response in responses])
    captured = capture_pack(lm, prompt, packed)
    middle = len(lm.layers) // 2
    half = replay(lm, captured.embeds, captured.kwargs, stop=middle)
    replayed = logits(lm, replay(lm, half, captured.kwargs, start=middle))[0]
    worst = max(
        (
            replayed[packed.paths[index].to(replayed.device)].log_softmax(-1).to(scores.device)
            - scores.log_softmax(-1)
        )
        .square()
        .mean(-1)
        .sqrt()
        .max()
        .item()
        for index, scores in expected.items()
    )
    if not all(scores.isfinite().all() for scores in expected.values()):
        raise UserError(
            f"{lm.name}: it gives NaN or infinite logits in {lm.dtype} on a short text: its "
            "weights are damaged, or too large for that precision; try dtype float32 or bfloat16"
        )
    limit = SELF_CHECK_TOLERANCE[lm.dtype]
    if not worst <= limit:
        raise UserError(
            f"{lm.name}: a replay of its decoder layers{prompt_kind} differs from the model's own "
            f"log-probabilities by {worst:.2g} (at most {limit:g} expected): its forward does more "
            "than its layers do, so it would be attributed and steered wrongly; not supported"
        )
