"""Batches are functions of the config and their number; a run goes on as if never stopped."""

import dataclasses
import functools
import json
import sys

import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config.rl import ObjectiveConfig
from nemotron_jax.data.chat.render import ChatOptions
from nemotron_jax.data.chat.tokens import prompt_length
from nemotron_jax.data.tokenizer import PHRASE_PATTERN
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.episode import UNPLAYED, Episode, TurnSpan
from nemotron_jax.playing.players import Here
from nemotron_jax.posttraining import sandboxes, success
from nemotron_jax.posttraining.curriculum import low_effort_chances, step_tasks, training_task
from nemotron_jax.posttraining.grpo import grpo_objective
from nemotron_jax.posttraining.health import check_counted, health
from nemotron_jax.posttraining.preference import rule_judge
from nemotron_jax.posttraining.rl_loop import (
    Rollouts,
    check_prompts,
    check_rollouts,
    judged,
    shaped_rewards,
)
from nemotron_jax.posttraining.sandboxes import check_sandboxes, sandbox_lines
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import loop
from nemotron_jax.training.losses import Objective
from nemotron_jax.training.prepared import first_state, prepare_run

TASK = registry["arithmetic"].split(0, "train", 0)
NAMES = ("arithmetic/0", "lookup/0", "needle/0")
NAMES_ALONE = ("arithmetic", "lookup", "needle")


def episode(reward: float, group: int, **fields) -> Episode:
    turns = (TurnSpan(1, 3, True, 1, True), TurnSpan(4, 6, False, 0, True, unclosed=True))
    logprobs = np.array([0, -1, -1, 0, -2, -2], np.float32)
    values = {
        "task": TASK,
        "group": group,
        "tokens": (5, 6, 7, 8, 9, 10),
        "logprobs": logprobs,
        "turns": turns,
        "truncated": False,
        "verdict": Verdict(reward),
        "messages": ({"role": "user", "content": "<b>1+1</b>"},),
    }
    return Episode(**values | fields)


def test_tasks_are_drawn_by_shares_and_none_twice(grpo_config) -> None:
    rollout = dataclasses.replace(
        grpo_config.rl.rollout, environments=NAMES, shares=(2.0, 1.0, 1.0), prompts=8
    )
    batches = [step_tasks(rollout, 0, number)[0] for number in range(10)]
    names = [[task.environment for task in batch] for batch in batches]
    for batch in names:
        assert abs(batch.count("arithmetic") - 4) <= 1 and abs(batch.count("needle") - 2) <= 1
    ids = [task.id for batch in batches for task in batch]
    assert len(set(ids)) == len(ids)
    again = step_tasks(rollout, 0, 7)[0]
    assert [task.id for task in again] == [task.id for task in batches[7]]
    assert [task.id for task in step_tasks(rollout, 1, 7)[0]] != [task.id for task in again]
    low = dataclasses.replace(rollout, low_effort=0.25)
    marked = [
        pair for number in range(50) for pair in zip(*step_tasks(low, 0, number), strict=True)
    ]
    # A quarter of all prompts, and all of them of mathematics: half of those are of that.
    assert 0.15 < np.mean([flag for _, flag in marked]) < 0.35
    assert {task.environment for task, flag in marked if flag} == {"arithmetic"}
    chances = low_effort_chances(dataclasses.replace(low, low_effort_environments=NAMES_ALONE))
    assert chances.tolist() == [0.25] * 3
    chances = low_effort_chances(dataclasses.replace(low, low_effort_environments=("needle",)))
    assert chances.tolist() == [0, 0, 1]
    none = dataclasses.replace(low, low_effort_environments=("equations",))
    config = dataclasses.replace(grpo_config, rl=dataclasses.replace(grpo_config.rl, rollout=none))
    with pytest.raises(
        ValueError, match=r"low_effort=0\.25: must be 0 .*equations.*arithmetic, lo"
    ):
        check_rollouts(config)


