"""Reading an answer out of a text, so strictly that naming several candidates names none.

A final text gives its answer in the last `\\boxed{…}`, in a line `Answer: …`, in a sentence "The
answer is …", behind `####`, as the one bold part of its last line, or by being a single line.
Different answer lines, boxes joined by "or", and doubt behind an answer are no answer.
"""

import re
from fractions import Fraction

from nemotron_jax.environments.latex import normal

# Longer answers than this are read as none: it bounds the time that reading takes.
MAX_ANSWER = 2000
# So many lines may follow an answer, or name the same one.
MAX_BEHIND = 60
# The decimal behind an exact value may be off by this share of it.
ROUNDED = Fraction(1, 50)
_BOX = re.compile(r"\\(?:boxed|fbox)[ \t\n]?")
# Between two boxes, the words that make them one list of candidates.
_JOINED = re.compile(r"[\s$,.;()\\]{0,20}(?:or|and|,|;|/)[\s$,.;()\\]{0,20}", re.IGNORECASE)
_ANSWER_LINE = re.compile(
    r"[ \t*_#>\-\u2022]{0,20}(?:\d[.)] )?(?:(?:the|my|final|correct|short) ){0,3}ans(?:wers?)?\b"
    r"(?: \([^()\n]{1,60}\))?[ \t*_]{0,8}[:=\uff1a][ \t*_]{0,8}(.*)",
    re.IGNORECASE,
)
_HEADING = re.compile(r"[ \t*_#>]{0,20}(?:the |final |correct ){0,3}answer[ \t*_]{0,8}", re.I)
_SENTENCE = re.compile(
    r"\b(?:answers?(?: (?:to|for|of|in) [^.:!?\n]{1,80}?)?"
    r"|(?:correct|right|best) (?:option|choice|letter))"
    r"[ \t*_]{0,8}(?:(?:is|are|equals)\b|[:=])[ \t:]{0,4}",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"\b(?:option|choice|answer) ([*_(\[]{0,3}[A-Z][*_)\]]{0,3})"
    r" is (?:the )?(?:correct|right|best)\b",
    re.IGNORECASE,
)
# Where the answer of a sentence ends, and what else follows only explains it.
_SENTENCE_END = re.compile(r"[.!?](?=\s+\S)|,? (?:because|since|as it|which|so that|so)\b")
_ABBREVIATIONS = frozenset("st dr mr mrs ms mt ft jr sr no vs ca approx prof gen lt fig eq".split())
# Words that take an answer back wherever they stand behind it, or where they begin a line or
# sentence; and those that make one bold part of a line no statement.
_DOUBT = re.compile(
    r"\b(?:perhaps|maybe|possibly|probably|might|could|wait|actually|alternatively|unsure"
    r"|not (?:sure|certain)|correction|sorry|meant|mistake|unless|guess|second thoughts?"
    r"|on reflection|(?:is|was|be) (?:also|wrong|incorrect))\b|\?\s*$"
    r"|^\W*(?:or|and|no|not|nor|but|however|instead|also|either|otherwise|rather|wrong)\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:no|not|nor|or|but|neither|either|if)\b|n['\u2019]t\b", re.IGNORECASE)
