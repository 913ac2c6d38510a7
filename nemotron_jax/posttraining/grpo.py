"""Group-relative policy optimisation as Nemotron 3 Super was trained: advantages, masks, loss.

Three policies are told apart: the generator g, which wrote the tokens; the trainer o at the start
of a step; and the policy being optimised. o over g corrects for what generator and trainer compute
differently (or with weights of another age); the policy over o is PPO's ratio.
Source: NVIDIA's Super recipe and NeMo RL, branch super-v3.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import ObjectiveConfig, RLConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import load_by_bias
from nemotron_jax.training.losses import Objective, Sums, token_nll

# Keeps a quotient finite; a spread this small comes from rounding alone.
_SMALL = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PolicyBatch:
    """Episodes packed into rows. What belongs to a token stands where it is predicted from.

    `weights` is 1 where the next token is the model's own and counts; `importance` the weight of
    the trainer over the generator.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    advantages: Float[Array, "B T"]
    importance: Float[Array, "B T"]
    generator_logprobs: Float[Array, "B T"]
    trainer_logprobs: Float[Array, "B T"]
    reference_logprobs: Float[Array, "B T"] | None = None
    numbers: Int[Array, "B T"] | None = None


def group_advantages(
    rewards: Float[np.ndarray, "N"],
    groups: Int[np.ndarray, "N"],
    counted: Bool[np.ndarray, "N"],
    clip: float,
) -> Float[np.ndarray, "N"]:
    """Each reward less the mean of its group's others, over their unbiased standard deviation.

    An episode that is not counted (its environment failed) is in nobody's mean and gets 0, and so
    does one that has no counted other. Where the others' deviation is 0 nothing is divided: a lone
    success among failures gets 1.
    """
    out = np.zeros(len(rewards), np.float64)
    for place in np.flatnonzero(counted):
        others = counted & (groups == groups[place])
        others[place] = False
        count = np.count_nonzero(others)
        if count == 0:
            continue
        found = rewards[others].astype(np.float64)
        spread = found.std(ddof=1) if count > 1 else 0.0
        gain = float(rewards[place]) - found.mean()
        out[place] = gain / (spread + _SMALL) if spread > _SMALL else gain
    return np.clip(out, -clip, clip).astype(np.float32)


def low_effort_reward(reward: float, num_tokens: int, limit: int) -> float:
    """The reward of an answer to a prompt that asks for low effort.

    Up to a fifth more for a right one that is short, nothing for a wrong one; past `limit` tokens
    even a right one loses.
    """
    bonus = min(1.0, 0.2 * (1 - num_tokens / limit))
    return reward + reward * max(bonus, 0.0) + min(bonus, 0.0)


def importance_weights(
    trainer: Float[np.ndarray, "N"], generator: Float[np.ndarray, "N"], cap: float
) -> Float[np.ndarray, "N"]:
    """exp(trainer - generator) of each token's log-probability, at most `cap`.

    0 where that is no finite float32 number, as in NeMo RL: such a token says nothing of the two
    policies but that one of them is broken.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(np.asarray(trainer - generator, np.float32))
    return np.where(np.isfinite(weights), np.minimum(weights, cap), 0).astype(np.float32)


def mismatch(trainer: Float[np.ndarray, "N"], generator: Float[np.ndarray, "N"]) -> float:
    """An episode's mean of exp|trainer - generator|; 1 where both agree.

    Finite, since it is only compared: a gap of more than 80 nats, or one that is no number, counts
    as 80, which is beyond every limit.
    """
    if len(trainer) == 0:
        return 1.0
    with np.errstate(invalid="ignore"):
        gap = np.abs(trainer.astype(np.float64) - generator.astype(np.float64))
    return float(np.mean(np.exp(np.nan_to_num(gap, nan=80.0).clip(max=80.0))))


def turn_advantages(
    advantage: float,
    turns: Sequence[tuple[int, int, bool]],
    length: int,
    config: ObjectiveConfig,
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N"]]:
    """Advantages and weights of an episode's tokens, by its turns (start, stop, well formed).

    Tokens of no turn were read, not written: their weight is 0.
    """
    advantages, weights = np.zeros(length, np.float32), np.zeros(length, np.float32)
    for start, stop, well_formed in turns:
        penalised = not well_formed and config.invalid_turns == "penalise"
        advantages[start:stop] = -config.turn_penalty if penalised else advantage
        weights[start:stop] = 0 if not well_formed and not penalised else 1
    return advantages, weights


def grpo_objective(rl: RLConfig, loss_chunk: int, execution: Execution) -> Objective:
    """The objective of a run's stage `grpo`; a whole batch is divided by its counted tokens."""
    settings, temperature = rl.objective, rl.rollout.temperature

    def totals(batch: PolicyBatch) -> Float[Array, ""]:
        return jnp.maximum(jnp.sum(batch.weights), 1.0)

    def loss(model: Nemotron, part: PolicyBatch, totals: Array, key: Array) -> tuple:
        output = model(
            part.tokens,
            segment_ids=part.segment_ids,
            key=key,
            numbers=part.numbers,
            execution=execution,
        )
        logprobs = token_logprobs(model, output.hidden, part.targets, loss_chunk, temperature)
        total, sums = policy_loss(logprobs, part, settings, totals)
        load = load_by_bias(model, output.router_load)
        return total, sums | {"router_load": jax.lax.stop_gradient(load)}

    return Objective(totals, loss, execution.precision)


