"""Prompt styles: from a question and its answers to the text that the model reads.

The prompt is rendered around marks that stand for the data's texts, which take their places
afterwards. So it is known whose each letter is, whatever a chat template writes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix
from uuid import uuid4

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grains import vision
from grains.chats import Turn
from grains.controls import Controls, Span, control_tokens
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import STYLES, PromptSettings

# A text of the data, and whether it is the user's own (not from the settings) -> what stands in its
# place while the prompt is rendered: a mark, or the text itself.
Mark = Callable[[str, bool], str]


@dataclass(frozen=True)
class Rendered:
    """A prompt's text.

    text: up to where an answer begins, or where the model writes on. space: what separates it from
        an answer. end: what ends an answer, '' for nothing.
    words: the characters of all texts that are not the prompt style's: the data's and the user's
        system prompt. content: those of the example itself. Both in order, without overlaps.
    """

    text: str
    space: str
    end: str
    words: list[Span]
    content: list[Span]


class Marks:
    """Marks for texts: words that no data holds and that templates hand on as they are."""

    def __init__(self) -> None:
        self._key = f"m{uuid4().hex}"
        self._texts: list[tuple[str, bool]] = []
        self.answer = self.mark("", False)

    def mark(self, text: str, own: bool) -> str:
        self._texts.append((text, own))
        return f"{self._key}x{len(self._texts) - 1}x"

    def fill(self, marked: str) -> tuple[str, list[Span], list[Span]]:
        """The texts in their places; the spans of all of them, and of the user's own."""
        parts = re.split(f"{self._key}x([0-9]+)x", marked)
        text, words, content = parts[0], [], []
        for number, after in zip(parts[1::2], parts[2::2], strict=True):
            filled, own = self._texts[int(number)]
            span = len(text), len(text) + len(filled)
            words.append(span)
            if own:
                content.append(span)
            text += filled + after
        return text, words, content


@dataclass(frozen=True)
class _Layout:
    """The parts of `Rendered` with marks in them, or without."""

    text: str
    space: str
    end: str = ""


def render(
    lm: LanguageModel, example: Example, prompt: PromptSettings, free: bool = False
) -> Rendered:
    """The text of the prompt of an example.

    Styles: qa: `Q: {question}\\nA:` and a space, as in the published scripts; chat: the model's own
    chat template; plain: the question as it is, and a space. A context comes before the question, a
    picture's placeholder before both. The turns of a conversation are those of the chat template,
    lines with Q: and A: in qa, and paragraphs with the role before them in plain.

    In a chat an answer stands where the template puts the final answer of an assistant's message,
    for example behind an empty block of thoughts.
    free: the prompt ends where the model begins to write, its thoughts included.
    Raises UserError for an unknown style, for chat without a chat template, and for what the chat
    template refuses.
    """
    if prompt.style not in STYLES:
        raise UserError(f"unknown prompt style '{prompt.style}': expected {', '.join(STYLES)}")
    marks = Marks()
    layout = _layout(lm, example, prompt, free, marks.mark, marks.answer)
    text, words, content = marks.fill(layout.text)
    # Templates that look at the texts, such as those that cut the thoughts of earlier turns, write
    # something else for the texts than for the marks.
    seen = _layout(lm, example, prompt, free, lambda text, own: text, marks.answer).text
    if not content and _squeezed(example.question) not in _squeezed(seen):
        raise UserError(
            f"example {example.id}: the chat template of {lm.name} leaves its question out; give "
            "another chat_template, or use prompt_style qa or plain"
        )
    if seen != text:
        given = [*(text for _, text in example.turns), example.context, example.question]
        known = controls(lm, prompt)
        if prompt.allow_special_tokens or not any(map(known.among, [*given, prompt.system or ""])):
            text = seen
            words = content = _located(text, example)
    return Rendered(text, layout.space, layout.end, words, content)


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def controls(lm: LanguageModel, prompt: PromptSettings) -> Controls:
    """The control tokens of a model, those that the prompt's templates write among them."""
    return control_tokens(lm.tokenizer, chat_template(lm, prompt) or "")


