"""Requests that go side by side: all that wait are read together and decoded in one loop, on all
devices of the mesh, to the end of the last of them."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.admission import check_drafts, check_samples, check_texts
from nemotron_jax.decoding.generator import Stats
from nemotron_jax.decoding.ledger import Gain, Ledger
from nemotron_jax.decoding.loop import Loop, Sizes, begin, run_rounds
from nemotron_jax.decoding.reading import empty_rows, padded, power_of_two, read, rows_of
from nemotron_jax.decoding.request import Request, checked_prompt
from nemotron_jax.decoding.rules import Asked, Free, Rules, rounds_under
from nemotron_jax.decoding.scheduler import Job
from nemotron_jax.decoding.speculative import Acceptance, count_places
from nemotron_jax.decoding.step import for_execution
from nemotron_jax.decoding.stopping import StopText
from nemotron_jax.decoding.store import Decoded, FlatModel, score
from nemotron_jax.decoding.wanted import MOST_TOP, Wanted
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import mesh_of
from nemotron_jax.sharding import on_every_device, on_mesh, place_batch, shard

_FEWEST_NEW_TOKENS = 64  # buffers hold this times a power of two, so that few loops are compiled
# Rounds between two looks at the text where stop strings are watched; without, one call does all.
_WATCHED_ROUNDS = 8
_ALL_ROUNDS = np.iinfo(np.int32).max


@dataclasses.dataclass
class _Rows:
    """A batch on the device, and what its cache holds of each row's text."""

    cache: Cache
    hidden: Float[Array, "B D"]  # of each row's last token
    texts: list[tuple[int, ...]]
    jobs: dict[int, Job]  # those that run, by row
    capacity: int  # tokens that a text may have


