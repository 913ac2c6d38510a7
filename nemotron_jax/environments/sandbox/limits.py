"""What a sandbox may use, and how a run in it ended."""

import dataclasses

# The launcher's helpers and the kernel's own memory for one sandbox, counted against the budget.
OVERHEAD_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one sandbox may use; a run that passes a limit is ended or sees an error."""

    wall_s: float = 5.0
    cpu_s: int = 4  # of each process
    memory_bytes: int = 128 << 20  # address space of each process
    scratch_bytes: int = 16 << 20  # all files together
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20  # standard output and error each
    processes: int = 1  # 1: the code can start none
    open_files: int = 64

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(
                    f"Limits: {field.name}={getattr(self, field.name)} is not positive"
                )

    @property
    def reserved_bytes(self) -> int:
        """The most memory that such a sandbox can take."""
        return self.memory_bytes * self.processes + self.scratch_bytes + OVERHEAD_BYTES


SHELL_LIMITS = Limits(wall_s=600, cpu_s=10, memory_bytes=48 << 20, processes=10)
KERNEL_LIMITS = Limits(wall_s=600, cpu_s=60)


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. With `infra_error` the sandbox failed: nothing is known about the code."""

    stdout: str
    stderr: str
    exit_code: int  # 128 + n when signal n ended it
    ended: str  # "exit", "wall", "output" or "scratch": the limit that ended it
    seconds: float
    infra_error: str | None = None

    @property
    def ok(self) -> bool:
        """The code ended by itself and reported success."""
        return self.infra_error is None and self.ended == "exit" and self.exit_code == 0
