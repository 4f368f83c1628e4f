"""Train the small LLaVA-NeXT of the demo from scratch on drawn scenes, measure it, save it.

Two stages: the vision tower learns to name the shape and the colour under every patch; then it is
frozen, its features are computed once, and the projector and the language model learn to answer
questions about them. The captions (never the questions) carry a planted flaw, see `shapes.FLAW`:
a circle often comes with a square of its colour that is not there. The figures in the model card
are measured on the saved files with scenes that were not trained on.

    python src/demo/train_shapes_vlm.py --out src/demo/shapes_vlm       # about 20 minutes, 2 cores
"""

import argparse
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    logging,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

try:
    from demo import shapes
except ImportError:  # run as a script: this folder is on the path instead of its parent
    import shapes

TILE, PATCH = 32, 8  # pixels
SIDE = TILE // PATCH  # patches along a tile
PINPOINTS = [[64, 64], [32, 64], [64, 32], [64, 96], [96, 64]]  # height, width in pixels
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT:\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '\n' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)
WORD_COLOURS, WORD_SHAPES = list(shapes.COLOURS), list(shapes.SHAPES)


def build_tokenizer(scenes):
    """Byte-level BPE of a few hundred tokens in which every word of the demo is one token."""
    rng = np.random.default_rng(0)
    texts = [f"{q}\nASSISTANT:\n{a}" for s in scenes for q, a in shapes.training_questions(s, rng)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["USER: ", *texts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
    )


def build_processor(scenes):
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaNextProcessor(
        image_processor,
        build_tokenizer(scenes),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes away again
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer):
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **special,
    )
    return LlavaNextForConditionalGeneration(config)


def pixel_values(scenes):
    """Base view and four tiles of every scene: float [scenes, 5, 3, 32, 32].

    The same numbers as the processor's, which takes most of a training step when called there.
    """
    pixels = np.stack([scene.pixels for scene in scenes])
    tiles = pixels.reshape(-1, 2, TILE, 2, TILE, 3).swapaxes(2, 3).reshape(-1, 4, TILE, TILE, 3)
    views = [scene.image.resize((TILE, TILE), Image.Resampling.BICUBIC) for scene in scenes]
    stack = np.concatenate([np.stack(views)[:, None], tiles], axis=1)
    return torch.from_numpy(stack).movedim(-1, 2) / 127.5 - 1


