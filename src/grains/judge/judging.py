"""Scores of free texts: overlap with reference answers, false objects, ratings by a judge."""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import requests
from requests.adapters import HTTPAdapter, Retry

from grains import models, prompts, runs
from grains.data import Example
from grains.errors import UserError
from grains.generation import generate
from grains.scoring import batches

HALLUCINATION_BELOW = 3  # of the ratings 0 to 6, as in MMHal-Bench

# --- overlap with reference answers ---


def normalised(text: str) -> list[str]:
    """Words as SQuAD's evaluation compares them: lower case, no ASCII punctuation, no articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(text: str, reference: str) -> float:
    """Harmonic mean of the shares of words that either text has in common with the other.

    1 where neither has any words.
    """
    found, expected = normalised(text), normalised(reference)
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))


def overlap(example: Example, text: str) -> tuple[float, float]:
    """The best F1 with a right answer, and by how much it is above the best with a wrong one.

    The second is NaN where the example has no wrong answer.
    """
    right = max(token_f1(text, answer) for answer in (example.chosen, *example.references))
    wrong = [
        token_f1(text, choice)
        for index, choice in enumerate(example.choices)
        if index != example.label
    ]
    return right, right - max(wrong) if wrong else float("nan")


# --- objects ---

IRREGULAR = {
    "person": "people",
    "man": "men",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "goose": "geese",
}


class Objects:
    """The objects that are known, and all words that name them.

    names: of all objects. Of two that differ in number only, both are the shorter.
    """

    def __init__(self, names: Iterable[str]):
        self.forms: dict[str, str] = {}  # 'traffic lights' -> 'traffic light'
        for name in sorted(map(_words, set(names)), key=lambda name: (len(name), name)):
            if name and name not in self.forms:
                for form in _numbers(name):
                    self.forms.setdefault(form, name)
        longest_first = sorted(self.forms, key=len, reverse=True)
        self.pattern = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")

    def named(self, text: str) -> set[str]:
        """The objects that a text names; of names that overlap, the longer ('traffic light').

        Words alone are compared: synonyms are missed, and 'there is no dog' names a dog.
        """
        return {self.forms[form] for form in self.pattern.findall(_words(text)) if form}

    def count(self, text: str, there: Iterable[str]) -> tuple[int, int]:
        """How many objects a text names, and how many of them are not `there`, in the picture."""
        named = self.named(text)
        known = {self.forms[name] for name in map(_words, there) if name}
        return len(named), len(named - known)


def _words(text: str) -> str:
    """Lower case, one space between words, nothing else."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _numbers(name: str) -> list[str]:
    """A name and what may be its plural or, where it is one, its singular."""
    forms = [name, f"{name}s", f"{name}es"]
    for ending, other in {"y": "ies", "f": "ves", "fe": "ves", "s": "", **IRREGULAR}.items():
        if name.endswith(ending):
            forms.append(name.removesuffix(ending) + other)
    return forms


# --- ratings ---

RUBRIC = """\
You are given a question, what is known to be true, and an answer to the question. Judge two things:
whether the answer hallucinates, and how much it tells. It hallucinates if it states anything that
contradicts what is known, or that nothing known supports.

Choose one number:
6: no hallucination; all that was asked for, and well explained
5: no hallucination; all that was asked for
4: no hallucination; part of what was asked for
3: no hallucination, but next to nothing of what was asked for
2: a hallucination; all that was asked for beside it
1: a hallucination; part of what was asked for beside it
0: a hallucination, and nothing of what was asked for

{facts}

Give your reasons in one or two sentences. Then end with a line that holds nothing but the word
Rating, a colon and the number."""

RATING = re.compile(
    r"""rating (?:\s*\([^)]*\))?  # 'Rating (0-6)'
    [\s:=*_\[(`"']* ([0-6])
    (?![\d.]*\d)  # neither '10' nor '4.5'
    (?![ \t]*(?:-|\u2013|to)[ \t]*\d)  # a scale: '0 to 6'
    """,
    re.IGNORECASE | re.VERBOSE,
)


def judge_prompt(example: Example, text: str) -> str:
    """What a judge is asked about one text."""
    facts = []
    if example.image is not None or example.objects is not None:
        facts.append("The question is about a picture, which you do not see.")
    if example.objects is not None:
        facts.append(f"Objects in the picture: {', '.join(example.objects) or 'none'}")
    if example.question_type:
        facts.append(f"Kind of question: {example.question_type}")
    if example.context:
        facts.append(f"Context of the question: {example.context}")
    facts.append(f"Question: {example.question}")
    right = dict.fromkeys((example.chosen, *example.references))
    facts.append("Correct answer: " + " / ".join(right))
    facts.append(f"Answer to judge: {text or '(empty)'}")
    return RUBRIC.format(facts="\n".join(facts))


def rating(answer: str) -> float:
    """The rating, 0 to 6, that a judge's answer states; NaN if it states none, or several."""
    found = set(RATING.findall(answer))
    return float(found.pop()) if len(found) == 1 else float("nan")


