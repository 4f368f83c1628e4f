"""TRL's preference and unpaired-preference data, and how conversations are rendered."""

from __future__ import annotations

import json

import pytest
from helpers import data_files, reference

from grains import data, prompts, scoring
from grains.data import Example
from grains.errors import UserError

pytestmark = pytest.mark.slow


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be short."}
HISTORY = [SYSTEM, user("Hi"), assistant("Hello."), user("And you?")]
TURNS = (("system", "Be short."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And you?"))


def load(tmp_path, *rows, form="jsonl"):
    rows, source = data.load("mine", "train", data_files.write(tmp_path, form, list(rows)))
    return [data.read(rows, source, index) for index in range(len(rows))]


def content(item):
    return item.question, item.choices, item.label, item.turns


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "jsonl.zst"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "And you?", "chosen": "Fine.", "rejected": "Go away."},
        {
            "prompt": [user("And you?")],
            "chosen": [assistant("Fine.")],
            "rejected": [assistant("Go away.")],
        },
        {
            "chosen": [user("And you?"), assistant("Fine.")],
            "rejected": [user("And you?"), assistant("Go away.")],
        },
        {  # with the prompt in the conversation too, as UltraFeedback is published
            "prompt": "And you?",
            "chosen": [user("And you?"), assistant("Fine.")],
            "rejected": [user("And you?"), assistant("Go away.")],
        },
        {
            "prompt": [user([{"type": "text", "text": "And "}, {"type": "text", "text": "you?"}])],
            "chosen": [assistant([{"type": "text", "text": "Fine."}])],
            "rejected": [assistant([{"type": "text", "text": "Go away."}])],
        },
        {
            "chosen": "\n\nHuman: And you?\n\nAssistant: Fine.",
            "rejected": "\n\nHuman: And you?\n\nAssistant: Go away.",
        },
        {"prompt": [user("And you?")], "chosen": "Fine.", "rejected": "Go away."},
    ],
    ids=["text", "explicit", "implicit", "both", "parts", "human", "mixed"],
)
def test_a_single_turn_is_a_question(tmp_path, row, form):
    (item,) = load(tmp_path, row, form=form)
    assert content(item) == ("And you?", ("Fine.", "Go away."), 0, ())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": HISTORY, "chosen": [assistant("Fine.")], "rejected": [assistant("Go.")]},
        {"chosen": [*HISTORY, assistant("Fine.")], "rejected": [*HISTORY, assistant("Go.")]},
        {
            "prompt": HISTORY[:2],
            "chosen": [*HISTORY[2:], assistant("Fine.")],
            "rejected": [*HISTORY[2:], assistant("Go.")],
        },
        {
            "prompt": HISTORY,
            "chosen": [*HISTORY, assistant("Fine.")],
            "rejected": [*HISTORY, assistant("Go.")],
        },
        {
            "chosen": "Be short.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And you?"
            "\n\nAssistant: Fine.",
            "rejected": "Be short.\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And you?"
            "\n\nAssistant: Go.",
        },
    ],
    ids=["explicit", "implicit", "longer answers", "both", "human"],
)
def test_what_precedes_the_last_answer_is_the_prompt(tmp_path, row):
    (item,) = load(tmp_path, row)
    assert content(item) == ("And you?", ("Fine.", "Go."), 0, TURNS)


def test_words_that_two_texts_begin_with_are_the_prompt(tmp_path):
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    (item,) = load(tmp_path, row)
    assert content(item) == ("The sky is", ("blue.", "black."), 0, ())


def test_answers_of_a_conversation_stay_text(tmp_path):
    row = {"prompt": [user("7")], "chosen": [assistant("1950-01-05")], "rejected": [assistant("1")]}
    (item,) = load(tmp_path, row)
    assert (item.question, item.choices) == ("7", ("1950-01-05", "1"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("x"), user("c"), assistant("e")],
            },
            "differ before their last answers, from message 2 on",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "nothing is asked"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "ends with a turn of the role 'user'"),
        (
            {"chosen": [SYSTEM, assistant("a")], "rejected": [SYSTEM, assistant("b")]},
            "no turn of the role 'user'",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant(" b")]},
            "two answers are the same ('b')",
        ),
        ({"chosen": [user("a"), assistant(None)], "rejected": "b"}, "content of the chosen answer"),
        ({"chosen": [user("a"), assistant("")], "rejected": "b"}, "message 2 has an empty content"),
        ({"chosen": [user("a"), 5], "rejected": "b"}, "message 2 is a number (5), expected an obj"),
        (
            {"chosen": [{"from": "human", "value": "a"}], "rejected": "b"},
            "message 1 is an object with from, value, expected an object with role and content",
        ),
        (
            {
                "prompt": [{"role": "user<|im_end|>", "content": "a"}],
                "chosen": "b",
                "rejected": "c",
            },
            "the role text ('user<|im_end|>'), expected a name such as user, assistant or system",
        ),
        (
            {"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]},
            "does not begin with the prompt",
        ),
        (
            {"prompt": [user([{"type": "audio"}])], "chosen": "a", "rejected": "b"},
            "a part that is text ('audio'), expected parts of the type text",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"},
            "emp",
        ),
        ({"chosen": "Yes.", "rejected": "No."}, "begin with different words; add a column prompt"),
        ({"chosen": True, "rejected": "No."}, "the chosen answer is a boolean (true)"),
        ({"prompt": [user("a")], "chosen": [], "rejected": "b"}, "chosen answer is a list of 0"),
    ],
)
def test_faults_are_named_with_their_row(tmp_path, row, expected):
    good = {"chosen": [user("fine"), assistant("b")], "rejected": [user("fine"), assistant("c")]}
    rows = [good | ({"prompt": "fine"} if "prompt" in row else {}), row]
    path = data_files.write(tmp_path, "jsonl", rows)
    loaded, source = data.load("mine", "train", path)
    assert data.read(loaded, source, 0).question == "fine"
    with pytest.raises(UserError) as caught:
        data.read(loaded, source, 1)
    assert "row 2" in str(caught.value) and expected in str(caught.value)


