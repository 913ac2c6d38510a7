"""What train.py and eval.py share: a wrong flag or value is one line and an exit status."""

import ast
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

_ROOT = Path(__file__).parents[1]


def run(program: str, main: Callable[[], int]) -> None:
    """Parse the flags and exit with main's status: 1 where it failed, 2 where asked for wrongly.

    Errors that this project raises are sentences for its user; all others keep their traceback.
    """
    app.run(
        lambda _: _exit_status(program, main),
        flags_parser=lambda arguments: _parse(program, arguments),
    )


def _parse(program: str, arguments: list[str]) -> list[str]:
    """The program's name, once every flag is parsed; exits where one cannot be."""
    try:
        if unknown := flags.FLAGS(arguments)[1:]:
            raise flags.Error(f"unknown arguments {unknown}; use --flag=value")
        if (config := flags.FLAGS["config"].value) is not None:
            _ = config.items  # a file that was not found says so at the first look
    except OSError as error:
        _refuse(program, str(error.__cause__ or error))
    except (AttributeError, KeyError) as error:  # config_flags' own for an unknown key
        _refuse(program, f"unknown config key {_unquoted(error)}")
    except (flags.Error, TypeError) as error:
        _refuse(program, str(error))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax tells forty lines of each checkpoint
    return arguments[:1]


def _exit_status(program: str, main: Callable[[], int]) -> int:
    try:
        return main()
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not raised_in.is_relative_to(_ROOT) or "site-packages" in str(raised_in):
            raise  # a fault of the program, not a sentence for its user
        sys.stdout.flush()  # so that the sentence is the last thing to be read
        print(f"{program}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _refuse(program: str, reason: str) -> NoReturn:
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def _unquoted(error: Exception) -> str:
    """The message of a KeyError, also of one inside another error, which holds it quoted."""
    try:
        return str(ast.literal_eval(str(error)))
    except (SyntaxError, ValueError):
        return str(error)