def test_length_is_paid_where_low_effort_was_asked_for(grpo_config) -> None:
    rollout = dataclasses.replace(grpo_config.rl.rollout, low_effort_tokens=8)
    low = {"low_effort": True}  # each ends with a turn of two tokens: 0.15 more for a right one
    episodes = [episode(1, 0), episode(1, 1, **low), episode(0, 1, **low)]
    episodes.append(episode(0, 1, paid=0.5, **low))
    paid = shaped_rewards(episodes, rollout, 0, 0)
    np.testing.assert_allclose(paid, [1, 1.15, 0, 0.575], rtol=1e-6)


def test_health_is_by_environment_and_leaves_failures_out() -> None:
    other = registry["lookup"].split(0, "train", 0)
    episodes = [
        episode(1, 0),
        episode(0, 0, truncated=True),
        episode(1, 1, task=other),
        episode(1, 1, task=other),
        episode(0, 1, task=other, verdict=Verdict(0.0, infra_error="gone")),
    ]
    paid = np.array([e.verdict.reward for e in episodes])
    mismatches = [1.0, 3.0, 1.0, 1.0, 9.0]
    found = health(episodes, paid, mismatches, limit=2.0)
    assert found["reward"] == 0.75 and found["reward/lookup"] == 1
    assert found["reward/arithmetic"] == 0.5 and found["truncated/arithmetic"] == 0.5
    assert found["zero_spread"] == 0.5 and found["zero_spread/lookup"] == 1
    assert found["paid"] == 0.75 and found["paid/lookup"] == 1
    compared = health(episodes, np.array([0.5, 0.5, 1, 0.25, 7]), mismatches, limit=2.0)
    assert compared["zero_spread/arithmetic"] == 1 and compared["zero_spread/lookup"] == 0
    assert compared["reward"] == 0.75 and compared["paid"] == 2.25 / 4
    assert found["masked"] == 0.25 and found["masked_right"] == 0
    assert found["infra_errors"] == found["infra_errors/lookup"] == 1
    assert found["surprise"] == 1.5 and found["calls"] == 1
    assert found["well_formed"] == found["unclosed"] == 0.5


def test_a_batch_whose_environments_all_failed_ends_the_run(capsys) -> None:
    lost = lambda reason: Verdict(0.0, infra_error=reason)
    gone = [episode(0, 0, verdict=lost("gone")) for _ in range(3)]
    gone.append(episode(0, 1, verdict=lost("two\nlines")))
    with pytest.raises(OSError, match=r"in all 4 episodes of batch 7 .* \(3 times\) with: gone; "):
        check_counted(gone, "batch 7")
    check_counted([*gone, episode(0, 2)], "batch 7")
    assert "in 4 of 5 episodes of batch 7" in capsys.readouterr().out
    unplayed = Verdict(0.0, {UNPLAYED: 1.0}, infra_error="too long")
    check_counted([episode(0, 0, verdict=unplayed)] * 2, "batch 7")  # a prompt's matter
    check_counted([episode(0, 0)], "batch 7")
    assert not capsys.readouterr().out


