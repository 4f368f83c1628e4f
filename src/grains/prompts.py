"""From a question and its answers to the model's inputs and token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from PIL.Image import Image
from torch import nn

from grains import rendering, vision
from grains.controls import Controls, Span
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import STYLES, PromptSettings

__all__ = ["STYLES", "Encoded", "boxes", "encode", "notes", "render", "tally"]


@dataclass(frozen=True)
class Encoded:
    """One example as the model takes it.

    text: the rendered prompt.
    inputs: the model's inputs for the prompt, one row: input_ids (1, P), attention_mask (1, P),
        pixel_values and what else the family needs.
    responses: the token ids of each of the C choices.
    content: (P,) bool, the positions of the user's own words (context and question), without
        special tokens and the words that the prompt style adds.
    words: (P,) bool, all text positions except special tokens.
    image: (P,) bool, the positions of image features.
    guard: how the control tokens among the data's words are kept words; None if there are none.
    control_words: these words, of the prompt and the answers.
    spans_border: whether a token would span the border between the prompt and an answer.
    has_turn_mark: whether the data's words hold that with which the chat template ends the user's
        turn, where this is made of words and not of control tokens.
    may_stay: whether steering may leave this prompt as it is, because the steered positions name
        nothing in it: so with texts that costs are measured on.
    """

    example: Example
    text: str
    inputs: dict
    responses: list[list[int]]
    content: torch.Tensor
    words: torch.Tensor
    image: torch.Tensor
    guard: vision.Guard | None = None
    control_words: tuple[str, ...] = ()
    spans_border: bool = False
    has_turn_mark: bool = False
    may_stay: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """The P token ids of the prompt."""
        return self.inputs["input_ids"][0].tolist()

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and all responses."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    @property
    def packed_length(self) -> int:
        """The number of positions that scoring computes: common beginnings once, no last tokens."""
        return len(self.prompt_ids) + len(
            {
                tuple(response[:end])
                for response in self.responses
                for end in range(1, len(response))
            }
        )

    def without_picture(self) -> Encoded:
        """A copy without pixels, which take megabytes: enough to know lengths and positions."""
        kept = ("input_ids", "attention_mask")
        return replace(self, inputs={key: self.inputs[key] for key in kept})

    def sequences(self, without_last: bool = False) -> list[list[int]]:
        """The token ids of prompt and response, for each of the C choices.

        without_last: leave out each last token: nothing after it is predicted.
        """
        return [
            self.prompt_ids + (response[:-1] if without_last else response)
            for response in self.responses
        ]


def render(lm: LanguageModel, example: Example, prompt: PromptSettings | str) -> tuple[str, str]:
    """The text of the prompt, and the separator between it and an answer.

    prompt: the settings, or the name of a style. See `grains.rendering.render`.
    """
    rendered = rendering.render(lm, example, _settings(prompt))
    return rendered.text, rendered.space


def _settings(prompt: PromptSettings | str) -> PromptSettings:
    return PromptSettings(prompt) if isinstance(prompt, str) else prompt


def encode(
    lm: LanguageModel,
    example: Example,
    prompt: PromptSettings | str = "qa",
    picture: Image | None = None,
    finished: bool = True,
    free: bool = False,
) -> Encoded:
    """Tokenize an example and prepare its picture.

    An answer's tokens are those that follow the prompt's when both are tokenized as one text. If a
    token would span the border to one of the answers, all answers of the example are tokenized
    separately.

    prompt: the settings, or the name of a style (see `grains.rendering.render`).
    picture: used instead of the example's own, for example a blank one.
    finished: in the style chat, whether the token that ends the turn follows each response. False
        for what the model itself wrote: it may be cut off, and is never a choice's letter.
    free: for what the model itself writes: the prompt ends where its turn begins, and not where a
        chat template puts the final answer.
    Raises UserError for an empty prompt or response, a text longer than the model's context, and a
    picture that the model cannot take.
    """
    settings = _settings(prompt)
    if lm.processor is not None:
        shots = (text for shot in settings.shots for text in (shot.question, shot.answer))
        vision.check_text(lm, example, (settings.system or "", settings.preamble, *shots))
    elif example.image is not None:
        raise UserError(f"example {example.id} has a picture, but {lm.name} reads text only")
    rendered = rendering.render(lm, example, settings, free)
    text, guarded = rendered.text, not settings.allow_special_tokens
    controls = rendering.controls(lm, settings)
    text_ids = _ids(lm, controls, text, rendered.words if guarded else [])
    if not text_ids:
        raise UserError(f"example {example.id}: its prompt tokenizes to nothing")
    written = free or not finished
    texts = example.choices if written else rendering.answers(example, settings)
    answers = [rendered.space + text for text in texts]
    responses, spans_border = _responses(
        lm, controls, rendered, text_ids, answers, example, guarded
    )
    if rendered.end and finished:
        end = lm.tokenizer(rendered.end, add_special_tokens=False).input_ids
        responses = [response + end for response in responses]
    lookalikes = controls.among(text, rendered.words) if guarded else []
    guard = vision.Guard(controls, tuple(rendered.words)) if lookalikes else None
    if example.image is not None:
        picture = picture or vision.open_image(example)
        try:
            inputs = vision.model_inputs(lm, [text], [picture], [guard])
        except UserError as error:
            raise UserError(f"example {example.id}: {error}") from error
    else:
        ids = torch.tensor([text_ids], device=lm.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if lm.marks_prompts:
            inputs["token_type_ids"] = torch.zeros_like(ids)
    prompt_ids = inputs["input_ids"][0].tolist()

    longest = len(prompt_ids) + max(map(len, responses), default=0)
    if lm.max_positions and longest > lm.max_positions:
        raise UserError(
            f"example {example.id}: prompt and answer have {longest} tokens, more than the "
            f"{lm.max_positions} that {lm.name} was made for; shorten it or leave it out"
        )
    _check_vocabulary(lm, [text_ids], lm.embed)
    _check_vocabulary(lm, responses, lm.head)
    placeholder = lm.image_token_id
    image = torch.tensor([token == placeholder for token in prompt_ids])
    special_ids = lm.special_ids()
    words = torch.tensor([token not in special_ids for token in prompt_ids]) & ~image
    content = words & _aligned(_content(lm, controls, rendered, guarded), text_ids, prompt_ids)
    if guarded:
        lookalikes += [token for answer in answers for token in controls.among(answer)]
    return Encoded(
        example,
        text,
        inputs,
        responses,
        content if content.any() else words,
        words,
        image,
        guard,
        tuple(lookalikes),
        spans_border,
        settings.style == "chat" and _has_turn_mark(controls, rendered),
    )


def _check_vocabulary(
    lm: LanguageModel, sequences: Iterable[list[int]], weights: nn.Linear | nn.Embedding
) -> None:
    """Raise UserError for a token that embeddings or head have no row for."""
    rows = len(weights.weight)
    largest = max(({*chain(*sequences)} - lm.image_ids()), default=0)
    if largest >= rows:
        raise UserError(
            f"{lm.name}: the token '{lm.tokenizer.convert_ids_to_tokens(largest)}' has the number "
            f"{largest}, but its weights are for {rows} tokens: give the tokenizer that belongs to "
            "the model"
        )


def _ids(lm: LanguageModel, controls: Controls, text: str, words: Sequence[Span]) -> list[int]:
    """Token ids with one BOS if the model has it, and without the EOS that some tokenizers add."""
    special = not _starts_with_bos(lm, text, words)
    ids = controls.encode(text, words, special).ids
    ends = special and len(ids) > 1 and ids[-1] == lm.tokenizer.eos_token_id
    written = text.endswith(lm.tokenizer.eos_token or "") and not (
        words and words[-1][1] == len(text)
    )
    return ids[:-1] if ends and not written else ids


def _starts_with_bos(lm: LanguageModel, text: str, words: Sequence[Span]) -> bool:
    """Whether the prompt style, and not the data, begins the prompt with the BOS token."""
    return vision.starts_with_bos(lm, text) and not (words and words[0][0] == 0)


def _responses(
    lm: LanguageModel,
    controls: Controls,
    rendered: rendering.Rendered,
    prompt_ids: list[int],
    answers: Sequence[str],
    example: Example,
    guarded: bool,
) -> tuple[list[list[int]], bool]:
    """The token ids of each answer, and whether a token would span the border to one of them."""
    start, count = len(rendered.text), len(prompt_ids)
    joint = []
    for answer in answers:
        words = [*rendered.words, (start, start + len(answer))] if guarded else []
        joint.append(_ids(lm, controls, rendered.text + answer, words))
    spans_border = any(ids[:count] != prompt_ids for ids in joint)
    responses = [ids[count:] for ids in joint]
    if spans_border:
        responses = [
            controls.encode(answer, [(0, len(answer))] if guarded else [], False).ids
            for answer in answers
        ]
    for answer, ids in zip(answers, responses, strict=True):
        if not lm.tokenizer.decode(ids).strip():  # a space alone is no answer
            raise UserError(
                f"example {example.id}: the answer {answer.strip()!r} tokenizes to nothing"
            )
    return responses, spans_border


def _content(
    lm: LanguageModel, controls: Controls, rendered: rendering.Rendered, guarded: bool
) -> torch.Tensor:
    """(tokens,) bool: which tokens of the rendered text overlap context, question or turns."""
    words = rendered.words if guarded else []
    special = not _starts_with_bos(lm, rendered.text, words)
    tokens = controls.encode(rendered.text, words, special)
    inside = torch.zeros(len(tokens.ids), dtype=torch.bool)
    if tokens.offsets is None:  # every token counts
        return ~inside
    shifted = dict(zip(words, tokens.words, strict=True))
    for span in rendered.content:
        begin, end = shifted.get(span, span)
        inside |= torch.tensor([first < end and last > begin for first, last in tokens.offsets])
    return inside


def _has_turn_mark(controls: Controls, rendered: rendering.Rendered) -> bool:
    """Whether the words hold all that the template writes between them and an answer.

    With a control token in it that is harmless: the words have no such token.
    """
    if not rendered.words:
        return False
    mark = rendered.text[rendered.words[-1][1] :].strip()
    return (
        bool(mark)
        and not controls.among(mark)
        and any(mark in rendered.text[begin:end] for begin, end in rendered.words)
    )


def boxes(lm: LanguageModel, encoded: Encoded) -> list[vision.Box | None]:
    """What of its picture each image token of a prompt shows (see `vision.token_boxes`)."""
    count = int(encoded.image.sum())
    if not count:
        return []
    return vision.token_boxes(lm, encoded.inputs, vision.open_image(encoded.example).size, count)


def tally(encoded: Iterable[Encoded]) -> Counter[str]:
    """What users should know of the texts of examples, counted, for `notes` and manifests.

    control_words: words that look like control tokens; control_words_in: examples with some;
    turn_marks: examples that hold words with which the chat template ends the user's turn;
    border_tokens: examples with a token that would span the border to an answer.
    """
    counts: Counter[str] = Counter()
    for item in encoded:
        counts["control_words"] += len(item.control_words)
        counts["control_words_in"] += bool(item.control_words)
        counts["turn_marks"] += item.has_turn_mark
        counts["border_tokens"] += item.spans_border
    return +counts  # without zeros


def notes(counts: Counter[str]) -> list[str]:
    """A line for each thing that `tally` counted."""
    lines = []
    if number := counts["control_words"]:
        lines.append(
            f"warning: {counts['control_words_in']} examples hold {number} words that look like "
            "control tokens; they are read as words (allow_special_tokens reads them as tokens)"
        )
    if number := counts["turn_marks"]:
        lines.append(
            f"warning: {number} examples hold the words with which the chat template ends the "
            "user's turn ([/INST], say): they are no control tokens, so the model cannot tell "
            "them from the template's; change them, or give another chat_template"
        )
    if number := counts["border_tokens"]:
        lines.append(
            f"note: in {number} examples a token would span the border between prompt and answer; "
            "their answers are tokenized separately"
        )
    return lines


def _aligned(mask: torch.Tensor, text_ids: list[int], prompt_ids: list[int]) -> torch.Tensor:
    """A mask over the tokens of the text, as a mask (P,) over those of the prompt.

    The two differ only where the processor has put image tokens in the place of one placeholder.
    """
    mask = mask[: len(text_ids)]
    if len(text_ids) == len(prompt_ids):
        return mask
    head = 0
    while head < len(text_ids) and text_ids[head] == prompt_ids[head]:
        head += 1
    tail = 0
    while tail < len(text_ids) - head and text_ids[-1 - tail] == prompt_ids[-1 - tail]:
        tail += 1
    aligned = torch.zeros(len(prompt_ids), dtype=torch.bool)
    aligned[:head] = mask[:head]
    aligned[len(prompt_ids) - tail :] = mask[len(mask) - tail :]
    return aligned
