"""Image-text models of three families: everything that holds for words holds for pictures.

What is expected comes from the model's own forward, on one example and one answer at a time.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from helpers import vlm_models
from helpers.families import SIZES as DECODER
from helpers.families import randomise
from helpers.reference import layer_outputs, relative
from helpers.vlm_models import FAMILIES, asked, picture, rotated, saved
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from grains import ablation, generation, logprobs, models, prompts, replay, settings, vision
from grains.attribution import attribute
from grains.errors import UserError
from grains.packing import pack
from grains.replay import capture, capture_pack, without_prefix
from grains.scoring import score
from grains.settings import AttributionSettings
from grains.steering import Configuration, steered

pytestmark = pytest.mark.slow

SIZES = [(64, 64), (90, 30), (30, 90), (200, 77), (19, 33)]
ANSWERS = {
    "different": ("Two red cups", "A dog, I think"),
    "common beginning": ("A dog on the table", "A dog under it"),
    "one a prefix of the other": ("A dog", "A dog and a cat"),
}
MAX_TOKENS = 2048


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(request):
    return vlm_models.make(request.param)


@pytest.fixture(
    scope="module", params=[(f, a) for f in FAMILIES for a in ("sdpa", "eager")], ids="-".join
)
def either(request):
    """Every family with sdpa and with eager attention."""
    return vlm_models.make(*request.param)


def encode(lm, size=(90, 30), answers="different", seed=0, style="chat", **options):
    example = asked(picture(*size, seed), choices=ANSWERS[answers], **options)
    return prompts.encode(lm, example, style)


# -- the reference --


def own_inputs(item, response):
    """A prompt with its picture and a response behind it, as the model takes them."""
    inputs = dict(item.inputs)
    behind = torch.tensor([response], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], behind], dim=1)
    for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(behind, fill)], dim=1)
    return inputs


def own_logits(lm, item, response):
    with torch.no_grad():
        return lm.model(**own_inputs(item, response), use_cache=False).logits[0].float()


def own_forward(lm, item, response):
    """What enters layer 0 (the words' embeddings and the picture's features), every output, and
    the logits (T, V)."""
    with torch.no_grad(), layer_outputs(lm) as states:
        logits = lm.model(**own_inputs(item, response), use_cache=False).logits[0].float()
    return [state[0] for state in states], logits


def own_states(lm, item, response):
    return own_forward(lm, item, response)[0]


def own_log_likelihood(lm, item, response):
    scores = own_logits(lm, item, response)[len(item.prompt_ids) - 1 : -1].log_softmax(-1)
    return scores[range(len(response)), response].sum().item()


def from_embeds(lm, item, response, prompt, states=False):
    """log P(response) of (R, P, D) embeddings and image features that take the prompt's place."""
    inputs = own_inputs(item, response)
    behind = lm.model.get_input_embeddings()(torch.tensor([response]))
    rows = len(prompt)
    embeds = torch.cat([prompt, behind.expand(rows, -1, -1)], dim=1)
    options = {}
    if "image_grid_thw" in inputs:
        positions, _ = lm.model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        options["position_ids"] = positions.expand(-1, rows, -1)
    if "token_type_ids" in inputs:
        options["token_type_ids"] = inputs["token_type_ids"].expand(rows, -1)
    if states:
        with torch.no_grad(), layer_outputs(lm) as read:
            lm.model(inputs_embeds=embeds, use_cache=False, **options)
        return read
    scores = lm.model(
        inputs_embeds=embeds, use_cache=False, logits_to_keep=len(response) + 1, **options
    ).logits.float()
    targets = torch.tensor(response)[None, :, None].expand(rows, -1, 1)
    return scores[:, :-1].log_softmax(-1).gather(-1, targets).sum((1, 2))


def objective(lm, item):
    return lambda prompt: (
        from_embeds(lm, item, item.responses[0], prompt)
        - from_embeds(lm, item, item.responses[1], prompt)
    )


