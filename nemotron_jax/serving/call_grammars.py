"""Tool calls as a grammar: names, order and types of the tools, in the family's own format.

A text within a call ends at its `</parameter>`, so no tag that the reader of calls ends at may
stand in it. Every value is written in the one form that the reader takes back for it.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from nemotron_jax.config.untrusted import shown
from nemotron_jax.data.chat.reader import FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END
from nemotron_jax.data.chat.render import CALL, CALL_END, END
from nemotron_jax.data.chat.schemas import ANYTHING, TEXT, Schemas
from nemotron_jax.data.chat.tools import in_json
from nemotron_jax.environments.schema import equal
from nemotron_jax.serving.fields import characters
from nemotron_jax.serving.patterns import check_patterns, expression, searched, without_idle_rules

Schema = Mapping[str, Any]

# JSON between whose parts nothing can go on for ever, spaced as the chat template writes it.
SPACED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What says nothing about a value, or what no validator checks unless asked.
_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "format")
    + ("$schema", "$id", "$comment", "x-guidance", "nullable")
)
# What an object's schema may say where a call's parameters are one by one.
_DEFINITIONS = ("$defs", "definitions")
_PARAMETERS = frozenset(
    ("type", "properties", "required", "additionalProperties", *_DEFINITIONS, "strict")
)
_DEEPEST = 16  # schemas that stand in one another before a text's own
# Characters of a request's schemas, each as often as it is referred to, and of what is written for
# them; and what a schema counts as at least. A few references to references stand for billions.
_MOST_READ, _LEAST_READ = 1_000_000, 20
_TEXT_RULES = frozenset(("type", "enum", "const", "pattern", "minLength", "maxLength"))
_UNIONS = ("anyOf", "oneOf")
_NAME = re.compile(r"[^<>\n\r]{1,256}")
# Beginnings of texts that could be read as another type. A lexer goes on with a text as long as it
# may be one, so that a value of another form has to begin otherwise.
_NUMBER = r"[\-0-9]"
_BEGINNINGS = {"null": "None|null", "boolean": "[Tt]rue|[Ff]alse", "array": r"\[", "object": r"\{"}
_BEGINNINGS |= {"integer": _NUMBER, "fraction": _NUMBER}
_QUOTED = r'"([^"\\\x00-\x1f]|\\.)*"'  # JSON, which is read as the text within
_BLANKS = r"[\s\x1c-\x1f]*"  # what Python takes off
# Formats that a text is held to, as RFC 3339 and 9562 write them.
_DAYS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
_LEAP = "([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)-02-29"
_DATE = f"([1-9][0-9]{{3}}-({_DAYS}|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP})"
_HOURS = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOURS}:[0-5][0-9](\.[0-9]{{1,6}})?(Z|[+\-]{_HOURS})"
_UUID = "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}"
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "uuid": _UUID}
_TAGS = (PARAMETER_END, CALL_END, END)
_EXACT = 2**53  # an integer without a bound stays within what every reader keeps


def calls_grammar(tools: Sequence[Schema], *, parallel: bool, answer: str | None) -> str:
    """A Lark grammar of one call, or several if they may be `parallel`.

    `answer` is a rule of what may stand in place of calls, or before them where it is a text;
    None where a call has to come. Raises ValueError, naming the tool, for a schema that it has no
    rules for.
    """
    lines = []
    schemas, left = Schemas(tools), _Left(_MOST_READ)
    for number, tool in enumerate(tools):
        try:
            lines += _Tool(tool.get("function", tool), number, schemas, left).rules()
        except ValueError as error:
            raise ValueError(f"tools[{number}]: {error}") from None
        except (TypeError, AttributeError):
            raise ValueError(f"tools[{number}]: its parameters are no JSON schema") from None
    functions = " | ".join(f"f{number}" for number in range(len(tools)))
    more = "(NL? call)* " if parallel else ""
    begin = {None: "start: calls", TEXT_OR_CALLS: "start: WORDS calls?"}
    return "\n".join(
        (
            begin.get(answer, f"start: calls | {answer}"),
            "WORDS: /(?s:.*)/" if answer == TEXT_OR_CALLS else "",
            f"calls: NL? call {more}NL?",
            f"call: {CALL} {_quoted(chr(10) + FUNCTION)} ({functions})"
            f" {_quoted(FUNCTION_END + chr(10))} {CALL_END}",
            'NL: "\\n"',
            *lines,
        )
    )


TEXT_OR_CALLS = "text"


@dataclasses.dataclass
class _Left:
    """Characters that a request's schemas may still come to."""

    characters: int

    def take(self, number: int) -> None:
        """Raise ValueError where they are used up."""
        self.characters -= number
        if self.characters < 0:
            raise ValueError("its schemas refer to too much; write fewer or smaller ones")


