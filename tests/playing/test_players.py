"""Any number of sessions on any budget of sandboxes; time is the turn's own matter."""

import time

import pytest

from nemotron_jax.environments import Draft, Environment, Session, ToolCall, Turn, Verdict, coding
from nemotron_jax.environments import registry as all_environments
from nemotron_jax.environments.base import OutOfTime
from nemotron_jax.environments.schema import tool
from nemotron_jax.playing import players
from nemotron_jax.playing.players import Here, time_limit

ROUNDS = 3  # of an episode below, in which it holds a sandbox


class Box:
    """The books of a sandbox that runs nothing; a wait would be for ever."""

    def __init__(self, room: int) -> None:
        self.free, self.most, self.taken = room, room, 0

    def has_room(self, limits) -> bool:
        return self.free > 0

    def take_now(self, limits) -> int | None:
        return self.take(limits) if self.free else None

    def take(self, limits) -> int:
        if not self.free:
            raise OSError("no slot was free")
        self.free, self.taken = self.free - 1, self.taken + 1
        return self.free

    def give_back(self, slot, limits) -> None:
        self.free += 1


class Held(coding.HoldingSession):
    def tool_work(self, seconds: float = 0.0) -> str:
        self.take_slot()
        time.sleep(seconds)
        if seconds < 0:
            raise OSError
        return "done"

    def answered(self, text: str) -> str | None:
        time.sleep(5 if text == "slow" else 0)
        return None

    def score(self) -> Verdict:
        time.sleep(5 if self.text == "slow verdict" else 0)
        done = [result for *_, result in self.calls] == ["done"] * (ROUNDS - 1)
        return Verdict(float(done and self.text == "end"))


class Passing(coding.CodeSession):
    def score(self) -> Verdict:
        coding.sandbox().take(self.limits)
        coding.sandbox().give_back(0, self.limits)
        return Verdict(1.0)


class Holder(Environment):
    name, summary, reward, counterpart = "holder", "Work", "done", "none"
    max_turns, session = 8, Held

    def draw(self, draws, level):
        number = {"seconds": {"type": "number"}}
        specs = (tool("work", "Works", number, optional=("seconds",)),)
        return Draft([{"role": "user", "content": f"Work {draws.below(10**6)}"}], {}, specs)

    def oracle(self, task):
        return [Turn(calls=(ToolCall("work", {}),))] * (ROUNDS - 1) + ["end"]


class Passer(Holder):
    name, session = "passer", Passing


@pytest.fixture
def box(monkeypatch):
    """Sets the number of sandboxes."""
    own = {one.name: one for one in (Holder(), Passer())}
    monkeypatch.setattr(players, "registry", own)

    def made(room: int) -> Box:
        found = Box(room)
        monkeypatch.setattr(coding, "shared", lambda: found)
        return found

    return made


def tasks(*names: str) -> list:
    own = players.registry
    return [own[name].split(0, "train", number) for number, name in enumerate(names)]


def driven(here: Here, given: list, rounds: range = range(ROUNDS)) -> dict:
    """Play these rounds of every session, each as soon as it has heard the one before."""
    turns = {n: players.registry[t.environment].oracle(t) for n, t in enumerate(given)}
    told, replies = dict.fromkeys(turns, rounds.start), {}
    while any(told[n] < rounds.stop for n in turns):
        asked = {}
        for n, own in turns.items():
            waits = n in replies and replies[n].waiting
            if waits or (told[n] < rounds.stop and not (n in replies and replies[n].over)):
                asked[n] = None if waits else Turn.of(own[told[n]]).message()
                told[n] += not waits
        if not asked:
            break
        replies |= here.reply(asked)
    return replies


@pytest.mark.parametrize("room", [1, 2, 3])
def test_any_number_of_episodes_ends_well_on_any_budget(box, room) -> None:
    sandbox, here = box(room), Here()
    given = tasks(*["holder", "passer", "holder"] * 3)
    here.start(given)
    driven(here, given)
    assert [verdict.reward for verdict in here.verify()] == [1.0] * 9
    assert sandbox.free == room and sandbox.taken >= 9
    # All turns given at once, without a look at who waits.
    here.start(given)
    for number in range(ROUNDS):
        here.reply({n: Turn.of(Holder().oracle(t)[number]).message() for n, t in enumerate(given)})
    assert [verdict.infra_error for verdict in here.verify()] == [None] * 9
    assert sandbox.free == room


