"""The endpoints of the server: what comes in is read, put to the driver, and answered."""

import asyncio
import concurrent.futures
import contextlib
import importlib.resources
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from nemotron_jax.serving.answers import Answer
from nemotron_jax.serving.chat import ChatAnswer
from nemotron_jax.serving.chat_request import read_chat, read_prompt
from nemotron_jax.serving.completions import CompletionAnswer, read_completion
from nemotron_jax.serving.driver import Driver
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.grammars import asks_for_grammar
from nemotron_jax.serving.http import (
    HEAD_BYTES,
    Events,
    JsonResponse,
    Room,
    check_key,
    read_fields,
    unless_gone,
)
from nemotron_jax.serving.log import LOG
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.responses import ResponseAnswer
from nemotron_jax.serving.responses_request import read_response
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.wishes import encoded

MAX_BODY = 8_000_000  # bytes: a prompt of 1M tokens, and twice that
_LAG_EVERY_S = 0.1  # how often the loop's lag is measured
_LARGE = 4096  # tokens whose log-probabilities take 10 ms or more to be written as JSON
# Threads for requests with grammars, each of which has a process that tries them, and the seconds
# that such a request waits for one: behind many costly ones it is sent away.
_GRAMMAR_THREADS, _GRAMMAR_WAIT_S = 2, 1.5
_OPEN = ("/", "/health", "/metrics")  # paths that need no key: they show no text of anybody's
# The page runs its own script and talks to this server alone.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
_PAGE_HEADERS = {
    "Content-Security-Policy": f"{_POLICY}'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_READERS = {
    "chat": lambda fields, served: ChatAnswer(read_chat(fields, served), served, fields=fields),
    "text": lambda fields, served: CompletionAnswer(
        read_completion(fields, served), served, fields=fields
    ),
    "response": lambda fields, served: ResponseAnswer(
        read_response(fields, served), served, fields=fields
    ),
}


