"""A control group that holds every sandbox of one launcher: the backstop of the memory budget.

Processes are born into it, so that a run costs nothing. Version 1 and version 2 of the interface
are tried, and a machine where neither is writable does without.
"""

import contextlib
import os

MOUNTS = "/proc/self/mounts"
OWN = "/proc/self/cgroup"


class MemoryGroup:
    """Folders of one control group, one in each hierarchy."""

    def __init__(self, folders: list[str], kind: str) -> None:
        self.folders = folders
        self.kind = kind

    def join(self) -> None:
        """Move this process, and so its future children, into the group."""
        for folder in self.folders:
            _write(folder, "cgroup.procs", str(os.getpid()))

    def leave(self) -> None:
        """Move this process back to the parents, so that the group can be empty."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                _write(os.path.dirname(folder), "cgroup.procs", str(os.getpid()))

    def remove(self) -> bool:
        """Delete the group; False while a process is still in it."""
        for folder in list(self.folders):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        return not any(os.path.isdir(folder) for folder in self.folders)


def _write(folder: str, name: str, text: str) -> None:
    with open(os.path.join(folder, name), "w", encoding="ascii") as file:
        file.write(text)


def _lines(path: str) -> list[list[str]]:
    try:
        with open(path, encoding="utf-8") as file:
            return [line.split() for line in file]
    except OSError:
        return []


def _own_folder(mount: str, controller: str) -> str:
    """The folder of this process in the hierarchy of a controller ("" is version 2)."""
    for (line,) in (entry for entry in _lines(OWN) if len(entry) == 1):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") and os.path.isdir(mount + path):
            return (mount + path).rstrip("/")
    return mount


def make(name: str, *, memory_bytes: int, tasks: int) -> MemoryGroup | None:
    """A new group with limits on all of its processes together; None where none can be made."""
    mounts = [entry for entry in _lines(MOUNTS) if len(entry) >= 4]
    first = {
        controller: mount
        for _, mount, kind, options, *_ in mounts
        for controller in ("memory", "pids")
        if kind == "cgroup" and controller in options.split(",")
    }
    if "memory" in first:
        limits = {"memory": ("memory.limit_in_bytes", memory_bytes), "pids": ("pids.max", tasks)}
        folders = []
        try:
            for controller, mount in sorted(first.items()):
                folder = os.path.join(_own_folder(mount, controller), name)
                os.mkdir(folder)
                folders.append(folder)
                _write(folder, limits[controller][0], str(limits[controller][1]))
            return MemoryGroup(folders, "control group v1")
        except OSError:
            MemoryGroup(folders, "").remove()
            return None
    second = [mount for _, mount, kind, *_ in mounts if kind == "cgroup2"]
    return _make_second(second[0], name, memory_bytes, tasks) if second else None


def _make_second(mount: str, name: str, memory_bytes: int, tasks: int) -> MemoryGroup | None:
    folder = os.path.join(_own_folder(mount, ""), name)
    try:
        with contextlib.suppress(OSError):  # refused where it is on already, or not ours to turn on
            _write(os.path.dirname(folder), "cgroup.subtree_control", "+memory +pids")
        os.mkdir(folder)
        _write(folder, "memory.max", str(memory_bytes))
        _write(folder, "pids.max", str(tasks))
        with contextlib.suppress(OSError):  # absent without swap
            _write(folder, "memory.swap.max", "0")
        return MemoryGroup([folder], "control group v2")
    except OSError:
        MemoryGroup([folder], "").remove()
        return None