def merged(lm, item):
    """(P, D) what the decoder sees of the prompt."""
    return own_states(lm, item, [])[0]


def difference(found, expected):
    return (found - expected).abs().max().item()


# -- the reference agrees with itself, and the models are no trivial ones --


def test_embeds_stand_for_words_and_picture(vlm):
    item = encode(vlm)
    for response in item.responses:
        found = from_embeds(vlm, item, response, merged(vlm, item)[None])
        assert found.item() == pytest.approx(own_log_likelihood(vlm, item, response), abs=1e-3)


def test_every_part_of_the_picture_counts(vlm):
    """Logits move by far more than the tolerances when one image token does."""
    item = encode(vlm)
    prompt = merged(vlm, item)
    places = item.image.nonzero()[:, 0]
    one_moved = prompt.repeat(len(places), 1, 1)
    one_moved[range(len(places)), places] += prompt[places].roll(1, 0)
    changes = objective(vlm, item)(one_moved) - objective(vlm, item)(prompt[None])
    assert changes.abs().quantile(0.1) > 1e-2 and changes.abs().median() > 0.05


# -- prompts --


@pytest.mark.parametrize("style", prompts.STYLES)
@pytest.mark.parametrize("size", SIZES)
def test_positions_of_words_and_picture(vlm, size, style):
    item = encode(vlm, size, style=style)
    ids = item.inputs["input_ids"][0]
    assert item.image.any() and (ids[item.image] == vlm.image_token_id).all()
    assert not (item.image & item.words).any() and (item.content <= item.words).all()
    places = item.image.nonzero()[:, 0]
    assert (places.diff() == 1).all()  # one picture, in one piece
    assert vlm.tokenizer.decode(ids[item.content]).strip() == item.example.question
    assert not set(ids[item.words].tolist()) & vlm.special_ids()
    assert item.text.count(vlm.processor.image_token) == 1
    bos = vlm.tokenizer.bos_token_id
    assert bos is None or (ids == bos).nonzero().tolist() == [[0]]
    if style != "chat":  # other words before the same picture
        return
    # what the model puts there are the picture's features
    features = vlm.model.get_image_features(
        **{
            key: value
            for key, value in item.inputs.items()
            if key in ("pixel_values", "image_sizes", "image_grid_thw")
        }
    ).pooler_output
    features = torch.cat(list(features)).flatten(0, -2)
    assert torch.equal(merged(vlm, item)[item.image], features)


def test_the_placeholder_is_framed_as_in_the_familys_template(vlm):
    around = []
    for style in ("chat", "plain"):
        item = prompts.encode(vlm, asked(picture(64, 64)), style)
        places = item.image.nonzero()[:, 0]
        ids = item.prompt_ids
        around.append(
            [
                vlm.tokenizer.convert_ids_to_tokens(ids[places[0] - 1]),
                vlm.tokenizer.convert_ids_to_tokens(ids[places[-1] + 1]),
            ]
        )
    if vlm.name != "tiny-llava-next":
        assert around[0] == around[1]
        assert {
            "tiny-qwen2.5-vl": ["<|vision_start|>", "<|vision_end|>"],
            "tiny-gemma-3": ["<start_of_image>", "<end_of_image>"],
        }[vlm.name] == around[0]


@pytest.mark.parametrize("style", prompts.STYLES)
def test_words_without_a_picture(vlm, style):
    item = prompts.encode(vlm, asked(None), style)
    assert not item.image.any() and "pixel_values" not in item.inputs
    assert vlm.tokenizer.decode(torch.tensor(item.prompt_ids)[item.content]).strip() == (
        item.example.question
    )
    (found,) = score(vlm, [item], [], MAX_TOKENS)
    for value, response in zip(found[0], item.responses, strict=True):
        assert value == pytest.approx(own_log_likelihood(vlm, item, response), abs=1e-3)


