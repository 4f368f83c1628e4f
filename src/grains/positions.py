"""Which positions of a sequence are steered: all, or those of a prompt, a picture or a response."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from grains.errors import UserError
from grains.prompts import Encoded
from grains.settings import parse_positions


def in_prompt(positions: str, image: Tensor, may_stay: bool = False) -> Tensor:
    """(P,) bool, which positions of a prompt are steered.

    positions: see `grains.settings.parse_positions`. image: (P,) bool, the positions of a picture.
    Raises UserError for an unknown word, and, unless it `may_stay` as it is, if no position of this
    prompt is meant, so that nothing would be steered.
    """
    part = parse_positions(positions)
    steered = torch.zeros(len(image), dtype=torch.bool)
    if isinstance(part, slice):
        steered[part] = True
    elif part == "image":
        steered |= image.cpu()
    else:
        # The last position of the prompt predicts the response's first token.
        steered[-1 if part in ("response", "last") else 0 :] = True
    if not steered.any() and not may_stay:
        missing = "it has no picture" if part == "image" else f"it has {len(image)} positions"
        raise UserError(f"positions '{positions}' name nothing in a prompt: {missing}")
    return steered


def in_response(positions: str) -> bool:
    """Whether the positions of a response's own tokens are steered; all are, or none."""
    return parse_positions(positions) in ("all", "response")


def of_batch(positions: str, encoded: list[Encoded], length: int) -> Tensor | None:
    """(Q, T) bool, the steered positions of prompts with their responses packed behind them.

    length: T, which longer rows have and shorter ones are padded to.
    Returns None if all positions are steered.
    """
    if parse_positions(positions) == "all":
        return None
    rows = torch.full((len(encoded), length), in_response(positions))
    for row, item in zip(rows, encoded, strict=True):
        row[: len(item.image)] = in_prompt(positions, item.image, item.may_stay)
    return rows


def newest(
    positions: Sequence[str], images: Sequence[Tensor], lengths: Sequence[int], width: int
) -> Tensor | None:
    """(R, W) bool, which of the last W positions of rows are steered; none of the padding before.

    positions, images: of each row: see `in_prompt`. lengths: of each row's prompt and response.
    Returns None if all positions of all rows are steered.
    """
    if all(parse_positions(word) == "all" for word in positions):
        return None
    steered = torch.zeros(len(positions), width, dtype=torch.bool)
    for row, word, image, length in zip(steered, positions, images, lengths, strict=True):
        response = torch.full((length - len(image),), in_response(word))
        last = torch.cat([in_prompt(word, image), response])[-width:]
        row[width - len(last) :] = last
    return steered
