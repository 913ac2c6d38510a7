"""Pages are held by those who run; the queue is fair; nothing is left behind."""

import random

import pytest

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.decoding.prefix_cache import Entry, PrefixCache, block_hashes
from nemotron_jax.decoding.request import Request, Wanted
from nemotron_jax.decoding.scheduler import Group, Job, Pages, Scheduler


def job(prompt: int, new: int, group: Group | None = None) -> Job:
    return Job(Request((5,) * prompt, Wanted(new), 0, lambda: False), group, None)


def scheduler(**sizes: int) -> Scheduler:
    return Scheduler(**{"slots": 3, "pages": 8, "page_tokens": 4, "snapshots": 1, **sizes})


def start_all(there: Scheduler) -> list:
    started = []
    while (pair := there.start_next()) is not None:
        started.append(pair[0])
    return started


def test_a_page_is_free_once_its_last_holder_has_gone():
    pages = Pages(4)
    taken = pages.take(3)
    pages.share(taken[:2])
    pages.release(taken)
    assert pages.free == 2
    with pytest.raises(AssertionError, match="free page"):
        pages.share([taken[2]])
    pages.release(taken[:2])
    assert pages.free == 4
    with pytest.raises(AssertionError, match="twice"):
        pages.release(taken[:1])


def test_none_overtakes_one_that_waits_for_pages():
    there = scheduler()
    for new in (19, 19, 3):  # 5, 5 and 1 pages of 8
        there.waiting.append(job(1, new))
    (first,) = start_all(there)
    there.leave(first)
    assert [slot.left for slot in start_all(there)] == [19, 3]
    there.check_sums()


def test_a_long_prompt_lets_short_ones_pass_between_its_chunks():
    there = scheduler(pages=40)
    for prompt in (100, 3, 4):
        there.waiting.append(job(prompt, 1))
    start_all(there)
    read = []
    while there.reading:
        (_, chunk), slots = there.next_chunk(((1, 16),))
        for slot in slots:
            read.append(len(slot.prompt))
            there.has_read(slot, min(chunk, len(slot.prompt) - slot.length))
    assert read[:4] == [100, 3, 4, 100]


def test_the_chunk_that_reads_most_is_chosen():
    there = scheduler(pages=40)
    for prompt in (6, 7, 5):
        there.waiting.append(job(prompt, 1))
    start_all(there)
    shapes = ((1, 16), (4, 8))
    shape, slots = there.next_chunk(shapes)
    assert shape == (4, 8) and len(slots) == 3
    there.waiting.clear()
    for slot in slots:
        there.leave(slot)
    there.waiting.append(job(90, 1))
    start_all(there)
    assert there.next_chunk(shapes)[0] == (1, 16)


def test_a_long_prompt_is_read_in_long_pieces_and_its_rest_in_short_ones():
    there = scheduler(pages=2000)
    shapes = EngineConfig(max_length=4096).prefill_shapes
    assert shapes == ((1, 256), (1, 1024), (8, 32)) and EngineConfig(
        max_length=4095
    ) == EngineConfig(max_length=4095, prefill_shapes=((8, 32), (1, 256)))
    there.waiting.append(job(2300, 1))
    (slot,) = start_all(there)
    read = []
    while slot.reading:
        (_, tokens), _ = there.next_chunk(shapes)
        read.append(tokens)
        there.has_read(slot, min(tokens, len(slot.prompt) - slot.length))
    assert read == [1024, 1024, 256]


def test_samples_of_a_prompt_start_where_its_reader_stood_and_share_whole_pages():
    there = scheduler(slots=4, pages=20)
    group = Group(waiting=3)
    for _ in range(3):
        there.waiting.append(job(10, 6, group))
    there.waiting.append(job(2, 2))
    leader, other = start_all(there)  # the others wait for the leader, and hold nobody up
    assert other.job.group is None
    there.has_read(leader, 10)
    group.leader, group.entry = None, there.keep(leader)
    samples = start_all(there)
    assert len(samples) == 2 and not any(slot.reading for slot in samples)
    for slot in samples:
        assert slot.pages[:2] == leader.pages[:2]  # 8 of 10 tokens lie in whole pages
        assert not set(slot.pages[2:]) & set(leader.pages)
    there.leave(leader)
    there.release_group(group)
    for slot in (*samples, other):
        there.leave(slot)
    assert there.pages.free == 20 and there.free_snapshots == 1


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_leaves_nothing_behind(seed):
    random_traffic(seed, None)


