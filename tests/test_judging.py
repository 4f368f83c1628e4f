"""Scores of free texts against cases worked out by hand and slow second ways; the script on what
the real stages wrote, with judges that really answer: an HTTP server and a chat model."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from math import exp, isnan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from datasets import Dataset, Features, Image, List, Value
from helpers import tiny
from PIL import Image as Picture

import score_generations
import steering_generation
from demo import registered, shapes  # noqa: F401  the data set shapes, by its short name
from grains import data, models, runs
from grains.cli import flags
from grains.data import Example
from grains.errors import UserError
from grains.generation import Written
from grains.judge import generations as generations_of
from grains.judge import judges, metrics
from grains.judge.scores import summary as summary_of
from grains.settings import DataSettings
from grains.steering import Configuration

pytest_plugins = ("helpers.command_line",)

SRC = Path(__file__).parents[1].absolute() / "src"
KEY = "sk-of-a-test"

# --- overlap ---


@pytest.mark.parametrize(
    "text, reference, f1",
    [
        ("The cat sat on the mat.", "a cat on a mat", 6 / 7),  # cat sat on mat; cat on mat
        ("no no no", "No!", 1 / 2),  # a word counts as often as both have it
        ("It's 3.5", "its 35", 1.0),
        ("the theatre", "an atheist", 0.0),  # articles are whole words
        ("", "the", 1.0),
        ("", "cat", 0.0),
        ("B A", "a b", 1.0),
    ],
)
def test_token_f1(text, reference, f1):
    assert metrics.token_f1(text, reference) == pytest.approx(f1)


@pytest.mark.parametrize(
    "text, reference, bleu, rouge",
    [
        # 5 of 5 words; pairs 3 + 1 of 4 + 1, threes 2 + 1 of 3 + 1, fours 1 + 1 of 2 + 1; it is
        # shorter than the reference: exp(1 - 6 / 5)
        (
            "cats often land on feet",
            "cats often land on their feet",
            (4 / 5 * 3 / 4 * 2 / 3) ** (1 / 4) * exp(-1 / 5),
            10 / 11,
        ),
        # 3 of 4 words; pairs 1 + 1 of 3 + 1, threes 1 of 2 + 1, fours 1 of 1 + 1
        (
            "dogs chase red cats",
            "dogs chase cats always",
            (3 / 4 * 2 / 4 * 1 / 3 * 1 / 2) ** (1 / 4),
            6 / 8,
        ),
        ("yes yes yes", "yes", (1 / 3 * 1 / 3 * 1 / 2) ** (1 / 4), 2 / 4),
        ("white", "yellow", 0.0, 0.0),
        ("", "the", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
    ],
)
def test_bleu_and_rouge(text, reference, bleu, rouge):
    assert metrics.bleu(text, reference) == pytest.approx(bleu)
    assert metrics.rouge_l(text, reference) == pytest.approx(rouge)


def test_margin_is_of_the_nearest_right_and_the_nearest_wrong_answer():
    example = Example(
        "1", "Which?", ("it is yellow", "it is white"), 1, references=("white paint",)
    )
    found = metrics.margin(metrics.rouge_l, example, "white paint is yellow")
    assert found == pytest.approx(4 / 6 - 4 / 7)


def test_overlap_is_with_the_best_of_several_answers():
    example = Example(
        "1",
        "Which?",
        ("it is yellow", "it is white", "it is bright yellow"),
        1,
        references=("white",),
    )
    right, margin = metrics.overlap(example, "White, not yellow")
    assert (right, margin) == pytest.approx((1 / 2, 1 / 2 - 1 / 3))
    alone = Example("2", "Which?", ("it is white",), 0)
    right, margin = metrics.overlap(alone, "White, not yellow")
    assert right == pytest.approx(1 / 3) and isnan(margin)


def test_further_right_answers_of_the_packaged_questions():
    rows, source = data.load("misconceptions", "test")
    example = data.read(rows, source, 0)
    assert list(example.references) == rows[0]["correct_answers"] and example.references


# --- objects ---

KNOWN = [
    "Man",
    "Traffic light",
    "Light",
    "Dog",
    "Bus",
    "Person",
    "Child",
    "Flowers",
    "Flower",
    "Berry",
    "Knife",
    "Wine glass",
    "Trousers",
]


@pytest.mark.parametrize(
    "text, named",
    [
        (
            "Two men and children at the traffic lights, by a bus.",
            {"man", "child", "traffic light", "bus"},
        ),
        ("traffic by the lights", {"light"}),
        (
            "Berries, knives; wine glasses and a FLOWER-bed of flowers.",
            {"berry", "knife", "wine glass", "flower"},
        ),
        ("People: a dog's trousers, two buses", {"person", "dog", "trousers", "bus"}),
        ("lightly dogged, human", set()),
        ("", set()),
    ],
)
def test_objects_named(text, named):
    assert metrics.Objects(KNOWN).named(text) == named
    assert metrics.Objects([]).named(text) == set()


def test_objects_that_are_not_there():
    known = metrics.Objects(KNOWN)
    text = "A man with two dogs and a flower at a traffic light; the dogs bark."
    assert known.count(text, ["Man", "Traffic light", "Child", "Flowers"]) == (4, 1)
    assert known.count("Nothing.", ["Man"]) == (0, 0)
    assert known.count(text, []) == (4, 4)


def test_objects_of_drawn_scenes(tmp_path):
    shapes.write_dataset(tmp_path, 1, 1, 3, 1)
    rows, source = data.load("shapes", "test", str(tmp_path))
    scenes = {
        f"test-{scene.seed}": scene
        for scene in shapes.scenes_of("test", 3, keep=shapes.flaw_applies)
    }
    for index in range(3):
        example = data.read(rows, source, index)
        pairs = scenes[example.id].pairs
        assert example.objects == tuple(" ".join(pair) for pair in pairs)
        known = metrics.Objects([" ".join(pair) for pair in shapes.PAIRS])
        assert known.count(example.chosen, example.objects) == (len(pairs), 0)
        assert known.count(example.rejected, example.objects) == (len(pairs) + 1, 1)


@pytest.mark.parametrize("written", ['["Red kite", "Man"]', "Red kite, Man"])
def test_objects_in_a_users_file(tmp_path, written):
    row = {"prompt": "What?", "chosen": "yes", "rejected": "no"}
    path = tiny.write_jsonl(tmp_path / "own.jsonl", [row | {"image_content": written}])
    rows, source = data.load("own", "train", str(path))
    assert data.read(rows, source, 0).objects == ("Red kite", "Man")
    path = tiny.write_jsonl(tmp_path / "plain.jsonl", [row])
    rows, source = data.load("own", "train", str(path))
    assert data.read(rows, source, 0).objects is None


# --- ratings ---


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("It is all true.\nRating: 6", 6),
        ("**Rating:** 0", 0),
        ("rating = [4]", 4),
        ("RATING: 3.", 3),
        ('{"reason": "so", "rating": 2}', 2),
        ("Rating: 5/6", 5),
        ("Rating (0-6): 1", 1),
        ("Rating: 4\n\nRating: 4", 4),
        ("Rating: 4\n- 2 objects are wrong", 4),
        ("Rating: 4\nOn reflection:\nRating: 2", None),
        ("Rating: 10", None),
        ("Rating: 4.5", None),
        ("Rating: 7", None),
        ("Rating: -1", None),
        ("Rating: 0 to 6", None),
        ("Rating: 0-6", None),
        ("I rate it 5", None),
        ("Rating: good", None),
        ("", None),
        (judges.RUBRIC, None),
    ],
)
def test_rating(answer, expected):
    found = judges.rating(answer)
    assert isnan(found) if expected is None else found == expected


def test_what_a_judge_is_told():
    example = Example(
        "1",
        "What does he ride?",
        ("A bicycle.", "A horse."),
        0,
        "In town.",
        references=("A bike",),
        objects=("Man", "Bicycle"),
        question_type="attribute",
    )
    prompt = judges.judge_prompt(example, "He rides {a} bus.")
    for told in (
        "picture",
        "Objects in the picture: Man, Bicycle",
        "attribute",
        "In town.",
        "What does he ride?",
        "A bicycle. / A bike",
        "He rides {a} bus.",
    ):
        assert told in prompt
    assert "horse" not in prompt
    assert "picture" not in judges.judge_prompt(Example("2", "Why?", ("So",), 0), "Thus")


# --- an endpoint ---


class Chat:
    """An OpenAI-compatible server; reply(number of request, prompt) -> status, content, headers.

    The content is a text, something else that stands for it in the JSON of an answer, or bytes
    that are sent as they are; headers may be left out. asked: what it was sent.
    """

    def __init__(self, reply):
        self.reply, self.asked, self.paths, self.headers, self.got = reply, [], [], [], 0
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                chat.got += 1
                self._send(200, "Rating: 6")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                chat.asked.append(body)
                chat.paths.append(self.path)
                chat.headers.append(self.headers)
                self._send(*chat.reply(len(chat.asked), body["messages"][0]["content"]))

            def _send(self, status, content, headers=()) -> None:
                if not isinstance(content, bytes):
                    content = json.dumps(completion(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> Chat:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]

    @property
    def keys(self) -> list[str | None]:
        return [headers.get("Authorization") for headers in self.headers]


def completion(content) -> dict:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}


@pytest.fixture
def waits(monkeypatch):
    """Nothing waits: the seconds it would have."""
    slept = []
    monkeypatch.setattr("grains.judge.judges.time.sleep", slept.append)
    return slept


@pytest.fixture
def direct(monkeypatch, waits):
    """No proxy, no key, no waiting."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.delenv(f"OPENAI_{name}", raising=False)


