"""Rewards by comparison: the answers to one prompt are compared in a ring, pair by pair.

Source: NeMo Gym's genrm_compare, whose judge is a generative reward model. The judge here is
rule-based, or any server that speaks OpenAI's chat completions. Rewards are on its scale, 1 to 5,
which the coefficients of the released stages are made for.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.rl import PreferenceConfig
from nemotron_jax.playing.episode import Episode
from nemotron_jax.posttraining.exchange import ExchangeError, post_json
from nemotron_jax.posttraining.markdown import style_density
from nemotron_jax.posttraining.verdicts import (
    BAD,
    GOOD,
    TIE,
    Comparison,
    NoVerdict,
    reply_text,
    score_verdict,
    word_verdict,
)

# What a judge says of two answers: scores of both, or only how much the first is to be preferred (1
# for the first, 0 for the second, 1/2 for neither). None where it failed.
Judge = Callable[[Episode, Episode], Comparison | float | None]

_ALONE = 3.0  # paid to an answer that has none to be compared with, as in Gym
_BEST_SHARE = 0.2  # of a group by comparison, whom being the shortest may bring the bonus


def preference_rewards(
    episodes: Sequence[Episode], config: PreferenceConfig, judge: Judge
) -> Float[np.ndarray, "N"]:
    """Each episode's mean score, 1 to 5, over the comparisons with its neighbours in its group's
    ring, and what its length and style add; NaN where no comparison of it was judged, or its
    environment failed.

    `judge` is asked by several threads at one time.
    """
    groups = [
        [n for n, e in enumerate(episodes) if e.group == group and e.counted]
        for group in sorted({episode.group for episode in episodes})
    ]
    pairs = [(places[a], places[b]) for places in groups for a, b in ring(len(places))]
    with ThreadPoolExecutor(config.judge_calls) as threads:
        asked = [threads.submit(judge, episodes[a], episodes[b]) for a, b in pairs]
        compared = dict(zip(pairs, (_comparison(one.result()) for one in asked), strict=True))
    out = np.full(len(episodes), np.nan, np.float32)
    for places in groups:
        members = [episodes[n] for n in places]
        scores = ring_scores(
            [compared[places[a], places[b]] for a, b in ring(len(places))], len(places)
        )
        out[places] = scores + shaping(members, scores, config)
    return out


def ring(count: int) -> list[tuple[int, int]]:
    """The pairs of a group to compare: each and the next one, the last and the first; two are
    compared in both orders, since judges favour a place."""
    return [(n, (n + 1) % count) for n in range(count)] if count > 1 else []


def ring_scores(compared: Sequence[Comparison | None], count: int) -> Float[np.ndarray, "N"]:
    """Each member's mean score, by the comparisons of the ring's pairs; NaN where none was judged,
    and the middle of the scale for one alone."""
    if count == 1:
        return np.full(1, _ALONE, np.float32)
    found: list[list[float]] = [[] for _ in range(count)]
    for pair, comparison in zip(ring(count), compared, strict=True):
        if comparison is not None:
            for place, score in zip(pair, comparison.scores(), strict=True):
                found[place].append(score)
    return np.array([np.mean(each) if each else np.nan for each in found], np.float32)


def shaping(
    members: Sequence[Episode], scores: Float[np.ndarray, "N"], config: PreferenceConfig
) -> Float[np.ndarray, "N"]:
    """What short reasoning, short answers and plain style add, each with mean 0 in the group.

    Besides, `shortest_bonus` for the shortest reasoning and for the shortest answer that is not
    empty (the first of equal ones), where who gave it is among the best fifth by `scores`.
    """
    total = np.zeros(len(members))
    if len(members) < 2:
        return total.astype(np.float32)
    texts = [_texts(episode) for episode in members]
    reasoning = np.array([len(thought.strip()) for thought, _ in texts], float)
    answers = np.array([len(answer.strip()) for _, answer in texts], float)
    style = np.array([style_density(answer) for _, answer in texts])
    total += config.reasoning_weight * smallness(reasoning)
    total += config.answer_weight * smallness(answers) + config.style_weight * smallness(style)
    judged = np.sort(scores[~np.isnan(scores)])[::-1]
    for lengths in (reasoning, answers):
        given = np.flatnonzero(lengths)
        if len(judged) and len(given):
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


def rule_judge(first: Episode, second: Episode) -> Comparison:
    """Scores by the rewards; of equal ones it prefers the better format, then the one that ended
    itself."""
    scores = [BAD + (GOOD - BAD) * e.verdict.reward for e in (first, second)]
    forms = [
        (float(np.mean([t.well_formed for t in e.turns] or [0])), not e.truncated)
        for e in (first, second)
    ]
    slightly = 0.0 if forms[0] == forms[1] else 0.5 if forms[0] > forms[1] else -0.5
    return Comparison(*scores, ranking=TIE - slightly)


class EndpointJudge:
    """Asks a server of OpenAI's chat completions about two answers.

    A plain model is asked which is better, in one word; one of NVIDIA's generative reward models
    (`genrm`) is given the conversation and both answers in roles of their own, and scores them. A
    reply without a verdict, and whatever else goes wrong, leaves the comparison out; each reason is
    printed once.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout_s: float,
        *,
        genrm: bool = False,
        principle: str = "",
        key: str = "",
    ) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model, self._timeout_s = model, timeout_s
        self._genrm, self._principle = genrm, principle
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._reasons: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, first: Episode, second: Episode) -> Comparison | float | None:
        body = self._scored(first, second) if self._genrm else self._asked(first, second)
        try:
            reply = post_json(
                self._url,
                {"model": self._model, **body},
                timeout_s=self._timeout_s,
                headers=self._headers,
            )
            text = reply_text(reply)
            return score_verdict(text) if self._genrm else word_verdict(text)
        except (ExchangeError, NoVerdict) as error:
            self._leave_out(str(error))
            return None

    def _asked(self, first: Episode, second: Episode) -> dict:
        question = _QUESTION.format(
            task="\n".join(str(m.get("content")) for m in first.task.messages),
            first=_texts(first)[1],
            second=_texts(second)[1],
        )
        return {"messages": [{"role": "user", "content": question}], "temperature": 0.0}

    def _scored(self, first: Episode, second: Episode) -> dict:
        told = [(m["role"], str(m.get("content") or "")) for m in first.task.messages]
        told += [("principle", self._principle)] if self._principle else []
        answers = (_texts(one)[1] for one in (first, second))
        told += [
            (f"response_{n}", text.strip() and text or "None") for n, text in enumerate(answers, 1)
        ]
        return {"messages": [{"role": r, "content": text} for r, text in told], **_GENRM_SAMPLING}

    def _leave_out(self, reason: str) -> None:
        # A server's words: no terminal's commands, and nothing that a narrow stdout cannot hold.
        reason = "".join(c if c.isprintable() else " " for c in ascii(reason)[1:-1])
        with self._lock:
            new = reason not in self._reasons and len(self._reasons) < _REASONS_SHOWN
            self._reasons |= {reason} if new else set()
        if new:
            print(f"judge {self._url}: a comparison is left out: {reason}", flush=True)