def test_text_that_holds_the_placeholder_is_refused(vlm):
    token = vlm.processor.image_token
    for example in (
        asked(picture(30, 30), f"{token}\nWhat is it?", id="seven"),
        asked(picture(30, 30), choices=("a", f"b {token}"), id="seven"),
        asked(None, f"What is {token}?", id="seven"),
    ):
        with pytest.raises(UserError, match=r"example seven.*stands for a picture"):
            prompts.encode(vlm, example, "chat")


def test_a_text_model_refuses_a_picture(make_tiny):
    with pytest.raises(
        UserError, match="example one has a picture, but tiny-llama reads text only"
    ):
        prompts.encode(make_tiny("llama"), asked(picture(30, 30)))


# -- capture, replay, pack, collate --


@pytest.mark.parametrize("size", SIZES)
def test_a_replay_is_the_models_own_forward(either, size):
    item = encode(either, size)
    response = item.responses[SIZES.index(size) % 2]  # of two lengths
    states, expected = own_forward(either, item, response)
    captured = capture(either, own_inputs(item, response))
    assert torch.equal(captured.embeds[0], states[0])
    for start in (0, 2):
        with torch.no_grad():
            final = replay.replay(either, states[start][None], captured.calls, start=start)
        assert difference(logprobs.logits(either, final)[0], expected) <= 1e-4


@pytest.mark.parametrize("answers", ANSWERS)
def test_packed_answers_are_separate_sequences(either, answers):
    item = encode(either, answers=answers)
    packed = pack(item.sequences())
    captured = capture_pack(either, item.inputs, packed)
    with torch.no_grad():
        found = logprobs.logits(either, replay.replay(either, captured.embeds, captured.calls))[0]
    for path, response in zip(packed.paths, item.responses, strict=True):
        assert difference(found[path], own_logits(either, item, response)) <= 1e-4


@pytest.mark.parametrize("place", ["before", "in", "behind"])
def test_what_comes_before_a_place_is_kept(either, place):
    """A picture whose tokens see each other both ways is kept as a whole or not at all."""
    item = encode(either)
    inside = item.image.nonzero()[:, 0].tolist()
    first = {"before": inside[0] - 1, "in": inside[3], "behind": inside[-1] + 2}[place]
    packed = pack(item.sequences())
    whole = capture_pack(either, item.inputs, packed)
    rest = without_prefix(either, whole, first)
    sees_ahead = "gemma" in either.name and place == "in"
    assert rest.start == (inside[0] if sees_ahead else first)
    with torch.no_grad():
        found = logprobs.logits(either, replay.replay(either, rest.embeds, rest.calls))[0]
    for path, response in zip(packed.paths, item.responses, strict=True):
        expected = own_logits(either, item, response)[rest.start :]
        assert difference(found[path[rest.start :] - rest.start], expected) <= 1e-4


def vectors_for(lm, seed=0, strength=8.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: strength
        * torch.nn.functional.normalize(torch.randn(lm.hidden_size, generator=generator), dim=0)
        for layer in (1, 3)
    }


def test_a_batch_of_sizes_is_one_at_a_time(either):
    """Sizes, aspect ratios and a question without picture; base and steered."""
    vectors = vectors_for(either)
    items = [
        encode(either, size, answers=answers, seed=seed)
        for seed, (size, answers) in enumerate(zip(SIZES, [*ANSWERS] * 2, strict=False))
    ]
    items.append(prompts.encode(either, asked(None), "chat"))
    grid = [
        Configuration("mean", "pos", (1, 3), 1.0, vectors),
        Configuration("mean", "pos", (3,), 1.0, {3: vectors[3]}),
    ]
    together = score(either, items, grid, MAX_TOKENS)
    for item, found in zip(items, together, strict=True):
        (alone,) = score(either, [item], grid, MAX_TOKENS)
        assert np.abs(found - alone).max() <= 1e-3
        # Of the base both answers, under each configuration one.
        for row, column, values in [
            (0, 0, {}),
            (0, 1, {}),
            *((1 + n, n, entry.vectors) for n, entry in enumerate(grid)),
        ]:
            with steered(either, values):
                expected = own_log_likelihood(either, item, item.responses[column])
            assert found[row, column] == pytest.approx(expected, abs=2e-3)
        assert np.abs(found[1:] - found[0]).max(axis=1).min() > 5e-3