@pytest.mark.parametrize("slash", ["", "/"])
def test_what_an_endpoint_is_sent(direct, monkeypatch, slash):
    with Chat(lambda number, prompt: (200, f"{prompt}!")) as chat:
        judge = judges.Endpoint(chat.url + slash, "some-model", 17)
        assert judge.ask(["one", "two"]) == ["one!", "two!"]
        assert chat.keys == [None, None]
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_ORG_ID", "org-of-a-test")
        monkeypatch.setenv("OPENAI_PROJECT_ID", "project-of-a-test")
        judges.Endpoint(chat.url + slash, "some-model", 17).ask(["three"])
    assert chat.keys[2] == f"Bearer {KEY}" and set(chat.paths) == {"/v1/chat/completions"}
    assert "of-a-test" not in str(chat.headers[2]).replace(KEY, "")
    assert chat.asked[0] == {
        "model": "some-model",
        "temperature": 0,
        "max_tokens": 17,
        "messages": [{"role": "user", "content": "one"}],
    }


def test_a_refusal_is_an_answer_without_a_rating(direct):
    with Chat(lambda *_: (200, None)) as chat:
        assert judges.Endpoint(chat.url, "m", 9).ask(["one"]) == [""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(direct, waits, status):
    said = []
    with Chat(lambda number, prompt: (status if number == 1 else 200, "good")) as chat:
        assert judges.Endpoint(chat.url, "m", 9, said.append).ask(["one"]) == ["good"]
    assert chat.prompts == ["one", "one"] and waits == [1]
    assert said == [f"the judge at {chat.url} is busy (status {status}): asking again in 1 s"]


def test_an_endpoint_that_stays_busy(direct, waits):
    said = []
    with (
        Chat(lambda *_: (429, b"slow down")) as chat,
        pytest.raises(UserError, match=r"status 429 \(slow down\); run the same command again"),
    ):
        judges.Endpoint(chat.url, "m", 9, said.append).ask(["one"])
    assert len(chat.asked) == 7 and len(said) == 6
    assert waits == sorted(waits) and 30 < sum(waits) < 90


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("20", 20), ("0.5", 0.5), ("0", 1), ("-5", 1), ("soon", 1), ("nan", 1), ("1e9", 1)],
)
def test_a_busy_endpoint_says_when(direct, waits, wanted, expected):
    def reply(number, prompt):
        return (429, b"busy", {"Retry-After": wanted}) if number == 1 else (200, "good")

    with Chat(reply) as chat:
        assert judges.Endpoint(chat.url, "m", 9).ask(["one"]) == ["good"]
    assert waits == [expected]


