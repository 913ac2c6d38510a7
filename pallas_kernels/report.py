"""The file of a command's report, which is written when hours of work are done."""

import argparse
import os
from pathlib import Path


def report_file(name: str) -> str:
    """A flag's value as the name of a file that can be written, found out before the work."""
    if not name:
        return name
    path = Path(name).absolute()
    if "\0" in name or path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} is no file in a folder that there is")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written; name another file")
    return name
