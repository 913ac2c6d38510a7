"""Reading a text as people do: its words without the marks beside them, its lines, its echoes."""

import re
import unicodedata
from collections.abc import Iterable, Set

from nemotron_jax.environments.english import FUNCTION, is_english

# A dash, an ellipsis, or a mark between two letters parts words as a blank does.
_APART = re.compile(r"[\s\u2012-\u2015\u2026]+|--+|\.{2,}|(?<=[^\W\d_])[,;:!?]+(?=[^\W\d_])")
_LETTER = re.compile(r"[^\W_]")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")
# What marks an item of a list belongs to no word.
_BULLET = re.compile(r"^[ \t]*(?:[-*+\u2022][ \t]|\d{1,3}[.)][ \t])", re.MULTILINE)
_HYPHEN = re.compile(r"[-\u2010\u2011'\u2019]")
_ENDS = re.compile(r"[.!?:;\n\r\u2026]+")
# Shares of a text's words: at least so many are known, at most so many are function words. Prose
# in English has from a tenth (verse) to six tenths of them.
KNOWN, LEAST_FUNCTION, MOST_FUNCTION = 0.6, 0.08, 0.75
# Words that the shares above are asked of; fewer may be a headline.
FEW = 12
# Content words in a row, as a list without a verb has them.
LONGEST_RUN = 9
# Characters of a reply to a short request; a longer one is not read, which bounds the time.
LONGEST_REPLY = 20_000
_DETERMINERS = frozenset("a an the my your our their every".split())
# No noun phrase begins with these, so none stands behind a determiner.
_NO_NOUN = FUNCTION - frozenset(
    "above all back beyond even ever few just last least less like long many may might more most"
    " much must near never no not now off often once one only other others outside inside over own"
    " quite rather same still then too up down under upon very always almost here there will can"
    " round out".split()
)


def words_of(text: str) -> list[str]:
    """The words in lower case: no marks at their ends, hyphens and apostrophes inside kept.

    Marks that stand alone and the bullets and numbers of a list are no words.
    """
    text = _BULLET.sub(" ", unicodedata.normalize("NFC", text))
    stripped = (_EDGES.sub("", word) for word in _APART.split(text))
    return [word.casefold() for word in stripped if word]


def parts_of(words: Iterable[str]) -> list[str]:
    """Words with the halves of compounds, and what an apostrophe parts, each by itself."""
    return [part for word in words for part in _HYPHEN.split(word) if part]


def lines_of(text: str) -> list[str]:
    """The lines that hold a word."""
    return [line.strip() for line in text.splitlines() if _LETTER.search(line)]


def sentences_of(text: str) -> list[list[str]]:
    """The words of each sentence; a colon, a semicolon and a line's end close one too."""
    return [words for part in _ENDS.split(text) if (words := words_of(part))]


def echoes(text: str, said: Iterable[str], least: int = 4) -> bool:
    """Whether a text holds a sentence of what was said before, whatever its case and marks.

    least: sentences of fewer words may well be said again.
    """
    own = f" {' '.join(words_of(text))} "
    return any(f" {' '.join(s)} " in own for s in _long_sentences(said, least))


def repeats(text: str, said: Iterable[str]) -> bool:
    """Whether a sentence of a text has the words of one that was said before, and no others."""
    own = [sorted(sentence) for sentence in sentences_of(text)]
    return any(sorted(sentence) in own for one in said for sentence in sentences_of(one))


def without_echoes(text: str, said: Iterable[str], least: int = 4) -> str:
    """A text's words, less the sentences of what was said before."""
    own = f" {' '.join(words_of(text))} "
    for sentence in _long_sentences(said, least):
        own = own.replace(f" {' '.join(sentence)} ", " ")
    return own.strip()


def is_prose(words: list[str], names: Set[str] = frozenset()) -> bool:
    """Whether words could be sentences in English: most are words of it, and in some order.

    Rules catch letters in a row, lists, and function words that cannot stand together. They do
    not understand: a text of this form may still say nothing.

    names: words that count as English here; a number does as well.
    """
    known = sum(word in names or word.isdecimal() or is_english(word) for word in words)
    if not words or known < KNOWN * len(words):
        return False
    pairs = list(zip(words, words[1:]))
    if any(a == b and a not in ("had", "that", "very", "so", "long") for a, b in pairs):
        return False
    if any(a in _DETERMINERS and b in _NO_NOUN for a, b in pairs):
        return False
    if len(set(words)) < min(len(words) / 2, 30):  # a long text repeats its function words
        return False
    return len(words) < FEW or _mixed(words)


def _mixed(words: list[str]) -> bool:
    holds = [word in FUNCTION for word in words]
    run = longest = 0
    for one in holds:
        run = 0 if one else run + 1
        longest = max(longest, run)
    share = sum(holds) / len(words)
    return LEAST_FUNCTION <= share <= MOST_FUNCTION and longest <= LONGEST_RUN


def _long_sentences(said: Iterable[str], least: int) -> list[list[str]]:
    return [s for text in said for s in sentences_of(text) if len(s) >= least]