def test_sandboxes_that_no_process_has_room_for_are_refused(grpo_config, monkeypatch) -> None:
    rollout = dataclasses.replace(grpo_config.rl.rollout, environments=("terminal", "arithmetic"))
    with_workers = lambda count: dataclasses.replace(rollout, workers=count)
    monkeypatch.setattr(sandboxes, "budget_of_a_part", lambda parts: (5 * 504 << 20) // parts)
    check_sandboxes(with_workers(4))
    assert "terminal: 2 episodes of 504 MiB" in sandbox_lines(with_workers(1))[0]
    with pytest.raises(ValueError, match=r"workers=5: .* terminal takes 504 MiB; .* at most 4"):
        check_sandboxes(with_workers(5))
    check_sandboxes(dataclasses.replace(with_workers(5), environments=("arithmetic",)))
    check_sandboxes(dataclasses.replace(with_workers(5), worker_kind="ray"))


def test_a_misspelt_environment_is_named_under_its_own_field(grpo_config) -> None:
    rollout = dataclasses.replace(grpo_config.rl.rollout, environments=("arithmetik/1",))
    config = dataclasses.replace(
        grpo_config, rl=dataclasses.replace(grpo_config.rl, rollout=rollout)
    )
    with pytest.raises(ValueError, match=r"^rl.rollout.environments='arithmetik/1': .*arithmetic"):
        check_rollouts(config)


def test_an_unjudged_episode_counts_for_nothing(grpo_config) -> None:
    preference = dataclasses.replace(grpo_config.rl.preference, judge="rules")
    found = judged([episode(1, 0), episode(0, 0)], preference, lambda first, second: None)
    assert not any(one.counted for one in found)
    found = judged([episode(1, 0), episode(0, 0)], preference, rule_judge)
    assert [one.reward for one in found] == [4.5, 2.5]


def test_only_the_named_environments_are_paid_by_comparison(grpo_config) -> None:
    lookup = registry["lookup"].split(0, "train", 0)
    own = [episode(0.25, 1, task=lookup), episode(0.75, 1, task=lookup)]
    preference = dataclasses.replace(
        grpo_config.rl.preference, judge="rules", environments=("arithmetic",)
    )
    gone = episode(0, 0, verdict=Verdict(0.0, infra_error="gone"))
    given = [episode(1, 0), own[0], episode(0, 0), own[1], gone]
    found = judged(given, preference, rule_judge)
    assert [one.reward for one in found] == [4.5, 0.25, 2.5, 0.75, 0]
    assert [one.counted for one in found] == [True] * 4 + [False]
    preference = dataclasses.replace(preference, environments=("lookup",))
    config = dataclasses.replace(
        grpo_config, rl=dataclasses.replace(grpo_config.rl, preference=preference)
    )
    with pytest.raises(ValueError, match=r"environments=.*among those .* played: arithmetic"):
        check_rollouts(config)


def test_tasks_are_played_once_each_in_batches_of_one_shape(grpo_config, monkeypatch) -> None:
    tasks = [training_task(NAMES[n % 3], 0, n) for n in range(11)]
    asked = []

    def play(model, tokenizer, players, tasks, rollout, *, sampler, seed, execution):
        asked.append((len(tasks), seed))
        return [episode(task.index / 16, place, task=task) for place, task in enumerate(tasks)]

    monkeypatch.setattr(success, "play_episodes", play)
    config = tiny_run(grpo_config)  # plays four at a time
    rollout = config.rl.rollout
    how = {"sampler": None, "execution": config.execution}
    found = success.play_tasks_once(None, None, rollout, tasks, seed=1, **how)
    assert [one.task.id for one in found] == [task.id for task in tasks]
    assert [count for count, _ in asked] == [4] * 3 and len(set(asked)) == 3
    again = list(asked)
    success.play_tasks_once(None, None, rollout, tasks, seed=1, **how)
    assert asked[3:] == again  # before and after are played with the same draws
    success.play_tasks_once(None, None, rollout, tasks, seed=2, **how)
    assert not set(asked[6:]) & set(again)
    success.play_tasks_once(None, None, rollout, tasks[4:], seed=1, first=4, **how)
    assert asked[9:] == again[1:]  # a part is played as it would be with the rest
    plays = success.pool_plays(lambda: None, None, rollout, 0, players=Here(), **how)
    np.testing.assert_allclose(plays(tasks, 0, 0), [task.index / 16 for task in tasks])


@pytest.mark.parametrize(
    ("rl", "rollout", "message"),
    [
        ({"easy_slip": "nothing"}, {}, r"easy_slip='nothing': must be a slip .*left_to_right"),
        ({}, {"environments": NAMES + NAMES[:1]}, r"environments=.*must name each .* once"),
        ({}, {"speculative": 2}, r"speculative=2: needs an MTP block .*model.mtp is None; use 0"),
        ({}, {"workers": 129}, r"workers=129: must be at most 128, the episodes of a step"),
        ({}, {"workers": 2, "worker_kind": "ray"}, r"worker_kind='ray': the package ray is not"),
    ],
)
def test_wrong_values_are_found_before_anything_is_trained(
    grpo_config, monkeypatch, rl, rollout, message
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    rollout = dataclasses.replace(grpo_config.rl.rollout, **rollout)
    rl = dataclasses.replace(grpo_config.rl, rollout=rollout, **rl)
    with pytest.raises(ValueError, match=message):
        check_rollouts(dataclasses.replace(grpo_config, rl=rl))


def test_prompts_without_room_to_answer_are_found_before_anything_is_trained(
    grpo_config, phrases
) -> None:
    """By a tokenizer, and by what any tokenizer of its pattern needs at least."""
    tasks, _ = step_tasks(grpo_config.rl.rollout, grpo_config.seed, 0)
    options = ChatOptions(enable_thinking=False)
    for tokenizer, word in ((phrases, "has"), (PHRASE_PATTERN, "has at least")):
        shortest = min(prompt_length(tokenizer, t.messages, t.tools, options) for t in tasks)
        for limit in (2, shortest, shortest + 1):
            rollout = dataclasses.replace(grpo_config.rl.rollout, max_tokens=limit)
            if limit > shortest:
                check_prompts(rollout, grpo_config.seed, tokenizer)
                continue
            message = rf"max_tokens={limit}: the shortest prompt .* {word} {shortest} tokens"
            with pytest.raises(ValueError, match=message):
                check_prompts(rollout, grpo_config.seed, tokenizer)
    for task in tasks:
        given = task.messages, task.tools, options
        assert prompt_length(PHRASE_PATTERN, *given) <= prompt_length(phrases, *given)


def tiny_run(grpo_config, **rl):
    """Four steps of a model of the tiniest sizes."""
    model = dataclasses.replace(grpo_config.model, width=32, pattern="M")
    rollout = dataclasses.replace(
        grpo_config.rl.rollout, prompts=2, generations=2, max_tokens=96, max_turn_tokens=8
    )
    return dataclasses.replace(
        grpo_config,
        model=model,
        rl=dataclasses.replace(grpo_config.rl, rollout=rollout, **rl),
        training=dataclasses.replace(grpo_config.training, steps=4),
        data=dataclasses.replace(grpo_config.data, batch_size=4, sequence_length=96),
        mesh=dataclasses.replace(grpo_config.mesh, data=1),
        logging=dataclasses.replace(grpo_config.logging, checkpoint_every=1, evaluate_every=100),
    )


TWO_UPDATES = {"updates": 2, "objective": ObjectiveConfig(ratio="clipped")}


class Stop(Exception):
    pass


@pytest.mark.parametrize("max_age", [0, 1])
def test_a_killed_run_goes_on_as_one_that_was_not(grpo_config, phrases, tmp_path, max_age) -> None:
    config = tiny_run(grpo_config, max_age=max_age)
    begin = lambda run: first_state(run, Nemotron(config.model, rngs=nnx.Rngs(0)))
    objective = functools.partial(grpo_objective, config.rl, config.training.loss_chunk)
    counts = {"whole": [], "cut": []}

    def train(name: str, stop_at: int | None):
        def note(number, episodes, rewards):
            if number == stop_at:
                raise Stop
            counts[name].append((number, [e.tokens for e in episodes]))

        data = Rollouts(config, phrases, on_episodes=note)
        run = prepare_run(config, RunDirectory(tmp_path / name), objective=objective)
        return loop.run(run, data=data, begin=begin)

    whole = train("whole", None)
    with pytest.raises(Stop):
        train("cut", 2)
    cut = train("cut", None)
    assert [number for number, _ in counts["cut"]] == [0, 1, 2, 3]
    assert counts["cut"][0] == counts["whole"][0]
    ages = [record["age"] for record in whole.records]
    assert ages == [0, *[float(max_age)] * 3]
    for record in whole.records[: 4 if max_age == 0 else 1]:  # player and trainer are one model
        assert record["logprob_gap"] < 1e-5 and record["mismatch"] < 1.0001
    if max_age == 0:  # bit for bit; with age 1 a new cache is computed by newer weights
        assert counts["cut"] == counts["whole"]
        assert [r["loss"] for r in cut.records] == [r["loss"] for r in whole.records]
    groups = [sorted(number for number, _ in counts[name]) for name in counts]
    assert groups[0] == groups[1]
    state = Rollouts(config, phrases)
    empty = {"step": 0, "in_flight": None, "batch": None, "report": {}}
    assert json.loads(json.dumps(state.state())) == empty
    assert isinstance(objective(config.execution), Objective)


@pytest.mark.parametrize("max_age", [0, 1])
def test_a_batch_of_two_updates_is_taken_up_between_them(grpo_config, phrases, max_age) -> None:
    config = tiny_run(grpo_config, max_age=max_age, **TWO_UPDATES)
    model = Nemotron(config.model, rngs=nnx.Rngs(0))
    played = []
    note = lambda number, episodes, rewards: played.append(
        (number, [(e.task.id, e.tokens) for e in episodes])
    )
    first, second = (Rollouts(config, phrases, on_episodes=note) for _ in range(2))
    first.next_with(model)
    second.restore(json.loads(json.dumps(first.state())))
    played.clear()
    one, other = first.next_with(model), second.next_with(model)
    assert not played  # neither plays the batch again
    assert first.report() == second.report() and "reward" in second.report()
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(other, field.name)), field.name
    first.next_with(model)
    second.next_with(model)
    assert played[0][0] == 1 and played[0] == played[1]


@pytest.mark.slow  # train steps to compile, and forty to take of each
@pytest.mark.parametrize("ratio", ["one", "clipped"])
def test_what_is_paid_for_is_written_more_often(grpo_config, phrases, tmp_path, ratio) -> None:
    """The whole loop, on a task that needs no skill: tokens of even number are paid for."""
    even = lambda one: float(np.mean(np.array(one.tokens)[one.own] % 2 == 0))
    pay = lambda episodes, *unused: np.array([even(one) for one in episodes], np.float32)
    config = tiny_run(
        grpo_config,
        updates=2 if ratio == "clipped" else 1,
        objective=ObjectiveConfig(ratio=ratio, invalid_turns="mask"),
    )
    rollout = dataclasses.replace(config.rl.rollout, prompts=4, generations=8)
    rl = dataclasses.replace(config.rl, rollout=rollout)
    rate = {"peak_learning_rate": 0.04, "final_learning_rate": 0.04}
    schedule = dataclasses.replace(config.training.schedule, **rate)
    config = dataclasses.replace(
        config,
        rl=rl,
        training=dataclasses.replace(config.training, steps=40, schedule=schedule),
        data=dataclasses.replace(config.data, batch_size=32),
    )
    paid = []
    note = lambda number, episodes, rewards: paid.append(np.mean(rewards))
    data = Rollouts(config, phrases, pay=pay, on_episodes=note)
    begin = lambda run: first_state(run, Nemotron(config.model, rngs=nnx.Rngs(0)))
    objective = functools.partial(grpo_objective, config.rl, config.training.loss_chunk)
    run = prepare_run(config, RunDirectory(tmp_path), objective=objective)
    loop.run(run, data=data, begin=begin)
    # 32 episodes of 8 tokens: by chance the mean of a batch is 0.5 ± 0.03. Measured at the end:
    # 1.00 where the ratio is one, 0.97 after half as many batches where it is clipped.
    assert abs(paid[0] - 0.5) < 0.12 and np.mean(paid[-3:]) > 0.85