class Judge(Protocol):
    """Answers prompts.

    identity: what its answers depend on, for the manifest.
    """

    identity: dict

    def groups(self, asked: list[str]) -> list[list[int]]:
        """Indices of the prompts that are answered together, and kept as soon as they are."""

    def ask(self, asked: list[str]) -> list[str]:
        """The answers to some prompts."""


class LocalJudge:
    """A chat model on this machine, greedy.

    max_tokens: the longest answer; batch_tokens: positions computed at a time.
    Raises UserError for a model without a chat template.
    """

    def __init__(self, lm: models.LanguageModel, max_tokens: int, batch_tokens: int):
        if not (lm.processor or lm.tokenizer).chat_template:
            raise UserError(
                f"judge {lm.name} has no chat template: give a model that is made to "
                "follow instructions"
            )
        self.lm, self.max_tokens, self.batch_tokens = lm, max_tokens, batch_tokens
        self.identity = lm.identity() | {
            "dtype": str(lm.dtype).removeprefix("torch."),
            "max_tokens": max_tokens,
        }

    def groups(self, asked: list[str]) -> list[list[int]]:
        return batches(
            [item.length + self.max_tokens for item in self._encode(asked)], self.batch_tokens
        )

    def ask(self, asked: list[str]) -> list[str]:
        return generate(self.lm, self._encode(asked), [], self.max_tokens)[0]

    def _encode(self, asked: list[str]) -> list[prompts.Encoded]:
        return [
            prompts.encode(self.lm, Example("judge's prompt", prompt, (), 0), "chat")
            for prompt in asked
        ]


class Endpoint:
    """A chat model behind an OpenAI-compatible interface, at temperature 0.

    url: up to where /chat/completions follows, such as http://localhost:8000/v1. The key, if any,
    is that in the environment's OPENAI_API_KEY. Where the server is busy or out of order (429,
    5xx) it is asked again, later and later, for about a minute.
    """

    RETRIES = Retry(
        total=6,
        connect=1,
        backoff_factor=1,
        allowed_methods=["POST"],
        status_forcelist=[429, *range(500, 600)],
        raise_on_status=False,
    )
    SECONDS = (10, 300)  # to connect, and between two bytes of an answer

    def __init__(self, url: str, model: str, max_tokens: int):
        if not re.fullmatch(r"https?://[^/@?#]+(/[^@?#]*)?", url):
            raise UserError(
                "--judge_url: expected http://HOST/... or https://HOST/..., without a "
                "user, password or query"
            )
        self.url, self.model, self.max_tokens = url.rstrip("/"), model, max_tokens
        self.identity = {"model": model, "url": self.url, "max_tokens": max_tokens}
        self.session = requests.Session()
        self.session.auth = self._authorize  # also keeps ~/.netrc out
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=self.RETRIES))

    def groups(self, asked: list[str]) -> list[list[int]]:
        return [[index] for index in range(len(asked))]

    def ask(self, asked: list[str]) -> list[str]:
        return [self._ask(prompt) for prompt in asked]

    @staticmethod
    def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
        if key := os.environ.get("OPENAI_API_KEY"):
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
        try:
            response = self.session.post(
                f"{self.url}/chat/completions", json=body, timeout=self.SECONDS
            )
        except requests.RequestException as error:
            raise UserError(
                f"the judge at {self.url} cannot be reached ({error}); check "
                "--judge_url and the network, and run the same command again: the "
                "answers so far are kept"
            ) from error
        if not response.ok:
            raise UserError(self._refusal(response))
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"the judge at {self.url} answers {_line(response.text)!r}, which is no chat "
                "completion (choices[0].message.content is not there): is --judge_url the address "
                "of an OpenAI-compatible interface?"
            ) from error
        return content or ""  # null where the model refuses

    def _refusal(self, response: requests.Response) -> str:
        todo = {
            401: "set OPENAI_API_KEY to a valid key",
            403: "OPENAI_API_KEY is of an account that may not use this model",
            404: f"--judge_url must end where /chat/completions follows (often in /v1), and "
            f"--judge name a model that is served ('{self.model}' is given)",
        }.get(
            response.status_code,
            "run the same command again later: the answers so far are kept"
            if response.status_code == 429 or response.status_code >= 500
            else "see what the server says",
        )
        return (
            f"the judge at {self.url} answers with status {response.status_code} "
            f"({_line(response.text)}); {todo}"
        )


def _line(text: str) -> str:
    return " ".join(text.split())[:200]


def load_judge(
    name: str,
    url: str | None,
    max_tokens: int,
    batch_tokens: int,
    dtype: str = "auto",
    device: str | None = None,
    device_map: str | None = None,
) -> Judge:
    """A judge behind `url`, or without one the local model of that name, hub id or folder."""
    if url:
        return Endpoint(url, name, max_tokens)
    runs.processes()  # of several processes every one takes a device of its own
    return LocalJudge(models.load(name, dtype, device, device_map), max_tokens, batch_tokens)
