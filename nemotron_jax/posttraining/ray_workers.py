"""Workers that are actors of a Ray cluster, so that environments play on many machines."""

import importlib.util
from collections.abc import Callable
from typing import Any

from nemotron_jax.posttraining.players import Players
from nemotron_jax.posttraining.workers import answered


class RayWorker:
    """A worker that is an actor of the cluster at RAY_ADDRESS, or of one begun here without it.

    Each actor wants one CPU to be placed. The time that the cluster takes to place it counts
    against the first question's.
    """

    def __init__(self, make: Callable[[], Players]) -> None:
        """Raises ValueError where Ray is not installed."""
        self._ray = _ray()
        self._actor = self._ray.remote(_Actor).remote(make)
        self._asked: Any = None

    def ask(self, question: tuple[str, Any]) -> None:
        """Put a question; the actor works on it until it is asked for its answer."""
        self._asked = self._actor.answer.remote(*question)

    def answer(self, seconds: float) -> tuple[Any, str | None]:
        """What came back, or why nothing did."""
        if not self._ray.wait([self._asked], timeout=max(seconds, 0.0))[0]:
            return None, "an environment's worker did not answer in time"
        try:
            return self._ray.get(self._asked)
        except self._ray.exceptions.RayError as error:
            return None, f"an environment's worker ended ({type(error).__name__})"

    def end(self) -> None:
        """Kill the actor, whatever it does."""
        self._ray.kill(self._actor)


class _Actor:
    def __init__(self, make: Callable[[], Players]) -> None:
        self._players = make()

    def answer(self, question: str, values: Any) -> tuple[Any, str | None]:
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
