"""Thoughts in what a model writes: apart from its answer.

How a model marks its thoughts stands in its chat template, which writes those of an assistant's
message, or opens a block of them for the model to fill.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from grains import rendering
from grains.data import Example
from grains.lm import LanguageModel
from grains.settings import PromptSettings

OPENED = re.compile(r"<([\w:]+)>\s*\Z")
NAMED = re.compile(r"<((?:think|thought|reason)\w*)>\s*\Z")  # also where answers stand in it
EMPTY = re.compile(r"\s*(<([\w:]+)>\s*(</\2>))\s*")


@dataclass(frozen=True)
class Thoughts:
    """The words around a model's thoughts, without special tokens and outer white space.

    begin: before them, '' if the prompt has opened them. end: between them and the answer.
    without: before an answer without thoughts.
    """

    begin: str
    end: str
    without: str = ""

    def split(self, text: str) -> tuple[str, str]:
        """The thoughts and the answer in a text that the model wrote, as it is decoded without
        special tokens. A text that ends within the thoughts has no answer."""
        text = text.strip()
        before, ends, after = text.partition(self.end)
        if ends or not self.begin or text.startswith(self.begin):
            return before.strip().removeprefix(self.begin).strip(), after.strip()
        if self.without and text.startswith(self.without):
            text = text.removeprefix(self.without).strip()
        return "", text

    def so_far(self, text: str) -> tuple[str, str]:
        """`split` of a text that goes on: what no further word takes back.

        Thoughts that the prompt has not opened begin with their mark, or it is all an answer.
        """
        text = text.lstrip()
        if any(mark and mark.startswith(text) for mark in (self.begin, self.without)):
            return "", ""
        if text.startswith(self.begin):
            thought, ends, answer = text.removeprefix(self.begin).partition(self.end)
            sizes = range(len(self.end) - 1, 0, -1)
            begun = next((k for k in sizes if not ends and thought.endswith(self.end[:k])), 0)
            return thought[: len(thought) - begun].strip(), answer.strip()
        if self.without:
            text = text.removeprefix(self.without)
        return "", text.strip()


def cut_off(texts: Sequence[tuple[str, str]]) -> str:
    """What users should know of texts that ended within their thoughts, '' if none did.

    texts: thoughts and answers, as `Thoughts.split` gives them.
    """
    count = sum(bool(thought) and not answer for thought, answer in texts)
    if not count:
        return ""
    return (
        f"{count} of {len(texts)} texts end within the model's thoughts, so they have no "
        "answer; give a larger max_new_tokens, or template_args that turn thoughts off (such as "
        "enable_thinking=false)"
    )


def thoughts(lm: LanguageModel, prompt: PromptSettings) -> Thoughts | None:
    """How a model marks its thoughts in free generation; None if its chat template has none."""
    if prompt.style != "chat" or not rendering.chat_template(lm, prompt):
        return None
    asked, thought, answer = (f"m{uuid4().hex}x{number}x" for number in range(3))
    own = PromptSettings("chat", None, prompt.arguments, prompt.chat_template)
    example = Example("", asked, (), 0)
    begun = rendering.render(lm, example, own, free=True).text.rpartition(asked)[2]
    scored = rendering.render(lm, example, own)
    before = (scored.text + scored.space).rpartition(asked)[2]

    def words(text: str) -> str:
        ids = lm.tokenizer(text, add_special_tokens=False).input_ids
        return lm.tokenizer.decode(ids, skip_special_tokens=True).strip()

    whole = rendering.answered(lm, own, asked, thought, answer)
    start, _, rest = whole.partition(thought)
    between, has_thought, _ = rest.partition(answer)
    if has_thought and (end := words(between)):
        opens = start.rpartition(asked)[2]
        without = words(before.removeprefix(begun)) if before.startswith(begun) else ""
        if begun.rstrip() == before.rstrip() != "" and begun.rstrip().endswith(end):
            return None  # the prompt has closed them already
        return Thoughts(words(opens.removeprefix(begun)), end, without)
    # It writes no thoughts of messages, but opens a block of them, or writes an empty one.
    if opened := OPENED.search(begun.removeprefix(before)) or NAMED.search(begun):
        return Thoughts("", f"</{opened[1]}>")
    turned_off = ""  # how it begins where it is told to leave thoughts out
    arguments = {**own.arguments, "enable_thinking": False}
    template = rendering.chat_template(lm, prompt) or ""
    if "enable_thinking" in template and arguments != own.arguments:
        off = replace(own, template_args=arguments)
        turned_off = rendering.render(lm, example, off, free=True).text.rpartition(asked)[2]
    for text in (before.removeprefix(begun), turned_off.removeprefix(begun)):
        if empty := EMPTY.fullmatch(text):
            return Thoughts(f"<{empty[2]}>", empty[3], words(empty[1]))
    return None
