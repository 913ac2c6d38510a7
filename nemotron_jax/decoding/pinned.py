"""The engine's programs for a store that devices share, and a count of all programs."""

import dataclasses
import functools
from typing import ClassVar

import jax

from nemotron_jax.decoding import store as programs
from nemotron_jax.decoding.store import Store


class Pinned:
    """The programs of store.py for a store that devices share: what they give back of it lies as it
    did, by the same names, or the next program would be compiled for those."""

    made: ClassVar[list["Pinned"]] = []

    def __init__(self, places: Store) -> None:
        inside = dataclasses.replace(places, snapshots=None), None
        options = {"donate_argnums": 1, "out_shardings": inside}

        def pinned(name: str, *static: str) -> jax.stages.Wrapped:
            program = getattr(programs, name).__wrapped__
            return jax.jit(program, static_argnames=(*static, "execution"), **options)

        self.prefill = pinned("prefill")
        self.decode = pinned("decode", "sizes")
        self.draft_alone = pinned("draft_alone", "count")
        whole = {"donate_argnums": 0, "out_shardings": places}
        self.save_snapshot = jax.jit(programs.save_snapshot.__wrapped__, **whole)
        self.load_snapshot = jax.jit(programs.load_snapshot.__wrapped__, **whole)

    @classmethod
    def of(cls, store: Store) -> "Pinned":
        """Those of every store that lies as this one."""
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, store))
        return cls._of(tuple(leaves), tree)

    @classmethod
    @functools.cache
    def _of(cls, leaves: tuple, tree: jax.tree_util.PyTreeDef) -> "Pinned":
        cls.made.append(cls(jax.tree.unflatten(tree, leaves)))
        return cls.made[-1]


def programs_compiled() -> int:
    """Programs of all engines of this process."""
    names = ("prefill", "decode", "draft_alone", "score", "save_snapshot", "load_snapshot")
    each = [getattr(programs, name) for name in names]
    each += [program for one in Pinned.made for program in vars(one).values()]
    return sum(program._cache_size() for program in each)
