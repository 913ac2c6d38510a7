"""Rewards by comparison: the answers to one prompt are compared in a ring, pair by pair.

Source: NeMo Gym's genrm_compare, whose judge is a generative reward model. The judge here is
rule-based, or any server that speaks OpenAI's chat completions.
"""

import json
import re
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from nemotron_jax.config.rl import PreferenceConfig
from nemotron_jax.posttraining.rollout import Episode

# How much the first answer is to be preferred: 1 for the first, 0 for the second, between them for
# neither. None where the judge failed.
Judge = Callable[[Episode, Episode], float | None]

_STYLE = re.compile(r"[*#`|_>]|^\s*[-+] ", re.MULTILINE)  # marks of markdown
_BEST_SHARE = 0.2  # of a group by comparison, whom being the shortest may bring the bonus


def preference_rewards(
    episodes: Sequence[Episode], config: PreferenceConfig, judge: Judge
) -> Float[np.ndarray, "N"]:
    """Each episode's share of its two comparisons won, in its group's ring, and what its length
    and style add; NaN where no comparison of it was judged, or its environment failed.

    `judge` is asked by several threads at one time.
    """
    groups = [
        [n for n, e in enumerate(episodes) if e.group == group and e.counted]
        for group in sorted({episode.group for episode in episodes})
    ]
    pairs = [(places[a], places[b]) for places in groups for a, b in ring(len(places))]
    with ThreadPoolExecutor(config.judge_calls) as threads:
        asked = [threads.submit(judge, episodes[a], episodes[b]) for a, b in pairs]
        preferred = dict(zip(pairs, (one.result() for one in asked), strict=True))
    out = np.full(len(episodes), np.nan, np.float32)
    for places in groups:
        members = [episodes[n] for n in places]
        scores = ring_scores(
            [preferred[places[a], places[b]] for a, b in ring(len(places))], len(places)
        )
        out[places] = scores + shaping(members, scores, config)
    return out


def ring(count: int) -> list[tuple[int, int]]:
    """The pairs of a group to compare: each and the next one, the last and the first."""
    pairs = [(n, (n + 1) % count) for n in range(count)]
    return pairs if count > 2 else pairs[: count - 1]


def ring_scores(preferred: Sequence[float | None], count: int) -> Float[np.ndarray, "N"]:
    """The mean preference for each member over its neighbours, by that of each of the ring's pairs
    for its first; 1/2 for one alone."""
    if count == 1:
        return np.full(1, 0.5, np.float32)
    won: list[list[float]] = [[] for _ in range(count)]
    for (first, second), preference in zip(ring(count), preferred, strict=True):
        if preference is not None:
            won[first].append(preference)
            won[second].append(1 - preference)
    return np.array([np.mean(each) if each else np.nan for each in won], np.float32)


def shaping(
    members: Sequence[Episode], scores: Float[np.ndarray, "N"], config: PreferenceConfig
) -> Float[np.ndarray, "N"]:
    """What short reasoning, short answers and plain style add, each with mean 0 in the group.

    Besides, `shortest_bonus` for the shortest reasoning and for the shortest answer, where they are
    not empty and not all equally long, and the one who gave it is among the best fifth by `scores`.
    """
    if not members:
        return np.zeros(0, np.float32)
    texts = [_texts(episode) for episode in members]
    reasoning = np.array([len(thought.strip()) for thought, _ in texts], float)
    answers = np.array([len(answer.strip()) for _, answer in texts], float)
    style = np.array([len(_STYLE.findall(a)) / max(len(a), 1) for _, a in texts])
    total = config.reasoning_weight * smallness(reasoning)
    total += config.answer_weight * smallness(answers) + config.style_weight * smallness(style)
    judged = np.sort(scores[~np.isnan(scores)])[::-1]
    for lengths in (reasoning, answers):
        given = np.flatnonzero(lengths)
        if len(judged) and len(given) and np.ptp(lengths[given]):
            shortest = given[np.argmin(lengths[given])]
            enough = judged[max(int(len(judged) * _BEST_SHARE) - 1, 0)]
            total[shortest] += config.shortest_bonus * (scores[shortest] >= enough)
    return total.astype(np.float32)


def smallness(values: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """1 for the smallest to 0 for the largest of a group, less their mean; 0 where all are
    equal."""
    spread = np.ptp(values)
    if spread == 0:
        return np.zeros(len(values))
    scores = 1 - (values - values.min()) / spread
    return scores - scores.mean()


def rule_judge(first: Episode, second: Episode) -> float:
    """Prefers the higher reward, then the better format, then the one that ended itself."""
    keys = [
        (e.verdict.reward, float(np.mean([t.well_formed for t in e.turns] or [0])), not e.truncated)
        for e in (first, second)
    ]
    return 0.5 if keys[0] == keys[1] else float(keys[0] > keys[1])


class EndpointJudge:
    """Asks a server of OpenAI's chat completions which of two answers is better."""

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url, self._model, self._timeout_s = url, model, timeout_s

    def __call__(self, first: Episode, second: Episode) -> float | None:
        question = _QUESTION.format(
            task="\n".join(str(m.get("content")) for m in first.task.messages),
            first=_texts(first)[1],
            second=_texts(second)[1],
        )
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
        }
        request = urllib.request.Request(
            f"{self._url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                said = json.load(answer)["choices"][0]["message"]["content"]
        except (OSError, ValueError, LookupError, TypeError):
            return None  # the comparison is left out, as an environment's failure is
        found = re.findall(r"\b(A|B|tie)\b", said or "")
        return {"A": 1.0, "B": 0.0, "tie": 0.5}[found[-1]] if found else None


def make_judge(config: PreferenceConfig) -> Judge:
    """The judge that a config names."""
    if config.judge == "rules":
        return rule_judge
    return EndpointJudge(config.judge, config.judge_model, config.judge_timeout_s)


def _texts(episode: Episode) -> tuple[str, str]:
    """All the reasoning of an episode, and the text of its last turn."""
    own = [m for m in episode.messages if m["role"] == "assistant"]
    reasoning = "".join(str(m.get("reasoning_content") or "") for m in own)
    return reasoning, str(own[-1].get("content") or "") if own else ""


_QUESTION = """Two answers to the same task are to be compared.

Task:
{task}

Answer A:
{first}

Answer B:
{second}

Which is better? End with one word on a line of its own: A, B or tie."""
