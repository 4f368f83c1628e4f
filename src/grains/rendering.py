"""Prompt styles: from a question and its answers to the text that the model reads.

The prompt is rendered around marks that stand for the data's texts, which take their places
afterwards. So it is known whose each letter is, whatever a chat template writes.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from os.path import commonprefix
from uuid import uuid4

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from grains import vision
from grains.chats import Turn
from grains.controls import Controls, Span, control_tokens
from grains.data import Example
from grains.errors import UserError
from grains.lm import LanguageModel
from grains.settings import LETTERED, STYLES, PromptSettings

LETTERS = string.ascii_uppercase
# Marks with which a prompt opens a block of thoughts, and may close it again.
THOUGHTS = re.compile(r"(\s*<[^<>]*(think|thought|reason)[^<>]*>\s*)+\Z", re.IGNORECASE)
INSTRUCTION, RESPONSE = "### Instruction:\n", "### Response:\n"
# What chat templates are told is today, so that a prompt and all numbers are the same tomorrow:
# the day that Llama 3's templates write where they are told none.
TODAY = date(2024, 7, 26)
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
        self.answer, self.image = self.mark("", False), self.mark("", False)

    def mark(self, text: str, own: bool) -> str:
        self._texts.append((text, own))
        return f"{self._key}x{len(self._texts) - 1}x"

    def texts(self) -> list[str]:
        """All texts that have a mark."""
        return [text for text, _ in self._texts]

    def fill(self, marked: str) -> tuple[str, list[Span], list[Span]]:
        """The texts in their places; the spans of all of them, and of the user's own."""
        text, *parts = marked.split(self._key)
        words, content = [], []
        for part in parts:
            _, number, after = part.split("x", 2)
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
    chat template; plain: the question as it is, and a space; instruct: `### Instruction:`, the
    question and `### Response:`, each on lines of its own. A context comes before the question, a
    picture's placeholder before both. The turns of a conversation are those of the chat template,
    lines with Q: and A: in qa, paragraphs with the role before them in plain, and instructions and
    responses in instruct. What stands before: system prompt, preamble, shots.

    In a chat an answer stands where the template puts the final answer of an assistant's message,
    for example behind an empty block of thoughts.
    free: the prompt ends where the model begins to write, its thoughts included.
    Raises UserError for an unknown style, for chat without a chat template, and for what the chat
    template refuses.
    """
    if prompt.style not in STYLES:
        raise UserError(f"unknown prompt style '{prompt.style}': expected {', '.join(STYLES)}")
    if prompt.letters not in (None, *LETTERED):
        raise UserError(f"unknown letters '{prompt.letters}': expected {' or '.join(LETTERED)}")
    if prompt.num_shots > len(prompt.shots):
        raise UserError(f"num_shots is {prompt.num_shots}, but no shots are drawn: give shots")
    marks = Marks()
    layout = _Writer(lm, prompt, marks.mark, marks.image, marks.answer, free).layout(example)
    text, words, content = marks.fill(layout.text)
    # Templates that look at the texts, such as those that cut the thoughts of earlier turns, write
    # something else for the texts than for the marks.
    as_it_is = _Writer(lm, prompt, lambda text, own: text, marks.image, marks.answer, free)
    seen = as_it_is.layout(example).text
    if not content and _squeezed(example.question) not in _squeezed(seen):
        what = "chat_template" if not prompt.prompt_template else "prompt_template"
        raise UserError(
            f"example {example.id}: the {what.replace('_', ' ')} of {lm.name} leaves its question "
            f"out; give another {what}, or use prompt_style qa or plain"
        )
    if seen != text and (
        prompt.allow_special_tokens or not any(map(controls(lm, prompt).among, marks.texts()))
    ):
        text = seen
        words = content = _located(text, example)
    return Rendered(text, layout.space, layout.end, words, content)


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def controls(lm: LanguageModel, prompt: PromptSettings) -> Controls:
    """The control tokens of a model, those that the prompt's templates write among them."""
    templates = chat_template(lm, prompt), prompt.prompt_template
    return control_tokens(lm.tokenizer, "\n".join(filter(None, templates)))


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


def answers(example: Example, prompt: PromptSettings) -> list[str]:
    """What is scored for each choice of an example: its text, or its letter."""
    if prompt.letters != "letter":
        return [*example.choices]
    letters = dict(zip(listed(example), LETTERS, strict=False))
    return [letters[choice] for choice in example.choices]


def listed(example: Example) -> list[str]:
    """The choices as a prompt lists them, in an order that does not tell which is preferred."""
    return sorted(
        example.options or example.choices,
        key=lambda choice: hashlib.sha256(f"{example.question}\n{choice}".encode()).digest(),
    )


