"""A model behind an OpenAI-compatible URL as one that answers."""

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nemotron_jax.evaluation.answers import Answer, Ask
from nemotron_jax.evaluation.suite import Unanswered, Unavailable
from nemotron_jax.evaluation.waiting import side_by_side

SIDE_BY_SIDE = 16  # requests in flight: more queue at the server, fewer leave it idle
TRIES, WAIT_S, MOST_WAIT_S = 4, 0.5, 30.0  # of a busy server: half a second, then twice as long
TIMEOUT_S = 600.0  # of one answer
_MOST_BYTES = 64 << 20  # of one answer, prompt log-probabilities included
_BUSY = (429, 502, 503, 504)
KEY = "OPENAI_API_KEY"  # of the environment, as OpenAI's own clients read it

Progress = Callable[[int, int], None]


class Url:
    """Answers of a server. The seed, the budget and the template's options go along as our own
    server, vLLM and SGLang read them; others ignore them."""

    def __init__(
        self, url: str, model: str = "", *, progress: Progress = lambda done, total: None
    ) -> None:
        """`url` ends before /v1 or with it; `model` is the first that the server names, without
        one."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._progress = progress
        self._model = model

    @property
    def model(self) -> str:
        """The name that requests bear. Raises Unavailable where the server does not say one."""
        if not self._model:
            found = self.call("GET", "/v1/models")
            try:
                self._model = str(found["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise Unavailable(
                    f"{self.url}/v1/models names no model; give one by --model=NAME"
                ) from None
        return self._model

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each; one that the server fails has `error`. Raises Unanswered where
        all have."""
        bodies = [(path_of(ask), body_of(ask, self.model)) for ask in asks]
        answers: list[Answer] = [Answer()] * len(asks)
        going = side_by_side(lambda n: self._answer(*bodies[n]), len(bodies), SIDE_BY_SIDE)
        for done, (number, answer) in enumerate(going, 1):
            answers[number] = answer
            self._progress(done, len(asks))
        if asks and all(answer.error for answer in answers):
            raise Unanswered(f"{self.url}: {answers[0].error}")
        return answers

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that the server answers with. Raises Unavailable with the reason."""
        request = self._request(method, path, body)
        for attempt in range(1, TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                    return json.loads(reply.read(_MOST_BYTES))
            except urllib.error.HTTPError as error:
                said, asked = error.read(2000).decode("utf-8", "replace"), error.headers
                if error.code not in _BUSY or attempt == TRIES:
                    raise Unavailable(f"{path}: status {error.code}: {_sentence(said)}") from None
                time.sleep(_wait(asked.get("Retry-After"), attempt))
            except (ValueError, RecursionError) as error:
                raise Unavailable(f"{self.url}{path}: its answer is no JSON ({error})") from None
            except (OSError, http.client.HTTPException) as error:
                if attempt == TRIES:
                    reason = getattr(error, "reason", error)
                    raise Unanswered(
                        f"{self.url}{path} does not answer ({reason}); is the server running?"
                    ) from None
                time.sleep(_wait(None, attempt))
        raise AssertionError("the last attempt returns or raises")

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed answer as they come, the last with `usage` where the server
        counts. Asked once: raises Unavailable for whatever goes wrong."""
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        try:
            with urllib.request.urlopen(
                self._request("POST", path, body), timeout=TIMEOUT_S
            ) as got:
                for line in got:
                    event = line.strip().removeprefix(b"data:").strip()
                    if event == b"[DONE]":
                        return
                    if event.startswith(b"{"):
                        yield json.loads(event)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            raise Unavailable(f"{path}: status {error.code}: {_sentence(said)}") from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise Unavailable(f"{self.url}{path}: {getattr(error, 'reason', error)}") from None

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> urllib.request.Request:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(self.url + path, data, headers, method=method)

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        try:
            found = self.call("POST", path, body)
            return read_answer(found, prompt_logprobs=bool(body.get("echo")))
        except Unavailable as error:
            return Answer(finish_reason="error", error=str(error))


def path_of(ask: Ask) -> str:
    """Where a request goes."""
    return "/v1/chat/completions" if ask.prompt is None else "/v1/completions"


def body_of(ask: Ask, model: str) -> dict[str, Any]:
    """A request's JSON."""
    body: dict[str, Any] = {"model": model, "max_tokens": ask.max_new_tokens}
    body |= {"temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
    if ask.stop:
        body["stop"] = list(ask.stop)
    if ask.prompt is not None:
        body["prompt"] = ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)
        if ask.prompt_logprobs:
            body |= {"echo": True, "logprobs": 1}
        return body
    options: dict[str, Any] = {"enable_thinking": ask.thinking}
    if ask.low_effort:
        options["low_effort"] = True
    if ask.budget is not None:
        options["reasoning_budget"] = ask.budget
    body |= {"messages": list(ask.messages), "chat_template_kwargs": options}
    if ask.tools:
        body["tools"] = list(ask.tools)
    return body


def read_answer(found: Any, *, prompt_logprobs: bool = False) -> Answer:
    """What a server's JSON says; one that cannot be read is an answer with `error`."""
    try:
        choice, usage = found["choices"][0], found.get("usage") or {}
        reason = "length" if choice.get("finish_reason") == "length" else "stop"
        tokens = int(usage.get("completion_tokens") or 0)
        if (message := choice.get("message")) is not None:
            return _turn(message, reason, tokens)
        scored = choice.get("logprobs") or {} if prompt_logprobs else {}
        return Answer(str(choice["text"]), tokens, reason, **_prompt_scores(scored, tokens))
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return Answer(
            finish_reason="error",
            error=f"the server's answer cannot be read ({type(error).__name__}: {error})",
        )


def _turn(message: dict[str, Any], reason: str, tokens: int) -> Answer:
    text = message.get("content") or ""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    calls = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError, RecursionError):  # the model's fault, not its
                arguments = json.loads(arguments)
        calls.append({"name": str(function["name"]), "arguments": arguments})
    turn: dict[str, Any] = {"role": "assistant", "content": text}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if message.get("tool_calls"):
        turn["tool_calls"] = message["tool_calls"]
    return Answer(str(text), tokens, reason, str(reasoning), tuple(calls), turn)


def _prompt_scores(logprobs: dict[str, Any], new_tokens: int) -> dict[str, tuple]:
    """Of the echoed prompt: all tokens but the first, and but the new ones after it."""
    each, best = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
    each = each[1 : len(each) - new_tokens]
    best = best[1 : 1 + len(each)]
    likeliest = tuple(
        bool(top) and value >= max(top.values()) for value, top in zip(each, best, strict=True)
    )
    return {"prompt_logprobs": tuple(map(float, each)), "prompt_likeliest": likeliest}


def _wait(asked: str | None, attempt: int) -> float:
    """Seconds until the next attempt: what the server asks for, within reason."""
    try:
        seconds = float(asked or "")
    except ValueError:
        seconds = WAIT_S * 2 ** (attempt - 1)
    return min(max(seconds, 0.0), MOST_WAIT_S)


def _sentence(said: str) -> str:
    """A server's own words of its error."""
    try:
        said = json.loads(said)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return " ".join(str(said).split())[:300]
