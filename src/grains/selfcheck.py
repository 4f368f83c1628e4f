"""The self-check at load time: does a replay of the layers give the model's own results?"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice

import torch
from PIL import Image
from torch import Tensor, nn

from grains import decoding, prompts, sampling
from grains.calls import own_logits, states_of
from grains.data import Example
from grains.errors import UserError, refusing
from grains.lm import LanguageModel, LogitShape, kept_with_model
from grains.logprobs import logits
from grains.packing import pack
from grains.quantized import holds_packed
from grains.replay import capture, capture_pack, extend, replay, without_prefix
from grains.settings import DecodingSettings
from grains.steering import BASE

# How much a replay's log-probabilities may differ from the model's own: root mean square over the
# vocabulary, at the worst position, in nats. SmolLM2's own forward changes by 0.1 in bfloat16 (by
# 0.6 for the worst of its 49,152 words) and by 0.01 in float16 when more text follows.
SELF_CHECK_TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 0.3, torch.float16: 0.05}
# Sizes in a config at which what a layer sees changes: a text longer than each is checked, up to
# this many tokens.
BORDERS = re.compile("window|chunk|block|floor_scale|index")
LONGEST_CHECK = 16384
COMPARED = 8  # last positions of a prompt that are compared
STEPS = 3  # tokens that are decoded to compare
SHORT = 512  # tokens that cost little
# How far the gradient of a quantised layer may be off, as a share; 16 bits round by 1 %.
GRADIENT_TOLERANCE = 0.1


def check_replay(lm: LanguageModel) -> LanguageModel:
    """How this model must be replayed for its own results, or UserError if no way gives them.

    A text goes through the model's own forward, and through a replay of two packed sequences that
    stops and resumes in the middle. Where the two differ, each sequence is replayed on its own, and
    the model's own forward makes the logits from the last hidden states; if that differs too, the
    model is refused. The text is longer than any window, chunk or block of the config. For an
    image-text model a picture is in the prompt of a second check.
    Returns the model with the ways in which it can be replayed.
    """
    with refusing(
        f"{lm.name}: its decoder layers cannot be replayed", "this architecture is not supported"
    ):
        return _checked(lm)


def _checked(lm: LanguageModel) -> LanguageModel:
    short = _text_prompt(lm, 4)
    words = _words(lm, 32)
    responses = [words[4:6], words[6:30]]
    lm = replace(lm, marks_prompts=_must_mark(lm, short, responses))
    expected, states = _own(lm, short, responses)
    if not lm.own_head:
        lm = _with_its_end(lm, states[0][-len(expected[0]) :], expected[0])
    captured = capture(lm, short)
    lm = replace(
        lm,
        packs=not _length_matters(lm),
        own_embeddings=not _looks_up(lm, short, captured.embeds),
        resumes=not captured.calls.hand_on,
    )
    cases = [(short, expected, "")]
    if lm.own_embeddings:
        packs = lm.packs and _embeds_alone(lm, short, responses)
        lm = replace(lm, packs=packs)
    for border in _borders(lm):
        # Longer than a short border several times: what a layer drops there may show late.
        prompt = _text_prompt(lm, border + 3 if border > SHORT else 3 * border)
        cases.append((prompt, _own(lm, prompt, responses)[0], f" on {border} tokens"))
    if lm.processor is not None:
        prompt = _picture_prompt(lm)
        cases.append((prompt, _own(lm, prompt, responses)[0], " with a picture"))

    for prompt, own, where in cases:
        _check_causal(lm, prompt, own, where)

    def differences(lm: LanguageModel) -> Iterator[tuple[float, str]]:
        for prompt, own, where in cases:
            yield _difference(lm, prompt, responses, own), where

    # The fastest way comes first; a way implies that those after it are right too.
    ways = [(True, True), (True, False)] if lm.packs else []
    for packs, keeps_prefix in [*ways, (False, False)]:
        lm = replace(lm, packs=packs, keeps_prefix=keeps_prefix)
        try:
            if packs and all(worst <= _limit(lm) for worst, _ in differences(lm)):
                break
        except Exception:  # a layer that cannot be called with packed sequences, or with a cache
            continue
    if not lm.packs:
        worst, where = max(differences(lm))
        if not worst <= _limit(lm):
            raise UserError(
                f"{lm.name}: a replay of its decoder layers{where} differs from the model's own "
                f"log-probabilities by {worst:.2g} (at most {_limit(lm):g} expected): its forward "
                "does more than its layers do, so it would be attributed and steered wrongly; not "
                "supported"
            )
        lm = replace(lm, batches=_can_batch(lm, short, responses))
        if not (lm.batches or lm.resumes):  # rows one at a time would read what another filled
            raise UserError(
                f"{lm.name}: its layers hand on more than hidden states, and its rows cannot be "
                "computed together; this architecture is not supported"
            )
    if lm.quantization:
        _check_gradients(lm, short)
    return lm


def _with_its_end(lm: LanguageModel, states: Tensor, expected: Tensor) -> LanguageModel:
    """The model with what makes logits (n, V) of the last layer's output (n, D): norm and head,
    these and a shape of each logit, or its own forward."""
    if _distance(logits(lm, states), expected) <= _limit(lm):
        return lm
    shaped = replace(lm, logit_shape=_logit_shape(lm, states))
    if shaped.logit_shape and _distance(logits(shaped, states), expected) <= _limit(lm):
        return shaped
    return replace(lm, own_head=True)


def _logit_shape(lm: LanguageModel, states: Tensor) -> LogitShape | None:
    """What the model seems to do to each logit, seen where its head gives 1, 2^10 and 2^20.

    Scale and cap are numbers of its config, or one divided by them: in 16 bits what is seen is not
    exact. None where none of them is what is seen.
    """
    probes = torch.tensor([1.0, 2.0**10, 2.0**20], device=states.device)
    given = probes[:, None].expand(-1, lm.head.out_features).to(lm.dtype)
    low, middle, high = own_logits(lm, states[:3], lambda _: given[None])[:, -1].tolist()
    known = {1.0}
    for value in lm.model.config.get_text_config().to_dict().values():
        if isinstance(value, (int, float)) and value > 0:
            known |= {float(value), 1 / value}

    def nearest(seen: float) -> float:
        number = min(known, key=lambda number: abs(number - seen))
        return number if abs(number - seen) <= 0.01 * seen else math.nan

    is_capped = high < 2 * middle
    cap = nearest(high) if is_capped else math.inf
    if not low > 0 or (is_capped and not low < cap):
        return None
    shape = LogitShape(nearest(cap * math.atanh(low / cap) if is_capped else low), cap)
    return None if math.isnan(shape.scale) or math.isnan(cap) else shape


def _check_causal(lm: LanguageModel, prompt: dict, own: list[Tensor], where: str) -> None:
    """Raise UserError if what follows a prompt changes the model's own logits of the prompt."""
    apart = _apart(prompt, own)
    if not apart <= _limit(lm):
        advice = "not supported"
        if lm.quantization:
            advice = (
                f"its layers ({lm.quantization}) round what passes through them; give a model "
                "whose weights alone are quantised"
            )
        raise UserError(
            f"{lm.name}: its log-probabilities{where} change by {apart:.2g} with the words that "
            f"follow, so an answer has no likelihood of its own; {advice}"
        )


