"""Prompt styles: from a question and its answers to the model's inputs and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from PIL.Image import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grains import vision
from grains.chats import Turn
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import STYLES


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
    """

    example: Example
    text: str
    inputs: dict
    responses: list[list[int]]
    content: torch.Tensor
    words: torch.Tensor
    image: torch.Tensor

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


def render(lm: LanguageModel, example: Example, style: str) -> tuple[str, str]:
    """The text of the prompt, and the separator between it and a response.

    style: qa: `Q: {question}\\nA:` and a space, as in the published scripts; chat: the model's own
        chat template and no separator; plain: the question as it is, and a space.
    A context comes before the question, a picture's placeholder before both. The turns of a
    conversation are those of the chat template, lines with Q: and A: in qa, and paragraphs with
    the role before them in plain.
    Raises UserError for an unknown style, for chat without a chat template, and for turns that
    the chat template refuses.
    """
    question = f"{example.context}\n{example.question}" if example.context else example.question
    has_image = example.image is not None
    if style == "chat":
        if not _renderer(lm).chat_template:
            raise UserError(f"{lm.name} has no chat template: use prompt_style qa or plain")
        return _chat(lm, example, example.turns or (("user", question),)), ""
    if style not in STYLES:
        raise UserError(f"unknown prompt style '{style}': expected {', '.join(STYLES)}")
    start = f"{vision.placeholder(lm)}\n" if has_image else ""
    if example.turns:
        return start + _without_template(example.turns, style), " "
    if style == "plain":
        return start + question, " "
    context = f"{example.context}\n" if example.context else ""
    return f"{start}{context}Q: {example.question}\nA:", " "


def _chat(lm: LanguageModel, example: Example, turns: Sequence[Turn]) -> str:
    """Turns in the chat template, up to where the answer begins; a picture in the first user's."""
    first = next((index for index, (role, _) in enumerate(turns) if role == "user"), 0)
    pictures = [example.image is not None and index == first for index in range(len(turns))]
    messages = [
        {"role": role, "content": _content_of_turn(lm, text, has_image)}
        for (role, text), has_image in zip(turns, pictures, strict=True)
    ]
    try:
        return _renderer(lm).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise UserError(
            f"example {example.id}: the chat template of {lm.name} refuses its turns ({roles}): "
            f"{error}; change them, or use prompt_style qa or plain"
        ) from error


def _without_template(turns: Sequence[Turn], style: str) -> str:
    if style == "plain":
        return "\n\n".join([*(f"{role.title()}: {text}" for role, text in turns), "Assistant:"])
    marks = {"user": "Q: ", "assistant": "A: ", "system": ""}
    return "\n".join([*(f"{marks.get(role, f'{role}: ')}{text}" for role, text in turns), "A:"])


