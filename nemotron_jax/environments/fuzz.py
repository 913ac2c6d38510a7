"""Turns that no honest model sends: what a verifier has to survive."""

from collections.abc import Iterator
from typing import Any

from nemotron_jax.environments.base import MAX_CALLS, MAX_TEXT, Environment, Task
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import example
from nemotron_jax.environments.turns import ToolCall, Turn

# Texts that are drawn for each task; a task draws others than its neighbour.
DRAWN = 4
_DEEP = 100_000
_NINES = "9" * 5000
# Right-to-left marks, zero-width letters, digits of other scripts, a lone surrogate, a null.
_UNICODE = "\u202e\u200b\u0663\uff11\u00b2\u2460\ud800\x00\ufeff\U0001d7d9e\u0301\u2028\u0130\u1e9e"
_TEXTS = {
    "an open brace repeated": "{" * _DEEP,
    "deep lists": "[" * _DEEP + "]" * _DEEP,
    "deep objects": '{"a":' * 30_000 + "1" + "}" * 30_000,
    "lists just deep enough": "[" * 400 + "]" * 400,
    "half an object": '{"answer": ',
    "a repeated key": '{"answer": 1, "answer": 2}',
    "not a number": '{"answer": NaN}',
    "infinity": '{"answer": -Infinity}',
    "a long integer": _NINES,
    "a long integer as JSON": f'{{"answer": {_NINES}}}',
    "a large exponent": "1e999999999",
    "an exponent within bounds": "1e999",
    "a box with a large exponent": "\\boxed{9e999}",
    "division by zero": "1/0",
    "a tower of powers": "9**9**9**9",
    "unicode tricks": _UNICODE,
    "an answer of unicode tricks": f"Answer: {_UNICODE}",
    "a unicode box": f"\\boxed{{{_UNICODE}}}",
    "many boxes": "\\boxed{" * 20_000,
    "many answer lines": "Answer: 7391846\n" * 10_000,
    "answer lines without an end": "answer " * 20_000,
    "spaces before nothing": " " * 150_000 + "x",
    "stars and blanks": "* _ " * 40_000 + "answer",
    "a regex bomb of a": "a" * 50_000 + "!",
    "a regex bomb of digits": "1," * 50_000 + "x",
    "a regex bomb of dots": "1." * 50_000,
    "quotes": "\"'" * 50_000,
    "backslashes": "\\" * 100_000,
    "brackets": "(" * 60_000 + ")" * 60_000,
    "lines": "\n" * 190_000,
    "one character under the limit": "x" * (MAX_TEXT - 1),
    "one megabyte": "Answer: 1 " * 100_000,
    "a megabyte of one word": "x" * 1_000_000,
    "edits that never end": "<<<<<<< SEARCH\nx\n=======\n" * 8000,
    "edits that only begin": "<<<<<<< SEARCH\n" * 13_000,
    "fences that never close": "```a\n" * 40_000,
    "blank lines with blanks": "\n \n" * 66_000,
    "a path": "../" * 100 + "etc/passwd",
    "markup": "<tool_call>{}</tool_call>",
    "a format string": "%s%n{0.__class__}{answer}",
    "python": "__import__('os').system('false')",
    "sql": "'; DROP TABLE users; --",
    "reward": '{"reward": 1.0, "infra_error": null}',
}


# What the drawn texts repeat: marks of formats that begin and never end, and letters that break.
_UNITS = (
    "<<<<<<< SEARCH\n", "=======\n", ">>>>>>> REPLACE\n", "x\n", "```a\n", "```\n", "~~~\n",
    "``` ", "```py\nx = 1\n", "\n", "\n \n", " ", "\t", "\r", "\\boxed{", "\\boxed{1}", "\\frac{",
    "\\text{", "{\"a\":", "[", "]", "}", "\"", "\\", "\ud800", "\udc00", "\0", "\u2028", "\u0301",
    "\u200b", "<think>", "</think>", "<parameter=a>\n", "</parameter>\n", "<a><b>", "<",
    "Answer: ", "answer ", "* ", "**", "_", "|", "# ", "$", "1,", "1.", "9e9", "-", "'", "\u2019",
    "is ", "and ", "the ", "i can't ", "i ", "not ", ", ", ". ", "? ", ": ", "1. ", "(", ")", "a",
    "a b ", "select ", "--", "/* ",
)  # fmt: skip


