"""What answers have in common: the envelope, token ids, and the count of tokens."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nemotron_jax.decoding.request import Request
from nemotron_jax.serving.driver import Piece, Stream
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.wishes import Job


class Answer:
    """An answer that grows from a stream's pieces."""

    kind, prefix = "", ""
    end = b"data: [DONE]\n\n"  # of a stream

    def __init__(self, jobs: Sequence[Job], served: Served, *, fields: Fields) -> None:
        self.jobs, self.served = jobs, served
        self.streams = fields.flag("stream")
        options = fields.part("stream_options")
        self.include_usage = options.flag("include_usage")
        self._with_ids = fields.flag("return_token_ids")
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.tokens: list[list[int]] = [[] for job in jobs for _ in range(job.n)]
        self.last: dict[int, Request] = {}

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The answer at once."""
        raise NotImplementedError

    def chunks(self, stream: Stream) -> AsyncIterator[list[dict[str, Any]]]:
        """The answer in the chunks of each round."""
        raise NotImplementedError

    def failed(self, refusal: Refusal) -> dict[str, Any]:
        """What a stream says whose status was sent before it failed."""
        return refusal.body()

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """What every object of an answer begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "choices": choices,
        }

    def seen(self, piece: Piece) -> None:
        """Count a piece."""
        self.tokens[piece.index] += piece.tokens
        self.last[piece.index] = piece.request

    def ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        """A choice's token ids, where they are asked for."""
        return {"token_ids": list(tokens)} if self._with_ids else {}

    def prompt_ids(self) -> dict[str, Any]:
        """The prompt's ids, where they are asked for."""
        return {"prompt_token_ids": list(self.jobs[0].prompt)} if self._with_ids else {}

    @property
    def size(self) -> int:
        """Tokens of prompts and continuations."""
        return self.new_tokens + sum(len(job.prompt) * job.n for job in self.jobs)

    @property
    def new_tokens(self) -> int:
        """So far."""
        return sum(map(len, self.tokens))


def usage_of(requests: dict[int, Request], reasoning_tokens: int = 0) -> dict[str, Any]:
    """Tokens of some requests; a prompt of several samples counts once."""
    cached: dict[tuple[int, ...], int] = {}  # by prompt; its other samples find all of it
    for request in requests.values():
        before = cached.get(request.prompt, len(request.prompt))
        cached[request.prompt] = min(before, request.cached_tokens)
    prompt = sum(map(len, cached))
    new = sum(len(request.tokens) for request in requests.values())
    accepted = sum(request.accepted_drafts for request in requests.values())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
        "completion_tokens_details": {
            "reasoning_tokens": reasoning_tokens,
            "accepted_prediction_tokens": accepted,
        },
    }