def make_app(
    driver: Driver,
    on_ready: Callable[[], Any] = lambda: None,
    on_failure: Callable[[], Any] = lambda: None,
    *,
    max_body: int = MAX_BODY,
    keys: tuple[str, ...] = (),
) -> FastAPI:
    """The application, whose start begins the driver and whose end stops it.

    `max_body` bounds the bytes of a request. Where there are `keys`, a client has to show one.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        driver.start(on_ready, on_failure)
        async with anyio.create_task_group():  # loads what every stream needs, not the first one
            pass
        lag = asyncio.create_task(_measure_lag(driver))
        yield
        lag.cancel()
        await driver.stop()

    # No redirects: they would go to whatever host a client names.
    app = FastAPI(
        lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    endpoints = _Endpoints(driver, max_body)
    for path, method, endpoint in (
        ("/v1/chat/completions", "POST", endpoints.chat),
        ("/v1/completions", "POST", endpoints.text),
        ("/v1/responses", "POST", endpoints.response),
        ("/v1/models", "GET", endpoints.models),
        ("/v1/models/{name:path}", "GET", endpoints.model),
        ("/tokenize", "POST", endpoints.tokenize),
        ("/detokenize", "POST", endpoints.detokenize),
        ("/tokenizer_info", "GET", endpoints.tokenizer),
        ("/health", "GET", endpoints.health),
        ("/metrics", "GET", endpoints.metrics),
        ("/", "GET", endpoints.page),
    ):
        methods = [method, "HEAD"] if method == "GET" else [method]  # as balancers ask for /health
        app.add_api_route(path, endpoint, methods=methods, response_model=None)
    app.add_exception_handler(HTTPException, _no_such_path)
    app.add_middleware(_Guarded, keys=keys, driver=driver)
    return app


class _Endpoints:
    """One method each. Whatever may take long, such as to encode a text, has another thread."""

    def __init__(self, driver: Driver, max_body: int) -> None:
        self._driver, self._room = driver, Room(max_body)
        files = importlib.resources.files("nemotron_jax.serving")
        self._page = (files / "page.html").read_text("utf-8")
        self._created = int(time.time())
        self._grammars = concurrent.futures.ThreadPoolExecutor(_GRAMMAR_THREADS, "grammar")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, "chat")

    async def text(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, "text")

    async def response(self, request: Request) -> Response:
        """POST /v1/responses"""
        return await self._answer(request, "response")

    async def models(self) -> Response:
        """GET /v1/models"""
        return JsonResponse({"object": "list", "data": [self._card()]})

    async def model(self, name: str) -> Response:
        """GET /v1/models/NAME"""
        self._check_model(name)
        return JsonResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize"""
        fields = await self._fields(request)
        return await asyncio.to_thread(_tokenized, fields, self._served)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize"""
        fields = await self._fields(request)
        return await asyncio.to_thread(_detokenized, fields, self._served)

    async def tokenizer(self) -> Response:
        """GET /tokenizer_info"""
        ends = self._served.tokenizer.special_names.get(self._served.tokenizer.eos)
        return JsonResponse({"eos_token": ends, "bos_token": None, "pad_token": None})

    async def health(self) -> Response:
        """GET /health"""
        ready = self._driver.ready and not self._driver.draining
        status = "ok" if ready else "draining" if self._driver.draining else "loading"
        return JsonResponse({"status": status}, 200 if ready else 503)

    async def metrics(self) -> Response:
        """GET /metrics"""
        return PlainTextResponse(self._driver.metrics.text(self._driver.stats))

    async def page(self) -> Response:
        """GET /"""
        return HTMLResponse(self._page, headers=_PAGE_HEADERS)

    async def _answer(self, request: Request, kind: str) -> Response:
        fields = await self._fields(request)
        self._check_model(fields.text("model", self._served.name))
        answer = await self._read(kind, fields)
        request.state.answer = answer
        stream = await self._driver.submit(answer.jobs)
        if answer.streams:
            return Events(answer, stream)
        try:
            body = await unless_gone(request, answer.whole(stream))
        finally:
            stream.close()
        if body is None:
            return Response(status_code=499)
        small = answer.size < _LARGE
        return JsonResponse(body) if small else await asyncio.to_thread(JsonResponse, body)

    async def _fields(self, request: Request) -> Fields:
        self._driver.check_open()  # before a large body is read for nothing
        return await read_fields(request, self._room)

    async def _read(self, kind: str, fields: Fields) -> Answer:
        """The answer that is asked for, still empty; read in another thread. What may need a
        grammar has threads of its own: others do not wait behind it."""
        served, read = self._served, _READERS[kind]
        if not asks_for_grammar(fields):
            return await asyncio.to_thread(read, fields, served)
        late = time.monotonic() + _GRAMMAR_WAIT_S

        def in_time() -> Answer:
            if time.monotonic() > late:
                reason = "too many formats wait to be compiled; try again later"
                raise Refusal(reason, status=429, code="queue_full")
            return read(fields, served)

        return await asyncio.get_running_loop().run_in_executor(self._grammars, in_time)

    @property
    def _served(self) -> Served:
        return self._driver.check_open()

    def _check_model(self, name: str) -> None:
        if name != self._served.name:
            raise Refusal(
                f"model={name[:100]!r} is not served; this server has {self._served.name!r}",
                "model",
                status=404,
                code="model_not_found",
            )

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "nemotron_jax",
            "max_model_len": self._served.context,
        }


class _Guarded:
    """Keys, errors, counts and the log of every request. Prompts and answers are not logged."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], keys: tuple[str, ...], driver: Driver
    ) -> None:
        self._app, self._keys, self._driver = app, keys, driver

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request, began, status = Request(scope, receive), time.monotonic(), 0

        async def sent(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
                raise Refusal(f"the head is larger than {HEAD_BYTES} bytes; send less", status=431)
            if scope["path"] not in _OPEN:
                check_key(request, self._keys)
            await self._app(scope, receive, sent)
        except Exception as error:
            refusal = _refusal_of(error)
            if not status:
                body = JsonResponse(refusal.body(), refusal.status, refusal.headers)
                await body(scope, receive, sent)
        finally:
            self._driver.metrics.answered(status)
            _log(request, status, time.monotonic() - began)


def _refusal_of(error: Exception) -> Refusal:
    if isinstance(error, Refusal):
        return error
    name = uuid.uuid4().hex[:12]
    LOG.error("error %s", name, exc_info=error)
    return Refusal(f"the server failed at this request (error {name} of its log)", status=500)


def _log(request: Request, status: int, seconds: float) -> None:
    if request.url.path in _OPEN:
        return
    counts, answer = "", request.scope.get("state", {}).get("answer")
    if isinstance(answer, Answer):
        prompts = sum(len(job.prompt) for job in answer.jobs)
        reasons = {one.finish_reason for one in answer.last.values()} - {None}
        ends = ",".join(sorted(reasons)) or "cancelled"
        counts = f" prompt={prompts} new={answer.new_tokens} finish={ends}"
    client = request.client.host if request.client else "-"
    path = ascii(request.url.path)[1:-1][:80]
    LOG.info("%s %s %s %d %.3fs%s", client, request.method, path, status, seconds, counts)


async def _no_such_path(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = "there is no such path" if error.status_code == 404 else str(error.detail)
    return JsonResponse(Refusal(reason, status=error.status_code).body(), error.status_code)


def _tokenized(fields: Fields, served: Served) -> Response:
    ids = _ids(fields, served)
    return JsonResponse({"tokens": ids, "count": len(ids), "max_model_len": served.context})


def _ids(fields: Fields, served: Served) -> list[int]:
    if fields.get("messages") is not None:
        return read_prompt(fields, served).ids(served)
    if fields.get("prompt") is None:
        raise Refusal("prompt: is missing; give a text, or messages", "prompt")
    text = fields.text("prompt")
    # Names of special tokens are text within a text; alone one asks for the token.
    alone = {name: token for token, name in served.tokenizer.special_names.items()}.get(text)
    return encoded(served, text, "prompt") if alone is None else [alone]


def _detokenized(fields: Fields, served: Served) -> Response:
    tokens = fields.token_ids("tokens", served.vocabulary)
    if tokens is None:
        raise Refusal("tokens: is missing; give a list of token ids", "tokens")
    return JsonResponse({"prompt": served.tokenizer.decode(tokens, show_special=True)})


async def _measure_lag(driver: Driver) -> None:
    """How much later than asked the loop comes back: what every answer waits for."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(_LAG_EVERY_S)
        driver.metrics.lag.add(max(time.monotonic() - began - _LAG_EVERY_S, 0.0))
