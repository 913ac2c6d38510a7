"""Suites while a model learns: their values in the records of its evaluations."""

import io
from collections.abc import Callable

import jax

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import RunConfig
from nemotron_jax.evaluation.context import Context, Shared
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.runner import check_ready, longest_request
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suites import planned
from nemotron_jax.evaluation.transcripts import Transcripts
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.run_directory import RunDirectory


def suite_probes(
    config: RunConfig, directory: RunDirectory
) -> list[Callable[[Nemotron, Execution], dict[str, float]]]:
    """What `logging.suites` asks for: a function of a model and how to run it, which gives each
    suite's means as SUITE/VALUE; none where it asks for nothing.

    The generator is made once and takes each evaluation's weights. Raises ValueError for suites
    that do not exist or cannot run here, `all`, and a run of several processes.
    """
    text = config.logging.suites
    if not text:
        return []
    plans = planned(text)
    if not all(plan.named for plan in plans):
        raise ValueError("LoggingConfig.suites='all': name the suites that training waits for")
    if jax.process_count() > 1:
        raise ValueError(
            f"LoggingConfig.suites={text!r}: suites run in one process; evaluate a checkpoint by "
            "eval.py, or leave it empty"
        )
    path = directory.path
    subject = Subject(path, config, path, config.seed, config.model, loaded_from=path)
    if why := check_ready(plans, subject):
        name, reason = next(iter(why.items()))
        raise ValueError(f"LoggingConfig.suites={text!r}: {name}: {reason}")
    longest = longest_request(plans, subject)
    shared: list[Shared] = []

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        if not shared:
            shared.append(Shared(model, longest=longest, execution=execution, seed=config.seed))
        shared[0].model, shared[0].execution = model, execution
        values = {}
        for plan in plans:
            silent = Progress(plan.suite.name, stream=io.StringIO())
            context = Context(subject, Transcripts(plan.suite), silent, shared[0])
            found = plan.suite.measure(context, plan.options).values
            values |= {f"{plan.suite.name}/{name}": v.mean for name, v in found.items()}
        return values

    return [evaluate]
