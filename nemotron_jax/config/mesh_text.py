"""A mesh as a command line names it."""

import dataclasses

from nemotron_jax.config.run import MeshConfig


def mesh_from_text(text: str) -> MeshConfig | None:
    """The mesh that `--mesh=data=2,fsdp=4` names, other axes being 1; None for an empty text.

    Raises ValueError for anything else.
    """
    if not text:
        return None
    axes = [part.partition("=") for part in text.split(",")]
    names = [field.name for field in dataclasses.fields(MeshConfig)]
    given = {name: size for name, _, size in axes}
    ok = len(given) == len(axes) and all(n in names and s.isdigit() for n, s in given.items())
    if not ok:
        raise ValueError(f"--mesh={text}: give axes of {', '.join(names)}, as in data=1,fsdp=2")
    return MeshConfig(**{name: int(size[:9]) for name, size in given.items()})
