"""vLLM's own words for formats, as the `response_format` that each amounts to."""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

from nemotron_jax.config.untrusted import parse_json
from nemotron_jax.serving.fields import Fields, check_parts
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served

Request = TypeVar("Request")

_INNER, _FORMAT = "structured_outputs", "response_format"
_KINDS = ("json", "regex", "choice", "json_object", "grammar", "structural_tag")
_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}  # once theirs
NAMES = (_INNER, *_GUIDED)  # of the fields that ask for one


def formatted(read: Callable[[Fields, Served], Request]) -> Callable[[Fields, Served], Request]:
    """A reader that knows `response_format`, for bodies with vLLM's words too. Refusals name the
    word that came."""

    @functools.wraps(read)
    def reading(fields: Fields, served: Served) -> Request:
        fields, came = _with_format(fields)
        try:
            return read(fields, served)
        except Refusal as refusal:
            if came is None or not (refusal.param or "").startswith(_FORMAT):
                raise
            text = re.sub(rf"^{_FORMAT}[.\w]*", came, str(refusal))
            raise Refusal(text, came, status=refusal.status, code=refusal.code) from None

    return reading


def _with_format(fields: Fields) -> tuple[Fields, str | None]:
    """The fields with `response_format` in place of vLLM's, and the name of that; Refusal for two
    formats at once."""
    inner = fields.part(_INNER)
    asked = [(inner, kind, kind) for kind in _KINDS]
    asked += [(fields, name, kind) for name, kind in _GUIDED.items()]
    asked = [one for one in asked if one[0].get(one[1]) not in (None, False)]
    if not asked:
        return fields, None
    owner, name, kind = asked[0]
    if len(asked) > 1 or fields.part(_FORMAT).get("type") not in (None, "text"):
        raise owner.refuse(name, "stands beside another format; give one")
    form = _format(owner, name, kind)
    came = name if owner is fields else f"{_INNER}.{name}"
    return Fields({**fields.values(), _FORMAT: form}), came


def _format(owner: Fields, name: str, kind: str) -> dict[str, Any]:
    """The format that a field of a kind asks for."""
    if kind == "json":
        return {"type": "json_schema", "json_schema": {"schema": _schema(owner, name)}}
    if kind == "regex":
        return {"type": "regex", "regex": owner.text(name)}
    if kind == "choice":
        texts = owner.get(name)
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise owner.refuse(name, "must be a list of texts")
        return {"type": "regex", "regex": "|".join(map(re.escape, texts))}
    if kind == "json_object" and owner.flag(name):
        return {"type": "json_object"}
    raise owner.refuse(name, "is not supported; give a JSON schema, a regex or a choice")


def _schema(owner: Fields, name: str) -> dict[str, Any]:
    """A schema, which may come as its JSON."""
    schema = owner.get(name)
    if isinstance(schema, str):
        try:
            check_parts(schema.encode("utf-8", "replace"))
            schema = parse_json(schema.encode())
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict):
        raise owner.refuse(name, "must be a JSON schema")
    return schema
