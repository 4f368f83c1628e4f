"""Conversations: preference pairs in the forms that TRL's trainers take.

A prompt may be text or messages (role, content); the answers may repeat it (implicit prompts).
What precedes the last answer is the prompt.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from operator import eq
from typing import Any

from grains.errors import UserError
from grains.files import Rows, described, text_of

Turn = tuple[str, str]  # role, content
_MARK = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, or is meant to be."""
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], dict)


def turns(messages: Any, what: str) -> list[Turn]:
    """(role, content) of each message; the texts of a list of content parts joined.

    Raises UserError, naming the message by its number, for another form.
    """
    return [_turn(message, f"{what}, message {i}") for i, message in enumerate(messages, start=1)]


def _turn(message: Any, what: str) -> Turn:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise UserError(
            f"the {what} is {described(message)}, expected an object with role and content"
        )
    role = text_of(message["role"], f"role of the {what}").strip()
    content = message["content"]
    if isinstance(content, (list, tuple)):
        content = "".join(_texts(content, what))
    text = text_of(content, f"content of the {what}").strip()
    if not role or not text:
        raise UserError(f"the {what} has an empty {'content' if role else 'role'}; fill it in")
    if not re.fullmatch(r"[\w -]{1,40}", role):  # templates write it as it is
        raise UserError(
            f"the {what} has the role {described(role)}, expected a name such as user, assistant "
            "or system"
        )
    return role, text


def _texts(parts: Iterable[Any], what: str) -> Iterable[str]:
    """The texts of a message's content parts. A part that stands for the row's picture is passed
    over: the picture's place is before the text."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            yield text_of(part.get("text"), f"text of the {what}")
        elif kind != "image":
            raise UserError(
                f"the {what} has a part that is {described(kind or part)}, expected parts of the "
                "type text"
            )


def pair(row: dict) -> dict:
    """The prompt and the two answers of a row with prompt (or question), chosen and rejected.

    Returns question (the last user turn), choices, label and turns: all turns before the answer,
    where there are more than that one. Without a prompt, what both answers begin with is it.
    """
    prompt = row["prompt"] if "prompt" in row else row.get("question")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    implicit = "prompt" not in row and "question" not in row
    if not (implicit or is_chat(prompt) or is_chat(chosen) or is_chat(rejected)):
        return {"question": prompt, "choices": [chosen, rejected], "label": 0}
    if implicit and not (is_chat(chosen) or is_chat(rejected)):
        first, second = text_of(chosen, "chosen answer"), text_of(rejected, "rejected answer")
        if not (_MARK.search(first) and _MARK.search(second)):
            return _common_beginning(first, second)
        chats = _marked(first, "chosen answer"), _marked(second, "rejected answer")
    else:
        chats = (
            _conversation(prompt, chosen, "chosen answer"),
            _conversation(prompt, rejected, "rejected answer"),
        )
    return _two_answers(*chats)


def _two_answers(chosen: list[Turn], rejected: list[Turn]) -> dict:
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if chat[-1][0] != "assistant":
            raise UserError(
                f"the {name} conversation ends with a turn of the role '{chat[-1][0]}', expected "
                "an answer of the role 'assistant'"
            )
    if chosen[:-1] != rejected[:-1]:
        same = _common_length(chosen, rejected)
        raise UserError(
            f"the chosen and the rejected conversation differ before their last answers, from "
            f"message {same + 1} on; a pair is two answers to one conversation"
        )
    before = chosen[:-1]
    if not before or before[-1][0] == "assistant":
        raise UserError("nothing is asked before the last answer; a pair needs a prompt")
    asked = [text for role, text in before if role == "user"]
    if not asked:
        raise UserError("no turn of the role 'user' stands before the last answer")
    return {
        "question": asked[-1],
        "choices": [chosen[-1][1], rejected[-1][1]],
        "label": 0,
        "turns": () if len(before) == 1 else tuple(before),
    }


def _conversation(prompt: Any, answer: Any, what: str) -> list[Turn]:
    """All turns, the answer last; an answer may hold the prompt's turns too."""
    if is_chat(prompt):
        before = turns(prompt, "prompt")
    elif prompt is None:
        before = []
    else:
        before = [("user", text_of(prompt, "prompt").strip())]
    if not is_chat(answer):
        return [*before, ("assistant", text_of(answer, what).strip())]
    after = turns(answer, what)
    if after[: len(before)] == before:
        return after
    if before and after[0][0] == "assistant":
        return before + after
    if before and before[0] in after and not is_chat(prompt):  # a system turn before the prompt
        return after
    if before:
        raise UserError(f"the {what} is a conversation that does not begin with the prompt")
    return after


