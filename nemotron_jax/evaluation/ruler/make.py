"""Prompts of a length in the model's own tokens."""

import dataclasses
import math
from collections.abc import Sequence

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.evaluation.ruler.kinds import KINDS, Kind
from nemotron_jax.evaluation.ruler.layouts import TAIL, Asked, Costs, Place, fewest, lay
from nemotron_jax.evaluation.ruler.scoring import says

_TRIES = 8  # of a number of units; three are the rule
_MISSING = 0.01  # of the length, that a prompt may be shorter
_WIDEST = 1.6  # times the end that is kept free, in tokens of units one by one


class NoRoom(ValueError):
    """A length is shorter than the shortest prompt of a kind."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt. `tokens` are those of instruction and beginning of the answer together."""

    kind: str
    length: int
    index: int  # among those of its kind and length
    text: int  # which text it is asked of
    asked: Asked
    tokens: int

    @property
    def instruction(self) -> str:
        """What the prompt asks, before the model's turn."""
        return self.asked.instruction(KINDS[self.kind])

    @property
    def begins(self) -> str:
        """The words that the answer is begun with."""
        return self.asked.begins(KINDS[self.kind])

    @property
    def task(self) -> str:
        """Its name: the same for every model with one tokenizer and one seed."""
        return f"{self.kind}/{self.length}/{self.index}"


def make(
    tokenizer: Tokenizer,
    kind: Kind,
    length: int,
    samples: int,
    *,
    depths: int = 10,
    seed: int = 0,
    reserved: int = 0,
) -> list[list[Prompt]]:
    """`samples` prompts of at most `length` tokens, answer included, grouped by the text that they
    are asked of; the depths of what is asked for go round from 0 (the start) to 1.

    `reserved`: tokens of the length that something else takes. Raises NoRoom where the length
    has no room for such a task.
    """
    grid = [0.5] if depths == 1 else [n / (depths - 1) for n in range(depths)]
    pending = [(index, grid[index % depths]) for index in range(samples)]
    groups: list[list[Prompt]] = []
    while pending:
        group = {depth: index for index, depth in reversed(pending)}  # the first index of each
        group = dict(sorted(group.items(), key=lambda one: one[1])[: kind.shared or depths])
        wanted = tuple(group) if kind.depths else ()
        limit = length - kind.new_tokens - reserved
        found, tokens = _fitted(tokenizer, kind, length, limit, (seed, len(groups)), wanted)
        index_of = group if kind.depths else {None: pending[0][0]}
        groups.append(
            [
                Prompt(kind.name, length, index_of[one.depth], len(groups), one, count)
                for one, count in zip(found, tokens, strict=True)
            ]
        )
        done = {prompt.index for prompt in groups[-1]}
        pending = [one for one in pending if one[0] not in done]
    return groups


def _fitted(
    tokenizer: Tokenizer,
    kind: Kind,
    length: int,
    limit: int,
    seed: tuple[int, int],
    depths: tuple[float, ...],
) -> tuple[list[Asked], list[int]]:
    """What is asked of the longest text whose prompts have at most `limit` tokens, and those."""
    tail = wide = min(TAIL, length // 2)
    room = limit
    place = Place(kind, length, seed, depths, wide, Costs(tokenizer))
    place.costs.question = _question_tokens(tokenizer, place)
    for _ in range(_TRIES):
        found = _longest(dataclasses.replace(place, tail=wide), tokenizer, room)
        ids = [tokenizer.encode(_whole(kind, one)) for one in found]
        if (excess := max(map(len, ids)) - limit) > 0:  # another question may be longer
            room -= excess
        elif wide < _WIDEST * tail and any(
            _shows(tokenizer, part[-tail:], one) for part, one in zip(ids, found, strict=True)
        ):
            wide = math.ceil(1.3 * wide)  # units side by side have fewer tokens than one by one
        else:
            return found, [len(part) for part in ids]
    raise AssertionError(f"{kind.name}: no text of {length} tokens in {_TRIES} tries")


def _longest(place: Place, tokenizer: Tokenizer, limit: int) -> list[Asked]:
    """What is asked of the text with as many units as there is room for."""
    kind, least = place.kind, fewest(place)

    def tokens(found: Sequence[Asked]) -> int:
        longest = max(found, key=lambda one: len(one.query) + len(one.body))
        return len(tokenizer.encode(_whole(kind, longest)))

    smallest = lay(place, least)
    small = tokens(smallest)
    if small > limit:
        raise NoRoom(
            f"ruler: length={place.length} has no room for {kind.name}: its shortest prompt has "
            f"{small} tokens with this tokenizer, its answer {kind.new_tokens}; ask for "
            f"{place.length + small - limit} at least, or leave the kind out"
        )
    each, best = (tokens(lay(place, 2 * least)) - small) / least, (least, smallest)
    size = least + math.floor((limit - small) / each)
    for _ in range(_TRIES):
        if size <= best[0]:
            break
        found = lay(place, size)
        over = (count := tokens(found)) - limit
        each = (count - small) / (size - least)
        if over > 0:
            size -= math.ceil(over / each)
            continue
        best = (size, found)
        if -over < each or -over <= _MISSING * limit:
            break
        size += math.floor(-over / each)
    return best[1]


def _question_tokens(tokenizer: Tokenizer, place: Place) -> int:
    """Tokens that stand after the text."""
    one = lay(dataclasses.replace(place, tail=0), fewest(place))[0]
    return len(tokenizer.encode(one.question(place.kind) + one.begins(place.kind)))


def _whole(kind: Kind, asked: Asked) -> str:
    return asked.instruction(kind) + asked.begins(kind)


def _shows(tokenizer: Tokenizer, ids: Sequence[int], asked: Asked) -> bool:
    """Whether these tokens hold something of the answer."""
    text = tokenizer.decode(ids)
    return any(says(text, answer) for answer in asked.gold)
