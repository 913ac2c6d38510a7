"""Reading an answer out of a text, so strictly that listing every candidate names none.

A final text gives its answer in one of three ways: `\\boxed{…}`, a last line `Answer: …`, or a
single line that is the answer and nothing else. Several different boxes or answer lines are no
answer.
"""

import re
from fractions import Fraction

# Longer answers than this are read as none, and a text of more boxes gives none: both bound the
# time that reading takes.
MAX_ANSWER, MAX_BOXES = 2000, 50
_ANSWER_LINE = re.compile(r"^[ \t*_#>]*(?:final )?answer[ \t*_]*[:=][ \t*_]*(.*)$", re.IGNORECASE)
_NUMBER = re.compile(
    r"([+-]?)(?:(\d{1,3}(?:,\d{3})+|\d{1,40})(?:\.(\d{0,40}))?|\.(\d{1,40}))"
    r"(?:[eE]([+-]?\d{1,3}))?",
    re.ASCII,
)


def final_answer(text: str) -> str | None:
    """The one answer that a final text gives; None where it gives none, or several."""
    text = text.strip()
    if boxes := _boxes(text):
        return boxes[0] if len(set(boxes)) == 1 else None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    found = [match[1].strip(" \t*_") for line in lines if (match := _ANSWER_LINE.match(line))]
    if found:
        last = _ANSWER_LINE.match(lines[-1])
        answer = found[-1] if last and len(set(found)) == 1 else None
    else:
        answer = lines[0] if len(lines) == 1 else None
    return answer if answer and len(answer) <= MAX_ANSWER else None


def _boxes(text: str) -> list[str]:
    """What stands in each \\boxed{…}, braces balanced; one left open counts as the empty text."""
    boxes = []
    starts = list(re.finditer(r"\\boxed\s?\{", text))
    if len(starts) > MAX_BOXES:
        return ["", "several"]
    for start in starts:
        depth, end = 1, start.end()
        while depth and end < len(text) and end - start.end() <= MAX_ANSWER:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        boxes.append("" if depth else text[start.end() : end - 1].strip())
    return boxes


def number(text: str | None) -> Fraction | None:
    """The exact value of a plain number: 12, -3.50, 1,200, 2/3, 6.02e23; None for all else."""
    if text is None:
        return None
    text = text.strip().rstrip(".").strip("$ ") or "?"
    text = text.replace("\N{MINUS SIGN}", "-")
    over, slash, under = text.partition("/")
    value = _decimal(over.strip())
    if slash and value is not None:
        below = _decimal(under.strip())
        return value / below if below else None
    return value


def _decimal(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, whole, part, only, exponent = match.groups()
    digits = (whole or "0").replace(",", "") + (part or only or "")
    value = Fraction(int(digits), 10 ** len(part or only or ""))
    value *= Fraction(10) ** int(exponent or 0)
    return -value if sign == "-" else value


def plain(text: str | None) -> str:
    """A text with case, spacing and the marks around it taken away, for comparing names."""
    text = " ".join((text or "").casefold().split())
    return text.strip("\"'`*_ ").rstrip(".").strip("\"'`*_ ")