# -- attribution --


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def start_of_path(lm, item, prompt, text, image, scope):
    """(P, D) where the path begins, put together from its parts; prompt: what `merged` gives."""
    matrix = lm.model.get_input_embeddings()(torch.arange(lm.head.weight.shape[0]))
    word = {"zeros": torch.zeros(lm.hidden_size), "mean": matrix.mean(0)}[text]
    moves = {
        "all": torch.ones_like(item.image),
        "image": item.image,
        "text": item.content,
        "content": item.content | item.image,
    }[scope]
    start = torch.where((moves & ~item.image)[:, None], word, prompt)
    if image == "blank":
        colour = np.median(np.asarray(item.example.image).reshape(-1, 3), axis=0).astype(np.uint8)
        blank = Image.new("RGB", item.example.image.size, tuple(map(int, colour)))
        features = merged(lm, prompts.encode(lm, asked(blank), "chat"))[item.image]
    else:
        features = torch.zeros_like(prompt[item.image])
        features += prompt[item.image].mean(0) if image == "mean" else 0
    start[item.image & moves] = features[moves[item.image]]
    return start


def rows_of_tiles(lm, item):
    """LLaVA-NeXT ends each row of tiles with a token that shows nothing: it is the same for a
    blank picture."""
    boxes = vision.token_boxes(lm, item.inputs, item.example.image.size, int(item.image.sum()))
    return boxes.count(None)


@pytest.mark.parametrize(
    ("text", "image", "scope"),
    [
        ("zeros", "zeros", "all"),
        ("mean", "blank", "content"),
        ("mean", "mean", "image"),
        ("mean", "blank", "text"),
    ],
)
def test_integrated_gradients_are_captums(either, text, image, scope):
    item = encode(either, answers="common beginning")
    settings = AttributionSettings(baseline=text, image_baseline=image, attribute=scope, ig_steps=3)
    (found,) = attribute(either, item, settings, MAX_TOKENS, generator())
    f, prompt = objective(either, item), merged(either, item)
    start = start_of_path(either, item, prompt, text, image, scope)
    expected = (
        IntegratedGradients(f)
        .attribute(
            prompt[None], start[None], n_steps=3, method="gausslegendre", internal_batch_size=3
        )[0]
        .sum(-1)
    )
    assert relative(found.scores, expected) <= 1e-3
    with torch.no_grad():
        assert found.difference == pytest.approx(
            (f(prompt[None]) - f(start[None])).item(), abs=1e-3
        )
    still = (start == prompt).all(-1).numpy()
    assert (found.scores[still] == 0).all() and (found.scores[~still] != 0).all()
    row_ends = 0 if image != "blank" or scope == "text" else rows_of_tiles(either, item)
    moves = {
        "all": torch.ones_like(item.image),
        "image": item.image,
        "text": item.content,
        "content": item.content | item.image,
    }[scope]
    assert still.sum() == (~moves).sum() + row_ends


@pytest.mark.parametrize("size", SIZES[1:3])  # wide and high
def test_scores_of_image_and_words_add_up(vlm, size):
    """Completeness over the merged sequence: every image token and every word has its share."""
    item = encode(vlm, size)
    (found,) = attribute(vlm, item, AttributionSettings(max_points=800), MAX_TOKENS, generator())
    prompt = merged(vlm, item)
    start = start_of_path(vlm, item, prompt, "mean", "blank", "content")
    f = objective(vlm, item)
    with torch.no_grad():
        expected = (f(prompt[None]) - f(start[None])).item()
    assert found.difference == pytest.approx(expected, abs=1e-3)
    assert found.scores.sum() == pytest.approx(expected, rel=0.051)
    moves = (start != prompt).any(-1)
    assert (found.scores[moves.numpy()] != 0).all()
    assert (item.image | item.content).sum() - moves.sum() == rows_of_tiles(vlm, item)


