"""Steering pairs in the model's own words.

The answers of many data sets are a word or two, while a model answers in sentences. Vectors made
from such pairs alone move what the model prefers among bare answers, and its free answers little
(docs/trials.md). So a pair is also written as the model writes: the sentence of its own free answer
that names one of the two, with all before it, and the same text with the other one in its place.
Which of the two texts is preferred the data says, as before. The paper has no such pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grains import prompts, thinking
from grains.data import Example
from grains.generation import decoding_batches, generate
from grains.lm import LanguageModel
from grains.settings import PromptSettings
from grains.study.naming import core, names, swapped, up_to


def in_own_words(
    lm: LanguageModel,
    pairs: Sequence[Example],
    prompt: PromptSettings,
    max_new_tokens: int,
    max_tokens: int = 2048,
) -> list[Example]:
    """The pairs again, with answers in the words of the model's own greedy free answers.

    Left out are pairs whose free answer names both answers or neither. The preferred answer comes
    first. Of a model that thinks first, what comes after its thoughts is the answer.

    max_new_tokens: of a free answer, thoughts included. max_tokens: positions computed at a time.
    """
    items = [prompts.encode(lm, pair, prompt, free=True) for pair in pairs]
    marks = thinking.thoughts(lm, prompt)
    written = [""] * len(items)
    for members in decoding_batches(items, [], max_new_tokens, max_tokens):
        (texts,) = generate(lm, [items[i] for i in members], [], max_new_tokens)
        for index, text in zip(members, texts, strict=True):
            written[index] = marks.split(text)[1] if marks else text
    made = []
    for pair, text in zip(pairs, written, strict=True):
        chosen, rejected = pair.chosen, pair.rejected
        if names(text, chosen) == names(text, rejected) or not (core(chosen) and core(rejected)):
            continue
        named, instead = (chosen, rejected) if names(text, chosen) else (rejected, chosen)
        sentence = up_to(text, named)
        choices = (sentence, swapped(sentence, named, instead))
        made.append(replace(pair, choices=choices if named == chosen else choices[::-1], label=0))
    return made