@dataclass(frozen=True)
class _Writer:
    """Writes an example as a prompt, around the marks of its texts.

    image: stands for the picture, answer for the answer.
    """

    lm: LanguageModel
    prompt: PromptSettings
    mark: Mark
    image: str
    answer: str
    free: bool

    def layout(self, example: Example) -> _Layout:
        if self.prompt.style == "chat":
            return self._chat(example)
        prompt, style = self.prompt, self.prompt.style
        before = []
        if prompt.system and not _has_system(example):
            system = self.mark(prompt.system, False)
            before.append(f"System: {system}\n\n" if style == "plain" else f"{system}\n")
        if prompt.preamble:
            before.append(self.mark(prompt.preamble, False) + "\n\n")
        for shot in self._shots():
            text, space = self._block(shot, False)
            answer = self.mark(answers(shot, prompt)[shot.label], False)
            before.append(f"{text}{space}{answer}\n\n")
        text, space = self._block(example, True)
        if example.image is not None:
            placeholder = vision.placeholder(self.lm)
            text = text if self.image in text else f"{self.image}\n{text}"
            text = text.replace(self.image, placeholder)
        return _Layout("".join(before) + text, space)

    def _shots(self) -> list[Example]:
        return [
            Example(
                f"shot {number}",
                shot.question,
                shot.choices or (shot.answer,),
                shot.choices.index(shot.answer) if shot.choices else 0,
                shot.context,
            )
            for number, shot in enumerate(self.prompt.shots, start=1)
        ]

    def _block(self, example: Example, own: bool) -> tuple[str, str]:
        """A question in a style without chat template, and what separates it from the answer."""
        style = self.prompt.style
        if self.prompt.prompt_template:
            text = self._templated(example, own)
            return text, "" if text[-1:].isspace() else " "
        choices = self._choices(example)
        asks = "Answer:" if choices else "A:"
        if example.turns:
            *earlier, (role, last) = [(role, self.mark(text, own)) for role, text in example.turns]
            turns = [*earlier, (role, last + choices)]
            return _without_template(turns, style, asks), "" if style == "instruct" else " "
        context = f"{self.mark(example.context, own)}\n" if example.context else ""
        question = self.mark(example.question, own) + choices
        if style == "plain":
            return context + question + (f"\n{asks}" if choices else ""), " "
        if style == "instruct":
            return f"{INSTRUCTION}{context}{question}\n\n{RESPONSE}", ""
        return f"{context}Q: {question}\n{asks}", " "

    def _choices(self, example: Example) -> str:
        """The choices with their letters, a line each; '' if the prompt does not list them."""
        if self.prompt.letters is None:
            return ""
        choices = listed(example)
        if not 2 <= len(choices) <= len(LETTERS):
            raise UserError(
                f"example {example.id} has {len(choices)} choices: letters need 2 to "
                f"{len(LETTERS)} of them"
            )
        lines = zip(LETTERS, choices, strict=False)
        return "".join(f"\n{letter}. {self.mark(choice, False)}" for letter, choice in lines)

    def _templated(self, example: Example, own: bool) -> str:
        """The prompt template's text."""
        template, names = prompt_template(self.prompt.prompt_template or "")
        if example.turns and self.prompt.style != "chat" and "turns" not in names:
            raise UserError(
                f"example {example.id} is a conversation, and prompt_template writes no turns: use "
                "them in it, or prompt_style chat"
            )
        turns = [{"role": role, "content": self.mark(text, own)} for role, text in example.turns]
        choices = listed(example)
        given = {
            "question": turns[-1]["content"] if turns else self.mark(example.question, own),
            "context": self.mark(example.context, own) if example.context else "",
            "choices": [self.mark(choice, False) for choice in choices],
            "letters": [*LETTERS[: len(choices)]],
            "image": self.image if example.image is not None else "",
            "turns": turns,
        }
        try:
            return template.render(given)
        except Exception as error:
            raise UserError(
                f"example {example.id}: prompt_template cannot be filled in: {error}; it may use "
                f"{', '.join(given)}"
            ) from error

    # --- chats ---

    def _chat(self, example: Example) -> _Layout:
        """Turns in the chat template; the picture in the first of the user's."""
        prompt = self.prompt
        turns: list[Turn] = [(role, self.mark(text, True)) for role, text in example.turns]
        role, last = turns.pop() if turns else ("user", "")
        last = self._user(example, True, last)
        if example.image is not None and self.image not in last:
            first = next((i for i, (role, _) in enumerate(turns) if role == "user"), None)
            if first is None:
                last = self.image + last
            else:
                turns[first] = "user", self.image + turns[first][1]
        turns.append((role, last))
        shots: list[Turn] = []
        for shot in self._shots():
            answer = self.mark(answers(shot, prompt)[shot.label], False)
            shots += [("user", self._user(shot, False)), ("assistant", answer)]
        start = 1 if turns[0][0] == "system" else 0
        turns[start:start] = shots
        if prompt.preamble:
            first = next((i for i, (role, _) in enumerate(turns) if role == "user"), len(turns) - 1)
            role, text = turns[first]
            turns[first] = role, f"{self.mark(prompt.preamble, False)}\n\n{text}"
        if prompt.system and not start:
            turns.insert(0, ("system", self.mark(prompt.system, False)))
        return self._in_template(example, turns)

    def _user(self, example: Example, own: bool, question: str = "") -> str:
        """What the user says. question: the last turn of a conversation."""
        if self.prompt.prompt_template:
            return self._templated(example, own)
        choices = self._choices(example)
        if choices and self.prompt.letters == "letter":
            choices += "\nAnswer with the letter alone."
        if not question:
            context = f"{self.mark(example.context, own)}\n" if example.context else ""
            question = context + self.mark(example.question, own)
        return question + choices

    def _in_template(self, example: Example, turns: Sequence[Turn]) -> _Layout:
        lm, prompt = self.lm, self.prompt
        messages = [_message(lm, role, text, self.image) for role, text in turns]
        if prompt.system == "" and turns[0][0] != "system" and default_system(lm, prompt):
            messages.insert(0, _message(lm, "system", "", self.image))
        try:
            begun = apply_template(lm, messages, prompt)
            if (
                prompt.system == ""
                and (insisted := default_system(lm, prompt)) in begun
                and insisted
            ):
                raise UserError(
                    f"system: the chat template of {lm.name} writes '{insisted}' whatever the "
                    "system prompt; give another chat_template, or leave system out"
                )
            if self.free:
                return _Layout(begun, "")
            answered = [*messages, _message(lm, "assistant", self.answer, self.image)]
            whole = apply_template(lm, answered, prompt, False)
        except Exception as error:  # a template is a program, and may end in any
            if isinstance(error, UserError):
                raise
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"example {example.id}: the chat template of {lm.name} refuses its turns "
                f"({roles}): {str(error)[:200] or type(error).__name__}; change them, or use "
                "prompt_style qa or plain"
            ) from error
        before, stands, after = whole.rpartition(self.answer)
        end = _first_special(lm, after) or lm.tokenizer.eos_token or ""
        start = THOUGHTS.sub("", begun)  # an answer may have other marks of thoughts before it
        if not stands or not (before.startswith(start) or begun.startswith(before)):
            return _Layout(begun, "", end)  # the template says nothing of where answers stand
        if before.strip() == begun.strip():  # only white space before the answer
            return _Layout(begun, before[len(begun) :], end)
        return _Layout(before, "", end)