class _Tool:
    """The rules of one tool's calls, named by its number."""

    def __init__(self, function: Schema, number: int, schemas: Schemas, left: _Left) -> None:
        self._name, self._rule, self._schemas = function["name"], f"f{number}", schemas
        self._left = left
        self._parameters = self._root(function.get("parameters") or {})
        _check_name("name", self._name)

    def _root(self, parameters: Schema) -> Schema:
        """The parameters' own schema, which may stand among the definitions, as that of a model
        that holds itself does."""
        known = {name: parameters[name] for name in _DEFINITIONS if name in parameters}
        own = {name: value for name, value in parameters.items() if name not in known}
        return {**self._resolved(own), **known} if "$ref" in own else parameters

    def rules(self) -> Iterator[str]:
        """Lark's rules, the call's own first."""
        unknown = sorted(set(self._parameters) - _PARAMETERS - _ANNOTATIONS)
        if unknown:
            raise ValueError(f"parameters.{unknown[0]:.40}: calls cannot be held to it")
        properties = dict(self._parameters.get("properties") or {})
        required = self._parameters.get("required") or []
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError("parameters.required: must be a list of names")
        others = self._parameters.get("additionalProperties", True)
        for name in required:
            if name not in properties and others is False:
                raise ValueError(f"parameters.required: {name!r:.40} is not among the properties")
            properties.setdefault(name, others if isinstance(others, dict) else {})
        parts, rules = [], []
        check_patterns(self._parameters)
        for number, (name, schema) in enumerate(properties.items()):
            rule = f"{self._rule}p{number}"
            parts.append(rule if name in required else f"{rule}?")
            rules += self._parameter(rule, name, schema)
        yield f"{self._rule}: {' '.join((_quoted(self._name + '>' + chr(10)), *parts))}"
        yield from rules

    def _parameter(self, rule: str, name: str, schema: Any) -> Iterator[str]:
        """A parameter from its name to its end."""
        _check_name("parameters", name)
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping):
            raise ValueError(f"parameters.{name:.40}: {shown(schema)[:60]} is not a schema")
        try:
            values = list(self._values(name, schema))
        except ValueError as error:
            raise ValueError(f"parameters.{name:.40}: {error}") from None
        names = " | ".join(f"{rule}v{number}" for number in range(len(values)))
        yield f"{rule}: {_quoted(f'{PARAMETER}{name}>{chr(10)}')} ({names})"
        for number, (text, body) in enumerate(values):
            self._left.take(len(body))
            if text:  # lazy: it ends with the first closing tag
                yield f"{rule}v{number}[lazy]: {rule.upper()}V{number}"
                yield f"{rule.upper()}V{number}: {body}"
            else:
                yield f"{rule}v{number}: {body}"

    def _values(self, name: str, schema: Schema) -> Iterator[tuple[bool, str]]:
        """The forms of its value with its closing tag, and whether each is a text as it stands."""
        kinds = self._schemas.kinds(self._name, name)
        end = _quoted(f"\n{PARAMETER_END}\n")
        if (listed := self._listed(name, self._resolved(schema))) is not None:
            yield False, f"({' | '.join(map(_quoted, listed))}) {end}"
            return
        others = kinds != TEXT and (kinds != ANYTHING or not set(schema) <= _ANNOTATIONS)
        rest, texts = schema if others else None, _NEVER
        if "string" in kinds:
            rest = self._without_texts(schema, 0) if others else None
            texts = self._texts(schema, 0) if _is_bound(schema) else None
        if texts == _NEVER:
            pass
        elif kinds in (TEXT, ANYTHING):
            texts = f"{texts or _ANY_TEXT} & {_NO_TAGS}"
        else:
            null = kinds == _OPTIONAL and rest is not None  # as one of the texts
            kept = f"{texts or _ANY_TEXT} & {_no_literals(kinds, whole=null)} & {_NO_TAGS}"
            texts, rest = (f'({kept}) | "null"', None) if null else (kept, rest)
        if texts != _NEVER:
            yield True, f"({texts}) {end}"
        if rest is not None:
            yield False, f"{_json(self._rooted(rest))} {end}"

    def _listed(self, name: str, schema: Schema) -> list[str] | None:
        """The texts of an enum's values that are read back as these values; None without one."""
        if "const" in schema:
            values = [schema["const"]]
        elif isinstance(schema.get("enum"), list):
            values = schema["enum"]
        else:
            return None
        if not set(schema) <= _ANNOTATIONS | {"const", "enum", "type"}:
            raise ValueError("enum and const stand beside other rules; leave those out")
        plain = lambda value: in_json(value).replace("<", "\\u003c")  # no tag stands in it
        written = [(v, v if isinstance(v, str) else plain(v)) for v in values]
        read = lambda text: self._schemas.value(self._name, name, text)
        known = [text for value, text in written if equal(read(text), value)]
        found = [text for text in known if not any(tag in text for tag in _TAGS)]
        if not found:
            raise ValueError("none of its values can be written in a call")
        return list(dict.fromkeys(found))

    def _texts(self, schema: Any, depth: int) -> str | None:
        """A set of texts that fit, as Lark's terminals have it; None where any does."""
        schema = self._inner(schema, depth)
        named = schema.get("type", "string")
        if "string" not in ([named] if isinstance(named, str) else named):
            return _NEVER
        used = set(schema) - _ANNOTATIONS - set(_DEFINITIONS)
        unions = [schema[union] for union in _UNIONS if union in schema]
        ruled = used & (_TEXT_RULES - {"type"}) or _format_of(schema)
        sets = [_of_rules(schema)] if ruled else []
        for options in unions:
            found = [self._texts(option, depth + 1) for option in options]
            found = [one for one in found if one != _NEVER]
            if not found:
                return _NEVER
            if "oneOf" in schema and len(found) > 1:
                raise ValueError("oneOf has several texts, of which one could fit two; use anyOf")
            sets += [] if None in found else ["(" + " | ".join(found) + ")"]
        for part in schema.get("allOf", ()):
            sets.append(self._texts(part, depth + 1))
        sets = [one for one in sets if one is not None]
        if _NEVER in sets:
            return _NEVER
        # Rules of other types say nothing about a text; these would.
        if used & {"not", "if", "then", "else"}:
            raise ValueError("calls cannot be held to `not` and `if`")
        return f"({' & '.join(sets)})" if sets else None

    def _without_texts(self, schema: Any, depth: int) -> Schema | None:
        """The schema of the values that are no texts; None where there are none."""
        schema = self._inner(schema, depth)
        for union in _UNIONS:
            if union in schema:
                rest = [self._without_texts(one, depth + 1) for one in schema[union]]
                rest = [one for one in rest if one is not None]
                return {**schema, union: rest} if rest else None
        named = schema.get("type", sorted(set(_TYPES) - {"string"}))
        named = [named] if isinstance(named, str) else named
        others = [name for name in named if name != "string"]
        others += ["null"] if schema.get("nullable") is True and "null" not in others else []
        return {**schema, "type": others} if others else None

    def _inner(self, schema: Any, depth: int) -> Schema:
        """What one of the schemas of a union stands for."""
        schema = self._resolved(schema) if isinstance(schema, Mapping) else {}
        self._left.take(_LEAST_READ + characters(schema, _UNIONS))
        if depth > _DEEPEST:
            raise ValueError("its schemas stand in one another too deep")
        return schema

    def _resolved(self, schema: Schema) -> Schema:
        """What a schema that is a reference alone stands for."""
        for _ in range(_DEEPEST):
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            target = self._schemas.target(self._name, reference)
            if not isinstance(target, Mapping) or not set(schema) <= _ANNOTATIONS | {"$ref"}:
                raise ValueError(f"$ref {reference!r:.60} stands for no schema of the tool, alone")
            schema = target
        raise ValueError("its references go round in circles")

    def _rooted(self, schema: Schema) -> dict[str, Any]:
        """The schema with the definitions that its references name."""
        rooted = dict(schema)
        if "$ref" in json.dumps(schema):
            whole = dict(self._parameters)
            known = {name: whole.pop(name, None) for name in _DEFINITIONS}
            known = {name: value for name, value in known.items() if value is not None}
            rooted = _moved({**rooted, **known})
            if _WHOLE in json.dumps(rooted):
                others = rooted.get("$defs")
                others = others if isinstance(others, Mapping) else {}
                rooted["$defs"] = {**others, _WHOLE: _moved(whole)}
        return _bounded(without_idle_rules(rooted)) | {"x-guidance": SPACED}


