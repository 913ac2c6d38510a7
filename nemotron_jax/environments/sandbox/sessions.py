"""Sandboxes with a memory: a Python whose variables live on, and a shell whose files do."""

import base64
import dataclasses

from nemotron_jax.environments.sandbox.channel import Session
from nemotron_jax.environments.sandbox.limits import KERNEL_LIMITS, SHELL_LIMITS, Limits
from nemotron_jax.environments.sandbox.runner import Sandbox

MOST_CELL_BYTES = 16 << 10  # of one reply that a model is to read


@dataclasses.dataclass(frozen=True)
class Output:
    """What one cell or command printed, and how it ended."""

    output: str
    ended: str  # "exit", "wall", "output" or "died": the session is over after "died"
    exit_code: int = 0


class PythonKernel(Session):
    """A Python that runs cells in one namespace. What it replies is the cells' own word."""

    mode = "python"

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        limits: Limits = KERNEL_LIMITS,
        files: dict[str, str | bytes] | None = None,
        slot: int | None = None,
    ) -> None:
        limits = dataclasses.replace(limits, output_bytes=min(limits.output_bytes, MOST_CELL_BYTES))
        super().__init__(sandbox, limits=limits, files=files, slot=slot)

    def execute(self, code: str, *, wall_s: float = 10.0) -> Output:
        """Run one cell; a last expression's value is printed, as in a notebook."""
        reply = self.ask({"code": code}, wall_s)
        if reply is None:
            return Output("", "died", -1)
        text, most = str(reply.get("output", "")), self._limits.output_bytes
        failed = 1 if reply.get("failed") else 0
        if len(text) > most:
            return Output(text[:most], "output", failed)
        return Output(text, "exit", failed)


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One entry of a file tree: kind is "file", "folder", "link" or "other"."""

    kind: str
    mode: int
    content: bytes = b""  # a link's is its target


class Shell(Session):
    """A folder in which commands run one after another, each in a shell of its own.

    Raises OSError where processes cannot be told apart from the user's: at the fallback tier
    without root.
    """

    mode = "shell"

    def __init__(
        self,
        sandbox: Sandbox,
        *,
        limits: Limits = SHELL_LIMITS,
        files: dict[str, str | bytes] | None = None,
        slot: int | None = None,
    ) -> None:
        if sandbox.tasks(limits) is None:
            raise OSError("sandbox: shells need bubblewrap, or root at the fallback tier")
        limits = dataclasses.replace(limits, output_bytes=min(limits.output_bytes, MOST_CELL_BYTES))
        super().__init__(sandbox, limits=limits, files=files, slot=slot)

    def execute(self, command: str, *, wall_s: float = 10.0) -> Output:
        """Run one command in the folder; every process it leaves is ended."""
        reply = self.ask({"command": command, "timeout_s": wall_s}, wall_s + 10.0)
        if reply is None or "error" in reply:
            self.close()
            return Output("", "died", -1)
        ended, output = reply.get("ended"), str(reply.get("output", ""))
        if isinstance(ended, int):
            return Output(output, "exit", ended)
        return Output(output, str(ended), 137)

    def snapshot(self) -> dict[str, FileEntry] | None:
        """Every entry under the folder by its path; None when there are too many or too large."""
        reply = self.ask({"snapshot": True}, 20.0)
        if reply is None or "entries" not in reply:
            return None
        return {
            path: FileEntry(kind, mode, base64.b64decode(text) if kind == "file" else text.encode())
            for path, (kind, mode, text) in reply["entries"].items()
        }
