"""An assistant's turn read as it is written: reasoning, text, tool calls, and what is wrong.

A state machine over the text of a turn, special tokens spelled by their names. It takes the text in
any cuts, gives the same events for all of them (text events of one kind joined), costs time in
proportion to the text, and never raises for what a model wrote.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from nemotron_jax.data.chat.events import (
    UNCLOSED_CALL,
    UNCLOSED_REASONING,
    CallArguments,
    CallEnded,
    CallStarted,
    Content,
    Event,
    Malformed,
    ParsedTurn,
    Reasoning,
    TurnEnded,
    turn_of,
)
from nemotron_jax.data.chat.reader import (
    BLANK,
    FUNCTION,
    FUNCTION_END,
    LONGEST,
    PARAMETER,
    PARAMETER_END,
    TextReader,
    tags_of,
)
from nemotron_jax.data.chat.render import ANSWER, CALL, CALL_END, END, THINK
from nemotron_jax.data.chat.schemas import Schemas
from nemotron_jax.data.tokenizer import Tokenizer

_AFTER_VALUE = (PARAMETER, FUNCTION_END, CALL_END, END)
_NAME_END = re.compile(r"[>\n<]")


def parse_turn(
    text: str,
    *,
    thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> ParsedTurn:
    """The turn that a text is; see TurnParser for the arguments."""
    parser = TurnParser(thinking=thinking, tools=tools, strict=strict)
    return turn_of(parser.push(text) + parser.finish())


def turn_events(ids: Iterable[int], tokenizer: Tokenizer, *, thinking: bool) -> Iterator[Event]:
    """A turn's events while its ids arrive."""
    parser, text = TurnParser(thinking=thinking), tokenizer.stream(show_special=True)
    for token in ids:
        yield from parser.push(text.push(token))
    yield from parser.push(text.finish())
    yield from parser.finish()


