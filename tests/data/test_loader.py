"""One global batch for any number of hosts, and a resumed run that was never stopped."""

import dataclasses
import json

import numpy as np
import pytest

from nemotron_jax.data.loader import TrainLoader, held_out_batches, held_out_row_count
from nemotron_jax.data.packing import make_batch

FIELDS = ("tokens", "targets", "mtp_tokens", "segment_ids", "weights")


def assert_equal(first, second):
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field), field)


def joined(batches):
    return {field: np.concatenate([getattr(b, field) for b in batches]) for field in FIELDS}


@pytest.fixture
def make(corpus, data):
    """Makes loaders, and stops their threads at the end."""
    loaders = []

    def build(seed=0, mtp_depths=2, config=data, **hosts):
        loaders.append(TrainLoader(corpus, config, seed, mtp_depths, **hosts))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()


def test_the_iterator_gives_the_batches_by_step(make):
    loader, other = make(), make()
    for step in range(12):
        assert_equal(next(loader), other.batch_at(step))
    rows = [other.global_row(r) for r in range(5 * 12, 6 * 12)]
    assert_equal(other.batch_at(5), make_batch(rows, 2))


@pytest.mark.parametrize("host_count", [2, 3, 12])
def test_any_host_count_gives_the_same_global_batch(make, host_count):
    whole = make()
    hosts = [
        make(rows=range(12)[h * 12 // host_count :][: 12 // host_count]) for h in range(host_count)
    ]
    for _ in range(4):
        expected = next(whole)
        parts = joined([next(host) for host in hosts])
        for field in FIELDS:
            np.testing.assert_array_equal(parts[field], getattr(expected, field))
    assert all(host.state() == whole.state() for host in hosts)


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_resumed_loader_goes_on_as_if_never_stopped(make, stop):
    loader, straight = make(seed=5), make(seed=5)
    for _ in range(stop):
        next(loader)
        next(straight)
    state = json.loads(json.dumps(loader.state()))
    assert state["step"] == stop and sum(state["source_rows"]) == stop * 12
    resumed = make(seed=5)
    next(resumed)
    resumed.restore(state)
    hosts = [make(seed=5, rows=rows) for rows in (range(6), range(6, 12))]
    for host in hosts:
        host.restore(state)
    for _ in range(5):
        expected = next(straight)
        assert_equal(next(resumed), expected)
        parts = joined([next(host) for host in hosts])
        np.testing.assert_array_equal(parts["targets"], expected.targets)
    assert resumed.state() == straight.state()


def test_rows_follow_the_mixture(make, corpus):
    loader = make()
    # the sources' rows are told apart by where they lie in each source's own stream
    lengths = [len(documents.tokens) for documents in corpus.train]
    streams = [
        "".join(map(chr, loader._streams[s].read(0, 3 * lengths[s]).tokens)) for s in range(2)
    ]
    given = [0, 0]
    for row in range(60):
        text = "".join(map(chr, loader.global_row(row).tokens[:37]))
        source = next(s for s in range(2) if streams[s][given[s] * 37 :].startswith(text))
        given[source] += 1
        assert abs(given[0] - 0.7 * (row + 1)) < 1
    assert given == [42, 18]


def test_batches_differ_by_seed_and_repeat_by_run(make):
    assert_equal(make(seed=1).batch_at(3), make(seed=1).batch_at(3))
    assert not np.array_equal(make(seed=1).batch_at(3).tokens, make(seed=2).batch_at(3).tokens)


def test_a_state_of_other_data_is_an_error_naming_the_field(make, data):
    state = make(seed=1).state()
    longer = dataclasses.replace(data, sequence_length=38)
    weights = dataclasses.replace(data, source_weights=(0.5, 0.5))
    cases = {
        "seed=1 here 2": make(seed=2),
        "sequence_length=37 here 38": make(seed=1, config=longer),
        r"source_weights=\[0.7, 0.3\] here \[0.5, 0.5\]": make(seed=1, config=weights),
    }
    for words, loader in cases.items():
        with pytest.raises(ValueError, match=words):
            loader.restore(state)
    loader = make(seed=1)
    for words, changed in {
        "corpus='other'": state | {"corpus": "other"},
        "source_rows": state | {"source_rows": [1, 2]},
        "format_version=9": state | {"format_version": 9},
        "step or grain state is missing": {k: v for k, v in state.items() if k != "grain"},
        "format_version=None": {},
    }.items():
        with pytest.raises(ValueError, match=words):
            loader.restore(changed)
    assert_equal(next(loader), make(seed=1).batch_at(0))  # and the loader is as before


def test_hosts_may_hold_any_rows_and_the_same_ones(make):
    whole, rows = make().batch_at(3), [1, 4, 5, 10]
    for one in (make(rows=rows), make(rows=rows)):
        for field in FIELDS:
            part = getattr(one.batch_at(3), field)
            np.testing.assert_array_equal(part, getattr(whole, field)[rows])


def test_held_out_batches_hold_every_row_once(corpus, data):
    data = dataclasses.replace(data, batch_size=15)
    total = held_out_row_count(corpus, data)
    assert total > 15 and total % 15  # the last batch needs padding rows
    whole = held_out_batches(corpus, data, 2, 10**6)
    assert len(whole) == -(-total // 15)
    scored = sum(batch.weights[..., 0].sum() for batch in whole)
    documents = len(corpus.held_out.offsets) - 1
    assert scored == corpus.facts.tokens - documents
    few = held_out_batches(corpus, data, 2, 5)
    assert len(few) == 1 and not few[0].weights[5:].any()
    assert_equal(
        dataclasses.replace(few[0], **{f: getattr(few[0], f)[:5] for f in FIELDS}),
        dataclasses.replace(whole[0], **{f: getattr(whole[0], f)[:5] for f in FIELDS}),
    )
