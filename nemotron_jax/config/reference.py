"""Every field of a configuration, read from the dataclasses themselves.

Their annotations, defaults, comments, docstrings and the checks of their `__post_init__` say it
all, so there is no second list to keep.
"""

import ast
import dataclasses
import inspect
import io
import json
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

# The rules of `nemotron_jax.config.checks` that name their fields, in words.
_SHORT = {
    "at_least_one": "an integer of at least 1",
    "counts": "an integer, not negative",
    "positive": "positive and finite",
    "not_negative": "finite, not negative",
}
# What a field counts, by the end of its name; the first that fits.
_UNITS = (
    ("timeout_s", "seconds"),
    ("_per_token", "a token"),
    ("expert_rows", "balanced loads"),
    ("conv_width", "tokens"),
    ("_tokens", "tokens"),
    ("sequence_length", "tokens"),
    ("max_length", "tokens"),
    ("budget", "tokens"),
    ("chunk", "tokens"),
    ("_every", "optimizer steps"),
    ("steps", "optimizer steps"),
    ("batch_size", "rows"),
    ("_rows", "rows"),
    ("_tasks", "tasks"),
    ("width", "channels"),
    ("_dim", "channels"),
)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field: its dotted name below a run, and what may stand there."""

    path: str
    type: str
    default: str  # as Python writes it; empty where a value must be given
    unit: str
    rules: tuple[str, ...]
    meaning: str  # the comment beside it


@dataclasses.dataclass(frozen=True)
class Part:
    """One dataclass of a configuration, at the path where it stands."""

    path: str
    name: str
    about: str  # its docstring
    fields: tuple[Field, ...]


def parts(
    cls: type, path: str = "config", outer: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> list[Part]:
    """A dataclass and those inside it, outer ones first, as `--config.` flags name them.

    `outer` are rules that a dataclass around it has for its fields.
    """
    kinds = typing.get_type_hints(cls)
    own, inside = [], []
    comments, rules = _comments(cls), _rules(cls)
    for field in dataclasses.fields(cls):
        name = f"{path}.{field.name}"
        if part := _dataclass_of(kinds[field.name]):
            start = f"{field.name}."
            below = {n.removeprefix(start): r for n, r in rules.items() if n.startswith(start)}
            inside += parts(part, name, below)
        else:
            default = "" if field.default is dataclasses.MISSING else repr(field.default)
            shown = _type_name(kinds[field.name])
            said = tuple(dict.fromkeys([*rules.get(field.name, ()), *outer.get(field.name, ())]))
            meaning = comments.get(field.name, "")
            own.append(Field(name, shown, default, _unit(field.name, shown), said, meaning))
    about = " ".join((inspect.getdoc(cls) or "").split())
    return [Part(path, cls.__name__, about, tuple(own)), *inside]


def as_markdown(found: Sequence[Part]) -> str:
    """A table for each part; one that was shown before is named alone."""
    first: dict[str, Part] = {}
    for part in found:
        first.setdefault(part.name, part)
    return "\n".join(line for part in found for line in _lines(part, first[part.name]))


def as_json(found: Sequence[Part]) -> str:
    """The reference as JSON: a list of objects, one for each part."""
    return json.dumps([dataclasses.asdict(part) for part in found], indent=2)


def _lines(part: Part, first: Part) -> Iterator[str]:
    yield f"## {part.path}\n"
    if part is not first and len(part.fields) == len(first.fields):
        yield f"`{part.name}`, as [{first.path}](#{first.path.replace('.', '')}).\n"
        return
    yield f"`{part.name}`: {part.about}\n"
    if part.fields:
        yield "| field | type | default | unit | rule | meaning |\n|---|---|---|---|---|---|"
    for field in part.fields:
        default = f"`{field.default}`" if field.default else "required"
        cells = (f"`{field.path.removeprefix(f'{part.path}.')}`", field.type, default, field.unit)
        texts = (*cells, "; ".join(field.rules), field.meaning)
        yield f"| {' | '.join(text.replace('|', '/') for text in texts)} |"
    yield ""


def _dataclass_of(kind: Any) -> type | None:
    """The dataclass that an annotation names, perhaps beside None."""
    options = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    return next((one for one in options if dataclasses.is_dataclass(one)), None)


_UNIONS = (typing.Union, types.UnionType)


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _unit(name: str, kind: str) -> str:
    if "int" not in kind and "float" not in kind:
        return ""
    return next((unit for end, unit in _UNITS if name.endswith(end)), "")


def _comments(cls: type) -> dict[str, str]:
    """The comments beside the fields, those of inherited ones too."""
    found = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        source = textwrap.dedent(inspect.getsource(owner))
        reader = tokenize.generate_tokens(io.StringIO(source).readline)
        by_line = {t.start[0]: t.string for t in reader if t.type == tokenize.COMMENT}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign) and node.end_lineno in by_line:
                found[node.target.id] = by_line[node.end_lineno].lstrip("# ")
    return found


def _rules(cls: type) -> dict[str, list[str]]:
    """What the checks of a class and of those it inherits from ask of each field."""
    found: dict[str, list[str]] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner) and "__post_init__" in vars(owner):
            source = textwrap.dedent(inspect.getsource(owner.__post_init__))
            reader = _Checks(vars(sys.modules[owner.__module__]))
            reader.visit(ast.parse(source))
            for field, rule in reader.found:
                found.setdefault(field, []).append(rule)
    return found


class _Checks(ast.NodeVisitor):
    """Collects (field, rule) of the calls of `checks`, in order."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.found: list[tuple[str, str]] = []
        self._globals = names
        self._texts: dict[str, ast.expr] = {}  # local names, by what was assigned last
        self._loops: dict[str, tuple[str, ...]] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self._texts[target.id] = node.value

    def visit_For(self, node: ast.For) -> None:
        try:
            values = ast.literal_eval(node.iter)
        except ValueError:
            values = ()
        if isinstance(node.target, ast.Name):
            self._loops[node.target.id] = tuple(values)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        arguments = node.args
        if name in _SHORT:
            self._add(arguments[1:], _SHORT[name])
        elif name == "at_most":
            self._add(arguments[2:], f"at most {self._text(arguments[1])}")
        elif name == "one_of":
            allowed = eval(ast.unparse(arguments[2]), dict(self._globals))
            self._add(arguments[1:2], f"one of {', '.join(map(str, allowed))}")
        elif name == "check":
            self._add(arguments[1:2], self._text(arguments[3]))
        elif name == "check_value":
            self._add(arguments[1:2], self._text(arguments[4]))
        elif name == "local_path":
            self._add(arguments[1:2], "a local path, no URL")

    def _add(self, fields: Sequence[ast.expr], rule: str) -> None:
        for field in fields:
            if isinstance(field, ast.Name):
                names = self._loops.get(field.id, ())
            else:
                names = (field.value,) if isinstance(field, ast.Constant) else ()
            self.found += [(name, rule) for name in names]

    def _text(self, node: ast.expr) -> str:
        """A rule's words. Values that only a config has are left out after `name=`."""
        if isinstance(node, ast.Name) and node.id in self._texts:
            return self._text(self._texts[node.id])
        if isinstance(node, ast.JoinedStr):
            words = ""
            for piece in node.values:
                text = self._text(piece.value if isinstance(piece, ast.FormattedValue) else piece)
                hidden = isinstance(piece, ast.FormattedValue) and words.endswith("=")
                words = words[:-1] if hidden else words + text
            return words
        try:
            return str(eval(ast.unparse(node), dict(self._globals)))
        except (NameError, AttributeError):  # a value of the config that is checked
            is_field = isinstance(node, ast.Attribute)
            return ast.unparse(node).removeprefix("self.") if is_field else "…"
