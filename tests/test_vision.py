"""Opening pictures, and where each image token lies in the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import vlm_models
from helpers.vlm_models import (
    FAMILIES,
    GRID,
    MERGED,
    PATCH,
    TILE,
    asked,
    picture,
    rotated,
    saved,
    with_object,
)
from PIL import Image

from grains import data, prompts, vision
from grains.errors import UserError
from grains.replay import capture
from grains.settings import PromptSettings

pytestmark = pytest.mark.slow

# -- opening --


def opened(stored):
    image = vision.open_image(asked(stored, id="number-7"))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def expected_of(image):
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_forms(form):
    shown = picture(31, 20).quantize(8) if form == "GIF" else picture(31, 20)
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(opened(saved(shown, form, **options)), expected_of(shown))


def test_where_a_picture_may_be(tmp_path):
    """A path, the file's bytes, a dict of them as data sets keep it, a picture in memory."""
    shown = picture(31, 20)
    path = tmp_path / "ä picture.png"
    shown.save(path)
    content = path.read_bytes()
    for stored in (
        str(path),
        path,
        {"bytes": None, "path": str(path)},
        {"bytes": content, "path": "elsewhere.png"},
        {"bytes": content},
        shown,
    ):
        assert np.array_equal(opened(stored), expected_of(shown))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_in_memory(mode):
    shown = picture(31, 20).convert(mode)
    assert np.array_equal(opened(shown), expected_of(shown.convert("RGB")))


def test_transparency_lies_on_white():
    clear = Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    clear.putpixel((1, 2), (200, 10, 10, 255))
    clear.putpixel((3, 3), (0, 0, 0, 128))
    by_index = Image.new("P", (4, 4), 1)
    by_index.putpalette([0, 0, 0, 200, 10, 10])
    by_index.putpixel((1, 2), 0)
    for stored in (
        clear,
        saved(clear),
        saved(clear.convert("LA")),
        saved(clear, "WEBP", lossless=True),
    ):
        found = opened(stored)
        assert (found[0, 0] == 255).all() and not (found[2, 1] == 255).all()
        assert np.abs(found[3, 3] - 127).max() <= 1
    found = opened(saved(by_index, transparency=1))
    assert (found[0, 0] == 255).all() and (found[2, 1] == 0).all()


def test_sixteen_bits_of_grey():
    ramp = (np.arange(64 * 4, dtype=np.uint16) * 257).reshape(4, 64)
    found = opened(saved(Image.fromarray(ramp)))
    assert np.array_equal(found, np.repeat(np.arange(256).reshape(4, 64, 1), 3, axis=2))


def test_a_picture_stored_on_its_side_is_turned_upright():
    shown = picture(31, 20)
    assert np.array_equal(opened(rotated(shown)), expected_of(shown))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = opened(saved(shown, exif=exif))
        assert found.shape == ((20, 31, 3) if orientation <= 4 else (31, 20, 3))
        corner = {
            1: (0, 0),
            2: (0, -1),
            3: (-1, -1),
            4: (-1, 0),
            5: (0, 0),
            6: (0, -1),
            7: (-1, -1),
            8: (-1, 0),
        }[orientation]
        assert np.array_equal(found[corner], expected_of(shown)[0, 0])


def test_the_first_picture_of_a_moving_one():
    frames = [picture(31, 20, seed).quantize(8) for seed in (0, 1)]
    stored = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(opened(stored), expected_of(frames[0]))


