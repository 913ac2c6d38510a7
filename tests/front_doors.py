"""Runs a front door on many command lines: python -m tests.front_doors MODULE CASES.json.

Each line runs in a fork of one process that has imported everything, so that a hundred take no
longer than one. Prints a JSON list of {status, out, err}. Whoever gets as far as to compile a step
or to run a suite exits with REACHED.
"""

import importlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import traceback
import warnings

from nemotron_jax.config.convert import to_json

ROOT = pathlib.Path(__file__).parents[1]
REACHED = 99
SHOW = "show"  # first of a line's words: print the run that its flags describe, train nothing
LIMIT_S = 100


def run_one(module, arguments: list[str]) -> dict:
    """What one command line does in a fork of this process."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            signal.alarm(LIMIT_S)
            status = REACHED - 1
            try:
                if arguments[0] == SHOW:
                    module.train = lambda config, *_, **__: print(to_json(config))
                    arguments = arguments[1:]
                sys.argv = [f"{module.__name__}.py", *arguments]
                module.run()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return {"status": status, "out": out.read(), "err": err.read()}


def forbid_compiling() -> None:
    def reached(*_: object, **__: object) -> None:
        print("reached a compiled program", file=sys.stderr)
        os._exit(REACHED)

    from nemotron_jax.evaluation import runner
    from nemotron_jax.training import loop

    loop.compile_train_step = reached
    runner.Runner.run = reached


def main() -> None:
    warnings.simplefilter("ignore")  # of forks beside jax's threads: none has begun yet
    name, cases = sys.argv[1:]
    module = importlib.import_module(name)
    forbid_compiling()
    results = [
        run_one(module, arguments) for arguments in json.loads(pathlib.Path(cases).read_text())
    ]
    print(json.dumps(results))


if __name__ == "__main__":
    main()
