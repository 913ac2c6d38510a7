"""What each of the thirteen kinds hides in its text and asks for."""

import dataclasses

WORD, NUMBER, UUID = "word", "number", "uuid"
REPEATED, ESSAY, NEEDLES = "repeated", "essay", "needles"
# Below this length a list's common words come FEW times, as in the published generator.
FULL_LENGTH = 4096
# Below it no worked example stands before the question: it would take half of the text.
EXAMPLE_LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of task; counts are those of arXiv:2404.06654, table 2 and appendix B.

    `new_tokens`: room for the answer. `depths`: whether what is asked for stands at one depth.
    `shared`: how many questions one text answers, None for as many as there are depths.
    """

    name: str
    form: str
    new_tokens: int
    haystack: str = ""
    key: str = WORD
    value: str = NUMBER
    keys: int = 0  # in the text, where it is not made of them
    values: int = 0  # of a key
    queries: int = 0
    chains: int = 0
    hops: int = 0
    depths: bool = False
    shared: int | None = 1
    any_answer: bool = False  # gold is a list of alternatives


def _needle(name: str, haystack: str, **fields: object) -> Kind:
    counts = {"keys": 1, "values": 1, "queries": 1, **fields}
    return Kind(name, "needle", 128, haystack, **counts)


_KINDS = (
    _needle("niah_single_1", REPEATED, depths=True),
    _needle("niah_single_2", ESSAY, depths=True),
    _needle("niah_single_3", ESSAY, value=UUID, depths=True),
    _needle("niah_multikey_1", ESSAY, keys=4, depths=True, shared=4),
    _needle("niah_multikey_2", NEEDLES, depths=True, shared=None),
    _needle("niah_multikey_3", NEEDLES, key=UUID, value=UUID, depths=True, shared=None),
    _needle("niah_multivalue", ESSAY, values=4),
    _needle("niah_multiquery", ESSAY, keys=4, queries=4),
    Kind("vt", "chain", 30, REPEATED, chains=1, hops=4),
    Kind("cwe", "common", 120),
    Kind("fwe", "frequent", 50),
    Kind("qa_1", "question", 32, depths=True, shared=None, any_answer=True),
    Kind("qa_2", "question", 32, depths=True, shared=None, any_answer=True),
)
KINDS = {kind.name: kind for kind in _KINDS}

COMMON_WORDS = 10  # asked for by cwe
MANY = (30, 3)  # how often a common and another word come
FEW = (6, 1)  # the same below FULL_LENGTH
FREQUENT_WORDS = 3  # asked for by fwe
ZIPF = 2.0  # fwe: the k-th word comes as often as 1 / k ** ZIPF says; the first one is DOTS
DOTS = "..."
CODED_LETTERS = 6
TOKENS_PER_CODED_WORD = 50  # fwe's vocabulary is the length over this


def repeats(length: int) -> tuple[int, int]:
    """How often a common and another word of cwe come in a prompt of that length."""
    return MANY if length >= FULL_LENGTH else FEW
