"""The layer stack: parameters stacked by kind, run as a scan over units or layer by layer."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.latent_moe import KEPT, RouterMetrics
from nemotron_jax.model.block import Block
from nemotron_jax.sharding import part_shape, staying
from nemotron_jax.types import Context, Rows
from pallas_kernels import nvfp4

Stacks = dict[str, Block | nnx.List | None]  # by pattern letter

# Layers up to which a training step on a CPU is unrolled. Of 12 it takes a quarter less CPU time
# than as a scan, which stores and fetches what the backward pass needs, and a quarter more to
# compile; the more layers, the longer the compilation (tests/benchmarks/parts.py).
_FEW_LAYERS = 24

# Primitives that take a layer's weights from their stack, cast them and gather their parts.
MOVES = {
    "all_gather",
    "convert_element_type",
    "custom_vjp_call",
    "dynamic_slice",
    "pad",
    "reshape",
    "sharding_constraint",
    "squeeze",
}


@dataclasses.dataclass(frozen=True)
class UnitTable:
    """Which blocks each unit `M? *? (E|-)?` of a pattern holds, by letter: the place in its stack
    and the layer, or -1. Other kinds of block than mixers of tokens stand where `E` and `-` do."""

    index: dict[str, np.ndarray]
    layer: dict[str, np.ndarray]

    @classmethod
    def parse(cls, pattern: str) -> "UnitTable":
        """The units `M? *? (E|-)?` of a pattern. Raises ValueError for letters of no block."""
        last = "".join(map(re.escape, BLOCK_KINDS.keys() - {"M", "*"}))
        units = re.findall(rf"M?\*?[{last}]?", pattern)[:-1]  # the last match is empty
        if "".join(units) != pattern:
            raise ValueError(
                f"ModelConfig.pattern={pattern!r}: its units {units} leave letters out; use the "
                f"letters {''.join(BLOCK_KINDS)}"
            )
        index = {letter: np.full(len(units), -1, np.int32) for letter in BLOCK_KINDS}
        layer = {letter: np.full(len(units), -1, np.int32) for letter in BLOCK_KINDS}
        count = dict.fromkeys(BLOCK_KINDS, 0)
        for number, unit in enumerate(units):
            for letter in unit:
                layer[letter][number] = sum(count.values())
                index[letter][number] = count[letter]
                count[letter] += 1
        return cls(index, layer)

    def part(self, units: slice) -> "UnitTable":
        """The rows of some units."""
        cut = lambda table: {letter: column[units] for letter, column in table.items()}
        return UnitTable(cut(self.index), cut(self.layer))

    def runs(self, boundary: int) -> list[slice]:
        """The longest runs of units in which each kind of block lies on one side of a layer."""
        cuts, sides = [0], {}
        for unit in range(len(self.layer["M"])):
            here = {k: v[unit] >= boundary for k, v in self.layer.items() if v[unit] >= 0}
            if any(sides.get(letter, side) != side for letter, side in here.items()):
                cuts.append(unit)
                sides = {}
            sides |= here
        return [slice(*pair) for pair in itertools.pairwise([*cuts, len(self.layer["M"])])]


def run_stack(
    x: Float[Array, "B T D"],
    config: ModelConfig,
    stacks: Stacks,
    rows: Rows,
    states: tuple | None,
    context: Context,
) -> tuple[Float[Array, "B T D"], tuple | None, RouterMetrics]:
    """Hidden states after the last layer, each layer's new state, and the MoE layers' stacked
    metrics.

    With states the layers are always unrolled: a cache carried through a scan would be copied.
    """
    split = any(isinstance(stack, nnx.List) for stack in stacks.values())
    if states is None and not split and _scans(context, len(config.pattern)):
        y, metrics = _scan_units(x, config, stacks, rows, context)
        return y, None, metrics
    return _run_layers(x, config, stacks, rows, states, context)


def _scans(context: Context, num_layers: int) -> bool:
    """Whether a pass without states scans over units."""
    execution = context.execution
    if execution.layers != "auto":
        return execution.layers == "scan"
    return context.target != "cpu" or execution.remat != "none" or num_layers > _FEW_LAYERS


def split_layers(stacks: Stacks) -> Stacks:
    """Stacks as lists of single layers, so that a loop around the model slices no weights."""
    return {
        letter: None
        if stack is None
        else nnx.List([_take(stack, n) for n in range(len(jax.tree.leaves(stack)[0]))])
        for letter, stack in stacks.items()
    }


def stay(module: nnx.Module) -> nnx.Module:
    """The module with weights that stay on their devices; see `staying`."""
    own = lambda variable: variable.replace(axes=staying(variable.axes))
    return jax.tree.map(own, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _run_layers(
    x: Array,
    config: ModelConfig,
    stacks: Stacks,
    rows: Rows,
    states: tuple | None,
    context: Context,
) -> tuple[Array, tuple | None, RouterMetrics]:
    count = dict.fromkeys(BLOCK_KINDS, 0)
    new_states, metrics = [], []
    for layer, letter in enumerate(config.pattern):
        stack, number = stacks[letter], count[letter]
        block = stack[number] if isinstance(stack, nnx.List) else _take(stack, number)
        count[letter] += 1
        told = _of_layer(rows, context, config, layer, layer)
        run = _rematerialised(
            lambda x, state, block=block, told=told: block(x, told[0], state, told[1]), context
        )
        x, state, report = run(x, None if states is None else states[layer])
        new_states.append(state)
        if report is not None:
            metrics.append(report)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *metrics) if metrics else _no_metrics(config, 0)
    return x, None if states is None else tuple(new_states), stacked


def _scan_units(
    x: Array, config: ModelConfig, stacks: Stacks, rows: Rows, context: Context
) -> tuple[Array, RouterMetrics]:
    """One scan for each run of units with the same formats, over indices into the whole stacks."""
    table = UnitTable.parse(config.pattern)
    boundary = config.num_layers - context.execution.precision.num_last_layers_high
    metrics = []
    for run in table.runs(boundary if context.execution.precision.emulated else config.num_layers):
        units = table.part(run)
        run_unit = _unit(units, config, stacks, rows, context)
        xs = jax.tree.map(jnp.asarray, (units.index, units.layer))
        x, found = jax.lax.scan(run_unit, x, xs)
        moe_units = np.flatnonzero(units.index["E"] >= 0)
        metrics.append(jax.tree.map(lambda a, keep=moe_units: a[keep], found))
    return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *metrics)


def _unit(
    units: UnitTable, config: ModelConfig, stacks: Stacks, rows: Rows, context: Context
) -> Callable[[Array, tuple], tuple[Array, RouterMetrics]]:
    """The body of one run's scan."""

    def run_block(letter: str, x: Array, place: tuple) -> tuple[Array, RouterMetrics | None]:
        index = units.index[letter]
        first = int(units.layer[letter].max())  # any layer of the run: their formats are the same

        def run(x: Array, place: tuple) -> tuple[Array, RouterMetrics | None]:
            number, layer = place
            own, inner = _of_layer(rows, context, config, first, layer)
            y, _, report = _take(stacks[letter], number)(x, own, None, inner)
            return y, report

        def skip(x: Array, place: tuple) -> tuple[Array, RouterMetrics | None]:
            return x, _no_metrics(config) if letter == "E" else None

        if np.all(index >= 0):
            return run(x, place)
        return jax.lax.cond(place[0] >= 0, run, skip, x, place)

    def run_unit(x: Array, places: tuple) -> tuple[Array, RouterMetrics | None]:
        numbers, layers = places
        report = _no_metrics(config)
        for letter, index in units.index.items():
            if np.all(index < 0):
                continue
            # Around the choice and never inside: a branch hands on all that its block keeps, and
            # for a checkpoint that is the whole stack.
            block = jax.checkpoint(
                functools.partial(run_block, letter),
                prevent_cse=False,
                policy=_kept(stacks[letter], context.execution.remat),
            )
            x, found = block(x, (numbers[letter], layers[letter]))
            report = report if found is None else found
        return x, report

    whole_unit = context.execution.remat == "full"
    return jax.checkpoint(run_unit, prevent_cse=False) if whole_unit else run_unit


