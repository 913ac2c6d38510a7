"""Models, environments and judges that say anything at all, each a function of a seed."""

import json
import random
import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

from nemotron_jax.data.chat.tokens import RESERVED
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.environments import registry
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn
from nemotron_jax.playing.conversations import Written

LONG = 200_000  # characters, which are the most that a verifier reads
DEEP = 100_000  # levels of JSON

# As JSON's escapes: a turn's own text, which is made of bytes, cannot hold half of a pair.
HALVES = '"\\ud800", {"\\udfff": "\\ud83d"}, "\\ud83d\\ude00"'
VALUES = (
    *(f"[{HALVES}]", '{"a": "\\ud800"}', "\\ud800", "NaN", "[Infinity]", "-1e999", "9" * 5000),
    *('{"a": 1, "a": 2}', "null", "", "\0", "\u2028", "x\x85y", "</parameter>", "True", "1.0"),
    *("[" * 400 + "]" * 400, '{"a":' * 100 + "1" + "}" * 100, "[" * 40, '"'),
    # What a tool may take, and what makes one answer with anything.
    *("1", "1+1", '["a"]', '{"a": 1}', "a", "print(chr(0xd800))", "print('[' * 100_000)", "1/0"),
    *(
        "import os; os.write(1, b'\\xff\\xed\\xa0\\x80\\0')",
        "printf '\\377\\0'; exit 3",
        "SELECT x'ff'",
    ),
)
TEXTS = (
    *("", " ", "\n", "\0", "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e", "\ufeff", "\u202e", "\r\n"),
    *("Answer: 4", "\\boxed{4}", "{}", "[1]", "```python\nprint(1)\n```", "B", "<b>&amp;", "{0}%s"),
    *(
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
        "<tool_response>",
        "<function_call>",
    ),
    *("<|im_start|>system", "tool_calls", "<tools>", "e\u0301\U0001d7d9", "\ud7ff\ue000", "reward"),
)
LARGE = (
    *("x" * LONG, "\n" * (LONG - 10), "[" * DEEP + "]" * (DEEP - 1), "<think>" * (LONG // 8)),
    *("</tool_call>" * 9000, "<|im_start|>" * 9000, "\u2028" * (LONG // 3), "{" * LONG),
    *("Answer: 7\n" * (LONG // 10), "a b " * (LONG // 4)),
)
LARGE_VALUES = ("[" * DEEP + "]" * DEEP, '{"a":' * 30_000 + "1" + "}" * 30_000, "9" * LONG)


class Model:
    """A sampler whose turns are hostile: a function of its seed, the row and the row's length."""

    def __init__(self, tokenizer: Tokenizer, large: float) -> None:
        """`large` is the share of turns that hold a text of the largest size."""
        self.tokenizer, self.large, self.turns = tokenizer, large, 0
        self._known: dict[str, list[int]] = {}
        self._bytes = {piece: n for n, piece in enumerate(tokenizer.token_bytes) if piece}

    def __call__(self, model, prompts, copies, wanted, execution) -> "Conversations":
        rows = [list(prompt) for prompt in prompts for _ in range(copies)]
        return Conversations(self, rows, wanted.seed, *wanted.stop_tokens)

    def turn(self, draws: random.Random, prompt: str) -> list[int]:
        """The ids of a turn. It knows the names of the tools, as a model does."""
        tools = re.findall(r"<function>\n<name>(.*?)</name>", prompt) or ["calc"]
        names = re.findall(r"<parameter>\n<name>(.*?)</name>", prompt) or ["e"]
        parts: list[str] = []
        for _ in range(draws.choice((0, 1, 1, 2, 3, 6))):
            kind = draws.random()
            if kind < 0.35:
                parts += self._call(draws, tools, names)
            elif kind < 0.6:
                parts.append(draws.choice(RESERVED))
            else:
                parts.append(draws.choice(LARGE if draws.random() < self.large else TEXTS))
        ids = [token for part in parts for token in self._encoded(part)]
        if draws.random() < 0.1:
            ids += [self._bytes[bytes([byte])] for byte in draws.sample(range(128, 256), 3)]
        return ids + ([] if draws.random() < 0.05 else [self.tokenizer.token_id("<|im_end|>")])

    def _call(self, draws: random.Random, tools: Sequence[str], names: Sequence[str]) -> list[str]:
        """A call that is whole, or one that lacks a part."""
        values = LARGE_VALUES if draws.random() < self.large else VALUES
        lines = ["<tool_call>", f"\n<function={draws.choice(tools)}>\n"]
        for name in draws.sample(names, min(len(names), draws.choice((0, 1, 2, 3)))):
            lines.append(f"<parameter={name}>\n{draws.choice(values)}\n</parameter>\n")
        lines += ["</function>\n", "</tool_call>"]
        if draws.random() < 0.15:
            del lines[draws.randrange(len(lines))]
        return lines

    def _encoded(self, text: str) -> list[int]:
        if text not in self._known:
            special = text in RESERVED
            ids = [self.tokenizer.token_id(text)] if special else self.tokenizer.encode(text)
            self._known[text] = ids
        return self._known[text]


class Conversations:
    def __init__(self, model: Model, rows: list[list[int]], seed: int, stop: int) -> None:
        self._model, self._rows, self._seed, self._stop = model, rows, seed, stop
        self._prompts = [model.tokenizer.decode(row, show_special=True) for row in rows]

    def swap(self, model: object) -> None: ...

    def read(self, rows: Sequence[Sequence[int]]) -> None:
        for row, new in zip(self._rows, rows, strict=True):
            row += new

    def write(self, limits: Sequence[int]) -> list[Written]:
        out = []
        for place, limit in enumerate(limits):
            row, new = self._rows[place], ()
            if limit:
                draws = random.Random(f"{self._seed} {place} {len(row)}")
                new = tuple(self._model.turn(draws, self._prompts[place])[:limit])
                self._model.turns += 1
            row += new
            stopped = bool(new) and new[-1] == self._stop
            out.append(Written(new, (-0.5,) * len(new), stopped))
        return out


def _deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


# What a session of one's own may say to a turn, and what its verdict may hold.
REPLIES: tuple[Any, ...] = (
    *("\ud800", "a\udfff\0", "", "x" * 300, "</tool_response><|im_end|>", None, 7, _deep(500)),
    *([{"type": "text", "text": "\ud800"}], [{"type": "image"}], b"\xff", float("nan"), object()),
)
PLACES = ("start", "reply", "verify", "close")  # where it raises
ANSWERS: tuple[Any, ...] = (None, "\ud800", _deep(5000), 10**5000, {1: {2}}, object(), b"\xff")


class Talker(Session):
    """Goes wrong at every place that a session has, as its task's data say."""

    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self._draws = random.Random(json.dumps(task.data))
        self._fails("start")

    def reply(self, turn: Any) -> tuple:
        self._fails("reply")
        super().reply(turn)
        self.over = self.over or self._draws.random() < 0.2
        kind = self.task.data["kind"]
        if kind == "messages":
            return self._draws.choice(((), None, 7, ("text",), ({},), ({"role": "nobody"},)))
        return ({"role": "tool", "content": self._draws.choice(REPLIES)},)

    def verify(self) -> Verdict:
        self._fails("verify")
        if self.task.data["kind"] == "verdict":
            return self._draws.choice((None, 1.0, "\ud800", {}))
        failed = self._draws.choice((*(None,) * 16, "\ud800 is gone", "", 7, "\n" * 9000))
        answer, parts = self._draws.choice(ANSWERS), self._draws.choice(({"\ud800": 1.0}, None, 7))
        return Verdict(self._draws.random(), parts, answer, failed)

    def close(self) -> None:
        self._fails("close")

    def _fails(self, place: str) -> None:
        if self.task.data["kind"] == place:
            raise self._draws.choice((RuntimeError, RecursionError, UnicodeError, KeyError))(
                "\ud800"
            )


class Hostile(Environment):
    """An environment of one's own whose sessions fail in every way but by not ending."""

    name, summary, reward, counterpart = "hostile", "nothing", "any", "none"
    max_turns, levels, session = 4, 1, Talker

    def draw(self, draws, level: int) -> Draft:
        kinds = (
            "said",
            "said",
            "messages",
            "verdict",
            "start",
            "reply",
            "verify",
            "close",
            "opening",
        )
        kind, number = draws.choice(kinds), draws.below(10**9)
        said: Any = (
            f"Task {number}" if kind != "opening" else draws.choice(("\ud800", 7, "y" * 9000))
        )
        tools = (tool("calc", "a tool", {"e": {"type": "array"}, "f": {"type": "object"}}),)
        messages = [{"role": "user", "content": said}]
        return Draft(messages, {"kind": kind, "number": number}, tools, identity=number)

    def oracle(self, task: Task) -> list[Turn | str]:
        return ["x"]


def register() -> None:
    if Hostile.name not in registry:
        registry.register(Hostile())


def _answer(body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _says(content: Any) -> bytes:
    return _answer(json.dumps({"choices": [{"message": {"content": content}}]}).encode())


# What a judge's server may answer; the first two are verdicts.
JUDGE = (
    _says("A"),
    _says("It is close.\n\nB"),
    _says("hm"),
    _says(None),
    _says([{"type": "text", "text": "A"}]),
    _says(7),
    _says("\ud800"),
    b"HTTP/1.1 500 X\r\n\r\n",
    _answer(b"<html>"),
    _answer(b"[" * DEEP),
    _answer(b'{"choices": [{"message": {"content": "\xe9"}}]}'),
    _answer(b'{"choices": {}}'),
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
    b"garbage\r\n\r\n",
    b"",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{",
    b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
    b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\n\r\n",
    b"HTTP/1.1 302 X\r\nLocation: file:///etc/passwd\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: \xff\r\n\r\n{}",
)


class Judge:
    """A server on this machine that gives each answer in turn, whatever it is asked, and a verdict
    after each: a batch of which nothing is judged ends a run."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.asked = 0
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                one, _ = self._socket.accept()
            except OSError:
                return
            with one:
                try:
                    one.settimeout(5)
                    self._read(one)
                    turn, right = divmod(self.asked, 2)
                    self.asked += 1
                    one.sendall(JUDGE[0 if right else turn % len(JUDGE)])
                except OSError:
                    pass

    def _read(self, one: socket.socket) -> None:
        """The whole request: a connection closed before that is another failure."""
        data = b""
        while b"\r\n\r\n" not in data:
            if not (part := one.recv(65536)):
                return
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        left = int(length[1]) - len(body) if length else 0
        while left > 0 and (part := one.recv(1 << 20)):
            left -= len(part)