def test_vanilla_is_gradient_times_input(vlm):
    item = encode(vlm)
    (found,) = attribute(
        vlm, item, AttributionSettings(grad_method="vanilla"), MAX_TOKENS, generator()
    )
    prompt = merged(vlm, item).requires_grad_()
    (gradient,) = torch.autograd.grad(objective(vlm, item)(prompt[None]).sum(), prompt)
    assert relative(found.scores, (gradient * prompt).sum(-1).detach()) <= 1e-4
    assert (found.scores != 0).all()


# -- ablation and hidden states --


@pytest.mark.parametrize("image", settings.IMAGE_BASELINES)
def test_hidden_states_plain_and_ablated(vlm, image):
    item = encode(vlm)
    places = item.image.nonzero()[:, 0].tolist()
    chosen = [places[0], places[-1], item.content.nonzero()[0].item()]
    found = ablation.hidden_states(vlm, item, [chosen], MAX_TOKENS, "pad", image)
    prompt = merged(vlm, item)
    start = start_of_path(vlm, item, prompt, "zeros", image, "image")
    ablated = prompt.clone()
    ablated[chosen[:2]] = start[chosen[:2]]
    ablated[chosen[2]] = vlm.model.get_input_embeddings()(torch.tensor(vlm.tokenizer.pad_token_id))
    for number, response in enumerate(item.responses):
        for row, changed in enumerate((prompt, ablated)):
            states = from_embeds(vlm, item, response, changed[None], states=True)
            expected = torch.stack([state[0, -1] for state in states])
            assert relative(found.last[row, number], expected) <= 1e-4
            with torch.no_grad():
                value = from_embeds(vlm, item, response, changed[None]).item()
            assert found.log_likelihoods[row, number].item() == pytest.approx(value, abs=1e-3)
    assert (found.log_likelihoods[0] - found.log_likelihoods[1]).abs().min() > 1e-3


# -- steering --


def hooked(lm):
    """The modules with hooks (CLIP keeps some of its own, for its hidden states)."""
    return {
        name
        for name, module in lm.model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    }


def test_steering_touches_decoder_layers_alone(vlm):
    item = encode(vlm)
    inputs = {
        key: value
        for key, value in item.inputs.items()
        if key in ("pixel_values", "image_sizes", "image_grid_thw")
    }

    def features():
        with torch.no_grad():
            return torch.cat(list(vlm.model.get_image_features(**inputs).pooler_output))

    before, plain = features(), own_states(vlm, item, item.responses[0])
    scores = own_logits(vlm, item, item.responses[0])
    vectors, hooks = vectors_for(vlm), hooked(vlm)
    with steered(vlm, vectors):
        layers = [name.rpartition(".layers.") for name in hooked(vlm) - hooks]
        assert sorted(layer for *_, layer in layers) == ["1", "3"]
        assert {name for name, *_ in layers} == {"model.language_model"}
        assert torch.equal(features(), before)
        changed = own_states(vlm, item, item.responses[0])
        assert difference(own_logits(vlm, item, item.responses[0]), scores) > 0.1
    assert torch.equal(changed[0], plain[0]) and torch.equal(changed[1], plain[1])
    moved = plain[2] + vectors[1]
    expected = moved * (plain[2].norm(dim=-1) / moved.norm(dim=-1))[:, None]
    assert relative(changed[2], expected) <= 1e-5
    assert torch.allclose(changed[2].norm(dim=-1), plain[2].norm(dim=-1), rtol=1e-5)
    assert (changed[2] - plain[2]).norm(dim=-1).min() > 0.1  # image tokens and words alike
    assert torch.equal(own_logits(vlm, item, item.responses[0]), scores)
    assert hooked(vlm) == hooks


# -- generation --