# A line that takes leave says nothing about the answer.
_LEAVE = re.compile(
    r"\b(?:let me know|feel free|hope (?:this|that|it)|happy to|glad to|you(?:['\u2019]d| would)"
    r" like|if you (?:have|need|want)|thank|you['\u2019]re welcome|good luck|anything else"
    r"|just ask|is there anything|any (?:other |more |further )?questions)\b",
    re.IGNORECASE,
)
_MARKS = "\"'`*_ "
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*|__([^_\n]{1,200})__")
_DECORATION = re.compile(r"^[\s$`*_\\()\[\]=~-]*$")
_NUMBER = re.compile(
    r"(?:(\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d{1,40})(?:\.(\d{0,40}))?|\.(\d{1,40}))"
    r"(?:[eE]([+-]?\d{1,3})| ?[x*] ?10\^\(?([+-]?\d{1,3})\)?)?",
    re.ASCII,
)
_REPEATING = re.compile(r"(\d{0,40})\.(\d{0,40})overline\((\d{1,40})\)", re.ASCII)
_MIXED = re.compile(r"(\d{1,40})[ +]{1,3}(\d{1,40})/(\d{1,40})", re.ASCII)
_POWER_OF_TEN = re.compile(r"10\^\(?([+-]?\d{1,3})\)?", re.ASCII)
# What may stand before the sign of equality: a variable, or the sum that was asked for.
_LEFT_SIDE = re.compile(
    r"(?:[A-Za-z](?:_\w)?(?:\([a-z]\))?|[-+*/() .\d^]{1,200}) ?=(?![=<>]) ?", re.A
)
_ABOUT = re.compile(r"(?:≈|~|=|approximately|approx\.?|about|exactly|roughly)\s*", re.IGNORECASE)
# An exact value with its decimal behind it: 7/3 ≈ 2.33, 7/3 (about 2.33).
_ROUNDED = re.compile(
    r"([^≈]{1,400}?) ?(\()?(?:≈|\b(?:approximately|approx\.?|about|roughly)\b) ?([-+]?[\d.,]{1,60})"
    r"(?(2)\))"
)
_NAMED = re.compile(r"^[A-Za-z](?:_\w)? ?\u2248 ?")  # F ≈ 12 N
_REMARK = re.compile(r"\s+\(([A-Za-z]{2}[A-Za-z ,'\-]{0,60})\)$")
_CURRENCY = re.compile(r"(?<![\w.])(?:US|A|C)?[$€£¥](?=\s?[\d.])")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def final_answer(text: str) -> str | None:
    """The one answer that a final text gives; None where it gives none, or several."""
    text = text.strip()
    if text.endswith("</answer>") and text.count("<answer>") == 1:
        text = text.partition("<answer>")[2].removesuffix("</answer>").strip()
    if _BOX.search(text):
        answer = _last_box(text)
        return answer if answer is None or len(answer) <= MAX_ANSWER else None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not (len(line) < 5 and _DECORATION.match(line))]
    if not lines:
        return None
    answer = _stated(lines)
    return answer if answer and len(answer) <= MAX_ANSWER else None


def _last_box(text: str) -> str | None:
    """What stands in the last box; "" where it is left open, None where it is one of a list."""
    *before, last = _BOX.finditer(text)
    if before:
        start = before[-1].end()
        inner, end = _group(text, start)
        between = text[end : last.start()]
        if end <= last.start() and len(between) < 60 and _JOINED.fullmatch(between):
            return None if inner != _group(text, last.end())[0] else inner
    return _group(text, last.end())[0]


def _group(text: str, start: int) -> tuple[str, int]:
    """The text of the braces that open at `start`, or the one character there, and its end."""
    if text[start : start + 1] != "{":
        return text[start : start + 1].strip(), start + 1
    depth, place, most = 1, start + 1, min(len(text), start + MAX_ANSWER + 2)
    while depth and place < most:
        if text[place] == "\\":
            place += 1  # an escaped brace is none
        else:
            depth += {"{": 1, "}": -1}.get(text[place], 0)
        place += 1
    return ("" if depth else text[start + 1 : place - 1].strip()), place