class Lockstep:
    """Serves requests in batches. One that comes while a batch runs waits for the next.

    With `max_length`, which bounds prompt and new tokens together, what was read of a batch is
    kept: where all requests of the next one go on with its texts, they read what is new alone, and
    one program serves every turn of a set of conversations. Prompts that are equal are read once.
    `execution` is how the model runs; `speculative` drafts so many tokens a round with the MTP
    block. It runs on the mesh that is set when it is made, or else on the model's. A tokenizer is
    needed for stop strings alone. An exception in `step` loses no token: the next step reads the
    texts again. Not for use from several threads.
    """

    def __init__(
        self,
        model: Nemotron,
        execution: Execution = Execution(),
        tokenizer: Tokenizer | None = None,
        *,
        speculative: int = 0,
        max_length: int | None = None,
        version: int | str = 0,
    ) -> None:
        check_drafts("Lockstep", model, speculative)
        self.execution, self.speculative = execution, speculative
        self._tokenizer, self._max_length = tokenizer, max_length
        self._mesh = mesh_of(model)
        self._waiting: list[Job] = []
        self._rows: _Rows | None = None
        self._ledger = Ledger(speculative)
        self._free = Free(model.config.vocab_size)
        self._prompt_tokens = 0
        self._in_doubt = False
        self.replace_weights(model, version)

    def submit(self, prompt: Sequence[int], wanted: Wanted, *, n: int = 1) -> list[Request]:
        """n requests to continue the prompt with the next batch; sample i draws as row i of
        `generate([prompt] * n, seed=seed)` does. Raises ValueError for what cannot be served."""
        vocabulary = self.model.config.vocab_size
        prompt = checked_prompt(prompt, vocabulary)
        wanted.check_vocabulary(vocabulary)
        check_samples(wanted, n)
        check_texts(wanted, self._tokenizer)
        total = len(prompt) + wanted.max_new_tokens
        if self._max_length is not None and total > self._max_length:
            raise ValueError(
                f"submit: {len(prompt)} prompt tokens and max_new_tokens={wanted.max_new_tokens} "
                f"exceed max_length={self._max_length}; ask for fewer"
            )
        requests = [Request(prompt, wanted, branch, self.step) for branch in range(n)]
        self.enter(requests)
        return requests

    def enter(self, requests: Sequence[Request]) -> None:
        """Let checked requests wait for the next batch."""
        jobs = [self._job(request) for request in requests]
        self._ledger.enter(jobs)
        self._waiting += jobs

    def step(self) -> bool:
        """Begin a batch where none runs, and decode; whether there is more to do."""
        with on_mesh(self._mesh):
            return self._step()

    def _step(self) -> bool:
        if self._in_doubt:
            self._begin_anew()
        self._in_doubt = True
        self._drop_cancelled()
        if self._waiting and not (self._rows and self._rows.jobs):
            self._begin()
        if self._rows is not None and self._rows.jobs:
            self._decode()
        self._in_doubt = False
        return bool(self._waiting or (self._rows and self._rows.jobs))

    def run(self) -> None:
        """Step until every request is over."""
        while self.step():
            pass

    def replace_weights(self, model: Nemotron, version: int | str) -> None:
        """Go on with another model's parameters; tokens from now on bear `version`.

        Requests in flight go on with what their caches hold of the old weights; no other request
        starts from that.
        """
        with on_mesh(self._mesh):
            self.model = for_execution(model, self.execution)
        self._weights, self.version = FlatModel.of(self.model), version
        if self._rows is not None:
            self._rows.texts = [()] * len(self._rows.texts)

    def stats(self) -> Stats:
        """Counts since it was made, and what it holds now."""
        totals = self._ledger.totals
        return Stats(
            running=len(self._rows.jobs) if self._rows else 0,
            waiting=len(self._waiting),
            finished=totals.finished,
            cancelled=totals.cancelled,
            new_tokens=totals.new_tokens,
            prompt_tokens=self._prompt_tokens,
            version=self.version,
            acceptance=Acceptance.of_places(totals.places) if self.speculative else None,
            speculative=self.speculative,
        )

    def _job(self, request: Request) -> Job:
        return Job(request, None, StopText.of(request, self._tokenizer))

    def _begin_anew(self) -> None:
        """Put every request in line again, with what it was given, and let nothing else stay."""
        self._ledger.settle()
        self._waiting = [self._job(old.request) for old in self._ledger]
        self._ledger.replace(self._waiting)
        self._rows = None

    def _drop_cancelled(self) -> None:
        running = self._rows.jobs if self._rows else {}
        gone = [job for job in (*self._waiting, *running.values()) if job.request.cancelled]
        self._ledger.give([Gain(job, len(job.request.tokens), reason="cancelled") for job in gone])
        self._waiting = [job for job in self._waiting if job not in gone]
        for row in [row for row, job in running.items() if job in gone]:
            del running[row]

    def _begin(self) -> None:
        """Read the texts of all that waits."""
        jobs, self._waiting = self._waiting, []
        longest = max(len(j.request.prompt) + j.request.wanted.max_new_tokens for j in jobs)
        places = self._places(jobs, longest)
        if places is None:
            self._new_rows(jobs, longest)
            return
        rows = self._rows
        rows.jobs = dict(zip(places, jobs, strict=True))
        new = [
            rows.jobs[row].text[len(text) :] if row in rows.jobs else ()
            for row, text in enumerate(rows.texts)
        ]
        rows.cache, rows.hidden = self._read(rows.cache, rows.hidden, new)
        for row, job in rows.jobs.items():
            rows.texts[row] = job.text

    def _places(self, jobs: Sequence[Job], longest: int) -> list[int] | None:
        """The row of the kept batch that each request goes on with, or None where one has none."""
        rows = self._rows
        if rows is None or longest > rows.capacity:
            return None
        if any(job.request.wanted.prompt_logprobs for job in jobs):
            return None  # log-probabilities of a prompt come of reading it
        known: dict[tuple[int, ...], list[int]] = {}
        for row in reversed(range(len(rows.texts))):
            known.setdefault(rows.texts[row], []).append(row)
        lengths = sorted({len(text) for text in known if text}, reverse=True)
        places = []
        for job in jobs:
            text = job.text
            found = (known.get(text[:length]) for length in lengths if length < len(text))
            row = next((some for some in found if some), None)
            if row is None:
                return None
            places.append(row.pop())
        return places

    def _new_rows(self, jobs: Sequence[Job], longest: int) -> None:
        """A batch of its own for these requests; equal texts are read once."""
        self._rows = None  # frees the old one first
        texts = list(dict.fromkeys(job.text for job in jobs))
        batch, bound = rows_of(len(jobs)), self._max_length or longest
        new = texts + [()] * (rows_of(len(texts)) - len(texts))
        # A row has room for what any other reads as padding: at once, or in a later turn.
        capacity = self.speculative + 1
        if self._max_length is None:
            capacity += padded(max(map(len, texts))) + _room(jobs)
        else:
            capacity += bound + padded(bound)
        cache, hidden = empty_rows(
            self._weights, rows=len(new), capacity=capacity, mtp=self.speculative > 0
        )
        scored = {texts.index(job.text): job for job in jobs if job.request.wanted.prompt_logprobs}
        cache, hidden = self._read(cache, hidden, new, scored)
        for job in jobs:
            found = scored.get(texts.index(job.text))
            if job.request.wanted.prompt_logprobs:
                job.request.prompt_logprobs = list(found.request.prompt_logprobs)
                job.request.prompt_likeliest = list(found.request.prompt_likeliest)
        if batch != len(new) or len(texts) != len(jobs):
            index = [texts.index(job.text) for job in jobs] + [0] * (batch - len(jobs))
            cache, hidden = _taken((cache, hidden), place_batch(np.array(index, np.int32)))
        held = [job.text for job in jobs] + [()] * (batch - len(jobs))
        self._rows = _Rows(cache, hidden, held, dict(enumerate(jobs)), bound)

    def _read(
        self,
        cache: Cache,
        hidden: Float[Array, "B D"],
        new: Sequence[Sequence[int]],
        scored: dict[int, Job] | None = None,
    ) -> tuple[Cache, Float[Array, "B D"]]:
        """The cache after each row's new tokens, possibly none, and the rows' last hidden states;
        `scored` are those whose prompts get log-probabilities."""
        self._prompt_tokens += sum(map(len, new))
        score_chunk = lambda start, states: self._score(states, start, scored)
        heard = score_chunk if scored else None
        return read(self._weights, cache, hidden, new, execution=self.execution, heard=heard)

    def _score(self, states: Float[Array, "B T D"], start: int, scored: dict[int, Job]) -> None:
        """Log-probabilities of the prompts' tokens after those whose hidden states these are."""
        targets = np.zeros(states.shape[:2], np.int32)
        pieces = {
            row: job.request.prompt[start + 1 :][: targets.shape[1]] for row, job in scored.items()
        }
        for row, piece in pieces.items():
            targets[row, : len(piece)] = piece
        found = score(self._weights, states, targets, execution=self.execution)
        for row, piece in pieces.items():
            found.give(scored[row].request, start, row, len(piece))

    def _decode(self) -> None:
        """Decode until the last row is done, or as long as nobody must look at the texts."""
        rows = self._rows
        for row, job in list(rows.jobs.items()):
            ruled = job.request.wanted.grammar is not None
            if ruled and not job.request.ask_grammar(self.model.config.vocab_size):
                self._ledger.give([Gain(job, len(job.request.tokens), reason="stop")])
                del rows.jobs[row]
        if not rows.jobs:
            return
        jobs = list(rows.jobs.values())
        rounds = _WATCHED_ROUNDS if any(job.stop_text for job in jobs) else _ALL_ROUNDS
        rounds = rounds_under([job.request for job in jobs], rounds)
        told_of = any(job.request.wanted.top_logprobs for job in jobs)
        top = min(MOST_TOP, self.model.config.vocab_size) if told_of else 0
        rows.cache, found = _decode(
            self._weights,
            rows.cache,
            place_batch(self._told(rows)),
            np.int32(rounds),
            sizes=Sizes(_room(jobs), self.speculative, top),
            execution=self.execution,
        )
        decoded = jax.device_get(found)
        assert np.all(decoded.length <= (rows.cache.capacity or np.inf)), "a row outgrew its cache"
        gains = {row: Gain.of(job, decoded, row, self.version) for row, job in rows.jobs.items()}
        places = [decoded.given.places[row, : len(gain.tokens)] for row, gain in gains.items()]
        self._ledger.give(
            list(gains.values()), count_places(np.concatenate(places), self.speculative)
        )
        for row, gain in gains.items():
            request = gain.job.request
            text = (*request.prompt, *request.tokens)
            # Once a stop string was looked for, a row may hold tokens that are not the request's.
            own = gain.job.stop_text is None and rows.texts[row] != ()
            rows.texts[row] = text[: int(decoded.length[row])] if own else ()
            if gain.reason is not None:
                del rows.jobs[row]
        if not rows.jobs and self._max_length is None:
            self._rows = None

    def _told(self, rows: _Rows) -> "_DecodeRows":
        count = len(rows.texts)
        requests = {row: job.request for row, job in rows.jobs.items()}
        told = _DecodeRows(
            hidden=rows.hidden,
            token=np.zeros(count, np.int32),
            fresh=np.zeros(count, bool),
            active=np.zeros(count, bool),
            asked=Asked.of(requests, count, self._free),
        )
        for row, request in requests.items():
            told.active[row], told.fresh[row] = True, not request.tokens
            told.token[row] = request.tokens[-1] if request.tokens else 0
        return told


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _DecodeRows:
    """What a decode call is told of every row."""

    hidden: Float[Array, "B D"]
    token: Int[np.ndarray, "B"]  # the newest, which the cache does not hold
    fresh: Bool[np.ndarray, "B"]  # no token yet
    active: Bool[np.ndarray, "B"]
    asked: Asked


