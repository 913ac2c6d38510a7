"""How the axes of a mesh lie on the links of a slice, and how long they exchange an array.

A gather, and a scatter of sums, of V bytes over n devices brings V (n - 1) / n bytes into each,
over all links that the axis has there. Links are taken as busy all the time: what a compiler makes
of a collective can be slower (one ring of a group that has five links), never faster.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from pallas_kernels.devices import Device, Slice

AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Seconds for each byte of a whole array, by what exchanges it.

    `weights` are all devices that share a dense matrix: fsdp and expert together.
    """

    data: float
    fsdp: float
    expert: float
    weights: float
    links: float  # of a device that `weights` uses


def layouts(place: Slice, mesh: Mapping[str, int], links: int | None = None) -> tuple[Layout, ...]:
    """The ways to lay a mesh on a slice; `links`, if given, is the number that a device's have.

    Raises ValueError for a mesh that has other axes, or another number of devices than the slice.
    """
    for axis, size in mesh.items():
        if axis not in AXES and size != 1:
            known = ", ".join(AXES)
            raise ValueError(f"mesh.{axis}={size}: the estimate knows {known}; set it to 1")
    data, fsdp, expert = (mesh.get(axis, 1) for axis in AXES)
    if data * fsdp * expert != place.size:
        raise ValueError(
            f"target={place.target!r} has {place.size} devices, but mesh.data={data} times "
            f"mesh.fsdp={fsdp} times mesh.expert={expert} is {data * fsdp * expert}"
        )
    if links is not None:
        return (_given(place.device, data, fsdp, expert, links),)
    if place.device.is_gpu:
        return _switched(place.device, data, fsdp, expert)
    return _on_torus(place.name, place.device, place.sides, (data, fsdp, expert))


def received(size: float, devices: int) -> float:
    """Bytes that a gather or a scatter of an array brings into each of its devices."""
    return size * (devices - 1) / devices


def _given(device: Device, data: int, fsdp: int, expert: int, links: int) -> Layout:
    """Every exchange goes over so many links; fsdp and expert share them as they need sides."""
    both = fsdp * expert
    own = links
    if 1 < expert < both:  # rings take links in pairs
        share = math.log(expert) / math.log(both)
        own = min(max(2 * round(links / 2 * share), 1), max(links - 1, 1))
    rest = links - own if 1 < expert < both else links
    rate = lambda n, k: received(1, n) / (max(k, 1) * device.link)
    return Layout(rate(data, links), rate(fsdp, rest), rate(expert, own), rate(both, links), links)


def _switched(device: Device, data: int, fsdp: int, expert: int) -> tuple[Layout, ...]:
    """Devices of a host exchange over its switch; hosts over what all their devices have."""

    def rate(count: int, inside: int) -> float:
        hosts = count // inside
        between = received(1, hosts) / (inside * device.nic)
        return received(1, inside) / device.link + between

    found = []
    for first in ("fsdp", "expert"):
        sizes = {"fsdp": fsdp, "expert": expert}
        room = device.per_host
        inside = {}
        for axis in (first, *(other for other in sizes if other != first), "data"):
            inside[axis] = math.gcd(sizes.get(axis, data), room)
            room //= inside[axis]
        found.append(
            Layout(
                rate(data, inside["data"]),
                rate(fsdp, inside["fsdp"]),
                rate(expert, inside["expert"]),
                rate(fsdp * expert, inside["fsdp"] * inside["expert"]),
                1,
            )
        )
    return tuple(dict.fromkeys(found))


@functools.cache
def _on_torus(
    name: str, device: Device, sides: tuple[int, ...], sizes: tuple[int, int, int]
) -> tuple[Layout, ...]:
    """Every way to make the axes of parts of the sides, data from what the others leave."""
    del name  # a part of the cache's key alone
    if device.per_chip > 1:
        sides = (*sides, device.per_chip)  # the devices of a chip are neighbours too
    data, fsdp, expert = sizes
    found = []
    for own in _products(expert, sides):
        rest = tuple(side // part for side, part in zip(sides, own, strict=True))
        for parts in _products(fsdp, rest):
            both = tuple(a * b for a, b in zip(own, parts, strict=True))
            left = tuple(a // b for a, b in zip(rest, parts, strict=True))
            whole = _links(device, sides, both)
            counts = (
                _links(device, sides, left, both),
                _links(device, sides, parts, own),
                _links(device, sides, own),
                whole,
            )
            rates = [
                _passes(sides, n) * received(1, n) / ((k or 1) * device.link)
                for n, k in zip((data, fsdp, expert, fsdp * expert), counts, strict=True)
            ]
            found.append(Layout(*rates, whole))
    return tuple(dict.fromkeys(found))


def _passes(sides: tuple[int, ...], devices: int) -> int:
    """How often an exchange moves its bytes.

    Groups that span a whole three-dimensional slice gather and scatter by all-reduces, so the
    TPU's compiler decides; with an axis beside them they do not (docs/sharding.md).
    """
    return 2 if devices == math.prod(sides) and min(sides) > 1 and len(sides) > 2 else 1


@functools.cache
def _products(size: int, sides: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Parts of the sides, each a divisor of its side, whose product is `size`."""
    if not sides:
        return ((),) if size == 1 else ()
    return tuple(
        (part, *rest)
        for part in range(1, sides[0] + 1)
        if sides[0] % part == 0 and size % part == 0
        for rest in _products(size // part, sides[1:])
    )


def _links(
    device: Device, sides: tuple[int, ...], parts: tuple[int, ...], inner: tuple[int, ...] = ()
) -> float:
    """Links of a device along an axis that takes these parts of the sides.

    Along a whole side whose ends are joined a device has two; of a line, the one at its end has
    one. Where an `inner` axis has a part of the side too, its groups are as far apart, and as many
    share each link; two that face each other in a ring reach one another both ways round.
    """
    total = 0.0
    for side, part, within in zip(sides, parts, inner or (1,) * len(sides), strict=True):
        is_ring = part * within == side >= device.ring > 0 and side > 2
        total += (2 if is_ring else 1) / within if part > 1 else 0
    return total