@pytest.mark.parametrize(
    ("wanted", "slept"),
    [("100000", []), ("66", []), ("40", [40]), ("9" * 99, [1, 2, 4, 8, 16, 32])],
)
def test_an_endpoint_that_asks_to_wait_for_long(direct, waits, wanted, slept):
    with (
        Chat(lambda *_: (429, b"busy", {"Retry-After": wanted})) as chat,
        pytest.raises(UserError, match="the answers so far are kept") as error,
    ):
        judges.Endpoint(chat.url, "m", 9).ask(["one"])
    assert waits == slept and len(chat.asked) == len(slept) + 1
    assert (f"asks to wait {wanted} s" in str(error.value)) == (len(slept) < 2)


@pytest.mark.parametrize(
    "status, content, expected",
    [
        (401, b'{"error": {"message": "bad key"}}', r"status 401 .*bad key.*set OPENAI_API_KEY"),
        (404, b"Not Found", r"status 404 .*/chat/completions.*'some-model'"),
        (400, b"too\nlong", r"status 400 \(too long\)"),
        (200, b"<html>Welcome</html>", r"<html>Welcome.*no chat completion.*judge_url"),
        (200, b"", "no chat completion"),
        (200, b'{"choices": []}', "no chat completion"),
        (200, b'{"choices": null}', "no chat completion"),
        (200, b'{"choices": [{"text": "Rating: 4"}]}', "no chat completion"),
        (200, b'["Rating: 4"]', "no chat completion"),
        (200, b"[" * 100_000, "no chat completion"),
        (200, b"[" * 100_000 + b"]" * 100_000, "no chat completion"),
        (200, ["Rating: 4"], "content is not a text"),
        (200, [{"type": "text", "text": "Rating: 4"}], "content is not a text"),
        (200, 4, "content is not a text"),
        (200, False, "content is not a text"),
        (200, {"rating": 4}, "content is not a text"),
        (200, "Rating: 4 \ud800", "content is not a text"),
    ],
)
@pytest.mark.parametrize("kind", [None, "application/json; charset=utf-8"])
def test_an_endpoint_that_cannot_answer(direct, status, content, expected, kind):
    headers = {"Content-Type": kind} if kind else {}
    with (
        Chat(lambda *_: (status, content, headers)) as chat,
        pytest.raises(UserError, match=expected) as error,
    ):
        judges.Endpoint(chat.url, "some-model", 9).ask(["one"])
    assert len(chat.asked) == 1
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("place", ["{}/chat/completions", "http://[oh no", "//x:y:z/"])
def test_redirects_are_refused(direct, monkeypatch, status, place):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Chat(lambda *_: (200, "Rating: 6")) as target:
        place = place.format(target.url)
        with (
            Chat(lambda *_: (status, b"moved", {"Location": place})) as chat,
            pytest.raises(
                UserError, match=f"status {status} .*redirects to .*not followed"
            ) as error,
        ):
            judges.Endpoint(chat.url, "m", 9).ask(["one"])
    assert place in str(error.value)
    assert not target.asked and not target.got and len(chat.asked) == 1


def test_an_endpoint_where_nobody_listens(direct, waits):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/v1 cannot be reached.*judge_url"):
        judges.Endpoint("http://127.0.0.1:9/v1", "m", 9).ask(["one"])
    assert waits == [1]


