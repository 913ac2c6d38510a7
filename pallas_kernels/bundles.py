"""Static cycles of a TPU kernel, from the compiler's listing of its instruction bundles.

A core takes one bundle a cycle, so a kernel takes at least the bundles of its loops times their
trips. What stalls is not seen: a copy that is late, or a matrix unit that is still busy.
"""

import bisect
import dataclasses
import re
from collections.abc import Sequence

# Bundles: what is shorter and jumped over (the start of a copy, the end of a kernel) counts with
# what is around it, as if it were never jumped over.
FEWEST = 100
DELAY = 4  # bundles behind a branch that run whether it is taken or not

_BUNDLE = re.compile(r"^ *0x([0-9a-f]+)\s")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel .*?target = \$region(\d+)")


@dataclasses.dataclass(frozen=True)
class Part:
    """A loop of a kernel, or a stretch that a condition jumps over, without those inside it."""

    kind: str  # loop or condition
    depth: int
    first: int
    last: int
    bundles: int  # its own


def parts(listing: str) -> list[Part]:
    """Loops and conditions of a listing in program order; the first is the whole kernel."""
    starts, branches, end = _read(listing)
    spans = {(0, end): "kernel"}
    for place, region in branches:
        target = starts.get(region)
        if target is None:
            continue
        if target <= place:
            spans[target, min(place + 1 + DELAY, end)] = "loop"
        elif target - place - 1 - DELAY >= FEWEST:
            spans.setdefault((place + 1 + DELAY, target), "condition")
    return _tree(spans)


def cycles(found: Sequence[Part], steps: float, branches: Sequence[Sequence[float]] = ()) -> float:
    """Bundles times the times that they run.

    The grid takes `steps`, and without branches all that is not the kernel's own runs at each. A
    branch is a condition or loop directly in a step: how often it runs in all, and the mean trips
    of the loops in it, from the outside in (a loop that is itself the branch is the first of them).
    One branch alone is the grid's own loop.
    Raises ValueError where there are not as many branches as the compiler made.
    """
    if not branches:
        return found[0].bundles + steps * sum(part.bundles for part in found[1:])
    place, children = 0, _children(found, 0)
    total = found[0].bundles * 1.0
    while len(children) == 1 and len(branches) > 1:
        place = children[0]
        total += steps * found[place].bundles
        children = _children(found, place)
    if len(children) != len(branches):
        raise ValueError(
            f"cycles: {len(branches)} branches for a kernel of {len(children)}; its parts are "
            f"{describe(found)}"
        )
    for child, (count, *trips) in zip(children, branches, strict=True):
        total += _executed(found, child, count, trips)
    return total


def _executed(found: Sequence[Part], place: int, count: float, trips: Sequence[float]) -> float:
    if found[place].kind == "loop":
        count, trips = count * (trips[0] if trips else 1), trips[1:]
    inside = sum(_executed(found, child, count, trips) for child in _children(found, place))
    return count * found[place].bundles + inside


def _children(found: Sequence[Part], place: int) -> list[int]:
    """Places of the parts directly inside one."""
    depth, children = found[place].depth, []
    for other in range(place + 1, len(found)):
        if found[other].depth <= depth:
            break
        if found[other].depth == depth + 1:
            children.append(other)
    return children


def describe(found: Sequence[Part]) -> str:
    """The parts of a kernel in one line."""
    return ", ".join(f"{'>' * part.depth}{part.kind} {part.bundles}" for part in found[1:])


def _read(listing: str) -> tuple[dict[str, int], list[tuple[int, str]], int]:
    """Where each region starts, where branches stand and to what region, and the last address."""
    starts: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    place = 0
    for line in listing.splitlines():
        if bundle := _BUNDLE.match(line):
            place = int(bundle[1], 16)
        for region in _START.findall(line):
            starts.setdefault(region, place)
        branches += [(place, region) for region in _BRANCH.findall(line)]
    return starts, branches, place + 1


def _tree(spans: dict[tuple[int, int], str]) -> list[Part]:
    ordered = sorted(spans, key=lambda span: (span[0], -span[1]))
    kept: list[tuple[int, int]] = []
    depths: list[int] = []
    own: list[int] = []
    around: list[int] = []  # indices of the spans that hold the present one
    for first, last in ordered:
        while around and kept[around[-1]][1] <= first:
            around.pop()
        if around and last > kept[around[-1]][1]:
            last = kept[around[-1]][1]  # the branch's delay reaches out of a loop
        if last <= first:
            continue
        if around:
            own[around[-1]] -= last - first
        depths.append(len(around))
        kept.append((first, last))
        own.append(last - first)
        around.append(len(kept) - 1)
    names = [spans.get(span) or _nearest(spans, span) for span in kept]
    return [Part(*entry) for entry in zip(names, depths, *zip(*kept), own, strict=True)]


def _nearest(spans: dict[tuple[int, int], str], cut: tuple[int, int]) -> str:
    """What a span was that `_tree` cut short: the one that starts where it does and ends later."""
    ordered = sorted(spans)
    return spans[ordered[bisect.bisect_left(ordered, cut)]]
