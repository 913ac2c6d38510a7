"""Grammars of strangers are compiled in a process of its own first, which a costly one ends.

llguidance bounds most of what it does, but not all: of intersections, as `allOf` makes them of
patterns, 26 take minutes and gigabytes. Within a server nothing could end that.
"""

import collections
import dataclasses
import hashlib
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Of CPU, and by the clock where others have the CPU. Grammars in use take a fiftieth.
MOST_CPU_S, MOST_S = 0.5, 2.0
MOST_BYTES = 4 << 30  # of addresses; a vocabulary of 131,072 takes a tenth
_MOST_KEPT = 1000  # errors that are remembered: whoever asks again costs nothing
_PROGRAM = Path(__file__).with_name("trial_process.py")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What compiling a grammar came to: why it is none, or nothing; and what it took."""

    error: str
    cpu_s: float = 0.0


class Trials:
    """Tries grammars over these tokens, of which some are special and one ends a text.

    For several threads: each that calls at the same time has a process, which stays for the next.
    """

    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], end: int) -> None:
        self._said = {
            "tokens": list(tokens),
            "special": list(special),
            "end": end,
            "most_cpu_s": MOST_CPU_S,
            "most_s": MOST_S,
            "most_bytes": MOST_BYTES,
        }
        self._idle: collections.deque[subprocess.Popen[bytes]] = collections.deque()
        self._refused: dict[bytes, Trial] = {}

    def of(self, source: str) -> Trial:
        """Try a grammar, for at most MOST_S. Raises RuntimeError where it cannot be tried."""
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).digest()
        if (known := self._refused.get(name)) is not None:
            return known
        process = self._process()
        try:
            _say(process, source)
            trial = Trial(*pickle.load(process.stdout))
        except (OSError, EOFError):
            trial = _ended(process)
            if process.returncode == -signal.SIGALRM:  # it may be the others that took the time
                return trial
        else:
            self._idle.append(process)
        if trial.error:
            if len(self._refused) >= _MOST_KEPT:
                self._refused.clear()
            self._refused[name] = trial
        return trial

    def _process(self) -> subprocess.Popen[bytes]:
        """One that waits, or a new one."""
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                break
            if process.poll() is None:
                return process
            _close(process)
        # -P: the files beside it are not modules of its own, as http.py would be.
        command = [sys.executable, "-P", str(_PROGRAM)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(command, **pipes)
        _say(process, self._said)
        return process


def _say(process: subprocess.Popen[bytes], value: object) -> None:
    pickle.dump(value, process.stdin)
    process.stdin.flush()


def _ended(process: subprocess.Popen[bytes]) -> Trial:
    """Why a process is over, or as good as."""
    process.kill()
    _close(process)
    code = process.returncode
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return Trial(f"it takes more than {MOST_CPU_S:g} s to be compiled; make it simpler")
    if code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL):
        return Trial("it takes too much memory, or nests too deep, to be compiled; make it simpler")
    raise RuntimeError(f"the process that tries grammars ended with status {code}")


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except OSError:  # what was not sent yet has nobody to go to
            pass
    process.wait()
