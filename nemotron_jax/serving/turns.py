"""A turn of a chat while it is written, as the deltas of OpenAI's stream; joined, its message."""

import re
import uuid
from collections.abc import Sequence
from typing import Any

from nemotron_jax.data.chat.events import CallEnded, Content, Event, Malformed, Reasoning, joined
from nemotron_jax.data.chat.parse import TurnParser
from nemotron_jax.data.chat.reader import LONGEST, PARAMETER_END
from nemotron_jax.data.chat.render import ANSWER, CALL, CALL_END, END
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
        formed = wanted.grammar is not None
        self._parser = _HeldParser(request, served) if formed else _FreeParser(request, served)
        answers = (served.tokenizer.token_id(name) for name in (ANSWER, CALL))
        self._answers = frozenset(answers) if request.thinking else None
        self.reasoning_tokens = 0
        self._reasoning, self._content, self._calls = "", "", 0
        self.finish_reason: str | None = None

    def push(self, piece: Piece) -> dict[str, Any]:
        """The delta of a piece; empty where nothing became certain."""
        self._count_reasoning(piece.tokens)
        delta = self._delta(self._parser.push(piece.tokens, piece.finish_reason))
        if piece.finish_reason is None:
            return delta
        if self._request.nonempty and not (self._content.strip() or self._calls):
            self._content = delta["content"] = self._reasoning
        self.finish_reason = piece.finish_reason
        if self._calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        return delta

    @property
    def answers(self) -> bool:
        """Whether its reasoning, if any, is over."""
        return self._answers is None

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
                if self._request.reasons:
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


class _FreeParser:
    """Reads a turn as the model wrote it, which may be in any way."""

    def __init__(self, request: ChatRequest, served: Served) -> None:
        self._text = VisibleText(served.tokenizer, request.jobs[0].wanted, show_special=True)
        self._parser = TurnParser(thinking=request.thinking, tools=request.tools)

    def push(self, tokens: Sequence[int], finish_reason: str | None) -> list[Event]:
        """The events that became certain; the last ones with the reason why it is over."""
        events = self._parser.push(self._text.push(tokens, finish_reason))
        return events if finish_reason is None else [*events, *self._parser.finish()]


class _HeldParser:
    """Reads a turn that follows a grammar by its tokens: reasoning up to `</think>`, an answer, and
    calls from the first `<tool_call>` on. The name of a tag in any of them is text."""

    def __init__(self, request: ChatRequest, served: Served) -> None:
        self._visible = lambda: VisibleText(
            served.tokenizer, request.jobs[0].wanted, show_special=False
        )
        self._text, self._parser = self._visible(), TurnParser(tools=request.tools)
        token = served.tokenizer.token_id
        calls = {token(name): name for name in (CALL, CALL_END)} if request.held else {}
        self._answer, self._calls = token(ANSWER), calls
        # Of what is being read; None from the first call on.
        self._kind: type[Reasoning] | type[Content] | None = Content
        if request.thinking:
            self._kind = Reasoning
        self._newline = ""  # a line end that belongs to the tag after it, if one follows
        self._skip = False  # the next line end belongs to the tag before it
        self._held = ""  # of a call: what may be the beginning of a tag's name
        self._before = ""  # the character before that

    def push(self, tokens: Sequence[int], finish_reason: str | None) -> list[Event]:
        """The events that became certain; the last ones with the reason why it is over."""
        events, rest = [], list(tokens)
        while True:
            marks = {self._answer, *self._calls} if self._kind is Reasoning else self._calls
            cut = next((at for at, token in enumerate(rest) if token in marks), None)
            # What could have become a stop string, or a character, ends at a tag.
            text = self._text.push(rest[:cut], finish_reason if cut is None else "tag")
            ends = cut is not None or finish_reason is not None
            if self._kind is None:
                events += self._parser.push(self._escaped(text, ends=ends))
            else:
                events += self._plain(text, keep=cut is None and ends)
            if cut is None:
                break
            token, rest, self._text = rest[cut], rest[cut + 1 :], self._visible()
            self._newline, self._skip = "", True
            self._kind = Content if token == self._answer else None
            events += self._parser.push(self._calls.get(token, "")) if token in self._calls else []
        last = self._kind is None and finish_reason is not None
        return [*events, *self._parser.finish()] if last else events

    def _escaped(self, text: str, *, ends: bool) -> str:
        """Text of a call in which no name of a tag stands but at its place.

        A grammar lets names stand in JSON alone, where they may be written so. Closing tags of
        parameters have a line of their own, which JSON on one line has not.
        """
        text, self._held = self._held + text, ""
        sign = text.rfind("<", max(0, len(text) - LONGEST))
        if sign >= 0 and not ends:
            text, self._held = text[:sign], text[sign:]
        known = len(self._before)
        text, self._before = self._before + text, (self._before + text)[-1:]
        return _NAMES.sub(lambda found: "\\u003c" + found[0][1:], text)[known:]

    def _plain(self, text: str, *, keep: bool) -> list[Event]:
        """Text less the line ends that belong to tags, one on either side; at an end all stay."""
        if self._skip and text:
            text, self._skip = text.removeprefix("\n"), False
        text, self._newline = self._newline + text, ""
        if text.endswith("\n") and not keep:
            text, self._newline = text[:-1], "\n"
        return [self._kind(text)] if text else []


_NAMES = re.compile(rf"(?<!\n){PARAMETER_END}|{CALL_END}|{re.escape(END)}")


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
