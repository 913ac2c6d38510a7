"""The texts that things are hidden in: prose, lists and documents, drawn from a seed."""

import functools
import uuid
from collections.abc import Iterator

from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.english import COMMON
from nemotron_jax.environments.words import CITIES, COLOURS, FILLER, FIRST, THINGS, coined
from nemotron_jax.evaluation.ruler.kinds import CODED_LETTERS, NUMBER, UUID, WORD

# What a repeated haystack says again and again.
REFRAIN = "The river runs on. The wind turns the mill. A door stands open. Nobody comes by today."
_SENTENCES = (
    "{first} walked through {city} with {count} {colour} {thing}s under one arm.",
    "Most people in {city} would have told you that the {season} had been {word}.",
    "Nobody at the market could say why the {thing} had turned {colour} overnight.",
    "What {first} wanted was a {word} {thing} and an hour without any noise.",
    "In the end the {season} came late, and the {thing}s were sold for very little.",
    "It took {count} days to carry the {thing} from {city} to {other}.",
    "There is a {word} street behind the station of {city} where they mend {thing}s.",
    "{first} wrote a long letter about {colour} paint and never sent it.",
    "The road to {other} is {word} until the bridge, and after it there is only grass.",
    "Some say a {thing} should be {colour}, others that it does not matter at all.",
    "When the rain stopped, {first} counted the {thing}s again and found {count}.",
    "A {word} idea is often an old one that somebody in {city} forgot to write down.",
    "Before the war the {thing} makers of {other} worked {count} hours a day.",
    "You learn more from one {word} mistake than from {count} good days, said {first}.",
    "The windows were {colour}, the walls were {word}, and the clock had stopped.",
    "Every {season} the children of {city} build a {thing} out of paper.",
)
_SEASONS = ("spring", "summer", "autumn", "winter")


def sentences(draws: Draws) -> Iterator[str]:
    """Prose without end, none of which matters."""
    while True:
        city, other = draws.sample(CITIES, 2)
        yield draws.choice(_SENTENCES).format(
            first=draws.choice(FIRST),
            city=city,
            other=other,
            colour=draws.choice(COLOURS),
            thing=draws.choice(THINGS),
            word=draws.choice(FILLER),
            season=draws.choice(_SEASONS),
            count=draws.between(3, 90),
        )


@functools.cache
def plain_words() -> tuple[str, ...]:
    """Common English words of at least three letters."""
    return tuple(sorted(word for word in COMMON if len(word) > 2 and word.isalpha()))


def words(draws: Draws) -> Iterator[str]:
    """Different words: all the English ones in random order, then coined ones."""
    english = plain_words()
    yield from draws.sample(english, len(english))
    yield from _new(lambda: coined(draws, 4), set(english))


def keys(draws: Draws, form: str) -> Iterator[str]:
    """Different names: pairs of words, or UUIDs."""
    draw = {WORD: lambda: f"{draws.choice(plain_words())}-{draws.choice(THINGS)}"}
    return _new(draw.get(form, lambda: _uuid(draws)), set())


def values(draws: Draws, form: str) -> Iterator[str]:
    """Different values: numbers of seven digits, or UUIDs."""
    draw = {NUMBER: lambda: str(draws.between(1_000_000, 9_999_999)), UUID: lambda: _uuid(draws)}
    return _new(draw[form], set())


def variables(draws: Draws, letters: int) -> Iterator[str]:
    """Different names of capital letters."""
    return _new(lambda: _letters(draws, "ABCDEFGHIJKLMNOPQRSTUVWXYZ", letters), set())


def coded_words(draws: Draws) -> Iterator[str]:
    """Different words of random small letters."""
    return _new(lambda: _letters(draws, "abcdefghijklmnopqrstuvwxyz", CODED_LETTERS), set())


def one_fact(names: Iterator[str], draws: Draws) -> tuple[str, str, str]:
    """A document about a town, a question that it alone answers, and the answer."""
    town, founder, river, builder = (next(names) for _ in range(4))
    first, second = draws.choice(FIRST), draws.choice(FIRST)
    document = (
        f"{town} lies on the {river}, {draws.between(12, 90)} kilometres from "
        f"{draws.choice(CITIES)}. "
        f"It was founded in {draws.between(1102, 1890)} by {first} {founder} and grew on the trade "
        f"in {draws.choice(THINGS)}s. Its {draws.choice(COLOURS)} town hall was built by "
        f"{second} {builder} in {draws.between(2, 19)} years."
    )
    question, answer = draws.choice(
        [
            (f"Who founded {town}?", f"{first} {founder}"),
            (f"On which river does {town} lie?", river),
            (f"Who built the town hall of {town}?", f"{second} {builder}"),
        ]
    )
    return document, question, answer


def two_facts(names: Iterator[str], draws: Draws) -> tuple[str, str, str, str]:
    """Two documents, a question that takes both, and the answer."""
    works, person, place = (next(names) for _ in range(3))
    thing, first, colour = draws.choice(THINGS), draws.choice(FIRST), draws.choice(COLOURS)
    of_works = (
        f"The {works} works in {draws.choice(CITIES)} make {thing}s of every size. They were set "
        f"up in {draws.between(1801, 1960)} by {first} {person}, and {draws.between(20, 900)} "
        "people are employed there."
    )
    of_person = (
        f"{first} {person} was born in {place} and learned to make {colour} "
        f"{draws.choice(THINGS)}s before travelling for {draws.between(2, 30)} years."
    )
    question = f"In which place was the person born who set up the {works} works?"
    return of_works, of_person, question, place


def proper_names(draws: Draws) -> Iterator[str]:
    """Different coined words with a capital."""
    return _new(lambda: coined(draws, 4).capitalize(), set())


def _new(draw, taken: set[str]) -> Iterator[str]:
    while True:
        one = draw()
        if one not in taken:
            taken.add(one)
            yield one


def _letters(draws: Draws, alphabet: str, count: int) -> str:
    return "".join(draws.choice(alphabet) for _ in range(count))


def _uuid(draws: Draws) -> str:
    number = 0
    for _ in range(4):
        number = number << 32 | draws.below(1 << 32)
    return str(uuid.UUID(int=number, version=4))
