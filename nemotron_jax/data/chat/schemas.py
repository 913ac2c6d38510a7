"""Arguments of calls read by the schemas of the request's tools."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from nemotron_jax.data.chat.tools import in_json
from nemotron_jax.environments.schema import read_json

# JSON's types; a number is an integer or a fraction, so that sets of types meet as they should.
_NUMBER = frozenset(("integer", "fraction"))
_SCALAR = str | int | float | None
ANYTHING = _NUMBER | {"string", "boolean", "object", "array", "null"}
TEXT = frozenset(("string",))

# Names of types that schemas use in place of JSON's: Python's, and those of other languages.
_NAMES = {
    "string": TEXT,
    "number": _NUMBER,
    **{kind: frozenset((kind,)) for kind in ("integer", "boolean", "object", "array", "null")},
    **dict.fromkeys(("str", "text", "char"), TEXT),
    **dict.fromkeys(("int", "long", "short", "byte", "int32", "int64"), frozenset(("integer",))),
    **dict.fromkeys(("float", "double", "num", "decimal"), _NUMBER),
    **dict.fromkeys(("bool",), frozenset(("boolean",))),
    **dict.fromkeys(("dict", "map", "hashmap", "hashtable", "mapping"), frozenset(("object",))),
    **dict.fromkeys(("list", "tuple", "set", "arraylist", "sequence"), frozenset(("array",))),
    **dict.fromkeys(("none", "nonetype"), frozenset(("null",))),
}
# Rules that hold for one type, which a schema without `type` means.
_IMPLIED = {
    **dict.fromkeys(("properties", "additionalProperties", "required"), _NAMES["object"]),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems"), _NAMES["array"]),
    **dict.fromkeys(("pattern", "minLength", "maxLength"), TEXT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBER),
}
# Schemas read for one parameter, and how deep they stand in one another: far above what tools
# have, far below what costs time or recursion. What lies beyond counts as any type.
_MOST_SCHEMAS, _DEEPEST = 2_000, 32

# Words that the template or a model's habit writes for JSON's three.
_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_LONGEST_NUMBER = 64  # digits; Python refuses thousands, and no tool means them
_EXACT = 2**53  # floats from here on may stand for another integer than was written


class Schemas:
    """What each tool says about the types of its parameters.

    Built from whatever a caller gave as tools: what cannot be read as a schema is as if absent.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._parameters: dict[str, tuple[Mapping[str, Any], ...]] = {}
        for tool in tools or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("parameters"), Mapping):
                # References are to the parameters' definitions, or to some beside them.
                roots = (function["parameters"], function, tool)
                self._parameters[str(function.get("name"))] = roots
        self._read: dict[tuple[str, str], _Types] = {}

    def is_text(self, function: str, parameter: str) -> bool:
        """Whether the schema says that the value is a string and nothing else."""
        return self._types(function, parameter).kinds == TEXT

    def kinds(self, function: str, parameter: str) -> frozenset[str]:
        """The types that a parameter may have: JSON's, a number as `integer` and `fraction`."""
        return self._types(function, parameter).kinds

    def target(self, function: str, reference: str) -> Any:
        """What a reference within a tool's own schemas stands for; None for any other."""
        return _target(self._parameters.get(function, ()), reference)

    def takes_null(self, function: str, parameter: str) -> bool:
        """Whether null is among the types of a parameter that is declared."""
        types = self._types(function, parameter)
        return types.declared and "null" in types.kinds

    def value(self, function: str, parameter: str, text: str) -> Any:
        """The value that a call wrote as `text`; the text itself where it is not of the type.

        Of an undeclared parameter it is the number, word or JSON whose text is exactly this one.
        Every value can be written as JSON, in UTF-8.
        """
        types = self._types(function, parameter)
        if types.kinds == TEXT:
            return text
        literal = _literal(text)
        if types.kinds == ANYTHING:
            return literal if _written(literal) == text else text
        if "string" in types.kinds and not types.prefer(literal, text):
            return text
        if isinstance(literal, float) and "fraction" not in types.kinds:
            literal = int(literal) if literal.is_integer() and abs(literal) < _EXACT else text
        return literal if _kind(literal) in types.kinds else text

    def _types(self, function: str, parameter: str) -> "_Types":
        roots = self._parameters.get(function)
        if roots is None:
            return _UNKNOWN
        if (function, parameter) not in self._read:
            self._read[function, parameter] = _Reader(roots).parameter(parameter)
        return self._read[function, parameter]


class _Types:
    """The types that a parameter may have, and the values that its schema lists."""

    def __init__(self, kinds: frozenset[str], listed: frozenset[tuple], *, declared: bool) -> None:
        self.kinds, self.declared = kinds, declared
        self._listed = listed  # scalars with their types, since True == 1 in Python

    def prefer(self, literal: Any, text: str) -> bool:
        """Whether the literal is meant rather than the text, where both types are allowed."""
        if (str, text) in self._listed:
            return isinstance(literal, _SCALAR) and (type(literal), literal) in self._listed
        return type(literal) not in (int, float) or _written(literal) == text


