"""System calls that sandboxed code may not make, as a classic BPF program for the kernel's filter.

A denied call fails with EPERM, so that the code sees an error and goes on; a call in the numbering
of another machine kills the process. Calls newer than the table do not exist for the code (ENOSYS).
Numbers: asm/unistd_64.h and asm-generic/unistd.h of Linux.
"""

import os
import struct

# name -> (x86-64, aarch64); None where the machine has no such call.
DENIED = {
    # Other processes' memory and descriptors.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Large and young kernel interfaces, where most kernel holes were found.
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "vmsplice": (278, 75),
    # Mounts and namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "open_tree": (428, 428),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # What happens to files: in folders that can be read, the system's own are seen in use.
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
    # Marks on files that outlive the code and are found by the next one.
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    # The machine.
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "personality": (135, 92),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "lookup_dcookie": (212, 18),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "ioprio_set": (251, 30),
    # The network, also towards processes of this machine.
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "sendmsg": (46, 211),
    "sendmmsg": (307, 269),
    "recvmsg": (47, 212),
    "recvmmsg": (299, 243),
    # Memory that outlives the process or is in no limit of its own.
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
# Denied too where the code's paths are the host's: Landlock does not govern these (nor, before its
# version 3, `truncate`), and a file that anybody may write is open to them.
DENIED_AMONG_HOST_FILES = {
    "truncate": (76, 45),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
}
# "Not supported", which programs that copy files take for an answer.
UNSUPPORTED = {
    "fsetxattr": (190, 7),
    "fremovexattr": (199, 16),
}
# The same where paths are the host's, for programs that list files.
UNSUPPORTED_AMONG_HOST_FILES = {
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
}
# Denied too where the code runs under the user's own uid: Landlock does not govern these, and other
# uids' processes and files are what stops them elsewhere.
DENIED_TO_OWN_UID = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utimensat": (280, 88),
}
FORKS = {"fork": (57, None), "vfork": (58, None)}
ABSENT = {
    "clone3": (435, 435)
}  # its flags lie in memory, out of a filter's sight; libc then uses clone
NEWEST = 462  # the last call that was looked at when the table was made (Linux 6.9: mseal)
# Calls let through or denied by an argument.
CLONE, PRCTL, IOCTL, SOCKETPAIR = (56, 220), (157, 167), (16, 29), (53, 199)
FCNTL, SENDTO, UTIMENSAT = (72, 25), (44, 206), (280, 88)
# Ways to send a signal, and which argument is its number.
SIGNALS = {
    "kill": ((62, 129), 1),
    "tkill": ((200, 130), 1),
    "tgkill": ((234, 131), 2),
    "rt_sigqueueinfo": ((129, 138), 1),
    "rt_tgsigqueueinfo": ((297, 240), 2),
    "pidfd_send_signal": ((424, 424), 1),
}
SIGSTOP = 19  # nobody can catch it: the shim would stand still, and its user would wait for it
NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET
CLONE_THREAD = 0x00010000
# PDEATHSIG, MM, CHILD_SUBREAPER: ways to outlive the launcher or to pose as another program.
DENIED_PRCTL = (1, 35, 36)
DENIED_IOCTL = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX type into a terminal
# F_SETSIG, by which a descriptor sends any signal, and F_NOTIFY, which tells of a folder's files.
DENIED_FCNTL = (10, 1026)
AF_UNIX = 1

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
_LOAD, _JUMP_EQ, _JUMP_GT, _JUMP_SET, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16  # struct seccomp_data; 8 bytes an argument
_ALLOW, _KILL, _EPERM, _ENOSYS, _ENOTSUP = (
    0x7FFF0000,
    0x80000000,
    0x00050001,
    0x00050026,
    0x0005005F,
)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _verdict(number: int, verdict: int) -> list[bytes]:
    return [_instruction(_JUMP_EQ, number, 0, 1), _instruction(_RETURN, verdict)]