def greedy(lm, item, count):
    """The most likely next token, again and again, without a cache."""
    tokens = []
    for _ in range(count):
        token = own_logits(lm, item, tokens)[-1].argmax().item()
        if token == lm.model.generation_config.eos_token_id:
            break
        tokens.append(token)
    return lm.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_generation_in_a_batch_is_one_at_a_time(either):
    """Left padding and several sizes; base and steered rows in one batch."""
    questions = ["What is on the table?", "Is there a dog in this picture, or a cat?", "Why?"]
    items = [
        prompts.encode(either, asked(picture(*size, seed), question), "chat")
        for seed, (size, question) in enumerate(zip(SIZES, questions, strict=False))
    ]
    vectors = vectors_for(either)
    grid = [Configuration("mean", "pos", (1, 3), 1.0, vectors)]
    hooks = hooked(either)
    together = generation.generate(either, items, grid, 3)
    for index, item in enumerate(items):
        alone = generation.generate(either, [item], grid, 3)
        assert [texts[index] for texts in together] == [texts[0] for texts in alone]
        assert together[0][index] == greedy(either, item, 3)
        with steered(either, vectors):
            assert together[1][index] == greedy(either, item, 3)
    assert together[0] != together[1] and hooked(either) == hooks
    assert len({*together[0], *together[1]}) > 3


def test_generation_with_and_without_pictures_in_one_batch(vlm):
    items = [encode(vlm), prompts.encode(vlm, asked(None), "chat"), encode(vlm, (64, 64), seed=4)]
    together = generation.generate(vlm, items, [], 3)
    assert together == [[greedy(vlm, item, 3) for item in items]]


# -- pictures of all kinds --


def kinds_of_pictures():
    """name -> what a data set stores, the RGB picture it shows."""
    base = picture(61, 40)
    grey, palette = base.convert("L"), base.quantize(16)
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(base.size))
    on_white = Image.composite(base, Image.new("RGB", base.size, "white"), alpha.getchannel("A"))
    large = picture(3000, 1800)
    return {
        "greyscale": (saved(grey), grey.convert("RGB")),
        "palette": (saved(palette), palette.convert("RGB")),
        "RGBA": (saved(alpha), on_white),
        "EXIF-rotated": (rotated(base), base),
        "1x1": (
            saved(Image.new("RGB", (1, 1), (9, 80, 200))),
            Image.new("RGB", (1, 1), (9, 80, 200)),
        ),
        "very large": (saved(large, "BMP"), large),
    }


@pytest.fixture(scope="module")
def pictures():
    return kinds_of_pictures()


@pytest.mark.parametrize(
    "kind", ["greyscale", "palette", "RGBA", "EXIF-rotated", "1x1", "very large"]
)
def test_kinds_of_pictures(vlm, pictures, kind):
    stored, shown = pictures[kind]
    item = prompts.encode(vlm, asked(stored), "chat")
    expected = prompts.encode(vlm, asked(shown), "chat")
    assert item.prompt_ids == expected.prompt_ids
    same = (item.inputs["pixel_values"] - expected.inputs["pixel_values"]).abs().max()
    assert same <= 0.03  # a level of 255, where transparency is rounded
    (found,) = score(vlm, [item], [], MAX_TOKENS)
    assert found[0, 0] == pytest.approx(own_log_likelihood(vlm, item, item.responses[0]), abs=1e-3)
    assert np.isfinite(found).all()
    boxes = vision.token_boxes(vlm, item.inputs, shown.size, int(item.image.sum()))
    assert any(boxes)


def test_a_broken_picture_names_the_example(vlm):
    """More of them in test_vision.py."""
    half = saved(picture(61, 40))["bytes"][:400]
    for stored in ("nowhere.png", {"bytes": half, "path": None}):
        with pytest.raises(UserError, match=r"example number-7: its picture"):
            prompts.encode(vlm, asked(stored, id="number-7"), "chat")


def test_a_picture_that_the_processor_refuses_names_the_example():
    """Qwen2.5-VL's takes no picture more than 200 times as long as wide."""
    with pytest.raises(UserError, match=r"example number-7: .*201x1.*aspect ratio"):
        prompts.encode(vlm_models.make("qwen2.5-vl"), asked(picture(201, 1), id="number-7"), "chat")


