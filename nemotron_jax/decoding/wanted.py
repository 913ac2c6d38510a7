"""What may be asked of a continuation, checked before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from nemotron_jax.config.checks import check_value, is_finite, is_integer
from nemotron_jax.decoding.sampling import checked_sampling

# Widths of the tables that a program is told; more would compile another one. 300 biases and 20
# log-probabilities a token are what OpenAI's interface allows.
MOST_STOP_TOKENS, MOST_BIASES, MOST_TOP = 16, 300, 20
MOST_NEW_TOKENS = 2**24  # 16 times the context that the family was trained for
LOGPROBS = ("model", "drawn")
_SEEDS = 2**32  # a seed is one word of a key
# Halves of surrogate pairs, which stand for special tokens: decoded text holds none.
FIRST_HALF, LAST_HALF = 0xD800, 0xDFFF


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many tokens a reasoning may have, after which `closing_token` is put in place of the
    next one; 0 closes it at once. It counts the continuation's tokens from its start."""

    tokens: int
    closing_token: int

    def __post_init__(self) -> None:
        for name in ("tokens", "closing_token"):
            value = getattr(self, name)
            ok = is_integer(value) and 0 <= value < 2**31
            check_value("Budget", name, value, ok, f"must be an integer from 0 to {2**31 - 1}")
            object.__setattr__(self, name, int(value))


@runtime_checkable
class Grammar(Protocol):
    """What may come next in one continuation; asked between rounds, by the thread that steps."""

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: bit t of word w says that token 32 w + t may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Take the next token; False where the grammar is over or broken."""
        ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """How a prompt is to be continued. Raises ValueError for values out of range.

    `temperature` 0 is greedy. `logprobs`: of the `model`, from its untempered logits, or of what is
    `drawn` from, with temperature, filters, biases and grammar. `top_logprobs`: of so many
    likeliest tokens too, of the model. `min_tokens`: no stop token comes before. `logit_bias` adds
    to the logits of tokens by id. `budget` bounds the reasoning. `grammar` says what may come next;
    such a request takes no drafts, and its tokens come one at a time. Stop tokens, and the token
    that completes a stop string, are the last of the continuation.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_tokens: Sequence[int] | int = ()
    stop_strings: Sequence[str] | str = ()
    min_tokens: int = 0
    logprobs: str = "model"
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    budget: Budget | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        most = {"max_new_tokens": MOST_NEW_TOKENS, "seed": _SEEDS - 1, "top_logprobs": MOST_TOP}
        for name in ("max_new_tokens", "seed", "min_tokens", "top_logprobs"):
            value, least = getattr(self, name), int(name == "max_new_tokens")
            ok = is_integer(value) and least <= value <= most.get(name, 2**31 - 1)
            rule = f"must be an integer from {least} to {most.get(name, 2**31 - 1)}"
            check_value("Wanted", name, value, ok, rule)
            self._set(name, int(value))  # one of numpy may overflow in a sum
        self._check_sampling()
        check_value(
            "Wanted", "logprobs", self.logprobs, self.logprobs in LOGPROBS, "must be model or drawn"
        )
        self._set("stop_tokens", _token_ids(self.stop_tokens))
        self._check_strings()
        self._check_bias()
        ok = self.budget is None or isinstance(self.budget, Budget)
        check_value("Wanted", "budget", self.budget, ok, "must be a Budget, or None")
        ok = self.grammar is None or isinstance(self.grammar, Grammar)
        check_value("Wanted", "grammar", self.grammar, ok, "must have mask() and accept(token)")

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise ValueError where a token is named that a model of so many does not have."""
        named = {"stop_tokens": self.stop_tokens, "logit_bias": tuple(self.logit_bias)}
        named["budget"] = () if self.budget is None else (self.budget.closing_token,)
        for name, tokens in named.items():
            rule = f"names a token outside the model's vocabulary of {vocabulary}"
            ok = all(token < vocabulary for token in tokens)
            check_value("Wanted", name, getattr(self, name), ok, rule)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_sampling(self) -> None:
        names = ("temperature", "top_k", "top_p", "min_p")
        given = [getattr(self, name) for name in names]
        for name, value in zip(names, given, strict=True):
            rule = "must be one value; give requests that differ one by one"
            check_value("Wanted", name, value, np.ndim(value) == 0, rule)
        for name, value in zip(names, checked_sampling(*given), strict=True):
            self._set(name, value.item())  # as the device takes it

    def _check_strings(self) -> None:
        strings = self.stop_strings
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        texts = all(isinstance(text, str) and text for text in strings)
        check_value("Wanted", "stop_strings", strings, texts, "must be texts that are not empty")
        whole = not any(FIRST_HALF <= ord(c) <= LAST_HALF for c in "".join(strings))
        rule = "holds half of a surrogate pair, which no text of tokens does; give whole characters"
        check_value("Wanted", "stop_strings", strings, whole, rule)
        self._set("stop_strings", strings)

    def _check_bias(self) -> None:
        bias = dict(self.logit_bias)
        ok = all(is_integer(t) and t >= 0 and is_finite(by) for t, by in bias.items())
        rule = f"must give at most {MOST_BIASES} token ids a finite number each"
        check_value("Wanted", "logit_bias", bias, ok and len(bias) <= MOST_BIASES, rule)
        self._set("logit_bias", {int(token): float(by) for token, by in bias.items()})


def _token_ids(stop_tokens: Sequence[int] | int) -> tuple[int, ...]:
    stops = np.atleast_1d(np.asarray(stop_tokens)).tolist()
    ok = all(is_integer(token) and token >= 0 for token in stops) and len(stops) <= MOST_STOP_TOKENS
    rule = f"must be at most {MOST_STOP_TOKENS} token ids, as in (2, 11); () never stops"
    check_value("Wanted", "stop_tokens", stop_tokens, ok, rule)
    return tuple(stops)
