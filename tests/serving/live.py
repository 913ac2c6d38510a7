"""A live server around a fake generator, on a free port, and what clients say to it."""

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.serving import server
from nemotron_jax.serving.driver import Driver
from nemotron_jax.serving.served import Served
from tests.serving.fake_generator import FakeGenerator

CONTEXT = 4000
TOKENIZER = train_tokenizer(["user assistant system hello there, four and two\n"], 300)
CHAT = "/v1/chat/completions"


def ids_of(text: str) -> list[int]:
    """A text's ids, reserved names as their tokens."""
    names = "|".join(map(re.escape, sorted(TOKENIZER.special_tokens, key=len, reverse=True)))
    parts = re.split(f"({names})", text)
    found = [
        [TOKENIZER.token_id(part)] if part in TOKENIZER.special_tokens else TOKENIZER.encode(part)
        for part in parts
    ]
    return [token for part in found for token in part]


class Live:
    """A server that runs, a client of it, and the generator behind: a fake one that gives `script`,
    unless there is an engine."""

    def __init__(
        self,
        script: str = "four<|im_end|>",
        slots: int = 4,
        waiting: int = 8,
        engine: Engine | None = None,
    ) -> None:
        self.script = script
        self.generator = engine or FakeGenerator(TOKENIZER, self._answer, slots)
        self._context = CONTEXT if engine is None else engine.config.max_length
        self.driver = Driver(lambda: (self.generator, self.served()), most=slots + waiting)

    def served(self) -> Served:
        """What is served."""
        stops = (TOKENIZER.eos,)
        turn = (TOKENIZER.token_id("<|im_end|>"), *stops)
        return Served("tiny", TOKENIZER, TOKENIZER.vocab_size, self._context, stops, turn)

    def _answer(self, prompt: Sequence[int]) -> list[int]:
        return ids_of(self.script)

    def post(self, path: str = CHAT, **body: Any) -> httpx.Response:
        """An answer. A chat without messages says hello."""
        if path == CHAT:
            body.setdefault("messages", [{"role": "user", "content": "hello"}])
        return self.client.post(path, json=body)

    def events(self, path: str = CHAT, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a streamed answer."""
        text = self.post(path, stream=True, **body).text
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@contextlib.contextmanager
def live(*, keys: tuple[str, ...] = (), max_body: int = 100_000, **options: Any) -> Iterator[Live]:
    """A live server."""
    one = Live(**options)
    listener = server.bound("127.0.0.1", 0)
    one.address = listener.getsockname()[:2]
    thread = threading.Thread(
        target=server.run,
        args=(one.driver, listener, "tiny"),
        kwargs={"max_body": max_body, "keys": keys},
        name="serve",
    )
    thread.start()
    url, limits = f"http://127.0.0.1:{one.address[1]}", httpx.Limits(max_connections=None)
    try:
        with httpx.Client(base_url=url, timeout=120, limits=limits) as one.client:
            while one.client.get("/health").status_code != 200:
                pass
            yield one
    finally:
        if isinstance(one.generator, FakeGenerator):
            one.generator.gate.set()
        one.driver.draining = True  # as a signal does
        thread.join(30)
    assert not thread.is_alive()
    if isinstance(one.generator, FakeGenerator):
        assert one.generator.threads <= {"engine"}
