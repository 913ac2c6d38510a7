"""Continuations held to a JSON schema, a regular expression or calls of tools, by llguidance."""

import contextlib
import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nemotron_jax.data.chat.render import ANSWER, CALL, CALL_END
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.serving import formats
from nemotron_jax.serving.call_grammars import TEXT_OR_CALLS, calls_grammar
from nemotron_jax.serving.fields import Fields, characters
from nemotron_jax.serving.patterns import check_pattern, check_patterns, without_idle_rules
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.trials import Trials

# Of a schema or an expression as text. A grammar is compiled within llguidance's own limits too.
MOST_CHARACTERS = 100_000
# Of the grammars that are kept compiled: their number, and what one may be. Their memory goes with
# the time that they took: 16 of these hold some tens of megabytes at most.
_MOST_KEPT, _KEPT_CHARACTERS, _KEPT_CPU_S = 16, 10_000, 0.01
# Blanks between JSON's parts could go on for ever: a model would be cut off in them.
_COMPACT = {"whitespace_flexible": False}


class TextGrammar:
    """Lets only texts of a grammar be written, and then a stop token.

    Until `opening` has been given all ordinary text may come: the reasoning is free. A call opens
    the grammar too where `call` is its token, and is the grammar's first. Of special tokens only
    these and those of calls ever come, and a stop token at an end alone; their names are text.
    """

    def __init__(
        self,
        matcher: Any,
        tokens: "_Bits",
        *,
        opening: int | None,
        call: int | None = None,
    ) -> None:
        self._matcher, self._tokens = matcher, tokens
        self._opening, self._call = opening, call

    def mask(self) -> np.ndarray:
        """What may come next, as `decoding.wanted.Grammar` says."""
        if self._opening is not None:
            free = self._tokens.text.copy()
            for token in {self._opening, self._call} - {None}:
                free[token // 32] |= np.uint32(1 << token % 32)
            return free
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise RuntimeError(self._matcher.get_error().partition("<state>")[0])
        found = np.zeros_like(self._tokens.text)
        found[: len(words)] = words[: len(found)]
        found &= self._tokens.text | self._tokens.tags
        return found | self._tokens.stops if self._matcher.is_accepting() else found

    def accept(self, token: int) -> bool:
        """Take the next token; False where the grammar is over."""
        if self._opening is not None:
            opens = token in (self._opening, self._call)
            self._opening = None if opens else self._opening
            if token != self._call:
                return True
        if self._matcher.consume_token(token):
            return True
        # What was allowed is taken but for a grammar beyond its limits: no end of a text.
        raise RuntimeError(self._matcher.get_error().partition("<state>")[0])


@dataclasses.dataclass(frozen=True)
class Format:
    """What a request's continuations are held to, compiled: `grammar()` follows one of them."""

    grammar: Callable[[], TextGrammar]


def prepare(tokenizer: Tokenizer) -> None:
    """Make what grammars over a tokenizer need before the first one comes; nothing without
    llguidance."""
    with contextlib.suppress(ImportError):
        _language_of(tokenizer).trials.of("start: /a/")


def format_of(
    fields: Fields, tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...], *, thinking: bool
) -> Format | None:
    """What `response_format` asks for; None where any text will do."""
    part = fields.part("response_format")
    kind = part.get("type")
    if kind in (None, "text"):
        return None
    make, param = _library("response_format.type").LLMatcher, "response_format"
    try:
        if kind == "regex":
            pattern = _bounded(part.text("regex"), param)
            check_pattern(pattern)
            source = make.grammar_from_regex(pattern)
        else:
            text = _bounded(json.dumps(_schema_of(part)), param)
            source = make.grammar_from_json_schema(text, overrides=_COMPACT)
    except ValueError as error:
        raise _wrong(str(error), param) from None
    matcher, tokens = _compiled(source, tokenizer, param), _bits_of(tokenizer, vocabulary, stops)
    answer = tokenizer.token_id(ANSWER) if thinking else None
    return Format(lambda: TextGrammar(matcher.deep_copy(), tokens, opening=answer))


def calls_of_tools(
    fields: Fields,
    tokenizer: Tokenizer,
    vocabulary: int,
    stops: tuple[int, ...],
    tools: Sequence[Mapping[str, Any]],
    *,
    single: bool,
    required: bool,
    thinking: bool,
    budgeted: bool,
) -> Format:
    """Calls of the tools by their schemas, one at most if `single`.

    One has to come where it is `required`; else any text may, or what `response_format` asks for.
    A call may end the reasoning, but not one that is `budgeted`: its end would come within the
    call.
    """
    library = _library("tools")
    part, answer, rules = fields.part("response_format"), TEXT_OR_CALLS, ""
    if part.get("type") == "regex":
        raise part.refuse("type", "cannot be kept together with tools; use json_schema")
    _check_size(tools, "tools", without=("description",))
    try:
        if part.get("type") not in (None, "text"):
            schema = _schema_of(part) | {"x-guidance": _COMPACT}
            # A line end follows the reasoning in what models write: it must not mean a call.
            answer = "NL? answer" if thinking else "answer"
            rules = f"\nanswer: %json {json.dumps(schema)}"
        text = calls_grammar(tools, parallel=not single, answer=None if required else answer)
    except ValueError as error:
        named = str(error).startswith("tools[")
        param = str(error).partition(":")[0] if named else "response_format"
        raise Refusal(str(error)[:300], param) from None
    source = library.LLMatcher.grammar_from_lark(_bounded(text + rules, "tools"))
    matcher, tokens = _compiled(source, tokenizer, "tools"), _bits_of(tokenizer, vocabulary, stops)
    opening = tokenizer.token_id(ANSWER) if thinking else None
    call = tokenizer.token_id(CALL) if not budgeted else None
    return Format(lambda: TextGrammar(matcher.deep_copy(), tokens, opening=opening, call=call))