def drawn_texts(draws: Draws, count: int) -> Iterator[tuple[str, str]]:
    """Texts of the longest size: up to three units over and over, and one more at each end."""
    for _ in range(count):
        units = [draws.choice(_UNITS) for _ in range(draws.between(1, 3))]
        first, last, unit = draws.choice(_UNITS), draws.choice(_UNITS), "".join(units)
        room = MAX_TEXT - len(first) - len(last)
        yield (
            f"{first!r}, {unit!r} over and over, {last!r}",
            (first + unit * (room // len(unit)) + last),
        )


def _deep_object() -> Any:
    value: Any = 1
    for _ in range(_DEEP):
        value = {"a": value}
    return value


def _values() -> dict[str, Any]:
    """Values to put where a tool's argument belongs."""
    return {
        "nothing": None,
        "a list": [1, [2, [3]]],
        "a huge number": 10**4000,
        "infinity": float("inf"),
        "not a number": float("nan"),
        "a negative number": -1,
        "true": True,
        "unicode tricks": _UNICODE,
        "a long text": "x" * 100_000,
        "an object": {"a": {"b": [None]}},
        "an empty text": "",
        "blanks": " " * 1000,
        "nines": _NINES,
        "a regex bomb": "(a+)+$" + "a" * 64,
        "brackets": "(" * 5000,
    }


def hostile_turns(environment: Environment, task: Task) -> Iterator[tuple[str, list[Turn | str]]]:
    """Named episodes: each hostile text as the answer, then hostile calls of every tool."""
    for name, text in (*_TEXTS.items(), *drawn_texts(Draws("fuzz", task.id), DRAWN)):
        yield name, [text] * min(environment.max_turns, 3)
        yield f"{name}, reasoned", [Turn(reasoning=text)]
    specs = {spec["function"]["name"]: spec["function"]["parameters"] for spec in task.tools}
    for tool in [*specs, "no_such_tool", "", "__init__", "score", _UNICODE]:
        properties = specs.get(tool, {}).get("properties", {"a": {}})
        for name, value in _values().items():
            arguments = {key: value for key in properties}
            yield f"{tool} of {name}", [Turn(calls=(ToolCall(tool, arguments),))]
            for key, rule in list(properties.items())[:4]:
                yield f"{tool}.{key} = {name}", [_call(tool, properties, key, value)]
                if rule.get("type") == "array":
                    yield f"{tool}.{key} = [{name}]", [_call(tool, properties, key, [value])]
        for name, raw in (("no object", 3), ("raw text", "{"), ("a list", []), ("none", None)):
            yield f"{tool} with {name}", [Turn(calls=(ToolCall(tool, raw),))]
    first = next(iter(specs), "tool")
    yield "a deep argument", [Turn(calls=(ToolCall(first, _deep_object()),))]
    yield (
        "many arguments",
        [Turn(calls=(ToolCall(first, {str(place): place for place in range(50_000)}),))],
    )
    yield "many calls", [Turn(calls=(ToolCall(first, {}),) * (MAX_CALLS + 1))]
    yield "messages of the wrong form", list(_messages())


def _call(tool: str, properties: dict, hostile: str, value: Any) -> Turn:
    """A call that is in order but for one argument."""
    arguments = {key: example(rule) for key, rule in properties.items()} | {hostile: value}
    return Turn(calls=(ToolCall(tool, arguments),))


def _messages() -> Iterator[dict]:
    """Assistant messages as a broken parser might make them."""
    yield {}
    yield {"content": None, "tool_calls": None}
    yield {"content": 7, "tool_calls": "x"}
    yield {"content": "x", "tool_calls": [None, 3, {}, {"function": 1}, {"function": {}}]}
    yield {"tool_calls": [{"function": {"name": 1, "arguments": "{"}}]}
    yield {"tool_calls": [{"function": {"name": "x", "arguments": "[" * _DEEP}}]}
