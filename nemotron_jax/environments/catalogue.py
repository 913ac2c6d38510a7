"""The registry: every environment by name, each module imported when first asked for."""

import importlib
from collections.abc import Iterator, Mapping

from nemotron_jax.environments.base import Environment

# Module of this package -> the environments in it, in the order of the table.
_HOMES = {
    "arithmetic": ("arithmetic",),
    "lookup": ("lookup",),
    "stem": ("equations", "science_units"),
    "proof": ("equational_proof",),
    "choice": ("multiple_choice",),
    "structured": ("structured_json",),
    "instructions": ("instruction_following", "inverse_instructions"),
    "retention": ("retention",),
    "workplace": ("workplace",),
    "calendar": ("calendar",),
    "single_step": ("tool_choice", "search_pivot", "tool_schema"),
    "wiki": ("wiki_search",),
    "longcontext": ("needle", "graph_walk"),
    "refusal": ("refusal", "over_refusal"),
    "preference": ("preference",),
    "reasoning": ("reasoning_gym",),
}


class Registry(Mapping[str, Environment]):
    """Environments by name; a module's tuple ENVIRONMENTS holds its own."""

    def __init__(self, homes: Mapping[str, tuple[str, ...]]) -> None:
        self._homes = {name: module for module, names in homes.items() for name in names}
        self._loaded: dict[str, Environment] = {}

    def __getitem__(self, name: str) -> Environment:
        if name not in self._loaded:
            if name not in self._homes:
                raise KeyError(f"no environment is called {name!r}; there are {list(self)}")
            module = importlib.import_module(f"nemotron_jax.environments.{self._homes[name]}")
            for environment in module.ENVIRONMENTS:
                self._loaded.setdefault(environment.name, environment)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._homes, *self._loaded]))

    def __len__(self) -> int:
        return len(self._homes.keys() | self._loaded.keys())

    def register(self, environment: Environment) -> Environment:
        """Add an environment of the user's own; its name must be new."""
        if environment.name in self:
            raise ValueError(f"registry: {environment.name!r} is taken; choose another name")
        self._loaded[environment.name] = environment
        return environment


registry = Registry(_HOMES)


def table(environments: Mapping[str, Environment]) -> str:
    """The environments as a table in markdown."""
    rows = [
        "| name | asks to | reward | tools | turns | levels | released counterpart | fidelity |"
    ]
    rows.append("|" + "---|" * 8)
    for name, one in environments.items():
        turns = "1" if one.max_turns == 1 else f"≤ {one.max_turns}"
        summary = one.summary[0].lower() + one.summary[1:]
        cells = [name, summary, one.reward, str(_tools(one)), turns, str(one.levels)]
        rows.append("| " + " | ".join([*cells, one.counterpart, one.fidelity]) + " |")
    return "\n".join(rows)


def _tools(environment: Environment) -> int:
    """Tools of a task of the highest level; none where no task can be drawn on this machine."""
    try:
        return len(environment.split(0, "train", 0, level=environment.levels - 1).tools)
    except ValueError:
        return 0