def test_pictures_200_times_as_long_as_wide(vlm):
    for size in ((200, 1), (1, 200), (900, 9)):
        item = prompts.encode(vlm, asked(picture(*size)), "chat")
        (found,) = score(vlm, [item], [], MAX_TOKENS)
        expected = own_log_likelihood(vlm, item, item.responses[0])
        assert found[0, 0] == pytest.approx(expected, abs=1e-3)
        boxes = vision.token_boxes(vlm, item.inputs, size, int(item.image.sum()))
        assert len(boxes) == item.image.sum()


# -- the picture matters --


@pytest.mark.parametrize("other", ["another", "blank"])
def test_another_picture_changes_everything(vlm, other):
    shown = picture(90, 30)
    changed = {"another": picture(90, 30, seed=1), "blank": vision.blank_like(shown)}[other]
    one, two = (prompts.encode(vlm, asked(image), "chat") for image in (shown, changed))
    assert one.prompt_ids == two.prompt_ids  # only pixels tell the two apart
    settings = AttributionSettings(baseline="mean", image_baseline="mean", ig_steps=4)
    scores = [
        attribute(vlm, item, settings, MAX_TOKENS, generator())[0].scores for item in (one, two)
    ]
    for part in (one.image, one.content):
        assert relative(scores[0][part.numpy()], scores[1][part.numpy()]) > 0.05
    likely = [score(vlm, [item], [], MAX_TOKENS)[0][0] for item in (one, two)]
    assert np.abs(likely[0] - likely[1]).min() > 0.02
    states = [ablation.hidden_states(vlm, item, [], MAX_TOKENS) for item in (one, two)]
    # (the first layer of Gemma-3 has a window that does not reach from the end to the picture)
    assert (states[0].last[0, :, 2:] - states[1].last[0, :, 2:]).norm(dim=-1).min() > 1e-2
    assert torch.equal(states[0].last[:, :, 0], states[1].last[:, :, 0])  # the last word itself
    assert relative(states[0].gradients[0], states[1].gradients[0]) > 1e-3
    texts = [generation.generate(vlm, [item], [], 8)[0][0] for item in (one, two)]
    assert texts[0] != texts[1]


def test_a_picture_given_in_place_of_the_examples_own(vlm):
    example, other = asked(picture(90, 30)), picture(90, 30, seed=1)
    found = prompts.encode(vlm, example, "chat", picture=other)
    expected = prompts.encode(vlm, asked(other), "chat")
    assert torch.equal(found.inputs["pixel_values"], expected.inputs["pixel_values"])


# -- the check at load time --


def test_a_model_from_a_folder_is_the_model(vlm, tmp_path):
    """Saved as the hub keeps it; Qwen2.5-VL's processor loads without torchvision."""
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    loaded = models.load(str(tmp_path), dtype="float32", device="cpu")
    assert type(loaded.model) is type(vlm.model)
    item, again = encode(vlm), encode(loaded)
    assert item.text == again.text and item.responses == again.responses
    for key, value in item.inputs.items():
        assert torch.equal(value, again.inputs[key])
    assert torch.equal(
        own_logits(loaded, again, again.responses[0]), own_logits(vlm, item, item.responses[0])
    )


class ChangesImageTokens(torch.nn.Module):
    """A layer that changes image tokens where its model has noted them, as DeepStack does."""

    def __init__(self, layer, noted, change):
        super().__init__()
        self.layer, self.noted, self.change = layer, noted, change

    def forward(self, hidden_states, **kwargs):
        hidden_states = self.layer(hidden_states, **kwargs)
        where = self.noted.get("where")
        return hidden_states if where is None else self.change(hidden_states, where[..., None])