def chat_template(lm: LanguageModel, prompt: PromptSettings) -> str | None:
    """The text of the chat template, None if there is none."""
    template = prompt.chat_template or _renderer(lm).chat_template
    if isinstance(template, dict):  # several by name
        template = template.get("default")
    return template


def _renderer(lm: LanguageModel) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What holds the chat template: the processor of an image-text model, else the tokenizer."""
    return lm.tokenizer if lm.processor is None else lm.processor


def _located(text: str, example: Example) -> list[Span]:
    """Where the texts of an example stand in a rendered prompt."""
    spans, end = [], 0
    if example.turns:
        for _, turn in example.turns:  # in their order: two turns may have the same words
            begin = text.find(turn, end)
            if begin >= 0:
                end = begin + len(turn)
                spans.append((begin, end))
        return spans
    asked = text.rfind(example.question)
    if asked >= 0:
        spans.append((asked, asked + len(example.question)))
    before = text.rfind(example.context, 0, None if asked < 0 else asked) if example.context else -1
    return [(before, before + len(example.context)), *spans] if before >= 0 else spans


def _layout(
    lm: LanguageModel, example: Example, prompt: PromptSettings, free: bool, mark: Mark, answer: str
) -> _Layout:
    """The prompt around the marks of its texts. answer: stands for the answer."""
    context = f"{mark(example.context, True)}\n" if example.context else ""
    if prompt.style == "chat":
        turns = [(role, mark(text, True)) for role, text in example.turns]
        turns = turns or [("user", context + mark(example.question, True))]
        if prompt.system and turns[0][0] != "system":
            turns.insert(0, ("system", mark(prompt.system, False)))
        return _chat(lm, example, turns, prompt, free, answer)
    start = f"{vision.placeholder(lm)}\n" if example.image is not None else ""
    if prompt.system and not (example.turns and example.turns[0][0] == "system"):
        system = mark(prompt.system, False)
        start = (f"System: {system}\n\n" if prompt.style == "plain" else f"{system}\n") + start
    if example.turns:
        turns = [(role, mark(text, True)) for role, text in example.turns]
        return _Layout(start + _without_template(turns, prompt.style), " ")
    question = mark(example.question, True)
    if prompt.style == "plain":
        return _Layout(start + context + question, " ")
    return _Layout(f"{start}{context}Q: {question}\nA:", " ")


def _without_template(turns: Sequence[Turn], style: str) -> str:
    if style == "plain":
        return "\n\n".join([*(f"{role.title()}: {text}" for role, text in turns), "Assistant:"])
    marks = {"user": "Q: ", "assistant": "A: ", "system": ""}
    return "\n".join([*(f"{marks.get(role, f'{role}: ')}{text}" for role, text in turns), "A:"])


# --- chat templates ---


def _chat(
    lm: LanguageModel,
    example: Example,
    turns: Sequence[Turn],
    prompt: PromptSettings,
    free: bool,
    answer: str,
) -> _Layout:
    """Turns in the chat template; a picture in the first user's."""
    first = next((index for index, (role, _) in enumerate(turns) if role == "user"), 0)
    messages = [
        _message(lm, role, text, example.image is not None and index == first)
        for index, (role, text) in enumerate(turns)
    ]
    if prompt.system == "" and turns[0][0] != "system" and default_system(lm, prompt):
        messages.insert(0, _message(lm, "system", ""))
    try:
        begun = apply_template(lm, messages, prompt)
        if prompt.system == "" and (insisted := default_system(lm, prompt)) in begun and insisted:
            raise UserError(
                f"system: the chat template of {lm.name} writes '{insisted}' whatever the system "
                "prompt; give another chat_template, or leave system out"
            )
        if free:
            return _Layout(begun, "")
        answered = [*messages, _message(lm, "assistant", answer)]
        before, stands, after = apply_template(lm, answered, prompt, False).rpartition(answer)
    except Exception as error:  # a template is a program, and may end in any
        if isinstance(error, UserError):
            raise
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(
            f"example {example.id}: the chat template of {lm.name} refuses its turns ({roles}): "
            f"{str(error)[:200] or type(error).__name__}; change them, or use prompt_style qa or "
            "plain"
        ) from error
    end = _first_special(lm, after) or lm.tokenizer.eos_token or ""
    if not stands or not (before.startswith(begun) or begun.startswith(before)):
        return _Layout(begun, "", end)  # the template says nothing of where answers stand
    if before.strip() == begun.strip():  # only white space before the answer
        return _Layout(begun, before[len(begun) :], end)
    return _Layout(before, "", end)


