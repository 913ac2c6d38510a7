"""A request to the engine: what was asked, checked, and what came of it so far."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

import numpy as np

from nemotron_jax.config.checks import is_integer
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.sampling import checked_sampling

MOST_STOP_TOKENS = 16  # the width of the engine's table; more would compile another program
_SEEDS = 2**32
# Halves of surrogate pairs, which stand for special tokens: decoded text holds none.
_FIRST_HALF, _LAST_HALF = 0xD800, 0xDFFF


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a request is to be continued. Raises ValueError for values out of range."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, lowest, end in (("max_new_tokens", 1, 2**31), ("seed", 0, _SEEDS)):
            value = getattr(self, name)
            if not is_integer(value) or not lowest <= value < end:
                raise ValueError(
                    f"Engine.submit: {name}={value!r} must be an integer from {lowest} to {end - 1}"
                )
            object.__setattr__(self, name, int(value))  # one of numpy may overflow in a sum
        if any(np.ndim(v) for v in (self.temperature, self.top_k, self.top_p)):
            raise ValueError(
                "Engine.submit: temperature, top_k and top_p are one value each; submit requests "
                "that differ one by one"
            )
        values = checked_sampling(self.temperature, self.top_k, self.top_p)
        for name, value in zip(("temperature", "top_k", "top_p"), values, strict=True):
            object.__setattr__(self, name, value.item())  # as the device takes it
        if not all(isinstance(text, str) and text for text in self.stop_strings):
            raise ValueError(
                f"Engine.submit: stop_strings={self.stop_strings!r} must be texts that are not "
                "empty"
            )
        if any(map(_is_half, "".join(self.stop_strings))):
            raise ValueError(
                f"Engine.submit: stop_strings={self.stop_strings!r} hold half of a surrogate pair, "
                "which no text of tokens does; give whole characters"
            )


class Request:
    """One continuation, which grows while the engine steps.

    Iterating gives its tokens as they come, and steps the engine while there is none; so does
    `async for`, which lets other tasks run between steps. `finish_reason` is None until it is over,
    then "stop" (a stop token or string, which are the last of `tokens`), "length" or "cancelled".
    """

    def __init__(
        self, prompt: tuple[int, ...], wanted: Wanted, branch: int, step: Callable[[], bool]
    ) -> None:
        self.prompt = prompt
        self.wanted = wanted
        self.branch = branch  # which of the prompt's samples it is, from 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # float32 log-softmax of the untempered logits
        self.versions: list[int | str] = []  # of the weights that gave each token
        # Of each prompt token after those before it; the first has none, so one fewer than tokens.
        self.prompt_logprobs: list[float] | None = [] if wanted.prompt_logprobs else None
        self.finish_reason: str | None = None
        self._cancelled = False
        self._step = step

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called before it was over."""
        return self._cancelled

    def cancel(self) -> None:
        """End the request at the engine's next step; what it gave so far stays."""
        if not self.done:
            self._cancelled = True

    def wait(self) -> "Request":
        """Itself, once it is over; steps the engine until then."""
        for _ in self:
            pass
        return self

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            yield from self.tokens[given:]
            given = len(self.tokens)
            if self.done:
                return
            self._advance()

    async def __aiter__(self) -> AsyncIterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if self.done:
                return
            await asyncio.sleep(0)  # whoever else waits may have stepped the engine meanwhile
            if given == len(self.tokens) and not self.done:
                self._advance()

    def _advance(self) -> None:
        if not self._step() and not self.done:
            raise RuntimeError(
                f"{self!r}: its engine serves it no more, and no token will come; submit it again"
            )

    def __repr__(self) -> str:
        return (
            f"Request({len(self.prompt)} prompt tokens, {len(self.tokens)} of "
            f"{self.wanted.max_new_tokens} new ones, finish_reason={self.finish_reason!r})"
        )


def checked_prompt(prompt_tokens: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """The prompt as a tuple. Raises ValueError for an empty one or what is no token of the
    model."""
    try:
        prompt = np.asarray(prompt_tokens)
    except ValueError:  # rows of several lengths
        prompt = np.zeros(0)
    if prompt.ndim != 1 or not prompt.size or prompt.dtype.kind not in "iu":
        raise ValueError(
            "Engine.submit: the prompt must be a row of at least one integer token, not "
            f"{str(prompt_tokens)[:60]}"
        )
    outside = prompt[(prompt < 0) | (prompt >= vocabulary)]
    if outside.size:
        raise ValueError(
            f"Engine.submit: the prompt holds token {int(outside[0])}, outside the model's "
            f"vocabulary of {vocabulary}; was it encoded with this model's tokenizer?"
        )
    return tuple(prompt.tolist())


def checked_stops(stop_tokens: Sequence[int] | int, vocabulary: int) -> tuple[int, ...]:
    """The stop tokens as a tuple. Raises ValueError for too many, or what is no token of the
    model."""
    stops = np.atleast_1d(np.asarray(stop_tokens)).tolist()
    valid = all(is_integer(token) and 0 <= token < vocabulary for token in stops)
    if not valid or len(stops) > MOST_STOP_TOKENS:
        raise ValueError(
            f"Engine.submit: stop_tokens={stop_tokens!r} must be at most {MOST_STOP_TOKENS} tokens "
            f"of the model's vocabulary of {vocabulary}; () never stops"
        )
    return tuple(stops)


class StopText:
    """Watches the text of tokens for the first of some strings.

    A string may hold special tokens by their names, as in `</think>`. One that a text holds stands
    between its neighbours, and is found whole or not at all: `<` alone never stops at one.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        names = [name for name in tokenizer.special_tokens if any(name in s for s in strings)]
        names.sort(key=len, reverse=True)
        marks = {
            name: chr(_FIRST_HALF + n) for n, name in enumerate(names[: _LAST_HALF - _FIRST_HALF])
        }
        self._marks = {tokenizer.special_tokens[name]: mark for name, mark in marks.items()}
        self._special = tokenizer.special_names
        self._strings = {*strings, *(_marked(string, marks) for string in strings)}
        self._stream = tokenizer.stream()
        self._longest = max(map(len, strings))
        self._text = ""

    def push(self, token: int) -> bool:
        """Whether the text holds one of the strings now."""
        self._text += self._stream.push(token)
        if token in self._special:
            self._text += self._marks.get(token, chr(_LAST_HALF))
        found = any(string in self._text for string in self._strings)
        self._text = self._text[-self._longest :]
        return found


def _marked(string: str, marks: Mapping[str, str]) -> str:
    """The string with special tokens as they stand in a watched text."""
    for name, mark in marks.items():
        string = string.replace(name, mark)
    return string


def _is_half(character: str) -> bool:
    return _FIRST_HALF <= ord(character) <= _LAST_HALF