def random_traffic(seed: int, prefix: PrefixCache | None) -> None:
    """Submit, read, keep, cancel and leave at random; the books balance after every move."""
    draw = random.Random(seed)
    there = scheduler(slots=4, pages=24, snapshots=2, prefix=prefix)

    def submit() -> None:
        size = draw.choice((1, 1, 3))
        group = Group(waiting=size) if size > 1 else None
        prompt, new = draw.randint(1, 40), draw.randint(1, 40)
        there.waiting.extend(job(prompt, new, group) for _ in range(size))
        for one in there.waiting:
            one.hashes = block_hashes(one.request.prompt, 4)

    def read() -> None:
        if not there.reading:
            return
        (_, chunk), slots = there.next_chunk(((1, 16), (4, 8)))
        for slot in slots:
            there.has_read(slot, min(chunk, len(slot.prompt) - slot.length))
            there.remember(slot, slot.prompt, slot.job.hashes)
            group = slot.job.group
            if not slot.reading and group is not None and group.leader is slot:
                group.leader, group.entry = None, there.keep(slot) if group.waiting else None

    def leave() -> None:
        if running := list(there.running()):
            there.leave(draw.choice(running))

    def cancel() -> None:
        if there.waiting:
            there.drop_waiting(draw.choice(there.waiting))

    def start() -> None:
        while (pair := there.start_next()) is not None:
            if pair[0].job.group is not None:
                there.release_group(pair[0].job.group)

    for _ in range(400):
        draw.choice((submit, start, read, read, leave, leave, cancel, submit, start))()
        if draw.random() < 0.02:
            there.expire()
        there.check_sums()
    while there.waiting or any(there.running()):
        start()
        read()
        leave()
    there.expire()
    assert there.pages.free == 24 and there.free_snapshots == 2 and not there.reading


def test_a_prefix_is_found_where_tokens_agree_and_nowhere_else():
    text = list(range(50, 70))
    cache, known = PrefixCache(4), {}
    for length, complete in ((4, True), (8, True), (11, True), (13, False), (20, True)):
        known[length] = Entry(length, (), 0, complete)
        cache.add(cache.place(text, length, block_hashes(text, 4)), known[length])
    find = lambda tokens: cache.find(tokens, block_hashes(tokens, 4))
    assert find(text) is known[20] and find([*text, 1, 2]) is known[20]
    assert find(text[:19]) is known[13] and find(text[:14]) is known[13]
    assert find(text[:13]) is known[11], "the next token cannot be drawn from the one of 13"
    assert find([*text[:10], 0, 0, 0]) is known[8]
    assert find([*text[:5], 0]) is known[4] and find([0, *text]) is None and find([50]) is None
    by_use = [known[n] for n in (20, 13, 11, 8, 4)]
    assert [cache.pop_oldest() for _ in range(6)] == [*by_use, None]
    assert find(text) is None and not len(cache)


def test_entries_go_oldest_first_where_a_request_wants_their_pages():
    there = scheduler(slots=2, pages=6, snapshots=4, prefix=PrefixCache(4))
    for token in (1, 2):
        done = Request((token,) * 8, Wanted(4), 0, lambda: False)
        there.waiting.append(Job(done, None, None, block_hashes(done.prompt, 4)))
        ((slot),) = start_all(there)
        there.has_read(slot, 8)
        assert there.remember(slot, slot.prompt, slot.job.hashes) is not None
        assert there.remember(slot, slot.prompt, slot.job.hashes) is None, "known already"
        there.leave(slot)
        there.check_sums()
    assert there.pages.free == 2
    again = Request((1,) * 8 + (3,) * 4, Wanted(4), 0, lambda: False)
    there.waiting.append(Job(again, None, None, block_hashes(again.prompt, 4)))
    slot, entry = there.start_next()  # shares two pages and takes the two that are free
    assert entry.length == slot.length == 8 and there.pages.free == 0 and len(there.prefix) == 2
    there.waiting.append(job(1, 7))
    there.start_next()
    assert [kept.length for kept in there.prefix] == [8] and there.pages.free == 0
    there.check_sums()
    there.expire()
    assert not slot.current and there.remember(slot, slot.prompt, slot.job.hashes) is None
    there.check_sums()


@pytest.mark.parametrize("seed", range(3))
def test_random_traffic_with_a_prefix_cache_leaves_nothing_behind(seed):
    random_traffic(seed, PrefixCache(4))
