"""Environments that run code keep their answers outside the sandbox and their failures apart."""

import contextlib
import json
import pathlib

import pytest

from nemotron_jax.environments import coding, play, registry, sandbox
from nemotron_jax.environments.families.bug_repair import edit, patched
from nemotron_jax.environments.sandbox import Result, Sandbox, SandboxUnavailable

NAMES = [name for name in registry if registry[name].rate == "code"]

pytestmark = pytest.mark.skipif(bool(coding.unavailable()), reason=str(coding.unavailable()))


@pytest.fixture
def sent(monkeypatch):
    """Every text that enters a sandbox, in the order of entering."""
    from nemotron_jax.environments.sandbox import channel

    texts: list[str] = []
    frame, finish = channel.frame, channel.Run.finish
    monkeypatch.setattr(channel, "frame", lambda r: texts.append(repr(r)) or frame(r))
    monkeypatch.setattr(
        channel.Run, "finish", lambda run, stdin: texts.append(stdin.decode()) or finish(run, stdin)
    )
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_right_ways_score_one_and_cheats_nothing(name: str) -> None:
    environment = registry[name]
    for level in range(environment.levels):
        task = environment.split(3, "held_out", level, level=level)
        for turns in (environment.oracle(task), *environment.alternatives(task)):
            verdict = play(environment, task, turns)
            assert verdict.reward == 1.0 and verdict.infra_error is None, (turns, verdict)
        if level == environment.levels - 1:
            for trick, turns in environment.cheats(task).items():
                verdict = play(environment, task, turns)
                assert verdict.reward == 0.0 and verdict.infra_error is None, (trick, verdict)


@pytest.mark.parametrize("name", ["code_tests", "bug_repair", "sql", "command_equivalence"])
def test_no_expected_result_enters_the_sandbox(name: str, sent: list[str]) -> None:
    environment = registry[name]
    task = environment.split(1, "train", 0, level=environment.levels - 1)
    secrets = task.data.get("expected") or [test[2] for test in task.data["tests"]]
    # A short result may stand in the inputs by chance.
    secrets = {text for secret in secrets if len(text := json.dumps(secret)) > 20}
    assert play(environment, task, ["wrong"]).reward == 0.0
    play(environment, task, ["```\nwrong\n```"])
    assert sent and not [secret for secret in secrets if any(secret in text for text in sent)]


@pytest.mark.parametrize("name", NAMES)
def test_a_sandbox_that_fails_is_no_wrong_answer(name: str, monkeypatch) -> None:
    environment = registry[name]
    task = environment.split(0, "train", 0)
    turns = environment.oracle(task)

    def fails() -> Sandbox:
        raise SandboxUnavailable("none here")

    monkeypatch.setattr(coding, "shared", fails)
    verdict = play(environment, task, turns)
    assert "none here" in verdict.infra_error

    def broken(*_: object, **__: object) -> Result:
        raise OSError("no slot was free")

    monkeypatch.undo()
    monkeypatch.setattr(Sandbox, "take", broken)
    assert "no slot was free" in play(environment, task, turns).infra_error


def test_a_launcher_that_dies_is_an_infra_error() -> None:
    with Sandbox() as box:
        box._launcher.kill()
        box._launcher.wait()
        assert box.run("print(1)").infra_error
        with pytest.raises(OSError), sandbox.PythonKernel(box):
            pass


@pytest.mark.parametrize(
    ("code", "values"),
    [
        ("def solve(x): return x + 1", [[2], [3]]),
        ("def solve(x): return None", [[None], [None]]),
        ("def solve(x): return 1 / (x - 1)", [None, [1.0]]),
        ("def solve(x): return {1, 2}", [None, None]),
        ("def solve(x):\n  print('{\"value\": 1}')\n  return x", [[1], [2]]),
        ("import os\ndef solve(x): os._exit(0) if x == 2 else None\n", [[None], None]),
        ("raise SystemExit(0)", [None, None]),
        ("x = 1", [None, None]),
    ],
)
def test_values_come_back_as_they_are(code: str, values: list) -> None:
    assert coding.call_all(code, [("solve", [1]), ("solve", [2])]) == values


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture) -> None:
    text = (pathlib.Path(__file__).parents[2] / "docs" / "sandbox.md").read_text("utf-8")
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["result"].stdout == "cba\n"
    assert capsys.readouterr().out == "42\n\nb'1 a.txt\\n'\n"


def test_agreement_is_of_type_and_value() -> None:
    assert coding.agree([[1], [True], [1.0], None, [[1]]], [1, 1, 1, None, [1]]) == [
        True,
        False,
        False,
        False,
        True,
    ]


def test_an_edit_applies_only_where_its_text_stands_once() -> None:
    assert patched("a\nb\nc\n", edit("b", "B\nB")) == "a\nB\nB\nc\n"
    assert patched("a\nb\nc\n", f"{edit('a', '')}\nand\n{edit('c', 'd')}") == "\nb\nd\n"
    assert patched("a\na\n", edit("a", "b")) is None
    assert patched("a\n", edit("x", "b")) is None
    assert patched("a\n", "```python\nb\n```") == "b\n"
    assert patched("a\n", "b") is None


def test_a_terminal_and_a_kernel_keep_their_state() -> None:
    for name, tool, first, second, shown in (
        ("python_tool", "python", {"code": "x = 7"}, {"code": "x * 6"}, "42\n"),
        ("terminal", "run", {"command": "echo 42 > f"}, {"command": "cat f"}, "42\n"),
    ):
        environment = registry[name]
        with environment.start(environment.split(0, "train", 1)) as session:
            session.call(tool, first)
            assert session.call(tool, second) == shown
            with contextlib.suppress(AttributeError):
                session.box.close()
            session.close()


def test_a_query_without_end_is_wrong_and_not_waited_for() -> None:
    endless = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT SUM(n) FROM r"
    environment = registry["sql"]
    verdict = play(environment, environment.split(0, "train", 0), [endless])
    assert verdict.reward == 0.0 and verdict.infra_error is None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_hundred_tasks_of_each_split(name: str) -> None:
    environment = registry[name]
    for split in ("train", "held_out"):
        for index in range(200):
            task = environment.split(0, split, index)
            for turns in (environment.oracle(task), *environment.alternatives(task)):
                verdict = play(environment, task, turns)
                assert verdict.reward == 1.0, (task.id, turns, verdict)
