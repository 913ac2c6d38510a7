"""The system block's description of tools."""

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
        if not isinstance(fields, Mapping):
            raise ValueError(
                f"chat: property {name!r:.40} of tool {function['name']!r:.40} is {fields!r:.40}; "
                'a property is an object such as {"type": "string"}'
            )
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
