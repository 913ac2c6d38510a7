"""Several processes of one run on this machine, to rehearse what a pod does:

    python -m nemotron_jax.launch --processes=2 -- train.py --config=configs/pretrain_tiny.py \
        --workdir=runs/two

Each is started with the flags that join it to the others, and shows its part of the mesh's devices.
On a pod every machine starts its own instead: docs/scale.md.
"""

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from nemotron_jax.peers import free_port

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Start the processes and wait for all; the first status that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m nemotron_jax.launch", description=__doc__)
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument("program", nargs="+", help="after --: train.py or eval.py with its flags")
    given = parser.parse_args()
    if given.processes < 1:
        parser.error(f"--processes={given.processes}: must be at least 1")
    # In a group of their own: Ctrl-C at a terminal reaches them through this process, once.
    started = launch(given.program, given.processes, process_group=0)
    with _passed_on(started):
        return next(filter(None, [process.wait() for process in started]), 0)


def launch(program: Sequence[str], count: int, **options: object) -> list[subprocess.Popen]:
    """Processes 0 to `count` - 1 of a run of `program`, a script and its flags; `options` are
    those of Popen."""
    address = f"localhost:{free_port()}"
    flags = lambda index: [
        f"--coordinator={address}",
        f"--process_count={count}",
        f"--process_index={index}",
    ]
    return [
        subprocess.Popen([sys.executable, *program, *flags(index)], **options)
        for index in range(count)
    ]


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Signals to this process go to the first one, which lets all stop after the same step."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        processes[0].send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
