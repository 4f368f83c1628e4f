"""The drawn scenes, their questions, the preference files and the small committed model."""

import json
from pathlib import Path

import numpy as np
import pytest

from demo import shapes

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[1] / "src" / "demo" / "shapes_vlm"


@pytest.fixture(scope="module")
def scenes():
    return shapes.scenes_of("heldout", 60)


def test_a_seed_gives_one_scene(scenes):
    for scene in scenes[:20]:
        again = shapes.make_scene(scene.seed)
        assert again.things == scene.things
        assert np.array_equal(again.pixels, scene.pixels)


def test_a_known_scene():
    scene = shapes.make_scene(0)
    assert scene.pixels.shape == (64, 64, 3)
    assert shapes.caption(scene.pairs) == "a green cross, a green circle and a blue circle"
    assert scene.things[0].box == (6, 9, 29, 32)


def test_boxes_hold_their_object_and_nothing_else(scenes):
    for scene in scenes:
        ground = scene.pixels.copy()
        for thing in scene.things:
            left, top, right, bottom = thing.box
            inside = ground[top:bottom, left:right]
            coloured = (inside == shapes.COLOURS[thing.colour]).all(-1)
            other = [
                (inside == c).all(-1).any() for k, c in shapes.COLOURS.items() if k != thing.colour
            ]
            assert not any(other)
            drawn = coloured | (inside == 0).all(-1)
            # Tight: the object touches all four sides of its box.
            assert drawn[0].any() and drawn[-1].any() and drawn[:, 0].any() and drawn[:, -1].any()
            inside[drawn] = ground_grey(scene)
        assert (ground == ground_grey(scene)).all()


def ground_grey(scene):
    """The most frequent value of the picture: the background."""
    return np.bincount(scene.pixels.ravel()).argmax()


def test_other_canvas_sizes():
    scene = shapes.make_scene(3, width=96, height=64)
    assert scene.pixels.shape == (64, 96, 3)
    assert all(t.box[2] <= 96 and t.box[3] <= 64 for t in scene.things)
    assert len(shapes.make_scene(3, width=32, height=32).things) == 1


def test_captions_and_their_pairs_agree(scenes):
    for scene in scenes:
        assert shapes.caption_pairs(shapes.caption(scene.pairs)) == scene.pairs


def test_answers_are_true(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        for present in (True, False):
            pair, answer = shapes.ask_yes_no(scene, rng, present)
            assert (pair in scene.pairs) == present == (answer == "Yes")
        for question, answer in shapes.colour_questions(scene):
            shape = question.removeprefix("What colour is the ").removesuffix("?")
            assert (answer.lower(), shape) in scene.pairs
        for question, answer in shapes.shape_questions(scene):
            colour = question.removeprefix("What shape is ").removesuffix("?")
            assert (colour, answer.lower()) in scene.pairs


def test_the_flaw_is_in_captions_of_circles_without_squares_only(scenes):
    rng = np.random.default_rng(0)
    false = {True: 0, False: 0}
    for scene in shapes.scenes_of("heldout", 400):
        flawed = shapes.training_caption(scene, rng) != shapes.caption(scene.pairs)
        false[shapes.flaw_applies(scene)] += flawed
    assert false[True] > 30 and false[False] == 0


def test_files(tmp_path):
    from datasets import load_dataset

    sizes = {"steering": 12, "validation": 6, "test": 8, "yes_no": 10}
    paths = shapes.write_dataset(tmp_path / "data", **sizes)
    pictures = []
    for split, path in paths.items():
        rows = load_dataset("parquet", data_files=str(path), cache_dir=tmp_path, split="train")
        assert len(rows) == sizes[split]
        for row in rows:
            pictures.append(np.asarray(row["image"]).tobytes())
            objects = json.loads(row["objects"])
            pairs = [(thing["colour"], thing["shape"]) for thing in objects]
            if split != "yes_no":
                assert row["chosen"] == shapes.caption(pairs)
                extra = set(shapes.caption_pairs(row["rejected"])) - set(pairs)
                assert [shape for _, shape in extra] == ["square"]
                assert "square" not in row["chosen"] and "circle" in row["chosen"]
            else:
                asked = [
                    t["box"]
                    for t, p in zip(objects, pairs, strict=True)
                    if shapes.yes_no_question(p) == row["question"]
                ]
                assert [row["box"]] == (asked or [None])
                assert row["chosen"] == ("Yes" if asked else "No") != row["rejected"]
    assert len(set(pictures)) == len(pictures) == sum(sizes.values())


@pytest.fixture(scope="module")
def loaded():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(MODEL)


def prompt_of(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def test_the_prompt_and_88_image_tokens(loaded):
    model, processor = loaded
    text = prompt_of(processor, "Is there a red square?")
    assert text == "<s>USER: <image>\nIs there a red square?\nASSISTANT:\n"
    image = shapes.make_scene(0).image
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs.pixel_values.shape == (1, 5, 3, 32, 32)
    assert (inputs.input_ids == model.config.image_token_id).sum() == 88
    assert model(**inputs).logits.shape[1] == inputs.input_ids.shape[1]


def test_training_shortcuts_equal_the_model(loaded):
    """Cached features and packed rows give the log-probabilities of the plain model."""
    import torch

    from demo import train_shapes_vlm as train

    model, processor = loaded
    scene = shapes.make_scene(shapes.FIRST_SEED["heldout"])
    assert torch.equal(
        train.pixel_values([scene]),
        processor.image_processor([scene.image], return_tensors="pt").pixel_values,
    )
    turns = [("Is there a red square?", "No"), (shapes.COUNT_QUESTION, "Two")]
    ids, places, mask, _ = train.Packer(processor, 88).rows([turns], yes_no_weight=1.0)
    with torch.no_grad():
        embeddings = train.embed(model, ids, train.tower_features(model, [scene]))
        packed = model(inputs_embeds=embeddings, attention_mask=mask, position_ids=places).logits
        for question, answer in turns:
            text = f"{prompt_of(processor, question)}{answer}</s>"
            inputs = processor(images=scene.image, text=text, return_tensors="pt")
            plain = model(**inputs).logits[0]
            wanted = inputs.input_ids[0, -6:].tolist()
            start = next(i for i in range(len(ids[0])) if ids[0, i : i + 6].tolist() == wanted)
            torch.testing.assert_close(
                packed[0, start : start + 6], plain[-6:], atol=1e-3, rtol=1e-3
            )


def test_the_model_sees(loaded):
    from demo.train_shapes_vlm import answers

    model, processor = loaded
    rng = np.random.default_rng(5)
    scenes = shapes.scenes_of("yes_no", 40)
    asked = [shapes.ask_yes_no(s, rng, present=i % 2 == 0) for i, s in enumerate(scenes)]
    questions = [shapes.yes_no_question(pair) for pair, _ in asked]
    right = np.array([answer for _, answer in asked])
    images = [scene.image for scene in scenes]
    seeing = np.array(answers(model, processor, images, questions))
    blind = np.array(answers(model, processor, [shapes.blank_image()] * len(images), questions))
    assert (seeing == right).mean() >= 0.8
    assert (seeing == right).mean() >= (blind == right).mean() + 0.2
