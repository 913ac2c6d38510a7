"""The command lists, shows, plays and checks; a wrong name is one line."""

import io
import pathlib
import re
import sys

import pytest

from nemotron_jax.environments import __main__ as command
from nemotron_jax.environments import registry
from nemotron_jax.environments.__main__ import main
from nemotron_jax.environments.catalogue import table
from nemotron_jax.environments.check import check

ROOT = pathlib.Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "environments.md").read_text("utf-8")


def test_the_list_is_the_registrys_table(capsys: pytest.CaptureFixture) -> None:
    assert main(["--list"]) == 0
    assert capsys.readouterr().out.strip() == table(registry.everything())


def test_the_docs_hold_the_table() -> None:
    assert table(registry.everything()) in DOCS, (
        "paste what `python -m nemotron_jax.environments --list` prints"
    )


def test_a_sample_shows_the_oracle_and_its_verdict(capsys: pytest.CaptureFixture) -> None:
    assert main(["--sample=arithmetic", "--seed=3", "--level=1", "--split=held_out"]) == 0
    shown = capsys.readouterr().out
    assert "arithmetic/held_out/3/0/level1, level 1" in shown
    assert "[assistant calls] calc" in shown and "reward 1, used_tool 1" in shown


def test_a_person_plays(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    task = registry["lookup"].split(0, "train", 0, level=0)
    key, answer = task.data["chains"][0][0], task.data["answer"]
    typed = f'/get {{"k": "{key}"}}\n/get {{\n{answer}\n.\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["--play=lookup", "--level=0"]) == 0
    shown = capsys.readouterr().out
    assert f"[tool] {answer}" in shown and "that is not JSON" in shown and "reward 1" in shown


def test_a_person_gives_up(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    assert main(["--play=lookup"]) == 0
    assert "reward 0" in capsys.readouterr().out


def test_a_check_passes_and_fails_by_its_status(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "own_environment.py").write_text(example(), "utf-8")
    wrong = example().replace("return [str(task.data", "return ['?' + str(task.data")
    (tmp_path / "wrong_environment.py").write_text(wrong, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--check=own_environment:Reverse", "--tasks=5"]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["--check=wrong_environment:Reverse", "--tasks=2"]) == 1
    assert "FAULT" in capsys.readouterr().out


def test_all_are_checked_at_once(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = {name: registry[name] for name in ("lookup", "equations")}
    monkeypatch.setattr(command, "registry", some)
    assert main(["--check=all", "--tasks=2"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: 4 tasks" in shown for name in some)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--sample=none"], "no environment is called 'none'"),
        (["--sample=lookup", "--level=9"], "level=9 is not one of"),
        (["--check=json:loads"], "is not an environment"),
        (["--check=arithmetic", "--tasks=0"], "--tasks=0: must be at least 1"),
        (["--check=all", "--tasks=-3"], "--tasks=-3: must be at least 1"),
        (["--check=no_such_module:X"], "No module named"),
    ],
)
def test_a_wrong_name_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def example() -> str:
    """The docs' own environment."""
    (code,) = re.findall(r"```python\n(# my_environment\.py\n.*?)```", DOCS, re.DOTALL)
    return code


def test_the_docs_first_lines_run(capsys: pytest.CaptureFixture) -> None:
    exec(re.search(r"```python\n(from .*?)```", DOCS, re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip().endswith("1.0")


def test_the_docs_example_is_an_environment_that_passes() -> None:
    names: dict = {}
    exec(compile(example(), "docs/environments.md", "exec"), names)
    report = check(names["Reverse"](), tasks=10)
    assert not report.faults


def test_an_environment_of_ones_own_is_registered_once() -> None:
    from nemotron_jax.environments.catalogue import Registry

    own = Registry({})
    names: dict = {}
    exec(example(), names)
    assert own.register(names["Reverse"]()) is own["reverse"] and list(own) == ["reverse"]
    with pytest.raises(ValueError, match="'reverse' is taken"):
        own.register(names["Reverse"]())
