"""The suites by name; a suite's module is imported when it is asked for."""

import difflib
import importlib
import typing
from collections.abc import Sequence

if typing.TYPE_CHECKING:  # names are checked before anything imports jax
    from nemotron_jax.evaluation.evaluator import Evaluator, Subject

# Each module has `make(subject) -> Evaluator`.
SUITES = {
    "acceptance": "nemotron_jax.evaluation.acceptance",
    "cache_formats": "nemotron_jax.evaluation.cache_formats",
    "perplexity": "nemotron_jax.evaluation.perplexity",
    "speed": "nemotron_jax.evaluation.speed",
}


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for no suite, one that is named twice, and one that does not exist."""
    if not names:
        raise ValueError(f"suites: none is named; choose from {', '.join(SUITES)}")
    for place, name in enumerate(names):
        if name not in SUITES:
            nearest = difflib.get_close_matches(name, SUITES, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"suite {name!r} does not exist; the nearest is {nearest!r}, all are "
                f"{', '.join(SUITES)}"
            )
        if name in names[:place]:
            raise ValueError(f"suite {name!r} is named twice; name it once")


def make_evaluators(names: Sequence[str], subject: "Subject") -> "list[Evaluator]":
    """The named suites, ready for a model of the subject; ValueError as `check_names`."""
    check_names(names)
    return [importlib.import_module(SUITES[name]).make(subject) for name in names]
