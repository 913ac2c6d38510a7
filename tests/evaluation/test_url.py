"""A server's answers, and what it is to a suite that it has none."""

import http.server
import json
import threading

import pytest

from nemotron_jax.evaluation import url as module
from nemotron_jax.evaluation.answers import Ask
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.evaluation.url import Url, read_answer
from nemotron_jax.evaluation.waiting import side_by_side


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with the next of the server's replies, and keeps what it was asked."""

    def do_GET(self):
        self._reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, body, self.headers.get("Authorization")))
            status, reply = server.replies.pop(0) if server.replies else (200, echo(body))
        self._reply(status, reply)

    def _reply(self, status, body):
        data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *unused):
        pass


def echo(body):
    text = body.get("prompt") or body["messages"][-1]["content"]
    shared = {"finish_reason": "stop"}
    choice = {"text": text} if "prompt" in body else {"message": {"content": text}}
    return {"choices": [shared | choice], "usage": {"completion_tokens": 3}}


class Listener(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # as many as ask at one time, and more


@pytest.fixture
def server():
    with Listener(("127.0.0.1", 0), Handler) as one:
        one.asked, one.replies, one.lock = [], [], threading.Lock()
        thread = threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        one.url = f"http://127.0.0.1:{one.server_address[1]}"
        yield one
        one.shutdown()
        thread.join()


def test_answers_come_in_the_order_of_the_requests(server, monkeypatch) -> None:
    monkeypatch.setenv(module.KEY, "a key")
    done = []
    url = Url(f"{server.url}/v1/", progress=lambda *counts: done.append(counts))
    asks = [Ask(prompt=f"text {n}", seed=n) for n in range(40)]
    asks.append(Ask(messages=({"role": "user", "content": "hello"},), tools=({"type": "x"},)))
    answers = url.ask(asks)
    assert [a.text for a in answers] == [*(f"text {n}" for n in range(40)), "hello"]
    assert answers[-1].message == {"role": "assistant", "content": "hello"}
    assert done[-1] == (41, 41)
    paths = {path for path, _, _ in server.asked}
    assert paths == {"/v1/completions", "/v1/chat/completions"}
    chat = next(body for path, body, _ in server.asked if "chat" in path)
    assert chat["tools"] == [{"type": "x"}] and chat["model"] == "tiny"
    assert chat["chat_template_kwargs"] == {"enable_thinking": False}
    assert {key for _, _, key in server.asked} == {"Bearer a key"}


def test_a_busy_server_is_asked_again_and_a_failing_one_is_an_error(server, monkeypatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    url, ask = Url(server.url, "m"), Ask(prompt="again")
    server.replies = [(429, {}), (429, "no JSON"), (429, {})]
    assert url.ask([ask])[0].text == "again" and len(server.asked) == 4
    server.replies = [(400, {"error": {"message": "too\nlong"}})]
    with pytest.raises(Unavailable, match="status 400: too long"):
        url.ask([ask])
    server.replies = [(500, "<html>")] * 2
    assert {a.error[:30] for a in url.ask([ask] * 3)} == {"", "/v1/completions: status 500: <"}
    server.replies = [(200, "not JSON")]
    with pytest.raises(Unavailable, match="is no JSON"):
        url.ask([ask])


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.0)
    with pytest.raises(Unavailable, match=r"http://127.0.0.1:1/v1/models does not answer"):
        Url("http://127.0.0.1:1").ask([Ask(prompt="x")])


def test_whoever_leaves_early_waits_for_nothing() -> None:
    """As by Ctrl-C while a slow server answers: no other request is begun."""
    begun, goes_on = [], threading.Event()

    def work(number):
        begun.append(number)
        if number:
            goes_on.wait(60)
        return number * 10

    going = side_by_side(work, 50, threads=4)
    assert next(going) == (0, 0)
    going.close()
    held = len(begun)
    goes_on.set()
    assert held <= 5 and set(begun) <= set(range(5))
    assert dict(side_by_side(work, 50, threads=4)) == {n: 10 * n for n in range(50)}
    assert dict(side_by_side(work, 0, threads=4)) == {}
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(lambda number: 1 // number, 3, threads=2))


def test_answers_of_all_shapes_are_read_and_others_are_errors() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = {"content": None, "reasoning_content": "hm", "tool_calls": [call]}
    choice = {"message": message, "finish_reason": "tool_calls"}
    turn = read_answer({"choices": [choice], "usage": {"completion_tokens": 9}})
    assert turn.calls == ({"name": "add", "arguments": {"a": 1}},)
    assert (turn.text, turn.reasoning, turn.tokens, turn.finish_reason) == ("", "hm", 9, "stop")
    assert turn.message["tool_calls"] == [call]
    scores = {
        "token_logprobs": [None, -1.0, -2.0, -0.5],
        "top_logprobs": [None, {"a": -1.0}, {"b": -0.1}, {"c": -0.5}],
    }
    choice = {"text": "abc", "finish_reason": "length", "logprobs": scores}
    found = read_answer(
        {"choices": [choice], "usage": {"completion_tokens": 1}}, prompt_logprobs=True
    )
    assert found.prompt_logprobs == (-1.0, -2.0) and found.prompt_likeliest == (True, False)
    assert found.finish_reason == "length"
    for wrong in ({}, [], None, {"choices": []}, {"choices": [{}]}):
        assert "cannot be read" in read_answer(wrong).error
