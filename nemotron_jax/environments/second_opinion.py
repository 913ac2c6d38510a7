"""math-verify (the extra `math`) as a second opinion on answers, in a process of its own.

It reads LaTeX with sympy, which a text can keep busy for ever: the process is asked with a limit,
ended when it runs past it, and started again for the next question. Without the package, and after
any failure, the second opinion is no.
"""

import atexit
import functools
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading

# Wall seconds for one question, and for the first one, which loads sympy.
LIMIT_S, FIRST_LIMIT_S = 5.0, 60.0
# After so many failures in a row the process is not started again.
MOST_FAILURES = 5
_WORKER = """
import json, resource, signal, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    signal.alarm(30)  # where nobody is left to end it
    try:
        boxed = ["\\\\boxed{" + text + "}" for text in json.loads(line)]
        boxed = [parse(text, parsing_timeout=None) for text in boxed]
        right = all(boxed) and verify(*boxed, timeout_seconds=None)
    except Exception:
        right = False
    print("yes" if right else "no", flush=True)
"""


@functools.cache
def installed() -> bool:
    """Whether the package math-verify can be imported (the extra `math`)."""
    return importlib.util.find_spec("math_verify") is not None


def agrees(expected: str, given: str) -> bool:
    """Whether math-verify takes an answer for the expected one; False where it cannot be asked."""
    return installed() and _judge.ask(expected, given)


class _Judge:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0  # the process that started it
        self.failures = 0

    def ask(self, expected: str, given: str) -> bool:
        with self._lock:
            try:
                self._start()
                if self._process is None:
                    return False
                question = json.dumps([expected, given]) + "\n"
                self._process.stdin.write(question.encode())
                right = self._line(LIMIT_S) == b"yes\n"
                self.failures = 0
                return right
            except (OSError, ValueError):
                self.failures += 1
                self.close()
                return False

    def _start(self) -> None:
        if self._process is not None and self._owner != os.getpid():
            self._process = None  # a forked process has none of its own yet
        if self._process is not None or self.failures >= MOST_FAILURES:
            return
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if self._line(FIRST_LIMIT_S) != b"ready\n":
            raise OSError("math-verify does not start")

    def _line(self, limit_s: float) -> bytes:
        """What the process writes next; raises TimeoutError, an OSError, past the limit."""
        ready, _, _ = select.select([self._process.stdout], [], [], limit_s)
        if not ready:
            raise TimeoutError("math-verify took too long")
        line = self._process.stdout.readline()
        if not line:
            raise OSError("math-verify ended")
        return line

    def close(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None


_judge = _Judge()
atexit.register(_judge.close)
