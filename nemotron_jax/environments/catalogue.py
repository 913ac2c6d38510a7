"""The registry: every environment by name, each module imported when first asked for."""

import difflib
import importlib
import importlib.util
import os
import pickle
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from nemotron_jax.environments.base import Environment

_FAMILIES = "nemotron_jax.environments.families"
# Module of that package -> the environments in it, in the order of the table.
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
    "python_tool": ("python_tool",),
    "code_tests": ("code_tests",),
    "bug_repair": ("bug_repair",),
    "sql": ("sql",),
    "terminal": ("terminal",),
    "command_equivalence": ("command_equivalence",),
}


# The package, of one of this project's extras, without which an environment makes no task.
_PACKAGES = {"reasoning_gym": "reasoning_gym"}


class Registry(Mapping[str, Environment]):
    """Environments by name; a module's tuple ENVIRONMENTS holds its own.

    Iterating leaves out those whose package is not installed; asking by name gives them too, and
    their `unavailable()` says what to install.
    """

    def __init__(self, homes: Mapping[str, tuple[str, ...]]) -> None:
        self._homes = {name: module for module, names in homes.items() for name in names}
        self._loaded: dict[str, Environment] = {}

    def __getitem__(self, name: str) -> Environment:
        if name not in self._loaded:
            if name not in self._homes:
                raise KeyError(f"no environment is called {name!r}; there are {list(self)}")
            module = importlib.import_module(f"{_FAMILIES}.{self._homes[name]}")
            for environment in module.ENVIRONMENTS:
                self._loaded.setdefault(environment.name, environment)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for name in self._names() if _installed(name)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def everything(self) -> dict[str, Environment]:
        """All environments, those that cannot run on this machine included."""
        return {name: self[name] for name in self._names()}

    def register(self, environment: Environment) -> Environment:
        """Add an environment of the user's own; its name must be new."""
        if environment.name in self:
            raise ValueError(f"registry: {environment.name!r} is taken; choose another name")
        self._loaded[environment.name] = environment
        return environment

    def packed(self, names: Collection[str]) -> bytes | None:
        """Those of these environments that are the user's own, for `unpack` in another process.

        None where none is. Raises ValueError for one that another process cannot be given.
        """
        own = [self[name] for name in sorted(names) if name not in self._homes and name in self]
        for environment in own:
            module = type(environment).__module__
            try:
                if not _is_importable(module):
                    raise ImportError(f"no other process can import the module {module!r}")
                pickle.dumps(environment)
            except Exception as error:  # whatever an object of the user's own raises
                raise ValueError(
                    f"registry: the environment {environment.name!r} cannot be sent to workers "
                    f"({error}); put its class into a file MODULE.py beside the config and name "
                    "it 'MODULE:CLASS' in rl.rollout.environments, or set rl.rollout.workers=0"
                ) from None
        return pickle.dumps((sys.path, os.getcwd(), pickle.dumps(own))) if own else None

    def unpack(self, packed: bytes) -> None:
        """Know the environments that another process has `packed`."""
        folders, here, environments = pickle.loads(packed)
        missing = [folder for folder in (*folders, here) if folder not in sys.path]
        sys.path += missing
        for environment in pickle.loads(environments):
            self._loaded[environment.name] = environment

    def _names(self) -> list[str]:
        return list(dict.fromkeys([*self._homes, *self._loaded]))


def _is_importable(module: str) -> bool:
    """Whether a new process finds a module: by its name, or as the script that was started."""
    if module == "__main__":
        return hasattr(sys.modules[module], "__file__")
    top = module.partition(".")[0]
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    return any(finder.find_spec(top, None) is not None for finder in finders)


def _installed(name: str) -> bool:
    package = _PACKAGES.get(name)
    return package is None or importlib.util.find_spec(package) is not None


registry = Registry(_HOMES)


ROWS = "rows:"
_URL = re.compile(r"[A-Za-z][\w+.-]*://")
_found: dict[str, Environment] = {}  # of the user's own, by what names it


def find(name: str, where: str = "") -> Environment:
    """The environment that NAME, MODULE:ATTRIBUTE (one, or its class) or rows:FILE names.

    Modules are looked for in the current folder too. Raises ValueError that begins with `where`,
    the field and its value.
    """
    where = where or f"environments={name!r}"
    if _URL.match(name.removeprefix(ROWS)):
        raise ValueError(
            f"{where}: {name.removeprefix(ROWS)!r} is a URL, and only local files are read; copy "
            "it, and name the file as rows:FILE"
        )
    if name.startswith(ROWS):
        key = ROWS + str(Path(name.removeprefix(ROWS)).resolve())
    elif ":" in name:
        key = name
    elif name in registry:
        return registry[name]
    else:
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
        raise ValueError(
            f"{where}: no environment is called {name!r}; the nearest name is {near[0]!r}, and "
            f"there are {', '.join(sorted(registry))}, MODULE:CLASS and rows:FILE"
        )
    if key not in _found:
        _found[key] = _own(name, where)
    return _found[key]


def task_source(name: str, where: str) -> tuple[Environment, int | None]:
    """The environment and level that NAME/LEVEL names, or anything of `find`; it is registered.

    Raises ValueError that begins with `where`, the field and its value.
    """
    head, slash, level = ("", "", "") if name.startswith(ROWS) else name.rpartition("/")
    environment = find(head if slash else name, where)
    if slash and not (level.isdecimal() and int(level) < environment.levels):
        raise ValueError(f"{where}: the level must be 0 to {environment.levels - 1}")
    if environment.name not in registry:
        registry.register(environment)
    elif registry[environment.name] is not environment:
        raise ValueError(
            f"{where}: another environment is called {environment.name!r}; rename the file of "
            "rows, or the class's `name`"
        )
    return environment, int(level) if slash else None


def search_folder(folder: str) -> None:
    """Look for modules of the user's own in a folder too, after all others."""
    if (path := os.path.abspath(folder)) not in sys.path:
        sys.path.append(path)


def _own(name: str, where: str) -> Environment:
    try:
        if name.startswith(ROWS):
            from nemotron_jax.environments.rows import (
                RowTasks,  # it needs this package's other parts
            )

            return RowTasks(name.removeprefix(ROWS))
        search_folder(".")
        module, _, attribute = name.partition(":")
        found = getattr(importlib.import_module(module), attribute, None)
        found = found() if isinstance(found, type) else found
    except Exception as error:  # whatever a file of the user's own raises
        raise ValueError(f"{where}: {error}") from error
    if not isinstance(found, Environment):
        raise ValueError(
            f"{where}: {attribute!r} of {module} is not an environment; give "
            "MODULE:ATTRIBUTE of one, or of its class"
        )
    return found


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