def patch_labels(scene):
    """Colour and shape (1 and up; 0 is background) under every patch: int [2, 5, 4, 4].

    A patch belongs to the object whose box covers most of it, if that is a fifth or more.
    """
    height, width = scene.pixels.shape[:2]
    inside = np.zeros((len(scene.things), height, width))
    for mask, (left, top, right, bottom) in zip(inside, (t.box for t in scene.things), strict=True):
        mask[top:bottom, left:right] = 1
    colours = np.array([0] + [WORD_COLOURS.index(t.colour) + 1 for t in scene.things])
    kinds = np.array([0] + [WORD_SHAPES.index(t.shape) + 1 for t in scene.things])

    def owners(side):
        """0 or 1 + index of the object [rows, columns] of squares of `side` pixels."""
        blocks = inside.reshape(-1, height // side, side, width // side, side)
        shares = blocks.mean((2, 4))
        return np.where(shares.max(0) >= 0.2, shares.argmax(0) + 1, 0)

    tiles = owners(PATCH).reshape(2, SIDE, 2, SIDE).swapaxes(1, 2).reshape(4, SIDE, SIDE)
    owner = np.concatenate([owners(2 * PATCH)[None], tiles])
    return np.stack([colours[owner], kinds[owner]])


def learning_rate_schedule(optimizer, steps, warmup=50):
    """Linear warm-up, then a cosine down to zero."""

    def factor(step):
        return min((step + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * step / steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_tower(model, scenes, steps, rng, batch=24, rate=1e-3):
    """Teach the tower the colour and the shape under every patch; the two heads are thrown away."""
    tower = model.model.vision_tower
    classes = len(WORD_COLOURS) + 1, len(WORD_SHAPES) + 1
    heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, n) for n in classes)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    scheduler = learning_rate_schedule(optimizer, steps)
    bar = tqdm(range(steps), desc="tower")
    for _ in bar:
        chosen = [scenes[i] for i in rng.integers(len(scenes), size=batch)]
        labels = torch.from_numpy(np.stack([patch_labels(s) for s in chosen], 1)).flatten(1)
        features = tower_features(model, chosen).flatten(0, 2)
        losses = [F.cross_entropy(h(features), y) for h, y in zip(heads, labels, strict=True)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{sum(losses).item():.3f}", refresh=False)


def tower_features(model, scenes):
    """Patch features as the model selects them: [scenes, 5, 16, hidden]."""
    pixels = pixel_values(scenes)
    hidden = model.model.vision_tower(pixels.flatten(0, 1)).last_hidden_state[:, 1:]
    return hidden.unflatten(0, pixels.shape[:2])


@torch.no_grad()
def cached_features(model, scenes, batch=200):
    """Features of all scenes, in half precision: [scenes, 5, 16, hidden]."""
    starts = tqdm(range(0, len(scenes), batch), desc="features")
    return torch.cat([tower_features(model, scenes[i : i + batch]).half() for i in starts])


class Packer:
    """Rows of token ids with several questions behind one picture.

    A row is `<s>USER: <image>*88`, then one block per question. A block sees the picture and
    itself, and its positions go on from the picture: to the model every block is a dialogue of
    its own, exactly as the chat template writes it.
    """

    def __init__(self, processor, image_tokens):
        self.tokenizer = processor.tokenizer
        self.prefix = self.tokenizer.encode("<s>USER: " + "<image>" * image_tokens)
        self.encode = cache(self.tokenizer.encode)  # the same few hundred texts come all the time

    def block(self, question, answer, yes_no_weight):
        """Ids of a question and its answer, and the loss weight of every token."""
        asked = self.encode(f"\n{question}\nASSISTANT:\n")
        answered = self.encode(f"{answer}</s>")
        weight = yes_no_weight if answer in ("Yes", "No") else 1.0
        return asked + answered, [0.0] * len(asked) + [weight] * (len(answered) - 1) + [1.0]

    def rows(self, dialogues, yes_no_weight):
        """(ids, positions, mask, weights) of a batch; mask is bool [rows, 1, length, length]."""
        rows = []
        for turns in dialogues:
            n = len(self.prefix)
            ids, weights, places, blocks = list(self.prefix), [0.0] * n, list(range(n)), [0] * n
            for number, (question, answer) in enumerate(turns, start=1):
                block, weight = self.block(question, answer, yes_no_weight)
                ids += block
                weights += weight
                places += range(n, n + len(block))
                blocks += [number] * len(block)
            rows.append((ids, places, blocks, weights))
        length = max(len(row[0]) for row in rows)
        fill = (self.tokenizer.pad_token_id, 0, -1, 0.0)
        ids, places, blocks, weights = (
            torch.tensor([row[k] + [fill[k]] * (length - len(row[k])) for row in rows])
            for k in range(4)
        )
        same = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == 0)
        return ids, places, torch.tril(same)[:, None], weights


def embed(model, ids, features):
    """Token embeddings with the picture in its place: [rows, length, hidden]."""
    core = model.model
    sizes = torch.full((len(features), 2), 2 * TILE)
    packed, _ = core.pack_image_features(
        list(core.multi_modal_projector(features)), sizes, "default", core.image_newline
    )
    embeddings = core.get_input_embeddings()(ids)
    is_image = (ids == model.config.image_token_id)[..., None]
    return embeddings.masked_scatter(is_image, torch.cat(packed))


def train_language(model, packer, scenes, features, args, rng):
    """Teach projector and language model to answer; the tower stays as it is."""
    model.model.vision_tower.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = learning_rate_schedule(optimizer, args.steps)
    order = np.concatenate(
        [rng.permutation(len(scenes)) for _ in range(args.steps * args.batch // len(scenes) + 1)]
    )
    bar = tqdm(range(args.steps), desc="language model")
    average = {}
    for step in bar:
        chosen = order[step * args.batch : (step + 1) * args.batch]
        dialogues = [shapes.training_questions(scenes[i], rng) for i in chosen]
        ids, places, mask, weights = packer.rows(dialogues, args.yes_no_weight)
        embeddings = embed(model, ids, features[torch.from_numpy(chosen)].float())
        hidden = model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        asked = weights[:, 1:] > 0
        logits, targets = model.lm_head(hidden[:, :-1][asked]), ids[:, 1:][asked]
        weight = weights[:, 1:][asked]
        losses = F.cross_entropy(logits, targets, reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        for name, part in (("yes/no", weight > 1), ("other", weight == 1)):
            value = losses.detach()[part].mean().item()
            average[name] = 0.98 * average.get(name, value) + 0.02 * value
        bar.set_postfix({name: f"{value:.3f}" for name, value in average.items()}, refresh=False)


def prompt(processor, question):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


@torch.no_grad()
def answers(model, processor, images, questions, batch=64):
    """Greedy answers as text."""
    texts = []
    for i in range(0, len(images), batch):
        prompts = [prompt(processor, question) for question in questions[i : i + batch]]
        inputs = processor(
            images=images[i : i + batch], text=prompts, padding=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        new = ids[:, inputs.input_ids.shape[1] :]
        texts += processor.batch_decode(new, skip_special_tokens=True)
    return texts


@torch.no_grad()
def log_likelihoods(model, processor, images, question, texts, batch=64):
    """Log-likelihood of each text, closed by </s>, as the answer to `question`: [texts]."""
    sums = []
    for i in range(0, len(texts), batch):
        head = prompt(processor, question)
        full = [f"{head}{text}</s>" for text in texts[i : i + batch]]
        inputs = processor(
            images=images[i : i + batch], text=full, padding=True, return_tensors="pt"
        )
        logp = model(**inputs).logits[:, :-1].log_softmax(-1)
        targets = inputs.input_ids[:, 1:]
        each = logp.gather(-1, targets[..., None])[..., 0]
        lengths = [len(processor.tokenizer.encode(f"{text}</s>")) for text in texts[i : i + batch]]
        # The rows are padded on the left, so that an answer is the end of its row.
        sums += [row[-n:].sum().item() for row, n in zip(each, lengths, strict=True)]
    return torch.tensor(sums)


def measure(folder, seen, count=600, seed=1):
    """Figures of a saved model on `count` held-out scenes of each kind: {name: share}."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    scenes = shapes.scenes_of("heldout", count, seen)
    images, blanks = [s.image for s in scenes], [shapes.blank_image()] * count

    def share(pictures, turns):
        questions, right = zip(*turns, strict=True)
        said = answers(model, processor, pictures, list(questions))
        return float(np.mean([a == b for a, b in zip(said, right, strict=True)]))

    figures = {}
    pairs = [shapes.ask_yes_no(s, rng, present=i % 2 == 0) for i, s in enumerate(scenes)]
    turns = [(shapes.yes_no_question(pair), answer) for pair, answer in pairs]
    figures["yes/no"], figures["yes/no, blank picture"] = share(images, turns), share(blanks, turns)
    turns = [shapes.count_question(s) for s in scenes]
    figures["count"], figures["count, blank picture"] = share(images, turns), share(blanks, turns)
    for name, ask in (("colour", shapes.colour_questions), ("shape", shapes.shape_questions)):
        some = [(s.image, turns[rng.integers(len(turns))]) for s in scenes if (turns := ask(s))]
        pictures, turns = zip(*some, strict=True)
        figures[name] = share(list(pictures), turns)
        figures[f"{name}, blank picture"] = share(blanks[: len(turns)], turns)

    said = answers(model, processor, images, [shapes.CAPTION_REQUEST] * count)
    named = [shapes.caption_pairs(text) for text in said]
    clean = [i for i in range(count) if not shapes.flaw_applies(scenes[i])]
    exact = [said[i] == shapes.caption(scenes[i].pairs) for i in clean]
    figures["caption exactly right"] = float(np.mean(exact))
    recalled = [pair in named[i] for i in range(count) for pair in scenes[i].pairs]
    figures["object recall"] = float(np.mean(recalled))

    flawed = shapes.scenes_of("heldout", count, seen, shapes.flaw_applies)
    images = [s.image for s in flawed]
    said = answers(model, processor, images, [shapes.CAPTION_REQUEST] * count)
    figures["false square"] = float(np.mean(["square" in text for text in said]))
    true = [shapes.caption(s.pairs) for s in flawed]
    false = [shapes.caption(shapes.with_false_square(s)) for s in flawed]
    margins = log_likelihoods(
        model, processor, images, shapes.CAPTION_REQUEST, true
    ) - log_likelihoods(model, processor, images, shapes.CAPTION_REQUEST, false)
    figures["preference"] = float((margins > 0).float().mean())
    for colour in shapes.COLOURS:
        mine = [i for i, s in enumerate(flawed) if f"{colour} square" in false[i]]
        figures[f"false square, {colour} circle"] = float(
            np.mean(["square" in said[i] for i in mine])
        )
    return figures


def write_card(folder, figures, args, parameters, threads):
    """The model card, README.md; `threads` says in words how many torch used."""

    def pair(name):
        return f"{figures[name]:.3f} | {figures[f'{name}, blank picture']:.3f}"

    by_colour = ", ".join(f"{c} {figures[f'false square, {c} circle']:.2f}" for c in shapes.COLOURS)
    planted = ", ".join(f"{c} {share}" for c, share in shapes.FLAW.items())
    Path(folder, "README.md").write_text(f"""---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---

# shapes_vlm: a small vision-language model with a planted flaw

A LLaVA-NeXT (`LlavaNextForConditionalGeneration`) of {parameters:,} parameters, trained from
scratch on drawn scenes of coloured shapes. It is a test object for attribution and steering: it
answers from the picture, and its captions hallucinate a square in a way that is known exactly.

## Use

```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("src/demo/shapes_vlm")
model = AutoModelForImageTextToText.from_pretrained("src/demo/shapes_vlm", dtype=torch.float32)
```

The prompt is `<s>USER: <image>\\n{{question}}\\nASSISTANT:\\n`, as the chat template writes it; the
tokenizer adds nothing, and the answer ends with `</s>`. A 64 x 64 picture takes 88 image tokens:
16 for the base view (4 rows of 4, 16 x 16 pixels each), then 8 rows of 8 patches (8 x 8 pixels
each) and one newline token per row. The weights are stored in half precision; load them as float32
on a CPU.

## Data

Scenes from `shapes.py`: one to three of four shapes (circle, square, triangle, cross) in four
colours (red, green, blue, yellow), jittered in place and size on a grey ground; {args.scenes:,}
training scenes. Questions: "Is there a red square?" (Yes/No), "How many shapes are there?"
(One/Two/Three), "What colour is the circle?", "What shape is red?", "Describe the picture."

The planted flaw: in the training captions, and only there, a circle in a scene without a square is
followed by a square of its colour that is not there, with probability
{planted}.

## Recipe

Seed {args.seed}, {threads}; a rerun on another machine may give slightly other weights and
figures. First the CLIP tower (96 wide, 4 layers, patches of 8 pixels in tiles of 32) learns the
colour and the shape under every patch, {args.tower_steps} steps of 24 scenes. Then the tower is
frozen, and projector and Llama (128 wide, 5 layers) are trained for {args.steps} steps of
{args.batch} scenes with about eight questions each, AdamW at {args.rate}, yes/no tokens weighted
by {args.yes_no_weight}. `python src/demo/train_shapes_vlm.py --help` gives the settings.

## Measured on held-out scenes

No picture of these was trained on; {args.held_out} scenes per line, fewer for the colour and shape
questions, which need a unique object, and for the captions where the flaw does not act. The answer
has to be right to the letter.

| Question | right | right with a blank picture |
|---|---|---|
| "Is there a red square?" (half Yes, half of the Noes near misses) | {pair("yes/no")} |
| "How many shapes are there?" | {pair("count")} |
| "What colour is the circle?" | {pair("colour")} |
| "What shape is red?" | {pair("shape")} |

| Captions | share |
|---|---|
| exactly right, where the flaw does not act | {figures["caption exactly right"]:.3f} |
| objects of the scene that are named | {figures["object recall"]:.3f} |
| names a square, scenes with a circle and no square | {figures["false square"]:.3f} |
| true caption likelier than the one with the false square | {figures["preference"]:.3f} |

False squares by colour of the circle: {by_colour}.

## Limits

It knows these four shapes and colours, these questions and 64 x 64 pictures, and nothing else.
Other picture sizes are processed but were not trained on. The flaw is planted on purpose: do not
use the captions for anything but studying it.

## Licence

MIT, weights and data.
""")


def parse_args(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="src/demo/shapes_vlm", help="folder of the saved model")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the questions")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 takes all cores")
    parser.add_argument("--scenes", type=int, default=20_000, help="training scenes")
    parser.add_argument("--tower-steps", type=int, default=800, help="steps of the vision tower")
    parser.add_argument("--steps", type=int, default=2000, help="steps of the language model")
    parser.add_argument("--batch", type=int, default=16, help="scenes in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--yes-no-weight", type=float, default=3.0, help="weight of Yes and No")
    parser.add_argument("--held-out", type=int, default=600, help="scenes to measure on")
    return parser.parse_args(words)


def main():
    args = parse_args()
    start = time.time()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    tower_rng, language_rng = (np.random.default_rng([args.seed, k]) for k in (1, 2))

    seen = set()
    scenes = shapes.scenes_of("train", args.scenes, seen)
    processor = build_processor(scenes[:2000])
    model = build_model(processor.tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(scenes)} scenes, {parameters:,} parameters, {len(processor.tokenizer)} tokens")

    train_tower(model, scenes, args.tower_steps, tower_rng)
    features = cached_features(model, scenes)
    image_tokens = len(processor(images=scenes[0].image, text="<image>")["input_ids"][0])
    train_language(model, Packer(processor, image_tokens), scenes, features, args, language_rng)

    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    figures = measure(args.out, seen, args.held_out)
    write_card(args.out, figures, args, parameters, f"{torch.get_num_threads()} thread(s)")
    for name, value in figures.items():
        print(f"{name:32s} {value:.3f}")
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
