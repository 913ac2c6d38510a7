"""Seconds and bytes of one optimizer step on one device of a slice, by arithmetic.

What is counted is what the program does: rematerialised products, gathers and scatters of weights
in each micro-batch, quantisation. Nothing runs beside anything else.
"""

import collections
import dataclasses
from collections.abc import Mapping

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import HIGH
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.model.beside import model_beside
from nemotron_jax.planning import kernels
from nemotron_jax.planning.layers import Product, blocks_of, products_of
from nemotron_jax.planning.network import AXES, Layout, layouts, received
from pallas_kernels.devices import Slice

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Mode:
    """How often a part of the model runs: forward passes, and what its backward pass makes."""

    forward: int
    backward: bool = True
    gradients: bool = True  # of its weights


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step as a device sees it; seconds by part."""

    products: Mapping[str, float]
    memory: Mapping[str, float]
    network: Mapping[str, float]
    link_bytes: float
    layout: Layout
    size: Mapping[str, int]  # bytes of a device

    @property
    def seconds(self) -> float:
        """Seconds of the step: products, memory and network one after the other."""
        parts = (self.products, self.memory, self.network)
        return sum(sum(part.values()) for part in parts)


class Planner:
    """The steps of one run on one slice, by mesh: what does not depend on the mesh is made once.

    The config's own mesh and micro-batches are not looked at. With `scores` a step is one forward
    pass over the same rows. `links`, if given, are those that the devices of a weight use.
    """

    def __init__(
        self, config: RunConfig, place: Slice, links: int | None = None, *, scores: bool = False
    ) -> None:
        self.config, self.place, self._links = config, place, links
        self._parts = _parts(config, scores)
        self._scores = scores
        self._volumes = _volumes(config, self._parts)
        self._trained = 0 if scores else trained_parameters(config)
        self._total = accounting.parameters(config.model).total
        self._held, self._copied = _weights(config)
        beside = model_beside(config)
        self._beside = beside.bytes if beside else 0
        tokens = config.data.batch_size * config.data.sequence_length / place.size
        self._products, self._memory = _work(config, self._parts, place, tokens)

    def step(self, mesh: Mapping[str, int], micro_batches: int) -> Step:
        """The step on a mesh, laid on the slice's links in the way that exchanges fastest.

        Raises ValueError where the mesh does not fit the slice or the model, or the rows the mesh.
        """
        sizes = tuple(mesh.get(axis, 1) for axis in AXES)
        data, fsdp, expert = sizes
        found = layouts(self.place, mesh, self._links)
        count = self.config.model.moe.num_experts if self.config.model.moe else 0
        if expert > 1 and (count == 0 or count % expert):
            raise ValueError(f"mesh.expert={expert}: must divide the model's {count} experts")
        rows = _rows(self.config, data * fsdp * expert * micro_batches)
        tokens = rows * self.config.data.sequence_length
        exchanged = _exchanges(self._volumes, tokens, micro_batches, sizes)
        if data > 1 and not self._scores:  # an all-reduce of what the scatter left: two passes
            own = 2 * FLOAT32 * self._trained / (fsdp * expert)
            exchanged.append(("sums over data", "data", own * micro_batches))
        layout = min(found, key=lambda one: sum(_seconds(exchanged, one).values()))
        # The optimizer reads weight, gradient and both moments, and writes all but the gradient.
        moved = 7 * FLOAT32 * self._trained / (fsdp * expert)
        devices = {"data": data, "fsdp": fsdp, "expert": expert, "weights": fsdp * expert}
        return Step(
            products=self._products,
            memory={**self._memory, "optimizer": moved / self.place.device.hbm},
            network=_seconds(exchanged, layout),
            link_bytes=sum(received(size, devices[group]) for _, group, size in exchanged),
            layout=layout,
            size=self.size(mesh, micro_batches),
        )

    def size(self, mesh: Mapping[str, int], micro_batches: int) -> dict[str, int]:
        """Bytes of one device, by what fills it."""
        data, fsdp, expert = (mesh.get(axis, 1) for axis in AXES)
        rows = _rows(self.config, data * fsdp * expert * micro_batches)
        shares, tokens = fsdp * expert, rows * self.config.data.sequence_length
        # This micro-batch's gradients, before and after their sum over data; all micro-batches'.
        copies = 1 + (data > 1) + (micro_batches > 1)
        temporaries = copies * FLOAT32 * self._trained / shares
        if self._trained < self._total / 2:  # of what is frozen a copy to compute with is kept
            temporaries += self._copied / shares
        blocks = sum(part.count for part in self._parts)
        kept, working, more = _held(self.config, blocks, tokens, expert)
        size = {
            "parameters": (self._held + self._beside) / shares,
            "optimizer": 2 * FLOAT32 * self._trained / shares,
            "activations": kept,
            "kv": 0,
            "states": 0,
            # A layer's experts are gathered while inputs of the layers before it are still kept.
            "temporaries": temporaries + more + max(working - kept, 0),
        }
        return {name: int(value) for name, value in size.items()}


def mode_of(config: RunConfig, layer: int | None) -> Mode:
    """How a layer runs; None is the MTP block."""
    trains, forward = config.training.trains, 1 + (config.execution.remat != "none")
    if trains == "mtp" and layer is not None:
        return Mode(1, backward=False, gradients=False)
    return Mode(forward, gradients=trains != "lora")


def trained_parameters(config: RunConfig) -> int:
    """Parameters that have moments; those of adapters are too few to count."""
    count, trains = accounting.parameters(config.model), config.training.trains
    if trains == "lora":
        return 0
    if trains == "mtp":
        return count.mtp
    return count.total if config.training.mtp_depths else count.main


def _weights(config: RunConfig) -> tuple[int, int]:
    """Bytes of a model's weights, and of a copy of them to compute with.

    Masters are float32. The base of adapters is held in its own dtype, perhaps with experts as
    codes, and needs no copy where that is the dtype of the computation.
    """
    word, base = itemsize(config.execution), config.lora
    total = accounting.parameters(config.model).total
    if base is None:
        return FLOAT32 * total, word * total
    each = FLOAT32 if base.base_dtype == "float32" else 2
    held = accounting.weight_bytes(config.model, experts=base.base_experts, bytes_each=each)
    return held, 0 if each == word else word * total


@dataclasses.dataclass(frozen=True)
class _Part:
    """`count` blocks that are alike: letter, a layer that stands for them, how they run."""

    letter: str
    layer: int | None
    mode: Mode
    count: int


def _parts(config: RunConfig, scores: bool) -> list[_Part]:
    """The blocks of a step, those that are alike together."""
    alike: dict[tuple, list] = {}
    high = len(config.model.pattern) - config.execution.precision.num_last_layers_high
    for letter, layer in blocks_of(config.model, 0 if scores else config.training.mtp_depths):
        mode = Mode(1, False, False) if scores else mode_of(config, layer)
        key = (letter, layer is None, layer is not None and layer < high, mode)
        alike.setdefault(key, [letter, layer, mode, 0])[3] += 1
    return [_Part(*one) for one in alike.values()]


def _heads(config: RunConfig, parts: list[_Part]) -> tuple[int, int]:
    """How often a step takes the output head, and products of each time."""
    scores = not any(part.mode.backward for part in parts)
    if scores:
        return 1, 1
    # Forward, the gradient of its input, and of the matrix; it is not made again.
    times = 3 if config.training.trains == "all" else 2
    return config.training.mtp_depths + (config.training.trains != "mtp"), times


def _rows(config: RunConfig, parts: int) -> int:
    """Rows of a device in one micro-batch."""
    rows = config.data.batch_size
    if rows % parts:
        raise ValueError(
            f"data.batch_size={rows}: must be a multiple of {parts}, the mesh's devices times "
            "training.micro_batches"
        )
    return rows // parts


def _work(
    config: RunConfig, parts: list[_Part], place: Slice, tokens: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of matrix products, and of passes over arrays, for a device's tokens of a step."""
    speed = kernels.kernels_of(place.name)
    products: dict[str, float] = collections.defaultdict(float)
    memory: dict[str, float] = collections.defaultdict(float)
    per_byte = tokens * itemsize(config.execution) / place.device.hbm  # of one number of a token
    for part in parts:
        for name, seconds in _products(config, part, speed).items():
            products[name] += part.count * tokens * seconds
        for name, seconds in _quantised(config, part, speed).items():
            memory[name] += part.count * tokens * seconds
        for name, passes in _passes(config, part).items():
            memory[name] += part.count * per_byte * passes
    model, (heads, times) = config.model, _heads(config, parts)
    products["heads"] = 2 * model.vocab_size * model.width * speed.dense * tokens * heads * times
    if any(part.layer is None for part in parts):  # eh_proj
        width = 2 * model.width**2
        products["heads"] += 2 * width * times * config.training.mtp_depths * speed.dense * tokens
    return dict(products), dict(memory)


