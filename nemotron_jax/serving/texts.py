"""The text of tokens as clients get it: cut before a stop string, and never shown too early."""

import math
from collections.abc import Sequence
from typing import Any

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.wanted import Wanted

LEAST_LOGPROB = -9999.0  # what JSON is given for minus infinity, as vLLM does


class VisibleText:
    """Tokens of one continuation to text, in any cuts the same.

    Neither the token that ends it nor a stop string is shown. What may be the beginning of a stop
    string waits for what follows.
    """

    def __init__(self, tokenizer: Tokenizer, wanted: Wanted, *, show_special: bool) -> None:
        self._stream = tokenizer.stream(show_special=show_special)
        self._stops, self._ends = wanted.stop_strings, frozenset(wanted.stop_tokens)
        self._held = ""

    def push(self, tokens: Sequence[int], finish_reason: str | None) -> str:
        """The text that became certain; all the rest where `finish_reason` says that it is over."""
        shown, last = [], len(tokens) - 1
        for place, token in enumerate(tokens):
            if place == last and finish_reason == "stop":
                if token in self._ends:
                    break
                # The generator ends at a stop string with the token that completes it.
                self._held = self._before_stop(self._held + self._stream.push(token))
                if self._stops:
                    return "".join(shown) + self._held
                continue
            shown.append(self._released(self._stream.push(token)))
        if finish_reason is not None:
            shown.append(self._held + self._stream.finish())
            self._held = ""
        return "".join(shown)

    def _released(self, text: str) -> str:
        """What can no longer be the beginning of a stop string."""
        self._held += text
        keep = len(self._held)
        for stop in self._stops:
            first = max(0, len(self._held) - len(stop) + 1)
            fits = (at for at in range(first, keep) if stop.startswith(self._held[at:]))
            keep = next(fits, keep)
        shown, self._held = self._held[:keep], self._held[keep:]
        return shown

    def _before_stop(self, text: str) -> str:
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else text


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, bytes]:
    """A token by itself: its text, `bytes:` where it is no text, and its bytes."""
    name = tokenizer.special_names.get(token)
    known = 0 <= token < tokenizer.vocab_size
    piece = name.encode() if name else (tokenizer.token_bytes[token] if known else None) or b""
    try:
        return piece.decode(), piece
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def scored_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """A token with its log-probability in the form of chat completions."""
    text, piece = token_text(tokenizer, token)
    return {"token": text, "logprob": finite(logprob), "bytes": list(piece)}
