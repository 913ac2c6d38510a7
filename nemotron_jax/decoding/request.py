"""A request: a prompt, what is wanted of its continuation, and what came of it so far."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nemotron_jax.decoding.wanted import Wanted


class Request:
    """One continuation, which grows while the engine steps.

    Iterating gives its tokens as they come, and steps the generator while there is none.
    `finish_reason` is None until it is over, then "stop" (a stop token or string, which are the
    last of `tokens`, or the end of a grammar), "length" or "cancelled".
    """

    def __init__(
        self, prompt: tuple[int, ...], wanted: Wanted, branch: int, step: Callable[[], bool]
    ) -> None:
        self.prompt = prompt
        self.wanted = wanted
        self.branch = branch  # which of the prompt's samples it is, from 0
        self.tokens: list[int] = []
        self.logprobs: list[float] = []  # as `wanted.logprobs` says, float32
        self.forced: list[bool] = []  # put there by the budget; its log-probability is the model's
        # By token its `wanted.top_logprobs` likeliest tokens and their log-probabilities.
        self.top_logprobs: list[tuple[tuple[int, float], ...]] = []
        self.versions: list[int | str] = []  # of the weights that gave each token
        # Of each prompt token after those before it; the first has none, so one fewer than tokens.
        self.prompt_logprobs: list[float] | None = [] if wanted.prompt_logprobs else None
        # The likeliest token at each of these places, and its log-probability.
        self.prompt_likeliest: list[tuple[int, float]] = []
        self.cached_tokens = 0  # of the prompt, that were not read again
        self.places: list[int] = []  # of each token, as `speculative.place_of` says; -1: of none
        self.finish_reason: str | None = None
        self.allowed: np.ndarray | None = None  # the grammar's mask of the next token
        self.error = ""  # why its grammar could not be asked, if it ended for that
        self._cancelled = False
        self._heard = 0  # tokens that the grammar has taken
        self._step = step

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None

    @property
    def accepted_drafts(self) -> int:
        """How many of the tokens were drafted."""
        return sum(place > 0 and place % 2 == 1 for place in self.places)

    @property
    def verifications(self) -> int:
        """Rounds of drafts that gave it a token."""
        return sum(place in (0, 1) for place in self.places)

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called before it was over."""
        return self._cancelled

    def cancel(self) -> None:
        """End the request at the generator's next step; what it gave so far stays."""
        if not self.done:
            self._cancelled = True

    def wait(self) -> "Request":
        """Itself, once it is over; steps the generator until then."""
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

    def ask_grammar(self, vocabulary: int) -> bool:
        """Tell the grammar the tokens that it has not heard and ask what may come next; whether
        anything may. One that fails ends the request, and `error` says why."""
        grammar, words = self.wanted.grammar, -(-vocabulary // 32)
        try:
            while self._heard < len(self.tokens):
                self._heard += 1
                if not grammar.accept(self.tokens[self._heard - 1]):
                    return False
            mask = np.asarray(grammar.mask())
            if mask.shape != (words,) or mask.dtype != np.uint32:
                raise ValueError(
                    f"its mask is {mask.dtype} {list(mask.shape)} and must be uint32 [{words}]"
                )
        except Exception as error:  # a grammar is the caller's, and others are served beside it
            self.error = f"grammar: {error!r}"
            return False
        self.allowed = mask
        return bool(mask.any())

    def _advance(self) -> None:
        if not self._step() and not self.done:
            raise RuntimeError(
                f"{self!r}: its generator serves it no more, so no token will come; submit it again"
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
            "submit: the prompt must be a row of at least one integer token, not "
            f"{str(prompt_tokens)[:60]}"
        )
    outside = prompt[(prompt < 0) | (prompt >= vocabulary)]
    if outside.size:
        raise ValueError(
            f"submit: the prompt holds token {int(outside[0])}, outside the model's "
            f"vocabulary of {vocabulary}; was it encoded with this model's tokenizer?"
        )
    return tuple(prompt.tolist())
