"""A run of several processes: how they join, what they do together, and how they end together.

Everything here is free and without effect in a program that is one process. jax is imported when
processes join, not before: a host's settings come first.
"""

import ctypes
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nemotron_jax.peers import (
    GRACE_S,
    JOIN_S,
    Facts,
    Peers,
    free_port,
    gather,
    host_and_port,
    listen,
    reach,
)

T = TypeVar("T")

# JAX's own heartbeats end a process by SIGABRT, without a word to its user. The peers hear of a
# loss long before that.
_HEARTBEAT_S = 600
_TAKES_SIGTERM = "jax_enable_preemption_service"  # for a service of its own
_SEEN_WITHIN_S = 60.0  # a network file system shows a new name to other machines this late

_peers: Peers | None = None
_whole: Callable[[], str] = lambda: ""
_ending = threading.Lock()


def join(
    coordinator: str,
    count: int,
    index: int,
    facts: Facts,
    *,
    whole: Callable[[], str] = lambda: "",
) -> None:
    """Join `count` processes, of which process 0 listens at `coordinator`, as number `index`.

    `facts` are what all must have been started with; `whole` names the newest checkpoint, for the
    last sentence of a run that loses a process. Raises ValueError for values out of range and for
    processes that were started otherwise, TimeoutError where some do not come.
    """
    global _whole
    address = host_and_port(coordinator)
    if address is None:
        raise ValueError(
            f"--coordinator={coordinator}: must be HOST:PORT, an address of process 0's machine "
            "and a free port of it"
        )
    if count < 1:
        raise ValueError(f"--process_count={count}: must be at least 1")
    if not 0 <= index < count:
        raise ValueError(
            f"--process_index={index}: must lie in 0..{count - 1} (--process_count={count} less 1)"
        )
    if count == 1:
        return
    host, port = address
    _whole = whole
    if index == 0:
        try:
            server = listen(port)
        except OSError as error:
            raise ValueError(
                f"--coordinator={coordinator}: port {port} cannot be listened at "
                f"({error.strerror}); name a free port of this machine"
            ) from None
        told = free_port()
        peers = gather(server, count, facts, end_with_loss, told=told)
    else:
        peers = reach(host, port, count, index, facts, end_with_loss)
    _join_jax(
        peers,
        coordinator_address=f"[{host}]:{peers.told}" if ":" in host else f"{host}:{peers.told}",
        num_processes=count,
        process_id=index,
        cluster_detection_method="deactivate",
    )


def join_detected(facts: Facts, *, whole: Callable[[], str] = lambda: "") -> None:
    """Join the processes that JAX finds around this one: of a Cloud TPU slice, Slurm, Kubernetes.

    Raises ValueError where it finds none, and as `join` does.
    """
    import jax

    global _whole
    _whole = whole
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_S)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed=auto: JAX finds no cluster around this process ({error}); give "
            "--coordinator, --process_count and --process_index"
        ) from None
    # JAX tells the number of processes only once it has made its devices, of which a CPU shows
    # as many as the mesh has in each process.
    from jax._src.distributed import global_state

    count, index = global_state.num_processes, global_state.process_id
    if count == 1:
        return
    host, _ = host_and_port(global_state.coordinator_address)
    if index == 0:
        server = listen(0)
        global_state.client.key_value_set("nemotron_jax", str(server.getsockname()[1]))
        _keep(gather(server, count, facts, end_with_loss))
        return
    port = global_state.client.blocking_key_value_get("nemotron_jax", int(JOIN_S * 1000))
    _keep(reach(host, int(port), count, index, facts, end_with_loss))


def process_count() -> int:
    """How many processes the run has."""
    return 1 if _peers is None else _peers.count


def process_index() -> int:
    """This process's number among them."""
    return 0 if _peers is None else _peers.index


def is_first() -> bool:
    """Whether this process writes what a run has once, and speaks."""
    return process_index() == 0


def say(value: Any, name: str = "") -> Any:
    """Begin an exchange of JSON-able values; `hear` gives all processes' by index."""
    return [value] if _peers is None else _peers.say(value, name)


def hear(key: Any) -> list[Any]:
    """What all processes have said in an exchange, by index; waits for the last of them."""
    return key if _peers is None else _peers.hear(key)


def meet(name: str = "") -> None:
    """Wait until every process has come to this place."""
    hear(say(None, name))


def from_first(make: Callable[[], T], name: str = "") -> T:
    """What process 0 makes, a JSON-able value, in every process; its ValueError too."""
    if not is_first():
        error, value = hear(say(None, name))[0]
        if error is not None:
            raise ValueError(error)
        return value
    try:
        value = make()
    except ValueError as error:
        say((str(error), None), name)
        raise
    hear(say((None, value), name))
    return value


def first_alone(make: Callable[[], T]) -> T:
    """What `make` gives in every process; process 0 makes it before the others do, who find the
    files that it has written."""
    made = []
    from_first(lambda: made.append(make()))
    return made[0] if made else make()


def check_shared(flag: str, directory: Path) -> None:
    """Raise ValueError unless every process sees in the directory what process 0 writes there."""
    if process_count() == 1:
        return
    probe = None
    if is_first():
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".seen-{secrets.token_hex(8)}"
        probe.touch()
    name = from_first(lambda: probe.name)
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not (seen := (directory / name).exists()) and time.monotonic() < deadline:
        if directory.is_dir():
            os.listdir(directory)  # lets a network file system look anew
        time.sleep(0.1)
    blind = [str(index) for index, sees in enumerate(hear(say(seen))) if not sees]
    if probe is not None:
        probe.unlink()
    if blind:
        raise ValueError(
            f"--{flag}={directory}: process {', '.join(blind[:8])} does not see what process 0 "
            "writes there; name a directory of a file system that all share"
        )


def lost(within_s: float = 0.0) -> bool:
    """Whether another process has ended, or does within some seconds."""
    return _peers is not None and _peers.lost.wait(within_s)


def leave(status: int) -> None:
    """End this process's part in a run of several, which does not return where something failed.

    With status 0 the others are told that all is well, and waited for.
    """
    if _peers is None:
        return
    if status == 0:
        meet("leave")
        _peers.goodbye()
        return
    # jax would wait for processes that will not come, and then abort.
    _end(status)


def end_with_loss() -> NoReturn:
    """End this process because another one has, with one sentence and status 1."""
    _ending.acquire()  # a second thread that comes here waits for the end
    saved = _whole()
    program, state = Path(sys.argv[0]).name, f"{saved} is whole" if saved else "no step is saved"
    reason = f"another process of this run ended; start all of them again: {state}"
    print(f"{program}: {reason}", file=sys.stderr)
    _end(1)


def _join_jax(peers: Peers, **place: Any) -> None:
    """Let jax join as the peers have; they hear of it where that fails."""
    import jax

    _keep(peers)
    jax.config.update(_TAKES_SIGTERM, False)
    jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_S, **place)


def _keep(peers: Peers) -> None:
    global _peers
    _peers = peers
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _on_abort)
    if peers.index != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # process 0 alone speaks


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Where process 0's machine is gone, jax's runtime aborts from a thread of its own, and no
    handler of Python's runs in time; one of the C library's does. Other aborts go on."""
    if lost(GRACE_S):
        time.sleep(GRACE_S)  # the main thread may have a sentence of its own
        end_with_loss()


def _end(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
