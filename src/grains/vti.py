"""Visual and textual intervention (Liu et al., arXiv 2410.15778): the half in the vision tower.

Features of a picture that change much when parts of it are hidden are blamed for what a model says
that the picture does not show. So the tower's states are moved to what they are on average over
many copies of the picture in which nearly all is hidden. Over several pictures the direction of
that shift is the first principal one, for each layer and patch. The other half are the decoder's
vectors, the first principal directions of the differences between the responses. The rows are not
centred, as for the in-context vectors on which the method builds: what they have in common is what
is to be added.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from grains import tower, vision
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.steering import TowerVectors
from grains.vectors import pca_vector

# The share of a picture that is hidden, and the number of copies: the published ones.
HIDDEN, COPIES = 0.99, 50
CELLS = 24  # along a side of a picture; a cell is hidden or shown. LLaVA-1.5 has as many patches.


def masked(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A copy of which HIDDEN of CELLS x CELLS cells, drawn at random, have its median colour."""
    count = CELLS**2
    shown = np.zeros(count, dtype=bool)
    shown[generator.choice(count, count - round(HIDDEN * count), replace=False)] = True
    rows, columns = (np.arange(size) * CELLS // size for size in (picture.height, picture.width))
    visible = shown.reshape(CELLS, CELLS)[rows[:, None], columns]
    return Image.composite(picture, vision.blank_like(picture), Image.fromarray(visible))


def shift(lm: LanguageModel, picture: Image.Image, seed: int) -> tuple[Tensor, Tensor]:
    """The tower's states, mean over masked copies minus those of the picture: (Lv, T, Dv).

    Returns also the length of the picture's own states (see `tower.states`).
    """
    own, norms = tower.states(lm, picture)
    generator = np.random.default_rng(seed)
    total = torch.zeros_like(own)
    for _ in range(COPIES):
        total += tower.states(lm, masked(picture, generator))[0]
    return total / COPIES - own, norms


def make(lm: LanguageModel, examples: Iterable[Example], seed: int) -> TowerVectors:
    """One vector for each layer and patch of the tower, from the pictures of N examples.

    The first principal direction of the N shifts, of unit length, oriented so that the mean shift
    projects positively on it. Where pictures have different numbers of patches, it is one for all
    patches, from the shifts' means.
    seed: draws what is hidden; the masks of a picture do not depend on the others.
    Raises UserError for an example without a picture, for fewer than two, and as `tower.layers`.
    """
    shifts, norms = [], []
    for number, example in enumerate(examples):
        if example.image is None:
            raise UserError(
                f"example {example.id} has no picture, from which the method vti makes its vectors "
                "of the vision tower: use another method or data with pictures"
            )
        own_shift, size = shift(lm, vision.open_image(example), seed * 1_000_003 + number)
        shifts.append(own_shift)
        norms.append(size)
    if len({rows.shape for rows in shifts}) > 1:
        shifts = [rows.mean(dim=1, keepdim=True) for rows in shifts]
    by_example = torch.stack(shifts, dim=2).double().numpy()  # (Lv, T, N, Dv)
    by_patch = [[pca_vector([patch], around_mean=False) for patch in layer] for layer in by_example]
    return TowerVectors(
        torch.from_numpy(np.array(by_patch)).float(), torch.stack(norms).median(dim=0).values
    )
