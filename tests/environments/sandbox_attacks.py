"""Attacks on a sandbox: each program prints THROUGH when it reaches what it must not.

`{secret}` is a readable file of the host, `{pid}` this process, `{folder}` a world-writable folder.
"""

from nemotron_jax.environments.sandbox import Limits

QUICK = Limits(wall_s=20, cpu_s=10)  # machines that run tests are busy
_CALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def raw(*a):
    ctypes.set_errno(0)
    r = libc.syscall(*a)
    return r, ctypes.get_errno()
def must_be_refused(*a, allowed=(1, 38)):
    r, e = raw(*a)
    print("THROUGH" if r >= 0 or e not in allowed else "refused", a, r, e)
"""


def _refused(x86: int, arm: int, *arguments: int | str) -> str:
    """One system call that the filter must answer with EPERM or ENOSYS, whatever its arguments."""
    shown = ", ".join(map(str, arguments))
    return f"{_CALL}must_be_refused({x86} if os.uname().machine == 'x86_64' else {arm}, {shown})"


def _reaches(body: str) -> str:
    """A body that must raise an OSError before its end."""
    lines = "\n    ".join(body.strip().splitlines())
    return (
        "import os, socket, sys, signal, subprocess, threading\n"
        f"try:\n    {lines}\n    print('THROUGH')\nexcept OSError as e:\n    print('refused', e)\n"
    )


ATTACKS = {
    # Network.
    "tcp out": _reaches("socket.create_connection(('1.1.1.1', 80), 1)"),
    "udp out": _reaches(
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))"
    ),
    "tcp listen": _reaches("socket.create_server(('127.0.0.1', 0))"),
    "name lookup": _reaches("socket.getaddrinfo('example.com', 80)"),
    "abstract socket": _reaches("socket.socket(socket.AF_UNIX).connect(chr(0) + '{abstract}')"),
    "netlink": _reaches("socket.socket(16, socket.SOCK_RAW, 0)"),
    "raw socket": _reaches("socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "pair of network sockets": _reaches("socket.socketpair(socket.AF_INET)"),
    # Files of the host.
    "read a host file": _reaches("open('{secret}').read()"),
    "read /etc/passwd": _reaches("open('/etc/passwd').read()"),
    "read /etc/shadow": _reaches("open('/etc/shadow').read()"),
    "list /root": _reaches("os.listdir('/root')"),
    "list home": _reaches("os.listdir('/home')"),
    "read through a link": _reaches("os.symlink('{secret}', 'l'); open('l').read()"),
    "hard link": _reaches("os.link('{secret}', 'h'); open('h').read()"),
    "write a host file": _reaches("open('{secret}', 'a').write('x')"),
    "make a file in a host folder": _reaches("open('{folder}/planted', 'w')"),
    "write /usr": _reaches("open('/usr/planted', 'w')"),
    "write /": _reaches("open('/planted', 'w')"),
    "write /dev/shm": _reaches("open('/dev/shm/planted', 'w')"),
    "write /dev": _reaches("open('/dev/planted', 'w')"),
    "delete a host file": _reaches("os.unlink('{secret}')"),
    "rename a host file": _reaches("os.rename('{secret}', 'mine')"),
    "truncate a host file": _reaches("os.truncate('{secret}', 0)"),
    "chmod a host file": _reaches("os.chmod('{secret}', 0)"),
    "chmod a host folder": _reaches("os.chmod('/usr', 0o777)"),
    "symlink swapped under open": _reaches(
        "import time\n"
        "open('f', 'w').close(); os.symlink('{secret}', 'g')\n"
        "stop = time.monotonic() + 0.2\n"
        "def swap():\n"
        "    while time.monotonic() < stop:\n"
        "        os.rename('f', 't'); os.rename('g', 'f'); os.rename('t', 'g')\n"
        "threading.Thread(target=swap).start()\n"
        "while time.monotonic() < stop:\n"
        "    try:\n"
        "        if open('f').read(): break\n"
        "    except OSError: pass\n"
        "else: raise OSError('never')"
    ),
    "mark a host file": _reaches("os.setxattr('{secret}', 'user.note', b'x')"),
    "mark a host folder": _reaches("os.setxattr('{folder}', 'user.note', b'x')"),
    "mark by link": _reaches("os.symlink('{secret}', 'm'); os.setxattr('m', 'user.note', b'x')"),
    "times of a host file": _reaches("os.utime('{secret}')"),
    "times of a host folder": _reaches("os.utime('{folder}')"),
    "times by an empty path": _CALL
    + "f = os.open('{secret}', os.O_PATH)\n"
    + "must_be_refused(280 if os.uname().machine == 'x86_64' else 88, f, b'', 0, 0x1000)",
    "times in the old way": _CALL
    + "if os.uname().machine == 'x86_64': must_be_refused(132, b'{secret}', 0, allowed=(1, 2))\n"
    + "print('tried')",
    "watch files": _refused(294, 26, 0),
    "watch a folder by signals": _CALL
    + "import fcntl\ntry: fcntl.fcntl(os.open('/usr', os.O_RDONLY), 1026, 1)\n"
    + "except OSError as e: print('refused' if e.errno == 1 else 'THROUGH', e)\n"
    + "else: print('THROUGH')",
    "datagram to a named socket": _CALL
    + "import socket\ntry: socket.socketpair(1, socket.SOCK_DGRAM)[0].sendto(b'x', '/none')\n"
    + "except OSError as e: print('refused' if e.errno == 1 else 'THROUGH', e)\n"
    + "else: print('THROUGH')",
    "device node": _reaches("os.mknod('d', 0o20666, os.makedev(1, 1)); open('d', 'rb').read(1)"),
    "disk": _reaches("open('/dev/vda', 'rb').read(1)"),
    "kernel memory": _reaches("open('/dev/mem', 'rb').read(1)"),
    "terminal": _reaches("open('/dev/tty', 'r')"),
    # /proc.
    "environment of the launcher": _reaches("open('/proc/{pid}/environ', 'rb').read()"),
    "environment of process 1": _reaches("open('/proc/1/environ', 'rb').read()"),
    "core_pattern": _reaches("open('/proc/sys/kernel/core_pattern', 'w')"),
    "sysrq": _reaches("open('/proc/sysrq-trigger', 'w')"),
    "memory of another process": _reaches("open('/proc/{pid}/mem', 'rb')"),
    "root of another process": _reaches("os.listdir('/proc/{pid}/root/')"),
    "control group": _reaches("os.listdir('/sys/fs/cgroup')"),
    # Other processes.
    "signal the user's process": _reaches("os.kill({pid}, 0)"),
    "signal the parent": _reaches("os.kill(os.getppid() if os.getppid() > 1 else {pid}, 0)"),
    "ptrace": _refused(101, 117, 0, 0, 0, 0),
    "read another's memory": _refused(310, 270, "{pid}", 0, 0, 0, 0, 0),
    "write another's memory": _refused(311, 271, "{pid}", 0, 0, 0, 0, 0),
    "take another's descriptor": _refused(438, 438, 0, 0, 0),
    "fork": _reaches("os.fork()"),
    "start a program": _reaches("subprocess.run(['/usr/bin/true'])"),
    "clear the death signal": _refused(157, 167, 1, 0, 0, 0, 0),
    # Powers.
    "become root": _reaches("os.setuid(0) if os.getuid() else None; os.setgroups([0])"),
    "real-time priority": _reaches("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"),
    "raise a limit": _reaches(
        "import resource\n"
        "try: resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n"
        "except ValueError as e: raise OSError(e)"
    ),
    "new user namespace": _refused(272, 97, 0x10000000),
    "clone into a namespace": _refused(56, 220, 0x10000000 | 17, 0, 0, 0, 0),
    "clone3": _refused(435, 435, 0, 0),
    "join a namespace": _refused(308, 268, 0, 0),
    "mount": _refused(165, 40, 0, 0, 0, 0, 0),
    "pivot_root": _refused(155, 41, 0, 0),
    "chroot": _refused(161, 51, "b'/'"),
    "reboot": _refused(169, 142, 0, 0, 0, 0),
    "load a module": _refused(175, 105, 0, 0, 0),
    "bpf": _refused(321, 280, 0, 0, 0),
    "perf": _refused(298, 241, 0, 0, -1, -1, 0),
    "keyring": _refused(250, 219, 0, 0, 0, 0, 0),
    "io_uring": _refused(425, 425, 1, 0),
    "userfaultfd": _refused(323, 282, 0),
    "set the clock": _refused(227, 112, 0, 0),
    "memory file": _refused(319, 279, "b'm'", 0),
    "shared memory segment": _refused(29, 194, 0, 4096, 0o1600),
    "message queue": _refused(240, 180, "b'q'", 0o100, 0o600, 0),
    "type into a terminal": _refused(16, 29, 0, 0x5412, 0),
    "system calls of the future": _refused(470, 470, 0),
    "system calls of x32": _CALL
    + "must_be_refused(0x40000000 + 41, 2, 1, 0) if os.uname().machine == 'x86_64' else None",
}
# Programs that take what there is. Each must be over within its limits and leave nothing.
HOGS = {
    "memory": "b = []\nwhile True: b.append(bytearray(1 << 20))",
    "one large allocation": "bytearray(1 << 34)",
    "memory that is mapped": "import mmap\nm = [mmap.mmap(-1, 1 << 24) for _ in range(64)]",
    "stack": "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
    "descriptors": "import os\nwhile True: os.open('/dev/null', 0)",
    "threads": "import threading, time\n"
    "while True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
    "one large file": "f = open('f', 'wb')\nwhile True: f.write(bytes(1 << 20)); f.flush()",
    "many files": "import os\n"
    "for i in range(99):\n  f = open(str(i), 'wb')\n"
    "  for _ in range(8): f.write(bytes(1 << 20)); f.flush()\nprint('THROUGH')",
    "empty files": "import os\nfor i in range(10000): os.mkdir(str(i))\nprint('THROUGH')",
    "deep folders": "import os\n"
    "for i in range(10000): os.mkdir('d'); os.chdir('d')\nprint('THROUGH')",
    "pipes": "import os, fcntl\np = []\n"
    "while True: p.append(os.pipe()); fcntl.fcntl(p[-1][1], 1031, 1 << 20)",
}
