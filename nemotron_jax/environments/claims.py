"""What a short reply claims about things with numbers: "Bado costs 7, and its weight is 3."

Each clause is held against the forms of a sentence that gives one number to one quality of one
thing. What fits none of them counts as made up: a negation, a doubt, a unit, a list of names. So
a reply is read strictly, and a paraphrase beyond these forms is not understood.
"""

import dataclasses
import re
from collections.abc import Set
from itertools import pairwise

Claim = tuple[str, str, str]  # name, kind, value
# Word -> kind, by part of speech.
_NOUNS = {
    "price": "price", "cost": "price", "weight": "weight", "length": "length", "stock": "stock",
    "inventory": "stock", "supply": "stock", "mass": "weight",
}  # fmt: skip
_VERBS = {"costs": "price", "cost": "price", "weighs": "weight", "stocks": "stock"}
_ADJECTIVES = {"priced": "price", "long": "length", "available": "stock", "stocked": "stock"}
# Left out before a clause is read: they add nothing to a claim.
_IDLE = frozenset(
    "the a an this these currently now also too just exactly only then and so while whereas as"
    " total overall here there both finally".split()
)
_ARTICLES = frozenset("a an the".split())
_LINKS = frozenset("of for is are at in has have costs weighs it its that with to from".split())
_UNITS = frozenset("unit units piece pieces item items".split())
# Words of clauses without a number, which bring no fact: greetings and headings.
_COURTEOUS = frozenset(
    "hello hi dear customer thanks thank you for your question asking interest message here are is"
    " the a an of this these it that and in short brief briefly to sum up sure certainly course"
    " happy glad gladly help please let me know if need more anything else regards best kind"
    " welcome answer answers reply details facts summary overview about as on what we our have"
    " can tell i am i'm regarding both them they their its follows following asked at"
    " present moment".split()
)
_NEGATIONS = frozenset("not no never none nor neither without hardly".split())
_SENTENCE = re.compile(r"[.](?!\d)|[!?\n\r]")
_ASKED = re.compile(r"\d[^.!?\n\r]*\?")
_CLAUSE = re.compile(r"[,;:\u2013\u2014]|\b(?:and|while|whereas|but|plus)\b")
_STYLE = re.compile(r"[*#`_|]|^[ \t]*[-\u2022+][ \t]|^[ \t]*\d{1,2}[.)][ \t]", re.MULTILINE)
_EDGE = "\"'()[]\u2018\u2019\u201c\u201d"
# One of these stands in each sentence; a later clause of it may leave out its own.
_SPOKEN = frozenset("B W has have comes equals stands amounts carries measures sells goes".split())
# N name, K noun of a kind, W verb of one, A adjective of one, V value, B to be, U unit.
_NAMED = r"(?:T )?N(?: T)?"
_WHO = rf"(?:{_NAMED}|it)"
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?:K|that) (?:of|for) {_NAMED} (?:(?:B|equals|stands at|amounts to|comes to) )?V(?: U)?",
        rf"(?:{_NAMED} s|its) K (?:(?:B|equals|stands at|amounts to|comes to) )?V(?: U)?",
        r"K (?:(?:B|equals|stands at|amounts to|comes to|of|at) )?V(?: U)?",
        rf"(?:for|with|at) {_NAMED} K B V",
        rf"(?:{_WHO} )?(?:has|have|with|comes with|comes at|at|carries) K (?:(?:of|at) )?V",
        rf"(?:{_WHO} )?(?:has|have|with) V(?: U)? (?:in K|A)",
        rf"(?:{_WHO} )?W V",
        rf"(?:{_WHO} )?(?:sells for|goes for) V",
        rf"(?:{_WHO} )?(?:measures|B) V (?:A|in K)",
        rf"(?:{_WHO} )?(?:B )?A at V",
        rf"V B K (?:of|for) {_NAMED}",
        rf"V B (?:{_NAMED} s|its) K",
        rf"(?:we (?:have|W) |B )?V(?: U)?(?: of)? {_NAMED}(?: B)? (?:in K|A)",
        rf"(?:B )?V(?: U)? (?:of )?{_NAMED} in K",
        rf"we W V(?: U)?(?: of)? {_NAMED}",
        r"V(?: U)? (?:in K|A)",
        r"(?:it|they) B V",
        rf"in K B V(?: U)? of {_NAMED}",
    )
)