def _apart(prompt: dict, own: list[Tensor]) -> float:
    """How far the logits of a prompt's last positions are apart with two responses behind it."""
    before = min(COMPARED, prompt["input_ids"].shape[1])
    return _distance(own[0][:before], own[1][:before])


def _must_mark(lm: LanguageModel, prompt: dict, responses: list[list[int]]) -> bool:
    """Whether words of type 0 see what follows, unless that is of type 1."""
    if "token_type_ids" not in inspect.signature(lm.model.forward).parameters:
        return False
    prompt = prompt | {"token_type_ids": torch.zeros_like(prompt["input_ids"])}
    plain, marked = (
        _apart(prompt, _own(replace(lm, marks_prompts=marks), prompt, responses)[0])
        for marks in (False, True)
    )
    return marked <= _limit(lm) < plain


def _check_gradients(lm: LanguageModel, prompt: dict) -> None:
    """Raise UserError if the gradient of a quantised layer is not that of what it computes.

    One layer of each kind is asked, with what the model calls it with: its output y = W x + b
    is followed along x, which changes <y, y> as much as its gradient says, since it is linear.
    """
    called: dict[type, tuple[nn.Module, Tensor]] = {}

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        called.setdefault(type(module), (module, args[0]))

    handles = [
        module.register_forward_hook(note) for module in lm.layers.modules() if holds_packed(module)
    ]
    with torch.no_grad():
        lm.model(**prompt, use_cache=False)
    for handle in handles:
        handle.remove()
    for module, states in called.values():
        entering = states.detach().clone().requires_grad_()
        output = module(entering)
        towards = output.detach()
        said = 0.0
        if output.requires_grad:
            total = (output.float() * towards.float()).sum()
            (gradient,) = torch.autograd.grad(total, entering)
            said = (gradient.float() * states.float()).sum().item()
        with torch.no_grad():
            step = module(1.5 * states).float() - module(0.5 * states).float()
        change = (step * towards.float()).sum().item()
        if not abs(said - change) <= GRADIENT_TOLERANCE * abs(change):
            raise UserError(
                f"{lm.name}: the gradients of its quantised layers ({lm.quantization}, "
                f"{type(module).__name__}) are not those of what they compute, so it would be "
                "attributed wrongly; not supported"
            )


