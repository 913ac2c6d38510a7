"""What a step's episodes say about the state of a run, overall and by environment."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from nemotron_jax.playing.episode import UNPLAYED, Episode


class EpisodesFailed(OSError):
    """Every episode failed by its environment: nothing can be learned, nor said of a model."""


def check_counted(episodes: Sequence[Episode], what: str) -> None:
    """Raise EpisodesFailed where the environment of every episode failed; a note where some did.

    Episodes that could not be written or read are not their environment's matter.
    """
    played = [e.verdict.infra_error for e in episodes if UNPLAYED not in e.verdict.parts]
    reasons = Counter(reason for reason in played if reason is not None)
    if not reasons:
        return
    (reason, times), failed = reasons.most_common(1)[0], reasons.total()
    said = f"the environment failed, most often ({times} times) with: {' '.join(reason.split())}"
    if failed == len(played):
        raise EpisodesFailed(
            f"in all {failed} episodes of {what} {said}; mend that, or leave the environment out "
            "of rl.rollout.environments"
        )
    print(f"note: in {failed} of {len(played)} episodes of {what} {said}; they do not count")


def health(
    episodes: Sequence[Episode],
    paid: Float[np.ndarray, "N"],
    mismatches: Sequence[float],
    limit: float,
) -> dict[str, float]:
    """Named values of all episodes, and of each environment as `NAME/ENVIRONMENT`.

    `paid` is what each one learns from: its environment's reward, unless that was changed.
    """
    table = summary(episodes, paid, mismatches, limit)
    names = sorted({episode.task.environment for episode in episodes})
    for name in names:
        places = [n for n, e in enumerate(episodes) if e.task.environment == name]
        part = summary(
            [episodes[n] for n in places], paid[places], [mismatches[n] for n in places], limit
        )
        table |= {f"{key}/{name}": value for key, value in part.items()}
    return table


def summary(
    episodes: Sequence[Episode],
    paid: Float[np.ndarray, "N"],
    mismatches: Sequence[float],
    limit: float,
) -> dict[str, float]:
    """Means over the episodes whose environment did not fail; counts of the others.

    `reward`, of the environments, and `paid`, what is learned from; `surprise`, the mean of -log p
    of the sampled tokens, an estimate of the entropy; `mismatch`, the mean exp|log trainer - log
    generator|; `masked`, the share beyond `limit`, and `masked_right`, of them with a reward above
    one half; `truncated`; `well_formed`, the share of turns that keep to the format; `unclosed`, of
    those that end, or are cut off, while thinking; `calls` an episode; `zero_spread`, the share of
    groups that are all paid the same, from which nothing is learned; `episode_tokens`.
    """
    counted = np.array([episode.counted for episode in episodes])
    masked = np.array(mismatches) > limit
    rewards = np.array([episode.verdict.reward for episode in episodes])
    kept = [episode for episode in episodes if episode.counted]
    turns = [turn for episode in kept for turn in episode.turns]
    own = [episode.logprobs[episode.own] for episode in kept]
    mean = lambda values: float(np.mean(values)) if len(values) else 0.0
    groups = [episode.group for episode in episodes]
    spreads = [
        np.ptp(paid[counted & (np.array(groups) == group)])
        for group in sorted({e.group for e in kept})
    ]
    return {
        "reward": mean(rewards[counted]),
        "paid": mean(paid[counted]),
        "surprise": -mean(np.concatenate(own) if own else []),
        "mismatch": mean(np.array(mismatches)[counted]),
        "masked": mean(masked[counted]),
        "masked_right": mean(rewards[counted & masked] > 0.5),
        "truncated": mean([episode.truncated for episode in kept]),
        "well_formed": mean([turn.well_formed for turn in turns]),
        "unclosed": mean([turn.unclosed for turn in turns]),
        "calls": mean([sum(turn.calls for turn in episode.turns) for episode in kept]),
        "zero_spread": mean([spread == 0 for spread in spreads]),
        "episode_tokens": mean([len(episode.tokens) for episode in kept]),
        "infra_errors": float(np.count_nonzero(~counted)),
    }
