"""Texts of each form with so many units, and what is asked of them.

The end of a text holds nothing that is asked for: as many units as fill the last TAIL tokens of the
prompt. A model that sees no further back than that finds nothing.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments.draws import Draws
from nemotron_jax.evaluation.ruler import texts
from nemotron_jax.evaluation.ruler.kinds import (
    COMMON_WORDS,
    DOTS,
    EXAMPLE_LENGTH,
    FREQUENT_WORDS,
    NEEDLES,
    REPEATED,
    TOKENS_PER_CODED_WORD,
    ZIPF,
    Kind,
    repeats,
)
from nemotron_jax.evaluation.ruler.wording import listed, needle, wording

TAIL = 512  # tokens; the reader of the end alone that a score is held against sees so many
_EXAMPLE = (3, 3, 1, 20)  # letters of its variables; repeats of its words, and how many there are
_EXAMPLE_REFRAINS = 6


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question: the text before and under it, and what answers it."""

    body: str
    query: str
    gold: tuple[str, ...]
    depth: float | None = None
    example: str = ""  # a worked one, before the opening
    chance: float = 0.0  # score of names drawn from those in the text, the end's alone included

    def instruction(self, kind: Kind) -> str:
        """Opening, text and question."""
        return self.example + wording(kind).opening + self.body + self.question(kind)

    def question(self, kind: Kind) -> str:
        """What stands after the text."""
        return wording(kind).question.format(query=self.query, count=len(self.gold))

    def begins(self, kind: Kind) -> str:
        """How the answer begins."""
        return wording(kind).begins.format(query=self.query, count=len(self.gold))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a text is made: kind, length in tokens, what names its draws, depths to ask at."""

    kind: Kind
    length: int
    seed: tuple[str | int, ...]
    depths: tuple[float, ...]
    tail: int  # tokens
    costs: "Costs"

    def draws(self, what: str) -> Draws:
        """Draws of their own for each purpose: a longer text begins like a shorter one."""
        return Draws("ruler", self.kind.name, self.length, *self.seed, what)

    def end(self, units: Sequence[str], separator: str) -> int:
        """How many units stand before the end that holds nothing."""
        left, sizes = self.tail - self.costs.question, self.costs.of(units, separator)
        for place in reversed(range(len(units))):
            if left <= 0:
                return place + 1
            left -= sizes[place]
        return min(1, len(units))


class Costs:
    """Tokens of units, each counted once; what a prompt has of them is about their sum."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.question = 0  # tokens that stand after the text
        self._known: dict[str, int] = {}

    def of(self, units: Sequence[str], separator: str) -> list[int]:
        """Tokens of each unit with its separator."""
        new = list({separator + unit for unit in units}.difference(self._known))
        for unit, ids in zip(new, self._tokenizer.encode_batch(new), strict=True):
            self._known[unit] = len(ids)
        return [self._known[separator + unit] for unit in units]


def lay(place: Place, size: int) -> list[Asked]:
    """What is asked of a text with `size` units; at fewer depths where two share a unit."""
    return _LAYOUTS[place.kind.form](place, size)


def fewest(place: Place) -> int:
    """The fewest units that a text can have."""
    return {"needle": 8, "chain": 8, "common": COMMON_WORDS, "frequent": 60, "question": 3}[
        place.kind.form
    ]


def _needles(place: Place, size: int) -> list[Asked]:
    kind = place.kind
    keys, values = (
        texts.keys(place.draws("keys"), kind.key),
        texts.values(place.draws("values"), kind.value),
    )
    if kind.haystack == NEEDLES:
        pairs = list(zip(itertools.islice(keys, size), values))
        units = [needle(kind, key, value) for key, value in pairs]
        found = _at_depths(place.depths, place.end(units, "\n"))
        body = "\n".join(units)
        return [Asked(body, pairs[n][0], (pairs[n][1],), d) for d, n in found]
    if kind.haystack == REPEATED:
        separator, hay = "\n", [texts.REFRAIN] * size
    else:
        separator = " "
        hay = list(itertools.islice(texts.sentences(place.draws("hay")), size))
    named = itertools.islice(keys, kind.keys)
    told = {key: tuple(itertools.islice(values, kind.values)) for key in named}
    end, draws = place.end(hay, separator), place.draws("places")
    if not kind.depths:
        sentences = draws.shuffled([needle(kind, k, v) for k, of in told.items() for v in of])
        body = separator.join(_hidden(hay, [(draws.below(end + 1), s) for s in sentences]))
        asked = draws.sample(list(told), kind.queries)
        return [Asked(body, listed(asked), tuple(v for key in asked for v in told[key]))]
    groups = [place.depths] if kind.keys > 1 else [(depth,) for depth in place.depths]
    out = []
    for depths in groups:
        where = [round(d * end) for d in depths]
        where += [draws.below(end + 1) for _ in range(kind.keys - len(depths))]
        lines = [needle(kind, key, of[0]) for key, of in told.items()]
        body = separator.join(_hidden(hay, list(zip(where, lines))))
        out += [Asked(body, k, told[k], d) for d, k in zip(depths, told)]
    return out


def _chain(place: Place, size: int) -> list[Asked]:
    hops, example = place.kind.hops, ""
    body, value, names = _assigned(place, size, 5, "names")
    if place.length >= EXAMPLE_LENGTH:
        short = dataclasses.replace(place, tail=0)
        shown = Asked(*_assigned(short, _EXAMPLE_REFRAINS, _EXAMPLE[0], "example"))
        example = _worked(place.kind, shown)
    assert len(names) == hops + 1
    return [Asked(body, value, names, example=example)]


