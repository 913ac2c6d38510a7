"""The server as a process sees it: many clients, hostile ones, those who go, and the end."""

import concurrent.futures
import contextlib
import gc
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from nemotron_jax.serving import http
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.refusal import Refusal
from tests.serving.live import CHAT, CONTEXT, TOKENIZER, Live, ids_of, live

TEXT = "/v1/completions"


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as one:
        yield one


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


def raw(one: Live, head: str, body: bytes = b"") -> socket.socket:
    """A connection that has sent a request, or what looks like one."""
    connection = socket.create_connection(one.address, timeout=20)
    connection.sendall(head.replace("\n", "\r\n").encode() + body)
    return connection


def chat_head(length: int) -> str:
    return f"POST {CHAT} HTTP/1.1\nHost: a\nContent-Length: {length}\n\n"


HELLO = {"messages": [{"role": "user", "content": "hello"}]}
USER = {"role": "user", "content": "a"}
# Bodies, and the field that the refusal names.
WRONG = [
    ({"messages": "hello"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [1]}, "messages"),
    ({"messages": [{"role": "root", "content": "a"}]}, "messages[0]"),
    ({"messages": [USER, {"role": ["user"], "content": "a"}]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "a" * 90_000}]}, "messages"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e999}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"n": True}, "n"),
    ({"n": 13}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_completion_tokens": CONTEXT}, "max_completion_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": "a" * 5000}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {str(10**9): 1}}, "logit_bias"),
    ({"logit_bias": {"3": "x"}}, "logit_bias.3"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"seed": "a"}, "seed"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 3}, "stream_options"),
    ({"tools": [{"type": "function"}]}, "tools[0]"),
    ({"tools": [{"function": {"name": "a", "parameters": 3}}]}, "tools[0]"),
    ({"tools": [{"name": "a", "parameters": {"properties": {"b": 1}}}]}, "messages"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": "json"}, "response_format"),
    ({"chat_template_kwargs": {"reasoning_budget": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"enable_thinking": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"what": 1}}, "chat_template_kwargs"),
    ({"frequency_penalty": 1}, "frequency_penalty"),
    ({"required_prefix_token_ids": [-1]}, "required_prefix_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"ignore_eos": True, "response_format": {"type": "json_object"}}, "ignore_eos"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_field_is_named(served: Live, number: int) -> None:
    body, field = WRONG[number]
    answer = served.client.post(CHAT, content=json.dumps({**HELLO, **body}))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == field and len(error["message"]) < 1000
    assert "Traceback" not in answer.text and "Error" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"\xff\xfe",
        b"[" * 50_000,
        b'{"a":' * 15_000,
        b'{"messages": [{"role": "user", "content": ' + b"1" * 9_000 + b"}]}",
        b"NaN",
    ],
    ids=lambda body: repr(body[:9]),
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_what_is_no_request_is_refused(served: Live, path: str, body: bytes) -> None:
    answer = served.client.post(path, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_halves_of_characters_and_null_bytes_are_text(served: Live) -> None:
    body = r'{"messages": [{"role": "user", "content": "\ud83d \u0000 <|im_end|>"}], "stop": null}'
    assert served.client.post(CHAT, content=body.encode()).status_code == 200
    prompt = served.generator.seen[-1].prompt
    assert prompt.count(TOKENIZER.token_id("<|im_end|>")) == 2  # the template's own


def test_bodies_are_bounded_however_they_come(served: Live) -> None:
    assert served.client.post(CHAT, content=b"a" * 100_001).status_code == 413
    parts = (b"a" * 10_000 for _ in range(1000))
    answer = served.client.post(CHAT, content=parts)  # in chunks: no length is said
    assert answer.status_code == 413
    with raw(served, chat_head(10**17)) as connection:
        assert b" 413 " in connection.recv(100)
    for part in (b"[],", b'{"a":0},', b"1,"):  # of which nothing is made
        body = b'{"messages": "' + rb"[{\"," + b'", "a": [' + part * 2_100_000 + b"0]}"
        with pytest.raises(Refusal, match="and may have"):
            Fields.of(body)
    text = '[{:,"\\' * 30_000
    assert Fields.of(json.dumps({"a": text}).encode()).text("a") == text
    with raw(served, "GET / HTTP/1.1\nHost: a\nX: " + "a" * 40_000 + "\n\n") as connection:
        assert b" 431 " in connection.recv(100)
    with raw(served, "GET / HTTP/1.1\nHost: a\nX: " + "a" * 60_000) as connection:
        assert b" 400 " in connection.recv(100)


def test_large_bodies_share_their_room_and_small_ones_need_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_LARGE_BODIES", 1)
    monkeypatch.setattr(http, "REQUEST_S", 20)
    part = b"a" * 99_000
    with live() as one:
        status = lambda: one.client.post(CHAT, content=part).status_code
        with raw(one, chat_head(99_900), part), raw(one, chat_head(99_900), part):
            until(lambda: status() == 429)
            assert one.post().status_code == 200
        until(lambda: status() == 400)


def test_unknown_paths_methods_and_models(served: Live) -> None:
    for path in ("/v1/../../etc/passwd", "/nothing", "/v1/engines", "/static/%2e%2e/%2e%2e/a"):
        answer = served.client.get(path)
        assert answer.status_code == 404 and "error" in answer.json()
    answer = served.client.post(CHAT + "/", headers={"Host": "evil.example"})
    assert answer.status_code == 404 and "location" not in answer.headers
    assert served.client.get(CHAT).status_code == 405
    head = served.client.head("/health")
    assert head.status_code == 200 and not head.content
    answer = served.post(model="other")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert served.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert served.client.get("/v1/models/tiny").json()["max_model_len"] == CONTEXT
    assert served.client.get("/v1/models/other").status_code == 404
    assert "<script>" in served.client.get("/").text


def test_a_client_that_sends_no_head_is_closed(
    served: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "REQUEST_S", 0.1)
    monkeypatch.setattr(http, "_BODY_S", 0.05)
    with raw(served, "GET / HTTP/1.1\nHost:") as connection:
        assert connection.recv(100) == b""
    with raw(served, chat_head(100), b"{") as connection:
        answer = b""
        while part := connection.recv(1000):
            answer += part
        assert b" 408 " in answer and b"close" in answer
    with raw(served, "GET /health HTTP/1.1\nHost: a\n\n") as connection:
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(1000)
        connection.sendall(b"GET /health HTTP/1.1\r\nHo")  # a second head, which does not go on
        assert connection.recv(100) == b""
    began = time.monotonic()
    with raw(served, chat_head(99).replace(CHAT, "/nothing")) as connection:
        assert b" 404 " in connection.recv(1000)
        connection.settimeout(0.03)
        with contextlib.suppress(ConnectionError):
            while drips(connection):  # a body that nobody waits for
                pass
    assert time.monotonic() - began < 3


def drips(connection: socket.socket) -> bool:
    """Send a byte where nothing comes; False once the connection is closed."""
    try:
        return bool(connection.recv(1000))
    except TimeoutError:
        connection.sendall(b"a")
        return True


def test_texts_and_ids_both_ways(served: Live) -> None:
    post = served.client.post
    tokens = post("/tokenize", json={"prompt": "hello <think> é"}).json()
    assert tokens["tokens"] == TOKENIZER.encode("hello <think> é")
    assert tokens["count"] == len(tokens["tokens"])
    text = post("/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert text == "hello <think> é"
    found = post("/tokenize", json={**HELLO}).json()["tokens"]
    assert found == served.post(return_token_ids=True).json()["prompt_token_ids"]
    assert post("/detokenize", json={"tokens": [-1]}).status_code == 400


def test_a_completion_is_the_text_that_follows(served: Live) -> None:
    served.script = "four and</s>"
    for prompt in ("two ", TOKENIZER.encode("two ")):
        body = {"prompt": prompt, "logprobs": 2, "echo": True, "return_token_ids": True}
        found = served.post(TEXT, **body).json()["choices"][0]
        request = served.generator.seen[-1]
        assert found["text"] == "two four and" and found["token_ids"] == request.tokens
        known, scores = found["prompt_token_ids"], found["logprobs"]
        assert known == list(request.prompt) == TOKENIZER.encode("two ")
        assert "".join(scores["tokens"]) == "two four and</s>"
        values = [None, *request.prompt_logprobs, *request.logprobs]
        assert scores["token_logprobs"] == values
        assert scores["text_offset"][len(known)] == 4
        assert scores["text_offset"][-1] == len(found["text"])  # a stop token has no text
        assert max(scores["top_logprobs"][-1].values()) == values[-1]
        likeliest = scores["top_logprobs"][1]  # of the prompt: the likeliest token, and its own
        assert likeliest == {TOKENIZER.decode([20]): 0.0, scores["tokens"][1]: values[1]}
        assert scores["top_logprobs"][0] is None
        chunks = served.events(TEXT, **body)
        parts = [choice for chunk in chunks for choice in chunk["choices"]]
        assert "".join(part["text"] for part in parts) == found["text"]
        assert sum((part["logprobs"]["tokens"] for part in parts), []) == scores["tokens"]
    scored = served.post(TEXT, prompt="two ", echo=True, logprobs=1, max_tokens=0)
    assert scored.json()["choices"][0]["text"] == "two "
    several = served.post(TEXT, prompt=["two", "four"], n=2, echo=True).json()
    starts = [choice["text"][:3] for choice in several["choices"]]
    assert starts == ["two", "two", "fou", "fou"]
    for wrong in ("", [], [[]], [1.5], {"a": 1}, None, ["a", 3], [10**9], [True]):
        answer = served.post(TEXT, prompt=wrong)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"


def test_who_goes_is_cancelled_and_the_slot_is_free(served: Live) -> None:
    served.script, served.generator.per_step = "two" * 1000, 1
    served.generator.pause_s = 0.003
    for stream in (True, False):
        before = served.generator._cancelled
        body = json.dumps({**HELLO, "stream": stream}).encode()
        served.generator.gate.clear()
        with raw(served, chat_head(len(body)), body) as connection:
            until(lambda: served.driver.in_flight == 1)
            if stream:
                assert b" 200 " in connection.recv(100)
        served.generator.gate.set()
        until(lambda: not served.driver.in_flight)
        assert not served.generator._running and served.generator._cancelled == before + 1
        assert len(served.generator.seen[-1].tokens) < 1000
    served.generator.pause_s = 0.0


def test_who_goes_within_a_body_is_no_fault_of_the_servers(served: Live) -> None:
    answers = served.driver.metrics.answers
    for end in (b"", b"0\r\nzz"):  # gone, or no HTTP any more
        before = answers.get(499, 0)
        chunked = chat_head(99).replace("Content-Length: 99", "Transfer-Encoding: chunked")
        with raw(served, chunked, b"2\r\n{}\r\n" + end):
            pass
        until(lambda before=before: answers.get(499, 0) == before + 1)
    assert not answers.get(500)


def test_a_client_that_reads_nothing_stops_nobody(served: Live) -> None:
    served.script, served.generator.per_step = "two" * 900, 50
    body = json.dumps({**HELLO, "stream": True, "logprobs": True}).encode()
    with raw(served, chat_head(len(body)), body):
        until(lambda: served.driver.in_flight == 0)
        served.script = "</think>four<|im_end|>"
        assert served.post().json()["choices"][0]["message"]["content"] == "four"


def test_where_too_many_wait_the_next_comes_again_later() -> None:
    with live(slots=2, waiting=1) as one, concurrent.futures.ThreadPoolExecutor(3) as pool:
        one.generator.gate.clear()
        first = [pool.submit(one.post) for _ in range(3)]
        until(lambda: one.driver.in_flight == 3)
        refused = one.post()
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 0
        assert refused.json()["error"]["type"] == "rate_limit_error"
        one.generator.gate.set()
        assert [answer.result().status_code for answer in first] == [200] * 3
        assert one.post().status_code == 200


def test_a_key_opens_what_shows_texts() -> None:
    with live(keys=("one", "zwö")) as one:
        assert one.client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer two"}, {"Authorization": "one"}):
            for path in ("/v1/models", "/nothing"):
                answer = one.client.get(path, headers=headers)
                assert answer.status_code == 401
                assert answer.json()["error"]["type"] == "authentication_error"
        good = {"Authorization": "Bearer one"}
        assert one.client.get("/v1/models", headers=good).status_code == 200


def test_the_end_lets_what_runs_end() -> None:
    with live() as one, concurrent.futures.ThreadPoolExecutor(1) as pool:
        one.generator.gate.clear()
        running = pool.submit(one.events)
        until(lambda: one.driver.in_flight == 1)
        one.driver.draining = True
        refused = one.post()
        assert refused.status_code == 503 and refused.json()["error"]["type"] == "server_error"
        assert one.client.get("/health").status_code == 503
        one.generator.gate.set()
        assert running.result()[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_step_that_fails_once_is_taken_up_and_one_that_always_does_is_answered() -> None:
    with live() as one:
        one.generator.faults = 2
        assert one.post().status_code == 200
        one.generator.faults = 3
        failed = one.post()
        assert failed.status_code == 500 and "Traceback" not in failed.text
        one.generator.faults = 0
        assert one.post().status_code == 200 and one.driver.in_flight == 0


def test_metrics_count_under_the_fields_names(served: Live) -> None:
    served.script = "</think>four<|im_end|>"
    before = served.driver.metrics.first_token._sum
    assert served.post().status_code == 200
    until(lambda: served.driver.stats.running == 0)
    text = served.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    tokens = sum(len(request.tokens) for request in served.generator.seen)
    assert int(lines["vllm:generation_tokens_total"]) == tokens
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "nemotron_event_loop_lag_seconds_count",
        "nemotron_free_pages",
    ):
        assert float(lines[name]) >= 0
    assert served.driver.metrics.first_token._sum > before
    assert ids_of("four") == TOKENIZER.encode("four")


def test_nothing_holds_a_body_that_was_refused() -> None:
    """No collector is needed for it: large ones would stay for long."""
    body = b'{"a": ["b", ' + b"[" * (100 + len(TEXT))
    gc.disable()
    try:
        before = sys.getrefcount(body)
        refusal = http._parsed(body)
        assert isinstance(refusal, Refusal) and sys.getrefcount(body) == before
    finally:
        gc.enable()
