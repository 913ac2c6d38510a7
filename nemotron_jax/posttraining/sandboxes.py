"""Whether a run's sandboxes fit into this machine's memory, and how many of them at a time."""

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.environments.base import Environment
from nemotron_jax.environments.coding import CodeSession, HoldingSession
from nemotron_jax.environments.sandbox import MOST_SLOTS, budget_of_a_part
from nemotron_jax.posttraining.curriculum import played_environments


def check_sandboxes(config: RolloutConfig) -> None:
    """Raise ValueError where a process would not have the memory for one sandbox.

    Actors of a cluster live on machines that are not known here.
    """
    if config.worker_kind != "processes":
        return
    for environment in _running_code(config):
        need = environment.session.limits.reserved_bytes
        most = budget_of_a_part(1) // need - 1  # this process has a part too
        rule = (
            f"leaves each process {_budget(config) >> 20} MiB for sandboxes, and one of "
            f"{environment.name} takes {need >> 20} MiB; "
        )
        rule += f"set it to at most {most}" if most >= 0 else f"leave {environment.name} out"
        check_value("RolloutConfig", "workers", config.workers, config.workers <= most, rule)


def sandbox_lines(config: RolloutConfig) -> list[str]:
    """What to say at a run's start: how many episodes have a sandbox at a time."""
    episodes, lines = config.prompts * config.generations, []
    where = f"in each of {config.workers} workers" if config.workers else "in this process"
    for environment in _running_code(config):
        if issubclass(environment.session, HoldingSession):
            need = environment.session.limits.reserved_bytes
            room = min(MOST_SLOTS, _budget(config) // need)
            lines.append(
                f"{environment.name}: {room} episodes of {need >> 20} MiB have a sandbox at a time "
                f"{where}; of a batch's {episodes} the others wait for theirs"
            )
    return lines


def _running_code(config: RolloutConfig) -> list[Environment]:
    played = {one.name: one for one, _ in played_environments(config)}
    return [one for one in played.values() if issubclass(one.session, CodeSession)]


def _budget(config: RolloutConfig) -> int:
    return budget_of_a_part(config.workers + 1)