@pytest.mark.parametrize(
    "greeting", [b"", b"220 mail.example ESMTP\r\n", b"HTTP/1.1 two OK\r\n\r\n"]
)
def test_a_server_of_another_kind(direct, waits, greeting):
    """One that hangs up, and two that speak no HTTP."""
    said = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet():
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(65536)
                connection.sendall(greeting)
                connection.close()

        threading.Thread(target=greet, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(UserError, match=f"{url} cannot be reached"):
            judges.Endpoint(url, "m", 9, said.append).ask(["one"])
    assert waits == [1] and len(said) == 1


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "https://me:secret@host/v1",
        "ftp://x/v1",
        "https://host/v1?key=secret",
        "http://ho st/v1",
        "http://host/v1\n",
    ],
)
def test_an_address_that_is_none(url):
    with pytest.raises(UserError, match="judge_url: expected http") as error:
        judges.Endpoint(url, "m", 9)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "key", ["sk-secret\n", "sk-secret\r\nX: y", "sk-secrét", "sk-secret☃", "se cret"]
)
def test_keys_that_are_none(direct, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds a character") as error:
        judges.Endpoint("http://127.0.0.1:9/v1", "m", 9)
    assert "secr" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("status", [200, 400, 302])
def test_a_key_that_is_sent_back_is_struck_out(direct, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echo = f"you are {KEY}. {'x' * 180}{KEY}"
    content = f"{echo}\nRating: 4" if status == 200 else echo.encode()
    with Chat(lambda *_: (status, content, {"Location": f"http://x/{KEY}"})) as chat:
        judge = judges.Endpoint(chat.url, "m", 9)
        try:
            (answer,) = judge.ask(["one"])
        except UserError as error:
            answer = str(error)
    assert chat.keys == [f"Bearer {KEY}"]
    assert "you are (OPENAI_API_KEY)." in answer and KEY[:8] not in answer
    assert (judges.rating(answer) == 4) == (status == 200)


@pytest.mark.parametrize("status, content", [(200, f"{KEY}\ud800"), (401, KEY.encode())])
def test_a_cause_that_quotes_the_server_is_not_shown(direct, monkeypatch, status, content):
    """Not even with --debug, as the server may send the key back."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Chat(lambda *_: (status, content)) as chat, pytest.raises(UserError) as error:
        judges.Endpoint(chat.url, "m", 9).ask(["one"])
    assert KEY not in "".join(traceback.format_exception(error.value))


def test_the_cause_of_a_proxy_that_is_none_is_kept(direct, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HTTPS_PROXY", "gopher://x")
    with pytest.raises(UserError, match=r"judge_url .* cannot be used") as error:
        judges.Endpoint("https://host/v1", "m", 9)
    assert isinstance(error.value.__cause__, ValueError)
    assert KEY not in "".join(traceback.format_exception(error.value))


# --- the summary ---


def scores_of(rows):
    return pd.DataFrame(
        rows,
        columns=[
            "prompt",
            "configuration",
            "method",
            "alpha",
            "f1",
            "objects_named",
            "objects_false",
            "words",
        ],
    )


def test_summary_of_pairs_against_all_sign_flips():
    random = np.random.default_rng(0)
    base, steered = random.integers(0, 5, 9) / 4, random.integers(1, 6, 9) / 4
    steered[4] = np.nan
    table = summary_of(
        scores_of(
            [
                (i, name, name, 0.0, value, 1, 0, 3)
                for name, values in (("base", base), ("mean", steered))
                for i, value in enumerate(values)
            ]
        )
    )
    row = table[(table.score == "f1") & (table.configuration == "mean")].iloc[0]
    gains = np.delete(steered - base, 4)
    assert (row.n, row.pairs) == (8, 8)
    assert row["mean"] == pytest.approx(np.nanmean(steered))
    assert row.difference == pytest.approx(gains.mean())
    flips = [np.mean(gains * signs) for signs in product((1, -1), repeat=8)]
    exact = np.mean(np.abs(flips) >= abs(gains.mean()) - 1e-12)
    assert row.p_value == pytest.approx(exact, abs=1e-9)
    assert row.difference_low < row.difference < row.difference_high
    assert list(table.score.unique()) == ["f1", "object_hallucination", "words"]


def test_several_draws_of_a_prompt_count_as_one():
    """Their mean: the same numbers as of a table with the means."""
    draws = [("base", 0, (1, 0)), ("base", 1, (0, 0.5)), ("mean", 0, (1, 1)), ("mean", 1, (0.5, 0))]
    drawn = [
        (prompt, name, name, 0.0, value, 1, 0, 3)
        for name, _, values in draws
        for prompt, value in enumerate(values)
    ]
    means = {"base": (0.5, 0.25), "mean": (0.75, 0.5)}
    once = [
        (prompt, name, name, 0.0, value, 1, 0, 3)
        for name, values in means.items()
        for prompt, value in enumerate(values)
    ]
    table = scores_of(drawn).assign(draw=[0, 0, 1, 1, 0, 0, 1, 1])
    columns = ["score", "configuration", "n", "mean", "low", "difference", "p_value"]
    found, expected = summary_of(table)[columns], summary_of(scores_of(once))[columns]
    pd.testing.assert_frame_equal(found, expected)


def test_share_of_false_objects_is_a_ratio_of_sums():
    random = np.random.default_rng(1)
    named = random.integers(0, 6, 150)
    false = random.binomial(named, 0.4)
    fewer = random.binomial(named, 0.2)
    table = summary_of(
        scores_of(
            [
                (i, name, name, 0.0, 0.5, n, f, 3)
                for name, values in (("base", false), ("mean", fewer))
                for i, (n, f) in enumerate(zip(named, values, strict=True))
            ]
        )
    )
    base, mean = table[table.score == "object_hallucination"].itertuples()
    assert base.mean == pytest.approx(false.sum() / named.sum())
    assert mean.difference == pytest.approx((fewer.sum() - false.sum()) / named.sum())
    assert mean.p_value < 0.001 and isnan(base.p_value)
    ratio = scipy.stats.bootstrap(
        (false, named),
        lambda f, n, axis: f.sum(axis) / n.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=4999,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (base.low, base.high) == pytest.approx(tuple(ratio), abs=0.01)


def test_no_object_is_named_by_anyone():
    table = summary_of(
        scores_of([(0, "base", "base", 0.0, 1.0, 0, 0, 3), (0, "mean", "mean", 0.1, 1.0, 0, 0, 3)])
    )
    rows = table[table.score == "object_hallucination"]
    assert (rows.n == 0).all() and rows["mean"].isna().all()


# --- the script ---

# contents, question, answer, kind, base, steered
PICTURES = [
    (
        ["Man", "Bicycle"],
        "What is the man riding?",
        "A bicycle.",
        "attribute",
        "A man rides a bicycle past two dogs.",
        "A bicycle.",
    ),
    (
        ["Dog", "Frisbee", "Grass"],
        "What is the dog's toy?",
        "It is a frisbee.",
        "adversarial",
        "A bus and a man.",
        "Frisbees lie on the grass.",
    ),
    (
        ["Bus"],
        "What colour is the bus?",
        "Yellow.",
        "comparison",
        "I cannot tell.",
        "A dog in a bus.",
    ),
]
STEERED = "mean @ 1 x 0.1"


@pytest.fixture(scope="module")
def mmhal(tmp_path_factory):
    """MMHal-Bench in its published columns with the pictures, and generations for it."""
    folder = tmp_path_factory.mktemp("mmhal")
    text = Value("string")
    columns = {
        "question_type": text,
        "question_topic": text,
        "image_id": text,
        "image_src": text,
        "image_content": List(text),
        "question": text,
        "gt_answer": text,
        "model_answer": text,
        "image": Image(),
    }
    rows = [
        {
            "question_type": kind,
            "question_topic": "x",
            "image_id": str(i),
            "image_src": "",
            "image_content": contents,
            "question": question,
            "gt_answer": answer,
            "model_answer": "",
            "image": Picture.new("RGB", (4, 3), (40 * i, 0, 0)),
        }
        for i, (contents, question, answer, kind, _, _) in enumerate(PICTURES)
    ]
    path = folder / "train-00000-of-00001.parquet"
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)
    rows, source = data.load("mmhal-bench", "train", str(path))
    configuration = Configuration("mean", "", (1,), 0.1)
    table = pd.DataFrame(
        [
            steering_generation.row(
                i,
                data.read(rows, source, i),
                configuration,
                "chat",
                *(Written(i, n, 0, text, "eos", 5) for n, text in enumerate(item[4:])),
            )
            for i, item in enumerate(PICTURES)
        ]
    )
    runs.write_table(folder / "texts.csv", table)
    runs.write_json(
        folder / "texts.manifest.json",
        {"model": {"model": "some-model"}, "data": {"name": "mmhal-bench", "path": str(path)}},
    )
    return folder / "texts.csv"


@pytest.fixture(scope="module")
def generations(commands, tmp_path_factory):
    """What the stages write on a tiny model, and its data set."""
    folder = tmp_path_factory.mktemp("stages")
    model = tiny.save_model(folder / "model")
    questions = tiny.write_jsonl(folder / "questions.jsonl", tiny.question_rows())
    common = [
        "--model_name",
        model,
        "--dataset_name",
        "questions",
        "--dataset_path",
        questions,
        "--num_samples",
        4,
        "--top_k",
        3,
    ]
    commands.run(
        "token_ablation.py",
        *common,
        "--ig_steps",
        4,
        "--output_path_meta",
        folder / "tokens.csv",
        "--output_path_hidden",
        folder / "states.safetensors",
    ).ok()
    commands.run(
        "steering_generation.py",
        *common,
        "--num_validation",
        6,
        "--methods",
        "gradient",
        "random",
        "--alphas",
        0.3,
        "--layer_idxs",
        1,
        "--num_prompts",
        5,
        "--max_new_tokens",
        20,
        "--hidden_states_path",
        folder / "states_pos.safetensors",
        "--steering_vectors_dir",
        folder,
        "--output_dir",
        folder / "out",
    ).ok()
    (table,) = (folder / "out").glob("*.csv")
    return table


def score(commands, table, *more, **options):
    return commands.run("score_generations.py", "--generations", table, *more, **options)


def tables(folder):
    return (
        pd.read_csv(path, dtype={"id": str, "text": str, "judge_answer": str})
        for path in (*folder.glob("*_scores.csv"), *folder.glob("*_summary.csv"))
    )


def test_texts_of_the_stages_are_scored(commands, generations, tmp_path):
    result = score(commands, generations, "--output_dir", tmp_path).ok()
    written = pd.read_csv(generations, keep_default_na=False, dtype=str)
    scores, summary = tables(tmp_path)
    assert list(scores.configuration.unique()) == ["base", *written.configuration[:2]]
    assert len(scores) == 5 * 3 and len(summary) == 3 * 6
    expected = {("base", row.id): row.base for row in written.itertuples()}
    expected |= {(row.configuration, row.id): row.steered for row in written.itertuples()}
    assert {
        (row.configuration, row.id): row.text for row in scores.fillna({"text": ""}).itertuples()
    } == expected
    assert scores.words.tolist() == [
        len(expected[row.configuration, row.id].split()) for row in scores.itertuples()
    ]
    means = scores.groupby("configuration")[[*summary.score.unique()]].mean()
    for row in summary.itertuples():
        assert row.mean == pytest.approx(means.loc[row.configuration, row.score])
        assert row.n == 5 and row.low <= row.mean <= row.high
        assert row.configuration in result.out
    assert all(str(path) in result.out for path in tmp_path.glob("*.csv"))
    assert "nothing to do" in score(commands, generations, "--output_dir", tmp_path).ok().out


def test_the_true_answer_has_the_margin(commands, generations, tmp_path):
    """The same table with the data set's own answers in place of the generations."""
    answers = {row["question"]: row["choices"] for row in tiny.question_rows()}
    table = pd.read_csv(generations, keep_default_na=False)
    false = [
        next(choice for choice in answers[row.question] if choice != row.reference)
        for row in table.itertuples()
    ]
    runs.write_table(tmp_path / "own.csv", table.assign(base=false, steered=table.reference))
    score(
        commands,
        tmp_path / "own.csv",
        "--dataset_name",
        "questions",
        "--dataset_path",
        generations.parents[1] / "questions.jsonl",
    ).ok()
    scores, summary = tables(tmp_path / "scores")
    assert (scores.f1[scores.method != "base"] == 1).all()
    margins = scores.groupby("method").f1_margin
    assert (margins.min().drop("base") > 0).all() and margins.max()["base"] < 0
    gains = summary[(summary.score == "f1_margin") & (summary.method != "base")]
    assert (gains.difference > 0).all() and gains.p_value.tolist() == pytest.approx([2 / 2**5] * 2)


def test_false_objects_of_mmhal_bench(commands, mmhal, tmp_path):
    score(commands, mmhal, "--output_dir", tmp_path).ok()
    scores, summary = tables(tmp_path)
    assert scores.objects_named.tolist() == [3, 2, 0, 1, 2, 2]
    assert scores.objects_false.tolist() == [1, 2, 0, 0, 0, 1]
    assert scores.text_hallucination.tolist() == [1, 1, 0, 0, 0, 1]
    assert scores.f1.tolist() == pytest.approx([2 / 7, 0, 0, 1, 0, 0])
    assert "f1_margin" not in scores  # it has no wrong answers
    found = summary.set_index(["score", "configuration"])
    for name, base, steered in (
        ("object_hallucination", 3 / 5, 1 / 5),
        ("text_hallucination", 2 / 3, 1 / 3),
    ):
        assert found["mean"][name, "base"] == pytest.approx(base)
        assert found["mean"][name, STEERED] == pytest.approx(steered)
        assert found.difference[name, STEERED] == pytest.approx(steered - base)


RATINGS = [
    "Rating: 2",
    "A bus?\nRating: 0",
    "Who knows.",
    "Rating: 6",
    "**Rating: 4**",
    "Rating: 1",
]  # of PICTURES' texts, the base's first


def rate(number, prompt):
    texts = [item[4] for item in PICTURES] + [item[5] for item in PICTURES]
    (answer,) = [
        rating
        for text, rating in zip(texts, RATINGS, strict=True)
        if f"Answer to judge: {text}\n" in prompt
    ]
    return 200, answer


def judged(chat, *more):
    return ["--judge", "org/some-judge", "--judge_url", chat.url, *more]


def test_ratings_of_an_endpoint(commands, mmhal, tmp_path):
    with Chat(
        lambda number, prompt: (429, b"busy") if number == 2 else rate(number, prompt)
    ) as chat:
        result = score(
            commands, mmhal, *judged(chat, "--output_dir", tmp_path), env={"OPENAI_API_KEY": KEY}
        ).ok()
    scores, summary = tables(tmp_path)
    assert scores.judge_answer.tolist() == RATINGS
    assert scores.judge_rating.fillna(-1).tolist() == [2, 0, -1, 6, 4, 1]
    assert scores.judge_hallucination.fillna(-1).tolist() == [1, 1, -1, 0, 0, 1]
    assert "1 of 6 texts have no rating" in result.out
    found = summary.set_index(["score", "configuration"])
    assert found["mean"]["judge_rating", "base"] == 1
    assert found.difference["judge_rating", STEERED] == 4  # of the two pairs that are rated
    assert found.pairs["judge_rating", STEERED] == 2 and found.n["judge_rating", STEERED] == 3
    assert len(chat.asked) == 7 and set(chat.keys) == {f"Bearer {KEY}"}
    for item, prompt in zip(PICTURES, [chat.prompts[0], *chat.prompts[2:]], strict=False):
        assert all(told in prompt for told in (", ".join(item[0]), *item[1:5]))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 3 and not any(KEY in path.read_text() for path in files)


def test_a_text_that_stands_twice_is_asked_once(commands, mmhal, tmp_path):
    texts = [PICTURES[0][4], PICTURES[1][5], PICTURES[2][4]]
    table = pd.read_csv(mmhal, dtype=str).assign(steered=texts)
    runs.write_table(tmp_path / "texts.csv", table)
    with Chat(rate) as chat:
        score(
            commands,
            tmp_path / "texts.csv",
            *judged(chat),
            "--dataset_name",
            "mmhal-bench",
            "--dataset_path",
            next(mmhal.parent.glob("*.parquet")),
        ).ok()
    assert len(chat.asked) == len(set(chat.prompts)) == 4


def test_killed_and_refused_runs_go_on_without_asking_again(commands, mmhal, tmp_path):
    broken = [(401, b"expired"), (200, ["Rating: 4"]), (200, "\ud800"), (404, b"gone")]

    def reply(number, prompt):
        return broken.pop() if number in (3, 5, 7, 8) else rate(number, prompt)

    with Chat(reply) as chat:
        command = [mmhal, *judged(chat, "--output_dir", tmp_path)]
        # After the manifest of the parts and the first two answers.
        assert score(commands, *command, die_after=3).code == -signal.SIGKILL
        for expected in ("status 404", "no chat completion", "not a text", "status 401"):
            result = score(commands, *command)
            assert result.code == 1 and "Traceback" not in result.err
            assert expected in result.err.splitlines()[-1]
            assert not list(tmp_path.glob("*.csv"))
        score(commands, *command).ok()
        score(commands, *command).ok()
    assert not broken
    good = [prompt for number, prompt in enumerate(chat.prompts, 1) if number not in (3, 5, 7, 8)]
    assert len(good) == len(set(good)) == len(RATINGS)
    assert next(tables(tmp_path)).judge_answer.tolist() == RATINGS


def test_ratings_of_a_local_chat_model(commands, mmhal, tmp_path):
    model = tiny.save_model(tmp_path / "judge", max_position_embeddings=2048)
    result = score(
        commands, mmhal, "--judge", model, "--judge_max_tokens", 8, "--output_dir", tmp_path
    ).ok()
    scores = next(tables(tmp_path))
    lm = models.load(str(model), device="cpu")
    rows, source = data.load("mmhal-bench", "train", str(next(mmhal.parent.glob("*.parquet"))))
    for index in (0, 4):
        prompt = judges.judge_prompt(data.read(rows, source, index % 3), scores.text[index])
        ids = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        new = lm.model.generate(**ids, do_sample=False, max_new_tokens=8)
        answer = lm.tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() and scores.judge_answer.fillna("")[index] == answer.strip()
    unrated = scores.judge_rating.isna()
    assert unrated.tolist() == [
        isnan(judges.rating(answer)) for answer in scores.judge_answer.fillna("")
    ]
    assert f"{unrated.sum()} of 6 texts have no rating" in result.out


def test_a_judge_that_does_not_chat():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = None
    lm = models.wrap("bare", tiny.llama(len(tokenizer)), tokenizer, self_check=False)
    with pytest.raises(UserError, match="judge bare has no chat template"):
        judges.LocalJudge(lm, 8, 1000)


# --- mistakes ---


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda table: table.drop(columns=["steered", "id"]), "columns id, steered missing"),
        (lambda table: table[:0], "no rows"),
        (lambda table: pd.concat([table, table]), "several runs"),
        (lambda table: table.assign(id="nobody"), "1 of 1 examples"),
        (lambda table: table.assign(question="Why?"), "another question"),
        (lambda table: table.assign(reference="Other."), "another question or answer"),
    ],
)
def test_tables_that_cannot_be_scored(commands, mmhal, tmp_path, change, expected):
    path = tmp_path / "texts.csv"
    runs.write_table(path, change(pd.read_csv(mmhal, dtype=str)))
    message = score(
        commands,
        path,
        "--dataset_name",
        "mmhal-bench",
        "--dataset_path",
        next(mmhal.parent.glob("*.parquet")),
    ).error()
    assert expected in message and str(path) in message
    assert not (tmp_path / "scores").exists()