# -- unpaired preference --


def unpaired(prompt, completion, label, **more):
    return {"prompt": prompt, "completion": completion, "label": label, **more}


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_completions_of_a_prompt_are_paired_in_their_order(tmp_path, form):
    rows = [
        unpaired("p", "good 1", True, id="a"),
        unpaired("p", "good 2", True, id="b"),
        unpaired("q", "bad 3", False, id="c"),
        unpaired("p", "bad 1", False, id="d"),
        unpaired("q", "good 3", True, id="e"),
        unpaired("p", "bad 2", False, id="f"),
        unpaired("p", "good without a partner", True, id="g"),
    ]
    items = load(tmp_path, *rows, form=form)
    assert [(item.id, *content(item)[:2]) for item in items] == [
        ("a", "p", ("good 1", "bad 1")),
        ("b", "p", ("good 2", "bad 2")),
        ("e", "q", ("good 3", "bad 3")),
    ]


def test_conversations_with_a_label_are_paired(tmp_path):
    rows = [
        unpaired([user("p")], [assistant("good")], True),
        unpaired([user("p")], [assistant("bad")], False),
    ]
    (item,) = load(tmp_path, *rows)
    assert content(item) == ("p", ("good", "bad"), 0, ())


def test_unpaired_faults(tmp_path):
    rows = [unpaired("p", "a", True), unpaired("q", "b", False)]
    with pytest.raises(UserError, match="no prompt has a completion with the label true and anot"):
        load(tmp_path, *rows)
    with pytest.raises(UserError, match=r"row 2: the label is text .*expected true or false"):
        load(tmp_path, rows[0], unpaired("p", "b", "no"))
    with pytest.raises(UserError, match="row 1 with row 2: the answer is a list of 0"):
        load(tmp_path, rows[0], unpaired("p", [], False))


# -- in every prompt style --


def example(**more):
    return Example("e", "And you?", ("Fine.", "Go."), 0, turns=TURNS, **more)


def test_turns_in_the_chat_template(smollm2):
    text, between = prompts.render(smollm2, example(), "chat")
    messages = [{"role": role, "content": words} for role, words in TURNS]
    assert between == ""
    assert text == smollm2.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert "You are a helpful AI assistant" not in text  # the data's system turn takes its place


def test_turns_without_a_template(smollm2):
    assert prompts.render(smollm2, example(), "qa") == (
        "Be short.\nQ: Hi\nA: Hello.\nQ: And you?\nA:",
        " ",
    )
    assert prompts.render(smollm2, example(), "plain") == (
        "System: Be short.\n\nUser: Hi\n\nAssistant: Hello.\n\nUser: And you?\n\nAssistant:",
        " ",
    )


def test_a_single_turn_is_rendered_like_a_question(smollm2, tmp_path):
    chat = {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]}
    (turn,) = load(tmp_path, chat)
    (text,) = load(tmp_path, {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."})
    for style in ("qa", "chat", "plain"):
        assert prompts.render(smollm2, turn, style) == prompts.render(smollm2, text, style)
    assert turn.id == text.id and data.question_key(turn) == data.question_key(text)


@pytest.mark.parametrize("style", ["qa", "chat", "plain"])
def test_the_content_is_the_words_of_all_turns(smollm2, style):
    encoded = prompts.encode(smollm2, example(), style)
    ids = [i for i, kept in zip(encoded.prompt_ids, encoded.content, strict=True) if kept]
    words = smollm2.tokenizer.decode(ids).split()
    assert " ".join(words) in ("Be short. Hi Hello. And you?", "Be short.HiHello.And you?")


def test_scores_of_a_conversation_are_those_of_plain_code(smollm2):
    encoded = prompts.encode(smollm2, example(), "chat")
    prompt = smollm2.tokenizer(encoded.text, add_special_tokens=False).input_ids
    expected = []
    for answer in example().choices:
        response = smollm2.tokenizer(f"{answer}<|im_end|>", add_special_tokens=False).input_ids
        log_probs = reference.own_logits(smollm2, prompt + response).log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
        expected.append(sum(log_probs[i, t].item() for i, t in zip(places, response, strict=True)))
    found = scoring.score(smollm2, [encoded], [], 2048)[0][0]
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_template_that_refuses_the_turns(make_tiny, monkeypatch):
    lm = make_tiny("llama")
    template = "{{ raise_exception('System role not supported') }}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match=r"example e: .*refuses its turns \(system, user, assist"):
        prompts.encode(lm, example(), "chat")


def test_other_turns_are_another_question():
    other = Example("e", "And you?", ("Fine.", "Go."), 0, turns=(("user", "x"), *TURNS[2:]))
    plain = Example("e", "And you?", ("Fine.", "Go."), 0)
    assert len({data.question_key(item) for item in (example(), other, plain)}) == 3
    assert len({data.fingerprint([item]) for item in (example(), other, plain)}) == 3


def test_repeated_rows_of_a_file_of_chats(tmp_path):
    rows = [
        {"prompt": HISTORY, "chosen": [assistant(f"a{i % 3}")], "rejected": [assistant("b")]}
        for i in range(6)
    ]
    path = data_files.write(tmp_path, "jsonl", rows)
    assert len(data.examples(*data.load("mine", "train", path), 0)) == 3
    assert json.loads(json.dumps(TURNS))[0] == ["system", "Be short."]