@functools.partial(jax.jit, static_argnames=("sizes", "execution"), donate_argnums=1)
def _decode(
    weights: FlatModel,
    cache: Cache,
    rows: _DecodeRows,
    rounds: Int[Array, ""],
    *,
    sizes: Sizes,
    execution: Execution,
) -> tuple[Cache, Decoded]:
    """The cache after first tokens where they are due and at most `rounds` rounds, and what they
    gave."""
    model = weights.model()
    rules = Rules.create(rows.asked, model.config.pad_token)
    loop = Loop.create(cache, rows.token, ~rows.active, rules, sizes)
    loop = begin(model, loop, rows.hidden, rows.fresh, rules, execution=execution)
    loop = run_rounds(model, loop, rules, sizes, most_rounds=rounds, execution=execution)
    found = Decoded(loop.given, loop.lengths, loop.done, loop.cache.length)
    return loop.cache.shared(), on_every_device(found)


@jax.jit
def _taken(tree: tuple, rows: Int[Array, "B"]) -> tuple:
    """The given rows of everything."""
    cache, hidden = jax.tree.map(lambda a: a[rows], tree)
    return cache.shared(), shard(hidden, "batch", None)


def _room(jobs: Sequence[Job]) -> int:
    """Tokens that a call may give a row."""
    most = max(job.request.wanted.max_new_tokens for job in jobs)
    return max(_FEWEST_NEW_TOKENS, power_of_two(most))
