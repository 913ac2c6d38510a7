"""Episodes whose environments wait for each other are those of environments that do not."""

import dataclasses
import json

import pytest

from nemotron_jax.data.messages import oracle_conversation
from nemotron_jax.playing.conversations import Written
from nemotron_jax.playing.players import Here
from nemotron_jax.playing.rollout import Playing, play_episodes
from tests.playing.alone import Alone
from tests.playing.test_rollout import ENVIRONMENT, TASKS, Scripted, own_turns, play


class ByRow(Scripted):
    """Writes each row's next turn, however many turns others have had."""

    def write(self, limits):
        done = self.done = getattr(self, "done", None) or [0] * len(limits)
        out = []
        for row, limit in enumerate(limits):
            new = tuple(self.scripts[row][done[row]][:limit]) if limit else ()
            done[row] += bool(limit)
            out.append(Written(new, (-1.0,) * len(new), bool(new) and new[-1] == self.stop))
            self.heard[row] += new
        return out


class OneAtATime(Here):
    def start(self, tasks) -> None:
        alone = Alone(ENVIRONMENT)
        self.start_with([(alone, task) for task in tasks])


@pytest.mark.parametrize("stop_after", [None, 1, 2, 4])
def test_episodes_that_wait_for_each_other_are_those_that_do_not(
    phrases, grpo_config, stop_after
) -> None:
    """However long one waits, and where it is interrupted meanwhile."""
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    plain, _ = play(phrases, grpo_config, scripts)
    begin = lambda sampler: Playing(
        phrases, OneAtATime(), TASKS, grpo_config.rl.rollout, copies=1, seed=0, sampler=sampler
    )
    sampler = ByRow(scripts)
    playing, rounds = begin(sampler), 0
    while not playing.over:
        playing.turn(None)
        rounds += 1
        if rounds == stop_after:
            saved = json.loads(json.dumps(playing.state()))
            later = ByRow(scripts)
            later.done = list(sampler.done)
            playing = begin(later)
            playing.restore(saved)
    assert rounds > 3  # of which every episode writes three
    for one, other in zip(plain, playing.finish(), strict=True):
        assert (one.tokens, one.messages, one.verdict, one.truncated) == (
            *(other.tokens, other.messages, other.verdict, other.truncated),
        )


def test_what_does_not_go_on_gives_back_what_it_holds(phrases, grpo_config) -> None:
    """One that is cut off, by its tokens or its number of turns, is judged before it is over."""
    scripts = [own_turns(phrases, oracle_conversation(ENVIRONMENT, task)) for task in TASKS]
    longest = len(scripts[0][0])
    for changes in ({"max_turns": 1}, {"max_turns": 2}, {"max_turn_tokens": longest - 2}):
        settings = dataclasses.replace(grpo_config.rl.rollout, **changes)
        episodes = play_episodes(
            *(None, phrases, OneAtATime(), TASKS, settings),
            copies=1,
            seed=0,
            sampler=ByRow(scripts),
        )
        assert all(len(one.turns) and one.counted for one in episodes)
