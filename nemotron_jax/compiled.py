"""What a compiled program says of itself: its collectives, with the trips of their loops."""

import collections
import dataclasses
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)

_BITS = {"pred": 8, "bf16": 16, "token": 0}  # the others tell theirs in their name
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TWO = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_NAMES = re.compile(r"%([\w.\-]+)")
# A TPU's asynchronous collective stands in the fusions that start, go on with and end it; -1 in the
# first alone.
_PART = re.compile(r'"async_collective_fusion_config":\{"flag_start":"(-?\d+)"')
_RINGS = re.compile(r"\bcolors:(\d+)|\"emitter\":\"(\d)D")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction of a program, and how often one run of the program reaches it.

    `bytes` are those of the whole array that the devices share, the larger of operand and result,
    each time it is reached. In a loop whose trips the compiler does not know it counts once.
    """

    kind: str
    dtype: str
    bytes: int
    count: int
    source: str  # of the program that was traced, as far as the compiler kept it
    asynchronous: bool = False  # whether other work may run beside it
    rings: int | None = None  # that a TPU's compiler exchanges over, where it says so


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str


def collectives(text: str) -> list[Collective]:
    """Every collective of a compiled program, from its text, by how often it runs.

    Of the branches of a conditional the one that moves more bytes is counted, each time.
    """
    computations, entry = _computations(text)
    known: dict[str, list[Collective]] = {}

    def inside(name: str) -> list[Collective]:
        if name not in known:
            known[name] = [one for i in computations.get(name, ()) for one in found(name, i)]
        return known[name]

    def found(place: str, instruction: _Instruction) -> list[Collective]:
        opcode, rest = instruction.opcode, instruction.rest
        if opcode == "while":
            times = _trips(instruction, computations[place], computations)
            body = inside(_BODY.search(rest)[1])
            return [dataclasses.replace(one, count=one.count * times) for one in body]
        if opcode == "conditional":
            branches = _BRANCHES.search(rest)
            names = _NAMES.findall(branches[1]) if branches else _TWO.findall(rest)
            return max(map(inside, names), key=lambda all_of: _moved(all_of))
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            part = _PART.search(rest)
            if part and part[1] != "-1":
                return []  # goes on with one that was started
            return [_collective(kind, place, instruction, computations[place])]
        called = _CALLED.search(rest)
        of_call = inside(called[1]) if called else []
        rings = _rings(rest)  # a fusion says it of the one that it holds
        return [dataclasses.replace(one, rings=one.rings or rings) for one in of_call]

    return inside(entry)


@dataclasses.dataclass(frozen=True)
class Reached:
    """One instruction, and how often one run of its program reaches it."""

    opcode: str
    type: str
    source: str  # of the program that was traced; "" for what the compiler put in
    count: int


def instructions(text: str) -> Iterator[Reached]:
    """Every instruction of a compiled program, from its text, those inside of fusions too; all
    branches of a conditional count."""
    computations, entry = _computations(text)

    def inside(name: str, times: int) -> Iterator[Reached]:
        for one in computations.get(name, ()):
            yield Reached(one.opcode, one.type, _source(one.rest), times)
            called = _CALLED.findall(one.rest)
            runs = times
            if one.opcode == "while":
                called = _BODY.findall(one.rest)
                runs *= _trips(one, computations[name], computations)
            elif one.opcode == "conditional":
                branches = _BRANCHES.search(one.rest)
                called = _NAMES.findall(branches[1]) if branches else _TWO.findall(one.rest)
            for callee in called:
                yield from inside(callee, runs)

    return inside(entry, 1)


def summary(found: list[Collective]) -> dict[str, dict[str, int]]:
    """Count and bytes of a run by kind of collective."""
    table: dict[str, dict[str, int]] = {}
    for one in found:
        row = table.setdefault(one.kind, {"count": 0, "bytes": 0})
        row["count"] += one.count
        row["bytes"] += one.count * one.bytes
    return dict(sorted(table.items()))


def overlap(found: list[Collective]) -> dict[str, dict[str, object]]:
    """By kind of collective, how many of a run are asynchronous, their bytes, those of the largest
    array of any, and over how many rings the compiler says that it exchanges."""
    table: dict[str, dict[str, object]] = {}
    for one in found:
        row = table.setdefault(one.kind, {"asynchronous": 0, "bytes": 0, "largest": 0, "rings": []})
        row["largest"] = max(row["largest"], one.bytes)
        row["asynchronous"] += one.count * one.asynchronous
        row["bytes"] += one.count * one.bytes * one.asynchronous
        row["rings"] = sorted({*row["rings"], *([one.rings] if one.rings else [])})
    return dict(sorted(table.items()))


def _rings(rest: str) -> int | None:
    said = _RINGS.search(rest)
    return int(said[1] or said[2]) if said else None


def _trips(
    loop: _Instruction,
    siblings: list[_Instruction],
    computations: dict[str, list[_Instruction]],
) -> int:
    """How often a loop's body runs, 1 where that is not to be seen.

    The CPU's compiler says so; the TPU's leaves a counter that a constant ends.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = {one.name: one for one in computations[_CONDITION.search(loop.rest)[1]]}
    test = list(condition.values())[-1]
    counter, end = ([*map(condition.get, _names(test)), None, None])[:2]
    place = counter and re.search(r"\bindex=(\d+)", counter.rest)
    if "direction=LT" not in test.rest or not place or not end or end.opcode != "constant":
        return 1
    around = {one.name: one for one in siblings}
    start = around[_names(loop)[0]]  # a tuple, in which the counter's start is
    if start.opcode == "tuple":
        start = around[_names(start)[int(place[1])]]
    while start.opcode == "copy":
        start = around[_names(start)[0]]
    constants = [_arguments(one.rest) for one in (end, start)]
    return int(constants[0]) - int(constants[1]) if start.opcode == "constant" else 1


