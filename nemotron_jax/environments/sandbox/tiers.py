"""What a sandbox is made of here: its tier, its Python, its uids, its view of the file system."""

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile

SHIM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim.py")
TIERS = ("full", "fallback")
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # the same program, the same output
    "OPENBLAS_NUM_THREADS": "1",
    "TERM": "dumb",
}
DEVICES = ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
SYSTEM_FOLDERS = ("bin", "sbin", "lib", "lib64")  # links into /usr, or folders of their own
UIDS_A_BLOCK = 64  # a launcher claims one block, so it has at most as many slots
# Folders outside /usr that commands need to be found: links into it, and nothing else.
LINK_FOLDERS = ("/etc/alternatives",)
# Blocks of uids that no system gives to accounts; in a container with few uids, the top of them.
_FIRST_UID, _BLOCKS, _FIRST_UID_OF_FEW, _BLOCKS_OF_FEW = 0x70000000, 4096, 60_000, 80
_CAP_SETGID, _CAP_SETUID = 6, 7
_OLDEST_LANDLOCK_FOR_OWN_UID = 3  # earlier ones let a path be truncated
HELP = (
    "install bubblewrap (apt-get install bubblewrap, or dnf install bubblewrap) "
    "and allow user namespaces (sysctl user.max_user_namespaces > 0, in a container "
    "--security-opt seccomp=unconfined), or use Linux 5.13 or newer with Landlock"
)


class SandboxUnavailable(RuntimeError):
    """Neither tier holds on this machine; model-written code is not run."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the launcher needs to know; travels to it as JSON."""

    tier: str
    python: str
    slots: int
    memory_bytes: int
    bubblewrap: str = ""
    may_disable_namespaces: bool = False  # bubblewrap >= 0.8

    def readable(self) -> list[str]:
        """Folders that sandboxed code may read: the system's programs and this Python."""
        folders = ["/usr", *(f"/{name}" for name in SYSTEM_FOLDERS), *LINK_FOLDERS]
        folders = [folder for folder in folders if os.path.isdir(folder)]
        return folders + python_folders(self.python)

    def bubblewrap_arguments(
        self, scratch_bytes: int, box: str | None, filter_fd: int
    ) -> list[str]:
        """bubblewrap's command line. `box` is a folder of the host to work in; None makes one."""
        arguments = [self.bubblewrap, "--unshare-user", "--unshare-ipc", "--unshare-pid"]
        arguments += ["--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
        arguments += ["--disable-userns"] if self.may_disable_namespaces else []
        arguments += ["--die-with-parent", "--new-session", "--clearenv"]
        for name, value in (ENVIRONMENT | {"HOME": "/box", "TMPDIR": "/tmp"}).items():
            arguments += ["--setenv", name, value]
        arguments += ["--ro-bind", "/usr", "/usr"]
        for name in SYSTEM_FOLDERS:
            if os.path.islink(f"/{name}"):
                arguments += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        for folder in (*python_folders(self.python), *filter(os.path.isdir, LINK_FOLDERS)):
            arguments += ["--ro-bind", folder, folder]
        arguments += ["--dev", "/dev", "--remount-ro", "/dev"]
        for name in ("box", "tmp"):
            if box is None:
                arguments += ["--size", str(scratch_bytes), "--tmpfs", f"/{name}"]
            else:
                arguments += ["--bind", os.path.join(box, name), f"/{name}"]
        arguments += ["--remount-ro", "/", "--chdir", "/box", "--hostname", "sandbox"]
        arguments += ["--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        return [*arguments, "--seccomp", str(filter_fd), "--"]


def settings(tier: str, *, slots: int, memory_bytes: int, python: str | None) -> Settings:
    """Settings of a tier. Raises SandboxUnavailable where it plainly cannot be had."""
    if sys.platform != "linux":
        raise SandboxUnavailable(f"sandbox: {sys.platform} has neither namespaces nor Landlock")
    if os.getuid() == 0 and not _has_setuid():
        raise SandboxUnavailable("sandbox: root without the right to change its uid (CAP_SETUID)")
    python = python or find_python()
    if tier == "fallback":
        from nemotron_jax.environments.sandbox import kernel_calls

        version = kernel_calls.landlock_version()
        least = 1 if os.getuid() == 0 else _OLDEST_LANDLOCK_FOR_OWN_UID
        if version < least:
            raise SandboxUnavailable(
                f"sandbox: Landlock version {version} of this kernel is below {least}"
            )
        return Settings(tier, python, slots, memory_bytes)
    command = next((f"{p}/bwrap" for p in os.get_exec_path() if os.path.exists(f"{p}/bwrap")), None)
    if command is None:
        raise SandboxUnavailable("sandbox: bubblewrap (bwrap) is not installed")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=False)
    new = "--disable-userns" in shown.stdout + shown.stderr
    return Settings(tier, python, slots, memory_bytes, command, new)


def find_python() -> str:
    """A Python that every uid may run: the system's, else this one's."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if os.access(path, os.X_OK):
            return path
    return os.path.realpath(sys.executable)


def python_folders(python: str) -> list[str]:
    """Folders outside /usr that a Python needs to run."""
    real = os.path.realpath(python)
    folder = os.path.dirname(os.path.dirname(real))
    return [] if real.startswith("/usr/") else [folder]


def claim_uids(slots: int) -> tuple[int | None, socket.socket | None]:
    """The first of a block of uids that this process alone uses, and what holds the claim.

    The claim is a name in the kernel, free again when its holders are gone. None when not root: the
    code then runs under the user's own uid.
    """
    if os.getuid() != 0:
        return None, None
    if slots > UIDS_A_BLOCK:
        raise ValueError(f"sandbox: slots={slots} exceeds the {UIDS_A_BLOCK} uids of a block")
    with open("/proc/self/uid_map", encoding="ascii") as file:
        mapped = max(int(line.split()[0]) + int(line.split()[2]) for line in file)
    many = mapped > _FIRST_UID + _BLOCKS * UIDS_A_BLOCK
    first, blocks = (_FIRST_UID, _BLOCKS) if many else (_FIRST_UID_OF_FEW, _BLOCKS_OF_FEW)
    for block in range(blocks):
        base = first + block * UIDS_A_BLOCK
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with contextlib.suppress(OSError):
            holder.bind(f"\0nemotron_sandbox_uids_{base}")
            return base, holder
        holder.close()
    raise SandboxUnavailable(f"sandbox: all {blocks} blocks of uids are in use")


def make_scratch(pid: int) -> str:
    """A new folder that other uids may pass through but not list."""
    where = "/tmp" if os.getuid() == 0 and os.path.isdir("/tmp") else None
    folder = tempfile.mkdtemp(prefix=f"nemotron_sandbox_{pid}_", dir=where)
    os.chmod(folder, 0o711)
    return folder


def _has_setuid() -> bool:
    with open("/proc/self/status", encoding="ascii") as file:
        rights = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    return bool(rights >> _CAP_SETUID & 1 and rights >> _CAP_SETGID & 1)