def _renderer(lm: LanguageModel) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What holds the chat template: the processor of an image-text model, else the tokenizer."""
    return lm.tokenizer if lm.processor is None else lm.processor


def _content_of_turn(lm: LanguageModel, text: str, has_image: bool = False) -> str | list[dict]:
    if lm.processor is None:
        return text
    return [{"type": "image"}] * has_image + [{"type": "text", "text": text}]


def encode(
    lm: LanguageModel,
    example: Example,
    style: str = "qa",
    picture: Image | None = None,
    finished: bool = True,
) -> Encoded:
    """Tokenize an example and prepare its picture.

    A response's tokens are those that follow the prompt's when both are tokenized as one text. If a
    tokenizer merges characters across the border, the two are tokenized separately.

    style: qa, chat or plain (see `render`).
    picture: used instead of the example's own, for example a blank one.
    finished: in the style chat, whether the token that ends the turn follows each response.
    Raises UserError for an empty prompt or response, a text longer than the model's context, and a
    picture that the model cannot take.
    """
    if lm.processor is not None:
        vision.check_text(lm, example)
    elif example.image is not None:
        raise UserError(f"example {example.id} has a picture, but {lm.name} reads text only")
    text, space = render(lm, example, style)
    text_ids = _ids(lm, text)
    if not text_ids:
        raise UserError(f"example {example.id}: its prompt tokenizes to nothing")
    end = _end_of_turn(lm) if style == "chat" and finished else ""
    responses = [
        _response_ids(lm, text, text_ids, space + choice, end, example)
        for choice in example.choices
    ]
    if example.image is not None:
        picture = picture or vision.open_image(example)
        try:
            inputs = vision.model_inputs(lm, [text], [picture])
        except UserError as error:
            raise UserError(f"example {example.id}: {error}") from error
    else:
        ids = torch.tensor([text_ids], device=lm.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompt_ids = inputs["input_ids"][0].tolist()

    longest = len(prompt_ids) + max(map(len, responses), default=0)
    if lm.max_positions and longest > lm.max_positions:
        raise UserError(
            f"example {example.id}: prompt and answer have {longest} tokens, more than the "
            f"{lm.max_positions} that {lm.name} was made for; shorten it or leave it out"
        )
    image = torch.tensor([token == lm.image_token_id for token in prompt_ids])
    special_ids = lm.special_ids()
    words = torch.tensor([token not in special_ids for token in prompt_ids]) & ~image
    content = words & _aligned(_content(lm, example, text), text_ids, prompt_ids)
    return Encoded(
        example, text, inputs, responses, content if content.any() else words, words, image
    )


def _ids(lm: LanguageModel, text: str) -> list[int]:
    """Token ids with one BOS if the model has it, and without the EOS that some tokenizers add."""
    special = not vision.starts_with_bos(lm, text)
    ids = lm.tokenizer(text, add_special_tokens=special).input_ids
    ends = special and len(ids) > 1 and ids[-1] == lm.tokenizer.eos_token_id
    return ids[:-1] if ends and not text.endswith(lm.tokenizer.eos_token) else ids


def _end_of_turn(lm: LanguageModel) -> str:
    """The token that ends the model's turn, as the chat template writes it after an answer.

    In a chat an answer is complete when the model ends its turn. Without this token, 'a circle'
    would be the same answer as the beginning of 'a circle and a square'.
    """
    turns = [
        {"role": role, "content": _content_of_turn(lm, text)}
        for role, text in (("user", "question"), ("assistant", "ANSWER"))
    ]
    after = _renderer(lm).apply_chat_template(turns, tokenize=False)
    after = after.rpartition("ANSWER")[2].strip()
    tokens = lm.tokenizer(after, add_special_tokens=False).input_ids
    if tokens and tokens[0] in lm.special_ids():
        return lm.tokenizer.decode(tokens[:1])
    return lm.tokenizer.eos_token or ""


def _response_ids(
    lm: LanguageModel, prompt: str, prompt_ids: list[int], text: str, end: str, example: Example
) -> list[int]:
    ids = _ids(lm, prompt + text)
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids) :]
    else:
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    if not lm.tokenizer.decode(ids).strip():  # a space alone is no answer
        raise UserError(f"example {example.id}: the answer {text.strip()!r} tokenizes to nothing")
    return ids + (lm.tokenizer(end, add_special_tokens=False).input_ids if end else [])


def _content(lm: LanguageModel, example: Example, prompt: str) -> torch.Tensor:
    """(tokens,) bool: which tokens of the rendered text overlap context, question or turns."""
    special = not vision.starts_with_bos(lm, prompt)
    tokens = lm.tokenizer(
        prompt, add_special_tokens=special, return_offsets_mapping=lm.tokenizer.is_fast
    )
    inside = torch.zeros(len(tokens.input_ids), dtype=torch.bool)
    if not lm.tokenizer.is_fast:  # no offsets are known: every token counts
        return ~inside
    if example.turns:
        spans, end = [], 0
        for _, text in example.turns:  # in their order: two turns may have the same words
            begin = prompt.find(text, end)
            if begin >= 0:
                end = begin + len(text)
                spans.append((begin, end))
    else:
        texts = filter(None, (example.context, example.question))
        spans = [(begin, begin + len(t)) for t in texts if (begin := prompt.rfind(t)) >= 0]
    for begin, end in spans:
        inside |= torch.tensor(
            [first < end and last > begin for first, last in tokens.offset_mapping]
        )
    return inside


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