def _assigned(place: Place, size: int, letters: int, what: str) -> tuple[str, str, tuple[str, ...]]:
    draws = place.draws(what)
    names = tuple(itertools.islice(texts.variables(draws, letters), place.kind.hops + 1))
    value = str(draws.between(10_000, 99_999))
    lines = [f"LET {names[0]} = {value}"]
    lines += [f"LET {name} = {before}" for before, name in itertools.pairwise(names)]
    hay = [texts.REFRAIN] * size
    end = place.end(hay, "\n")
    where = sorted(draws.below(end + 1) for _ in lines)
    return "\n".join(_hidden(hay, list(zip(where, lines)))), value, names


def _common(place: Place, size: int) -> list[Asked]:
    many, few = repeats(place.length)
    names, draws, example = texts.words(place.draws("words")), place.draws("order"), ""
    if place.length >= EXAMPLE_LENGTH:
        _, often, seldom, count = _EXAMPLE
        some = list(itertools.islice(names, count))
        common, others = some[:COMMON_WORDS] * often, some[COMMON_WORDS:] * seldom
        body = _numbered(draws.shuffled(common + others))
        example = _worked(place.kind, Asked(body, "", tuple(some[:COMMON_WORDS])))
    common = list(itertools.islice(names, COMMON_WORDS))
    others = draws.shuffled(list(itertools.islice(names, size)) * few)
    # The numbers before the words are part of what the end has room for.
    at = len(common) * many + len(others)
    end = place.end([f"{at}. {word}" for word in others], " ")
    head = draws.shuffled(common * many + others[:end])
    body, chance = _numbered(head + others[end:]), COMMON_WORDS / (COMMON_WORDS + size)
    return [Asked(body, "", tuple(common), example=example, chance=chance)]


def _frequent(place: Place, size: int) -> list[Asked]:
    count = max(place.length // TOKENS_PER_CODED_WORD, 2 * FREQUENT_WORDS)
    coded = list(itertools.islice(texts.coded_words(place.draws("words")), count - 1))
    total = sum(rank**-ZIPF for rank in range(1, 10_000))  # of all ranks, to four digits
    times = [math.floor(size * rank**-ZIPF / total) for rank in range(1, count + 1)]
    draws, top = place.draws("order"), 1 + FREQUENT_WORDS
    ranked = [[word] * often for word, often in zip([DOTS, *coded], times, strict=True)]
    others = draws.shuffled([w for of in (ranked[0], *ranked[top:]) for w in of])
    end = place.end(others, " ")
    often = [word for of in ranked[1:top] for word in of]
    body = " ".join(draws.shuffled(others[:end] + often) + others[end:])
    there = sum(often > 0 for often in times[1:])
    return [Asked(body, "", tuple(coded[:FREQUENT_WORDS]), chance=FREQUENT_WORDS / max(there, 3))]


def _questions(place: Place, size: int) -> list[Asked]:
    names, draws = texts.proper_names(place.draws("names")), place.draws("facts")
    if place.kind.name == "qa_1":
        facts = [texts.one_fact(names, draws) for _ in range(size)]
        documents = [document for document, _, _ in facts]
        answers = {n: (query, answer, n) for n, (_, query, answer) in enumerate(facts)}
    else:
        pairs = [texts.two_facts(names, draws) for _ in range(size)]
        order = draws.shuffled([(n, part) for n in range(size) for part in (0, 1)])
        documents = [pairs[n][part] for n, part in order]
        at = {one: where for where, one in enumerate(order)}
        answers = {at[n, 0]: (*pairs[n][2:], at[n, 1]) for n in range(size)}
    shown = [f"Document {n}:\n{document}" for n, document in enumerate(documents, 1)]
    end, body, out = place.end(shown, "\n\n"), "\n\n".join(shown), []
    for depth in place.depths:
        # The nearest document that nobody asks of yet and whose facts stand before the end.
        open_ = [n for n, (_, _, other) in answers.items() if max(n, other) < end] or list(answers)
        nearest = min(open_, key=lambda n: abs(n - depth * (end - 1)), default=None)
        near = nearest is not None and abs(nearest - depth * (end - 1)) <= 1
        if near or not out:
            query, answer, _ = answers.pop(nearest)
            alternatives = (answer, answer.split()[-1]) if " " in answer else (answer,)
            out.append(Asked(body, query, alternatives, depth))
    return out


def _at_depths(depths: Sequence[float], end: int) -> list[tuple[float, int]]:
    """The unit at each depth; a depth whose unit is taken is left out."""
    taken: dict[int, float] = {}
    for depth in depths:
        taken.setdefault(round(depth * (end - 1)), depth)
    return [(depth, place) for place, depth in taken.items()]


def _hidden(hay: Sequence[str], lines: Sequence[tuple[int, str]]) -> list[str]:
    """The units with each line before the unit of its number, in the lines' order at one place."""
    out: list[str] = []
    by_place: dict[int, list[str]] = {}
    for place, line in lines:
        by_place.setdefault(place, []).append(line)
    for number, unit in enumerate(hay):
        out += (*by_place.get(number, ()), unit)
    return [*out, *by_place.get(len(hay), ())]


def _numbered(names: Sequence[str]) -> str:
    return " ".join(f"{number}. {name}" for number, name in enumerate(names, 1))


def _worked(kind: Kind, asked: Asked) -> str:
    return f"{asked.instruction(kind)}{asked.begins(kind)} {', '.join(asked.gold)}\n\n"


_LAYOUTS: dict[str, Callable[[Place, int], list[Asked]]] = {
    "needle": _needles,
    "chain": _chain,
    "common": _common,
    "frequent": _frequent,
    "question": _questions,
}
