"""/v1/chat/completions: a chat's next turn, whole or in a stream."""

import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from nemotron_jax.serving.answers import Answer, usage_of
from nemotron_jax.serving.chat_request import ChatRequest
from nemotron_jax.serving.driver import Piece, Stream
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.turns import Turn, message_of


@dataclasses.dataclass
class _Choice:
    """What one sample has come to."""

    turn: Turn
    deltas: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scored: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    last: Piece | None = None


class ChatAnswer(Answer):
    """The answer to a chat request."""

    kind, prefix = "chat.completion", "chatcmpl"

    def __init__(self, request: ChatRequest, served: Served, **options: Any) -> None:
        super().__init__(request.jobs, served, **options)
        self._request = request
        self._choices = [_Choice(Turn(request, served)) for _ in self.tokens]

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The completion."""
        async for pieces in stream.rounds():
            for piece in pieces:
                choice = self._choices[piece.index]
                choice.deltas.append(choice.turn.push(piece))
                if (scores := choice.turn.logprobs(piece)) is not None:
                    choice.scored += scores["content"]
                self.seen(piece)
        choices = []
        for index, choice in enumerate(self._choices):
            scored = {"content": choice.scored} if self._request.logprobs else None
            body = {"index": index, "message": message_of(choice.deltas), "logprobs": scored}
            body["finish_reason"] = choice.turn.finish_reason
            choices.append(body | self.ids(self.tokens[index]))
        return self.envelope(self.kind, choices) | self.prompt_ids() | {"usage": self.usage()}

    async def chunks(self, stream: Stream) -> AsyncIterator[list[dict[str, Any]]]:
        """The completion in the chunks of each round."""
        kind = self.kind + ".chunk"
        first = {"role": "assistant", "content": ""}
        opening = [
            {"index": index, "delta": first, "finish_reason": None}
            for index in range(len(self._choices))
        ]
        yield [self.envelope(kind, [choice]) | self.prompt_ids() for choice in opening]
        async for pieces in stream.rounds():
            sent = []
            for piece in pieces:
                turn = self._choices[piece.index].turn
                delta, scores = turn.push(piece), turn.logprobs(piece)
                self.seen(piece)
                body = {"index": piece.index, "delta": delta, "finish_reason": turn.finish_reason}
                body |= {} if scores is None else {"logprobs": scores}
                body |= self.ids(piece.tokens)
                if delta or scores or turn.finish_reason or "token_ids" in body:
                    sent.append(self.envelope(kind, [body]))
            if sent:
                yield sent
        if self.include_usage:
            yield [self.envelope(kind, []) | {"usage": self.usage()}]

    def usage(self) -> dict[str, Any]:
        """What it took."""
        return usage_of(self.last, sum(choice.turn.reasoning_tokens for choice in self._choices))
