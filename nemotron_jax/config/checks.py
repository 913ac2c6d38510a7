"""The rules that fields of a configuration obey: who, which field, which value, which rule."""

import math
import numbers
import operator
import os
import re
from collections.abc import Sequence
from typing import Any

from nemotron_jax.config.untrusted import shown

# A URL's scheme, also where pathlib has made one slash of the two. One letter is a drive.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def check_value(owner: str, field: str, value: object, ok: bool, rule: str) -> None:
    """Raise the ValueError `owner.field=value: rule` unless `ok`; `rule` says the way out."""
    if not ok:
        raise ValueError(f"{owner}.{field}={shown(value)}: {rule}")


def check(config: Any, field: str, ok: bool, rule: str) -> None:
    """`check_value` of a config's own field, or of a part's, as in `data.batch_size`."""
    if not ok:
        check_value(type(config).__name__, field, operator.attrgetter(field)(config), ok, rule)


def local_path(owner: str, field: str, path: str | os.PathLike) -> None:
    """Raise ValueError where a path is a URL, such as gs://bucket/run.

    `owner` is the config or the function, or empty where `field` is a program's flag.
    """
    rule = (
        "is a URL, and only local paths are read and written; mount the bucket as a folder, or "
        "copy it, and name the folder"
    )
    path = os.fspath(path)
    if _SCHEME.match(path):
        name = f"{owner}.{field}={path!r}" if owner else f"--{field}={path}"
        raise ValueError(f"{name}: {rule}")


def at_least_one(config: Any, *fields: str) -> None:
    """Every named field is an integer and at least 1."""
    for field in fields:
        check(config, field, is_integer(getattr(config, field)), "must be an integer")
        check(config, field, getattr(config, field) >= 1, "must be at least 1")


def counts(config: Any, *fields: str) -> None:
    """Every named field is an integer and not negative."""
    for field in fields:
        check(config, field, is_integer(getattr(config, field)), "must be an integer")
        check(config, field, getattr(config, field) >= 0, "must not be negative")


def at_most(config: Any, limit: float, *fields: str) -> None:
    """No named field is above a limit that nothing useful comes near."""
    for field in fields:
        check(config, field, getattr(config, field) <= limit, f"must be at most {limit:,}")


def positive(config: Any, *fields: str) -> None:
    """Every named field is a finite number above 0."""
    for field in fields:
        value = getattr(config, field)
        check(config, field, is_finite(value) and value > 0, "must be positive and finite")


def not_negative(config: Any, *fields: str) -> None:
    """Every named field is a finite number, 0 or above."""
    for field in fields:
        value = getattr(config, field)
        check(config, field, is_finite(value) and value >= 0, "must be finite and not negative")


def one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    """The field is one of the names."""
    value = getattr(config, field)
    check(config, field, value in allowed, f"must be one of {', '.join(allowed)}")


def is_integer(value: object) -> bool:
    """Whether the value counts something; true and false do not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether the value is a number that is neither infinite nor NaN as a float; true and false are
    none."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        return is_number and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