def _products(config: RunConfig, part: _Part, speed: kernels.Kernels) -> dict[str, float]:
    """Seconds of one token's products in one block, by what they are of."""
    model, letter, mode = config.model, part.letter, part.mode
    times = mode.forward + mode.backward + mode.gradients
    found: dict[str, float] = collections.defaultdict(float)
    for product in products_of(model, letter):
        if product.is_expert:
            found["experts"] += _expert(config, product, part, speed)
        else:
            name = {"M": "mamba", "*": "attention"}.get(letter, "shared and latent")
            again = times - (mode.forward - 1) * product.ends_block
            found[name] += product.flops * again * speed.dense
    if letter == "M":
        scan = model.mamba.inner_width * (5 * model.mamba.state_size + 2)
        found["scan"] = scan * (mode.forward * speed.scan + mode.backward * speed.scan_backward)
    elif letter == "*":
        width = model.attention.num_heads * model.attention.head_dim
        forward = 2 * width * (config.data.sequence_length + 1)  # of the mean context
        passes = mode.forward + mode.backward * kernels.ATTENTION_GRADIENT
        share = kernels.DENSE_TPU / kernels.ATTENTION  # `dense` has the other already
        found["attention scores"] = forward * passes * speed.dense * share
    elif letter == "E":
        router = 2 * model.width * model.moe.num_experts * kernels.ROUTER_PASSES
        found["router"] = router * times * speed.dense
    return found