def _source(rest: str) -> str:
    found = re.search(r'op_name="([^"]*)"', rest)
    return found[1] if found else ""


def _names(instruction: _Instruction) -> list[str]:
    """Names of an instruction's operands."""
    return _NAMES.findall(_arguments(instruction.rest))


def _moved(found: list[Collective]) -> int:
    return sum(one.count * one.bytes for one in found)


def _collective(
    kind: str, place: str, instruction: _Instruction, siblings: list[_Instruction]
) -> Collective:
    types = {one.name: one.type for one in siblings}
    operands = [types.get(name, "") for name in _names(instruction)]
    given, result = sum(map(_size, operands)), _size(instruction.type)
    if instruction.opcode.endswith("-start") and result > given:
        result -= given  # its type holds operands and results
    if kind == "all-reduce" and "all-reduce-scatter" in place:
        kind = "reduce-scatter"  # how the TPU's compiler writes one: a fusion that keeps a slice
    dtypes = collections.Counter(dtype for dtype, _ in _SHAPE.findall(instruction.type))
    return Collective(
        kind,
        dtypes.most_common(1)[0][0],
        max(given, result),
        1,
        _source(instruction.rest),
        asynchronous=instruction.opcode.endswith("-start") or bool(_PART.search(instruction.rest)),
        rings=_rings(instruction.rest),
    )


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            kind, rest = _type_and_rest(line[instruction.end() :])
            opcode, _, rest = rest.partition("(")
            computations[name].append(_Instruction(instruction[1], kind, opcode.strip(), rest))
    return computations, entry


def _type_and_rest(text: str) -> tuple[str, str]:
    """A type, which may be a tuple and has spaces inside of parentheses alone, and what follows."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter in "({") - (letter in ")}")
        if letter == " " and depth == 0:
            return text[:place], text[place + 1 :]
    return text, ""


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place]
    return rest


def _size(kind: str) -> int:
    """Bytes of all arrays of a type."""
    total = 0
    for dtype, sides in _SHAPE.findall(kind):
        digits = re.search(r"\d+", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0
        elements = 1
        for side in sides.split(",") if sides else ():
            elements *= int(side)
        total += elements * bits // 8
    return total
