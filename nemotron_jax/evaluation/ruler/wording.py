"""The words around a text: what to do with it, the question, and how an answer begins."""

import dataclasses

from nemotron_jax.evaluation.ruler.kinds import COMMON_WORDS, NUMBER, Kind


@dataclasses.dataclass(frozen=True)
class Wording:
    """`opening` stands before the text, `question` after it, and `begins` starts the answer of a
    model that goes on with texts; the last two are formats of `query` and `count`."""

    opening: str
    question: str
    begins: str


_LISTED = "Below stands a numbered list of words. Some of them come more often than others.\n"
_CODED = "The text below is written in coded words. Count how often each one comes. "
_CHAIN = "Follow the assignments of variables that are hidden in the text below.\n\n"
_DOCUMENTS = "Answer a question from the documents below, with the bare answer.\n\n"


def wording(kind: Kind) -> Wording:
    """The wording of a kind."""
    match kind.form:
        case "needle":
            return _needle(kind)
        case "chain":
            return Wording(
                _CHAIN,
                "\nQuestion: Which variables have the value {query}, directly or by assignment?",
                " Answer: These {count} variables have the value {query}:",
            )
        case "common":
            return Wording(
                _LISTED,
                f"\nQuestion: Which {COMMON_WORDS} words come most often in the list?",
                f" Answer: The {COMMON_WORDS} words that come most often are:",
            )
        case "frequent":
            return Wording(
                _CODED,
                "\nQuestion: Which three coded words come most often? The dots do not count.",
                " Answer: The three coded words that come most often are:",
            )
    return Wording(_DOCUMENTS, "\n\nQuestion: {query} Give the bare answer.", " Answer:")


def thing(kind: Kind, count: int = 1) -> str:
    """What the needles hold."""
    return ("number" if kind.value == NUMBER else "code") + "s" * (count > 1)


def needle(kind: Kind, key: str, value: str) -> str:
    """The sentence that is hidden."""
    return f"The secret {thing(kind)} of {key} is {value}."


def listed(names: list[str]) -> str:
    """Names as a sentence holds them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _needle(kind: Kind) -> Wording:
    wanted = kind.values * kind.queries
    what, verb = thing(kind, wanted), "are" if wanted > 1 else "is"
    article = "Some secret" if wanted > 1 else "A secret"
    return Wording(
        f"{article} {what} {verb} hidden in the text below. Remember what it says of them.\n",
        f"\nWhat {verb} the secret {what} of {{query}} in the text above?",
        f" The secret {what} of {{query}} {verb}",
    )
