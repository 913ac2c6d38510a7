"""Who runs where: pages, slots and the queue, all on the host and free of jax.

Requests start in the order in which they came; none overtakes one that waits for a slot or for
pages, so none waits for ever. A request that starts has all the pages it can ever need, so nothing
that runs is ever put back. What is only kept makes way: where nothing runs, all pages can be had.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from nemotron_jax.decoding.prefix_cache import Entry, PrefixCache, block_hashes
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.stopping import StopText


class Pages:
    """Pages by number from 1, with how many hold each; page 0 belongs to nobody."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))
        self._holders = np.zeros(count + 1, np.int64)

    @property
    def free(self) -> int:
        """How many nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """As many pages that nobody held; the caller has looked whether there are enough."""
        assert count <= self.free, "more pages taken than are free"
        taken = [self._free.pop() for _ in range(count)]
        self._holders[taken] += 1
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Hold pages that someone holds already."""
        assert all(self._holders[page] > 0 for page in pages), "a free page was shared"
        np.add.at(self._holders, list(pages), 1)

    def release(self, pages: Sequence[int]) -> None:
        """Hold pages no longer; those that nobody holds are free."""
        for page in pages:
            self._holders[page] -= 1
            assert self._holders[page] >= 0, "a page was released twice"
            if not self._holders[page]:
                self._free.append(page)


@dataclasses.dataclass(eq=False)
class Group:
    """Samples of one prompt: the first reads it, the others start where it stood."""

    waiting: int  # of its requests, how many have not started
    leader: "Slot | None" = None  # reads the prompt
    entry: Entry | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A request with what the engine alone needs to know of it."""

    request: Request
    group: Group | None
    stop_text: StopText | None
    hashes: Sequence[bytes] = ()  # of the text's blocks, for the prefix cache

    @property
    def text(self) -> tuple[int, ...]:
        """What must be in the cache before the next token: all but the newest one given."""
        return (*self.request.prompt, *self.request.tokens[:-1])


@dataclasses.dataclass(eq=False)
class Slot:
    """A running request's place: `length` tokens of its text are in the cache."""

    number: int
    job: Job
    pages: list[int]
    length: int = 0
    # Tokens that must be in the cache before the first new one; what is missing is to be prefilled.
    prompt: tuple[int, ...] = ()
    current: bool = True  # all that it holds is of the newest weights

    @property
    def reading(self) -> bool:
        """Whether part of its prompt is missing."""
        return self.length < len(self.prompt)

    @property
    def left(self) -> int:
        """Tokens that it may still give."""
        return self.job.request.wanted.max_new_tokens - len(self.job.request.tokens)