@pytest.mark.parametrize("save", ["pandas", "empty row"])
def test_tables_that_were_saved_again(mmhal, tmp_path, save):
    expected = generations_of.read(mmhal)
    table = pd.read_csv(mmhal, dtype=None if save == "pandas" else str, keep_default_na=False)
    if save == "empty row":
        table.loc[len(table)] = ""
    table.to_csv(tmp_path / "again.csv", index=False)
    again = generations_of.read(tmp_path / "again.csv")
    columns = list(generations_of.COLUMNS)
    pd.testing.assert_frame_equal(again[columns], expected[columns])


@pytest.mark.parametrize("column", ["prompt", "alpha"])
@pytest.mark.parametrize("cell", ["x", "", "inf"])
def test_numbers_that_are_none(mmhal, tmp_path, column, cell):
    path = tmp_path / "texts.csv"
    pd.read_csv(mmhal, dtype=str).assign(**{column: cell}).to_csv(path, index=False)
    with pytest.raises(UserError, match=f"column {column}: expected finite numbers") as error:
        generations_of.read(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", ['{"data": 5}', '{"data": {"name": 5}}', '{"data": null}', "{}", None]
)
def test_manifests_that_name_no_data_set(tmp_path, content):
    path = tmp_path / "texts.csv"
    if content:
        path.with_suffix(".manifest.json").write_text(content)
    with pytest.raises(UserError, match="give dataset_name"):
        generations_of.source_of(path)
    assert generations_of.source_of(path, "own", "x.jsonl", "test") == DataSettings(
        "own", "x.jsonl", split="test", validation_split="test", test_split="test"
    )