def token_logprobs(
    model: Nemotron,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    chunk: int,
    temperature: float | Float[Array, ""],
) -> Float[Array, "B T"]:
    """float32 log-probability of each target in softmax(logits / temperature), which is what the
    generator draws from: the policy that is learned is the one that plays."""
    hidden = (hidden.astype(jnp.float32) / temperature).astype(hidden.dtype)
    return -token_nll(hidden, model.head.matrix(), targets, chunk).astype(jnp.float32)


def policy_loss(
    logprobs: Float[Array, "B T"],
    batch: PolicyBatch,
    config: ObjectiveConfig,
    totals: Float[Array, ""],
) -> tuple[Float[Array, ""], Sums]:
    """- sum of weight, importance, ratio and advantage over `totals`, and the KL term.

    The sums: `loss`, `kl` (k3, unweighted by its coefficient), `entropy` (the mean surprise of the
    sampled tokens, nats), `clipped` (share of tokens whose ratio the clip holds).
    """
    logprobs, batch = counted_only(logprobs, batch)
    weights = batch.weights / totals
    fixed = jax.lax.stop_gradient(logprobs)
    if config.ratio == "one":
        ratio = jnp.exp(logprobs - fixed)
        gain, held = ratio * batch.advantages, jnp.zeros_like(ratio, bool)
    else:
        ratio = jnp.exp(logprobs - batch.trainer_logprobs)
        inside = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
        gain = jnp.minimum(ratio * batch.advantages, inside * batch.advantages)
        held = gain < ratio * batch.advantages
    loss = -jnp.sum(weights * batch.importance * gain)
    kl = jnp.zeros(())
    if config.kl_weight:
        # Tokens are the generator's, so the mean under the policy needs the policy's weight.
        drawn = jnp.exp(fixed - batch.generator_logprobs)
        drawn = jnp.where(jnp.isfinite(drawn), drawn, 0.0)  # as importance_weights
        kl = jnp.sum(weights * drawn * k3(logprobs, batch))
        loss += config.kl_weight * kl
    sums = {
        "loss": loss,
        "kl": kl,
        "entropy": -jnp.sum(weights * fixed),
        "clipped": jnp.sum(weights * held),
    }
    return loss, jax.lax.stop_gradient(sums)


def counted_only(
    logprobs: Float[Array, "B T"], batch: PolicyBatch
) -> tuple[Float[Array, "B T"], PolicyBatch]:
    """Log-probabilities and batch with 0 wherever a token's weight is 0, whatever stood there.

    Before any exponential: one that overflows is inf, and inf times a weight of 0 is NaN, in the
    gradient also where the value is replaced afterwards.
    """
    counted = batch.weights > 0
    kept = lambda values: None if values is None else jnp.where(counted, values, 0.0)
    names = ("advantages", "importance")
    names += ("generator_logprobs", "trainer_logprobs", "reference_logprobs")
    values = {name: kept(getattr(batch, name)) for name in names}
    return kept(logprobs), dataclasses.replace(batch, **values)


def k3(logprobs: Float[Array, "B T"], batch: PolicyBatch) -> Float[Array, "B T"]:
    """exp(d) - d - 1, d = reference - policy: never negative, its mean is KL(policy, reference).

    Source: J. Schulman, Approximating KL divergence, 2020.
    """
    difference = batch.reference_logprobs - logprobs
    return jnp.exp(difference) - difference - 1