def _expert(config: RunConfig, product: Product, part: _Part, speed: kernels.Kernels) -> float:
    """Seconds of one token in the kernels of the experts' up or down."""
    is_up, mode = product.role == "expert_up", part.mode
    total = mode.forward * (speed.up if is_up else speed.down) + mode.gradients * speed.matrices
    if mode.backward:
        # In the compute dtype down's input gradient comes from the kernel that makes the hidden
        # again; in a lower format each is a product of its own.
        fused = not is_up and _format(config, product.role, part.layer) == HIGH
        total += 2 * speed.hidden if fused else speed.rows
    return product.flops * total


def _quantised(config: RunConfig, part: _Part, speed: kernels.Kernels) -> dict[str, float]:
    """Seconds of one token's quantisation, experts' and others'; of weights it is too little."""
    found: dict[str, float] = collections.defaultdict(float)
    mode = part.mode
    for product in products_of(config.model, part.letter):
        if _format(config, product.role, part.layer) == HIGH:
            continue
        given = (1 if product.ends_block else mode.forward) + mode.gradients
        seconds = product.given * given * speed.quantise
        made = mode.backward + mode.gradients
        seconds += product.made * made * speed.quantise_gradient
        name = "quantisation, experts" if product.is_expert else "quantisation, others"
        found[name] += product.used * seconds
    return found


def _passes(config: RunConfig, part: _Part) -> dict[str, float]:
    """Numbers of a token that go through memory in one block beside its products."""
    model, letter, mode = config.model, part.letter, part.mode
    share = (mode.forward + 2 * mode.backward) / 4  # the passes are those of a rematerialised step
    found = {"norms and residuals": kernels.BLOCK_PASSES * model.width * share}
    if letter == "M":
        passes = mode.forward * kernels.CONV_FORWARD + mode.backward * kernels.CONV_BACKWARD
        found["convolution"] = passes * model.mamba.conv_channels
    elif letter == "E":
        width = model.moe.experts_per_token * (model.moe.latent_width or model.width)
        found["moving rows"] = kernels.ROW_PASSES * width * share
    return found


