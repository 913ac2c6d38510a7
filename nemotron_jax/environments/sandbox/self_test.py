"""Five attacks tried in a new sandbox before it is trusted."""

import json
import os
import tempfile
from collections.abc import Callable

from nemotron_jax.environments.sandbox.limits import Limits, Result
from nemotron_jax.environments.sandbox.tiers import SandboxUnavailable

# Each answers True when it got through.
_ATTACKS = """
import ctypes, json, os, socket, sys
secret, launcher = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
def network():
    socket.socket(socket.AF_INET, socket.SOCK_STREAM)
def host_file():
    open(secret).read()
def write_outside():
    for path in ("/probe", "/usr/probe", os.path.dirname(secret) + "/probe", "/dev/shm/probe"):
        try:
            open(path, "w")
            return
        except OSError:
            pass
    raise OSError
def other_process():
    try:
        open(f"/proc/{launcher}/environ", "rb").read()
    except OSError:
        os.kill(int(launcher), 0)
def namespaces():
    if libc.unshare(0x10000000) and libc.ptrace(0, 0, 0, 0):
        raise OSError
got = {}
for attack in (network, host_file, write_outside, other_process, namespaces):
    try:
        attack()
        got[attack.__name__] = True
    except Exception:
        got[attack.__name__] = False
print(json.dumps(got))
"""


def run(in_sandbox: Callable[..., Result]) -> str:
    """Say that the attacks, run by `in_sandbox` (`Sandbox.run`), were held.

    Raises SandboxUnavailable when one got through.
    """
    with tempfile.TemporaryDirectory() as folder:
        secret = os.path.join(folder, "secret")
        with open(secret, "w", encoding="ascii") as file:
            file.write("secret")
        # As open as a careless user leaves things: only the sandbox stands before it.
        os.chmod(folder, 0o777)
        os.chmod(secret, 0o666)
        arguments = [secret, str(os.getpid())]
        result = in_sandbox(_ATTACKS, arguments=arguments, limits=Limits(wall_s=20, cpu_s=10))
    if result.infra_error:
        raise SandboxUnavailable(result.infra_error)
    try:
        got = json.loads(result.stdout)
    except ValueError:
        raise SandboxUnavailable(
            f"the self-test did not run: {(result.stderr or result.stdout)[-300:]!r}"
        ) from None
    through = [name for name, success in got.items() if success]
    if through or len(got) != 5:
        raise SandboxUnavailable(f"the self-test got through: {', '.join(through)}")
    return "self-test: 5 of 5 attacks held"
