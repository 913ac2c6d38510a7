"""Workers that are actors of a Ray cluster, so that environments play on many machines."""

import importlib.util
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nemotron_jax.playing.players import Answer, Players, Question, answered


class RayWorker:
    """A worker that is an actor of the cluster at RAY_ADDRESS, or of one begun here without it.

    Each actor wants one CPU to be placed. The time that the cluster takes to place it counts
    against the first question's.
    """

    began = True  # an actor does not say which question it was at work on: the next one

    def __init__(self, make: Callable[[], Players]) -> None:
        """Raises ValueError where Ray is not installed."""
        self._ray = _ray()
        self._actor = self._ray.remote(_Actor).remote(make)
        self._asked: deque[Any] = deque()

    def ask(self, questions: Sequence[Question]) -> None:
        """Put questions; the actor works on them one after another."""
        self._asked.extend(self._actor.answer.remote(*question) for question in questions)

    def answer(self, seconds: float) -> Answer:
        """What came back to the next question, or why nothing did."""
        first = self._asked.popleft()
        if not self._ray.wait([first], timeout=max(seconds, 0.0))[0]:
            return Answer(None, "an environment's worker did not answer in time", gone=True)
        try:
            return self._ray.get(first)
        except self._ray.exceptions.RayError as error:
            reason = f"an environment's worker ended ({type(error).__name__})"
            return Answer(None, reason, gone=True)

    def end(self) -> None:
        """Kill the actor, whatever it does."""
        self._ray.kill(self._actor)


class _Actor:
    def __init__(self, make: Callable[[], Players]) -> None:
        self._players = make()

    def answer(self, question: str, values: Any) -> Answer:
        return answered(self._players, question, values)


def check_ray() -> None:
    """Raise ValueError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "RolloutConfig.worker_kind='ray': the package ray is not installed; "
            "pip install -e '.[rl]' in a checkout brings it, and worker_kind='processes' needs none"
        )


def _ray() -> Any:
    check_ray()
    import ray  # an optional package

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    return ray
