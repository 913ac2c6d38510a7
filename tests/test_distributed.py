"""What processes of a run do together, with partners that are scripted; and alone, for nothing."""

import pytest

from nemotron_jax import command_line, distributed, host
from nemotron_jax.training.signals import StopSignal


class Partner:
    """This process's peers: `answers` are what the other one says in each exchange."""

    def __init__(self, index, answers):
        self.index, self.count, self.answers, self.said = index, 2, list(answers), []

    def say(self, value, name):
        self.said.append(value)
        return value, self.answers.pop(0)

    def hear(self, key):
        return list(key) if self.index == 0 else list(reversed(key))


@pytest.fixture
def partner(monkeypatch):
    def make(index, *answers):
        monkeypatch.setattr(distributed, "_peers", Partner(index, answers))
        return distributed._peers

    return make


def test_one_process_is_the_first_and_waits_for_nobody():
    assert distributed.process_count() == 1 and distributed.is_first()
    assert distributed.hear(distributed.say(7)) == [7]
    assert distributed.from_first(lambda: 8) == 8
    made = []
    distributed.first_alone(lambda: made.append(1))
    assert made == [1] and not distributed.lost(99.0)
    distributed.meet()
    distributed.leave(0)


def test_the_others_take_what_the_first_has_made_and_its_error(partner):
    partner(1, (None, 5), ("data.sources: is gone", None))
    unwanted = lambda: pytest.fail("only the first makes it")
    assert distributed.from_first(unwanted) == 5
    with pytest.raises(ValueError, match="data.sources: is gone"):
        distributed.from_first(unwanted)


def test_the_first_tells_its_value_and_its_error(partner):
    peers = partner(0, None, None)
    assert distributed.from_first(lambda: 5) == 5

    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        distributed.from_first(fails)
    assert peers.said == [(None, 5), ("no", None)]


@pytest.mark.parametrize("index", [0, 1])
def test_files_are_made_by_the_first_and_found_by_the_others(partner, index):
    partner(index, (None, None))
    made = []
    distributed.first_alone(lambda: made.append(index))
    assert made == [index]


def test_a_directory_that_is_not_shared_is_refused(partner, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_SEEN_WITHIN_S", 0.0)
    partner(1, (None, ".seen-1"), True)
    message = f"--workdir={tmp_path}: process 1 does not see what process 0 writes there"
    with pytest.raises(ValueError, match=message):
        distributed.check_shared("workdir", tmp_path)
    partner(0, None, True)
    distributed.check_shared("workdir", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_signal_to_either_stops_both_after_the_same_step(partner):
    """Of two processes, of which the second is asked before its third step, both stop before the
    fourth."""
    asked = [[False] * 4, [False, False, True, True]]
    for index in (0, 1):
        partner(index, *asked[1 - index])
        stop, steps = StopSignal(), 0
        for flag in asked[index]:
            stop.requested = flag
            if stop.agreed():
                break
            steps += 1
        assert steps == 3


def test_devices_are_shared_evenly_or_refused(partner, monkeypatch):
    partner(0)
    assert command_line.devices_here(6, "mesh.data=6") == 3
    with pytest.raises(ValueError, match="--process_count=2: 3 devices of mesh.data=3 cannot be"):
        command_line.devices_here(3, "mesh.data=3")
    flag = "--xla_force_host_platform_device_count"
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 {flag}=8")
    host.show_cpu_devices(3)
    assert f"{flag}=8" in host.os.environ["XLA_FLAGS"]  # a user's own
    host.show_cpu_devices(3, processes=2)
    flags = host.os.environ["XLA_FLAGS"].split()
    assert f"{flag}=3" in flags and f"{flag}=8" not in flags and "--xla_a=1" in flags