def test_a_session_that_is_dropped_or_fails_gives_back_what_it_holds(box) -> None:
    sandbox, here = box(2), Here()
    given = tasks("holder", "holder", "holder")
    here.start(given)
    driven(here, given[:2], range(1))
    assert sandbox.free == 0
    assert set(here.end([0])) == {0} and sandbox.free == 1  # cut off by the caller
    assert not here.reply({2: Turn(calls=(ToolCall("work", {}),)).message()})[2].waiting
    assert sandbox.free == 0
    over = here.reply({1: Turn("<tool_response>").message()})[1]  # refused
    assert over.verdict.reward == 0 and sandbox.free == 1
    here.close()
    assert sandbox.free == 2


def test_a_session_that_nobody_closes_gives_back_its_slot(box) -> None:
    sandbox = box(1)
    session = Holder().start(tasks("holder")[0])
    session.reply(Turn(calls=(ToolCall("work", {}),)))
    assert sandbox.free == 0
    del session
    assert sandbox.free == 1


def test_players_beside_each_other_in_one_process_share_a_budget(box) -> None:
    """What is held out is played while the next batch is under way and holds every sandbox."""
    sandbox, first, second = box(1), Here(), Here()
    given = tasks("holder", "holder")
    first.start(given)
    under_way = first.reply(
        {n: Turn.of(Holder().oracle(t)[0]).message() for n, t in [*enumerate(given)]}
    )
    assert [under_way[n].waiting for n in (0, 1)] == [False, True]
    second.start(given)
    driven(second, given)
    assert [verdict.reward for verdict in second.verify()] == [1, 1]
    one = first.reply({0: Turn.of(Holder().oracle(given[0])[1]).message(), 1: None})
    assert one[0].messages[0]["content"] == "done" and one[1].waiting
    first.reply({0: Turn("end").message()})
    first.reply({1: Turn.of(Holder().oracle(given[1])[1]).message()})
    first.reply({1: Turn("end").message()})
    assert [verdict.reward for verdict in first.verify()] == [1, 1] and sandbox.free == 1


def test_calls_beyond_a_turns_time_are_not_made(box) -> None:
    box(1)
    here = Here(timeout_s=0.4)
    here.start(tasks("holder"))
    turn = Turn(calls=(ToolCall("work", {"seconds": 0.12}),) * 5)
    reply = here.reply({0: turn.message()})[0]
    said = [message["content"] for message in reply.messages]
    assert said[:2] == ["done", "done"] and not reply.over
    assert all("out of time" in one for one in said[2:]) and len(said) == 5


@pytest.mark.parametrize(
    "turn", ["slow", "slow verdict", Turn(calls=(ToolCall("work", {"seconds": 5}),))]
)
def test_what_takes_too_long_is_worth_nothing_rather_than_left_out(box, turn) -> None:
    sandbox, here = box(1), Here(timeout_s=0.2)
    given = tasks("holder", "holder")
    here.start(given)
    began = time.monotonic()
    reply = here.reply({0: Turn.of(turn).message()})[0]
    assert reply.over and time.monotonic() - began < 2 and sandbox.free == 1
    driven(here, given, range(0))
    for number in range(ROUNDS):
        here.reply({1: Turn.of(Holder().oracle(given[1])[number]).message()})
    verdicts = here.verify()
    assert [v.reward for v in verdicts] == [0, 1] and not any(v.infra_error for v in verdicts)
    assert verdicts[0].parts == {"out_of_time": 1.0}


def test_an_alarm_of_somebody_else_is_kept() -> None:
    with pytest.raises(OutOfTime), time_limit(5.0), time_limit(0.02):
        time.sleep(1)
    with pytest.raises(OutOfTime), time_limit(0.05):
        with time_limit(5.0):
            pass
        time.sleep(1)


def test_sessions_that_keep_a_sandbox_say_so() -> None:
    """A session over several turns that runs code holds; one without either is always ready."""
    for environment in all_environments.values():
        session = environment.session
        if environment.rate == "code":
            assert issubclass(session, coding.CodeSession), environment.name
        else:
            assert session.ready is Session.ready
