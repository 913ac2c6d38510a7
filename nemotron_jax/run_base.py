"""The model that a run's adapters are trained on: named in base.json, and found again by it."""

import json
from collections.abc import Callable
from pathlib import Path

from nemotron_jax.config.untrusted import read_object, shown
from nemotron_jax.evaluation.facts import parameters_sha256
from nemotron_jax.files import atomic_writer
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import BASE
from nemotron_jax.training.prepared import Prepared

_HINT = "restore it from another checkpoint of the run"


def keep_base(run: Prepared, base: Nemotron | None, path: str) -> None:
    """Write down which model a run's adapters are trained on, in the run's directory; nothing where
    there is no base, or no directory.

    `path` is empty for random parameters of the run's seed. Raises ValueError where an earlier
    session had another base.
    """
    if base is None or run.directory is None:
        return
    lora, file = run.config.lora, run.directory.base
    sha256 = _sha256(base)
    if file.exists():
        before = read_object(file, _HINT).get("parameters_sha256")
        _compare(file, before, sha256, path)
    record = {
        "format": "nemotron_jax.base",
        "format_version": 1,
        "path": path,
        "parameters_sha256": sha256,
        "dtype": lora.base_dtype,
        "experts": lora.base_experts,
    }
    if run.directory.writer:
        with atomic_writer(file) as out:
            out.write((json.dumps(record, indent=2) + "\n").encode())


def read_base(
    checkpoint: Path,
    load: Callable[[str], Nemotron],
    draw: Callable[[], Nemotron],
) -> Nemotron:
    """The base of a checkpoint's adapters: what `load` makes of its directory, or, where it has
    none, `draw` of the run's seed.

    Raises ValueError, naming base.json, where that says none, or one that is not there any more or
    has other parameters.
    """
    file = checkpoint / BASE
    record = read_object(file, _HINT)
    path = record.get("path")
    if not isinstance(path, str):
        raise ValueError(f"{file}: path={shown(path)} names no directory; {_HINT}")
    if path and not Path(path).is_dir():
        raise ValueError(
            f"{file}: the adapters' base {shown(path)} is not there; put it back, or write into "
            "path where it is now"
        )
    base = load(path) if path else draw()
    _compare(file, record.get("parameters_sha256"), _sha256(base), path)
    return base


def _compare(file: Path, before: object, now: str, path: str) -> None:
    if before and now and before != now:
        raise ValueError(
            f"{file}: the adapters are trained on parameters of SHA-256 {shown(before)}, and "
            f"{path or 'the seed'} gives {now!r}; put the same base back, or start in a new "
            "directory"
        )


def _sha256(base: Nemotron) -> str:
    """Empty where other processes hold a part of it."""
    whole = all(leaf.is_fully_addressable for leaf in flatten(base).values())
    return parameters_sha256(base) if whole else ""
