"""A turn of a chat while it is written, as the deltas of OpenAI's stream; joined, its message."""

import uuid
from collections.abc import Sequence
from typing import Any

from nemotron_jax.data.chat.events import CallEnded, Content, Event, Malformed, Reasoning, joined
from nemotron_jax.data.chat.parse import TurnParser
from nemotron_jax.data.chat.render import ANSWER, CALL
from nemotron_jax.data.chat.tools import in_json
from nemotron_jax.serving.chat_request import ChatRequest
from nemotron_jax.serving.driver import Piece
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.texts import VisibleText, scored_token


class Turn:
    """One choice of a chat completion. A call is given when it is whole, so that its arguments are
    always JSON; one that is malformed is text."""

    def __init__(self, request: ChatRequest, served: Served) -> None:
        self._request, self._tokenizer = request, served.tokenizer
        wanted = request.jobs[0].wanted
        # Of an answer in a format all is content: a name of a tag in it is text.
        self._formatted, self._thinks = wanted.grammar is not None, request.thinking
        self._text = VisibleText(served.tokenizer, wanted, show_special=not self._formatted)
        self._parser = TurnParser(thinking=request.thinking, tools=request.tools)
        answers = (served.tokenizer.token_id(name) for name in (ANSWER, CALL))
        self._answers = frozenset(answers) if request.thinking else None
        self.reasoning_tokens = 0
        self._reasoning, self._content, self._calls = "", "", 0
        self.finish_reason: str | None = None

    def push(self, piece: Piece) -> dict[str, Any]:
        """The delta of a piece; empty where nothing became certain."""
        self._count_reasoning(piece.tokens)
        if self._formatted:
            delta = self._delta(self._plain(piece))
        else:
            events = self._parser.push(self._text.push(piece.tokens, piece.finish_reason))
            ended = piece.finish_reason is not None
            delta = self._delta([*events, *(self._parser.finish() if ended else ())])
        if piece.finish_reason is None:
            return delta
        if self._request.nonempty and not (self._content.strip() or self._calls):
            self._content = delta["content"] = self._reasoning
        self.finish_reason = piece.finish_reason
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return delta

    def _plain(self, piece: Piece) -> list[Event]:
        """Reasoning up to its closing token, and content."""
        tokens, answer, reasoning = list(piece.tokens), self._tokenizer.token_id(ANSWER), ""
        if self._thinks and answer in tokens:
            cut = tokens.index(answer) + 1
            reasoning, tokens = self._text.push(tokens[:cut], None), tokens[cut:]
            self._thinks = False
        text = self._text.push(tokens, piece.finish_reason)
        return [Reasoning(reasoning), Reasoning(text) if self._thinks else Content(text)]

    def logprobs(self, piece: Piece) -> dict[str, Any] | None:
        """The log-probabilities of a piece's tokens, where they are asked for."""
        if not self._request.logprobs:
            return None
        scored = lambda token, logprob: scored_token(self._tokenizer, token, logprob)
        tops = piece.top_logprobs or [()] * len(piece.tokens)
        rows = zip(piece.tokens, piece.logprobs, tops, strict=True)
        return {
            "content": [
                {**scored(token, logprob), "top_logprobs": [scored(*one) for one in top]}
                for token, logprob, top in rows
            ]
        }

    def _count_reasoning(self, tokens: Sequence[int]) -> None:
        if self._answers is None:
            return
        for token in tokens:
            if token in self._answers:
                self._answers = None
                return
            self.reasoning_tokens += 1

    def _delta(self, events: Sequence[Event]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        for event in joined(events):
            if isinstance(event, Reasoning) and event.text:
                self._reasoning += event.text
                delta["reasoning_content"] = delta.get("reasoning_content", "") + event.text
            elif isinstance(event, Content | Malformed) and event.text:
                self._content += event.text
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, CallEnded):
                if self._calls and not self._request.parallel:
                    continue
                delta.setdefault("tool_calls", []).append(_call(event, self._calls))
                self._calls += 1
        if "reasoning_content" in delta:
            delta["reasoning"] = delta["reasoning_content"]
        return delta


def message_of(deltas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that a turn's deltas add up to."""
    texts = lambda name: "".join(delta.get(name, "") for delta in deltas)
    reasoning = texts("reasoning_content") or None
    message = {
        "role": "assistant",
        "content": texts("content"),
        "reasoning_content": reasoning,
        "reasoning": reasoning,
    }
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    if calls:
        names = ("id", "type", "function")
        message["tool_calls"] = [{name: call[name] for name in names} for call in calls]
        message["content"] = message["content"] or None
    return message


def _call(event: CallEnded, index: int) -> dict[str, Any]:
    return {
        "index": index,
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": event.name, "arguments": in_json(event.arguments)},
    }