def _stated(lines: list[str]) -> str | None:
    """The answer of lines without a box."""
    found: list[tuple[int, str]] = []
    for place, line in enumerate(lines):
        if match := _ANSWER_LINE.match(line):
            found.append((place, _line_answer(match[1]).strip(" \t*_")))
        elif _HEADING.fullmatch(line) and place + 1 < len(lines):
            found.append((place, ""))
    # A line Answer: with nothing behind it has its answer on the next one.
    found = [
        (place + 1, lines[place + 1]) if not answer and place + 1 < len(lines) else (place, answer)
        for place, answer in found
    ]
    for place, line in enumerate(lines[-3:], max(0, len(lines) - 3)):
        if not _ANSWER_LINE.match(line):
            found += [(place, answer) for answer in _sentences(line)]
    if not found:
        found = [(place + 1, lines[place + 1]) for place in _openings(lines[:-1])]
    if not found and "####" in lines[-1]:
        found = [(len(lines) - 1, lines[-1].rpartition("####")[2].strip())]
    if found:
        place, answer = max(found, key=lambda one: one[0])
        given = {one for _, one in found if len(one) <= MAX_ANSWER}
        same = len(given) < MAX_BEHIND and len({plain(normal(one)) for one in given}) == 1
        return answer if same and not _doubted(lines[place + 1 :]) else None
    line = lines[-1][-2 * MAX_ANSWER :]
    bold = {plain(one or other): one or other for one, other in _BOLD.findall(line)}
    unsure = _DOUBT.search(line) or _NEGATION.search(line)
    if len(bold) == 1 and not unsure:
        return next(iter(bold.values()))
    return lines[0] if len(lines) == 1 else None


def _openings(lines: list[str]) -> list[int]:
    """The places of lines that end in "the answer is:", which is on the next line then."""
    ends = [(place, line[-200:].rstrip("*_ ")) for place, line in enumerate(lines)]
    return [
        place
        for place, end in ends
        if end.endswith((":", " is")) and any(m.end() == len(end) for m in _SENTENCE.finditer(end))
    ]


def _sentences(line: str) -> list[str]:
    """What "the answer is …" names on a line, once for each time that it stands there."""
    answers = []
    line = line[-2 * MAX_ANSWER :]
    for match in _SENTENCE.finditer(line):
        answer, after = _cut(line[match.end() :])
        if answer := answer.strip(" \t*_:"):
            doubted = _DOUBT.search(after.lstrip(" ,.!?"))
            answers.append("?" if doubted else answer.removesuffix("!"))
    return answers + _CHOSEN.findall(line)


def _cut(text: str) -> tuple[str, str]:
    """The first sentence of a text, up to what only explains it, and the rest."""
    for end in _SENTENCE_END.finditer(text):
        word = re.search(r"\w*$", text[max(0, end.start() - 12) : end.start()])[0]
        initial = len(word) == 1 and re.match(r".\s+[A-Z]\.", text[end.start() :])
        if word.casefold() not in _ABBREVIATIONS and not initial:
            return text[: end.start()], text[end.start() :]
    return text, ""


def _line_answer(rest: str) -> str:
    """What stands behind Answer: on its line, without a sentence that takes leave or explains."""
    inner = _sentences(rest)  # Answer: the answer is …
    if len(inner) == 1:
        return inner[0]
    answer, after = _cut(rest[: 2 * MAX_ANSWER])
    explains = re.match(r",? (?:because|since)\b", after) and not _DOUBT.search(after[1:])
    return answer if explains or _LEAVE.search(after) else rest


def _doubted(lines: list[str]) -> bool:
    """Whether lines behind an answer say anything that may take it back."""
    return len(lines) > MAX_BEHIND or any(
        not _LEAVE.search(line) and (_is_bare(line) or bool(_DOUBT.search(line)))
        for line in (line[: 2 * MAX_ANSWER] for line in lines)
    )


def _is_bare(line: str) -> bool:
    """Whether a line is too short for a sentence, and so may be one more answer."""
    words = len(line.split())
    return words < 2 or (words == 2 and line[-1] not in ".!")


def number(text: str | None) -> Fraction | None:
    """The exact value of a literal number; None for all else, a sum to be worked out included.

    12, -3.50, 1,200, 2/3, 2 1/2, 6.02e23, 6 x 10^-3, 50%, \\frac{2}{3}, $18, 3 million, x = 5.
    """
    return None if text is None or len(text) > MAX_ANSWER else literal(value_of(bare(text)))