BROKEN = (
    "missing",
    "missing, as data sets say it",
    "neither bytes nor path",
    "cut short",
    "cut short JPEG",
    "head alone",
    "no picture",
    "empty",
    "a folder",
    "a web address",
    "nothing",
    "a number",
)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_a_users_error_that_names_the_example(tmp_path, kind):
    whole = saved(picture(61, 40))["bytes"]
    jpeg = saved(picture(300, 200), "JPEG")["bytes"]
    text = tmp_path / "text.png"
    text.write_text("no picture")
    stored = {
        "missing": str(tmp_path / "nowhere.png"),
        "missing, as data sets say it": {"bytes": None, "path": str(tmp_path / "nowhere.png")},
        "neither bytes nor path": {"bytes": None, "path": None},
        "cut short": {"bytes": whole[: len(whole) // 2]},
        "cut short JPEG": {"bytes": jpeg[: len(jpeg) // 2]},
        "head alone": {"bytes": whole[:8]},
        "no picture": str(text),
        "empty": {"bytes": b"", "path": None},
        "a folder": str(tmp_path),
        "a web address": "https://example.org/cat.png",
        "nothing": "",
        "a number": 5,
    }[kind]
    with pytest.raises(UserError, match="example number-7: its picture"):
        opened(stored)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damage_anywhere_is_a_users_error_or_a_picture(form):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if form in ("PNG", "JPEG", "WEBP", "TIFF") else {}
    whole = saved(picture(40, 30), form, **options)["bytes"]
    random = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(whole)
        start = random.integers(len(whole)) if random.random() < 0.5 else random.integers(60)
        for place in range(start, min(start + random.integers(1, 5), len(whole))):
            damaged[place] = random.integers(256)
        try:
            vision.open_image(asked({"bytes": bytes(damaged)}, id="number-7"))
        except UserError as error:
            assert "example number-7" in str(error)


def test_a_picture_too_large_to_be_one(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="example number-7"):
        opened(saved(picture(61, 40)))


def test_a_blank_picture_has_the_same_size_and_the_median_colour():
    shown = with_object((50, 30), (0, 0, 20, 30))
    blank = vision.blank_like(shown)
    assert blank.size == shown.size and blank.getcolors() == [(1500, (128, 128, 128))]


# -- pictures of data sets --


def test_paths_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    picture(31, 20).save(tmp_path / "pictures" / "a.png")
    table = tmp_path / "rows.jsonl"
    table.write_text(
        '{"image": "pictures/a.png", "question": "What?", "chosen": "This", "rejected": "That"}\n'
    )
    monkeypatch.chdir("/")
    for name in ("mine", "spa-vl"):
        rows, source = data.load(name, "train", str(table))
        (example,) = data.examples(rows, source, 0)
        assert np.array_equal(np.asarray(vision.open_image(example)), expected_of(picture(31, 20)))


def test_a_row_without_a_picture_is_a_users_error(tmp_path):
    table = tmp_path / "rows.jsonl"
    table.write_text(
        '{"id": "a7", "image": null, "question": "What?", "chosen": "This", "rejected": "That"}\n'
    )
    rows, source = data.load("spa-vl", "train", str(table))
    with pytest.raises(UserError, match="row 1: an empty image"):
        data.examples(rows, source, 0)


def test_a_picture_that_changed_in_its_file_is_another(tmp_path):
    """A run's manifest holds the contents of pictures, not their paths alone."""
    file = tmp_path / "a.png"
    for form in (str(file), {"bytes": None, "path": str(file)}):
        digests = []
        for seed in (0, 1, 0):
            picture(31, 20, seed).save(file)
            example = data.Example("a", "What?", ("This", "That"), 0, image=form)
            digests.append(data.pictures_digest([example]))
        assert digests[0] == digests[2] != digests[1]


def test_the_same_words_with_another_picture_are_another_example(tmp_path):
    """Ids and keys tell pictures apart, however they are stored."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageColumn

    files = []
    for seed in (0, 1):
        files.append(str(tmp_path / f"{seed}.png"))
        picture(31, 20, seed).save(files[-1])
    contents = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    words = {"question": ["What?"] * 3, "chosen": ["This"] * 3, "rejected": ["That"] * 3}
    forms = [contents, [{"bytes": None, "path": file} for file in files]]
    for form in forms:
        rows = Dataset.from_dict(
            words | {"image": [form[0], form[1], form[0]]},
            Features({**{key: Value("string") for key in words}, "image": ImageColumn()}),
        )
        rows.to_parquet(tmp_path / "rows.parquet")
        loaded, source = data.load("mine", "train", str(tmp_path / "rows.parquet"))
        examples = [data.read(loaded, source, index) for index in range(3)]
        first, other, again = examples
        assert first.id == again.id != other.id
        keys = list(map(data.question_key, examples))
        assert keys[0] == keys[2] != keys[1]
        assert len(data.examples(loaded, source, 0)) == 2
    in_memory = [data.question_key(asked(picture(31, 20, seed))) for seed in (0, 1, 0)]
    assert in_memory[0] == in_memory[2] != in_memory[1]


# -- where image tokens lie --


@pytest.fixture(scope="module")
def local_models():
    """Towers without attention: what an image token shows is in its own patch."""
    return {family: vlm_models.make(family, local=True) for family in FAMILIES}


def features(lm, image):
    """(image tokens, D) what the decoder sees of a picture, and the model's inputs."""
    item = prompts.encode(lm, asked(image), "plain")
    return capture(lm, item.inputs).embeds[0, item.image], item.inputs


def features_with_objects(lm, size):
    """The objects of `objects_in`; the same of a picture without and of one with each, which take
    one place of the prompt (1 + objects, image tokens, D); the inputs of the first."""
    things = [*objects_in(*size)]
    return things, *features_with(lm, size, things)


def features_with(lm, size, things):
    """The features of a picture without and of one with each of these objects, as above."""
    pictures = [with_object(size, thing) for thing in (None, *things)]
    item = prompts.encode(lm, asked(pictures[0]), "plain")
    inputs = vision.model_inputs(lm, [item.text] * len(pictures), pictures)
    assert all(ids.equal(item.inputs["input_ids"][0]) for ids in inputs["input_ids"])
    return capture(lm, inputs).embeds[:, item.image], item.inputs


def views_of(lm, boxes):
    """(tokens of one view, pixels of one token's side as the tower sees them)."""
    if lm.name == "tiny-llava-next":
        base = (TILE // PATCH) ** 2
        return [(boxes[:base], PATCH), (boxes[base:], PATCH)]
    return [(boxes, {"tiny-qwen2.5-vl": MERGED, "tiny-gemma-3": 56 // GRID}[lm.name])]


def touching(boxes, side, thing):
    """For each token whether the object is in its box for sure, and whether it may be.

    Between the two lies what resampling smears over an edge: two pixels of the picture or of what
    the tower sees, whichever is more.
    """
    known = [box for box in boxes if box]
    smear = [
        2 * max(1.0, max((b[2 + axis] - b[axis] for b in known), default=0) / side) + 1
        for axis in (0, 1)
    ]
    sure, maybe = [], []
    for box in boxes:
        if box is None:
            sure.append(False)
            maybe.append(False)
            continue
        overlap = [min(box[2 + a], thing[2 + a]) - max(box[a], thing[a]) for a in (0, 1)]
        sure.append(min(overlap) > 1)
        maybe.append(all(overlap[a] > -smear[a] for a in (0, 1)))
    return np.array(sure, bool), np.array(maybe, bool)


# LLaVA-NeXT: tiles side by side, one on another, two by two, three in a row; with padding at the
# sides and above, that fills whole patches or parts of one; exact multiples; enlarged; shrunk.
PICTURES = [
    (56, 56),
    (112, 112),
    (56, 28),
    (84, 28),
    (28, 84),
    (120, 40),
    (100, 60),
    (60, 100),
    (150, 31),
    (31, 150),
    (97, 53),
    (200, 190),
    (640, 427),
    (427, 640),
    (20, 15),
    (333, 90),
]


def objects_in(width, height):
    """Rectangles in the corners, at the edges, in the middle; thin and thick ones."""
    for left, top, right, bottom in (
        (0, 0, 0.2, 0.3),
        (0.8, 0.7, 1, 1),
        (0.4, 0.4, 0.6, 0.6),
        (0, 0.45, 1, 0.6),
        (0.55, 0, 0.7, 1),
        (0.3, 0.7, 0.45, 0.95),
    ):
        box = (
            round(left * width),
            round(top * height),
            round(right * width),
            round(bottom * height),
        )
        if box[0] < box[2] and box[1] < box[3]:
            yield box


@pytest.mark.parametrize("size", PICTURES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_that_change_with_an_object_are_those_whose_boxes_it_touches(
    local_models, family, size
):
    lm = local_models[family]
    things, (plain, *seen), inputs = features_with_objects(lm, size)
    boxes = vision.token_boxes(lm, inputs, size, len(plain))
    assert len(boxes) == len(plain)
    uncertain = total = 0
    for thing, shown in zip(things, seen, strict=True):
        changed = ((shown - plain).norm(dim=-1) > 1e-4 * plain.norm(dim=-1)).numpy()
        start = 0
        for part, side in views_of(lm, boxes):
            here = changed[start : start + len(part)]
            start += len(part)
            sure, maybe = touching(part, side, thing)
            assert (here | ~sure).all(), (thing, np.flatnonzero(sure & ~here))
            assert (maybe | ~here).all(), (thing, np.flatnonzero(here & ~maybe))
            uncertain, total = uncertain + (maybe & ~sure).sum(), total + len(part)
    assert uncertain < 0.45 * total


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("llava-next", (56, 56)),
        ("llava-next", (84, 28)),
        ("llava-next", (28, 84)),
        ("qwen2.5-vl", (56, 56)),
        ("qwen2.5-vl", (112, 84)),
        ("qwen2.5-vl", (56, 140)),
        ("gemma-3", (56, 56)),
    ],
)
def test_without_resampling_the_boxes_are_exact(local_models, family, size):
    """A picture that the processor takes as it is: one pixel of an object tells its token."""
    lm = local_models[family]
    random, things = np.random.default_rng(0), []
    for _ in range(25):
        x, y = random.integers(0, size[0] - 1), random.integers(0, size[1] - 1)
        right, low = (
            min(start + random.integers(1, 30), end)
            for start, end in zip((x, y), size, strict=True)
        )
        things.append((x, y, right, low))
    (plain, *with_things), inputs = features_with(lm, size, things)
    boxes = vision.token_boxes(lm, inputs, size, len(plain))
    tiles = (TILE // PATCH) ** 2 if family == "llava-next" else 0
    seen = np.zeros(len(plain) - tiles, int)
    for thing, shown in zip(things, with_things, strict=True):
        changed = (shown != plain).any(-1).numpy()[tiles:]
        expected = [
            box is not None
            and all(min(box[2 + a], thing[2 + a]) > max(box[a], thing[a]) for a in (0, 1))
            for box in boxes[tiles:]
        ]
        assert changed.tolist() == expected
        seen += expected
    assert (seen > 0).mean() > 0.7 and (seen < 25).all()


@pytest.mark.parametrize("size", [(56, 56), (90, 30), (30, 90), (97, 53), (500, 3)])
def test_llava_next_base_view_tiles_and_row_ends(local_models, size):
    lm = local_models["llava-next"]
    plain, inputs = features(lm, picture(*size))
    boxes = vision.token_boxes(lm, inputs, size, len(plain))
    base, tiles = boxes[:16], boxes[16:]
    covers(base, size)
    row_end = lm.model.model.image_newline
    assert [box is None for box in boxes] == (plain == row_end).all(-1).tolist()
    rows = tiles.count(None)
    if not rows:  # so narrow that not one row of patches is left of the tiles
        assert not tiles and size == (500, 3)
        return
    assert len(tiles) % rows == 0
    columns = len(tiles) // rows
    assert all(tiles[index] is None for index in range(columns - 1, len(tiles), columns))
    covers([box for box in tiles if box], size)


def covers(boxes, size):
    """The boxes lie side by side and leave nothing of the picture out, but for cut-off edges."""
    width, height = size
    assert all(
        0 <= x0 < x1 <= width + 1e-6 and 0 <= y0 < y1 <= height + 1e-6 for x0, y0, x1, y1 in boxes
    )
    area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
    assert 0.85 * width * height <= area <= width * height * 1.001
    for i, one in enumerate(boxes):
        for two in boxes[:i]:
            assert min(one[2], two[2]) - max(one[0], two[0]) < 1e-6 * width or (
                min(one[3], two[3]) - max(one[1], two[1]) < 1e-6 * height
            )


@pytest.mark.parametrize("size", [(56, 56), (90, 30), (30, 90), (97, 53), (400, 3)])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "gemma-3"])
def test_one_grid_over_the_whole_picture(local_models, family, size):
    lm = local_models[family]
    plain, inputs = features(lm, picture(*size))
    boxes = vision.token_boxes(lm, inputs, size, len(plain))
    covers(boxes, size)
    assert boxes == sorted(boxes, key=lambda box: (box[1], box[0]))  # row by row
    if family == "gemma-3":
        assert len(boxes) == GRID**2
    else:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        assert len(boxes) == rows * columns // 4
        assert (columns > rows) == (size[0] > size[1])


def test_an_unknown_layout_has_no_boxes(local_models):
    """Several crops, or a part of the picture: nothing is claimed of where the tokens lie."""
    lm = local_models["gemma-3"]
    plain, inputs = features(lm, picture(60, 40))
    two = dict(inputs, pixel_values=inputs["pixel_values"].repeat(4, 1, 1, 1))
    assert vision.token_boxes(lm, two, (60, 40), 4 * len(plain)) == [None] * 4 * len(plain)
    assert vision.token_boxes(lm, inputs, (60, 40), 15) == [None] * 15
    lm.processor.image_processor.do_center_crop = True
    try:
        assert vision.token_boxes(lm, inputs, (60, 40), 16) == [None] * 16
    finally:
        lm.processor.image_processor.do_center_crop = None


def test_a_wrong_number_of_tokens_is_an_error(local_models):
    lm = local_models["llava-next"]
    plain, inputs = features(lm, picture(60, 40))
    with pytest.raises(UserError, match="image tokens where its layout gives"):
        vision.token_boxes(lm, inputs, (60, 40), len(plain) + 1)


def test_a_processors_template_writes_the_same_date_tomorrow(local_models):
    lm = local_models["llava-next"]
    plain = prompts.encode(lm, asked(picture(60, 40)), "chat")
    template = "On {{ strftime_now('%Y-%m-%d') }}. " + lm.processor.chat_template
    settings = PromptSettings("chat", chat_template=template)
    dated = prompts.encode(lm, asked(picture(60, 40)), settings)
    assert dated.text == "On 2024-07-26. " + plain.text


def test_padding_on_the_left_for_pictures_of_several_sizes(local_models):
    for lm in local_models.values():
        items = [
            prompts.encode(lm, asked(picture(*size, seed), "Why? " * (seed + 1)), "chat")
            for seed, size in enumerate([(60, 40), (30, 90)])
        ]
        inputs = vision.model_inputs(
            lm, [item.text for item in items], [item.example.image for item in items]
        )
        longest = max(len(item.prompt_ids) for item in items)
        assert inputs["input_ids"].shape == (2, longest)
        for row, item in enumerate(items):
            length = len(item.prompt_ids)
            assert inputs["input_ids"][row, longest - length :].tolist() == item.prompt_ids
            assert inputs["attention_mask"][row].tolist() == (
                [0] * (longest - length) + [1] * length
            )


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "PA", "I;16", "CMYK", "F"])
def test_a_huge_picture_is_shrunk_before_it_is_copied(monkeypatch, tmp_path, mode):
    """By a whole factor, each pixel the mean of its square; others stay as they are."""
    left_half = np.zeros((40, 60), np.uint8)
    left_half[:, :30] = 255
    picture = Image.fromarray(left_half)
    if mode == "I;16":
        picture = Image.fromarray(left_half.astype(np.uint16) * 257)
    else:
        picture = picture.convert("P").convert(mode) if mode == "PA" else picture.convert(mode)
    example = data.Example("a", "q", ("b", "c"), 0, image=picture)
    expected = left_half[:, :, None].repeat(3, 2)
    assert np.array_equal(np.asarray(vision.open_image(example)), expected)
    monkeypatch.setattr(vision, "LARGEST_PICTURE", 700)  # of 2400 pixels: a factor of 2
    shrunk = np.asarray(vision.open_image(example))
    assert shrunk.shape == (20, 30, 3)
    assert np.array_equal(shrunk, expected[::2, ::2])


def test_a_shrunk_picture_is_still_turned_upright(monkeypatch, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.jpg", exif=exif)
    example = data.Example("a", "q", ("b", "c"), 0, image=str(tmp_path / "a.jpg"))
    assert vision.open_image(example).size == (40, 60)
    monkeypatch.setattr(vision, "LARGEST_PICTURE", 700)
    assert vision.open_image(example).size == (20, 30)
