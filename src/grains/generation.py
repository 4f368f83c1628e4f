"""Texts of many prompts, by the base model and under many configurations.

They are written by the running batch of `decoding`, where it gives what the model's own decoding
does; by the model's own decoding otherwise: prompts with a picture, and models whose cache holds
more than keys and values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, StoppingCriteria

from grains import positions, sampling, vision
from grains.decoding import Decoder, Row, Step, by_row, take, text_of, where_steered
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.sampling import Choice
from grains.scoring import batches
from grains.selfcheck import can_decode, can_pad, check_decoding
from grains.settings import AblationSettings, DecodingSettings
from grains.steering import BASE, Configuration, compute_for, steered

# Decoding keeps only keys and values, much less than the activations of a whole forward, and its
# time is spent on reading the weights. So its batches hold this many times more positions.
WIDTH = 8


@dataclass(frozen=True)
class Written:
    """One text. prompt: its number. configuration: its number, 0 the base. draw: its number among
    the texts of this prompt. ended: eos (by an end token), stop (by a stop text) or length.
    tokens: the number of its tokens.
    """

    prompt: int
    configuration: int
    draw: int
    text: str
    ended: str
    tokens: int


def decoding_batches(
    encoded: list[Encoded],
    configurations: list[Configuration],
    max_new_tokens: int,
    max_tokens: int,
) -> list[list[int]]:
    """Indices of prompts that are a unit of a run, continued by the base and all configurations.

    max_tokens: the number of positions in a batch of a whole forward (see `scoring.batches`).
    """
    rows = 1 + len(configurations)
    return batches(
        [rows * (len(item.prompt_ids) + max_new_tokens) for item in encoded], WIDTH * max_tokens
    )


def generate(
    lm: LanguageModel,
    encoded: list[Encoded],
    configurations: list[Configuration],
    max_new_tokens: int,
    settings: DecodingSettings | None = None,
) -> list[list[str]]:
    """Continue every prompt, by the base model and under each configuration.

    settings: by default greedy, and nothing else acts.
    Returns 1 + len(configurations) lists of texts, the base first; of num_return texts for each
    prompt, those of a prompt stand together. Raises as `write`.
    """
    settings = settings or DecodingSettings()
    texts = [[""] * (len(encoded) * settings.num_return) for _ in range(1 + len(configurations))]
    for item in write(lm, encoded, configurations, max_new_tokens, settings):
        place = item.prompt * settings.num_return + item.draw
        texts[item.configuration][place] = item.text
    return texts


@torch.inference_mode()
def write(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    configurations: Sequence[Configuration],
    max_new_tokens: int,
    settings: DecodingSettings,
    max_tokens: int = AblationSettings.batch_tokens,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Written]:
    """The texts of all prompts under the base model and all configurations, as they end.

    Prompts enter the batch by their length, each with all its texts.
    max_new_tokens: the tokens of a text at most; a text ends too where the model's context does.
    max_tokens: the number of positions in a batch of a whole forward; decoding has `WIDTH` times
        as many.
    progress: called with the number of tokens that were written.
    Raises UserError for a limit longer than the model's context, and as `sampling.choosing`.
    """
    check_limit(lm, max_new_tokens)
    how = sampling.choosing(lm, settings)
    everything = [BASE, *configurations]
    for item in encoded:
        _check_positions(item, configurations)
    rows: list[tuple[Encoded, Row]] = []
    for number in sorted(range(len(encoded)), key=lambda i: (len(encoded[i].prompt_ids), i)):
        item = encoded[number]
        ids = item.prompt_ids
        limit = row_limit(lm, ids, max_new_tokens)
        for draw in range(settings.num_return):
            for place, configuration in enumerate(everything):
                numbers = sampling.generator(settings.seed, item.example.id, draw)
                choice = Choice(lm, how, ids, limit, numbers)
                name = (number, place, draw)
                row = Row(ids, configuration, choice, limit, settings.stop, name, item.image)
                rows.append((item, row))
    has_picture = [bool(item.image.any()) for item in encoded]
    by_model = has_picture if not all(has_picture) and can_decode(lm) else [True] * len(encoded)
    together = [row for _, row in rows if not by_model[row.name[0]]]
    others = [(item, row) for item, row in rows if by_model[row.name[0]]]
    positions_at_once = WIDTH * max_tokens
    for row in chain(
        _in_a_running_batch(lm, together, positions_at_once, progress),
        _by_the_model(lm, others, positions_at_once, progress),
    ):
        number, place, draw = row.name
        yield Written(number, place, draw, text_of(lm, row), row.ended, len(row.new))


def stream(
    lm: LanguageModel,
    encoded: Encoded,
    configurations: Sequence[Configuration],
    max_new_tokens: int,
) -> Iterator[list[str]]:
    """The greedy texts of one prompt as they are written, by the base model and each configuration.

    Yields 1 + len(configurations) texts after every step of their batch, the base first; the last
    are those of `generate`. Raises UserError as `write`, and for a prompt with a picture where a
    configuration steers the vision tower, as the batch has one tower.
    """
    check_limit(lm, max_new_tokens)
    _check_positions(encoded, configurations)
    if encoded.image.any() and any(item.tower for item in configurations):
        raise UserError(
            "vectors that steer the vision tower give other pictures than the base model's, so "
            "their answers cannot be streamed beside its: write them whole, by generate"
        )
    how = sampling.choosing(lm, DecodingSettings())
    ids = encoded.prompt_ids
    limit = row_limit(lm, ids, max_new_tokens)
    rows = [
        Row(ids, configuration, Choice(lm, how, ids, limit), limit, image=encoded.image)
        for configuration in (BASE, *configurations)
    ]
    by_model = encoded.image.any() or not can_decode(lm)
    room = WIDTH * AblationSettings.batch_tokens
    for _ in _model_steps(lm, encoded, rows) if by_model else _steps(lm, rows, room):
        # The last character of a text that goes on may be half of one.
        texts = [text_of(lm, row) for row in rows]
        yield [
            text if row.ended else text.rstrip("\ufffd")
            for text, row in zip(texts, rows, strict=True)
        ]


def _steps(lm: LanguageModel, rows: list[Row], max_positions: int) -> Iterator[list[Step]]:
    """Write rows in a running batch, step by step."""
    decoder = Decoder(lm, max_positions)
    for row in rows:
        decoder.submit(row)
    while not decoder.idle:
        yield decoder.step()


def _model_steps(lm: LanguageModel, encoded: Encoded, rows: list[Row]) -> Iterator[None]:
    """Write rows of one prompt by the model's own decoding; yields after each token."""
    check_decoding(lm)

    @torch.inference_mode()
    def write(pause: Callable[[], None]) -> None:
        _continue(lm, [encoded] * len(rows), rows, pause)

    yield from _in_turns(write)


