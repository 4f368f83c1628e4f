"""The server's addresses, and OpenAI's forms of requests, answers and errors."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from grains import prompts, sampling, thinking
from grains.data import Example
from grains.decoding import Row
from grains.errors import UserError
from grains.generation import row_limit
from grains.lm import LanguageModel
from grains.prompts import Encoded
from grains.serve.engine import Engine, Full, Job, Limits, Part, Token
from grains.serve.steering import Steering, Vectors, named
from grains.settings import DecodingSettings, PromptSettings
from grains.steering import Configuration, SteeringVectors
from grains.thinking import Thoughts

ENDED = {"eos": "stop", "stop": "stop", "length": "length"}


# --- requests ---


class Form(BaseModel):
    """A part of a request: a field that is not known is an error, not overlooked."""

    model_config = ConfigDict(extra="forbid", strict=True)


class SteeringForm(Form):
    vectors: str
    alpha: float
    layers: list[int | str] | None = None
    units: str = "relative"
    positions: str = "all"

    def steering(self) -> Steering:
        layers = None if self.layers is None else tuple(self.layers)
        return Steering(self.vectors, self.alpha, layers, self.units, self.positions)


class StreamOptions(Form):
    include_usage: bool = False


class Asked(Form):
    """What both kinds of requests have. Fields that could change nothing are taken and unused."""

    model: str
    steering: SteeringForm | list[SteeringForm] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: float = Field(default=0, ge=0, le=0)
    presence_penalty: float = Field(default=0, ge=0, le=0)


class TextPart(Form):
    type: Literal["text"]
    text: str


class Message(Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatForm(Asked):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    store: Literal[False] | None = None


class CompletionForm(Asked):
    prompt: str | list[str]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


# --- answers ---


@dataclass(eq=False)
class Failure(Exception):
    """An answer in OpenAI's form of an error."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status)


@dataclass(frozen=True)
class Server:
    """What requests are answered with. name: of the base model. created: when it began.

    thoughts: how the model marks its thoughts in a chat, None if it has none.
    """

    lm: LanguageModel
    engine: Engine
    vectors: Vectors
    name: str
    created: int
    api_key: str | None = None
    thoughts: Thoughts | None = None

    def rows(self, asked: Asked, encoded: list[Encoded], default: int | None) -> list[Row]:
        """The texts that a request asks for: n of each prompt. default: of max_tokens."""
        limits = self.engine.limits
        limit = getattr(asked, "max_completion_tokens", None) or asked.max_tokens
        if asked.max_tokens == 0 or (limit is not None and not 1 <= limit <= limits.max_tokens):
            raise Failure(
                400, f"max_tokens {limit}: expected 1 to {limits.max_tokens}", None, "max_tokens"
            )
        limit = limit or default or limits.max_tokens
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        seed = secrets.randbits(31) if asked.seed is None else asked.seed
        temperature = 1.0 if asked.temperature is None else asked.temperature
        settings = DecodingSettings("greedy", temperature, asked.top_p, stop=stop, seed=seed)
        how = sampling.choosing(self.lm, settings)
        configuration = self.configuration(asked)
        rows = []
        for item in encoded:
            ids = item.prompt_ids
            most = row_limit(self.lm, ids, limit)
            if len(ids) + most > limits.max_positions:
                raise UserError(
                    f"prompt and answer may have {len(ids) + most} tokens, more than the "
                    f"{limits.max_positions} that this server takes: give a smaller max_tokens"
                )
            for draw in range(asked.n):
                numbers = sampling.generator(seed, "", draw)
                choice = sampling.Choice(self.lm, how, ids, most, numbers)
                rows.append(Row(ids, configuration, choice, most, stop))
        return rows

    def configuration(self, asked: Asked) -> Configuration:
        """How a request is steered."""
        steering = named(asked.model, self.name)
        if asked.steering is not None:
            if steering:
                raise UserError("the model's name and the field 'steering' both steer: give one")
            forms = asked.steering if isinstance(asked.steering, list) else [asked.steering]
            steering = tuple(form.steering() for form in forms)
        return self.vectors.configuration(steering)

    def models(self) -> list[dict]:
        """The base model, with the names of the vectors that it can be steered by."""
        return [
            {
                "id": self.name,
                "object": "model",
                "created": self.created,
                "owned_by": "grains",
                "vectors": [*self.vectors.vectors],
            }
        ]


