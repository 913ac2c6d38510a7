"""The page at `/` in a real browser: it chats, folds reasoning, shows calls, and stops."""

import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.live import Live, live
from tests.serving.test_chat_completions import CALL
from tests.serving.test_server import until

pytestmark = pytest.mark.more
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
SEND = """
document.getElementById("text").value = TEXT
document.getElementById("form").requestSubmit()
"""
IDLE = """
new Promise(done => { const look = () =>
  document.getElementById("stop").disabled ? done(true) : setTimeout(look, 20); look() })
"""
SHOWN = """
Object.fromEntries(["user", "answer", "call", "note", "reasoning"].map(kind =>
  [kind, [...document.getElementsByClassName(kind)].map(node => node.textContent)]))
"""


class Browser:
    """A page of headless Chromium, spoken to over its pipe."""

    def __init__(self, url: str, home: pathlib.Path) -> None:
        (own_read, its_write), (its_read, own_write) = os.pipe(), os.pipe()
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={home}",
        ]
        # The browser reads commands at 3 and writes answers at 4.
        script = f'exec "$@" 3<&{its_read} 4>&{its_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(its_read, its_write),
            stderr=subprocess.DEVNULL,
        )
        os.close(its_read)
        os.close(its_write)
        self._read, self._write = os.fdopen(own_read, "rb"), os.fdopen(own_write, "wb")
        self._sent, self._session, self.errors = 0, {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.ask("Runtime.enable")
        self.ask("Log.enable")
        self.ask("Page.enable")
        self.ask("Page.navigate", url=url)
        self.run(
            "new Promise(d => { const l = () => window.answer ? d(1) : setTimeout(l, 20); l() })"
        )

    def ask(self, method: str, **parameters: Any) -> Any:
        """The result of a command."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": parameters, **self._session}
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()
        while True:
            answer = self._message()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of an expression, or what it promises."""
        found = self.ask(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _message(self) -> dict[str, Any]:
        parts = bytearray()
        while (part := self._read.read(1)) != b"\0":
            assert part, "the browser has ended"
            parts += part
        message = json.loads(parts)
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        return message


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as one:
        yield one


@pytest.fixture(scope="module")
def page(served: Live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not BROWSER:
        pytest.skip("there is no Chromium here; the page is not tried")
    home = tmp_path_factory.mktemp("browser")
    browser = Browser(f"http://127.0.0.1:{served.address[1]}/", home)
    yield browser
    browser.process.kill()
    browser.process.wait(20)


def test_a_chat_in_the_browser(served: Live, page: Browser) -> None:
    served.script = "two <b>\n</think>\nfour <i>é\n" + CALL + "<|im_end|>"
    page.run(SEND.replace("TEXT", json.dumps("hello <script>")))
    page.run(IDLE)
    shown = page.run(SHOWN)
    assert shown["user"] == ["hello <script>"] and shown["answer"] == ["four <i>é"]
    assert shown["reasoning"] == ["Reasoningtwo <b>"] and shown["call"] == ['add {"a": 1}']
    assert "tokens/s" in shown["note"][0]
    assert not page.run('document.querySelector("details").open')
    assert page.run('document.getElementById("name").textContent') == "tiny"
    served.script = "</think>two<|im_end|>"
    page.run(SEND.replace("TEXT", '"and?"'))
    page.run(IDLE)
    assert page.run(SHOWN)["answer"] == ["four <i>é", "two"]
    prompt = served.driver.served.tokenizer.decode(
        served.generator.seen[-1].prompt, show_special=True
    )
    assert "hello <script>" in prompt and "four <i>é" in prompt
    assert not page.errors


def test_stop_ends_the_request_and_a_new_chat_is_empty(served: Live, page: Browser) -> None:
    served.script, served.generator.per_step = "two " * 900, 1
    served.generator.pause_s = 0.003
    page.run(SEND.replace("TEXT", '"go on"'))
    until(lambda: served.driver.in_flight == 1)
    page.run('document.getElementById("stop").click()')
    page.run(IDLE)
    assert page.run(SHOWN)["note"][-1] == "stopped"
    until(lambda: not served.driver.in_flight)
    page.run('document.getElementById("reset").click()')
    assert not any(page.run(SHOWN).values())
    served.generator.pause_s = 0.0
