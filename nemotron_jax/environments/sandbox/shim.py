"""First program inside a sandbox: takes one request, then becomes the code it was asked to run.

Its source is passed to the sandbox's own Python (`-c`), so it stands alone: any Python from 3.9 on,
no file of this package. Requests come on descriptor 3 as Python literals from the launcher; replies
go back there as JSON. A frame is eight hexadecimal digits of length and as many bytes.

A `program` runs in this very process, a `command` replaces it. A `python` kernel runs cells in this
process, so its replies are worth what the cells' author is worth. In a `shell` session code runs in
other processes, all killed before the next request, and what `snapshot` says can be trusted.
"""

import os
import resource
import sys
import time

CHANNEL = 3
MOST_ENTRIES, MOST_SNAPSHOT_BYTES = 2_000, 4 << 20
sys.path[:] = [path for path in sys.path if path]  # a file of the code's must not pose as a module


def _receive() -> bytes:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = os.read(CHANNEL, count - len(data))
            if not part:
                os._exit(0)
            data += part
        return data

    return exactly(int(exactly(8), 16))


def _send(reply: dict) -> None:
    import json

    data = json.dumps(reply).encode("ascii")
    data = b"%08x" % len(data) + data
    while data:
        data = data[os.write(CHANNEL, data) :]


def _write_files(files: dict) -> None:
    for path, content in files.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)


def _run_program(code: str, arguments: list) -> None:
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["program.py", *arguments]
    sys.path.insert(0, os.getcwd())
    try:
        exec(compile(code, "program.py", "exec"), main.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__
        inner = trace and trace.tb_next  # without this frame
        sys.__excepthook__(type(error), error.with_traceback(inner), inner)
        sys.exit(1)


def _python_kernel(request: dict) -> None:
    import ast
    import io
    import traceback

    sys.path.insert(0, os.getcwd())
    names = {"__name__": "__main__", "__builtins__": __builtins__}

    class Output(io.TextIOBase):
        text = ""

        def writable(self) -> bool:
            return True

        def write(self, text: str) -> int:
            if len(self.text) <= request["output"]:
                self.text += text[: request["output"] + 1 - len(self.text)]
            return len(text)

    def run_cell(code: str) -> None:
        tree = ast.parse(code, "cell")
        last = tree.body[-1] if tree.body else None
        if isinstance(last, ast.Expr):
            tree.body.pop()
            exec(compile(tree, "cell", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            if value is not None:
                print(repr(value))
        else:
            exec(compile(tree, "cell", "exec"), names)

    me, sink = os.getpid(), os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(sink, descriptor)
    while True:
        code = eval(_receive())["code"]
        sys.stdout = sys.stderr = output = Output()
        failed = False
        try:
            run_cell(code)
        except BaseException as error:
            failed = True
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            output.write("".join(line for line in lines if '"<string>"' not in line))
        if os.getpid() != me:
            os._exit(0)
        _send({"output": output.text, "failed": failed})


def _kill_the_rest() -> None:
    """End every other process of this sandbox, which has a uid or a namespace of its own."""
    try:
        os.kill(-1, 9)
    except ProcessLookupError:
        pass
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _shell_command(command: str, timeout_s: float, most: int) -> dict:
    import select

    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.closerange(3, 64)
            shell = "/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh"
            os.execv(shell, [shell, "-c", command])
        except (OSError, ValueError) as error:  # too long, or no text that a system call takes
            os.write(2, type(error).__name__.encode())
        finally:
            os._exit(126)
    os.close(sink)
    os.set_blocking(source, False)
    data, ended, deadline = b"", None, time.monotonic() + timeout_s

    def read() -> bool:
        nonlocal data
        part = os.read(source, 65536) if len(data) <= most else b""
        data += part
        return bool(part)

    while ended is None:
        if select.select([source], [], [], 0.005)[0] and not read():
            time.sleep(0.002)  # the output is closed or full, and the command goes on
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            ended = code if code >= 0 else 128 - code
        elif len(data) > most or time.monotonic() > deadline:
            ended = "output" if len(data) > most else "wall"
    _kill_the_rest()
    while select.select([source], [], [], 0)[0] and read():
        pass
    os.close(source)
    return {"output": data[:most].decode("utf-8", "replace"), "ended": ended}


def _snapshot() -> dict:
    """Every entry under the working directory: kind, permission bits, and content or target."""
    import base64

    entries, size = {}, 0
    pending = ["."]
    while pending:
        folder = pending.pop()
        for entry in os.scandir(folder):
            path = entry.path[2:]
            mode = entry.stat(follow_symlinks=False).st_mode & 0o777
            if entry.is_symlink():
                found = ["link", mode, os.readlink(entry.path)]
            elif entry.is_dir(follow_symlinks=False):
                found = ["folder", mode, ""]
                pending.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                size += entry.stat(follow_symlinks=False).st_size
                if size > MOST_SNAPSHOT_BYTES:
                    return {"error": f"more than {MOST_SNAPSHOT_BYTES} bytes"}
                with open(entry.path, "rb") as file:
                    found = ["file", mode, base64.b64encode(file.read()).decode("ascii")]
            else:
                found = ["other", mode, ""]
            entries[os.fsencode(path).decode("utf-8", "replace")] = found
            if len(entries) > MOST_ENTRIES:
                return {"error": f"more than {MOST_ENTRIES} entries"}
    return {"entries": entries}


def _shell_session(request: dict) -> None:
    import base64  # noqa: F401  imported before any of the code's files exist
    import json  # noqa: F401
    import select  # noqa: F401

    while True:
        order = eval(_receive())
        try:
            if "command" in order:
                reply = _shell_command(order["command"], order["timeout_s"], request["output"])
            else:
                reply = _snapshot()
        except OSError as error:
            _kill_the_rest()
            reply = {"error": str(error)}
        _send(reply)


def main() -> None:
    """Serve the one request this process was started for."""
    request = eval(_receive())
    if request["tasks"]:
        resource.setrlimit(resource.RLIMIT_NPROC, (request["tasks"],) * 2)
    _write_files(request["files"])
    os.write(CHANNEL, b"R")
    mode = request["mode"]
    if mode == "python":
        _python_kernel(request)
    elif mode == "shell":
        _shell_session(request)
    os.close(CHANNEL)
    if mode == "program":
        _run_program(request["code"], request["arguments"])
    else:
        os.execvp(request["arguments"][0], request["arguments"])


if __name__ == "__main__":
    main()
