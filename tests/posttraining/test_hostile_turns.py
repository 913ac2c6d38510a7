"""Whatever a model, an environment or a judge says: a reward or a reason, and the run goes on."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from nemotron_jax.config.run import RunConfig
from nemotron_jax.environments import registry
from nemotron_jax.playing.workers import make_players
from nemotron_jax.posttraining import policy_batch, rl_loop
from nemotron_jax.posttraining.rl_loop import Rollouts
from nemotron_jax.posttraining.transcripts import Transcripts, read_transcripts, write_page
from nemotron_jax.run_directory import RunDirectory
from tests.posttraining import hostile

SANDBOXED = ("python_tool", "sql", "code_tests", "bug_repair", "terminal", "command_equivalence")
# Without a sandbox, few of whose tasks are slow to draw, and one of somebody's own.
FEW = ("hostile", "tool_schema/1", "arithmetic/1", "lookup/0", "structured_json/1", "retention/0")


@pytest.fixture(autouse=True)
def no_model(monkeypatch) -> None:
    """Batches are scored without a model, as the generator has scored them or nearly."""
    hostile.register()
    monkeypatch.setattr(policy_batch, "place_batch", lambda arrays: arrays)
    score = lambda model, tokens, *unused, **options: np.full(tokens.shape, -0.6, np.float32)
    monkeypatch.setattr(rl_loop, "score_tokens", score)


@pytest.fixture
def judge():
    server = hostile.Judge()
    yield server
    server.close()


def run_of(config: RunConfig, names, steps: int, *, tokens: int, prompts: int, **rl) -> RunConfig:
    rollout = dataclasses.replace(
        config.rl.rollout,
        environments=tuple(names),
        shares=tuple(3.0 if name == "hostile" else 1.0 for name in names),
        prompts=prompts,
        generations=2,
        max_tokens=tokens,
        max_turn_tokens=tokens,
        max_turns=4,
        workers=rl.pop("workers", 0),
        thinking=bool(rl.pop("thinking", False)),
    )
    rl = {"easy_slip": "", "transcripts": 2 * prompts, "rollout": rollout} | rl
    return dataclasses.replace(
        config,
        rl=dataclasses.replace(config.rl, **rl),
        training=dataclasses.replace(config.training, steps=steps),
        data=dataclasses.replace(config.data, batch_size=2 * prompts, sequence_length=tokens),
        mesh=dataclasses.replace(config.mesh, data=1),
    )


def played(config: RunConfig, tokenizer, directory: Path, *, large: float, every: int):
    """A run that is stopped after every so many batches, or killed in the middle of writing one,
    and begun again: the tokens of each batch, in order, and how many turns were written."""
    model, seen = hostile.Model(tokenizer, large), []

    def begin() -> Rollouts:
        transcripts = Transcripts(RunDirectory(directory), config.rl.transcripts)

        def note(number, episodes, rewards) -> None:
            for episode, reward in zip(episodes, rewards, strict=True):
                reason = episode.verdict.infra_error
                assert math.isfinite(reward) and (reason is None or (reason and str(reason)))
            seen.append((number, [(e.tokens, e.counted) for e in episodes], rewards))
            transcripts.add(number, episodes, rewards)

        players = make_players(config.rl.rollout)
        return Rollouts(config, tokenizer, players=players, sampler=model, on_episodes=note)

    rollouts, steps = begin(), config.training.steps
    for step in range(1, steps + 1):
        batch = rollouts.next_with(None)
        assert all(np.all(np.isfinite(a)) for a in dataclasses.astuple(batch) if a is not None)
        json.dumps(dict(rollouts.report()), allow_nan=False)
        if step % every == 0:
            saved = json.dumps(rollouts.state())
            if step % (2 * every) == 0 and step < steps:
                rollouts.next_with(None)  # is written, and lost with the process
                with (directory / "transcripts.jsonl").open("ab") as out:
                    out.write(b'{"batch": 9, "messages": [{"role": "\xff')
            rollouts.close()
            rollouts = begin()
            rollouts.restore(json.loads(saved))
    rollouts.close()
    assert model.turns
    return seen, model.turns


def check_files(config: RunConfig, directory: Path) -> None:
    number = config.training.steps // config.rl.updates
    found = read_transcripts(directory / "transcripts.jsonl")
    rollout = config.rl.rollout
    assert [one["batch"] for one in found] == [
        batch for batch in range(number) for _ in range(rollout.prompts * rollout.generations)
    ]
    assert write_page(RunDirectory(directory)).read_text("utf-8").count("<details") == min(
        len(found), 200
    )


def check_run(config: RunConfig, tokenizer, directory: Path, **options) -> int:
    """One run that is interrupted and one that is not play the same; gives the turns written."""
    (directory / "cut").mkdir()
    (directory / "whole").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no line of the transcripts is damaged
        cut, turns = played(config, tokenizer, directory / "cut", every=2, **options)
        whole, more = played(config, tokenizer, directory / "whole", every=99, **options)
    by_number = dict((number, (tokens, paid)) for number, tokens, paid in cut)
    judged = config.rl.preference.judge.startswith("http")
    for number, tokens, paid in whole:
        told = by_number[number]
        assert [t for t, _ in told[0]] == [t for t, _ in tokens]
        assert judged or told == (tokens, paid)
    for name in ("cut", "whole"):
        check_files(config, directory / name)
    return turns + more


@pytest.mark.parametrize("rl", [{}, {"max_age": 1, "thinking": True}], ids=str)
def test_whatever_is_said_is_a_reward_or_a_reason(grpo_config, phrases, tmp_path, rl) -> None:
    config = run_of(grpo_config, FEW, 6, tokens=1500, prompts=6, **rl)
    assert check_run(config, phrases, tmp_path, large=0.02) > 100


def test_whatever_a_judge_says_leaves_a_comparison_out_at_worst(
    grpo_config, phrases, tmp_path, judge
) -> None:
    preference = dataclasses.replace(
        grpo_config.rl.preference, judge=judge.url, judge_timeout_s=5, judge_calls=4
    )
    config = run_of(grpo_config, FEW, 5, tokens=1500, prompts=6, preference=preference)
    check_run(config, phrases, tmp_path, large=0.02)
    assert judge.asked >= 2 * len(hostile.JUDGE)


@pytest.mark.slow  # ten thousand turns
def test_ten_thousand_turns_end(grpo_config, phrases, tmp_path, judge, capsys) -> None:
    preference = dataclasses.replace(
        grpo_config.rl.preference, judge=judge.url, judge_timeout_s=5, judge_calls=4
    )
    every = ["hostile", *(name for name in registry if name not in (*SANDBOXED, "hostile"))]
    boxed = [name for name in SANDBOXED if registry[name].unavailable() is None]
    run = lambda names, steps, tokens, prompts, **rl: run_of(
        grpo_config, names, steps, tokens=tokens, prompts=prompts, **rl
    )
    shares = {
        "small": (run(every, 30, 2000, 40), 0.0),
        "asynchronous": (run(every, 16, 2000, 40, max_age=1, thinking=True), 0.0),
        "judged": (run(every, 8, 2000, 30, preference=preference), 0.01),
        "large": (run(every, 6, 260_000, 6), 0.3),
        "workers": (run(FEW, 4, 1500, 12, workers=2), 0.02),
        "boxed": (run(boxed, 3, 3000, 6), 0.0),
    }
    turns = 0
    for name, (config, large) in shares.items():
        (tmp_path / name).mkdir()
        made = check_run(config, phrases, tmp_path / name, large=large)
        with capsys.disabled():
            print(f"\n{name}: {made:,} turns", end="")
        turns += made
    assert turns >= 10_000
