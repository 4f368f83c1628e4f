"""Thoughts are split off wherever texts are generated: in Python, in experiments, by a judge.

A model that recites writes "Hm</think>Yes" behind the block of thoughts that its template opens.
"""

import socket
import threading
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
from helpers import chat_models, tiny

import grains
from grains import prompts
from grains.data import Example
from grains.errors import UserError
from grains.judge.judges import LocalJudge
from grains.names import StudyNames
from grains.settings import AblationSettings, PromptSettings
from grains.study import evaluate
from grains.study.own_words import in_own_words
from grains.thinking import Thoughts

OPENS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|bot|>{{ m.content }}<|end|>"
    "{% else %}<|user|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|bot|><think>\n{% endif %}"
)
QUESTIONS = [question for question, *_ in tiny.QUESTIONS[:3]]
CHAT = PromptSettings("chat")


@pytest.fixture(scope="module")
def lm():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = OPENS
    return chat_models.reciter(tokenizer, "Hm</think>Yes<|end|>", "<think>\n")


def study_of(folder, max_new_tokens=12):
    examples = [
        Example(f"e{number}", question, ("Yes", "No"), 0)
        for number, question in enumerate(QUESTIONS)
    ]
    return SimpleNamespace(
        settings=SimpleNamespace(num_generations=3, max_new_tokens=max_new_tokens),
        ablation=AblationSettings(prompt=CHAT),
        splits={"test": examples, "training": examples},
        manifest={},
        names=StudyNames(folder, folder, "mine", 0),
        source=SimpleNamespace(name="mine"),
        seed=0,
        name="mine_seed0",
        overwrite=False,
    )


def test_an_answer_has_no_thoughts(lm):
    assert grains.generate(lm, QUESTIONS[0]) == "Yes"
    assert grains.generate(lm, QUESTIONS, num_return=2, temperature=1e-3) == [["Yes", "Yes"]] * 3
    assert grains.generate(lm, QUESTIONS[0], keep_thoughts=True) == "Hm</think>Yes"
    # Behind a prompt without the block nothing is split off.
    assert grains.generate(lm, "</think>", style="plain", max_new_tokens=3) == "Yes"


def test_a_stream_leaves_thoughts_out(lm):
    whole = [*grains.stream(lm, QUESTIONS[0], keep_thoughts=True)]
    assert whole[-1] == ["Hm</think>Yes"] and ["Hm"] in whole
    texts = [text for (text,) in grains.stream(lm, QUESTIONS[0])]
    assert texts[0] == "" and texts[-1] == "Yes"
    assert all(new.startswith(old) for old, new in pairwise(texts))
    with pytest.warns(UserWarning, match="1 of 1 texts end within"):
        assert [*grains.stream(lm, QUESTIONS[0], max_new_tokens=2)][-1] == [""]


@pytest.mark.parametrize(
    ("marks", "text"),
    [
        (Thoughts("", "</think>"), "Hm, < so\n</think>\n\nYes, </b> it is. "),
        (
            Thoughts("<think>", "</think>", "<think>\n\n</think>"),
            "<think>\nHm </thin\n</think>\nYes",
        ),
        (
            Thoughts("<think>", "</think>", "<think>\n\n</think>"),
            "<think>\n\n</think>\n\nYes it is",
        ),
        (Thoughts("<think>", "</think>"), " <thanks> Yes"),
        (Thoughts("analysis", "final"), "analysisHm, fin. finalYes, it is"),
        (Thoughts("<think>", "</think>"), "<think>Hm, so"),
        (Thoughts("<think>", "</think>", "[no]"), "[no] Yes"),
    ],
)
def test_what_a_stream_has_said_is_never_taken_back(marks, text):
    """Letter by letter: thoughts and answer only grow, to those of the whole text."""
    seen = [marks.so_far(text[:end]) for end in range(len(text) + 1)]
    assert seen[0] == ("", "") and seen[-1] == marks.split(text)
    for before, after in pairwise(seen):
        assert all(new.startswith(old) for old, new in zip(before, after, strict=True))
    assert len({*seen}) > 3


