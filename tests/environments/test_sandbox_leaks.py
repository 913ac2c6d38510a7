"""Many sandboxes, killed sandboxes and sandboxes that fork: nothing is left of any of them."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from nemotron_jax.environments.sandbox import SHELL_LIMITS, Limits, Sandbox, Shell
from tests.environments.sandbox_attacks import QUICK

ROOT = pathlib.Path(__file__).parents[2]


def uids(sandbox: Sandbox) -> set[int]:
    """The uids that this sandbox's slots run under; empty when they run under the user's own."""
    first = sandbox.launched["first_uid"]
    return set() if first is None else set(range(first, first + sandbox.settings.slots))


def processes(of: set[int]) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid in of:
                found.append(int(name))
    return found


def children(pid: int) -> list[str]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8") as file:
            fields = file.read().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid:
                found.append(f"{name} {fields[0]}")
    return found


def nobody(sandbox: Sandbox, of: set[int]) -> bool:
    """Whether the sandboxes' processes are gone, with time for a last one to be reaped."""
    for _ in range(100):
        if not processes(of) and len(children(sandbox._launcher.pid)) <= 1:  # the sweeper
            return True
        time.sleep(0.02)
    return False


def descendants(pid: int) -> list[int]:
    found = [int(line.split()[0]) for line in children(pid)]
    return found + [deeper for child in found for deeper in descendants(child)]


def alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def resident(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


FORKERS = {
    "fork bomb": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "daemons": (
        "import os, time\nfor i in range(3):\n"
        "  if os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(60)\n    os._exit(0)"
    ),
    "leaves a child": "import os, time\nif os.fork() == 0: time.sleep(60)",
    "refuses to die": (
        "import os, signal, time\nsignal.signal(15, signal.SIG_IGN)\n"
        "while True:\n  try:\n    if os.fork() == 0: os.setsid()\n  except OSError: time.sleep(0.1)"
    ),
}


@pytest.mark.skipif(os.getuid() != 0, reason="at the fallback tier only root may start processes")
@pytest.mark.parametrize("name", FORKERS)
def test_no_child_survives(box: Sandbox, name: str) -> None:
    mine = uids(box)
    limits = Limits(wall_s=1, processes=8, memory_bytes=64 << 20)
    result = box.run(FORKERS[name], limits=limits)
    assert result.infra_error is None
    assert nobody(box, mine), (processes(mine), children(box._launcher.pid))


@pytest.mark.skipif(os.getuid() != 0, reason="at the fallback tier only root may start processes")
def test_processes_are_counted(box: Sandbox) -> None:
    code = (
        "import os, time\nn = 0\ntry:\n  while n < 200:\n    if os.fork() == 0: time.sleep(9)\n"
        "    n += 1\nexcept OSError: pass\nprint(n)"
    )
    made = int(box.run(code, limits=Limits(wall_s=20, processes=8)).stdout)
    assert 5 <= made <= 11


KILLED = """
import sys, threading, time
from nemotron_jax.environments.sandbox import Limits, Sandbox
box = Sandbox(tier=sys.argv[1])
limits = Limits(wall_s=60, processes=int(sys.argv[2]), memory_bytes=64 << 20)
code = "import os, time\\nif %s: os.fork() or os.setsid()\\ntime.sleep(60)" % (limits.processes > 1)
for _ in range(4): threading.Thread(target=box.run, args=(code,), kwargs={"limits": limits}).start()
time.sleep(1.5)
print(box._launcher.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    "whom",
    ["both", *(pytest.param(name, marks=pytest.mark.slow) for name in ("user", "launcher"))],
)
def test_killed_while_running_it_leaves_nothing(box: Sandbox, whom: str) -> None:
    forks = "4" if os.getuid() == 0 else "1"
    command = [sys.executable, "-c", KILLED, box.tier, forks]
    user = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    launcher = int(user.stdout.readline())
    groups = list(pathlib.Path("/sys/fs/cgroup").glob(f"**/nemotron_sandbox_{launcher}"))
    folder = list(pathlib.Path("/tmp").glob(f"nemotron_sandbox_{launcher}_*"))
    tree = descendants(launcher)
    assert len(tree) >= 5
    for pid in {"user": [user.pid], "launcher": [launcher], "both": [user.pid, launcher]}[whom]:
        os.kill(pid, signal.SIGKILL)
    for _ in range(200):
        left = [pid for pid in tree if alive(pid)]
        left += [path for path in groups + folder if path.exists()]
        if not left:
            break
        time.sleep(0.05)
    user.kill()
    user.wait()
    user.stdout.close()
    assert not left


@pytest.mark.slow
def test_sixty_four_at_once_stay_within_one_budget(box: Sandbox) -> None:
    code = (
        "import time\nb = bytearray(90 << 20)\n"
        "for i in range(0, len(b), 4096): b[i] = 1\ntime.sleep(3)"
    )
    limits = Limits(wall_s=90, cpu_s=30)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            pids = processes(mine)
            peak = max(peak, sum(resident(pid) for pid in pids))

    mine = uids(box)
    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(64) as pool:
        results = list(pool.map(lambda _: box.run(code, limits=limits), range(64)))
    done.set()
    watcher.join()
    assert all(result.ok for result in results), next(r for r in results if not r.ok)
    assert peak <= box.memory_bytes
    if mine:
        assert peak > 90 << 20  # the watch saw them


def test_a_small_budget_makes_runs_wait(box: Sandbox) -> None:
    with Sandbox(tier=box.tier, memory_bytes=2 * Limits().reserved_bytes) as small:
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            sleep = "import time; time.sleep(0.5)"
            results = list(pool.map(lambda _: small.run(sleep, limits=QUICK), range(4)))
        assert all(result.ok for result in results)
        assert time.monotonic() - start >= 1.0


@pytest.mark.slow
def test_two_thousand_runs_leak_nothing(box: Sandbox) -> None:
    mine, launcher = uids(box), box._launcher.pid

    def held() -> tuple[int, int, int]:
        mounts = len(pathlib.Path(f"/proc/{launcher}/mounts").read_text().splitlines())
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{launcher}/fd")), mounts

    def one(number: int) -> bool:
        kinds = [
            lambda: box.run(f"print({number})", limits=QUICK).stdout == f"{number}\n",
            lambda: box.run("open('f', 'w').write('x' * 9999)", limits=QUICK).ok,
            lambda: box.run("1 / 0", limits=QUICK).exit_code == 1,
            lambda: box.run("import os; os.kill(os.getpid(), 9)", limits=QUICK).infra_error is None,
        ]
        return kinds[number % 4]()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(100)))
        assert nobody(box, mine)
        before, memory = held(), resident(launcher)
        assert all(pool.map(one, range(2000)))
    assert nobody(box, mine)
    assert held() == before
    assert resident(launcher) - memory < 2 << 20
    with Shell(box, limits=SHELL_LIMITS) as shell:
        assert shell.execute("ls").output == ""
