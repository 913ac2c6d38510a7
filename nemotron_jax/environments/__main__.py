"""python -m nemotron_jax.environments: list, show, play and check environments."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence

from nemotron_jax.environments.base import Environment, Session, Task, Verdict, play
from nemotron_jax.environments.catalogue import find, registry, table
from nemotron_jax.environments.check import check
from nemotron_jax.environments.turns import ToolCall, Turn

_HOW_TO_PLAY = (
    "Type a reply and end it with a line that is a single dot.\n"
    'A line such as /NAME {"argument": 1} calls the tool NAME; /quit gives up.'
)


def main(arguments: Sequence[str] | None = None) -> int:
    """List environments, check them, or show a task; the exit status: 0, 1 for faults, 2 for wrong
    input."""
    given = _parser().parse_args(arguments)
    try:
        if given.list:
            print(table(registry.everything()))
            return 0
        if given.check:
            if given.tasks < 1:
                raise ValueError(f"--tasks={given.tasks}: must be at least 1, the tasks to try")
            return _check(given.check, given.tasks, given.seed)
        flag = "--sample" if given.sample else "--play"
        name = given.sample or given.play
        environment = find(name, f"{flag}={name!r}")
        task = environment.split(given.seed, given.split, given.index, level=given.level)
        verdict = _sample(environment, task) if given.sample else _play(environment, task)
    except ValueError as error:
        print(f"environments: {error.args[0] if error.args else error}", file=sys.stderr)
        return 2
    print(_shown(verdict))
    return 0


def _check(name: str, tasks: int, seed: int) -> int:
    """1 if something is wrong with an environment, or with any that can run here for "all"."""
    status = 0
    for environment in registry.values() if name == "all" else [find(name, f"--check={name!r}")]:
        if name == "all" and (reason := environment.unavailable()):
            print(f"{environment.name}: left out; {reason}")
            continue
        report = check(environment, tasks, seed=seed)
        print("\n".join(report.lines()), flush=True)
        status |= bool(report.faults)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m nemotron_jax.environments", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--list", action="store_true", help="the table of environments")
    action.add_argument("--sample", metavar="NAME", help="one task with its oracle's transcript")
    action.add_argument("--play", metavar="NAME", help="play one task in the terminal")
    action.add_argument(
        "--check", metavar="NAME", help="try the properties; all, MODULE:ATTRIBUTE or rows:FILE"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="train")
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--level", type=int)
    parser.add_argument(
        "--tasks", type=int, default=20, help="tasks of each split that are checked"
    )
    return parser


def _sample(environment: Environment, task: Task) -> Verdict:
    _print_opening(task)
    return play(environment, task, environment.oracle(task), _print_messages)


def _play(environment: Environment, task: Task) -> Verdict:
    _print_opening(task)
    print(_HOW_TO_PLAY)
    others = lambda said: [message for message in said if message["role"] != "assistant"]
    show = lambda session, said: _print_messages(session, others(said))
    return play(environment, task, _typed(), show)


def _typed() -> Iterator[Turn]:
    """The turns that a person types, until the input ends."""
    lines: list[str] = []
    for line in sys.stdin:
        line = line.rstrip("\n")
        name, _, arguments = line[1:].partition(" ")
        if line == "/quit":
            return
        if line == ".":
            yield Turn("\n".join(lines))
            lines = []
        elif line.startswith("/"):
            try:
                yield Turn(calls=(ToolCall(name, json.loads(arguments or "{}")),))
            except ValueError:
                print("that is not JSON")
        else:
            lines.append(line)
    if lines:
        yield Turn("\n".join(lines))


def _print_opening(task: Task) -> None:
    print(f"{task.id}, level {task.level}")
    for spec in task.tools:
        function = spec["function"]
        print(
            f"[tool] {function['name']}({', '.join(function['parameters'].get('properties', {}))})"
        )


def _print_messages(session: Session, messages: Sequence[dict]) -> None:
    for message in messages:
        role = message["role"]
        if message["content"]:
            print(f"[{role}] {message['content']}")
        for call in message.get("tool_calls", ()):
            function = call["function"]
            print(f"[{role} calls] {function['name']} {json.dumps(function['arguments'])}")


def _shown(verdict: Verdict) -> str:
    parts = "".join(f", {name} {value:g}" for name, value in verdict.parts.items())
    failed = f", infrastructure: {verdict.infra_error}" if verdict.infra_error else ""
    return f"reward {verdict.reward:g}{parts}{failed}"


if __name__ == "__main__":
    sys.exit(main())
