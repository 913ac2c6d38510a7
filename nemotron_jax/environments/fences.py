"""Fenced blocks of code in a text, by CommonMark (section 4.5), read in one pass over its lines."""

import re

from nemotron_jax.environments.schema import read_json

# The mark of a list's item, with a fence behind it on its line.
_ITEM = re.compile(r"[ \t]*(?:[-*+]|\d{1,9}[.)])[ \t]+(?=```|~~~)")
# A fence's marks: fewer are no fence.
FEWEST_MARKS = 3
# A closing fence stands at most this many columns further in than its opening one.
_CLOSING_INDENT = 3


def fenced(text: str) -> list[str]:
    """The contents of the fenced blocks of a text, each line with its end.

    Beyond CommonMark, an opening fence may be indented by any width, as in a list, or begin an item
    of one, and marks at the end of the last line close a block that nothing else closes.
    """
    blocks: list[str] = []
    inside: list[str] | None = None
    mark, count, indent = "", 0, 0
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        if inside is None and (item := _ITEM.match(line)):
            line = " " * len(item[0].expandtabs(4)) + line[item.end() :]
        bare = line.lstrip(" \t")
        if inside is None:
            opening = _opening(bare)
            if opening:
                (mark, count), indent, inside = opening, _columns(line, bare), []
        elif _closes(bare, mark, count) and _columns(line, bare) <= indent + _CLOSING_INDENT:
            blocks.append("".join(f"{kept}\n" for kept in inside))
            inside = None
        else:
            inside.append(_outdented(line, indent))
    if inside is not None:
        if inside and inside[-1].rstrip().endswith(mark * count):
            inside[-1] = inside[-1].rstrip().rstrip(mark)
        blocks.append("".join(f"{kept}\n" for kept in inside).rstrip("\n") + "\n")
    return blocks


def _opening(bare: str) -> tuple[str, int] | None:
    """The mark of an opening fence and how often it stands; None for another line."""
    mark = bare[:1]
    if mark not in ("`", "~"):
        return None
    info = bare.lstrip(mark)
    count = len(bare) - len(info)
    # A backtick behind backticks makes them code within a line.
    return (mark, count) if count >= FEWEST_MARKS and not (mark == "`" and "`" in info) else None


def _closes(bare: str, mark: str, count: int) -> bool:
    marks = bare.rstrip(" \t")
    return len(marks) >= count and not marks.strip(mark)


def _columns(line: str, bare: str) -> int:
    return len(line[: len(line) - len(bare)].expandtabs(4))


def _outdented(line: str, indent: int) -> str:
    """A line without as much of its indent as its fence has."""
    if not indent:
        return line
    bare = line.lstrip(" \t")
    return " " * max(0, _columns(line, bare) - indent) + bare


def read_answer(text: str) -> object:
    """The JSON value of a text or of its one fenced block; ValueError where it is none."""
    text = text.strip()
    if len(text) > 6 and text.startswith("```") and text.endswith("```") and "\n" not in text:
        return read_json(text.strip("`").removeprefix("json"))  # code within a line
    blocks = fenced(text)
    if len(blocks) > 1:
        raise ValueError(f"{len(blocks)} fenced blocks; one is read")
    return read_json(blocks[0] if blocks else text)
