"""Seconds and bytes of decoding on a slice: copies of the model, each split over some devices.

A step is at least as long as reading the weights that its tokens touch and every row's state
(model/roofline.py), and as its products; then the devices of a copy add up what each block made.
That no weight is gathered is assumed: each device multiplies with its own part alone.
"""

import dataclasses
import math

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.model import accounting, roofline
from nemotron_jax.planning import kernels
from nemotron_jax.planning.network import layouts, received
from pallas_kernels.devices import Slice

EXPERTS = {"dense": 2.0, "nvfp4": 0.5625}  # bytes of a weight, its scales included
# Of the memory of a device: what an estimate does not see.
HEADROOM = 0.9
# A draft is accepted if all before it were. With 0.74, 7 drafts give Super's published length of
# 3.45 tokens a round (SPEED-Bench, arXiv:2604.12374).
ACCEPTED = 0.74
# Until a sum over devices arrives, beside its bytes: a hop of a torus (Google's scaling book), and
# an all-reduce of a few kilobytes inside an NVLink domain and between hosts. GPUs': assumed.
HOP_S, SWITCH_S, HOSTS_S = 1e-6, 8e-6, 25e-6


@dataclasses.dataclass(frozen=True)
class Wish:
    """What is to be decoded: `rows` at a time on the whole slice, each with so much context."""

    rows: int = 64
    context: int = 32_768
    experts: str = "dense"
    speculative: int = 0
    acceptance: float | None = None  # mean tokens of a round, the one that is sure included

    @property
    def mean_length(self) -> float:
        """Mean tokens of a round of decoding: `acceptance`, or what drafts that are each accepted
        with probability ACCEPTED give."""
        if self.acceptance is not None:
            return self.acceptance
        return sum(ACCEPTED**n for n in range(self.speculative + 1))

    def __post_init__(self) -> None:
        for name in ("rows", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)}: must be at least 1")
        if self.experts not in EXPERTS:
            raise ValueError(f"--experts={self.experts}: must be one of {', '.join(EXPERTS)}")
        if not 0 <= self.speculative <= 32:
            raise ValueError(f"--speculative={self.speculative}: must lie between 0 and 32 drafts")
        most = self.speculative + 1
        if self.acceptance is not None and not 1 <= self.acceptance <= most:
            raise ValueError(
                f"--acceptance={self.acceptance}: must lie between 1 and {most}, the tokens of a "
                f"round with --speculative={self.speculative}"
            )


@dataclasses.dataclass(frozen=True)
class Call:
    """Seconds of one call of the model for all rows of a copy."""

    products: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Memory is read while products run; sums over devices wait for both."""
        return max(self.products, self.memory) + self.network


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding with `copies` of the model on `devices` each."""

    copies: int
    devices: int
    step: Call
    round_seconds: float  # with drafts; of a step without
    mean_length: float
    size: dict[str, int]  # bytes of a device
    rows_that_fit: int  # on the whole slice
    fits: bool
    flops: float  # of a step, all rows


def decoding(
    model: ModelConfig, place: Slice, wish: Wish, *, taken: float = 0.0, split: int | None = None
) -> Decoding:
    """The way to split the slice among copies that decodes fastest, of those that fit.

    `taken` bytes of each device are used already; `split` fixes the devices of a copy. Where none
    fits, the one that needs the fewest bytes. Raises ValueError for drafts without an MTP block.
    """
    if wish.speculative and model.mtp is None:
        raise ValueError(
            f"--speculative={wish.speculative}: drafts are the MTP block's, and the model has none"
        )
    sizes = [n for n in range(1, place.size + 1) if place.size % n == 0]
    found = [
        _split(model, place, wish, devices, taken)
        for devices in ([split] if split else sizes)
        if split or place.size // devices <= wish.rows
    ]
    fast = lambda one: one.mean_length / one.round_seconds * wish.rows
    fitting = [one for one in found if one.fits]
    if fitting:
        return max(fitting, key=fast)
    return min(found, key=lambda one: sum(one.size.values()))


