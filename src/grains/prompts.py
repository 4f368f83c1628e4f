"""Prompt styles: from a question and its answers to the model's inputs and token ids."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grains.data import Example
from grains.errors import UserError
from grains.models import LanguageModel

STYLES = ("qa", "chat", "plain")


@dataclass(frozen=True)
class Encoded:
    """One example as the model takes it.

    inputs: the model's inputs for the prompt, one row (input_ids (1, P), attention_mask, images).
    responses: the token ids of each choice.
    content: (P,) bool, the positions of the user's own words (context and question), apart from
        special tokens and the frame that the prompt style puts around them.
    words: (P,) bool, all positions but special tokens.
    """

    example: Example
    inputs: dict
    responses: list[list[int]]
    content: torch.Tensor
    words: torch.Tensor

    @property
    def prompt_ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    @property
    def length(self) -> int:
        """Positions of the prompt and all responses behind it."""
        return len(self.prompt_ids) + sum(map(len, self.responses))

    def sequences(self, without_last: bool = False) -> list[list[int]]:
        """Prompt and response joined, for each choice.

        without_last: leave out each last token, which is predicted but need not be read.
        """
        return [self.prompt_ids + (response[:-1] if without_last else response)
                for response in self.responses]


def render(lm: LanguageModel, example: Example, style: str) -> tuple[str, str]:
    """The text of the prompt, and what stands between it and a response.

    qa: `Q: {question}\\nA:` and a space, as the published scripts do. chat: the model's own chat
    template. plain: the question as it is, and a space.
    """
    question = f"{example.context}\n{example.question}" if example.context else example.question
    if style == "qa":
        start = f"{example.context}\n" if example.context else ""
        return f"{start}Q: {example.question}\nA:", " "
    if style == "plain":
        return question, " "
    if style == "chat":
        if not lm.tokenizer.chat_template:
            raise UserError(f"{lm.name} has no chat template: use --prompt_style qa or plain")
        text = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        return text, ""
    raise UserError(f"unknown prompt style '{style}': expected {', '.join(STYLES)}")


def encode(lm: LanguageModel, example: Example, style: str = "qa") -> Encoded:
    """Tokenize an example.

    A response's tokens are those that follow the prompt's when both are tokenized as one text;
    where a tokenizer merges across the border, the two are tokenized apart.

    Raises UserError for an empty prompt or response and for one longer than the context.
    """
    prompt, space = render(lm, example, style)
    special = style != "chat"  # a chat template writes its own
    prompt_ids = lm.tokenizer(prompt, add_special_tokens=special).input_ids
    eos = lm.tokenizer.eos_token_id
    if special and len(prompt_ids) > 1 and prompt_ids[-1] == eos:
        prompt_ids = prompt_ids[:-1]  # some tokenizers end every text
    if not prompt_ids:
        raise UserError(f"example {example.id}: its prompt tokenizes to nothing")
    responses = [_response_ids(lm, prompt, prompt_ids, space + choice, special, example)
                 for choice in example.choices]
    longest = len(prompt_ids) + max(map(len, responses), default=0)
    if lm.max_positions and longest > lm.max_positions:
        raise UserError(
            f"example {example.id}: prompt and answer have {longest} tokens, more than the "
            f"{lm.max_positions} that {lm.name} was made for; shorten it or leave it out")
    ids = torch.tensor([prompt_ids], device=lm.device)
    special_ids = lm.special_ids()
    words = torch.tensor([token not in special_ids for token in prompt_ids])
    content = words & _content(lm, example, prompt, special)[:len(prompt_ids)]
    return Encoded(example, {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                   responses, content if content.any() else words, words)


def _response_ids(lm, prompt, prompt_ids, text, special, example) -> list[int]:
    ids = lm.tokenizer(prompt + text, add_special_tokens=special).input_ids
    if special and ids and ids[-1] == lm.tokenizer.eos_token_id:
        ids = ids[:-1]
    if ids[: len(prompt_ids)] == prompt_ids:
        ids = ids[len(prompt_ids):]
    else:
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
    if not text.strip() or not ids:
        raise UserError(f"example {example.id}: the answer {text.strip()!r} tokenizes to nothing")
    return ids


def _content(lm: LanguageModel, example: Example, prompt: str, special: bool) -> torch.Tensor:
    """(P,) bool: which tokens of the rendered prompt overlap the context or the question."""
    if not lm.tokenizer.is_fast:  # no offsets: every word counts as content
        return torch.tensor(True)
    offsets = lm.tokenizer(prompt, add_special_tokens=special,
                           return_offsets_mapping=True).offset_mapping
    inside = torch.zeros(len(offsets), dtype=torch.bool)
    for text in filter(None, (example.context, example.question)):
        begin = prompt.rfind(text)
        if begin >= 0:
            end = begin + len(text)
            inside |= torch.tensor([first < end and last > begin for first, last in offsets])
    return inside
