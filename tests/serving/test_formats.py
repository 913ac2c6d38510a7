"""Answers held to a format are valid whatever the model would say, or cut off and said to be."""

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from nemotron_jax.environments.schema import faults
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.grammars import format_of
from nemotron_jax.serving.patterns import without_idle_rules
from tests.serving.live import CHAT, TOKENIZER, Live, live

pytest.importorskip("llguidance")
TEXT = "/v1/completions"
BOUNDED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["a", "b<|im_end|>", 3]},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": -5, "maximum": 120},
            "maxItems": 3,
        },
        "on": {"type": "boolean"},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(waiting=64) as one:
        yield one


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}


@pytest.mark.parametrize("thinking", [False, True])
def test_a_bounded_schema_always_comes_out_valid(served: Live, thinking: bool) -> None:
    kwargs = {"enable_thinking": thinking, "reasoning_budget": 5 if thinking else None}
    found = served.post(
        response_format=json_schema(BOUNDED), n=20, seed=7, chat_template_kwargs=kwargs
    ).json()
    texts = {choice["message"]["content"] for choice in found["choices"]}
    assert len(texts) > 10  # each sample draws for itself
    assert all(choice["finish_reason"] == "stop" for choice in found["choices"])
    assert bool(found["choices"][0]["message"]["reasoning"]) == thinking
    for text in texts:
        assert not faults(json.loads(text), BOUNDED)


def test_an_unbounded_text_ends_by_length_or_valid(served: Live) -> None:
    form = {"type": "json_object"}
    found = served.post(TEXT, prompt="two", response_format=form, n=20, max_tokens=40).json()
    for choice in found["choices"]:
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
        else:
            assert choice["finish_reason"] == "length"


def test_a_regular_expression_is_matched_whole(served: Live) -> None:
    form = {"type": "regex", "regex": "(ab|c){2,4}[0-9]é?"}
    for choice in served.post(TEXT, prompt="two", response_format=form, n=10).json()["choices"]:
        assert re.fullmatch(form["regex"], choice["text"]) and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_formats_in_the_words_of_vllm(served: Live, path: str) -> None:
    text = json.dumps(BOUNDED)
    common = {"seed": 5, "chat_template_kwargs": {"enable_thinking": False}}
    common |= {"prompt": "two"} if path == TEXT else {}
    said = lambda **body: served.post(path, **common, **body).json()["choices"][0]
    content = lambda choice: choice["text"] if path == TEXT else choice["message"]["content"]
    expected = content(said(response_format=json_schema(BOUNDED)))
    for word in ({"guided_json": text}, {"structured_outputs": {"json": BOUNDED, "regex": None}}):
        assert content(said(**word)) == expected
    regex, choice = "[ab]{3}", ["x|y", "a b\n", "(é)"]
    for word in ({"guided_regex": regex}, {"structured_outputs": {"regex": regex}}):
        assert re.fullmatch(regex, content(said(**word)))
    for word in ({"guided_choice": choice}, {"structured_outputs": {"choice": choice}}):
        assert content(said(**word)) in choice
    for body, field in (
        ({"guided_grammar": "a"}, "guided_grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": []}}, "structured_outputs.json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [3]}, "guided_choice"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_regex": "a", "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"structured_outputs": 3}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
        ({"structured_outputs": {"json": {"uniqueItems": True}}}, "structured_outputs.json"),
        ({"guided_choice": [""]}, "guided_choice"),
    ):
        answer = served.post(path, **common, **body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == field
        assert answer.json()["error"]["message"].startswith(field)


def test_no_special_token_comes_where_its_name_may() -> None:
    fields = Fields({"response_format": {"type": "regex", "regex": "(?s:.){0,40}"}})
    stops = (TOKENIZER.token_id("<|im_end|>"), TOKENIZER.eos)
    vocabulary = TOKENIZER.vocab_size + 50  # a model may have more ids than its tokenizer
    grammar = format_of(fields, TOKENIZER, vocabulary, stops, thinking=False).grammar()
    mask = grammar.mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocabulary // 32),)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    assert set(allowed[allowed < 16]) == set(stops) and allowed.max() < TOKENIZER.vocab_size
    for token in TOKENIZER.encode("<think>"):
        assert grammar.accept(token)


@pytest.mark.parametrize(
    "form",
    [
        json_schema(None),
        json_schema({"type": "nothing"}),
        json_schema({"type": "string", "pattern": "(((("}),
        json_schema({"$ref": "#/nowhere"}),
        json_schema({"$ref": "file:///etc/passwd"}),
        json_schema({"enum": ["a" * 100] * 1990}),
        {"type": "json_schema"},
        {"type": "regex"},
        {"type": "regex", "regex": "("},
        {"type": "regex", "regex": "(" * 5000 + "a" + ")*" * 5000},
        {"type": "xml"},
        {"type": ["json_object"]},
    ],
    ids=lambda form: str(form)[:50],
)
def test_what_is_no_grammar_is_refused(served: Live, form: dict[str, Any]) -> None:
    answer = served.post(TEXT, prompt="two", response_format=form, max_tokens=1)
    if answer.status_code != 413:
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].startswith("response_format")


def test_rules_that_say_nothing_are_left_out() -> None:
    data = {"const": {"format": "path"}, "default": {"format": "path"}}
    names = {"format": {"type": "string", "format": "path"}, "enum": {"format": ["date"]}}
    names |= {"propertyNames": {"uniqueItems": False}}
    record = {"propertyNames": {"type": "string"}, "anyOf": [{"propertyNames": {"enum": ["a"]}}]}
    schema = {"$defs": names, "anyOf": [{"properties": names}, {"format": "date"}, data, record]}
    known = {"format": {"type": "string"}, "enum": {}, "propertyNames": {}}
    kept = [{"properties": known}, {"format": "date"}, data, {"anyOf": record["anyOf"]}]
    assert without_idle_rules(schema) == {"$defs": known, "anyOf": kept}


def test_a_schema_with_such_rules_is_kept(served: Live) -> None:
    values = {"enum": ["a/b"], "type": "string", "format": "path"}
    record = {"type": "object", "propertyNames": {"type": "string"}}
    record |= {"required": ["c"], "properties": {"c": values}, "additionalProperties": False}
    form = json_schema(record)
    answer = served.post(TEXT, prompt="two", response_format=form).json()
    assert answer["choices"][0]["text"] == '{"c":"a/b"}'