_UNKNOWN = _Types(ANYTHING, frozenset(), declared=False)


class _Reader:
    """Reads the schema of one parameter, through references and combinations."""

    def __init__(self, roots: Sequence[Mapping[str, Any]]) -> None:
        self._roots = roots
        self._left = _MOST_SCHEMAS
        self._listed: set[tuple] = set()

    def parameter(self, name: str) -> _Types:
        """The types of the parameter of this name."""
        schemas = list(self._declared(self._roots[0], name, frozenset(), 0))
        if not schemas:
            return _UNKNOWN
        # A parameter's schema that was put in whole brings its definitions with it.
        self._roots = (*self._roots, *(one for one in schemas if isinstance(one, Mapping)))
        kinds = _meet(self._kinds(schema, frozenset(), 0) for schema in schemas)
        return _Types(kinds, frozenset(self._listed), declared=True)

    def _declared(
        self, schema: Any, name: str, open_refs: frozenset[str], depth: int
    ) -> Iterator[Any]:
        """What an object's schema says about one of its properties."""
        self._left -= 1
        if not isinstance(schema, Mapping) or self._left < 0 or depth > _DEEPEST:
            return
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and name in properties:
            yield properties[name]
        elif isinstance(schema.get("additionalProperties"), Mapping):
            yield schema["additionalProperties"]
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in open_refs:
            refs = open_refs | {reference}
            yield from self._declared(_target(self._roots, reference), name, refs, depth + 1)
        for part in _members(schema, "allOf"):
            yield from self._declared(part, name, open_refs, depth + 1)

    def _kinds(self, schema: Any, open_refs: frozenset[str], depth: int) -> frozenset[str] | None:
        """The types that a schema allows; None for one that is being read already."""
        self._left -= 1
        if not isinstance(schema, Mapping) or self._left < 0 or depth > _DEEPEST:
            return ANYTHING
        inner = lambda part: self._kinds(part, open_refs, depth + 1)
        said = [*self._named(schema), *map(inner, _members(schema, "allOf"))]
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference in open_refs:
                return None
            refs = open_refs | {reference}
            said.append(self._kinds(_target(self._roots, reference), refs, depth + 1))
        for union in ("anyOf", "oneOf"):
            options = [kinds for kinds in map(inner, _members(schema, union)) if kinds is not None]
            said += [frozenset().union(*options)] if options else []
        kinds = _meet(said)
        if kinds == ANYTHING:
            kinds = _meet(_IMPLIED[rule] for rule in schema if rule in _IMPLIED)
        return kinds | {"null"} if schema.get("nullable") is True else kinds

    def _named(self, schema: Mapping[str, Any]) -> Iterator[frozenset[str]]:
        """What `type`, `enum` and `const` say, each for itself."""
        names = schema.get("type")
        if isinstance(names, str):
            yield _named(names)
        elif isinstance(names, list) and names:
            yield frozenset().union(*map(_named, names))
        values = list(_members(schema, "enum"))
        values += [schema["const"]] if "const" in schema else []
        self._listed.update((type(v), v) for v in values if isinstance(v, _SCALAR))
        if values:
            yield frozenset(map(_kind, values))


def _target(roots: Sequence[Mapping[str, Any]], reference: str) -> Any:
    """What a reference within some schemas stands for; None for any other."""
    base, mark, pointer = reference.partition("#")
    if base or not mark:
        return None
    for root in roots:
        found: Any = root
        for step in unquote(pointer).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                found = dict(zip(map(str, range(len(found))), found, strict=True)).get(step)
            else:
                found = found.get(step) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _meet(said: Any) -> frozenset[str]:
    """The types that all allow; one that contradicts those before it is passed over."""
    kinds = ANYTHING
    for more in said:
        kinds = kinds if more is None else kinds & more or kinds
    return kinds


def _members(schema: Mapping[str, Any], key: str) -> Iterator[Any]:
    found = schema.get(key)
    yield from found if isinstance(found, list | tuple) else ()


def _named(name: Any) -> frozenset[str]:
    """The types of a name, whatever its case, such as `dict` or `List[int]`."""
    return _NAMES.get(str(name).strip().lower().partition("[")[0], ANYTHING)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "integer" if isinstance(value, int) or value.is_integer() else "fraction"
    if isinstance(value, str):
        return "string"
    if value is None:
        return "null"
    return "object" if isinstance(value, Mapping) else "array"


def strict_json(text: str) -> Any:
    """The value of a JSON text that any JSON writer and any UTF-8 file takes; else ValueError.

    Python's reader takes numbers that no float holds for infinity, and halves of surrogate pairs.
    """
    value = read_json(text)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


def _literal(text: str) -> Any:
    """The value that the text spells; the text itself when it spells none."""
    stripped = text.strip()
    if stripped in _WORDS:
        return _WORDS[stripped]
    if len(stripped) > _LONGEST_NUMBER and stripped[:1] not in ("{", "["):
        return text
    try:
        return strict_json(stripped)
    except (ValueError, RecursionError):
        return text


def _written(value: Any) -> str:
    return in_json(value) if isinstance(value, list | dict) else str(value)
