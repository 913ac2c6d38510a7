"""Every request ends: what can fit gets through, and what never can is refused."""

import random

import pytest

from nemotron_jax.decoding.admission import QueueFull, Standstill
from nemotron_jax.decoding.engine import Engine
from tests.decoding import engines
from tests.decoding.engines import assert_empty, submit
from tests.decoding.fake_runner import VOCABULARY, expected

# Slots, pages, tokens of a page, the longest text, snapshots: each is short of something.
SHAPES = [
    (1, 4, 16, 64, 1),
    (4, 4, 16, 64, 4),
    (3, 9, 4, 32, 1),
    (6, 11, 8, 48, 4),
    (2, 8, 8, 64, 2),
]


def ends(engine: Engine, most_steps: int = 3000) -> bool:
    return any(not engine.step() for _ in range(most_steps))


@pytest.mark.parametrize("options", [{}, {"prefix_cache": True}, {"speculative": 2}], ids=str)
@pytest.mark.parametrize("slots, pages, n", [(1, 4, 2), (4, 4, 3), (4, 5, 2), (2, 8, 4)])
@pytest.mark.parametrize("length", [1, 10, 16, 33, 48, 63])
def test_samples_end_where_one_fills_the_pages(fake, options, slots, pages, n, length):
    engine = fake(slots=slots, pages=pages, max_length=64, page_tokens=16, **options)
    samples = submit(engine, [5] * length, max_new_tokens=64 - length, n=n, prompt_logprobs=True)
    assert ends(engine) and all(sample.done for sample in samples)
    for sample in samples:
        assert sample.tokens == expected(sample, engine.config.speculative)[0]
        assert len(sample.prompt_logprobs) == length - 1
    assert_empty(engine)


def traffic(engine: Engine, seed: int, count: int) -> None:
    """Random groups, cancels and changes of weights; every request ends, and is what it is where
    nothing runs beside it unless it lived through a change."""
    draw, living, version, over = random.Random(seed), [], 0, []
    bases = [[draw.randrange(3, VOCABULARY) for _ in range(64)] for _ in range(3)]
    models = engines.old_model(), engines.new_model()
    while count or living:
        move = draw.random()
        if move < 0.3 and count:
            length = draw.randint(1, engine.config.max_length - 1)
            new = draw.randint(1, engine.config.max_length - length)
            wanted = {"seed": draw.randrange(99), "stop_tokens": draw.randrange(3, VOCABULARY)}
            options = {"n": draw.choice((1, 2, 3, 5)), "prompt_logprobs": draw.random() < 0.2}
            try:
                found = submit(
                    engine, draw.choice(bases)[:length], max_new_tokens=new, **options, **wanted
                )
                living += [(one, version) for one in (found if options["n"] > 1 else [found])]
                count -= 1
            except QueueFull:
                engine.step()
        elif move < 0.33 and living:
            draw.choice(living)[0].cancel()
        elif move < 0.335:
            version += 1
            engine.replace_weights(models[version % 2], version)
        else:
            engine.step()
        over += [pair for pair in living if pair[0].done]
        living = [pair for pair in living if not pair[0].done]
        engine._scheduler.check_sums()
    for request, began in over:
        tokens = expected(request, engine.config.speculative, began)[0]
        if set(request.versions) <= {began}:
            assert request.tokens == tokens[: len(request.tokens)]
            assert request.finish_reason == "cancelled" or request.tokens == tokens
    assert engine.stats().new_tokens == sum(len(request.tokens) for request, _ in over)


@pytest.mark.parametrize("speculative", [0, 3])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_groups_end_where_something_is_short(fake, shape, prefix, speculative):
    slots, pages, page_tokens, max_length, snapshots = shape
    sizes = {"slots": slots, "pages": pages, "page_tokens": page_tokens, "max_length": max_length}
    sizes |= {"snapshots": snapshots, "prefix_cache": prefix, "max_waiting": 30, "version": 0}
    engine = fake(speculative, **sizes)
    traffic(engine, seed=slots, count=25)
    engine._scheduler.expire()
    stats = engine.stats()
    assert (stats.free_pages, stats.free_snapshots) == (pages, snapshots)


def test_a_standstill_is_an_error_that_names_the_request_and_what_it_needs(fake):
    engine = fake(pages=6)
    lost = engine._scheduler.pages.take(3)  # as a fault of the books would
    request = submit(engine, [5] * 20, max_new_tokens=12)
    with pytest.raises(Standstill, match=r"Request\(20 prompt .*needs 4 pages, and 3 of 6 are"):
        engine.run()
    assert lost and not request.done
    engine.run()  # begins with all pages
    assert request.tokens == expected(request, 0)[0]


def test_a_request_that_its_engine_has_lost_is_an_error(fake):
    engine = fake()
    request = submit(engine, [5], max_new_tokens=3)
    engine._scheduler.waiting.clear()
    with pytest.raises(RuntimeError, match="serves it no more"):
        request.wait()


def test_more_samples_than_ever_wait_together_are_refused_for_good(fake):
    engine = fake(max_waiting=3)
    with pytest.raises(ValueError, match="n=4 samples never wait together where max_waiting=3"):
        submit(engine, [5], max_new_tokens=1, n=4)
    submit(engine, [5], max_new_tokens=1, n=3)
    with pytest.raises(QueueFull):
        submit(engine, [5], max_new_tokens=1)