def changing(family, change):
    """A model that changes its image tokens between two layers."""
    model, processor = vlm_models.parts(family)
    decoder, noted = model.get_decoder(), {}
    own, kept = decoder.forward, decoder.layers
    changed = torch.nn.ModuleList(
        ChangesImageTokens(layer, noted, change) if index == 1 else layer
        for index, layer in enumerate(kept)
    )

    def note(module, args, kwargs):
        ids = kwargs.get("input_ids")
        noted["where"] = (
            (ids == model.config.image_token_id).float()
            if (ids is not None and kwargs.get("pixel_values") is not None)
            else None
        )

    def forward(*args, **kwargs):
        decoder.layers = changed
        try:
            return own(*args, **kwargs)
        finally:
            decoder.layers = kept

    model.register_forward_pre_hook(note, with_kwargs=True)
    decoder.forward = forward
    return model, processor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_does_more_with_pictures_is_refused(family):
    model, processor = changing(family, lambda states, where: states * (1 + where))
    models.wrap("text only", model, processor.tokenizer)  # with words it does nothing more
    with pytest.raises(UserError, match=r"with a picture.*does more than its layers do"):
        models.wrap("scales", model, processor.tokenizer, processor)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_adds_between_its_layers_is_replayed(family):
    model, processor = changing(family, lambda states, where: states + where)
    lm = models.wrap("adds", model, processor.tokenizer, processor)
    item = prompts.encode(lm, asked(picture(64, 40)), "chat")
    captured = capture(lm, item.inputs)
    assert list(captured.calls.added) == [2]
    assert torch.equal(captured.calls.added[2][0, :, 0] != 0, item.image)
    own = own_inputs(item, item.responses[0])
    with torch.no_grad():
        expected = model(**own).logits[0]
    captured = capture(lm, own)
    replayed = replay.replay(lm, captured.embeds, captured.calls)
    assert difference(logprobs.logits(lm, replayed)[0], expected) <= 1e-4


def test_what_qwen3_vl_adds_between_its_layers_is_replayed():
    """A real family that adds image features between its layers (DeepStack)."""
    tokenizer = vlm_models.tokenizer_of("qwen2.5-vl")
    token = tokenizer.convert_tokens_to_ids
    images = vlm_models.Qwen2VLImageProcessorPil(
        patch_size=16, min_pixels=4096, max_pixels=20 * 1024
    )
    processor = models.without_videos(Qwen3VLProcessor)(
        images, tokenizer, chat_template=vlm_models.CHATML
    )
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 16,
        "out_hidden_size": DECODER["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    sizes = DECODER | {
        "vocab_size": len(tokenizer),
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [2, 2, 2],
            "rope_theta": 100.0,
        },
    }
    config = Qwen3VLConfig(
        vision_config=vision_config,
        text_config=sizes,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = randomise(Qwen3VLForConditionalGeneration(config)).eval()
    lm = models.wrap("qwen3-vl", model, tokenizer, processor)
    item = prompts.encode(lm, asked(picture(64, 40), "What is it?", ("A dog", "A red cup")), "chat")
    captured = capture(lm, item.inputs)
    assert set(captured.calls.added) == {1, 2}  # behind the layers 0 and 1
    found = score(lm, [item], [], MAX_TOKENS)[0][0]
    for value, response in zip(found, item.responses, strict=True):
        with torch.no_grad():
            logits = model(**own_inputs(item, response)).logits[0].float()
        log_probs = logits.log_softmax(-1)[len(item.prompt_ids) - 1 : -1]
        expected = log_probs.gather(-1, torch.tensor(response)[:, None]).sum().item()
        assert value == pytest.approx(expected, abs=1e-3)


def test_a_processor_that_fails_or_a_picture_that_is_not_found_is_refused():
    model, processor = vlm_models.parts("llava-next")
    with pytest.raises(UserError, match="cannot be given a picture"):
        models.wrap("broken", model, processor.tokenizer, object())
    model.config.image_token_id -= 1
    with pytest.raises(UserError, match="stand for a picture are not found"):
        models.wrap("elsewhere", model, processor.tokenizer, processor)
