"""A device of the engine's made of dictionaries: what it gives hangs on every token that it holds.

Keys and values, recurrent states and hidden states are the very tokens that they are of, so that a
wrong page, state or length gives a wrong token; a program that is cut off takes its store with it.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.speculative import place_of
from nemotron_jax.decoding.store import Scores

VOCABULARY = 53


def expected(
    request: Request, speculative: int, version: int | str = "old"
) -> tuple[list[int], list[float], str]:
    """What a request is to be given where nothing runs beside it: tokens, logprobs, reason."""
    wanted, text, tokens = request.wanted, list(request.prompt), []
    while True:
        tokens += drawn(text, request, speculative if tokens else 0, version)
        text = [*request.prompt, *tokens]
        for count, token in enumerate(tokens, 1):
            if token in wanted.stop_tokens or count == wanted.max_new_tokens:
                reason = "stop" if token in wanted.stop_tokens else "length"
                logprobs = [logprob(text[: len(request.prompt) + n]) for n in range(count)]
                return tokens[:count], logprobs, reason


def drawn(text: Sequence[int], request: Request, drafts: int, version: int | str) -> list[int]:
    """The tokens of a round that starts after a text: they hang on where it starts."""
    wanted = request.wanted
    seed = (tuple(text), wanted.seed, request.branch, wanted.temperature, version)
    draw = random.Random(hashlib.blake2b(repr(seed).encode()).digest())
    return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, drafts + 1))]


def logprob(text: Sequence[int]) -> float:
    """Of the token after a text."""
    return -float(int.from_bytes(hashlib.blake2b(repr(tuple(text)).encode()).digest()[:2]))


class FakeRunner:
    """Does what `Runner` does, without programs. `fault` is called with each program's name before
    and after it has its store, and may raise."""

    def __init__(self, model, config, execution, version) -> None:
        self._page, self.speculative = config.page_tokens, config.most_drafts
        self._rounds, self.fault = config.rounds, lambda *_: None
        self.vocabulary = VOCABULARY
        self.put_model(model, version)
        self.renew()

    def prepared(self, model):
        return model

    def put_model(self, model, version) -> None:
        self.model, self.version = model, version

    def renew(self) -> None:
        self._store = SimpleNamespace(pages={}, slots={}, snapshots={})

    def _program(self, name: str, work: Callable) -> object:
        self.fault(name, "before")
        store, self._store = self._store, None  # donated
        assert store is not None, "the store was lost"
        given = work(store)
        self.fault(name, "inside")
        self._store = store
        self.fault(name, "after")
        return given

    def prefill(self, slots, shape) -> tuple[np.ndarray, np.ndarray]:
        rows, chunk = shape
        lengths = np.zeros(rows, np.int32)

        def work(store) -> None:
            for row, slot in enumerate(slots):
                piece = slot.prompt[slot.length : slot.length + chunk]
                state = self._state(store, slot) if slot.length else ()
                for token in piece:
                    state = self._feed(store, slot, state, token)
                store.slots[slot.number], lengths[row] = state, len(piece)

        self._program("prefill", work)
        self._read = [(slot.prompt, slot.length) for slot in slots]
        return lengths, np.zeros((*shape, 1))

    def score(self, hidden, targets) -> Scores:
        found = np.zeros(targets.shape)
        for row, (prompt, start) in enumerate(self._read):
            for n in range(min(targets.shape[1], len(prompt) - start)):
                found[row, n] = logprob(prompt[: start + n + 1])
        return Scores(found, np.zeros(targets.shape, int), found)

    def save(self, slot, entry) -> None:
        self._program("save", lambda s: s.snapshots.update({entry.snapshot: s.slots[slot.number]}))

    def load(self, entry, slot, shared) -> None:
        def work(store) -> None:
            if len(entry.pages) > shared:
                copied = dict(store.pages.get(entry.pages[shared], {}))
                store.pages[slot.pages[shared]] = copied
            store.slots[slot.number] = store.snapshots[entry.snapshot]

        self._program("load", work)

    def rows_for(self, slots: int) -> int:
        return slots

    def decode(self, slots, rounds, drafts) -> tuple[SimpleNamespace, list[int]]:
        assert drafts == self.speculative
        size = (len(slots), 1 + self._rounds * (self.speculative + 1))
        given = SimpleNamespace(
            given=SimpleNamespace(
                tokens=np.zeros(size, int),
                logprobs=np.zeros(size),
                places=np.full(size, -1, np.int8),
                forced=np.zeros(size, bool),
            ),
            count=np.zeros(len(slots), int),
            done=np.zeros(len(slots), bool),
            length=np.zeros(len(slots), int),
        )
        work = lambda store: [
            self._row(store, slot, rounds, given, row) for row, slot in enumerate(slots)
        ]
        self._program("decode", work)
        return given, list(range(len(slots)))

    def _row(self, store, slot, rounds, given, row) -> None:
        request = slot.job.request
        state, new = self._state(store, slot), []
        left = request.wanted.max_new_tokens - len(request.tokens)
        newest = request.tokens[-1:]
        for number in range(rounds + (not newest)):
            if given.done[row]:
                break
            first = not number and not newest
            text = (*state, *newest)
            found = drawn(text, request, 0 if first else self.speculative, self.version)
            for token in newest:
                state = self._feed(store, slot, state, token)
            for place, token in enumerate(found):
                own = place_of(np.array([place]), np.array([len(found) - 1]))[0]
                given.given.places[row, len(new)] = -1 if first else own
                given.given.logprobs[row, len(new)] = logprob(text)
                text, newest = (*text, token), [token]
                new.append(token)
                if token in request.wanted.stop_tokens or len(new) == left:
                    given.done[row] = True
                    break
                if place + 1 < len(found):
                    state = self._feed(store, slot, state, token)
        given.given.tokens[row, : len(new)], given.count[row] = new, len(new)
        given.length[row], store.slots[slot.number] = len(state), state

    def _feed(self, store, slot, state: tuple, token: int) -> tuple:
        at = len(state)
        store.pages.setdefault(slot.pages[at // self._page], {})[at % self._page] = (at, token)
        return (*state, token)

    def _state(self, store, slot) -> tuple:
        """The slot's text, where states and pages agree on it."""
        state = store.slots[slot.number]
        page = lambda at: store.pages[slot.pages[at // self._page]]
        held = [page(at)[at % self._page] for at in range(len(state))]
        whole = slot.length == len(state) and held == list(enumerate(state))
        return state if whole else (-1, *state[1:])
