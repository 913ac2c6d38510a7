"""What the code-executing environments share: code out of a text, and its results out of a sandbox.

Expected results never enter the sandbox. The code gets inputs, its outputs come back as JSON, and
they are compared here: no trick with tests, exits, frames or `__eq__` touches the comparison.
"""

import contextlib
import functools
import json
from typing import Any

from nemotron_jax.environments.base import InfraError, Session
from nemotron_jax.environments.fences import fenced
from nemotron_jax.environments.sandbox import Limits, Result, Sandbox, SandboxUnavailable, shared
from nemotron_jax.environments.schema import canonical, read_json
from nemotron_jax.environments.turns import Turn

# What one answer's code may take; a right answer needs a hundredth of it.
LIMITS = Limits(wall_s=4.0, cpu_s=3)
CELL_S = 4.0

# Results leave by a descriptor of their own, so that what the code prints is not among them.
_CALLER = """
import json, os, sys
tests = json.loads(sys.stdin.read())
out = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
dump = json.dumps
names = {"__name__": "solution"}
exec(compile(open("solution.py").read(), "solution.py", "exec"), names)
for function, arguments in tests:
    try:
        line = dump({"value": names[function](*arguments)})
    except Exception as error:
        line = dump({"error": type(error).__name__})
    out.write(line + "\\n")
    out.flush()
"""


class CodeSession(Session):
    """A session whose turns and verdict each take a sandbox for a moment."""

    limits: Limits = LIMITS

    def ready(self, turn: Turn | None) -> bool:
        try:
            return sandbox().has_room(self.limits)
        except (InfraError, ValueError):
            return True  # the turn meets the same failure, and tells it


class HoldingSession(CodeSession):
    """A session that has a sandbox from its first call to its end, and one slot for it."""

    slot: int | None = None
    _giver: Sandbox  # of the slot

    @property
    def holds(self) -> bool:
        """Whether a slot of the sandbox is taken by this session."""
        return self.slot is not None

    def ready(self, turn: Turn | None) -> bool:
        if self.holds or turn is None or not turn.calls:
            return True
        try:
            self._giver = sandbox()
            self.slot = self._giver.take_now(self.limits)
        except (InfraError, ValueError):
            return True
        return self.holds

    def take_slot(self) -> int:
        """The sandbox slot of this episode; without `ready` it is waited for."""
        if self.slot is None:
            self._giver = sandbox()
            try:
                self.slot = self._giver.take(self.limits)
            except (OSError, ValueError) as error:
                raise InfraError(str(error)) from error
        return self.slot

    def close(self) -> None:
        """Give back the slot; a subclass ends what runs in it before."""
        if self.slot is not None:
            slot, self.slot = self.slot, None
            self._giver.give_back(slot, self.limits)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # one that nobody closed; the program may be ending
            self.close()


def code_of(text: str) -> str:
    """The code that an answer gives: its one fenced block, else all of it; "" for several."""
    blocks = fenced(text)
    if not blocks:
        return text
    return blocks[0] if len(blocks) == 1 else ""


@functools.cache
def unavailable(limits: Limits = LIMITS) -> str | None:
    """Why no code can be run within these limits here; None when it can."""
    try:
        box = shared()
    except SandboxUnavailable as error:
        return str(error)
    if limits.processes > 1 and box.tasks(limits) is None:
        return "shells need bubblewrap, or root; docs/sandbox.md says how to get it"
    return None


def sandbox() -> Sandbox:
    """The process's sandbox, as an environment wants it: a failure is the machinery's."""
    try:
        return shared()
    except SandboxUnavailable as error:
        raise InfraError(str(error)) from error


def checked(result: Result) -> Result:
    """A result that says something about the code; raises InfraError for one that does not."""
    if result.infra_error:
        raise InfraError(result.infra_error)
    return result


def call_all(code: str, tests: list[tuple[str, list]]) -> list[Any]:
    """What each (function, arguments) of a module gives; None from where the code has ended.

    A value stands in a list of its own, so that a function's None is [None]; one that raised or
    gave what JSON cannot hold is None too. The code can write these lines itself, so nothing that
    stands in them may end otherwise than in None: `read_json` bounds their depth.
    """
    files = {"solution.py": code}
    result = checked(sandbox().run(_CALLER, files=files, stdin=json.dumps(tests), limits=LIMITS))
    values: list[Any] = []
    for line in result.stdout.split("\n")[: len(tests)]:
        try:
            row = read_json(line)
        except ValueError:
            row = None
        right = isinstance(row, dict) and set(row) == {"value"}
        values.append([row["value"]] if right else None)
    return values + [None] * (len(tests) - len(values))


def agree(values: list[Any], expected: list[Any]) -> list[bool]:
    """Which values are the expected ones; True is not 1 and 1 is not 1.0."""
    return [
        value is not None and canonical(value[0]) == canonical(right)
        for value, right in zip(values, expected)
    ]
