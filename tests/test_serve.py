"""The server as a process of its own, asked by the openai client, against the library alone."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import tiny

pytest.importorskip("fastapi")

import openai
from helpers.command_line import SRC

import grains
from grains import models, prompts
from grains.data import Example
from grains.steering import Configuration, SteeringVectors

pytestmark = pytest.mark.slow

pytest_plugins = ("helpers.command_line",)

QUESTIONS = [question for question, *_ in tiny.QUESTIONS]
LIMITS = ["--max_rows", 8, "--max_waiting", 80, "--max_tokens", 60, "--max_bytes", 20000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tiny.save_model(folder / "tiny", max_position_embeddings=128)
    generator = torch.Generator().manual_seed(1)
    for name in ("first", "second"):
        vectors = torch.randn(3, 32, generator=generator)
        SteeringVectors(vectors, torch.full((3,), 6.0), {}).save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return models.load(str(folder / "tiny"))


@pytest.fixture(scope="module")
def vectors(folder):
    return [SteeringVectors.load(folder / f"{name}.safetensors") for name in ("first", "second")]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Server:
    def __init__(self, commands, folder, *arguments, port=None):
        self.port = port or free_port()
        vectors = [f"{name}={folder / name}.safetensors" for name in ("first", "second")]
        command = ["serve.py", "--model_name", folder / "tiny", "--vectors", *vectors, *LIMITS]
        command += ["--port", self.port, *arguments]
        self.process = commands.start(*command)
        said = self.process.folder / "err"
        while not said.exists() or "Uvicorn running" not in said.read_text():
            assert self.process.running(), self.process.wait()
            time.sleep(0.02)
        self.address = f"http://127.0.0.1:{self.port}"

    def client(self, key="none", **options):
        options = {"max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, **options)

    def health(self):
        with urllib.request.urlopen(f"{self.address}/health", timeout=10) as answer:
            return json.load(answer)

    def until(self, expected, seconds=30):
        end = time.monotonic() + seconds
        while self.health() != {"status": "ok"} | expected:
            assert time.monotonic() < end, self.health()
            time.sleep(0.05)

    def stop(self, number=signal.SIGTERM):
        self.process.kill(number)
        self.process.wait()


@pytest.fixture(scope="module")
def server(commands, folder):
    server = Server(commands, folder)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def chat(client, question, model="tiny", steering=None, **options):
    options = {"temperature": 0, "max_tokens": 8} | options
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        extra_body={"steering": steering} if steering else None,
        **options,
    )


def expected(lm, question, steering=None, **options):
    options = {"max_new_tokens": 8} | options
    return grains.generate(lm, question, steering=steering, **options)


def test_models(client):
    (listed,) = client.models.list().data
    assert (listed.id, listed.vectors) == ("tiny", ["first", "second"])
    assert client.models.retrieve("tiny+first@0.5").id == "tiny+first@0.5"


def test_answers_are_those_of_the_library(client, lm, vectors):
    first, second = vectors
    question = QUESTIONS[0]
    both = first.at(0.8, [0, 1]), second.at(-0.6, [1, 2])
    added = {
        layer: sum(part.vectors[layer] for part in both if layer in part.vectors)
        for layer in range(3)
    }
    cases = [
        (None, "tiny", None),
        ({"vectors": "first", "alpha": 0.8}, "tiny", first.at(0.8)),
        (None, "tiny+first@0.8", first.at(0.8)),
        ({"vectors": "second", "alpha": 1, "layers": ["0-1"]}, "tiny", second.at(1, ["0-1"])),
        (
            {"vectors": "first", "alpha": 2, "positions": "last", "units": "absolute"},
            "tiny",
            first.at(2, units="absolute", positions="last"),
        ),
        (
            [
                {"vectors": "first", "alpha": 0.8, "layers": [0, 1]},
                {"vectors": "second", "alpha": -0.6, "layers": [1, 2]},
            ],
            "tiny",
            Configuration("sum", "", (0, 1, 2), 1.0, added),
        ),
    ]
    texts = set()
    for steering, model, configuration in cases:
        answer = chat(client, question, model, steering)
        (choice,) = answer.choices
        assert choice.message.content.strip() == expected(lm, question, configuration)
        assert choice.finish_reason in ("length", "stop") and answer.model == model
        texts.add(choice.message.content)
    assert len(texts) == 5


def test_completions_and_usage(client, lm):
    prompts_of = ["Why is it", "It is"]
    answer = client.completions.create(model="tiny", prompt=prompts_of, max_tokens=6, temperature=0)
    texts = grains.generate(lm, prompts_of, style="plain", max_new_tokens=6)
    assert [choice.text.strip() for choice in answer.choices] == texts
    read = sum(len(lm.tokenizer(text).input_ids) for text in prompts_of)
    assert answer.usage.prompt_tokens == read
    assert answer.usage.total_tokens == read + answer.usage.completion_tokens
    assert 2 <= answer.usage.completion_tokens <= 12


def test_log_probabilities(client, lm):
    question = QUESTIONS[1]
    answer = chat(client, question, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    item = prompts.encode(lm, Example("q", question, (), 0), "chat", free=True)
    ids, tokens = item.prompt_ids, []
    with torch.no_grad():
        for entry in content:
            logits = lm.model(torch.tensor([ids + tokens])).logits[0, -1].log_softmax(-1)
            values, places = logits.topk(3)
            assert entry.logprob == pytest.approx(values[0].item(), abs=1e-3)
            assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
                values.tolist(), abs=1e-3
            )
            assert entry.token == lm.tokenizer.decode(places[:1])
            tokens.append(int(places[0]))
    assert len(content) == answer.usage.completion_tokens


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_a_stream_is_the_answer(client, options):
    question = QUESTIONS[2]
    whole = chat(client, question, max_tokens=20, logprobs=True, **options)
    stream = chat(
        client,
        question,
        max_tokens=20,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        **options,
    )
    *parts, last = stream
    assert last.usage == whole.usage and not last.choices
    assert parts[0].choices[0].delta.role == "assistant"
    content = "".join(part.choices[0].delta.content for part in parts)
    assert content == whole.choices[0].message.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = [
        e for part in parts if part.choices[0].logprobs for e in part.choices[0].logprobs.content
    ]
    assert [e.token for e in logprobs] == [e.token for e in whole.choices[0].logprobs.content]
    assert len(parts) > 3


def test_stop_texts(client):
    text = chat(client, QUESTIONS[3], max_tokens=20).choices[0].message.content
    stop = text[len(text) // 2 :][:2]
    options = {"max_tokens": 20, "stop": [stop, "never there"]}
    (choice,) = chat(client, QUESTIONS[3], **options).choices
    assert choice.message.content == text[: text.index(stop)] and choice.finish_reason == "stop"
    streamed = chat(client, QUESTIONS[3], stream=True, **options)
    parts = [part.choices[0].delta.content for part in streamed]
    assert "".join(parts) == choice.message.content


def test_seeds_and_several_choices(client):
    def texts(seed, n=3):
        answer = chat(client, QUESTIONS[4], temperature=1.5, seed=seed, n=n)
        assert [choice.index for choice in answer.choices] == list(range(n))
        return [choice.message.content for choice in answer.choices]

    assert texts(1) == texts(1) == [*texts(1, 2), texts(1)[2]]
    assert len({*texts(1), *texts(2)}) == 6
    assert (
        chat(client, QUESTIONS[4], temperature=1.5).choices
        != chat(client, QUESTIONS[4], temperature=1.5).choices
    )


def test_64_requests_get_what_each_gets_alone(client, server, lm, vectors):
    """More than the batch holds, base and many strengths at the same time."""
    asked = [(QUESTIONS[n % len(QUESTIONS)], n % 4, 4 + n % 5, 0.2 + n / 100) for n in range(64)]

    def ask(question, kind, length, alpha):
        steering = {"vectors": ("first", "second")[kind % 2], "alpha": alpha} if kind else None
        answer = chat(client, question, steering=steering, max_tokens=length)
        return answer.choices[0].message.content.strip()

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda item: ask(*item), asked))
    for (question, kind, length, alpha), text in zip(asked, found, strict=True):
        steering = vectors[kind % 2].at(alpha) if kind else None
        assert text == expected(lm, question, steering, max_new_tokens=length)
    server.until({"active": 0, "waiting": 0})


def test_a_client_that_goes_frees_its_rows(server, client):
    stream = chat(client, QUESTIONS[5], max_tokens=60, n=8, stream=True, temperature=1)
    next(stream)
    assert server.health()["active"] > 0
    stream.close()
    server.until({"active": 0, "waiting": 0})
    impatient = server.client(timeout=0.05)
    with pytest.raises(openai.APITimeoutError):
        chat(impatient, QUESTIONS[5], max_tokens=60, n=8, temperature=1)
    server.until({"active": 0, "waiting": 0})


def post(server, body, path="/v1/chat/completions", **headers):
    request = urllib.request.Request(server.address + path, body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 2}


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"steering": {"vectors": "third", "alpha": 1}}, 400, "unknown vectors 'third'"),
        ({"steering": {"vectors": "first", "alpha": float("nan")}}, 400, "finite number"),
        ({"steering": {"vectors": "first", "alpha": 1e30}}, 400, "leaves nothing"),
        ({"steering": {"vectors": "first"}}, 400, "alpha: Field required"),
        ({"steering": {"vectors": "first", "alpha": 1, "stength": 2}}, 400, "stength: Extra"),
        ({"steering": {"vectors": "first", "alpha": 1, "layers": [7]}}, 400, "layer 7 does not"),
        ({"steering": {"vectors": "first", "alpha": 1, "units": "miles"}}, 400, "unknown units"),
        ({"steering": {"vectors": "first", "alpha": 1, "positions": "some"}}, 400, "positions"),
        ({"steering": "../first.safetensors"}, 400, "steering"),
        ({"alpha": 0.5}, 400, "alpha: Extra inputs"),
        ({"model": "other"}, 404, "unknown model 'other'"),
        ({"model": "tiny+first"}, 404, "expected 'tiny+VECTORS@STRENGTH'"),
        ({"model": "tiny+first@1", "steering": []}, 400, "give one"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, 400, "more than the 128"),
        ({"max_tokens": 61}, 400, "max_tokens 61: expected 1 to 60"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature -1"),
        ({"top_p": 2}, 400, "top_p 2"),
        ({"n": 0}, 400, "n: "),
        ({"n": 128}, 429, "try again later"),
        ({"stop": ["a", ""]}, 400, "an empty text"),
        ({"top_logprobs": 2}, 400, "top_logprobs is given without"),
        ({"frequency_penalty": 1.0}, 400, "frequency_penalty"),
        ({"tools": []}, 400, "tools: Extra"),
        ({"messages": [{"role": "user", "content": "a" * 30000}]}, 413, "more than 20000 bytes"),
    ],
)
def test_requests_that_are_refused(server, change, status, message):
    found, content = post(server, json.dumps(GOOD | change))
    assert found == status and message in content["error"]["message"]
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert post(server, json.dumps(GOOD))[0] == 200


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "[" * 9000, '"x"'])
def test_what_is_no_request(server, body):
    status, content = post(server, body)
    assert status == 400 and content["error"]["type"] == "invalid_request_error"


def test_errors_of_the_client(client, server):
    with pytest.raises(openai.BadRequestError, match="unknown vectors 'third'"):
        chat(client, "Why?", steering={"vectors": "third", "alpha": 1})
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.models.retrieve("another")
    status, content = post(server, "", "/v1/embeddings")
    assert status == 404 and "Not Found" in content["error"]["message"]


def test_a_key_and_a_new_start(commands, folder):
    """Killed in the middle of an answer, and started again at the same place."""
    server = Server(commands, folder, "--api_key", "secret", "--served_name", "mine")
    client = server.client("secret")
    expected = chat(client, "Why?", "mine").choices
    for key in ("secre", "wrong", "é"):
        with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
            chat(server.client(key), "Why?", "mine")
    stream = chat(client, "Why?", "mine", max_tokens=60, stream=True)
    next(stream)
    server.stop(signal.SIGKILL)
    with pytest.raises((openai.APIError, Exception)):
        list(stream)
        raise openai.OpenAIError("the stream ended")
    again = Server(
        commands, folder, "--api_key", "secret", "--served_name", "mine", port=server.port
    )
    assert chat(again.client("secret"), "Why?", "mine").choices == expected
    again.stop()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--vectors", "first"], "expected NAME=FILE"),
        (["--vectors", "a=nowhere.safetensors"], "'nowhere.safetensors' does not exist"),
        (["--fit", "mean", "mean"], "vectors 'mean' are given twice"),
        (["--port", "70000"], "expected 0 to 65535"),
        (["--max_rows", "0"], "expected a whole number from 1"),
    ],
)
def test_flags_that_are_refused(arguments, message):
    result = subprocess.run(
        [sys.executable, "serve.py", *arguments], cwd=SRC, capture_output=True, text=True
    )
    assert result.returncode in (1, 2) and message in result.stderr
    assert result.stderr.strip().splitlines()[-1].count("error: ") == 1
