"""Which of several options an answer names, by its letter, its text, or both."""

import re

from nemotron_jax.environments.answers import MAX_ANSWER, bare, plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# B, (B), [b], B., Option B: words, B) words, B - words.
_LETTER = re.compile(
    r"(?:(?:the )?(?:option|choice|answer|letter)\b[ :]{0,3})?"
    r"(?:[(\[]([A-Za-z])[)\]]|([A-Za-z])(?![A-Za-z0-9]))[*_ ]{0,4}[.):,\-]?[*_ ]{0,4}"
    r"(?:(?<=[\s.):,\-*_])(.{1,1000}))?",
    re.IGNORECASE | re.DOTALL,
)
# Paris (B); Paris, option B.
_BEHIND = re.compile(
    r"(.{1,1000}?),? (?:\((?:option |choice )?([A-Za-z])\)|(?:option|choice) ([A-Za-z]))",
    re.IGNORECASE,
)
_PRAISE = re.compile(r" is (?:the )?(?:correct|right|best)(?: answer| option| choice| one)?$", re.I)
# Where a remark begins behind an option's text, and what in a remark names another option.
_REMARK = re.compile(r"[.,;:] | \(| [-\u2013\u2014] |(?:^| )(?:because|since|as) ", re.I)
_OTHER = re.compile(r"\b(?:or|not|perhaps|maybe|[A-Z]\)|(?:option|choice) [A-Z])\b", re.IGNORECASE)


def letter_of(answer: str | None, options: list[str]) -> str | None:
    """The letter of the option that an answer names, by its letter, its text, or both.

    With both, they must agree. A text that two options have names none.
    """
    if not answer or len(answer) > MAX_ANSWER:
        return None
    text = _PRAISE.sub("", bare(answer))
    match = _LETTER.fullmatch(text)
    if match and (place := LETTERS.index((match[1] or match[2]).upper())) < len(options):
        said = (match[3] or "").strip(" .,:;-")
        if not said or _says(said, options[place]):
            return LETTERS[place]
    if behind := _BEHIND.fullmatch(text):
        place = LETTERS.index((behind[2] or behind[3]).upper())
        if place < len(options) and _equal_texts(behind[1], options[place]):
            return LETTERS[place]
    named = [place for place, option in enumerate(options) if _equal_texts(text, option)]
    return LETTERS[named[0]] if len(named) == 1 else None


def _says(said: str, option: str) -> bool:
    """Whether words behind a letter are its option's text, a remark behind that aside."""
    if _equal_texts(said, option):
        return True
    head = _REMARK.split(said, maxsplit=1)[0]
    if head == said or _OTHER.search(said[len(head) :]):
        return False
    return not head or _equal_texts(head, option)


def _equal_texts(one: str, other: str) -> bool:
    return plain(bare(one)) == plain(bare(other)) != ""