def test_the_data_set_is_that_of_the_manifest(tmp_path):
    path = tmp_path / "texts.csv"
    manifest = {"data": {"name": "own", "path": "x.jsonl"}}
    runs.write_json(path.with_suffix(".manifest.json"), manifest)
    assert generations_of.source_of(path) == DataSettings("own", "x.jsonl")
    assert generations_of.source_of(path, "own") == DataSettings("own", "x.jsonl")
    assert generations_of.source_of(path, "truthfulqa") == DataSettings("truthfulqa")


def test_the_splits_are_those_of_the_manifest(tmp_path):
    path = tmp_path / "texts.csv"
    given = {"split": "a", "validation_split": None, "test_split": "c"}
    runs.write_json(path.with_suffix(".manifest.json"), {"data": {"name": "own"} | given})
    of_the_run = DataSettings("own", split="a", test_split="c")
    assert generations_of.source_of(path) == of_the_run
    assert generations_of.source_of(path, split="a") == of_the_run
    assert generations_of.source_of(path, split="b") == DataSettings(
        "own", split="b", validation_split="b", test_split="b"
    )
    assert generations_of.source_of(path, "truthfulqa") == DataSettings("truthfulqa")


def test_tables_of_splits_that_the_stages_were_given(commands, tmp_path):
    """Steering, validation and test examples have splits of their own names."""
    model = tiny.save_model(tmp_path / "model")
    rows = [row | {"split": "abc"[i % 3]} for i, row in enumerate(tiny.question_rows())]
    questions = tiny.write_jsonl(tmp_path / "questions.jsonl", rows)
    common = ["--model_name", model, "--dataset_name", "own", "--dataset_path", questions]
    common += ["--split", "a", "--top_k", 3]
    commands.run(
        "token_ablation.py",
        *common,
        *("--ig_steps", 2, "--output_path_meta", tmp_path / "tokens.csv"),
        *("--output_path_hidden", tmp_path / "states.safetensors"),
    ).ok()
    commands.run(
        "steering_generation.py",
        *common,
        *("--validation_split", "b", "--test_split", "c", "--num_prompts", 3),
        *("--methods", "gradient", "--alphas", 0.3, "--layer_idxs", 1, "--max_new_tokens", 4),
        *("--hidden_states_path", tmp_path / "states_pos.safetensors"),
        *("--steering_vectors_dir", tmp_path, "--output_dir", tmp_path / "out"),
    ).ok()
    (table,) = (tmp_path / "out").glob("*.csv")
    source = generations_of.source_of(table)
    assert (source.split, source.validation_split, source.test_split) == ("a", "b", "c")
    asked = {row["question"] for row in rows if row["split"] == "c"}
    assert set(pd.read_csv(table).question) < asked
    for split in ([], ["--split", "a"], ["--split", "c"]):
        folder = tmp_path / "-".join(["scores", *split])
        score(commands, table, *split, "--output_dir", folder).ok()
        scores, _ = tables(folder)
        assert len(scores) == 3 * 2
    assert "3 of 3 examples" in score(commands, table, "--split", "b").error()


