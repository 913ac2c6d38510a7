"""Every field of a run's configuration: python -m nemotron_jax.config [--json] [PART …].

Each is shown with type, default, unit and rule, as Markdown. PART limits it, as in
`training data.batch_size`. A field is set by `--config.PATH=VALUE` of train.py; the engine's are
arguments of `nj.EngineConfig`.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.reference import Part, as_json, as_markdown, parts
from nemotron_jax.config.run import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nemotron_jax.config", description=__doc__)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("part", nargs="*", help="training, data.batch_size, engine, …; all without")
    flags = parser.parse_args(arguments)
    found = [*parts(RunConfig), *parts(EngineConfig, "engine")]
    if flags.part and not (found := _chosen(found, flags.part)):
        print(
            f"config: {' '.join(flags.part)}: no field has this name; leave it out to see all",
            file=sys.stderr,
        )
        return 2
    print((as_json if flags.json else as_markdown)(found))
    return 0


def _chosen(found: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts with the fields that lie below one of the names."""
    asked = tuple(name.removeprefix("config.") for name in names)

    def is_asked(path: str) -> bool:
        path = path.removeprefix("config.")
        return any(path == name or path.startswith(f"{name}.") for name in asked)

    kept = [
        dataclasses.replace(part, fields=tuple(f for f in part.fields if is_asked(f.path)))
        for part in found
    ]
    return [part for part in kept if part.fields or is_asked(part.path)]


if __name__ == "__main__":
    sys.exit(main())