class TurnParser(TextReader):
    """Takes a turn's text piece by piece, gives events as soon as they are certain.

    `thinking` says that the generation prompt opened the reasoning already. `tools` are those of
    the request; their schemas give arguments their types. A value ends at the `</parameter>` that
    is followed by another parameter or the end of its function, so values may hold such tags; they
    cannot hold `</tool_call>`, which ends a call wherever it stands.

    A call within the reasoning ends it, and a `</think>` right after such calls is passed over;
    `strict` takes the call for reasoning, as a reward for keeping to the format wants it.
    """

    def __init__(
        self,
        *,
        thinking: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self._schemas = Schemas(tools)
        self._thinking_tags = _STRICT_THINKING_TAGS if strict else _THINKING_TAGS
        self._answer_due = False  # a call ended the reasoning, whose own end may still come
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._thinking if thinking else self._opening
        self._calls = 0
        self._reason = ""  # why it is malformed
        self._name = ""
        self._arguments: dict[str, Any] = {}
        self._parameter = ""
        self._value: list[str] = []

    def push(self, text: str) -> list[Event]:
        """The events that became certain with this text."""
        if self._state == self._over:
            return []
        self._feed(text)
        return self._run()

    def finish(self) -> list[Event]:
        """The events of a stream that stops here; a call or reasoning left open is malformed."""
        self._last = True
        events = self._run()
        if self._state == self._thinking:
            events.append(Malformed("", UNCLOSED_REASONING))
        elif self._state not in (self._opening, self._content, self._after_call, self._over):
            self._fail(self._reason if self._state == self._broken else UNCLOSED_CALL)
            events += self._take_events()
        self._state = self._over
        return events

    def _run(self) -> list[Event]:
        while self._state():
            pass
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # States: each reads what it can and says whether another one should go on.

    def _opening(self) -> bool:
        """At the start of a turn whose reasoning, if any, is still to be opened."""
        if self._text.startswith(THINK, self._at):
            self._at += len(THINK)
            # `<think></think>` has no line ends that belong to its tags.
            self._skip_newline, self._state = True, self._just_opened
            return True
        if not self._last and THINK.startswith(self._text[self._at :]):
            return False
        self._state = self._content
        return True

    def _just_opened(self) -> bool:
        if self._text.startswith(ANSWER, self._at):
            self._at += len(ANSWER)
            self._skip_newline, self._state = False, self._content
            return True
        if not self._last and ANSWER.startswith(self._text[self._at :]):
            return False
        self._state = self._thinking
        return True

    def _thinking(self) -> bool:
        text, tag = self._until(self._thinking_tags)
        self._emit(Reasoning, text)
        if tag == ANSWER:
            self._skip_newline, self._state = True, self._content
        elif tag == CALL:
            self._gap = ["\n" * self._dropped_newline + CALL]
            self._state = self._call_in_thought
        elif tag == END:
            self._events.append(Malformed("", UNCLOSED_REASONING))
            self._end_turn()
        return tag is not None

    def _call_in_thought(self) -> bool:
        """Whether the reasoning ends in a call, or speaks of its tag: what follows tells."""
        rest = self._after_blanks()
        if rest.startswith(FUNCTION):
            self._start_call()
            self._raw += self._gap[1:]
            self._answer_due = True
            return True
        if not self._last and FUNCTION.startswith(rest):
            return False
        self._emit(Reasoning, self._reread_newline())
        self._state = self._thinking
        return True

    def _content(self) -> bool:
        text, tag = self._until(_CONTENT_TAGS)
        self._emit(Content, text)
        if tag == CALL:
            self._start_call()
        elif tag == END:
            self._end_turn()
        return tag is not None

    def _after_call(self) -> bool:
        """Blanks after a call are the template's; other text is content again."""
        self._at = BLANK.match(self._text, self._at).end()
        rest = self._text[self._at : self._at + LONGEST]
        if self._answer_due and rest.startswith(ANSWER):
            self._at += len(ANSWER)
            self._answer_due = False
            return True
        if not rest or self._answer_due and not self._last and ANSWER.startswith(rest):
            return False
        self._state = self._content
        return True

    def _function(self) -> bool:
        return self._expect({FUNCTION: self._function_name}, "no <function= follows <tool_call>")

    def _function_name(self) -> bool:
        name = self._read_name("the function's name is not closed")
        if name is None:
            return False
        if name:
            self._name, self._arguments = name, {}
            self._events.append(CallStarted(self._calls - 1, name))
            self._events.append(CallArguments(self._calls - 1, "{"))
            self._state = self._parameters
        return True

    def _parameters(self) -> bool:
        tags = {PARAMETER: self._parameter_name, FUNCTION_END: self._function_end}
        return self._expect(tags, "neither a parameter nor </function> follows")

    def _parameter_name(self) -> bool:
        name = self._read_name("the parameter's name is not closed")
        if name is None:
            return False
        if name:
            self._parameter, self._value = name, []
            self._argument_text(f"{', ' if self._arguments else ''}{json.dumps(name)}: ")
            if self._schemas.is_text(self._name, name):
                self._argument_text('"')
            self._skip_newline, self._state = True, self._in_value
        return True

    def _in_value(self) -> bool:
        text, tag = self._until(_VALUE_TAGS)
        newline = "\n" if tag and self._dropped_newline else ""
        if tag == PARAMETER_END:
            self._add_to_value(text)
            self._gap, self._state = [newline + PARAMETER_END], self._after_value
        else:
            self._add_to_value(text + newline)
        if tag in (CALL_END, END):
            self._leave_call(tag, "a parameter is not closed")
        return tag is not None

    def _after_value(self) -> bool:
        """Whether a closing tag closed the value: only what follows it tells."""
        rest = self._after_blanks()
        if any(rest.startswith(tag) for tag in _AFTER_VALUE) or (self._last and not rest):
            self._raw += self._gap
            self._end_value()
            return True
        if not self._last and any(tag.startswith(rest) for tag in _AFTER_VALUE):
            return False
        self._add_to_value(self._reread_newline())
        self._state = self._in_value
        return True

    def _function_end(self) -> bool:
        return self._expect({}, "no </tool_call> follows </function>")

    def _broken(self) -> bool:
        """In a call that is malformed: up to its end or to another call's start."""
        text, tag = self._until(_BROKEN_THOUGHT_TAGS if self._answer_due else _BROKEN_TAGS)
        self._raw.append(text + ("\n" if tag and self._dropped_newline else ""))
        if tag is not None:
            self._leave_call(tag, self._reason)
            if tag == CALL:
                self._start_call()
        return tag is not None

    def _over(self) -> bool:
        return False

    # Calls.

    def _start_call(self) -> None:
        self._calls += 1
        self._raw, self._value = [CALL], []
        self._state = self._function

    def _expect(self, tags: Mapping[str, Callable[[], bool]], reason: str) -> bool:
        """Blanks, then one of the tags, which leads on to its state; </tool_call> ends the call."""
        end = BLANK.match(self._text, self._at).end()
        self._raw.append(self._text[self._at : end])
        self._at = end
        rest = self._text[end : end + LONGEST]
        for tag in (*tags, CALL_END):
            if rest.startswith(tag):
                self._at += len(tag)
                if tag == CALL_END and self._state == self._function_end:
                    self._end_call()
                elif tag == CALL_END:
                    self._leave_call(tag, reason)
                else:
                    self._raw.append(tag)
                    self._state = tags[tag]
                return True
        if any(tag.startswith(rest) for tag in (*tags, CALL_END)):
            if self._last:  # cut off within a tag, or before one
                self._raw.append(rest)
                self._at = len(self._text)
            return False
        self._reason, self._state = reason, self._broken
        return True

    def _read_name(self, reason: str) -> str | None:
        """A name up to its `>`; None before that has come, empty where it cannot come."""
        match = _NAME_END.search(self._text, self._at)
        if match is None:
            self._raw.append(self._text[self._at :])
            self._value.append(self._text[self._at :])
            self._at = len(self._text)
            return None
        self._value.append(self._text[self._at : match.start()])
        self._raw.append(self._text[self._at : match.start()])
        name, self._value = "".join(self._value), []
        self._at = match.start()
        if match.group() != ">" or not name:
            self._reason, self._state = reason, self._broken
            return ""
        self._raw.append(">")
        self._at += 1
        return name

    def _add_to_value(self, text: str) -> None:
        self._value.append(text)
        self._raw.append(text)
        if text and self._schemas.is_text(self._name, self._parameter):
            self._argument_text(_in_quotes(text))

    def _end_value(self) -> None:
        text = "".join(self._value)
        value = self._schemas.value(self._name, self._parameter, text)
        if self._schemas.is_text(self._name, self._parameter):
            self._argument_text('"')
        else:
            self._argument_text(json.dumps(value))
        self._arguments[self._parameter] = value
        self._value, self._state = [], self._parameters

    def _argument_text(self, text: str) -> None:
        self._events.append(CallArguments(self._calls - 1, text))

    def _end_call(self) -> None:
        self._argument_text("}")
        self._events.append(CallEnded(self._calls - 1, self._name, self._arguments))
        self._state = self._after_call

    def _leave_call(self, tag: str, reason: str) -> None:
        """Out of a malformed call by a tag that ends it."""
        if tag == CALL_END:
            self._raw.append(tag)
        self._fail(reason)
        self._state = self._after_call
        if tag == END:
            self._end_turn()
        elif tag == ANSWER:  # the call's text was reasoning that spoke of calls
            self._skip_newline, self._answer_due, self._state = True, False, self._content

    def _fail(self, reason: str) -> None:
        self._events.append(Malformed("".join(self._raw), reason))

    def _end_turn(self) -> None:
        self._events.append(TurnEnded())
        self._state = self._over

    # Text.

    def _emit(self, kind: type[Reasoning] | type[Content], text: str) -> None:
        if text:
            self._events.append(kind(text))


def _in_quotes(text: str) -> str:
    return json.dumps(text)[1:-1]


_STRICT_THINKING_TAGS = tags_of(ANSWER, END)
_THINKING_TAGS = tags_of(ANSWER, CALL, END)
_CONTENT_TAGS = tags_of(CALL, END)
_VALUE_TAGS = tags_of(PARAMETER_END, CALL_END, END)
_BROKEN_TAGS = tags_of(CALL_END, CALL, END)
_BROKEN_THOUGHT_TAGS = tags_of(CALL_END, CALL, END, ANSWER)