def _has_system(example: Example) -> bool:
    return bool(example.turns) and example.turns[0][0] == "system"


def _without_template(turns: Sequence[Turn], style: str, asks: str) -> str:
    if style == "plain":
        return "\n\n".join([*(f"{role.title()}: {text}" for role, text in turns), "Assistant:"])
    if style == "instruct":
        marks = {"user": INSTRUCTION, "assistant": RESPONSE}
        return "\n\n".join([*(f"{marks.get(role, '')}{text}" for role, text in turns), RESPONSE])
    marks = {"user": "Q: ", "assistant": "A: ", "system": ""}
    return "\n".join([*(f"{marks.get(role, f'{role}: ')}{text}" for role, text in turns), asks])


@lru_cache(maxsize=8)
def prompt_template(text: str) -> tuple[Template, set[str]]:
    """A prompt template, and the names that it uses. What it gets at is walled off."""
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        names = meta.find_undeclared_variables(environment.parse(text))
        return environment.from_string(text), names
    except TemplateError as error:
        raise UserError(f"prompt_template is no jinja2 template: {error}") from error


# --- chat templates ---


def apply_template(
    lm: LanguageModel, messages: list[dict], prompt: PromptSettings, begin_answer: bool = True
) -> str:
    """Messages as the chat template writes them. One that writes a date writes that of `TODAY`.

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
    clock = {"strftime_now": TODAY.strftime} if "strftime_now" in template else {}
    return _renderer(lm).apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=begin_answer,
        chat_template=prompt.chat_template,
        **{**prompt.arguments, **clock},
    )


def _message(lm: LanguageModel, role: str, text: str, image: str) -> dict:
    """A message as the chat template takes it. image: stands for the picture in the text."""
    if lm.processor is None:
        return {"role": role, "content": text}
    before, picture, after = text.partition(image)
    parts: list[dict] = [{"type": "text", "text": before}] if before or not picture else []
    if picture:
        parts += [{"type": "image"}, {"type": "text", "text": after}]
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
    prompt = replace(prompt, num_shots=0, shots=(), letters=None, prompt_template=None)
    scored, begun = (render(lm, example, prompt, free) for free in (False, True))
    before = scored.text + scored.space
    return "" if before == begun.text else before.rpartition(question)[2]


def answered(
    lm: LanguageModel, prompt: PromptSettings, question: str, thought: str, answer: str
) -> str:
    """A question and an answer with its thoughts in the chat template, '' if it refuses them.

    Templates read thoughts from a field of the message by one of three names, or pass them over.
    """
    image = f"m{uuid4().hex}"
    messages = [
        _message(lm, "user", question, image),
        _message(lm, "assistant", answer, image)
        | dict.fromkeys(("reasoning_content", "reasoning", "thinking"), thought),
    ]
    try:
        return apply_template(lm, messages, prompt, False)
    except Exception:
        return ""


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
    marks = [f"m{uuid4().hex}x{number}x" for number in range(5)]
    user, answer, again, system, image = marks
    known = controls(lm, prompt)

    def before(word: str, *turns: Turn) -> list[str]:
        messages = [_message(lm, role, text, image) for role, text in turns]
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
