"""The thread of the event loop does nothing that takes long: others do."""

import functools
import json
import os
import sys
import threading
from typing import Any

import pytest

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.serving import app, chat_request, fields, grammars, http, wishes
from tests.serving.live import CHAT, Live, live
from tests.serving.test_calls import EVERY
from tests.serving.test_formats import BOUNDED, json_schema

TEXT, RESPONSES = "/v1/completions", "/v1/responses"
# What takes time in proportion to a body, a prompt or a schema.
SLOW = [
    (Tokenizer, "encode"),
    (Tokenizer, "decode"),
    (chat_request, "encode_prompt"),
    (app, "read_completion"),
    (wishes, "format_of"),
    (grammars, "_compiled"),
    (fields, "parse_json"),
    (fields, "sound_value"),
]
OPENED: list[tuple[int, str]] = []
WATCHED: set[int] = set()  # threads; a hook stays for good and is quiet while there are none


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    # A descriptor that is open already, such as a pipe to a process, is a number and names no file.
    if WATCHED and event == "open" and not isinstance(arguments[0], int):
        OPENED.append((threading.get_ident(), os.fsdecode(str(arguments[0]))))


def ask(one: Live) -> None:
    """A request of every kind, whole and streamed."""
    off = {"enable_thinking": False}
    for stream in (False, True):
        one.script = "two</think>four<|im_end|>"
        post = functools.partial(one.post, stream=stream)
        assert post(logprobs=True, top_logprobs=1).status_code == 200
        assert post(tools=[EVERY], tool_choice="required", seed=1).status_code == 200
        form = json_schema(BOUNDED)
        assert post(response_format=form, chat_template_kwargs=off).status_code == 200
        assert post(TEXT, prompt="two" * 200, echo=True, logprobs=1).status_code == 200
        assert post(RESPONSES, input="hello").status_code == 200
    assert one.post("/tokenize", prompt="hello").status_code == 200
    assert one.post("/detokenize", tokens=[20, 21]).status_code == 200
    assert one.post(CHAT, messages="hello").status_code == 400
    for path in ("/", "/metrics", "/health", "/v1/models", "/nothing"):
        one.client.get(path)


def test_the_loops_thread_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    callers: dict[str, set[int]] = {}
    for owner, name in SLOW:
        whole = getattr(owner, name)

        def noted(*given: Any, whole: Any = whole, name: str = name, **options: Any) -> Any:
            callers.setdefault(name, set()).add(threading.get_ident())
            return whole(*given, **options)

        monkeypatch.setattr(owner, name, noted)
    large: set[int] = set()
    whole_dump = json.dumps

    def dumped(value: Any, **options: Any) -> str:
        text = whole_dump(value, **options)
        if len(text) > 100_000:
            large.add(threading.get_ident())
        return text

    monkeypatch.setattr(http.json, "dumps", dumped)
    monkeypatch.setattr(app, "_LARGE", 3000)
    sys.addaudithook(watch)
    with live(max_body=1_000_000) as one:
        (loop,) = {t.ident for t in threading.enumerate() if t.name.startswith("serve")}
        ask(one)  # what is imported at first use is opened at first use
        OPENED.clear()
        WATCHED.add(loop)
        ask(one)
        answer = one.post(TEXT, prompt=[20] * 3500, echo=True, logprobs=1, max_tokens=2)
        assert len(answer.content) > 100_000
        WATCHED.clear()
    engine = {t.ident for t in threading.enumerate() if t.name == "engine"}
    for name, threads in callers.items():
        assert loop not in threads and not threads & engine, name
    assert {name for _, name in SLOW} <= set(callers)
    assert not [path for thread, path in OPENED if thread == loop]
    assert large and loop not in large