def test_a_split_of_the_questions_is_in_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def tables_of(*words):
        words = ("--model_name", "m", "--dataset_name", "own", *words)
        return score_generations.tables_of(score_generations.parser(flags.LLM).parse_args(words))

    def write(*words):
        words = ("--model_name", "m", "--dataset_name", "own", *words)
        args = steering_generation.parser(flags.LLM).parse_args(words)
        path = flags.names_of(args).generations(flags.GRID, flags.GRID, ())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    plain, tested = write(), write("--test_split", "c")
    assert tables_of() == tables_of("--split", "a") == sorted([plain, tested])
    of_split = write("--split", "a")
    assert len({plain, tested, of_split}) == 3
    assert tables_of("--split", "a") == [of_split]
    assert tables_of("--split", "c") == sorted([plain, tested])


def test_flags_that_cannot_be(commands, mmhal, tmp_path):
    assert "steering_generation.py" in score(commands, tmp_path / "none.csv").error()
    (tmp_path / "alone.csv").write_bytes(mmhal.read_bytes())
    assert "give dataset_name" in score(commands, tmp_path / "alone.csv").error()
    assert "--judge MODEL" in score(commands, mmhal, "--judge_url", "http://x/v1").error()
    assert "no split" in score(commands, mmhal, "--split", "nowhere").error()
    key = {"OPENAI_API_KEY": "sk-secret\n"}
    judge = ("--judge", "x", "--judge_url", "http://127.0.0.1:9/v1")
    message = score(commands, mmhal, *judge, "--output_dir", tmp_path, env=key).error()
    assert "OPENAI_API_KEY" in message and "secret" not in message
    message = commands.run("score_generations.py", "--dataset_name", "nothing").error()
    assert "no generations of llama-3.1-8b-instruct on nothing" in message


