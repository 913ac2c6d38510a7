"""The layer stack: parameters stacked by kind, run as a scan over units or layer by layer."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.latent_moe import RouterMetrics
from nemotron_jax.model.block import Block
from nemotron_jax.types import Context

Stacks = dict[str, Block | nnx.List | None]  # by pattern letter


@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Which blocks each unit `M? *? (E|-)?` of a pattern holds: by letter, the place in its stack
    or -1."""

    index: dict[str, np.ndarray]

    @classmethod
    def parse(cls, pattern: str) -> "UnitTable":
        units = re.findall(r"M?\*?[E-]?", pattern)[:-1]  # the last match is empty
        index = {letter: np.full(len(units), -1, np.int32) for letter in BLOCK_KINDS}
        count = dict.fromkeys(BLOCK_KINDS, 0)
        for number, unit in enumerate(units):
            for letter in unit:
                index[letter][number] = count[letter]
                count[letter] += 1
        return cls(index)


def run_stack(
    x: Float[Array, "B T D"],
    config: ModelConfig,
    stacks: Stacks,
    segments: Int[Array, "B T"] | None,
    states: tuple | None,
    context: Context,
) -> tuple[Float[Array, "B T D"], tuple | None, RouterMetrics]:
    """Hidden states after the last layer, each layer's new state, and the MoE layers' stacked
    metrics.

    With states the layers are always unrolled: a cache carried through a scan would be copied.
    """
    split = any(isinstance(stack, nnx.List) for stack in stacks.values())
    if states is None and not split and context.execution.layers == "scan":
        y, metrics = _scan_units(x, config, stacks, segments, context)
        return y, None, metrics
    return _run_layers(x, config, stacks, segments, states, context)


def split_layers(stacks: Stacks) -> Stacks:
    """The same stacks as lists of single layers, so that a loop around the model slices no
    weights."""
    return {
        letter: None
        if stack is None
        else nnx.List([_take(stack, n) for n in range(len(jax.tree.leaves(stack)[0]))])
        for letter, stack in stacks.items()
    }


def _run_layers(
    x: Array,
    config: ModelConfig,
    stacks: Stacks,
    segments: Array | None,
    states: tuple | None,
    context: Context,
) -> tuple[Array, tuple | None, RouterMetrics]:
    count = dict.fromkeys(BLOCK_KINDS, 0)
    new_states, metrics = [], []
    for layer, letter in enumerate(config.pattern):
        stack, number = stacks[letter], count[letter]
        block = stack[number] if isinstance(stack, nnx.List) else _take(stack, number)
        count[letter] += 1
        run = _rematerialised(
            lambda x, state, block=block: block(x, segments, state, context), context
        )
        x, state, report = run(x, None if states is None else states[layer])
        new_states.append(state)
        if report is not None:
            metrics.append(report)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *metrics) if metrics else _no_metrics(config, 0)
    return x, None if states is None else tuple(new_states), stacked


def _scan_units(
    x: Array, config: ModelConfig, stacks: Stacks, segments: Array | None, context: Context
) -> tuple[Array, RouterMetrics]:
    table = UnitTable.parse(config.pattern).index
    whole_unit = context.execution.remat == "full"

    def run_block(letter: str, x: Array, number: Array) -> tuple[Array, RouterMetrics | None]:
        def run(x: Array, number: Array) -> tuple[Array, RouterMetrics | None]:
            y, _, report = _take(stacks[letter], number)(x, segments, None, context)
            return y, report

        return run(x, number) if whole_unit else _rematerialised(run, context)(x, number)

    def run_unit(x: Array, numbers: dict[str, Array]) -> tuple[Array, RouterMetrics | None]:
        report = _no_metrics(config)
        for letter, places in table.items():
            if np.all(places < 0):
                continue
            empty = report if letter == "E" else None
            x, found = _run_if_present(
                np.all(places >= 0),
                lambda x, n, letter=letter: run_block(letter, x, n),
                lambda x, n, empty=empty: (x, empty),
                x,
                numbers[letter],
            )
            report = report if found is None else found
        return x, report

    if whole_unit:
        run_unit = jax.checkpoint(run_unit, prevent_cse=False)
    x, metrics = jax.lax.scan(run_unit, x, {k: jnp.asarray(v) for k, v in table.items()})
    moe_units = np.flatnonzero(table["E"] >= 0)
    return x, jax.tree.map(lambda a: a[moe_units], metrics)


def _run_if_present(
    always: bool, run: Callable, skip: Callable, x: Array, number: Array
) -> tuple[Array, RouterMetrics | None]:
    if always:
        return run(x, number)
    return jax.lax.cond(number >= 0, run, skip, x, number)


def _rematerialised(run: Callable, context: Context) -> Callable:
    if context.execution.remat == "none":
        return run
    return jax.checkpoint(run, prevent_cse=context.execution.layers != "scan")


def _take(stack: Block, number: int | Array) -> Block:
    """One block of a stack; its parameters are indexed, never sliced into a shorter stack."""
    if isinstance(number, int):
        return jax.tree.map(lambda a: a[number], stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), stack)


def _no_metrics(config: ModelConfig, *leading: int) -> RouterMetrics:
    experts = config.moe.num_experts if config.moe else 0
    return RouterMetrics(jnp.zeros((*leading, experts)), jnp.zeros(leading))
