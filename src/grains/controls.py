"""Control tokens: words of the data that look like them stay words.

A tokenizer reads `<|im_end|>` as the token that ends a turn wherever it stands, also in a question
from a data set. Here the control tokens that the template wrote keep their meaning, and the same
letters in the data's own texts are split like any other word. Texts without such words are left to
the tokenizer as they are.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any
from uuid import uuid4

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, ProcessorMixin

Span = tuple[int, int]  # of characters: begin, end


@dataclass(frozen=True)
class Tokens:
    """The tokens of a text.

    ids: their ids. offsets: the characters of each, None if the tokenizer does not say.
    words: the spans that were given, in the text that the offsets count in.
    """

    ids: list[int]
    offsets: list[Span] | None
    words: list[Span]


@dataclass(frozen=True, eq=False)
class Controls:
    """The control tokens of a tokenizer, and how to tokenize texts that have them as words.

    ids: the token's text -> its id.
    """

    _tokenizer: PreTrainedTokenizerBase
    ids: dict[str, int]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _names(self) -> dict[str, str]:
        """The token's text -> a word that is in no data, and that no normalizer changes."""
        key = uuid4().hex
        return {token: f"k{key}x{number}x" for number, token in enumerate(self.ids)}

    def among(self, text: str, words: Iterable[Span] | None = None) -> list[str]:
        """The control tokens of a text that have a letter in one of the spans (None: anywhere)."""
        matches = self._pattern.finditer(text)
        if words is None:
            return [match[0] for match in matches]
        spans = list(words)
        return [
            match[0]
            for match in matches
            if any(match.start() < end and match.end() > begin for begin, end in spans)
        ]

    def pieces(self, text: str) -> list[str]:
        """A text as its control tokens and single letters."""
        return [match[0] for match in re.finditer(f"{self._pattern.pattern}|.", text, re.DOTALL)]

    def between(self, text: str) -> list[str]:
        """What stands between the control tokens of a text, without white space around it."""
        return [part for part in map(str.strip, self._pattern.split(text)) if part]

    def masked(self, text: str, words: Sequence[Span]) -> tuple[str, list[Span]]:
        """The text with each control token outside of the spans replaced by its name.

        Returns it and the spans in it. The spans are in order and do not overlap.
        """
        parts: list[str] = []
        shifted: list[Span] = []
        length = last = 0

        def add(part: str) -> None:
            nonlocal length
            parts.append(part)
            length += len(part)

        for begin, end in words:
            add(self._named(text[last:begin]))
            start = length
            add(text[begin:end])
            shifted.append((start, length))
            last = end
        add(self._named(text[last:]))
        return "".join(parts), shifted

    def _named(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._names[match[0]], text)

    def encode(self, text: str, words: Sequence[Span], special: bool) -> Tokens:
        """Tokenize a text, control tokens that have a letter in one of the spans as words.

        special: whether the tokenizer adds the tokens that begin and end a text.
        """
        tokenizer = self._tokenizer
        if self.among(text, words):
            if not tokenizer.is_fast:
                return Tokens(self._encode_in_pieces(text, words, special), None, list(words))
            tokenizer = self.tokenizer
            text, words = self.masked(text, words)
        made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast)
        return Tokens(made.input_ids, made.get("offset_mapping"), list(words))

    def _encode_in_pieces(self, text: str, words: Sequence[Span], special: bool) -> list[int]:
        masked, _ = self.masked(text, words)
        ids = {name: self.ids[token] for token, name in self._names.items()}
        encoded: list[int] = []
        for piece in filter(None, re.split("(" + "|".join(map(re.escape, ids)) + ")", masked)):
            if piece in ids:
                encoded.append(ids[piece])
            else:
                made = self._tokenizer.tokenize(piece, split_special_tokens=True)
                encoded += self._tokenizer.convert_tokens_to_ids(made)
        return self._tokenizer.build_inputs_with_special_tokens(encoded) if special else encoded

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The same tokenizer with the control tokens under their names: their texts are words.

        A fast tokenizer's only. The ids stay, also where the vocabulary of words holds the token's
        text: it is under its name there too, and no merge makes it.
        """
        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        names, model = self._names, state["model"]
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
        else:  # Unigram: words with their scores
            model["vocab"] = [[names.get(word, word), score] for word, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [
                merge
                for merge in model["merges"]
                if not names.keys() & {*(pair := _pair(merge)), "".join(pair)}
            ]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        renamed = copy.copy(self._tokenizer)  # but nothing of it that is changed here
        renamed._special_tokens_map = dict(self._tokenizer._special_tokens_map)
        renamed._tokenizer = Tokenizer.from_str(json.dumps(state))
        for attribute, token in self._tokenizer.special_tokens_map.items():
            if str(token) in names:
                setattr(renamed, attribute, names[str(token)])
        shifted = [
            t for t, name in names.items() if renamed._tokenizer.token_to_id(name) != self.ids[t]
        ]
        assert not shifted, f"ids of {shifted} changed"
        return renamed

    def processor(self, processor: ProcessorMixin) -> ProcessorMixin:
        """The same processor with `tokenizer`."""
        renamed = copy.copy(processor)
        renamed.tokenizer = self.tokenizer
        return renamed

    @lru_cache(maxsize=8)  # noqa: B019  a tokenizer has few
    def without(self, ids: frozenset[int]) -> Controls:
        """These control tokens but some."""
        kept = {token: i for token, i in self.ids.items() if i not in ids}
        return Controls(self._tokenizer, kept)


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else list(merge)


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase, templates: str) -> Controls:
    """The tokens that a tokenizer marks as special, and the added ones that the templates name.

    Added tokens that are neither, such as runs of blanks, are words like others.
    templates: the text of the templates that write prompts.
    """
    special = {*tokenizer.all_special_tokens}
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # mistral-common's tokenizers read no text as control tokens
        return Controls(tokenizer, {})
    ids = {
        token.content: index
        for index, token in added.items()
        if token.special or token.content in special or token.content in templates
    }
    return Controls(tokenizer, {token: index for token, index in ids.items() if token.strip()})
