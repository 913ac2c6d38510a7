"""Continuous batching: requests come and go while one compiled loop decodes all that run.

Every slot, table and chunk has a fixed shape, so that a handful of programs serve everything; they
are compiled when the engine is made. A request's tokens and log-probabilities are those that
`generate` gives for it alone, whatever runs beside it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.execution import Execution
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.admission import (
    QueueFull,
    Standstill,
    check_drafts,
    check_fits,
    check_moves,
    check_queue,
    check_samples,
    check_texts,
)
from nemotron_jax.decoding.choice import Drafts
from nemotron_jax.decoding.generator import Stats
from nemotron_jax.decoding.ledger import Gain, Ledger
from nemotron_jax.decoding.pinned import programs_compiled
from nemotron_jax.decoding.prefix_cache import PrefixCache, block_hashes
from nemotron_jax.decoding.request import Request, checked_prompt
from nemotron_jax.decoding.rules import rounds_under
from nemotron_jax.decoding.runner import Runner
from nemotron_jax.decoding.scheduler import Group, Job, Scheduler, Slot
from nemotron_jax.decoding.speculative import Acceptance, count_places
from nemotron_jax.decoding.step import for_execution
from nemotron_jax.decoding.stopping import StopText
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.nemotron import Nemotron

__all__ = ["Engine", "QueueFull", "Standstill", "Stats"]

# Prefill calls in a row while fewer than half of the slots decode: they fill up first.
_MOST_PREFILLS = 4


class Engine:
    """Serves many requests with one model, on slots and pages; `config` says how many.

    `execution` is how the model runs: compute dtype, kernels, number formats. It runs on the mesh
    that is set when it is made, or else on the model's. A tokenizer is needed for stop strings
    alone. Not for use from several threads.

    An exception in `step`, an interrupt too, loses no token and no request: the next step reads
    the texts of all that ran again, and each goes on as if nothing had been; what the prefix cache
    held is forgotten.

    Raises ValueError for drafts without an MTP block.
    """

    def __init__(
        self,
        model: Nemotron,
        config: EngineConfig = EngineConfig(),
        execution: Execution = Execution(),
        tokenizer: Tokenizer | None = None,
        *,
        version: int | str = 0,
    ) -> None:
        if config.speculative == "auto" and model.mtp_block is None:
            config = dataclasses.replace(config, speculative=0)
        check_drafts("EngineConfig", model, config.most_drafts)
        self.config, self.execution = config, execution
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(
            slots=config.slots,
            pages=config.num_pages,
            page_tokens=config.page_tokens,
            snapshots=config.snapshots,
            prefix=PrefixCache(config.page_tokens) if config.prefix_cache else None,
            drafts=config.most_drafts > 0,
        )
        self._runner = Runner(for_execution(model, execution), config, execution, version)
        self._drafts = Drafts(
            config.drafts, self._runner.costs() if len(config.drafts) > 1 else None
        )
        self._ledger = Ledger(config.most_drafts)
        self._prompt_tokens = 0
        # Whether an exception has left books and store in a state that nobody knows.
        self._in_doubt = False

    def submit(self, prompt: Sequence[int], wanted: Wanted, *, n: int = 1) -> list[Request]:
        """n requests to continue the prompt, which start once there is room and share its pages.

        Sample i draws as row i of `generate([prompt] * n, seed=seed)` does. A conversation goes on
        by a prompt of all its tokens so far and the new ones. Raises ValueError for what can never
        be served, and QueueFull.
        """
        vocabulary = self._runner.model.config.vocab_size
        prompt = checked_prompt(prompt, vocabulary)
        wanted.check_vocabulary(vocabulary)
        check_samples(wanted, n)
        check_fits(prompt, wanted, self._scheduler, self.config.max_length)
        check_texts(wanted, self._tokenizer)
        if (most := self.config.max_waiting) is not None:
            check_queue(n, len(self._scheduler.waiting), most)
        group = Group(waiting=n) if n > 1 else None
        requests = [Request(prompt, wanted, branch, self.step) for branch in range(n)]
        jobs = [self._job(request, group) for request in requests]
        self._ledger.enter(jobs)
        self._scheduler.waiting.extend(jobs)
        return requests

    def step(self) -> bool:
        """Start what can start, read some of the prompts, decode some tokens; whether there is more
        to do."""
        if self._in_doubt:
            self._begin_anew()
        self._in_doubt = True
        self._drop_cancelled()
        self._start()
        check_moves(self._scheduler)
        for _ in range(_MOST_PREFILLS):
            if not self._scheduler.reading:
                break
            self._prefill()
            if 2 * sum(not slot.reading for slot in self._scheduler.running()) >= self.config.slots:
                break
        rows = [slot for slot in self._scheduler.running() if not slot.reading]
        if rows:
            self._decode(rows)
        more = bool(self._scheduler.waiting or any(self._scheduler.running()))
        self._in_doubt = False
        return more

    def run(self) -> None:
        """Step until every request is over."""
        while self.step():
            pass

    def replace_weights(self, model: Nemotron, version: int | str) -> None:
        """Go on with another model's parameters; tokens from now on bear `version`.

        Requests in flight go on with what their caches hold of the old weights; no other request
        starts from that. Raises ValueError for a model of another shape.
        """
        model = self._runner.prepared(model)
        shapes = lambda model: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
        mine = self._runner.model
        if model.config != mine.config or shapes(model) != shapes(mine):
            raise ValueError(
                "Engine.replace_weights: the model differs from the engine's in its configuration, "
                "shapes or dtypes; make another engine for it"
            )
        in_doubt, self._in_doubt = self._in_doubt, True
        self._runner.put_model(model, version)
        if not in_doubt:  # otherwise the next step forgets all
            self._scheduler.expire()
        self._in_doubt = in_doubt

    @property
    def version(self) -> int | str:
        """Of the weights that give tokens now."""
        return self._runner.version

    def stats(self) -> Stats:
        """Counts since the engine was made, and what it holds now."""
        scheduler, totals, prefix = self._scheduler, self._ledger.totals, {}
        if (cached := scheduler.prefix) is not None:
            prefix = {"entries": len(cached), "queries": cached.queries, "hits": cached.hits}
            prefix |= {"tokens": cached.hit_tokens}
        return Stats(
            running=sum(1 for _ in scheduler.running()),
            waiting=len(scheduler.waiting),
            finished=totals.finished,
            cancelled=totals.cancelled,
            new_tokens=totals.new_tokens,
            prompt_tokens=self._prompt_tokens,
            pages=scheduler.pages.count,
            free_pages=scheduler.pages.free,
            free_snapshots=scheduler.free_snapshots,
            programs=programs_compiled(),
            version=self.version,
            acceptance=Acceptance.of_places(totals.places) if self.config.most_drafts else None,
            speculative=self._drafts.k,
            draft_cost=self._drafts.draft_cost,
            verify_cost=self._drafts.verify_cost,
            **{f"prefix_{name}": count for name, count in prefix.items()},
        )

    def _job(self, request: Request, group: Group | None) -> Job:
        """A request as it is to be continued."""
        job = Job(request, group, StopText.of(request, self._tokenizer))
        if self._scheduler.prefix is not None:
            job.hashes = block_hashes(job.text, self._scheduler.page_tokens)
        return job

    def _begin_anew(self) -> None:
        """Put every request in line again, with what it was given, and let nothing else stay.

        Samples of a prompt that have begun differ from now on in what is to be read.
        """
        self._ledger.settle()
        groups: dict[Group, Group] = {}
        jobs = []
        for old in self._ledger:
            group = None
            if old.group is not None and not old.request.tokens:
                group = groups.setdefault(old.group, Group(waiting=0))
                group.waiting += 1
            jobs.append(self._job(old.request, group))
        self._ledger.replace(jobs)
        self._scheduler = self._scheduler.emptied()
        self._scheduler.waiting.extend(jobs)
        self._runner.renew()

    def _drop_cancelled(self) -> None:
        for job in [job for job in self._scheduler.waiting if job.request.cancelled]:
            self._scheduler.drop_waiting(job)
            self._cancelled(job)
        for slot in list(self._scheduler.running()):
            if slot.job.request.cancelled:
                self._scheduler.leave(slot)
                self._cancelled(slot.job)

    def _cancelled(self, job: Job) -> None:
        self._ledger.give([Gain(job, len(job.request.tokens), reason="cancelled")])

    def _start(self) -> None:
        while (started := self._scheduler.start_next()) is not None:
            slot, entry = started
            request = slot.job.request
            request.cached_tokens = min(slot.length, len(request.prompt))
            if entry is None:
                continue
            self._runner.load(entry, slot, len(self._scheduler.shared_pages(entry)))
            if slot.job.group is not None:
                self._scheduler.release_group(slot.job.group)

    def _prefill(self) -> None:
        shape, slots = self._scheduler.next_chunk(self.config.prefill_shapes)
        starts = [slot.length for slot in slots]
        lengths, hidden = self._runner.prefill(slots, shape)
        self._score(slots, starts, hidden)
        for slot, length in zip(slots, lengths.tolist(), strict=False):
            self._scheduler.has_read(slot, length)
            self._prompt_tokens += length
            self._keep(slot)

    def _score(self, slots: list[Slot], starts: list[int], hidden: jax.Array) -> None:
        """Log-probabilities of prompts, of those who asked for them."""
        wanted = [row for row, slot in enumerate(slots) if slot.job.request.wanted.prompt_logprobs]
        if not wanted:
            return
        targets = np.zeros(hidden.shape[:2], np.int32)
        prompts = {row: slots[row].job.request.prompt for row in wanted}
        pieces = {row: prompts[row][starts[row] + 1 :][: targets.shape[1]] for row in wanted}
        for row, piece in pieces.items():
            targets[row, : len(piece)] = piece
        found = self._runner.score(hidden, targets)
        for row, piece in pieces.items():
            # What it was told before of these tokens goes: it may be read anew.
            found.give(slots[row].job.request, starts[row], row, len(piece))

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
        group, found = slot.job.group, slot.job.request
        if group.entry is None or found.prompt_logprobs is None:
            return
        for job in self._scheduler.waiting:
            if job.group is group:
                job.request.prompt_logprobs = list(found.prompt_logprobs)
                job.request.prompt_likeliest = list(found.prompt_likeliest)

    def _decode(self, slots: list[Slot]) -> None:
        slots = [slot for slot in slots if self._may_go_on(slot)]
        if not slots:
            return
        rounds = 1 if self._scheduler.reading else self.config.rounds
        rounds = rounds_under([slot.job.request for slot in slots], rounds)
        drafts = self._drafts.next(self._runner.rows_for(len(slots)))
        decoded, rows = self._runner.decode(slots, rounds, drafts)
        found = zip(slots, rows, strict=True)
        gains = [Gain.of(slot.job, decoded, row, self.version) for slot, row in found]
        counts = zip(rows, gains, strict=True)
        places = [decoded.given.places[row, : len(gain.tokens)] for row, gain in counts]
        counted = count_places(np.concatenate(places), drafts, self.config.most_drafts)
        self._ledger.give(gains, counted)
        self._drafts.learn(drafts, counted[drafts])
        for slot, row, gain in zip(slots, rows, gains, strict=True):
            slot.length = int(decoded.length[row])
            if gain.reason is not None:
                self._end(slot)

    def _may_go_on(self, slot: Slot) -> bool:
        """Whether a slot's grammar, if it has one, lets anything follow; ends its request if
        not."""
        request = slot.job.request
        if request.wanted.grammar is None or request.ask_grammar(self._runner.vocabulary):
            return True
        self._ledger.give([Gain(slot.job, len(request.tokens), reason="stop")])
        self._scheduler.leave(slot)
        return False

    def _end(self, slot: Slot) -> None:
        """Keep what the slot of a request that is over holds, and free it."""
        # Once a stop string was looked for, a slot may hold tokens that are not the request's.
        if slot.job.stop_text is None:
            entry = self._scheduler.remember_turn(slot, complete=self.config.most_drafts > 0)
            if entry is not None:
                self._runner.save(slot, entry)
        self._scheduler.leave(slot)
