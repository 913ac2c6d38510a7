"""/v1/responses: a turn as items (reasoning, message, calls), whole or as typed events."""

import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from nemotron_jax.serving.answers import Answer, usage_of
from nemotron_jax.serving.chat_request import ChatRequest
from nemotron_jax.serving.driver import Piece, Stream
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.turns import Turn

Event = dict[str, Any]
# Fields that a response says again.
_ECHOED = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "user": None,
}


class ResponseAnswer(Answer):
    """The answer to a request."""

    kind, prefix, end = "response", "resp", b""

    def __init__(self, request: ChatRequest, served: Served, *, fields: Fields) -> None:
        super().__init__(request.jobs, served, fields=fields)
        self._turn, self._logprobs = Turn(request, served), request.logprobs
        self._echoed = {name: fields.get(name) for name in _ECHOED}
        self._echoed |= {n: d for n, d in _ECHOED.items() if self._echoed[n] is None}
        wanted = request.jobs[0].wanted
        self._echoed |= {"temperature": wanted.temperature, "top_p": wanted.top_p}
        self._echoed["text"] = {"format": fields.part("text").get("format") or {"type": "text"}}
        effort = fields.part("reasoning").get("effort")
        self._echoed["reasoning"] = {"effort": effort, "summary": None}
        self._output: list[dict[str, Any]] = []
        self._open = ""  # the type of the last item, which goes on; empty where none does
        self._sent = 0  # events

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The response."""
        async for events in self.chunks(stream):
            last = events[-1]
        return last["response"]

    async def chunks(self, stream: Stream) -> AsyncIterator[list[Event]]:
        """The events of each round."""
        yield [
            self._event(f"response.{name}", response=self._response("in_progress"))
            for name in ("created", "in_progress")
        ]
        async for pieces in stream.rounds():
            events = [event for piece in pieces for event in self._events(piece)]
            if (reason := self._turn.finish_reason) is not None:
                status = "incomplete" if reason == "length" else "completed"
                events += self._close(status)
                events.append(self._event(f"response.{status}", response=self._response(status)))
            if events:
                yield events

    def failed(self, refusal: Refusal) -> Event:
        """The event of an answer that could not go on."""
        error = refusal.body()["error"]
        return self._event("error", **{name: error[name] for name in ("code", "message", "param")})

    def _events(self, piece: Piece) -> Iterator[Event]:
        """What a piece adds to the items."""
        thought, answered = self._turn.reasoning_tokens, self._turn.answers
        delta, scores = self._turn.push(piece), self._turn.logprobs(piece)
        self.seen(piece)
        # Log-probabilities are the message's: those of reasoning and of its end are left out.
        skip = self._turn.reasoning_tokens - thought + (self._turn.answers and not answered)
        rows = scores["content"][skip:] if scores and self._turn.answers else []
        if text := delta.get("reasoning_content"):
            yield from self._begin("reasoning", "reasoning_text", content=[], summary=[])
            yield from self._add("reasoning_text", text)
        if delta.get("content") or rows and self._open == "message":
            yield from self._begin("message", "output_text", role="assistant", content=[])
            yield from self._add("output_text", delta.get("content", ""), rows)
        for call in delta.get("tool_calls", ()):
            yield from self._call(call)

    def _begin(self, kind: str, part: str, **item: Any) -> Iterator[Event]:
        """Open an item of a kind, unless the last one is."""
        if self._open == kind:
            return
        yield from self._close("completed")
        name = {"reasoning": "rs", "message": "msg"}[kind]
        item = {"id": f"{name}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **item}
        self._output.append(item)
        self._open = kind
        yield self._event("response.output_item.added", item=_copied(item))
        item["content"].append(_part(part))
        yield self._at("response.content_part.added", part=_part(part))

    def _add(self, part: str, text: str, rows: list[dict[str, Any]] | None = None) -> Iterator:
        own = self._output[-1]["content"][0]
        own["text"] += text
        more = {}
        if part == "output_text":
            more = {"logprobs": rows or []}
            own["logprobs"] += rows or []
        yield self._at(f"response.{part}.delta", delta=text, **more)

    def _call(self, call: dict[str, Any]) -> Iterator[Event]:
        """A whole call as an item."""
        yield from self._close("completed")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress"}
        item |= {"call_id": call["id"], "name": name, "arguments": ""}
        self._output.append(item)
        yield self._event("response.output_item.added", item=dict(item))
        item |= {"arguments": arguments, "status": "completed"}
        yield self._at("response.function_call_arguments.delta", delta=arguments)
        yield self._at("response.function_call_arguments.done", arguments=arguments, name=name)
        yield self._event("response.output_item.done", item=dict(item))

    def _close(self, status: str) -> Iterator[Event]:
        """End the item that is open."""
        if not self._open:
            return
        item, self._open = self._output[-1], ""
        item["status"], part = status, item["content"][0]
        more = {"logprobs": part["logprobs"]} if part["type"] == "output_text" else {}
        yield self._at(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._at("response.content_part.done", part=dict(part))
        yield self._event("response.output_item.done", item=_copied(item))

    def _at(self, kind: str, **values: Any) -> Event:
        """An event of the last item."""
        item = self._output[-1]
        place = {"item_id": item["id"]}
        place |= {"content_index": 0} if "content" in item else {}
        return self._event(kind, **place, **values)

    def _event(self, kind: str, **values: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sent, **values}
        if "item" in values or "item_id" in values:
            event["output_index"] = len(self._output) - 1
        self._sent += 1
        return event

    def _response(self, status: str) -> dict[str, Any]:
        cut_off = {"reason": "max_output_tokens"} if status == "incomplete" else None
        begins = {"id": self.id, "object": self.kind, "created_at": self.created}
        ends = {"status": status, "error": None, "incomplete_details": cut_off}
        ids = {name: value for name, value in self.prompt_ids().items()}
        ids |= self.ids(self.tokens[0])
        return {
            **begins,
            **ends,
            "model": self.served.name,
            "output": [_copied(item) for item in self._output],
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
            **self._echoed,
            **ids,
        }

    def _usage(self) -> dict[str, Any]:
        """What it took, under the names of this interface."""
        used = usage_of(self.last, self._turn.reasoning_tokens)
        cached = used["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }


def _part(kind: str) -> dict[str, Any]:
    """An empty part of an item's content."""
    more = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": "", **more}


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now: it is sent later than it is said."""
    parts = [dict(part) for part in item.get("content", ())]
    return {**item, "content": parts} if "content" in item else dict(item)
