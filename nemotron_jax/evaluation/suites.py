"""The suites by name; a suite's module is imported when it is asked for."""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from nemotron_jax.evaluation.asked import ALL, Asked, parse
from nemotron_jax.evaluation.suite import Suite

# Each module has a SUITE. `all` runs them in this order.
SUITES = {
    "perplexity": "nemotron_jax.evaluation.perplexity",
    "longnll": "nemotron_jax.evaluation.longnll",
    "environments": "nemotron_jax.evaluation.environments",
    "lm_eval": "nemotron_jax.evaluation.lm_eval.suite",
    "ruler": "nemotron_jax.evaluation.ruler.suite",
    "tools": "nemotron_jax.evaluation.tool_use.suite",
    "acceptance": "nemotron_jax.evaluation.acceptance",
    "quantization": "nemotron_jax.evaluation.quantization",
    "cache_formats": "nemotron_jax.evaluation.cache_formats",
    "serving": "nemotron_jax.evaluation.serving_load",
    "speed": "nemotron_jax.evaluation.speed",
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A suite and its checked options. `named`: by its own name, not by `all`."""

    suite: Suite
    options: Any
    named: bool = True


def planned(text: str, modules: Mapping[str, str] = SUITES) -> list[Planned]:
    """The suites that the text of --suites asks for, each once.

    `all` stands for every suite that is not named beside it. Raises ValueError for a suite or an
    option that does not exist, one that is given twice, and values out of range.
    """
    asked = parse(text)
    check_names([one.name for one in asked], modules)  # before anything is imported
    for one in asked:
        if one.name == ALL and one.options:
            raise ValueError(
                f"--suites={ALL}:{next(iter(one.options))}=…: {ALL} has no options; name the suite "
                f"that has them beside it, as in {ALL},perplexity:rows=8"
            )
    named = {one.name: _planned(one, modules) for one in asked if one.name != ALL}
    if any(one.name == ALL for one in asked):
        rest = [Asked(name) for name in modules if name not in named]
        named |= {one.name: _planned(one, modules, named=False) for one in rest}
        return [named[name] for name in modules]
    return list(named.values())


def check_names(names: list[str], modules: Mapping[str, str] = SUITES) -> None:
    """Raise ValueError for one that is named twice, and one that does not exist."""
    for place, name in enumerate(names):
        if name not in (ALL, *modules):
            nearest = difflib.get_close_matches(name, modules, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"suite {name!r} does not exist; the nearest is {nearest!r}, all are "
                f"{', '.join(modules)}"
            )
        if name in names[:place]:
            raise ValueError(f"suite {name!r} is named twice; name it once")


def suite_of(name: str, modules: Mapping[str, str] = SUITES) -> Suite:
    """The suite of that name."""
    check_names([name], modules)
    return importlib.import_module(modules[name]).SUITE


def _planned(asked: Asked, modules: Mapping[str, str], *, named: bool = True) -> Planned:
    suite = suite_of(asked.name, modules)
    fields = [field.name for field in dataclasses.fields(suite.options)]
    for name in asked.options:
        if name not in fields:
            raise ValueError(
                f"suite {asked.name!r} has no option {name!r}; it has {', '.join(fields) or 'none'}"
            )
    try:
        return Planned(suite, suite.options(**asked.options), named)
    except (ValueError, TypeError) as error:  # a value may be of a kind that no rule looks for
        raise ValueError(f"suite {asked.name!r}: {error}") from None