def serve(
    lm: LanguageModel,
    vectors: dict[str, SteeringVectors],
    name: str,
    limits: Limits,
    api_key: str | None = None,
) -> Server:
    """A server of a model by a name, and of vectors by theirs. Raises UserError as its parts."""
    if not name or set(name) & set("+@"):
        raise UserError(f"served name '{name}': expected a name without + and @")
    made = Vectors(lm, vectors)
    thoughts = thinking.thoughts(lm, PromptSettings("chat"))
    return Server(lm, Engine(lm, limits), made, name, int(time.time()), api_key, thoughts)


def application(server: Server) -> FastAPI:
    """The server's addresses. The engine runs while the application does."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        with server.engine:
            yield

    app = FastAPI(title="GrAInS", lifespan=running, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if server.api_key and not secrets.compare_digest(given, server.api_key.encode()):
            return Failure(401, "the API key is missing or wrong", "invalid_api_key").response()
        return await answer(request)

    @app.exception_handler(Failure)
    async def failed(request: Request, error: Failure) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        if isinstance(error, Full):
            return Failure(429, str(error), "queue_full").response()
        return Failure(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return Failure(error.status_code, message).response()

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return Failure(500, f"{type(error).__name__} in the server: see its log").response()

    @app.get("/health")
    async def health() -> dict:
        active, waiting = server.engine.load
        return {"status": "ok", "active": active, "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": server.models()}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        try:
            server.vectors.configuration(named(name, server.name))
        except UserError as error:
            raise Failure(404, str(error), "model_not_found", "model") from error
        return server.models()[0] | {"id": name}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await _form(request, ChatForm, server)
        turns = tuple(
            ("system" if message.role == "developer" else message.role, message.text)
            for message in asked.messages
        )
        users = [text for role, text in turns if role == "user"]
        question = users[-1] if users else turns[-1][1]
        example = Example("of the request", question, (), 0, turns=turns)
        encoded = [prompts.encode(server.lm, example, PromptSettings("chat"), free=True)]
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        if asked.top_logprobs is not None and not asked.logprobs:
            raise UserError("top_logprobs is given without logprobs: set logprobs to true")
        rows = server.rows(asked, encoded, None)
        return await _answer(request, server, asked, rows, top, _Chat(server, server.thoughts))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await _form(request, CompletionForm, server)
        given = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        style = PromptSettings("plain", allow_special_tokens=True)
        encoded = [
            prompts.encode(server.lm, Example("of the request", text, (), 0), style, free=True)
            for text in given
        ]
        rows = server.rows(asked, encoded, 16)  # OpenAI's default
        return await _answer(request, server, asked, rows, asked.logprobs, _Completion(server))

    return app


async def _form(request: Request, kind: type[Asked], server: Server) -> Any:
    """The body of a request as a form. Raises Failure for what is none."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > server.engine.limits.max_bytes:
            raise Failure(413, f"the request has more than {server.engine.limits.max_bytes} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failure(400, f"the request is no JSON ({str(error)[:100]})") from error
    if isinstance(content, dict):  # clients write null for what is not given
        content = {key: value for key, value in content.items() if value is not None}
    try:
        form = kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the request"
        raise Failure(400, f"{place}: {first['msg']}", None, place) from error
    try:
        named(form.model, server.name)
    except UserError as error:
        raise Failure(404, str(error), "model_not_found", "model") from error
    return form


class _Completion:
    """OpenAI's form of an answer to /v1/completions.

    thoughts: how the model marks its thoughts, which are then apart from the answer; or None.
    """

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, server: Server, thoughts: Thoughts | None = None):
        self.server, self.thoughts = server, thoughts

    def choice(
        self, index: int, part: Part, whole: bool, start: bool = False, thought: str = ""
    ) -> dict:
        return {
            "index": index,
            "text": part.text,
            "finish_reason": ENDED.get(part.ended),
            "logprobs": self.logprobs(part.tokens),
        }

    def logprobs(self, tokens: tuple[Token, ...]) -> dict | None:
        if not tokens:
            return None
        return {
            "tokens": [self.word(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.word(id): value for id, value in token.top} for token in tokens],
        }

    def word(self, token: int) -> str:
        return self.server.lm.tokenizer.decode([token])