def _split(model: ModelConfig, place: Slice, wish: Wish, devices: int, taken: float) -> Decoding:
    copies = place.size // devices
    rows = -(-wish.rows // copies)
    step = _call(model, place, wish, devices, rows, tokens=1)
    seconds, length = step.seconds, 1.0
    if drafts := wish.speculative:
        verify = _call(model, place, wish, devices, rows, tokens=drafts + 1)
        seconds = drafts * _draft(model, place, wish, devices, rows).seconds + verify.seconds
        length = wish.mean_length
    size = _bytes(model, wish, devices, rows)
    room = place.device.memory * HEADROOM - taken
    row_bytes = (size["kv"] + size["states"] + size["activations"]) * devices / rows
    free = (room - size["parameters"]) * devices
    return Decoding(
        copies=copies,
        devices=devices,
        step=step,
        round_seconds=seconds,
        mean_length=length,
        size=size,
        rows_that_fit=max(0, int(free // row_bytes)) * copies,
        fits=sum(size.values()) <= room,
        flops=wish.rows * accounting.forward_flops(model, wish.context).total,
    )


def _call(
    model: ModelConfig, place: Slice, wish: Wish, devices: int, rows: int, tokens: int
) -> Call:
    work = roofline.step_work(
        model,
        rows=rows,
        tokens=tokens,
        context=wish.context,
        expert_bytes=EXPERTS[wish.experts],
    )
    touched = roofline.touched_experts(model, model.pattern, rows * tokens)
    sums = len(model.pattern)
    return _of(model, place, wish, devices, work, (touched, sums, rows * tokens))


def _draft(model: ModelConfig, place: Slice, wish: Wish, devices: int, rows: int) -> Call:
    work = roofline.draft_work(
        model, rows=rows, context=wish.context, expert_bytes=EXPERTS[wish.experts]
    )
    touched = roofline.touched_experts(model, model.mtp.pattern, rows)
    return _of(model, place, wish, devices, work, (touched, len(model.mtp.pattern), rows))


def _of(
    model: ModelConfig,
    place: Slice,
    wish: Wish,
    devices: int,
    work: roofline.Work,
    blocks: tuple[float, int, int],
) -> Call:
    """A call from its work; `blocks`: experts' parameters touched, blocks, tokens of a block."""
    touched, sums, tokens = blocks
    speed, device = kernels.kernels_of(place.name), place.device
    products = work.flops * speed.dense
    if wish.experts == "nvfp4":
        products += touched * speed.unpack
    network = sums * _sum_seconds(place, devices, tokens * model.width * 2)
    return Call(products / devices, work.bytes / devices / device.hbm, network)


def _sum_seconds(place: Slice, devices: int, size: float) -> float:
    """An all-reduce of `size` bytes over the devices of a copy: scattered, then gathered."""
    if devices == 1:
        return 0.0
    mesh = {"data": place.size // devices, "expert": devices}
    rate = min(one.expert for one in layouts(place, mesh))
    if place.device.is_gpu:
        wait = SWITCH_S if devices <= place.device.per_host else HOSTS_S
    else:
        sides = place.device.dimensions
        wait = HOP_S * sides * math.ceil(devices ** (1 / sides) / 2) * 2
    return 2 * size * rate + wait


def _bytes(model: ModelConfig, wish: Wish, devices: int, rows: int) -> dict[str, int]:
    """Bytes of one device of a copy; weights are bfloat16, or the experts' in NVFP4."""
    count = accounting.parameters(model)
    experts = roofline.touched_experts(model, model.pattern, 1 << 30)
    if wish.speculative:
        experts += roofline.touched_experts(model, model.mtp.pattern, 1 << 30)
    total = count.total if wish.speculative else count.main
    weights = 2 * (total - experts) + EXPERTS[wish.experts] * experts
    state = accounting.decode_state(model, wish.context)
    kv = state.kv + (state.mtp_kv if wish.speculative else 0)
    states = state.ssm + state.conv  # the tokens that a round replays are a hundredth of that
    logits = (1 + wish.speculative) * 4 * model.vocab_size
    size = {
        "parameters": weights,
        "optimizer": 0,
        "activations": rows * logits,
        "kv": rows * kv,
        "states": rows * states,
        "temporaries": 0,
    }
    return {name: int(value / devices) for name, value in size.items()}


def sums_bytes(model: ModelConfig, found: Decoding, rows: int) -> float:
    """Bytes that a step's sums bring into a device."""
    size = -(-rows // found.copies) * model.width * 2
    return 2 * len(model.pattern) * received(size, found.devices)