def make_judge(config: PreferenceConfig) -> Judge:
    """The judge that a config names; ValueError for a key that is not in the environment."""
    if config.judge == "rules":
        return rule_judge
    name = config.judge_key_variable
    key = os.environ.get(name, "").strip() if name else ""
    sound = not name or (key.isascii() and key.isprintable() and key)
    rule = "must be an environment variable that holds the judge's key; export it, or leave it ''"
    check_value("PreferenceConfig", "judge_key_variable", name, bool(sound), rule)
    return EndpointJudge(
        config.judge,
        config.judge_model,
        config.judge_timeout_s,
        genrm=config.judge_format == "genrm",
        principle=config.judge_principle,
        key=key,
    )


def _comparison(found: Comparison | float | None) -> Comparison | None:
    known = found is None or isinstance(found, Comparison)
    return found if known else Comparison.preferring(found)


def _texts(episode: Episode) -> tuple[str, str]:
    """All the reasoning of an episode, and the text of its last turn."""
    own = [m for m in episode.messages if m["role"] == "assistant"]
    reasoning = "".join(str(m.get("reasoning_content") or "") for m in own)
    return reasoning, str(own[-1].get("content") or "") if own else ""


_REASONS_SHOWN = 20  # different ones of a run: a server that never says the same twice is no log
# How the released stage draws a judge's reply. Source: NeMo Gym, configs/genrm_compare.yaml.
_GENRM_SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16_384}
_QUESTION = """Two answers to the same task are to be compared.

Task:
{task}

Answer A:
{first}

Answer B:
{second}

Which is better? End with one word on a line of its own: A, B or tie."""
