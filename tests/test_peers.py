"""Processes meet, exchange values, and hear when one of them ends; here they are threads."""

import concurrent.futures
import json
import socket
import threading

import pytest

from nemotron_jax import peers


class Run:
    """Some members of a run, each made in a thread of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.server = count, peers.listen(0)
        self.port = self.server.getsockname()[1]
        self.losses = [threading.Event() for _ in range(count)]
        self.pool = concurrent.futures.ThreadPoolExecutor(count)

    def first(self, count=None, **facts):
        on_loss, own = self.losses[0].set, facts.pop("join_s", 20.0)
        args = (self.server, count or self.count, facts, on_loss)
        return self.pool.submit(peers.gather, *args, told="welcome", join_s=own)

    def other(self, index, count=None, join_s=20.0, **facts):
        args = ("localhost", self.port, count or self.count, index, facts)
        on_loss = self.losses[index % self.count].set
        return self.pool.submit(peers.reach, *args, on_loss, join_s=join_s)

    def whole(self):
        made = [self.first(), *(self.other(index) for index in range(1, self.count))]
        return [one.result() for one in made]

    def cut(self, member):
        """The end of a process, as its system makes it."""
        for link in member._links.values():
            link.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def make_run(monkeypatch):
    monkeypatch.setattr(peers, "GRACE_S", 0.0)
    runs = []
    yield lambda count: runs.append(Run(count)) or runs[-1]
    for run in runs:
        run.server.close()
        run.pool.shutdown()


def test_everyone_hears_what_all_have_said_in_order(make_run):
    run = make_run(3)
    members = run.whole()
    assert [member.told for member in members] == ["welcome"] * 3
    say = lambda member: [member.exchange([member.index, n]) for n in range(20)]
    for heard in run.pool.map(say, members):
        assert heard == [[[index, n] for index in range(3)] for n in range(20)]


def test_exchanges_of_two_names_do_not_wait_for_each_other(make_run):
    first, second = make_run(2).whole()
    early = [first.say(1, "stop"), first.say(2, "stop")]
    keys = second.say("b"), first.say("a")
    assert second.hear(keys[0]) == first.hear(keys[1]) == ["a", "b"]
    late = [second.say(3, "stop"), second.say(4, "stop")]
    assert [first.hear(key) for key in early] == [[1, 3], [2, 4]]
    assert [second.hear(key) for key in late] == [[1, 3], [2, 4]]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_one_that_ends_is_heard_of_by_all_others(make_run, gone):
    run = make_run(3)
    members = run.whole()
    rest = [member for member in members if member.index != gone]
    waiting = [run.pool.submit(member.exchange) for member in rest]
    run.cut(members[gone])
    for member, exchange in zip(rest, waiting, strict=True):
        assert run.losses[member.index].wait(20)
        with pytest.raises(peers.PeerEnded, match="another process of this run ended"):
            exchange.result()


def test_one_that_says_goodbye_is_not_lost(make_run):
    run = make_run(2)
    members = run.whole()
    for member in members:
        member.goodbye()
    run.cut(members[1])
    assert not members[0].lost.wait(0.3) and not any(event.is_set() for event in run.losses)


def test_one_that_gives_no_sign_of_life_is_lost(make_run, monkeypatch):
    """A process that is stopped but alive, or whose machine is gone without a word."""
    monkeypatch.setattr(peers, "SILENT_S", 0.2)
    run = make_run(2)
    first = run.first()
    with socket.create_connection(("localhost", run.port)) as mute:
        mute.sendall(json.dumps([peers._FORMAT, 1, 2, {}]).encode() + b"\n")
        assert first.result().lost.wait(20)
    assert run.losses[0].wait(20)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"index": 1, "count": 3}, "process 1 .*--process_count=3 .*process 0 .*=2; start all"),
        ({"index": 0}, "two processes were started with --process_index=0; number them from 0"),
        ({"index": 1, "steps": "9"}, "process 1 .* steps=9 and not 8; start all with the same"),
    ],
)
def test_processes_started_otherwise_are_all_told_so(make_run, second, message):
    run = make_run(2)
    for one in (run.first(steps="8"), run.other(**{"steps": "8"} | second)):
        with pytest.raises(ValueError, match=message):
            one.result()


def test_two_of_one_number_are_told_so(make_run):
    run = make_run(3)
    for one in (run.first(), run.other(1), run.other(1)):
        with pytest.raises(ValueError, match="two processes were started with --process_index=1"):
            one.result()


def test_those_who_do_not_come_are_named(make_run):
    run = make_run(4)
    first, second = run.first(join_s=1.0), run.other(2, join_s=9.0)
    message = "within 1 s no process came with --process_index=1, 3; start all of them"
    with pytest.raises(TimeoutError, match=message):
        first.result()
    with pytest.raises(ValueError, match=message):
        second.result()


def test_without_process_0_the_address_is_named():
    with pytest.raises(TimeoutError, match="--coordinator=localhost:.* no process 0 answered"):
        peers.reach("localhost", peers.free_port(), 2, 1, {}, print, join_s=0.1)


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n", b"5\n", b"[]\n", b'["x"]\n', b""])
def test_strangers_are_sent_away(make_run, words):
    run = make_run(2)
    first = run.first()
    with socket.create_connection(("localhost", run.port)) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        members = [run.other(1).result(), first.result()]
    assert [member.count for member in members] == [2, 2]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:8476", ("10.0.0.1", 8476)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        *((text, None) for text in ("host", "host:", ":80", "host:0", "host:99999", "fd00::1:80")),
    ],
)
def test_addresses(text, address):
    assert peers.host_and_port(text) == address
