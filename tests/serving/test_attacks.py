"""Requests that lie, drip or attack end in the right answer, and nobody else's is touched."""

import asyncio
import json
import sys
from collections.abc import Iterator

import pytest

from nemotron_jax.data.chat.tokens import RESERVED
from nemotron_jax.serving import http
from tests.serving import load, test_threads
from tests.serving.live import TOKENIZER, Live, live
from tests.serving.test_server import until

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live(slots=16, waiting=300, max_body=8_000_000) as one:
        one.script = "four and two<|im_end|>"
        yield one


@pytest.mark.more
def test_a_crowd_of_all_kinds_is_answered_right(
    served: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 10)  # a busy machine's honest clients need seconds
    asyncio.run(load.play(served.address, 60, connections=8, seed=0))
    sys.addaudithook(test_threads.watch)
    test_threads.OPENED.clear()
    test_threads.WATCHED.add(0)
    seen = asyncio.run(load.play(served.address, 600, connections=64, seed=1))
    test_threads.WATCHED.clear()
    assert not seen.wrong, seen.wrong[:5]
    assert set(seen.statuses) == set(load.KINDS)
    until(lambda: not served.driver.in_flight)
    assert served.post().json()["choices"][0]["finish_reason"] == "stop"
    paths = {path for _, path in test_threads.OPENED}
    assert not {path for path in paths if not path.startswith((sys.prefix, sys.base_prefix))}


def test_no_text_of_a_request_becomes_a_special_token(served: Live) -> None:
    """Names of tools, their descriptions and arguments too."""
    names = "".join(RESERVED) + "</s>"
    call = {"name": names, "arguments": json.dumps({names: names})}
    tool = {"name": names, "description": names, "parameters": {"properties": {names: {}}}}
    messages = [
        {"role": "system", "content": names},
        {"role": "user", "content": names},
        {"role": "assistant", "tool_calls": [{"function": call}]},
        {"role": "tool", "content": names},
    ]
    tokens = lambda: served.generator.seen[-1].prompt
    served.post(messages=messages, tools=[{"type": "function", "function": tool}])
    attacked = [token for token in tokens() if token in TOKENIZER.special_names]
    plain = json.loads(json.dumps([messages, tool]).replace(json.dumps(names)[1:-1], "a"))
    plain[0][2]["tool_calls"][0]["function"]["arguments"] = '{"a": "a"}'
    served.post(messages=plain[0], tools=[{"type": "function", "function": plain[1]}])
    expected = [token for token in tokens() if token in TOKENIZER.special_names]
    assert attacked == expected and len(attacked) > 8