def apply_template(
    lm: LanguageModel, messages: list[dict], prompt: PromptSettings, begin_answer: bool = True
) -> str:
    """Messages as the chat template writes them.

    begin_answer: whether what comes before an answer stands at the end.
    Raises UserError if there is no template, or if it knows no argument of a name that is given.
    """
    template = chat_template(lm, prompt)
    if not template:
        raise UserError(f"{lm.name} has no chat template: use prompt_style qa or plain")
    for name in prompt.arguments:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f"template_args: the chat template of {lm.name} has no argument '{name}'; leave it "
                "out, or give a chat_template that uses it"
            )
    return _renderer(lm).apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=begin_answer,
        chat_template=prompt.chat_template,
        **prompt.arguments,
    )


def _message(lm: LanguageModel, role: str, text: str, has_image: bool = False) -> dict:
    if lm.processor is None:
        return {"role": role, "content": text}
    parts = [{"type": "image"}] * has_image + [{"type": "text", "text": text}]
    return {"role": role, "content": parts}


def _first_special(lm: LanguageModel, text: str) -> str:
    """The special token that a text begins with, '' for none.

    In a chat an answer is complete when the model ends its turn. Without this token, 'a circle'
    would be the same answer as the beginning of 'a circle and a square'.
    """
    tokens = lm.tokenizer(text.strip(), add_special_tokens=False).input_ids
    return lm.tokenizer.decode(tokens[:1]) if tokens and tokens[0] in lm.special_ids() else ""


def answers_after(lm: LanguageModel, prompt: PromptSettings) -> str:
    """What the chat template writes between the last question and an answer, '' where that is what
    it writes for the model to go on, too."""
    question = f"m{uuid4().hex}"
    example = Example("", question, (), 0)
    scored, begun = (render(lm, example, prompt, free) for free in (False, True))
    before = scored.text + scored.space
    return "" if before == begun.text else before.rpartition(question)[2]


def default_system(lm: LanguageModel, prompt: PromptSettings) -> str:
    """The system prompt that the chat template writes by itself, '' for none.

    Found by what stands before the first user's words but not before the second's, without what
    stands before a given system prompt. What templates write whether there is one or not (a date,
    say) counts too.
    """
    template = chat_template(lm, prompt)
    own = PromptSettings(template_args=prompt.template_args, chat_template=prompt.chat_template)
    return _default_system(lm, own, template) if template else ""


@lru_cache(maxsize=16)
def _default_system(lm: LanguageModel, prompt: PromptSettings, template: str) -> str:
    marks = [f"m{uuid4().hex}x{number}x" for number in range(4)]
    user, answer, again, system = marks
    known = controls(lm, prompt)

    def before(word: str, *turns: Turn) -> list[str]:
        messages = [_message(lm, role, text) for role, text in turns]
        text, stands, _ = apply_template(lm, messages, prompt, False).partition(word)
        return known.pieces(text.rpartition(answer)[2]) if stands else []

    asked = ("user", user)
    try:
        first = before(user, asked)
        second = before(again, asked, ("assistant", answer), ("user", again))
    except Exception:
        return ""
    try:
        start = before(system, ("system", system), asked)
    except Exception:  # it takes no system prompts
        start = []
    written = first[: len(first) - len(commonprefix([first[::-1], second[::-1]]))]
    instead = written[len(commonprefix([written, start])) :]
    # Without the second, it stands before a given system prompt as well.
    parts = known.between("".join(instead)) or known.between("".join(written))
    return re.sub(r"\A(system|developer)(\s+|\Z)", "", max(parts, key=len, default=""))