def _by_argument(number: int, argument: int, tests: list[bytes], otherwise: int) -> list[bytes]:
    """For one call: load an argument, run tests, else return. Each test holds its own verdict."""
    load = _instruction(_LOAD, _ARGUMENTS_AT + 8 * argument)
    return _for_call(number, [load, *tests, _instruction(_RETURN, otherwise)])


def _for_call(number: int, block: list[bytes]) -> list[bytes]:
    return [_instruction(_JUMP_EQ, number, 0, len(block)), *block]


def _without_pointer(number: int, argument: int) -> list[bytes]:
    """For one call: deny it unless an argument is NULL, in both halves."""
    block = []
    for half in (0, 4):
        block += [_instruction(_LOAD, _ARGUMENTS_AT + 8 * argument + half)]
        block += [_instruction(_JUMP_EQ, 0, 1, 0), _instruction(_RETURN, _EPERM)]
    return _for_call(number, [*block, _instruction(_RETURN, _ALLOW)])


def program(
    *,
    may_fork: bool,
    own_uid: bool = False,
    host_files: bool = True,
    machine: str | None = None,
) -> bytes:
    """The filter as an array of struct sock_filter.

    Without `may_fork` no process can be made, only threads. `own_uid` says that the code runs under
    the uid of its user, `host_files` that its paths are the host's. Raises ValueError for a machine
    without a table.
    """
    machine = machine or os.uname().machine
    if machine not in _MACHINES:
        raise ValueError(
            f"seccomp.program: no table of system calls for machine {machine!r}; "
            f"there is one for {', '.join(_MACHINES)}"
        )
    column, audit = _MACHINES[machine]
    code = [
        _instruction(_LOAD, _MACHINE_AT),
        _instruction(_JUMP_EQ, audit, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
        # x32 calls (bit 30) are above it as well.
        _instruction(_JUMP_GT, NEWEST, 0, 1),
        _instruction(_RETURN, _ENOSYS),
    ]
    denied = DENIED | (DENIED_TO_OWN_UID if own_uid else {}) | ({} if may_fork else FORKS)
    denied |= DENIED_AMONG_HOST_FILES if host_files else {}
    unsupported = UNSUPPORTED | (UNSUPPORTED_AMONG_HOST_FILES if host_files else {})
    for table, verdict in ((denied, _EPERM), (unsupported, _ENOTSUP), (ABSENT, _ENOSYS)):
        for numbers in table.values():
            if numbers[column] is not None:
                code += _verdict(numbers[column], verdict)
    clone = [
        _instruction(_JUMP_SET, NAMESPACE_FLAGS, 0, 1),
        _instruction(_RETURN, _EPERM),
    ]
    if not may_fork:
        clone += [_instruction(_JUMP_SET, CLONE_THREAD, 1, 0), _instruction(_RETURN, _EPERM)]
    code += _by_argument(CLONE[column], 0, clone, _ALLOW)
    prctl = [part for option in DENIED_PRCTL for part in _verdict(option, _EPERM)]
    code += _by_argument(PRCTL[column], 0, prctl, _ALLOW)
    ioctl = [part for request in DENIED_IOCTL for part in _verdict(request, _EPERM)]
    code += _by_argument(IOCTL[column], 1, ioctl, _ALLOW)
    # A pair of sockets reaches nobody else, and asyncio needs one; with an address it would.
    code += _by_argument(SOCKETPAIR[column], 0, _verdict(AF_UNIX, _ALLOW), _EPERM)
    code += _without_pointer(SENDTO[column], 4)
    fcntl = [part for command in DENIED_FCNTL for part in _verdict(command, _EPERM)]
    code += _by_argument(FCNTL[column], 1, fcntl, _ALLOW)
    for numbers, argument in SIGNALS.values():
        code += _by_argument(numbers[column], argument, _verdict(SIGSTOP, _EPERM), _ALLOW)
    if host_files:  # times by descriptor, of a file that could be opened, and not by path
        code += _without_pointer(UTIMENSAT[column], 1)
    code.append(_instruction(_RETURN, _ALLOW))
    return b"".join(code)