class Scheduler:
    """Slots, pages, snapshots and the queue. It decides; the engine tells the device.

    Entries of the prefix cache go, the oldest first, where a request wants what they hold. With
    `drafts` a page is shared only once the token after it is known too: the MTP block's keys are
    made of a token and of the one that follows.
    """

    def __init__(
        self,
        *,
        slots: int,
        pages: int,
        page_tokens: int,
        snapshots: int,
        prefix: PrefixCache | None = None,
        drafts: bool = False,
    ) -> None:
        self.page_tokens, self._drafts = page_tokens, drafts
        self.pages, self.prefix = Pages(pages), prefix
        self.waiting: collections.deque[Job] = collections.deque()
        self.slots: list[Slot | None] = [None] * slots
        self._snapshots = snapshots
        self._free_snapshots = list(range(snapshots))
        self._reading: collections.deque[Slot] = collections.deque()

    def emptied(self) -> "Scheduler":
        """Another one of the same sizes, where nothing runs, waits or is kept."""
        return Scheduler(
            slots=len(self.slots),
            pages=self.pages.count,
            page_tokens=self.page_tokens,
            snapshots=self._snapshots,
            prefix=None if self.prefix is None else self.prefix.emptied(),
            drafts=self._drafts,
        )

    def running(self) -> Iterator[Slot]:
        """Slots with a request."""
        return (slot for slot in self.slots if slot is not None)

    @property
    def free_snapshots(self) -> int:
        """Snapshots that nothing is kept in."""
        return len(self._free_snapshots)

    @property
    def reading(self) -> int:
        """Slots whose prompt is not read yet."""
        return len(self._reading)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_tokens)

    def pages_of(self, job: Job) -> int:
        """Pages that a request holds while it runs."""
        return self.pages_for(len(job.request.prompt) + job.request.wanted.max_new_tokens)

    def shared_pages(self, entry: Entry) -> tuple[int, ...]:
        """The pages of an entry that nobody writes to any more; a request that starts from it has
        its own copy of one that may follow."""
        return entry.pages[: (entry.length - self._drafts) // self.page_tokens]

    def start_next(self) -> tuple[Slot, Entry | None] | None:
        """The next request in a slot of its own, and the entry that it starts from; None where
        nothing can start now.

        A sample whose prompt is being read by another waits for that one, and is passed over.
        """
        free = next((n for n, slot in enumerate(self.slots) if slot is None), None)
        if free is None:
            return None
        for job in self.waiting:
            group = job.group
            if group is not None and group.leader is not None:
                continue
            entry = self._start_of(job)
            of_group = group is not None and group.entry is not None
            needed = self.pages_of(job)
            shared = () if entry is None else self.shared_pages(entry)
            self.pages.share(shared)
            if not self._make_room(needed - len(shared), entry, group):
                self.pages.release(shared)
                return None
            pages = [*shared, *self.pages.take(needed - len(shared))]
            slot = Slot(free, job, pages, prompt=job.text)
            slot.length = 0 if entry is None else entry.length
            self.waiting.remove(job)
            self.slots[free] = slot
            if slot.reading:
                self._reading.append(slot)
            if group is not None:
                group.waiting -= 1
                group.leader = slot if slot.reading else None
            if self.prefix is not None and not of_group:
                self.prefix.count(entry)
            return slot, entry
        return None

    def next_chunk(self, shapes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], list[Slot]]:
        """The shape (rows, tokens) that reads most of the waiting prompts, and the slots it is for;
        one that they fill by less than half only where none is filled better.

        They go to the end of the line, so that a long prompt lets others pass between its chunks.
        """

        def useful(shape: tuple[int, int]) -> int:
            slots = list(self._reading)[: shape[0]]
            return sum(min(len(slot.prompt) - slot.length, shape[1]) for slot in slots)

        def worth(shape: tuple[int, int]) -> tuple[float, int, int]:
            size, read = shape[0] * shape[1], useful(shape)
            return min(2 * read / size, 1.0), read, -size

        shape = max(shapes, key=worth)
        count = min(shape[0], len(self._reading))
        return shape, [self._reading.popleft() for _ in range(count)]

    def has_read(self, slot: Slot, tokens: int) -> None:
        """Count a chunk that a slot has read, and put it in line again for what is missing."""
        slot.length += tokens
        if slot.reading:
            self._reading.append(slot)

    def keep(self, slot: Slot, *, complete: bool = True) -> Entry | None:
        """An entry of all that a slot holds; None without a free snapshot to put its states in."""
        while not self._free_snapshots and self._evict():
            pass
        if not self._free_snapshots:
            return None
        pages = tuple(slot.pages[: self.pages_for(slot.length)])
        self.pages.share(pages)
        return Entry(slot.length, pages, self._free_snapshots.pop(), complete)

    def remember(
        self, slot: Slot, tokens: Sequence[int], hashes: Sequence[bytes], *, complete: bool = True
    ) -> Entry | None:
        """A new entry of the prefix cache of all that a slot holds; None where that is known, or
        is of old weights, or nothing can be kept."""
        if self.prefix is None or not slot.current:
            return None
        place = self.prefix.place(tokens, slot.length, hashes)
        if self.prefix.holds(place):
            return None
        entry = self.keep(slot, complete=complete)
        if entry is not None:
            self.prefix.add(place, entry)
        return entry

    def remember_turn(self, slot: Slot, *, complete: bool) -> Entry | None:
        """Keep what a slot holds where its request ends, so that its conversation can go on; None
        where `remember` keeps nothing."""
        if self.prefix is None:
            return None
        tokens = (*slot.job.request.prompt, *slot.job.request.tokens)
        hashes = block_hashes(tokens[: slot.length], self.page_tokens)
        return self.remember(slot, tokens, hashes, complete=complete)

    def expire(self) -> None:
        """Let nothing that was computed so far serve a new request: the weights have changed."""
        while self._evict():
            pass
        for slot in self.running():
            slot.current = False
        for job in self.waiting:
            self._drop_entry(job.group)

    def forget(self, entry: Entry) -> None:
        """One user of an entry fewer; without users its pages and snapshot are released."""
        entry.users -= 1
        if not entry.users:
            self.pages.release(entry.pages)
            self._free_snapshots.append(entry.snapshot)

    def leave(self, slot: Slot) -> None:
        """Free a slot and its pages, whatever it was doing."""
        self.slots[slot.number] = None
        self.pages.release(slot.pages)
        if slot in self._reading:
            self._reading.remove(slot)
        group = slot.job.group
        if group is not None and group.leader is slot:
            group.leader = None  # another sample reads the prompt

    def drop_waiting(self, job: Job) -> None:
        """Take a request that has not started out of the queue."""
        self.waiting.remove(job)
        if job.group is not None:
            job.group.waiting -= 1
            self.release_group(job.group)

    def release_group(self, group: Group) -> None:
        """Forget a group's entry once none of its requests waits."""
        if not group.waiting:
            self._drop_entry(group)

    def _start_of(self, job: Job) -> Entry | None:
        """What a request can start from."""
        if job.group is not None and job.group.entry is not None:
            return job.group.entry
        if self.prefix is None or job.request.wanted.prompt_logprobs:
            return None  # log-probabilities of a prompt come of reading it
        return self.prefix.find(job.text, job.hashes)

    def _make_room(self, pages: int, spared: Entry | None, own: Group | None) -> bool:
        """Whether so many pages are free, once what is only kept has gone if it must.

        First entries of the prefix cache, then those of other groups, the last in the queue first:
        their next sample reads the prompt again. The request's own group keeps its entry while
        anything runs, which will leave pages behind.
        """
        if spared is not None:
            spared.users += 1
        while pages > self.pages.free and self._evict():
            pass
        for job in reversed(self.waiting):
            if pages > self.pages.free and job.group is not own:
                self._drop_entry(job.group)
        if pages > self.pages.free and not any(self.running()):
            self._drop_entry(own)
        if spared is not None:
            self.forget(spared)  # if it has gone, its snapshot is read before another is kept
        return pages <= self.pages.free

    def _drop_entry(self, group: Group | None) -> None:
        """Forget what a group keeps, if it keeps anything."""
        if group is not None and group.entry is not None:
            entry, group.entry = group.entry, None
            self.forget(entry)

    def _evict(self) -> bool:
        """Forget the entry of the prefix cache that was used longest ago; whether there was one."""
        entry = None if self.prefix is None else self.prefix.pop_oldest()
        if entry is not None:
            self.forget(entry)
        return entry is not None

    def check_sums(self) -> None:
        """Assert that pages and snapshots are held by those who run or are kept, and no others."""
        entries = {job.group.entry for job in self.waiting if job.group and job.group.entry}
        entries |= set(self.prefix or ())
        held = collections.Counter(page for slot in self.running() for page in slot.pages)
        held.update(page for entry in entries for page in entry.pages)
        found = {page: int(n) for page, n in enumerate(self.pages._holders) if n}
        assert found == dict(held), "pages are held by nobody that runs"
        snapshots = sorted(entry.snapshot for entry in entries) + self._free_snapshots
        assert sorted(snapshots) == list(range(len(snapshots))), "a snapshot is lost or held twice"