def _moved(schema: Any) -> Any:
    """A schema whose references to the tool's own find it where it then stands."""
    if isinstance(schema, list):
        return [_moved(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {name: _moved(value) for name, value in schema.items()}
    reference = moved.get("$ref")
    known = tuple(f"#/{name}/" for name in _DEFINITIONS)
    if isinstance(reference, str) and reference[:1] == "#" and not reference.startswith(known):
        moved["$ref"] = f"#/$defs/{_WHOLE}{reference[1:]}"
    return moved


_WHOLE = "x-whole"  # among the definitions: the parameters themselves, which may hold themselves
_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
_OPTIONAL = frozenset(("string", "null"))
_NEVER, _ANY_TEXT = "never", "/(?s:.*)/"


def _of_rules(schema: Schema) -> str:
    """The texts that a schema's own rules allow."""
    values = schema.get("enum", [])
    values = [schema["const"]] if "const" in schema else values
    texts = [value for value in values if isinstance(value, str)]
    sets = ["(" + " | ".join(map(_quoted, texts)) + ")"] if texts else []
    if values and not texts:
        return _NEVER
    if (pattern := schema.get("pattern")) is not None:
        sets.append(searched(str(pattern)))
    if form := _format_of(schema):
        sets.append(expression(form))
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        if not all(type(bound) is int and bound >= 0 for bound in (least, most or 0)):
            raise ValueError("minLength and maxLength must be integers from 0 on")
        sets.append(f"/(?s:.{{{least},{most}}})/")
    return "(" + " & ".join(sets or [_ANY_TEXT]) + ")"


def _is_bound(schema: Schema) -> bool:
    """Whether a schema says anything about a text."""
    return not set(schema) <= _ANNOTATIONS or _format_of(schema) is not None


def _format_of(schema: Schema) -> str | None:
    """The expression of the format that a schema names; None where texts are held to none."""
    named = schema.get("format")
    return _FORMATS.get(named) if isinstance(named, str) else None


def _no_literals(kinds: Set[str], *, whole: bool) -> str:
    """The texts that are read as such beside other types; `whole` where another value is written
    as a text."""
    begins = "|".join(sorted({_BEGINNINGS[kind] for kind in kinds - {"string"}}))
    quoted = f"~{expression(f'{_BLANKS}{_QUOTED}{_BLANKS}')}"
    if whole:
        return f"{quoted} & ~{expression(f'{_BLANKS}({begins}){_BLANKS}')}"
    return f"{quoted} & ~({expression(f'{_BLANKS}({begins})')} {_ANY_BYTES})"


def _bounded(schema: dict[str, Any]) -> dict[str, Any]:
    """An integer's schema with both bounds: one of thousands of digits cannot be read back."""
    if schema.get("type") != "integer" or {"enum", "const"} & set(schema):
        return schema
    if not {"minimum", "exclusiveMinimum"} & set(schema):
        schema = schema | {"minimum": -_EXACT}
    if not {"maximum", "exclusiveMaximum"} & set(schema):
        schema = schema | {"maximum": _EXACT}
    return schema


def _json(schema: Schema) -> str:
    return "%json " + json.dumps(schema)


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{what}: {name!r:.40} cannot stand in a call; use letters and digits")


def _quoted(text: str) -> str:
    """A text as Lark writes it."""
    return json.dumps(text)


# Whatever bytes, also such as no text has: what begins with a tag, say, is then none of a set at
# once. Were it only text, a set of bounded texts would be searched to its end for one.
_ANY_BYTES = "(~/a/ | /a/)"
_NO_TAGS = "~(" + expression(f"(?s:.*)({'|'.join(map(re.escape, _TAGS))})") + f" {_ANY_BYTES})"