def _embeds_alone(lm: LanguageModel, prompt: dict, responses: list[list[int]]) -> bool:
    """Whether a word's embedding does not depend on its place, for a model that makes its own.

    Raises UserError if it depends on the other words: a word could not be replaced alone.
    """
    ids = prompt["input_ids"]
    with_pad = ids.clone()
    with_pad[0, 0] = lm.replacement_id()
    plain, changed = (capture(lm, prompt | {"input_ids": some}).embeds for some in (ids, with_pad))
    if not _close(plain[:, 1:], changed[:, 1:]):
        raise UserError(
            f"{lm.name}: its embeddings of a word depend on the words before it, so words cannot "
            "be replaced one by one; not supported"
        )
    packed = pack([ids[0].tolist() + response for response in responses])
    together = capture(lm, extend(prompt, packed.tokens[ids.shape[1] :].tolist())).embeds
    return all(
        _close(together[:, path], capture(lm, extend(prompt, response)).embeds)
        for path, response in zip(packed.paths, responses, strict=True)
    )


def _close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first.float(), second.float(), rtol=1e-3, atol=1e-6)


def _limit(lm: LanguageModel) -> float:
    return SELF_CHECK_TOLERANCE[lm.dtype]


def _words(lm: LanguageModel, count: int) -> list[int]:
    """Ordinary tokens: the first ids of a vocabulary are often special or single bytes."""
    vocabulary = min(lm.head.out_features, lm.embed.weight.shape[0])
    special = lm.special_ids() | lm.image_ids()
    first = vocabulary // 7
    in_order = chain(range(first, vocabulary), range(first))
    return list(islice((token for token in in_order if token not in special), min(count, 256)))


