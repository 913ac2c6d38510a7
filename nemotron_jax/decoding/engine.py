"""Continuous batching: requests come and go while one compiled loop decodes all that run.

Every slot, table and chunk has a fixed shape, so that a handful of programs serve everything; they
are compiled when the engine is made. A request's tokens and log-probabilities are those that
`generate` gives for it alone, whatever runs beside it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from nemotron_jax.config.cache import CacheConfig
from nemotron_jax.config.checks import is_integer
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import MOST_DRAFTS
from nemotron_jax.decoding.prefix_cache import PrefixCache, block_hashes
from nemotron_jax.decoding.request import (
    Request,
    StopText,
    Wanted,
    checked_prompt,
    checked_stops,
)
from nemotron_jax.decoding.runner import Runner, programs_compiled
from nemotron_jax.decoding.scheduler import Group, Job, Scheduler, Slot
from nemotron_jax.decoding.speculative import Acceptance
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.store import Decoded
from nemotron_jax.model.nemotron import Nemotron

# Rows and tokens of one prefill call. All read about as many tokens, so that those who decode wait
# about as long for either: many short prompts together, or a piece of a long one.
PREFILL_SHAPES = ((8, 32), (1, 256))
# Prefill calls in a row while fewer than half of the slots decode: they fill up first.
_MOST_PREFILLS = 4


class QueueFull(RuntimeError):
    """As many requests wait as the engine was told to let; step it, or try again later."""


@dataclasses.dataclass(frozen=True)
class Stats:
    """What an engine has done and what it holds."""

    running: int
    waiting: int
    finished: int  # cancelled ones not counted
    cancelled: int
    new_tokens: int
    prompt_tokens: int  # that were read; those of shared prompts once
    pages: int
    free_pages: int
    free_snapshots: int
    programs: int  # compiled so far; stays as it is after the engine was made
    version: int | str
    acceptance: Acceptance | None  # of drafted tokens; None without speculation
    prefix_entries: int = 0
    prefix_queries: int = 0  # requests that started
    prefix_hits: int = 0  # those of them that started from an entry
    prefix_tokens: int = 0  # prompt tokens that were not read again


class Engine:
    """Serves many requests with one model.

    `slots` requests run at a time, each of at most `max_length` tokens, prompt and new ones
    together; `pages` of `page_tokens` tokens hold their keys and values (by default enough for all
    slots at full length; with fewer, requests wait for pages). With `prefix_cache` a prompt that
    begins like an earlier text starts from there; `snapshots` bounds how many beginnings are kept,
    in pages that nobody else wants. `cache` gives the formats of what is kept. `speculative=k`
    drafts k tokens a round with the MTP block. Up to `rounds` rounds are decoded between two looks
    at the queue, one while prompts wait to be read: more are faster, and tokens come in larger
    pieces. With `max_waiting`, `submit` raises QueueFull where more would wait. A tokenizer is
    needed for stop strings alone. Not for use from several threads.

    Raises ValueError for sizes that fit nothing, or drafts without an MTP block.
    """

    def __init__(
        self,
        model: Nemotron,
        *,
        slots: int = 8,
        max_length: int = 2048,
        speculative: int = 0,
        pages: int | None = None,
        page_tokens: int = 64,
        snapshots: int = 4,
        prefix_cache: bool = False,
        cache: CacheConfig = CacheConfig(),
        rounds: int = 8,
        prefill_shapes: Sequence[tuple[int, int]] = PREFILL_SHAPES,
        max_waiting: int | None = None,
        tokenizer: Tokenizer | None = None,
        version: int | str = 0,
    ) -> None:
        sizes = {"slots": slots, "max_length": max_length, "page_tokens": page_tokens}
        sizes |= {"pages": 1 if pages is None else pages, "snapshots": snapshots, "rounds": rounds}
        _check_sizes(sizes, model, speculative)
        self.slots, self.max_length, self.speculative = slots, max_length, speculative
        self.version, self._tokenizer, self._max_waiting = version, tokenizer, max_waiting
        self._rounds = rounds
        self._shapes = tuple(sorted((min(rows, slots), chunk) for rows, chunk in prefill_shapes))
        pages = slots * -(-max_length // page_tokens) if pages is None else pages
        held = {"slots": slots, "pages": pages, "page_tokens": page_tokens, "snapshots": snapshots}
        self._prefix = PrefixCache(page_tokens) if prefix_cache else None
        self._scheduler = Scheduler(prefix=self._prefix, drafts=speculative > 0, **held)
        self._runner = Runner(
            for_decoding(model),
            max_length=max_length,
            speculative=speculative,
            cache=cache,
            rounds=rounds,
            prefill_shapes=self._shapes,
            **held,
        )
        self._counts = dict.fromkeys(("finished", "cancelled", "new_tokens", "prompt_tokens"), 0)
        self._verifications, self._accepted = 0, np.zeros(speculative, np.int64)

    def submit(
        self,
        prompt_tokens: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] | int = (),
        stop_strings: Sequence[str] | str = (),
        seed: int = 0,
        n: int = 1,
        prompt_logprobs: bool = False,
    ) -> Request | list[Request]:
        """A request to continue the prompt, which starts once there is room; with n > 1, a list of
        n of them, which share the prompt's pages.

        Sample i draws as row i of `generate([prompt] * n, seed=seed)` does. A conversation goes on
        by a prompt of all its tokens so far and the new ones. Raises ValueError for what can never
        be served, and QueueFull.
        """
        vocabulary = self._runner.model.config.vocab_size
        prompt = checked_prompt(prompt_tokens, vocabulary)
        wanted = Wanted(
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            checked_stops(stop_tokens, vocabulary),
            (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
            seed,
            prompt_logprobs,
        )
        self._check_fits(prompt, wanted, n)
        requests = [Request(prompt, wanted, branch, self.step) for branch in range(n)]
        group = Group(waiting=n) if n > 1 else None
        hashes = () if self._prefix is None else block_hashes(prompt, self._scheduler.page_tokens)
        for request in requests:
            strings = wanted.stop_strings
            watch = StopText(self._tokenizer, strings) if strings else None
            self._scheduler.waiting.append(Job(request, group, watch, hashes))
        return requests if n > 1 else requests[0]

    def step(self) -> bool:
        """Start what can start, read some of the prompts, decode some tokens; whether there is more
        to do."""
        self._drop_cancelled()
        self._start()
        for _ in range(_MOST_PREFILLS):
            if not self._scheduler.reading:
                break
            self._prefill()
            if 2 * sum(not slot.reading for slot in self._scheduler.running()) >= self.slots:
                break
        rows = [slot for slot in self._scheduler.running() if not slot.reading]
        if rows:
            self._decode(rows)
        return bool(self._scheduler.waiting or any(self._scheduler.running()))

    def run(self) -> None:
        """Step until every request is over."""
        while self.step():
            pass

    def replace_weights(self, model: Nemotron, version: int | str) -> None:
        """Go on with another model's parameters; tokens from now on bear `version`.

        Requests in flight go on with what their caches hold of the old weights; no other request
        starts from that. Raises ValueError for a model of another shape.
        """
        model = for_decoding(model)
        shapes = lambda model: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
        mine = self._runner.model
        if model.config != mine.config or shapes(model) != shapes(mine):
            raise ValueError(
                "Engine.replace_weights: the model differs from the engine's in its configuration, "
                "shapes or dtypes; make another engine for it"
            )
        self._runner.put_model(model)
        self.version = version
        self._scheduler.expire()

    def stats(self) -> Stats:
        """Counts since the engine was made, and what it holds now."""
        scheduler = self._scheduler
        counts, prefix = (self._verifications, self._accepted), {}
        if (cached := self._prefix) is not None:
            prefix = {"entries": len(cached), "queries": cached.queries, "hits": cached.hits}
            prefix |= {"tokens": cached.hit_tokens}
        return Stats(
            running=sum(1 for _ in scheduler.running()),
            waiting=len(scheduler.waiting),
            pages=scheduler.pages.count,
            free_pages=scheduler.pages.free,
            free_snapshots=scheduler.free_snapshots,
            programs=programs_compiled(),
            version=self.version,
            acceptance=Acceptance.of_counts(*counts) if self.speculative else None,
            **self._counts,
            **{f"prefix_{name}": count for name, count in prefix.items()},
        )

    def _check_fits(self, prompt: tuple[int, ...], wanted: Wanted, n: int) -> None:
        scheduler, total = self._scheduler, len(prompt) + wanted.max_new_tokens
        need = f"{len(prompt)} prompt tokens and max_new_tokens={wanted.max_new_tokens}"
        if total > self.max_length:
            raise ValueError(
                f"Engine.submit: {need} exceed max_length={self.max_length}; ask for fewer, or "
                "make the engine with a larger max_length"
            )
        if scheduler.pages_for(total) > scheduler.pages.count:
            raise ValueError(
                f"Engine.submit: {need} need {scheduler.pages_for(total)} pages, and the engine "
                f"has {scheduler.pages.count}; ask for fewer, or make the engine with more pages"
            )
        if not is_integer(n) or n < 1:
            raise ValueError(f"Engine.submit: n={n!r} must be an integer of at least 1")
        if wanted.stop_strings and self._tokenizer is None:
            raise ValueError(
                "Engine.submit: stop_strings need the tokens' texts; make the engine with a "
                "tokenizer"
            )
        if self._max_waiting is not None and len(scheduler.waiting) + n > self._max_waiting:
            raise QueueFull(
                f"Engine.submit: {len(scheduler.waiting)} requests wait and {n} more would exceed "
                f"max_waiting={self._max_waiting}; step the engine, or try again later"
            )

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._scheduler.waiting if job.request.cancelled]:
            self._scheduler.drop_waiting(job)
            self._finish(job.request, "cancelled")
        for slot in list(self._scheduler.running()):
            if slot.job.request.cancelled:
                self._scheduler.leave(slot)
                self._finish(slot.job.request, "cancelled")

    def _start(self) -> None:
        while (started := self._scheduler.start_next()) is not None:
            slot, entry = started
            if entry is None:
                continue
            self._runner.load(entry, slot, len(self._scheduler.shared_pages(entry)))
            if slot.job.group is not None:
                self._scheduler.release_group(slot.job.group)

    def _prefill(self) -> None:
        shape, slots = self._scheduler.next_chunk(self._shapes)
        starts = [slot.length for slot in slots]
        lengths, hidden = self._runner.prefill(slots, shape)
        self._score(slots, starts, hidden)
        for slot, length in zip(slots, lengths.tolist(), strict=False):
            self._scheduler.has_read(slot, length)
            self._counts["prompt_tokens"] += length
            self._keep(slot)

    def _score(self, slots: list[Slot], starts: list[int], hidden: jax.Array) -> None:
        """Log-probabilities of prompts, of those who asked for them."""
        wanted = [row for row, slot in enumerate(slots) if slot.job.request.wanted.prompt_logprobs]
        if not wanted:
            return
        targets = np.zeros(hidden.shape[:2], np.int32)
        pieces = {row: slots[row].prompt[starts[row] + 1 :][: targets.shape[1]] for row in wanted}
        for row, piece in pieces.items():
            targets[row, : len(piece)] = piece
        found = self._runner.score(hidden, targets)
        for row, piece in pieces.items():
            known = slots[row].job.request.prompt_logprobs
            known[starts[row] :] = found[row, : len(piece)].tolist()  # it may be read anew

    def _keep(self, slot: Slot) -> None:
        """Remember where a slot stands, at the end of a block or of its prompt; the other samples
        of the prompt start from there."""
        scheduler, group, entry = self._scheduler, slot.job.group, None
        if not slot.reading or slot.length % scheduler.page_tokens == 0:
            entry = scheduler.remember(slot, slot.prompt, slot.job.hashes)
        if not slot.reading and group is not None and group.leader is slot:
            group.leader = None
            if group.waiting and slot.current:
                if entry is None:
                    entry = group.entry = scheduler.keep(slot)
                else:
                    group.entry = entry
                    entry.users += 1
                self._copy_prompt_logprobs(slot)
        if entry is not None:
            self._runner.save(slot, entry)
        if not slot.reading:
            self._start()

    def _copy_prompt_logprobs(self, slot: Slot) -> None:
        """Give the samples that will not read the prompt what the slot found in reading it."""
        group, found = slot.job.group, slot.job.request.prompt_logprobs
        if group.entry is None or found is None:
            return
        for job in self._scheduler.waiting:
            if job.group is group:
                job.request.prompt_logprobs = list(found)

    def _decode(self, slots: list[Slot]) -> None:
        given, rows = self._runner.decode(slots, 1 if self._scheduler.reading else self._rounds)
        self._verifications += int(given.verifications)
        self._accepted += given.accepted
        for slot, row in zip(slots, rows, strict=True):
            self._take(slot, given, row)

    def _take(self, slot: Slot, given: Decoded, row: int) -> None:
        """A slot's new tokens for its request, which may end with them."""
        request = slot.job.request
        count, done = int(given.count[row]), bool(given.done[row])
        tokens = given.tokens[row, :count].tolist()
        reason = None
        if done:
            stopped = tokens[-1] in request.wanted.stop_tokens
            reason = "stop" if stopped else "length"
        if slot.job.stop_text is not None:
            place = next((n for n, t in enumerate(tokens) if slot.job.stop_text.push(t)), None)
            if place is not None:
                count, reason = place + 1, "stop"
        request.tokens += tokens[:count]
        request.logprobs += given.logprobs[row, :count].tolist()
        request.versions += [self.version] * count
        self._counts["new_tokens"] += count
        slot.length = int(given.length[row])
        if reason is None:
            return
        # Once a stop string was looked for, a slot may hold tokens that are not the request's.
        if slot.job.stop_text is None:
            entry = self._scheduler.remember_turn(slot, complete=self.speculative > 0)
            if entry is not None:
                self._runner.save(slot, entry)
        self._scheduler.leave(slot)
        self._finish(request, reason)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        self._counts["cancelled" if reason == "cancelled" else "finished"] += 1


def _check_sizes(sizes: dict[str, int], model: Nemotron, speculative: int) -> None:
    for name, value in sizes.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"Engine: {name}={value!r} must be an integer of at least 1")
    if not is_integer(speculative) or not 0 <= speculative <= MOST_DRAFTS:
        raise ValueError(
            f"Engine: speculative={speculative!r} must be an integer between 0 and {MOST_DRAFTS}"
        )
    if speculative and model.mtp_block is None:
        raise ValueError(
            f"Engine: speculative={speculative} needs an MTP block to draft with, and this model "
            "has none; use 0"
        )