def _volumes(config: RunConfig, parts: list[_Part]) -> dict[str, float]:
    """Bytes that a micro-batch exchanges, as whole arrays; `tokens` for each, `once` a step."""
    model, word = config.model, itemsize(config.execution)
    found: dict[str, float] = collections.defaultdict(float)
    for part in parts:
        letter, mode = part.letter, part.mode
        # Gathered forward and once more backward; gradients scattered in float32.
        times = part.count * ((1 + mode.backward) * word + mode.gradients * FLOAT32)
        for product in products_of(model, letter):
            found["experts" if product.is_expert else "dense"] += times * product.size
        if letter == "E":
            found["dense"] += times * model.width * model.moe.num_experts  # the router
            # Tokens forward and again, their sums once, in float32; cotangents the other way round.
            passes = mode.forward * word + FLOAT32 + mode.backward * (word + FLOAT32)
            found["tokens"] += part.count * passes * (model.moe.latent_width or model.width)
    table, (heads, passes) = model.vocab_size * model.width, _heads(config, parts)
    learns = FLOAT32 * (passes == 3)
    found["tables"] = table * ((1 + heads) * word + heads * learns)
    found["once"] = table * learns
    return dict(found)


def _exchanges(
    volumes: Mapping[str, float], tokens: int, micro: int, sizes: tuple[int, int, int]
) -> list[tuple[str, str, float]]:
    """What a step exchanges: name, devices, bytes of the whole arrays."""
    _, _, expert = sizes
    tables = micro * volumes["tables"] + volumes["once"]
    return [
        ("dense weights", "weights", micro * volumes["dense"]),
        ("experts' weights", "fsdp", micro * volumes.get("experts", 0) / expert),
        ("tokens", "expert", micro * expert * tokens * volumes.get("tokens", 0) * (expert > 1)),
        ("embedding and head", "weights", tables),
    ]


def _seconds(exchanged: list[tuple[str, str, float]], layout: Layout) -> dict[str, float]:
    return {name: size * getattr(layout, group) for name, group, size in exchanged}


def _held(config: RunConfig, blocks: int, tokens: int, expert: int) -> tuple[float, float, float]:
    """Bytes of what the backward pass waits for, of a layer's experts, and of all else.

    Fitted to the compiled steps of docs/sharding.md, which says what they hold.
    """
    model, training, execution = config.model, config.training, config.execution
    word, learns = itemsize(execution), training.trains == "all"
    # Inputs of the blocks; `full` keeps those of units of about two and a half.
    kept = {"none": 12, "mixers": 4 / 3, "full": 0.4}[execution.remat]
    kept *= blocks * tokens * model.width * word
    table, working = model.vocab_size * model.width, 0.0
    more = 2.0 * word * table  # embedding and head, gathered
    if learns:  # their gradients, whole, for each loss
        more += FLOAT32 * table * (3 + 2 * training.mtp_depths)
    if moe := model.moe:
        matrix = moe.num_experts * (moe.latent_width or model.width) * moe.expert_width / expert
        working = matrix * (word + FLOAT32 * learns)
        if execution.precision.formats:  # what quantisation holds of matrices and gradients
            more += 3 * FLOAT32 * matrix
        rows, latent = tokens * moe.experts_per_token, moe.latent_width or model.width
        more += 2 * (1 + training.mtp_depths) * rows * moe.expert_width * word
        if expert > 1:  # a group's tokens and their sums, both ways, and what a window gives
            more += 2 * expert * tokens * latent * (word + FLOAT32)
            more += execution.expert_rows * rows * latent * FLOAT32
    return kept, working, more


def itemsize(execution: Execution) -> int:
    """Bytes of a number of the compute dtype; `auto` is that of float32 masters."""
    return {"bfloat16": 2, "float16": 2}.get(execution.compute_dtype, FLOAT32)


def _format(config: RunConfig, role: str, layer: int | None) -> str:
    if layer is None:
        return HIGH
    return config.execution.precision.format_of(role, layer, len(config.model.pattern))
