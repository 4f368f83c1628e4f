"""Thoughts are split off wherever texts are generated: in Python, in experiments, by a judge.

A model that recites writes "Hm</think>Yes" behind the block of thoughts that its template opens.
"""

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


def test_a_judge_rates_behind_its_thoughts(lm):
    judge = LocalJudge(lm, 12, 4096)
    assert judge.ask(QUESTIONS) == ["Yes", "Yes", "Yes"]
    assert judge.identity["thoughts"] == ("", "</think>", "")