def _marked(text: str, what: str) -> list[Turn]:
    """The turns of '\\n\\nHuman: ...\\n\\nAssistant: ...'; a text before them is the system's."""
    before, *marked = _MARK.split(text)
    conversation = [("system", before.strip())] if before.strip() else []
    for role, content in zip(marked[::2], marked[1::2], strict=True):
        if not content.strip():
            raise UserError(f"the {what} has an empty turn of '{role}'; fill it in")
        conversation.append((_ROLES[role], content.strip()))
    return conversation


def _common_beginning(chosen: str, rejected: str) -> dict:
    """The words that two texts begin with are the prompt."""
    length = _common_length(chosen, rejected)
    edge = next((edge for edge in range(length, 0, -1) if chosen[edge - 1].isspace()), 0)
    prompt = chosen[:edge]
    if not prompt.strip():
        raise UserError(
            "there is no prompt, and chosen and rejected begin with different words; add a "
            "column prompt"
        )
    return {"question": prompt, "choices": [chosen[edge:], rejected[edge:]], "label": 0}


def _common_length(first: Sequence, second: Sequence) -> int:
    """How many items two sequences begin with alike."""
    return sum(takewhile(bool, map(eq, first, second)))


class Paired:
    """Pairs of a preferred and a dispreferred completion of one prompt.

    rows: prompt, completion and label (true for a preferred one). Of one prompt the first of each
    kind make a pair, the second, and so on; a completion without a partner is left out.
    """

    def __init__(self, rows: Rows):
        self._rows = rows
        waiting: dict[bytes, tuple[list[int], list[int]]] = {}
        for index in range(len(rows)):
            row = rows[index]
            try:
                good = truth(row.get("label"), "label")
            except UserError as error:
                raise UserError(f"{rows.place(index)}: {error}") from error
            prompt = repr(row.get("prompt")).encode(errors="surrogatepass")
            kept = waiting.setdefault(hashlib.sha256(prompt).digest(), ([], []))
            kept[not good].append(index)
        self._pairs = sorted(
            two for kept in waiting.values() for two in zip(kept[0], kept[1], strict=False)
        )
        if not self._pairs:
            raise UserError(
                f"{rows.place(0)} and {len(rows) - 1} more: no prompt has a completion with the "
                "label true and another with false, of which pairs could be made"
            )
        self.column_names = [*rows.column_names, "chosen", "rejected"]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        good, bad = self._pairs[int(index)]
        row = self._rows[good]
        return row | {"chosen": row["completion"], "rejected": self._rows[bad].get("completion")}

    def place(self, index: int) -> str:
        good, bad = self._pairs[int(index)]
        return f"{self._rows.place(good)} with row {self._rows.place(bad).rpartition(' ')[2]}"

    def repeats(self, identity: str) -> bool:
        return self._rows.repeats(identity)


def truth(value: Any, what: str) -> bool:
    """A boolean, also written as text or as 0 and 1."""
    if value in (True, False):
        return bool(value)
    known = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in known:
        return known[value.strip().lower()]
    raise UserError(f"the {what} is {described(value)}, expected true or false")