class _Closed(BaseException):
    """Nobody waits any more for what a thread computes."""


def _in_turns(work: Callable[[Callable[[], None]], None]) -> Iterator[None]:
    """Run a function in a thread that computes only while the caller waits for its next step.

    work: is given a function to be called after each step. What it computes is steered by the
    blocks in which the caller waits. A caller that stops iterating ends it at its next step.
    """
    go, stepped = threading.Semaphore(0), threading.Semaphore(0)
    caller, closed, done, failed = 0, False, False, None

    def turn() -> None:
        go.acquire()
        if closed:
            raise _Closed
        compute_for(caller)

    def pause() -> None:
        stepped.release()
        turn()

    def run() -> None:
        nonlocal done, failed
        try:
            turn()
            work(pause)
        except BaseException as error:
            failed = error
        done = True
        stepped.release()

    thread = threading.Thread(target=run, name="model's decoding", daemon=True)
    thread.start()
    try:
        while True:
            caller = threading.get_ident()
            go.release()
            stepped.acquire()
            if done:
                break
            yield
    finally:
        closed = True
        go.release()
        thread.join()
    if failed:
        raise failed


def _check_positions(encoded: Encoded, configurations: Iterable[Configuration]) -> None:
    """Raise UserError if a configuration steers nothing of a prompt."""
    for configuration in configurations:
        positions.in_prompt(configuration.positions, encoded.image)


