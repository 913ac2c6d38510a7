"""Episodes as one batch for a train step: packed into rows, scored, masked and weighted."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import ObjectiveConfig, RolloutConfig
from nemotron_jax.data.conversations import pack_whole
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.episode import Episode
from nemotron_jax.posttraining.grpo import (
    PolicyBatch,
    importance_weights,
    mismatch,
    token_logprobs,
    turn_advantages,
)
from nemotron_jax.sharding import place_batch

# The log-probability of each target, given a model, tokens, targets and segment ids.
Score = Callable[..., Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True)
class Placed:
    """An episode's row and where its first token stands in it."""

    row: int
    start: int
    segment: int


def place_episodes(lengths: Sequence[int], rows: int, row_tokens: int) -> list[Placed]:
    """A place for each episode; ValueError where they need more rows."""
    packed = pack_whole(range(len(lengths)), lengths, row_tokens)
    if len(packed) > rows:
        raise ValueError(
            f"data.batch_size={rows}: {len(lengths)} episodes of up to {max(lengths)} tokens need "
            f"{len(packed)} rows of data.sequence_length={row_tokens}; raise either"
        )
    found: dict[int, Placed] = {}
    for row, episodes in enumerate(packed):
        start = 0
        for segment, episode in enumerate(episodes, start=1):
            found[episode] = Placed(row, start, segment)
            start += lengths[episode]
    return [found[episode] for episode in range(len(lengths))]


def rows_needed(rollout: RolloutConfig, row_tokens: int) -> int:
    """Rows that hold a step's episodes whatever their lengths."""
    fit = row_tokens // rollout.max_tokens
    return -(-rollout.prompts * rollout.generations // fit) if fit else 0


def pack_tokens(
    episodes: Sequence[Episode], places: Sequence[Placed], rows: int, row_tokens: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Tokens, targets and segment ids of the rows."""
    tokens, targets, segments = (np.zeros((rows, row_tokens), np.int32) for _ in range(3))
    for episode, place in zip(episodes, places, strict=True):
        stop = place.start + len(episode.tokens)
        tokens[place.row, place.start : stop] = episode.tokens
        targets[place.row, place.start : stop - 1] = episode.tokens[1:]
        segments[place.row, place.start : stop] = place.segment
    return tokens, targets, segments


def policy_batch(
    episodes: Sequence[Episode],
    advantages: Float[np.ndarray, "N"],
    score: Score,
    model: Nemotron,
    *,
    rows: int,
    row_tokens: int,
    objective: ObjectiveConfig,
    reference: Nemotron | None = None,
) -> tuple[PolicyBatch, list[float]]:
    """The batch of a step's episodes, and each one's mean exp|log trainer - log generator|.

    `score` is `score_tokens` as the step computes, `model` the trainer at the step's start. An
    episode is left out (its tokens weigh 0) where its environment failed, where the mismatch is
    beyond the limit, and, as configured, where it was cut off.
    """
    places = place_episodes([len(e.tokens) for e in episodes], rows, row_tokens)
    tokens, targets, segments = pack_tokens(episodes, places, rows, row_tokens)
    given = place_batch((tokens, targets, segments))
    trainer = np.asarray(score(model, *given))
    scored = None if reference is None else np.asarray(score(reference, *given))
    empty = lambda: np.zeros((rows, row_tokens), np.float32)
    weights, gains, importance, generator = empty(), empty(), empty(), empty()
    mismatches = []
    for episode, advantage, place in zip(episodes, advantages, places, strict=True):
        # What belongs to a token stands where it is predicted from, one before it.
        here = np.s_[place.row, place.start : place.start + len(episode.tokens) - 1]
        own, old = episode.own[1:], trainer[here]
        generator[here] = episode.logprobs[1:]
        mismatches.append(mismatch(old[own], episode.logprobs[1:][own]))
        gain, weight = token_gains(episode, float(advantage), mismatches[-1], objective)
        gains[here], weights[here] = gain[1:], weight[1:]
        cap = objective.importance_cap
        importance[here] = np.where(own, importance_weights(old, episode.logprobs[1:], cap), 0)
    batch = PolicyBatch(
        tokens, targets, segments, weights, gains, importance, generator, trainer, scored
    )
    return batch, mismatches


def logprob_gap(batch: PolicyBatch) -> float:
    """The mean |log p of the generator - log p of the trainer| of the tokens that were drawn."""
    drawn = batch.importance > 0
    gap = np.abs(batch.generator_logprobs - batch.trainer_logprobs)[drawn]
    return float(gap.mean()) if gap.size else 0.0


def token_gains(
    episode: Episode, advantage: float, mismatched: float, config: ObjectiveConfig
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Advantage and weight of each of an episode's tokens."""
    keeps = config.cut_off_calls == "keep"
    valid = lambda turn: turn.well_formed or (turn.cut_call and keeps)
    turns = [(turn.start, turn.stop, valid(turn)) for turn in episode.turns]
    gains, weights = turn_advantages(advantage, turns, len(episode.tokens), config)
    weights[list(episode.forced)] = 0
    cut_off = episode.truncated and config.overlong == "mask"
    if cut_off or not episode.counted or mismatched > config.sequence_limit:
        weights[:] = 0
    return gains, weights


@functools.partial(jax.jit, static_argnames=("execution", "chunk"))
def score_tokens(
    model: Nemotron,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    *,
    execution: Execution,
    chunk: int,
    temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """The log-probability of every target at a temperature, computed as a train step does."""
    output = model(tokens, segment_ids=segment_ids, execution=execution)
    return token_logprobs(model, output.hidden, targets, chunk, temperature)
