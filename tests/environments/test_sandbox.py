"""The sandbox runs code, holds attacks at both tiers, and leaves nothing behind."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from nemotron_jax.environments.sandbox import (
    Limits,
    PythonKernel,
    Sandbox,
    Shell,
    seccomp,
)
from tests.environments.sandbox_attacks import ATTACKS, HOGS, QUICK

ROOT = pathlib.Path(__file__).parents[2]
SHORT = Limits(wall_s=1, cpu_s=10)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """What attacks aim at: a file and a folder that anybody may write, and a listening socket."""
    folder = pathlib.Path("/tmp" if os.getuid() == 0 else tmp_path_factory.mktemp("host"))
    folder = folder / f"sandbox_target_{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o777)
    secret = folder / "secret"
    secret.write_text("secret")
    secret.chmod(0o666)
    listener = socket.socket(socket.AF_UNIX)
    name = f"sandbox_target_{os.getpid()}"
    listener.bind("\0" + name)
    listener.listen()
    yield {"secret": secret, "folder": folder, "pid": os.getpid(), "abstract": name}
    listener.close()
    for path in (secret, folder / "planted"):
        path.unlink(missing_ok=True)
    folder.rmdir()


def filled(code: str, target: dict) -> str:
    for name, value in target.items():
        code = code.replace("{" + name + "}", str(value))
    return code


def test_a_program_reads_files_and_input_and_prints(box: Sandbox) -> None:
    code = "import sys, helper\nprint(helper.twice(input()), open('a/b').read(), sys.argv[1:])"
    files = {"helper.py": "def twice(x): return 2 * x", "a/b": b"bytes"}
    result = box.run(code, files=files, stdin="ab\n", arguments=["x"], limits=QUICK)
    assert result.ok and result.stdout == "abab bytes ['x']\n"


def test_exits_and_errors_are_told_apart(box: Sandbox) -> None:
    assert box.run("import sys; sys.exit(3)", limits=QUICK).exit_code == 3
    failed = box.run("def f():\n  1 / 0\nf()", limits=QUICK)
    assert failed.exit_code == 1 and failed.stderr.splitlines()[-1].startswith("ZeroDivisionError")
    assert '"program.py", line 2' in failed.stderr and "<string>" not in failed.stderr
    killed = box.run("import ctypes; ctypes.string_at(0)", limits=QUICK)
    assert killed.exit_code == 128 + signal.SIGSEGV and killed.infra_error is None
    assert "SyntaxError" in box.run("def", limits=QUICK).stderr
    long = "x" * 300_000  # more than a pipe holds, in both directions
    echo = box.run("import sys; print(sys.stdin.read())", stdin=long, limits=QUICK)
    assert echo.stdout == long + "\n"
    assert box.run("pass", stdin=long, limits=QUICK).ok


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_held(box: Sandbox, target: dict, name: str) -> None:
    result = box.run(filled(ATTACKS[name], target), limits=QUICK)
    assert result.infra_error is None
    assert "THROUGH" not in result.stdout, result.stdout
    assert result.stdout or "Error" in result.stderr, result  # the attack did run
    assert target["secret"].read_text() == "secret"
    assert [path.name for path in target["folder"].iterdir()] == ["secret"]


def test_the_attacks_get_through_without_a_sandbox(target: dict) -> None:
    """The same programs, run plainly, reach what they aim at: so the tests above can fail."""
    names = ["read a host file", "read through a link", "signal the user's process", "fork"]
    names += ["abstract socket", "start a program", "environment of the launcher", "tcp listen"]
    for name in names:
        code = filled(ATTACKS[name], target)
        cwd = target["folder"]
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
        )
        assert "THROUGH" in run.stdout, (name, run)
    (target["folder"] / "l").unlink()


QUICK_HOGS = ("memory", "one large allocation", "threads", "many files", "empty files", "pipes")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK_HOGS else pytest.param(n, marks=pytest.mark.slow) for n in HOGS],
)
def test_a_hog_is_stopped_and_leaves_nothing(box: Sandbox, name: str) -> None:
    result = box.run(HOGS[name], limits=QUICK)
    assert result.infra_error is None
    assert "THROUGH" not in result.stdout
    assert result.exit_code != 0
    assert result.seconds < 15
    assert box.run("print(1)", limits=QUICK).stdout == "1\n"


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)"])
def test_time_ends_a_run(box: Sandbox, code: str) -> None:
    result = box.run(code, limits=SHORT)
    assert result.ended == "wall" and result.seconds < 8


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_flood_of_output_is_cut(box: Sandbox, name: str) -> None:
    code = f"import sys\nwhile True: sys.{name}.write('x' * 9999)"
    result = box.run(code, limits=Limits(wall_s=20, output_bytes=1000))
    assert result.ended == "output" and len(getattr(result, name)) == 1000


@pytest.mark.slow
def test_a_cpu_hog_that_ignores_signals_is_ended(box: Sandbox) -> None:
    code = (
        "import signal\nfor s in set(range(1, 65)) - {9, 19, 32, 33}:\n"
        "  signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    )
    result = box.run(code, limits=Limits(wall_s=60, cpu_s=1))
    assert result.exit_code == 137 and result.ended == "exit"
    assert box.run(code, limits=SHORT).ended == "wall"


def test_a_kernel_keeps_its_variables_until_it_dies(box: Sandbox) -> None:
    with PythonKernel(box) as kernel:
        assert kernel.execute("import math\nx = 3").output == ""
        assert kernel.execute("print('a'); math.sqrt(x + 1)").output == "a\n2.0\n"
        failed = kernel.execute("1 / 0")
        assert failed.exit_code == 1 and "ZeroDivisionError" in failed.output
        assert kernel.execute("raise SystemExit").exit_code == 1 and kernel.alive
        assert kernel.execute("print('y' * 10**6)").ended == "output"
        assert kernel.execute("x").output == "3\n"
        assert kernel.execute("while True: pass", wall_s=0.5).ended == "died" and not kernel.alive
        assert kernel.execute("x").ended == "died"
    for forged in (
        "import os; os.write(3, b'zzzzzzzz')",
        "import os; os.write(3, b'ffffffff' + b'[' * 100)",
        "import os; os.write(3, b'00002710' + b'[' * 10000)",
        "import os; os._exit(0)",
        "import os; os.close(3)",
    ):
        with PythonKernel(box) as kernel:
            assert kernel.execute(forged, wall_s=2).ended == "died"


@pytest.mark.skipif(os.getuid() != 0, reason="at the fallback tier only root may start processes")
def test_a_shell_keeps_its_files_and_kills_what_is_left(box: Sandbox) -> None:
    with Shell(box, files={"data/a.txt": "b\na\n"}) as shell:
        shell.execute("sort data/a.txt > sorted; ln -s /etc/passwd link; mkdir -m 700 empty")
        ran = shell.execute("(sleep 2; echo late > late) & echo hello; exit 3")
        assert (ran.output, ran.exit_code, ran.ended) == ("hello\n", 3, "exit")
        assert shell.execute("sleep 60", wall_s=0.3).ended == "wall"
        assert shell.execute("yes").ended == "output"
        assert shell.execute("kill -9 -1; kill -9 $PPID; echo x").ended in ("exit", "died")
        if shell.alive:
            tree = shell.snapshot()
            assert {path: entry.kind for path, entry in tree.items()} == {
                "data": "folder",
                "data/a.txt": "file",
                "sorted": "file",
                "link": "link",
                "empty": "folder",
            }
            assert tree["sorted"].content == b"a\nb\n" and tree["link"].content == b"/etc/passwd"
            assert tree["empty"].mode == 0o700


def test_what_programs_do_with_their_own_files_goes_through(box: Sandbox) -> None:
    code = (
        "import os, shutil, socket\nopen('f', 'w').write('x')\nos.chmod('f', 0o600)\n"
        "shutil.copyfile('f', 'g'); shutil.copymode('f', 'g'); shutil.move('g', 'h')\n"
        "fd = os.open('h', os.O_RDWR); os.ftruncate(fd, 0); os.utime(fd, (5, 5))\n"
        "a, b = socket.socketpair(); a.send(b'1'); a.sendall(b'2'); print(b.recv(2), "
        "os.stat('h').st_mtime)"
    )
    assert box.run(code, limits=QUICK).stdout == "b'12' 5.0\n"


@pytest.mark.skipif(os.getuid() != 0, reason="at the fallback tier only root may start processes")
def test_a_shell_cannot_be_made_to_stand_still(box: Sandbox) -> None:
    with Shell(box) as shell:
        began = time.monotonic()
        for signal_name in ("STOP", "TSTP", "TTIN", "TTOU"):
            shell.execute(f"kill -{signal_name} $PPID; kill -{signal_name} -1; true", wall_s=1)
        assert time.monotonic() - began < 6 and shell.alive
        assert shell.execute("touch a; cp -p a b; tar cf t a; ls -l | wc -l").output == "4\n"


def test_wrong_arguments_are_refused(box: Sandbox) -> None:
    with pytest.raises(ValueError, match="must be relative"):
        box.run("pass", files={"../x": ""})
    with pytest.raises(ValueError, match="budget"):
        box.run("pass", limits=Limits(memory_bytes=1 << 50))
    with pytest.raises(ValueError, match="wall_s=0"):
        Limits(wall_s=0)
    with pytest.raises(ValueError, match="tier='open'"):
        Sandbox(tier="open")


def test_the_filter_has_the_kernel_headers_numbers() -> None:
    for column, path in enumerate(
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm-generic/unistd.h")
    ):
        if not os.path.exists(path):
            continue
        words = [line.split() for line in pathlib.Path(path).read_text().splitlines()]
        known = {
            w[1].removeprefix("__NR_").removeprefix("__NR3264_"): int(w[2])
            for w in words
            if len(w) == 3 and w[0] == "#define" and w[2].isdigit()
        }
        by_argument = {
            **{name: numbers for name, (numbers, _) in seccomp.SIGNALS.items()},
            **{
                name: getattr(seccomp, name.upper())
                for name in (
                    "clone",
                    "prctl",
                    "ioctl",
                    "socketpair",
                    "fcntl",
                    "sendto",
                    "utimensat",
                )
            },
        }
        for table in (
            *(seccomp.DENIED, seccomp.DENIED_TO_OWN_UID, seccomp.FORKS, seccomp.ABSENT),
            *(seccomp.DENIED_AMONG_HOST_FILES, seccomp.UNSUPPORTED_AMONG_HOST_FILES),
            *(seccomp.UNSUPPORTED, by_argument),
        ):
            for name, numbers in table.items():
                if name in known:
                    assert numbers[column] == known[name], name


def test_importing_it_needs_no_jax() -> None:
    code = "import sys, nemotron_jax.environments.sandbox; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