def row_limit(lm: LanguageModel, prompt_ids: list[int], max_new_tokens: int) -> int:
    """The tokens that a text may have: where the model's context ends, it does too.

    The last token is not read, so that it may stand behind the last position.
    """
    if lm.max_positions is None:
        return max_new_tokens
    return min(max_new_tokens, lm.max_positions - len(prompt_ids) + 1)


def check_limit(lm: LanguageModel, max_new_tokens: int) -> None:
    """Raise UserError for a limit that is no limit: longer than the model's context."""
    longest = lm.max_positions or 2**20
    if not 1 <= max_new_tokens <= longest:
        raise UserError(
            f"max_new_tokens {max_new_tokens}: expected 1 to {longest}, the positions that "
            f"{lm.name} was made for"
        )


def _in_a_running_batch(
    lm: LanguageModel, rows: list[Row], max_positions: int, progress: Callable[[int], None]
) -> Iterator[Row]:
    for steps in _steps(lm, rows, max_positions):
        progress(len(steps))
        yield from (step.row for step in steps if step.row.ended)


# --- the model's own decoding ---


def _by_the_model(
    lm: LanguageModel,
    rows: list[tuple[Encoded, Row]],
    max_positions: int,
    progress: Callable[[int], None],
) -> Iterator[Row]:
    if rows:
        check_decoding(lm)
    for tower in dict.fromkeys(row.configuration.tower for _, row in rows):
        alike = [(item, row) for item, row in rows if row.configuration.tower == tower]
        for kind in _kinds(lm, [item for item, _ in alike]):
            lengths = [len(alike[index][1].prompt_ids) + alike[index][1].limit for index in kind]
            for group in batches(lengths, max_positions):
                batch = [alike[kind[index]] for index in group]
                _continue(lm, [item for item, _ in batch], [row for _, row in batch])
                progress(sum(len(row.new) for _, row in batch))
                yield from (row for _, row in batch)


def _kinds(lm: LanguageModel, encoded: Sequence[Encoded]) -> list[list[int]]:
    """Indices of prompts that can be batched: all with a picture or none, one length if need be."""
    apart = len({len(item.prompt_ids) for item in encoded}) > 1 and not can_pad(lm)
    kinds: dict[tuple[bool, int], list[int]] = {}
    for index, item in enumerate(encoded):
        kind = bool(item.image.any()), len(item.prompt_ids) if apart else 0
        kinds.setdefault(kind, []).append(index)
    return [kinds[kind] for kind in sorted(kinds)]


def _inputs(lm: LanguageModel, encoded: Sequence[Encoded]) -> dict:
    """The inputs of prompts of one kind as one batch, padded on the left."""
    if encoded[0].image.any():
        pictures = [vision.open_image(item.example) for item in encoded]
        texts, guards = zip(*((item.text, item.guard) for item in encoded), strict=True)
        return vision.model_inputs(lm, list(texts), pictures, list(guards))
    return pad_left(lm, [item.inputs for item in encoded])


