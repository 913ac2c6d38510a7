"""Continuations held to a JSON schema or a regular expression, by llguidance."""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nemotron_jax.data.chat.render import ANSWER
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal

# Of a schema or an expression as text. A grammar is compiled within llguidance's own limits too.
MOST_CHARACTERS = 100_000
# Blanks between JSON's parts could go on for ever: a model would be cut off in them.
_COMPACT = {"whitespace_flexible": False}


class TextGrammar:
    """Lets only texts of a grammar be written, and then a stop token.

    Until `opens_after` has been given all ordinary text may come: the reasoning is free. Special
    tokens but the stop tokens and that one never come, as their names are no text.
    """

    def __init__(
        self, matcher: Any, text: np.ndarray, stops: np.ndarray, opens_after: int | None
    ) -> None:
        self._matcher, self._text, self._stops = matcher, text, stops
        self._opens_after = opens_after

    def mask(self) -> np.ndarray:
        """What may come next, as `decoding.wanted.Grammar` says."""
        if self._opens_after is not None:
            free = self._text.copy()
            free[self._opens_after // 32] |= np.uint32(1 << self._opens_after % 32)
            return free
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        found = np.zeros_like(self._text)
        found[: len(words)] = words[: len(found)]
        found &= self._text
        return found | self._stops if self._matcher.is_accepting() else found

    def accept(self, token: int) -> bool:
        """Take the next token; False where the grammar is over or broken."""
        if self._opens_after is not None:
            self._opens_after = None if token == self._opens_after else self._opens_after
            return True
        return self._matcher.consume_token(token) and not self._matcher.is_error()


@dataclasses.dataclass(frozen=True)
class Format:
    """A format that a request asks for, compiled: `grammar()` follows one continuation."""

    grammar: Callable[[], TextGrammar]


def format_of(
    fields: Fields, tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...], *, thinking: bool
) -> Format | None:
    """What `response_format` asks for; None where any text will do."""
    part = fields.part("response_format")
    kind = part.get("type")
    if kind in (None, "text"):
        return None
    library = _library(part)
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        schema = part.part("json_schema").get("schema")
        schema = part.get("schema") if schema is None else schema
        if not isinstance(schema, dict):
            raise Refusal(
                "response_format.json_schema.schema: must be a JSON schema",
                "response_format.json_schema.schema",
            )
    elif kind == "regex":
        source = library.LLMatcher.grammar_from_regex(_bounded(part.text("regex")))
        return _compiled(source, tokenizer, vocabulary, stops, thinking=thinking)
    else:
        raise part.refuse("type", "must be text, json_object, json_schema or regex")
    text = _bounded(json.dumps(schema))
    try:
        source = library.LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)
    except ValueError as error:
        raise _wrong(str(error)) from None
    return _compiled(source, tokenizer, vocabulary, stops, thinking=thinking)


def _compiled(
    source: str, tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...], *, thinking: bool
) -> Format:
    library = importlib.import_module("llguidance")
    tokens, text, ends = _tokens_of(tokenizer, vocabulary, stops)
    first = library.LLMatcher(tokens, source, log_level=0)
    if first.is_error():
        raise _wrong(first.get_error())
    answer = tokenizer.token_id(ANSWER) if thinking else None
    return Format(lambda: TextGrammar(first.deep_copy(), text, ends, answer))


@functools.lru_cache(maxsize=4)
def _tokens_of(
    tokenizer: Tokenizer, vocabulary: int, stops: tuple[int, ...]
) -> tuple[Any, np.ndarray, np.ndarray]:
    """llguidance's view of a tokenizer, in which the stop tokens end a text, with which tokens are
    text and which end one."""
    library = importlib.import_module("llguidance")
    view = library.TokenizerWrapper(_View(tokenizer))
    tokens = library.LLTokenizer(view, eos_token=list(stops))
    text = [number for number, piece in enumerate(tokenizer.token_bytes) if piece]
    return tokens, _bits(text, vocabulary), _bits(stops, vocabulary)


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


def _library(part: Fields) -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise part.refuse(
            "type", "this server has no llguidance, which holds answers to a format; use text"
        ) from None


def _bounded(text: str) -> str:
    if not text or len(text) > MOST_CHARACTERS:
        raise _wrong(f"it has {len(text)} characters; write 1 to {MOST_CHARACTERS}")
    return text


def _wrong(reason: str) -> Refusal:
    line = " ".join(reason.split())[:300]
    return Refusal(f"response_format: no grammar can be made of it: {line}", "response_format")
