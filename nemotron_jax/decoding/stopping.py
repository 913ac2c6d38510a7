"""Stop strings: the text of tokens, watched as they come."""

from collections.abc import Mapping, Sequence

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import FIRST_HALF, LAST_HALF


class StopText:
    """Watches the text of tokens for the first of some strings.

    A string may hold special tokens by their names, as in `</think>`. One that a text holds stands
    between its neighbours, and is found whole or not at all: `<` alone never stops at one.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        names = [name for name in tokenizer.special_tokens if any(name in s for s in strings)]
        names.sort(key=len, reverse=True)
        marks = {
            name: chr(FIRST_HALF + n) for n, name in enumerate(names[: LAST_HALF - FIRST_HALF])
        }
        self._marks = {tokenizer.special_tokens[name]: mark for name, mark in marks.items()}
        self._special = tokenizer.special_names
        self._strings = {*strings, *(_marked(string, marks) for string in strings)}
        self._stream = tokenizer.stream()
        self._longest = max(map(len, strings))
        self._text = ""

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer | None) -> "StopText | None":
        """What watches a request that may have tokens already; None where it has no strings."""
        if not request.wanted.stop_strings:
            return None
        watch = cls(tokenizer, request.wanted.stop_strings)
        for token in request.tokens:
            watch.push(token)
        return watch

    def push(self, token: int) -> bool:
        """Whether the text holds one of the strings now."""
        self._text += self._stream.push(token)
        if token in self._special:
            self._text += self._marks.get(token, chr(LAST_HALF))
        found = any(string in self._text for string in self._strings)
        self._text = self._text[-self._longest :]
        return found


def _marked(string: str, marks: Mapping[str, str]) -> str:
    """The string with special tokens as they stand in a watched text."""
    for name, mark in marks.items():
        string = string.replace(name, mark)
    return string