@dataclasses.dataclass
class Reader:
    """Reads clause after clause; a clause without a name speaks of the last one."""

    names: Set[str]
    things: Set[str]
    known: Set[str]  # words that a clause without a number may have
    name: str | None = None
    kind: str | None = None
    spoken: bool = False  # whether the sentence has had a verb

    def claims(self, text: str) -> set[Claim] | None:
        """All that a text claims; None where a clause is no plain claim or courtesy."""
        found = set()
        text = _STYLE.sub(" ", text.replace("\u2019", "'")).casefold()
        if _ASKED.search(text):  # a number in a question is no claim
            return None
        for sentence in _SENTENCE.split(text):
            self.spoken = False
            for clause in _CLAUSE.split(sentence):
                words = [stripped for word in clause.split() if (stripped := word.strip(_EDGE))]
                if any(map(_has_digit, words)):
                    claim = self._claim(words)
                    if claim is None:
                        return None
                    found.add(claim)
                elif not self._courteous(words):
                    return None
        return found

    def _courteous(self, words: list[str]) -> bool:
        bare = [_bare(word) for word in words if _bare(word) not in self.names]
        for word in words:
            self.name = _bare(word) if _bare(word) in self.names else self.name
            self.kind = _NOUNS.get(_bare(word), self.kind)
        allowed = self.things | set(self.known) | set(_NOUNS) | _COURTEOUS
        return not _NEGATIONS & set(bare) and set(bare) <= allowed

    def _claim(self, words: list[str]) -> Claim | None:
        kinds: list[str] = []
        told = " ".join(part for word in words if (part := self._part(word, kinds)))
        told = re.sub(r"\bs\b(?! K)", "B", told)  # "the weight's 7", not "Bado's weight"
        self.spoken |= bool(_SPOKEN & set(told.split()))
        names = [_bare(word) for word in words if _bare(word) in self.names]
        values = [word for word in words if _has_digit(word)]
        if not kinds:
            kinds = ["price"] if re.search("sells for|goes for", told) else [self.kind or ""]
        if len(names) > 1 or len(set(kinds)) != 1 or len(values) != 1 or not self.spoken:
            return None
        self.name, self.kind = (names or [self.name])[0], kinds[0]
        stray = any(one in _ARTICLES and not _opens(after) for one, after in pairwise([*words, ""]))
        fits = not stray and any(form.fullmatch(told) for form in _FORMS)
        return (self.name, self.kind, values[0]) if fits and self.name and self.kind else None

    def _part(self, word: str, kinds: list[str]) -> str:
        """What a word is in a form: its letter, nothing where it adds nothing, else itself."""
        bare = _bare(word)
        owns = " s" if bare != word else ""
        if bare in self.names:
            return "N" + owns
        if bare in self.things or bare in ("product", "model"):
            return "T" + owns
        if word.isascii() and word.isdigit():
            return "V"
        for table, letter in ((_NOUNS, "K"), (_VERBS, "W"), (_ADJECTIVES, "A")):
            if bare in table:
                kinds.append(table[bare])
                return letter + owns
        if word in ("is", "are"):
            return "B"
        if bare in _IDLE:
            return owns.strip()
        return "U" if word in _UNITS else bare + owns


def _opens(word: str) -> bool:
    """Whether an article can stand before a word."""
    return bool(word) and word not in _ARTICLES and word not in _LINKS and not _has_digit(word)


def _bare(word: str) -> str:
    return word.removesuffix("'s")


def _has_digit(word: str) -> bool:
    return any(map(str.isdigit, word))
