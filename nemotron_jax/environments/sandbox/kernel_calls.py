"""prctl, seccomp, Landlock, unshare and mount by ctypes: what the standard library lacks."""

import ctypes
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 0x4000, 1 << 18, 2
# Landlock has the same numbers on every machine.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULE_PATH_BENEATH, _ASK_VERSION = 1, 1
# Rights over files that each version of the interface knows, as masks of bits 0..n-1.
_RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_MAKE_CHAR, _MAKE_SOCK, _MAKE_BLOCK, _IOCTL_DEV = 1 << 6, 1 << 9, 1 << 11, 1 << 15
_TCP = 3  # bind and connect
_SCOPES = 3  # abstract sockets, signals
NETWORK_SINCE, SCOPES_SINCE = 4, 6


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process."""
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def install_filter(program: bytes) -> None:
    """Put this thread under a seccomp filter; NO_NEW_PRIVS must be set before."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    filled = Program(len(program) // 8, ctypes.addressof(code))
    result = _LIBC.prctl(PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0)
    _check(result, "prctl(PR_SET_SECCOMP)")


def landlock_version() -> int:
    """The kernel's Landlock version, 0 where there is none."""
    return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _ASK_VERSION))


def restrict_paths(readable: list[str], writable: list[str], devices: list[str]) -> None:
    """Confine this process to paths, for good: read and execute, everything, read and write.

    Also denies TCP and signals to other processes where the kernel's Landlock can.
    """
    version = landlock_version()
    rights = (1 << _RIGHTS_BY_VERSION[min(version, 5)]) - 1
    network = _TCP if version >= NETWORK_SINCE else 0
    scopes = _SCOPES if version >= SCOPES_SINCE else 0
    attributes = struct.pack("=QQQ", rights, network, scopes)
    size = 8 if version < NETWORK_SINCE else 16 if version < SCOPES_SINCE else 24
    call = _LIBC.syscall
    ruleset = call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
    _check(ruleset, "landlock_create_ruleset")
    no_devices = ~(_MAKE_CHAR | _MAKE_BLOCK | _MAKE_SOCK | _IOCTL_DEV)
    groups = (
        (readable, _EXECUTE | _READ_FILE | _READ_DIR),
        (writable, rights & no_devices),
        (devices, _READ_FILE | _WRITE_FILE),
    )
    for paths, allowed in groups:
        for path in paths:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", allowed, handle)
            _check(call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0), f"landlock rule {path}")
            os.close(handle)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _check(call(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def enter_private_mounts() -> None:
    """Keep this process's later mounts to it and its children. Needs CAP_SYS_ADMIN."""
    _check(_LIBC.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    _check(_LIBC.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None), "mount")


def mount_memory(path: str, *, size: int, files: int, uid: int) -> None:
    """Mount a file system of `size` bytes and `files` files at most, owned by uid."""
    options = f"size={size},nr_inodes={files},mode=700,uid={uid},gid={uid}".encode()
    flags = ctypes.c_ulong(_MS_NOSUID | _MS_NODEV)
    _check(_LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", flags, options), f"mount {path}")


def unmount(path: str) -> None:
    """Take a mount away now, even while somebody still has a file in it open."""
    _check(_LIBC.umount2(path.encode(), _MNT_DETACH), f"umount {path}")
