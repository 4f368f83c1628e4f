"""Boxes of image tokens in more families: a part of a picture is painted, and what changes is
asked."""

import numpy as np
import pytest
from helpers import picture_families
from helpers.vlm_models import with_object
from test_vision import covers, features, features_with_objects, touching

from grains import vision
from grains.errors import UserError

pytestmark = pytest.mark.slow

SIZES = [(56, 56), (160, 90), (120, 60), (40, 120), (64, 48), (6, 5), (400, 9), (9, 400)]
# Pixels of one token's side as the tower sees them.
SIDES = dict.fromkeys(("llava", "llava_onevision", "paligemma", "deepseek_vl"), 7)
SIDES |= dict.fromkeys(("glm4v", "qwen2_vl", "qwen3_vl"), 28)
FAMILIES = [
    pytest.param(
        family,
        marks=pytest.mark.skipif(
            not picture_families.available(family),
            reason=f"its processor needs {picture_families.NEEDS.get(family)}",
        ),
    )
    for family in picture_families.FAMILIES
    if family != "gemma3n"  # its features have no place of their own: it has no boxes
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A tower without attention: what an image token shows is in its own patch."""
    return picture_families.make(request.param, local=True)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_what_changes_with_an_object_is_what_its_boxes_touch(family, size):
    name = family.name.removeprefix("tiny-")
    if name == "mistral3" and size == (6, 5):  # transformers cannot take one token
        with pytest.raises(UserError, match=r"fails on a picture .* very small"):
            features(family, with_object(size, None))
        return
    things, (plain, *seen), inputs = features_with_objects(family, size)
    boxes = vision.token_boxes(family, inputs, size, len(plain))
    assert len(boxes) == len(plain) and any(boxes)
    sides = _views(name, boxes)
    sure_of_any = 0
    for thing, shown in zip(things, seen, strict=True):
        changed = ((shown - plain).norm(dim=-1) > 1e-4 * plain.norm(dim=-1)).numpy()
        start = 0
        for part, side in sides:
            here = changed[start : start + len(part)]
            start += len(part)
            sure, maybe = touching(part, side, thing)
            assert (here | ~sure).all(), (thing, np.flatnonzero(sure & ~here))
            if min(size) >= 10:  # else resampling smears it over the whole height or width
                assert (maybe | ~here).all(), (thing, np.flatnonzero(here & ~maybe))
            sure_of_any += sure.sum()
    assert sure_of_any or min(size) < 10


def _views(name, boxes):
    """(tokens of one view of the picture, pixels of a token's side in it)."""
    side = SIDES.get(name, 14)
    if name == "smolvlm":  # tiles of four by four, then all of it; small tokens, far smeared
        return [(boxes[:-16], 4), (boxes[-16:], 4)]
    if name in ("idefics3", "internvl", "aya_vision", "llama4"):  # of two by two
        return [(boxes[:-4], side), (boxes[-4:], side)]
    if name == "llava_onevision":
        # Features that are interpolated mix with those beside them: a smear of half a token.
        return [(boxes[:16], side), (boxes[16:], 2)]
    return [(boxes, side)]


def test_the_boxes_of_a_view_cover_the_picture(family):
    name = family.name.removeprefix("tiny-")
    if name == "llava":  # it sees the middle alone
        size = (90, 60)
        _, inputs = features(family, with_object(size, None))
        boxes = vision.token_boxes(family, inputs, size, 16)
        assert boxes[0][:2] == (15, 0) and boxes[-1][2:] == (75, 60)
        return
    for size in ((56, 56), (160, 90), (40, 120)):
        plain, inputs = features(family, with_object(size, None))
        for part, _ in _views(name, vision.token_boxes(family, inputs, size, len(plain))):
            covers([box for box in part if box], size)