class _Chat(_Completion):
    """OpenAI's form of an answer to /v1/chat/completions."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(
        self, index: int, part: Part, whole: bool, start: bool = False, thought: str = ""
    ) -> dict:
        said = {"role": "assistant"} if whole or start else {}
        said |= {"content": part.text} | ({"reasoning_content": thought} if thought else {})
        return {
            "index": index,
            "message" if whole else "delta": said,
            "finish_reason": ENDED.get(part.ended),
            "logprobs": self.logprobs(part.tokens),
        }

    def logprobs(self, tokens: tuple[Token, ...]) -> dict | None:
        if not tokens:
            return None
        return {
            "content": [
                self.entry(token.id, token.logprob)
                | {"top_logprobs": [self.entry(*pair) for pair in token.top]}
                for token in tokens
            ]
        }

    def entry(self, token: int, logprob: float) -> dict:
        word = self.word(token)
        return {"token": word, "logprob": logprob, "bytes": [*word.encode()]}


class _Split:
    """Takes the parts of a text, and gives how much longer its thoughts and its answer are."""

    def __init__(self, thoughts: Thoughts | None):
        self.thoughts, self.text, self.given = thoughts, "", ("", "")

    def __call__(self, part: Part) -> tuple[str, Part]:
        if self.thoughts is None:
            return "", part
        self.text += part.text
        before, self.given = self.given, self.thoughts.so_far(self.text)
        thought, answer = (now[len(known) :] for known, now in zip(before, self.given, strict=True))
        return thought, replace(part, text=answer)


async def _answer(
    request: Request,
    server: Server,
    asked: Asked,
    rows: list[Row],
    top: int | None,
    form: _Completion,
) -> Response:
    """Write the texts, and answer with them: whole, or part by part."""
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue()

    def sender(index: int) -> Callable[[Part | Exception], None]:
        def send(part: Part | Exception) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(parts.put_nowait, (index, part))

        return send

    server.engine.submit([Job(row, sender(index), top) for index, row in enumerate(rows)])
    head = {
        "id": f"{form.prefix}-{uuid.uuid4().hex}",
        "object": form.part_kind if asked.stream else form.kind,
        "created": int(time.time()),
        "model": asked.model,
    }

    async def written() -> AsyncIterator[tuple[int, Part]]:
        """All parts of all texts; when the client has gone, the rows are freed."""
        left = len(rows)
        try:
            while left:
                try:
                    index, part = await asyncio.wait_for(parts.get(), 0.5)
                except asyncio.TimeoutError:
                    if await request.is_disconnected():
                        return
                    continue
                if isinstance(part, Exception):
                    raise part
                left -= bool(part.ended)
                yield index, part
        finally:
            server.engine.cancel(rows)

    def usage() -> dict:
        # Several texts of one prompt read it once.
        read = sum(len(row.prompt_ids) for row in rows[:: asked.n])
        new = sum(len(row.new) for row in rows)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    if asked.stream:
        with_usage = bool(asked.stream_options and asked.stream_options.include_usage)

        async def events() -> AsyncIterator[str]:
            begun: dict[int, _Split] = {}
            try:
                async for index, part in written():
                    start = index not in begun
                    thought, answer = begun.setdefault(index, _Split(form.thoughts))(part)
                    choice = form.choice(index, answer, False, start, thought)
                    yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n"
                if with_usage:
                    yield f"data: {json.dumps(head | {'choices': [], 'usage': usage()})}\n\n"
            except Exception as error:
                failure = Failure(500, f"{type(error).__name__} while the text was written")
                yield f"data: {bytes(failure.response().body).decode()}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    texts = [Part("") for _ in rows]
    async for index, part in written():
        before = texts[index]
        texts[index] = Part(before.text + part.text, before.tokens + part.tokens, part.ended)
    choices = []
    for index, part in enumerate(texts):
        thought, text = form.thoughts.split(part.text) if form.thoughts else ("", part.text)
        choices.append(form.choice(index, replace(part, text=text), True, thought=thought))
    return JSONResponse(head | {"choices": choices, "usage": usage()})
