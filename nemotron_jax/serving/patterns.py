"""Regular expressions and formats of clients' schemas: bounded, known, and written for Lark."""

import re
from typing import Any

# Characters that an expression's longest match without stars would have. A million take half a
# second and hundreds of megabytes to be made a grammar; formats in use have some hundreds.
MOST_UNROLLED = 100_000
_PART = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d{0,9})(,?)(\d{0,9})\}|\(\?[a-zA-Z-]*[:)]|.", re.DOTALL
)

# Formats that llguidance holds texts to. Any other says nothing, as JSON schema has it, and clients
# send many: `path`, `binary`, `password`.
_FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uri")
_FORMATS += ("uuid",)
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("const", "enum", "default", "examples")  # no schemas


def without_idle_rules(schema: Any, *, by_name: bool = False) -> Any:
    """A schema, or several `by_name`, without rules that say nothing, which llguidance refuses:
    formats that nothing is known of, and that names are texts, as zod's records have it."""
    if isinstance(schema, list):
        return [without_idle_rules(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: inner for name, inner in schema.items() if by_name or name != "format"}
    if not by_name and schema.get("format") in _FORMATS:
        kept["format"] = schema["format"]
    if not by_name and kept.get("propertyNames") in ({}, True, {"type": "string"}):
        del kept["propertyNames"]
    if not by_name and kept.get("uniqueItems") is False:
        del kept["uniqueItems"]
    return {
        name: inner
        if name in _DATA and not by_name
        else without_idle_rules(inner, by_name=name in _BY_NAME and not by_name)
        for name, inner in kept.items()
    }


def check_patterns(schema: Any) -> None:
    """Raise ValueError for a schema with an expression that is too large; none nests deep."""
    if isinstance(schema, dict):
        own = [schema.get("pattern"), *_mapping(schema.get("patternProperties"))]
        for pattern in own:
            if isinstance(pattern, str):
                check_pattern(pattern)
    for inner in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(inner, dict | list):
            check_patterns(inner)


def check_pattern(pattern: str) -> None:
    """Raise ValueError for an expression whose counted repetitions stand for too much."""
    sizes, last = [0], 0  # of the groups that are open, and of what a repetition would repeat
    for part in _PART.finditer(pattern):
        text = part[0]
        if text[0] == "(" and text[-1] != ")":
            sizes.append(0)
            last = 0
            continue
        if text == ")":
            last = sizes.pop() if len(sizes) > 1 else 0
        elif text[0] == "{" and len(text) > 1:
            last *= max(int(part[1] or 0), int(part[3] or 0), 1) - 1
        else:
            last = 1
        sizes[-1] += last
        if text[0] == "{":
            last = sizes[-1]
        if sizes[-1] > MOST_UNROLLED:
            raise ValueError(
                f"pattern {pattern[:40]!r}: its repetitions stand for more than {MOST_UNROLLED} "
                "characters; count less"
            )


def searched(pattern: str) -> str:
    """The texts in which an expression is found somewhere, as JSON's schemas mean it, for Lark."""
    begin = "" if pattern.startswith("^") else "(?s:.*)"
    ends = pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern.removeprefix("^")[: -1 if ends else None]
    return expression(f"{begin}({inner})" + ("" if ends else "(?s:.*)"))


def expression(pattern: str) -> str:
    """A regular expression as Lark writes it, whatever characters it holds."""
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    if parts and parts[-1] == "\\":
        raise ValueError(f"pattern {pattern[:40]!r}: ends in a backslash")
    written = {"/": r"\/", "\n": r"\n", "\r": r"\r", "\\\n": r"\n", "\\\r": r"\r"}
    return "/" + "".join(written.get(part, part) for part in parts) + "/"


def _mapping(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else []