def _text_prompt(lm: LanguageModel, length: int) -> dict:
    words = _words(lm, length)
    # In a long text each round of the words is shifted by one, so that it is not periodic: a wrong
    # position shows.
    order = [(index + index // len(words)) % len(words) for index in range(length)]
    ids = torch.tensor([[words[place] for place in order]], device=lm.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _borders(lm: LanguageModel) -> list[int]:
    """Lengths at which what a layer sees changes, by the model's config."""
    config = lm.model.config.get_text_config().to_dict()
    longest = min(LONGEST_CHECK, (lm.max_positions or LONGEST_CHECK) - 16)
    sizes = {
        value
        for name, value in config.items()
        if BORDERS.search(name) and isinstance(value, int) and not isinstance(value, bool)
    }
    lengths = [size for size in sorted(sizes) if 4 < size <= longest]
    return lengths[-1:]  # a text longer than the longest is longer than all


@torch.no_grad()
def _looks_up(lm: LanguageModel, prompt: dict, entering: Tensor) -> bool:
    """Whether what enters layer 0 (1, T, D) is what the embedding module gives."""
    looked_up = lm.embed(prompt["input_ids"])
    return entering.shape == looked_up.shape and _close(entering, looked_up)


def _length_matters(lm: LanguageModel) -> bool:
    """Whether rotary embeddings depend on the length of the whole row (dynamic, longrope)."""
    rope = getattr(lm.model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(item, dict) for item in rope.values()) else [rope]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


@torch.no_grad()
def _own(
    lm: LanguageModel, prompt: dict, responses: list[list[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The model's own logits (n, V) for each response, and its last layer's output (T, D).

    The logits are those of the response and of the end of the prompt: all would not fit.
    """
    outputs: list[Tensor] = []
    handle = lm.layers[-1].register_forward_hook(
        lambda module, args, output: outputs.append(states_of(lm, output)[0])
    )
    try:
        own = [
            lm.model(
                **extend(prompt, response, lm.marks_prompts),
                use_cache=False,
                logits_to_keep=len(response) + COMPARED,
            )
            .logits[0]
            .float()
            for response in responses
        ]
    finally:
        handle.remove()
    if not all(scores.isfinite().all() for scores in own):
        raise UserError(
            f"{lm.name}: it gives NaN or infinite logits in {lm.dtype} on a short text: its "
            "weights are damaged, or too large for that precision; try dtype float32 or bfloat16"
        )
    return own, outputs


def _distance(actual: Tensor, expected: Tensor) -> float:
    """Of log-probabilities: root mean square over the vocabulary, at the worst position."""
    apart = actual.log_softmax(-1).to(expected.device) - expected.log_softmax(-1)
    worst = apart.square().mean(-1).sqrt().max().item()
    return math.inf if math.isnan(worst) else worst  # max() would pass over a NaN


@torch.no_grad()
def _difference(
    lm: LanguageModel, prompt: dict, responses: list[list[int]], expected: list[Tensor]
) -> float:
    """How far a replay is from the model's own log-probabilities.

    It resumes in the middle of the layers, and behind a prefix that is kept if the model keeps it.
    """
    ids = prompt["input_ids"][0].tolist()
    packed = pack([ids + response for response in responses])
    whole = capture_pack(lm, prompt, packed)
    captured = without_prefix(lm, whole, len(ids) // 2)
    middle = len(lm.layers) // 2
    half = replay(lm, captured.embeds, captured.calls, stop=middle)
    final = replay(lm, half, captured.calls, start=middle)
    worst = 0.0
    for path, scores in zip(packed.paths, expected, strict=True):
        nodes = path[-len(scores) :]
        computed = nodes >= captured.start
        actual = logits(lm, final[0, (nodes[computed] - captured.start).to(final.device)])
        worst = max(worst, _distance(actual, scores[computed.to(scores.device)]))
    return worst


@torch.no_grad()
def _can_batch(lm: LanguageModel, prompt: dict, responses: list[list[int]]) -> bool:
    """Whether two rows of hidden states that are computed together are as if each was alone."""
    ids = prompt["input_ids"][0].tolist()
    captured = capture_pack(lm, prompt, pack([ids + response for response in responses]))
    rows = torch.cat([captured.embeds, 0.5 * captured.embeds])
    try:
        together = logits(lm, replay(lm, rows, captured.calls))
    except Exception:  # layers whose arguments are made for one row
        return False
    alone = torch.cat([logits(lm, replay(lm, row[None], captured.calls)) for row in rows])
    return max(_distance(*pair) for pair in zip(together, alone, strict=True)) <= _limit(lm)


@torch.no_grad()
def _decode(lm: LanguageModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first row continued by the model's own decoding: ids (T,), logits (STEPS, V) in fp32."""
    with sampling.nothing_else_acts(lm):
        output = lm.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **({"token_type_ids": torch.zeros_like(ids)} if lm.marks_prompts else {}),
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=lm.replacement_id(),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[0], torch.stack([step[0].float() for step in output.logits])


@kept_with_model
@torch.no_grad()
def check_decoding(lm: LanguageModel) -> None:
    """Raise UserError if the model's own decoding is not what its forward says.

    Asked when a model first writes: of some families in transformers it is not.
    """
    with refusing(f"{lm.name}: its own decoding fails on a short text", "it cannot write here"):
        length = max([7, *(size + 3 for size in _borders(lm) if size <= SHORT)])
        text = _text_prompt(lm, length)["input_ids"]
        rows = torch.cat([text, text.flip(1)])
        written, steps = _decode(lm, rows, torch.ones_like(rows))
        prompt = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        whole = extend(prompt, written[text.shape[1] : -1].tolist(), lm.marks_prompts)
        own = lm.model(**whole, use_cache=False).logits[0, -STEPS:]
        greedy = torch.equal(written[-STEPS:], steps.argmax(-1))
        if not greedy or not _distance(steps, own.float()) <= _limit(lm):
            raise UserError(
                f"{lm.name}: its own decoding gives other log-probabilities than its forward, so "
                "what it writes would be wrong; not supported"
            )


@kept_with_model
@torch.no_grad()
def can_pad(lm: LanguageModel) -> bool:
    """Whether the model's own decoding of a text behind padding is that of the text alone.

    Asked when prompts of different lengths are first decoded together.
    """
    text = _text_prompt(lm, 7)["input_ids"]
    padding = torch.full((1, 3), lm.replacement_id(), device=text.device)
    shorter = torch.cat([padding, text], dim=1)
    ids = torch.cat([shorter, text.flip(1).repeat(1, 2)[:, : shorter.shape[1]]])
    mask = torch.ones_like(ids)
    mask[0, : padding.shape[1]] = 0
    _, alone = _decode(lm, text, torch.ones_like(text))
    try:
        _, together = _decode(lm, ids, mask)
    except Exception:  # layers that cannot be masked
        return False
    return _distance(together, alone) <= _limit(lm)


@kept_with_model
@torch.no_grad()
def can_decode(lm: LanguageModel) -> bool:
    """Whether rows of a running batch (see `decoding`) get the logits that each text gets alone.

    Asked when texts are first written. The batch has a row that leaves, rows that enter later, a
    longer one and one that begins as another does among them.
    """
    if lm.marks_prompts:  # the running batch reads prompts causally
        return False
    words = _text_prompt(lm, 40)["input_ids"][0].tolist()
    prompts_and_limits = [
        (words[:12], 9),
        (words[20:25], 3),
        (words[:9] + words[30:38], 4),
        (words[:10] + words[14:18], 5),
    ]
    how = sampling.choosing(lm, DecodingSettings())
    rows = [
        decoding.Row(ids, BASE, sampling.Choice(lm, how, ids, limit), limit)
        for ids, limit in prompts_and_limits
    ]
    decoder = decoding.Decoder(lm, 4096)
    decoder.ends = frozenset()
    steps = []
    try:
        for row in rows[:2]:
            decoder.submit(row)
        steps += [*decoder.step(), *decoder.step()]
        for row in rows[2:]:
            decoder.submit(row)
        while not decoder.idle:
            steps += decoder.step()
    except Exception:  # a cache that holds other things than keys and values
        return False
    for row in rows:
        ids = torch.tensor([row.prompt_ids + row.new], device=lm.device)
        own = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        together = torch.stack([step.logits.float() for step in steps if step.row is row])
        if not _distance(together, own[0, len(row.prompt_ids) - 1 : -1].float()) <= _limit(lm):
            return False
    return True


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
