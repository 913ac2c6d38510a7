"""A generator without a model: it says what a script gives for a prompt, a few tokens a step."""

import random
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generator import Stats
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.stopping import StopText
from nemotron_jax.decoding.wanted import Wanted


def logprob(token: int, place: int) -> float:
    """Of a token of a text: any, but always the same."""
    return -((token * 31 + place) % 97) / 16


class FakeGenerator:
    """Keeps `Generator`'s promises. While `gate` is clear, no step ends; `threads` are those that
    called it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[Sequence[int], int], list[int]],
        slots: int = 4,
    ) -> None:
        self._tokenizer, self._script, self._slots = tokenizer, script, slots
        self._waiting: list[Request] = []
        self._running: dict[Request, tuple[list[int], StopText | None]] = {}
        self._finished, self._cancelled, self.faults = 0, 0, 0
        self.seen: list[Request] = []
        self.per_step, self.pause_s = 3, 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.threads: set[str] = set()

    def submit(self, prompt: Sequence[int], wanted: Wanted, *, n: int = 1) -> list[Request]:
        """Requests that wait for a slot."""
        self.threads.add(threading.current_thread().name)
        requests = [Request(tuple(prompt), wanted, branch, self.step) for branch in range(n)]
        self._waiting += requests
        self.seen += requests
        return requests

    def step(self) -> bool:
        """A few tokens for every request that runs."""
        self.threads.add(threading.current_thread().name)
        self.gate.wait(20)
        time.sleep(self.pause_s)
        if self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of the device")
        for request in [r for r in (*self._waiting, *self._running) if r.cancelled]:
            self._end(request, "cancelled")
        while self._waiting and len(self._running) < self._slots:
            request = self._waiting.pop(0)
            stops = request.wanted.stop_strings
            watch = StopText(self._tokenizer, stops) if stops else None
            script = self._script(request.prompt)
            self._running[request] = (script, watch)
            if request.prompt_logprobs is not None:
                request.prompt_logprobs[:] = [
                    logprob(token, place) for place, token in enumerate(request.prompt)
                ][1:]
                request.prompt_likeliest[:] = [(20, 0.0)] * (len(request.prompt) - 1)
        for request in list(self._running):
            for _ in range(self.per_step):
                if not request.done:
                    self._give(request)
        return bool(self._waiting or self._running)

    def run(self) -> None:
        """All of it."""
        while self.step():
            pass

    def stats(self) -> Stats:
        """Its counts."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            finished=self._finished,
            cancelled=self._cancelled,
            new_tokens=sum(len(request.tokens) for request in self.seen),
            prompt_tokens=sum(len(request.prompt) for request in self.seen),
            version=0,
            acceptance=None,
            free_pages=7,
        )

    def _give(self, request: Request) -> None:
        script, watch = self._running[request]
        place, wanted = len(request.tokens), request.wanted
        budget = wanted.budget
        token = script[place] if place < len(script) else self._tokenizer.eos
        if wanted.grammar is not None:
            try:
                token = self._drawn(request)
            except RuntimeError as error:  # as `Request.ask_grammar` does
                request.error = str(error)
                self._end(request, "stop")
                return
        closed = budget and budget.closing_token in request.tokens
        if budget and not closed and place >= budget.tokens:
            token = budget.closing_token
        request.tokens.append(token)
        request.logprobs.append(logprob(token, place))
        if wanted.top_logprobs:
            top = [(token, logprob(token, place)), (20, -30.0)]
            request.top_logprobs.append(tuple(top[: wanted.top_logprobs]))
        if token in wanted.stop_tokens or (watch and watch.push(token)):
            self._end(request, "stop")
        elif len(request.tokens) == wanted.max_new_tokens:
            self._end(request, "length")

    def _drawn(self, request: Request) -> int:
        """A token that the grammar lets come, drawn as an untrained model would."""
        grammar, count = request.wanted.grammar, len(request.tokens)
        if count:
            assert grammar.accept(request.tokens[-1])
        allowed = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
        draw = random.Random(f"{request.wanted.seed} {count}")
        return draw.choice(np.flatnonzero(allowed).tolist())

    def _end(self, request: Request, reason: str) -> None:
        self._running.pop(request, None)
        self._waiting = [one for one in self._waiting if one is not request]
        self._cancelled += reason == "cancelled"
        self._finished += reason != "cancelled"
        request.finish_reason = reason