def value_of(text: str) -> str:
    """What stands behind "x =", or behind the sum that was asked for, in a plain form.

    Of several signs of equality the last one counts, if no number stands on another side.
    """
    rest, sides = text, []
    while match := _LEFT_SIDE.match(rest):
        sides.append(literal(match[0].rstrip("= ")))
        rest = rest[match.end() :]
    value = literal(rest) if sides else None
    return text if "=" in rest or any(side not in (None, value) for side in sides) else rest


def bare(text: str) -> str:
    """An answer's plain form without what stands around it: "about", "(exactly)", "$"."""
    text = normal(text).strip(_MARKS).rstrip(".").strip(_MARKS)
    if (remark := _REMARK.search(text)) and not _DOUBT.search(remark[1]):
        text = text[: remark.start()]
    text = _NAMED.sub("", text)
    if (rounded := _ROUNDED.fullmatch(text)) and _rounds(rounded[1], rounded[3]):
        text = rounded[1]
    while match := _ABOUT.match(text):
        text = text[match.end() :]
    return _CURRENCY.sub("", text).replace("$", "").strip()


def _rounds(exact: str, decimal: str) -> bool:
    """Whether a decimal is near a value in plain form; with a root or a letter it is let pass."""
    value, near = literal(value_of(exact)), literal(decimal)
    if near is None or value is None:
        words = re.sub("sqrt|root|log|exp|sin|cos|tan", "", exact)
        shown = re.search(r"\d|\bpi\b", exact) and not re.search("[A-Za-z]{3}", words)
        return near is not None and bool(shown)
    return abs(value - near) <= ROUNDED * abs(value)


def literal(text: str) -> Fraction | None:
    """The value of a number in plain form."""
    negative = text[:1] == "-"
    text = text[1:].strip() if text[:1] in ("-", "+") else text
    if text[:1] == "(" and text[-1:] == ")" and not re.search(r"[()]", text[1:-1]):
        value = literal(text[1:-1].strip())  # as in -(7/3)
        return -value if negative and value is not None else value
    words = text.rpartition(" ")
    if text.endswith("%") or words[2].casefold() in ("percent", "pct"):
        value = literal(text[:-1].strip() if text.endswith("%") else words[0])
        value = None if value is None else value / 100
    elif words[2].casefold() in _SCALES and words[0][:1].isdigit():
        value = literal(words[0])
        value = None if value is None else value * 10 ** _SCALES[words[2].casefold()]
    elif match := _MIXED.fullmatch(text):
        whole, over, under = (int(part) for part in match.groups())
        value = whole + Fraction(over, under) if 0 < over < under else None
    else:
        over, slash, under = text.partition("/")
        value = _decimal(over.strip())
        if slash and value is not None:
            below = _decimal(under.strip())
            value = value / below if below else None
    return -value if negative and value is not None else value


def _decimal(text: str) -> Fraction | None:
    if text.startswith("(") and text.endswith(")"):  # as in (-1)/2
        text = text[1:-1].strip()
        negative = text[:1] == "-"
        value = _decimal(text[1:].strip() if negative else text) if "(" not in text else None
        return -value if negative and value is not None else value
    if power := _POWER_OF_TEN.fullmatch(text):
        return Fraction(10) ** int(power[1])
    if match := _REPEATING.fullmatch(text):
        head, once, again = match.groups()
        value = Fraction(int(again), 10 ** len(again) - 1) + int(once or 0)
        return int(head or 0) + value / 10 ** len(once)
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    whole, part, only, exponent, power = match.groups()
    digits = re.sub("[ ,]", "", whole or "0") + (part or only or "")
    value = Fraction(int(digits), 10 ** len(part or only or ""))
    return value * Fraction(10) ** int(exponent or power or 0)


def plain(text: str | None) -> str:
    """A text with case, spacing and the marks around it taken away, for comparing names."""
    text = " ".join((text or "").casefold().split())
    return text.strip(_MARKS).rstrip(".").strip(_MARKS)