def draw_together(
    lm: LanguageModel,
    encoded: Sequence[Encoded],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """A text of each prompt, drawn by the model's own decoding with all its own settings.

    Unlike those of `generate`, these draws depend on what is in the batch. The answers that
    experiments train on are drawn so, and their tables rest on them.
    """
    texts = [""] * len(encoded)
    for kind in _kinds(lm, encoded):
        inputs = _inputs(lm, [encoded[index] for index in kind])
        torch.manual_seed(seed)
        with torch.inference_mode():
            output = lm.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=lm.replacement_id("pad"),
                do_sample=True,
                temperature=temperature,
            )
        new = output[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(
            kind, lm.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            texts[index] = text.strip()
    return texts


def _continue(
    lm: LanguageModel,
    encoded: list[Encoded],
    rows: list[Row],
    after: Callable[[], None] | None = None,
) -> None:
    """Write the texts of a batch by the model's own `generate`.

    The configurations steer the vision tower alike.
    after: called when all rows have a token more.
    """
    inputs = _inputs(lm, encoded)
    start = inputs["input_ids"].shape[1]
    ends = sampling.end_tokens(lm)

    def where(count: int) -> Tensor | None:
        lengths = [len(row.prompt_ids) + computed[0] - start for row in rows]
        return where_steered(rows, lengths, count)

    ending: list[StoppingCriteria] = [_Stops(lm, rows, start)] if rows[0].stop else []
    if after:
        ending.append(_After(lm, rows, ends, after))
    chosen = [] if all(row.choice.is_greedy for row in rows) else [_Rows(rows, start)]
    with (
        _computed(lm) as computed,
        sampling.nothing_else_acts(lm),
        steered(
            lm, *by_row([row.configuration for row in rows]), where, rows[0].configuration.tower
        ),
    ):
        output = lm.model.generate(
            **inputs,
            max_new_tokens=max(row.limit for row in rows),
            pad_token_id=lm.replacement_id("pad"),
            do_sample=False,
            logits_processor=chosen,
            stopping_criteria=ending,
        )
    for row, ids in zip(rows, output[:, start:].tolist(), strict=True):
        for token in ids[len(row.new) :]:
            if not row.ended:
                take(lm, row, token, ends)
        row.ended = row.ended or "length"


@contextmanager
def _computed(lm: LanguageModel) -> Iterator[list[int]]:
    """A list of one number: the positions of a row after the forward that runs, P at first."""
    stop = [0]

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        new = kwargs["input_ids"].shape[1]  # the newest alone with a cache, all without
        stop[0] = stop[0] + 1 if new == 1 else new

    handle = lm.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield stop
    finally:
        handle.remove()


class _Rows(LogitsProcessor):
    """Leaves each row the token that its own choice takes."""

    def __init__(self, rows: list[Row], start: int):
        self.rows, self.start = rows, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = [
            row.choice.token(own, row.prompt_ids + ids[self.start :])
            for row, own, ids in zip(self.rows, scores, input_ids.tolist(), strict=True)
        ]
        places = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, places, 0.0)


class _Stops(StoppingCriteria):
    """Ends each row at its stop texts."""

    def __init__(self, lm: LanguageModel, rows: list[Row], start: int):
        self.lm, self.rows, self.start = lm, rows, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self.lm.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        ended = [
            any(stop in text for stop in row.stop)
            for row, text in zip(self.rows, texts, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)


class _After(StoppingCriteria):
    """Gives every row its newest token, and says so; ends none."""

    def __init__(
        self, lm: LanguageModel, rows: list[Row], ends: Collection[int], say: Callable[[], None]
    ):
        self.lm, self.rows, self.ends, self.say = lm, rows, ends, say

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                take(self.lm, row, token, self.ends)
        self.say()
        return torch.zeros(len(self.rows), dtype=torch.bool, device=input_ids.device)


def pad_left(lm: LanguageModel, inputs: list[dict]) -> dict:
    """Inputs of B text prompts as one batch (B, P), padded on the left; padding is masked."""
    return {
        key: pad_sequence(
            [item[key][0] for item in inputs],
            batch_first=True,
            padding_value=lm.replacement_id("pad") if key == "input_ids" else 0,
            padding_side="left",
        )
        for key in inputs[0]
    }