def _schema_of(part: Fields) -> dict[str, Any]:
    """The schema that a format names."""
    if part.get("type") == "json_object":
        return {"type": "object"}
    if part.get("type") != "json_schema":
        raise part.refuse("type", "must be text, json_object, json_schema or regex")
    schema = part.part("json_schema").get("schema")
    schema = part.get("schema") if schema is None else schema
    if not isinstance(schema, dict):
        raise Refusal(
            "response_format.json_schema.schema: must be a JSON schema",
            "response_format.json_schema.schema",
        )
    _check_size(schema, "response_format")
    check_patterns(schema)
    return without_idle_rules(schema)


def asks_for_grammar(fields: Fields) -> bool:
    """Whether a body's fields may need a grammar, as far as a glance tells."""
    tools = fields.get("tools") if isinstance(fields.get("tools"), list) else []
    parts = [part for tool in tools if isinstance(tool, dict) for part in (tool, *tool.values())]
    strict = any(isinstance(part, dict) and part.get("strict") for part in parts)
    named = fields.get("tool_choice") not in (None, "auto", "none")
    formed = any(fields.get(name) for name in ("response_format", "text", *formats.NAMES))
    return bool(formed or strict or named)


def _compiled(source: str, tokenizer: Tokenizer, param: str) -> Any:
    """What follows the grammar from its beginning; for copies. It is tried in another process
    first, so that it takes little here."""
    language = _language_of(tokenizer)
    trial = language.trials.of(source)
    if trial.error:
        raise _wrong(trial.error.partition("<state>")[0], param)
    small = len(source) <= _KEPT_CHARACTERS and trial.cpu_s <= _KEPT_CPU_S
    return (_matcher if small else _matcher.__wrapped__)(source, language)


@functools.lru_cache(maxsize=_MOST_KEPT)
def _matcher(source: str, language: "_Language") -> Any:
    return importlib.import_module("llguidance").LLMatcher(language.library, source, log_level=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Language:
    """A tokenizer as llguidance sees it, and what tries grammars for it."""

    library: Any
    trials: Trials


@functools.lru_cache(maxsize=4)
def _language_of(tokenizer: Tokenizer) -> _Language:
    library, view = importlib.import_module("llguidance"), _View(tokenizer)
    tokens = library.LLTokenizer(library.TokenizerWrapper(view))
    return _Language(tokens, Trials(view.tokens, view.special_token_ids, view.eos_token_id))


@dataclasses.dataclass(frozen=True)
class _Bits:
    """Bits of tokens: those of text, those of calls, and those that stop."""

    text: np.ndarray
    tags: np.ndarray
    stops: np.ndarray


@functools.lru_cache(maxsize=64)
def _bits_of(tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]) -> _Bits:
    ends = _bits(stops, vocabulary)
    tags = _bits([tokenizer.token_id(name) for name in (CALL, CALL_END)], vocabulary)
    # A token that stops never comes within a text: it would be cut off there.
    return _Bits(_text_bits(tokenizer, vocabulary) & ~ends, tags, ends)


@functools.lru_cache(maxsize=4)
def _text_bits(tokenizer: Tokenizer, vocabulary: int) -> np.ndarray:
    pieces = enumerate(tokenizer.token_bytes)
    return _bits([number for number, piece in pieces if piece], vocabulary)


class _View:
    """A tokenizer as llguidance asks for one. It gives a definition's special tokens for texts that
    spell their names, which no text is here: so it is shown ours."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos, None
        special = tokenizer.special_names
        pieces = enumerate(tokenizer.token_bytes)
        self.tokens = [piece or special.get(number, "").encode() for number, piece in pieces]
        self.special_token_ids = list(special)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The ids of a text; TypeError for bytes, which it then is not given."""
        return self._tokenizer.encode(text)


def _bits(tokens: Sequence[int], vocabulary: int) -> np.ndarray:
    flags = np.zeros(-(-vocabulary // 32) * 32, bool)
    flags[[token for token in tokens if token < vocabulary]] = True
    return np.packbits(flags, bitorder="little").view(np.uint32)


def _library(param: str) -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise Refusal(
            f"{param}: this server has no llguidance, which holds answers to a format; use text, "
            "and tool_choice=auto without strict tools",
            param,
        ) from None


def _check_size(value: Any, param: str, without: Sequence[str] = ()) -> None:
    """Raise Refusal for a schema that is too long, before anything goes through it."""
    if (size := characters(value, without)) > MOST_CHARACTERS:
        raise _wrong(f"it has {size} characters; write at most {MOST_CHARACTERS}", param)


def _bounded(text: str, param: str) -> str:
    if not text or len(text) > MOST_CHARACTERS:
        raise _wrong(f"it has {len(text)} characters; write 1 to {MOST_CHARACTERS}", param)
    return text


def _wrong(reason: str, param: str) -> Refusal:
    line = " ".join(reason.split())[:300]
    return Refusal(f"{param}: no grammar can be made of it: {line}", param)