def _kept(stack: Block, remat: str) -> Callable[..., bool]:
    """Which values of a block the backward pass finds again: for `mixers` what its experts gave;
    else all but the layer's weights, which it takes from their stack once more.

    A value is told by the primitive that makes it and by the shapes that this one is given.
    """
    if remat == "mixers":
        return KEPT
    shapes = set()
    for weight in jax.tree.leaves(stack, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        of_all = weight[...].shape
        of_one = of_all[1:]
        shapes |= {of_all, (1, *of_one), of_one, part_shape(weight.axes, of_one)}

    def keep(primitive: object, *operands: object, **_: object) -> bool:
        arrays = [operand.shape for operand in operands if operand.shape]
        return not (str(primitive) in MOVES and len(arrays) == 1 and arrays[0] in shapes)

    return keep


def _of_layer(
    rows: Rows, context: Context, config: ModelConfig, place: int, layer: int | Array
) -> tuple[Rows, Context]:
    """What one layer is told: random words of its own, and the number formats of layer `place`,
    which are its own too."""
    precision = context.execution.precision
    if not precision.emulated:
        return rows, context
    formats = tuple(
        (role, precision.format_of(role, place, config.num_layers)) for role in precision.formats
    )
    words = None if rows.words is None else nvfp4.fold(rows.words, layer)
    return dataclasses.replace(rows, words=words), dataclasses.replace(context, formats=formats)


def _rematerialised(run: Callable, context: Context) -> Callable:
    return run if context.execution.remat == "none" else jax.checkpoint(run)


def _take(stack: Block, number: int | Array) -> Block:
    """One block of a stack; its parameters are indexed, never sliced into a shorter stack."""
    if isinstance(number, int):
        return jax.tree.map(lambda a: a[number], stack)
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, number, keepdims=False), stack)


def _no_metrics(config: ModelConfig, *leading: int) -> RouterMetrics:
    experts = config.moe.num_experts if config.moe else 0
    return RouterMetrics(jnp.zeros((*leading, experts)), jnp.zeros(leading))