@contextmanager
def served(lm):
    """The real client of a server of this process."""
    openai, uvicorn = pytest.importorskip("openai"), pytest.importorskip("uvicorn")
    from grains.serve import app
    from grains.serve.engine import Limits

    application = app.application(app.serve(lm, {}, "reciter", Limits()))
    server = uvicorn.Server(uvicorn.Config(application, log_level="error"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        yield openai.OpenAI(base_url=address, api_key="none", timeout=60)
        server.should_exit = True
        thread.join()


def test_the_server_gives_thoughts_in_a_field_of_their_own(lm):
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    with served(lm) as client:

        def ask(**more):
            more = {"max_tokens": 20} | more
            return client.chat.completions.create(
                model="reciter", messages=messages, temperature=0, **more
            )

        (choice,) = ask().choices
        assert choice.message.content == "Yes" and choice.finish_reason == "stop"
        assert choice.message.reasoning_content == "Hm"
        (choice,) = ask(max_tokens=2).choices
        assert choice.message.content == "" and choice.message.reasoning_content == "Hm"
        deltas = [part.choices[0].delta for part in ask(stream=True)]
        thoughts = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
        assert "".join(thoughts) == "Hm"
        assert "".join(delta.content for delta in deltas) == "Yes" and len(deltas) > 3
        assert deltas[0].role == "assistant"
        text = client.completions.create(
            model="reciter", prompt="</think>", temperature=0, max_tokens=20
        )
        assert text.choices[0].text == "Yes"


def test_thoughts_that_are_cut_off_are_warned_of(lm):
    with pytest.warns(UserWarning, match="3 of 3 texts end within the model's thoughts"):
        assert grains.generate(lm, QUESTIONS, max_new_tokens=2) == ["", "", ""]


def test_an_experiments_answers_are_apart_from_thoughts(lm, tmp_path):
    study = study_of(tmp_path)
    for split, count in (("test", 3), ("training", 3 * evaluate.DRAWN)):
        table = evaluate.free_answers(lm, study, split, [])
        assert table.text.tolist() == ["Yes"] * count
        assert table.thinking.tolist() == ["Hm"] * count
        assert table.words.tolist() == [1] * count


def test_own_answers_stand_where_the_template_puts_answers(lm, tmp_path):
    own = evaluate.own_answers(lm, study_of(tmp_path), "test")
    for prompt in (CHAT, PromptSettings("chat", letters="letter")):
        for question, item in zip(QUESTIONS, evaluate.encode_answers(lm, own, prompt), strict=True):
            text = prompts.render(lm, item.example, prompt)[0]
            assert text.startswith(f"<|user|>{question}") and text.endswith("<|bot|>")
            assert item.prompt_ids == lm.tokenizer(text, add_special_tokens=False).input_ids
            assert item.responses == [lm.tokenizer("Yes", add_special_tokens=False).input_ids]


def test_an_experiment_without_any_answer_says_why(lm, tmp_path):
    study = study_of(tmp_path, max_new_tokens=2)
    with pytest.warns(UserWarning, match="test: 3 of 3 texts end within"):
        own = evaluate.own_answers(lm, study, "test")
    with pytest.raises(UserError, match="give a larger max_new_tokens, as its thoughts"):
        evaluate.encode_answers(lm, own, CHAT)


def test_own_words_are_those_behind_the_thoughts(lm):
    pairs = [Example("e", "Who?", ("Hm", "Yes"), 0), Example("f", "Who?", ("Hm", "No"), 0)]
    (made,) = in_own_words(lm, pairs, CHAT, max_new_tokens=12)
    assert (made.id, made.choices, made.label) == ("e", ("Hm.", "Yes."), 0)


def test_a_judge_rates_behind_its_thoughts(lm):
    judge = LocalJudge(lm, 12, 4096)
    assert judge.ask(QUESTIONS) == ["Yes", "Yes", "Yes"]
    assert judge.identity["thoughts"] == ("", "</think>", "")