# --- the tables of a stage, by its flags ---


@pytest.mark.parametrize("kind", [flags.LLM, flags.VLM], ids=lambda kind: kind.name)
def test_shell_scripts_find_the_tables_of_their_stage(commands, tmp_path, monkeypatch, kind):
    """With the same variables, whatever configurations were generated from; no other tables."""
    suffix = "_vlm" * kind.images

    def run(script, *more, **environment):
        ended = subprocess.run(
            ["bash", f"scripts/{kind.name}/{script}{suffix}.sh", *more],
            cwd=SRC,
            env=commands.environment | {"PYTHON": "echo", **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        name, *words = ended.stdout.split()
        return name, words

    monkeypatch.chdir(tmp_path)
    variables = {"MODEL_NAME": "org/m", "DATASET_NAME": "nothing", "SEED": "3", "TOP_K": "7"}
    written = []
    for seed, *more in (("3", "--alphas", "0.1"), ("3", "--layer_mode", "each"), ("4",)):
        grid = ("--methods", "mean", *more)
        name, words = run("run_steering_generation", *grid, **variables | {"SEED": seed})
        assert name == f"steering_generation{suffix}.py"
        stage = steering_generation.parser(kind).parse_args(words)
        names = flags.names_of(stage)
        settings, _ = steering_generation.configured(stage, names)
        path = names.generations(settings, flags.GRID, ())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        written.append(path)
    name, words = run("run_score_generations", "--judge", "x", **variables)
    assert name == f"score_generations{suffix}.py"
    args = score_generations.parser(kind).parse_args(words)
    assert args.judge == "x" and len(set(written)) == 3
    assert score_generations.tables_of(args) == sorted(written[:2])
    name, words = run("run_score_generations", GENERATIONS="texts.csv", **variables)
    args = score_generations.parser(kind).parse_args(words)
    assert str(args.generations) == "texts.csv" and args.dataset_name is None


def test_a_shell_script_scores_a_table(commands, mmhal, tmp_path):
    script = "vlm/run_score_generations_vlm.sh"
    commands.shell(script, "--output_dir", tmp_path, GENERATIONS=str(mmhal)).ok()
    assert len(list(tmp_path.glob("*.csv"))) == 2
