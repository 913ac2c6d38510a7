"""The system block's description of tools, and arguments of calls read by a tool's schema."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The family's own words: a model has seen them, to the letter, in every example with tools.
HEADING = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
INSTRUCTIONS = """

If you choose to call a function ONLY reply in the following format with NO suffix:

<tool_call>
<function=example_function_name>
<parameter=example_parameter_1>
value_1
</parameter>
<parameter=example_parameter_2>
This is the value for the second parameter
that can span
multiple lines
</parameter>
</function>
</tool_call>

<IMPORTANT>
Reminder:
- Function calls MUST follow the specified format: an inner <function=...></function> block \
must be nested within <tool_call></tool_call> XML tags
- Required parameters MUST be specified
- You may provide optional reasoning for your function call in natural language BEFORE the \
function call, but NOT after
- If there is no function call available, answer the question like normal with your current \
knowledge and do not tell the user about function calls
</IMPORTANT>"""


def in_json(value: Any) -> str:
    """A value as the template writes it: JSON with characters beyond ASCII as themselves."""
    return json.dumps(value, ensure_ascii=False)


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, bool]]:
    """The text about tools, in parts with whether the template wrote each (else a tool's owner).

    A tool is OpenAI's `{"type": "function", "function": {...}}` or the inner object alone.
    """
    yield HEADING, True
    for tool in tools:
        function = tool.get("function", tool)
        yield from ((text, False) for text in _describe(function))
    yield "\n</tools>", True
    yield INSTRUCTIONS, True


def _describe(function: Mapping[str, Any]) -> Iterator[str]:
    yield f"\n<function>\n<name>{function['name']}</name>"
    if "description" in function:
        yield f"\n<description>{str(function['description']).strip()}</description>"
    yield "\n<parameters>"
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    for name, fields in properties.items() if isinstance(properties, Mapping) else ():
        yield f"\n<parameter>\n<name>{name}</name>"
        if "type" in fields:
            yield f"\n<type>{fields['type']}</type>"
        if "description" in fields:
            yield f"\n<description>{str(fields['description']).strip()}</description>"
        if "enum" in fields:
            yield f"\n<enum>{in_json(fields['enum'])}</enum>"
        yield from _others(fields, ("name", "type", "description", "enum"))
        yield "\n</parameter>"
    if isinstance(parameters, Mapping):
        yield from _others(parameters, ("type", "properties", "required"))
        if "required" in parameters:
            yield f"\n<required>{in_json(parameters['required'])}</required>"
    yield "\n</parameters>"
    yield from _others(function, ("type", "name", "description", "parameters"))
    yield "\n</function>"


def _others(fields: Mapping[str, Any], handled: tuple[str, ...]) -> Iterator[str]:
    for key, value in fields.items():
        if key not in handled:
            text = in_json(value) if isinstance(value, list | tuple | Mapping) else str(value)
            yield f"\n<{key}>{text}</{key}>"


class Schemas:
    """What each tool says about the types of its parameters.

    Built from whatever a caller gave as tools: what cannot be read as a schema is as if absent.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._properties: dict[str, Mapping[str, Any]] = {}
        for tool in tools or ():
            function = tool.get("function", tool)
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            if isinstance(properties, Mapping):
                self._properties[str(function.get("name"))] = properties

    def is_text(self, function: str, parameter: str) -> bool:
        """Whether the schema says that the value is a string and nothing else."""
        return self._kinds(function, parameter) == ("string",)

    def value(self, function: str, parameter: str, text: str) -> Any:
        """The value that a call wrote as `text`; the text itself where it is not of the type.

        Of an undeclared parameter it is the number, word or JSON whose text is exactly this one.
        """
        kinds = self._kinds(function, parameter)
        if kinds == ("string",):
            return text
        literal = _literal(text)
        if not kinds:
            return literal if _written(literal) == text else text
        fits = {
            "null": literal is None,
            "boolean": isinstance(literal, bool),
            "integer": type(literal) is int,
            "number": type(literal) in (int, float),
            "object": isinstance(literal, dict),
            "array": isinstance(literal, list),
        }
        return literal if any(fits.get(kind, False) for kind in kinds) else text

    def _kinds(self, function: str, parameter: str) -> tuple[str, ...]:
        schema = self._properties.get(function, {}).get(parameter)
        return tuple(_types(schema, depth=4))


def _types(schema: Any, depth: int) -> Iterator[str]:
    """The JSON types that a schema allows; nothing when it does not say."""
    if not isinstance(schema, Mapping) or depth == 0:
        return
    kind = schema.get("type")
    yield from [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else ()
    for union in ("anyOf", "oneOf"):
        options = schema.get(union)
        for option in options if isinstance(options, list) else ():
            yield from _types(option, depth - 1)


# Words that the template or a model's habit writes for JSON's three.
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_LONGEST_NUMBER = 64  # digits; Python refuses thousands, and no tool means them


def _literal(text: str) -> Any:
    """The value that the text spells; the text itself when it spells none."""
    stripped = text.strip()
    if stripped in _WORDS:
        return _WORDS[stripped]
    if len(stripped) > _LONGEST_NUMBER and stripped[:1] not in "{[":
        return text
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return text


def _written(value: Any) -> str:
    return in_json(value) if isinstance(value, list | dict) else str(value)
