"""Episodes written down: JSONL for programs, a page of HTML for people."""

import dataclasses
import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.json_lines import keep_damaged, read_objects
from nemotron_jax.environments.sound import sound_value
from nemotron_jax.files import atomic_writer
from nemotron_jax.playing.episode import Episode
from nemotron_jax.run_directory import RunDirectory

_SHOWN = 200  # episodes of the page, the newest
_ANSWER_LETTERS = 80  # of a last turn that stand in the line of a folded episode


class Transcripts:
    """The first `keep` episodes of every batch, each batch once.

    A run that goes on drops what a killed one wrote of batches that are to be played again, and
    damaged lines; the file as it was then stays beside it. A line is also a row of conversations,
    as `data.sources` reads them.
    """

    def __init__(self, directory: RunDirectory, keep: int, *, thinking: bool = False) -> None:
        """`thinking`: whether the prompts opened the reasoning."""
        self._path, self._keep, self._thinking = directory.transcripts, keep, thinking
        self._begun = False

    def add(self, number: int, episodes: Sequence[Episode], rewards: Sequence[float]) -> None:
        """Write down a batch's episodes and what they were paid."""
        if not self._begun:
            self._drop_from(number)
            self._begun = True
        with self._path.open("ab") as out:
            for episode, reward in list(zip(episodes, rewards, strict=True))[: self._keep]:
                out.write(_line(transcript(number, episode, reward, thinking=self._thinking)))

    def _drop_from(self, number: int) -> None:
        found, damaged = _read(self._path)
        if damaged:
            keep_damaged(self._path, damaged)
        with atomic_writer(self._path) as out:
            out.writelines(_line(one) for one in found if one["batch"] < number)


def transcript(
    number: int, episode: Episode, reward: float, *, thinking: bool = False
) -> dict[str, Any]:
    """An episode as JSON values, whatever its model, tools and environment have said."""
    switches = {"enable_thinking": thinking, "low_effort": episode.low_effort}
    values = {
        "batch": number,
        "group": episode.group,
        "task": episode.task.id,
        "messages": list(episode.messages),
        "tools": list(episode.task.tools),
        # An episode keeps what it has thought: it is never rendered again.
        "chat_template_kwargs": switches | {"truncate_history_thinking": False},
        "reward": reward,
        "verdict": vars(episode.verdict),
        "truncated": episode.truncated,
        "turns": [dataclasses.asdict(turn) for turn in episode.turns],
    }
    return sound_value(values)


def read_transcripts(path: Path) -> list[dict[str, Any]]:
    """The episodes of a file, without lines that hold none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The episodes of a file, and the numbers of its damaged lines."""
    found: list[dict[str, Any]] = []
    damaged: list[int] = []
    for number, values in read_objects(path):
        values = sound_value(values)
        if _is_transcript(values):
            found.append(values)
        else:
            damaged.append(number)
    return found, damaged


def _is_transcript(values: dict[str, Any] | None) -> bool:
    """Whether a line holds what `transcript` makes, as far as it is read here."""
    kinds = {"batch": int, "group": int, "task": str, "reward": int | float, "truncated": bool}
    kinds |= {"verdict": dict, "turns": list, "messages": list}
    if values is None or not all(isinstance(values.get(name), k) for name, k in kinds.items()):
        return False
    turns = all(isinstance(turn, dict) and "well_formed" in turn for turn in values["turns"])
    return (
        turns and "infra_error" in values["verdict"] and all(map(_is_message, values["messages"]))
    )


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    calls = message.get("tool_calls") or []
    named = lambda call: isinstance(call, dict) and isinstance(call.get("function"), dict)
    return isinstance(calls, list) and all(
        named(call) and {"name", "arguments"} <= call["function"].keys() for call in calls
    )


def _line(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_page(directory: RunDirectory) -> Path:
    """transcripts.html beside transcripts.jsonl: its newest episodes, one below the other."""
    newest = read_transcripts(directory.transcripts)[-_SHOWN:]
    path = directory.transcripts_page
    with atomic_writer(path) as out:
        out.write(page(newest).encode())
    return path


def page(episodes: Sequence[dict[str, Any]]) -> str:
    """Episodes as one page that needs nothing beside it, those of one prompt below a heading."""
    groups = itertools.groupby(episodes, lambda one: (one["batch"], one["group"]))
    body = "\n".join(_group(list(members)) for _, members in groups)
    return _PAGE.format(body=body, count=len(episodes))


def _group(members: Sequence[dict[str, Any]]) -> str:
    first, rewards = members[0], [one["reward"] for one in members]
    mean = f"mean reward {sum(rewards) / len(rewards):.2f} of {len(rewards)}"
    heading = f"{first['task']} · batch {first['batch']}, group {first['group']} · {mean}"
    return f"<h2>{html.escape(heading)}</h2>\n" + "\n".join(map(_episode, members))


def _episode(one: dict[str, Any]) -> str:
    failure = one["verdict"]["infra_error"]
    broken = sum(not turn["well_formed"] for turn in one["turns"])
    said = [m.get("content") for m in one["messages"] if m["role"] == "assistant"]
    notes = [f"reward {one['reward']:.2f}", f"{len(one['turns'])} turns"]
    notes += [f"environment failed: {failure}"] if failure else []
    notes += ["cut off"] if one["truncated"] else []
    notes += [f"{broken} malformed turns"] if broken else []
    messages = "".join(map(_message, one["messages"]))
    kind = "right" if one["verdict"]["reward"] > 0.5 else "wrong"
    notes += [str(said[-1])[:_ANSWER_LETTERS]] if said and said[-1] else []
    heading = html.escape(" · ".join(notes))
    return f'<details class="{kind}"><summary>{heading}</summary>{messages}</details>'


def _message(message: dict[str, Any]) -> str:
    parts = [_text(message.get("reasoning_content")), _text(message.get("content"))]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        parts.append(f"{function['name']}({json.dumps(function['arguments'])})")
    text = html.escape("\n".join(part for part in parts if part))
    role = html.escape(message["role"])
    return f'<div class="{role}"><b>{role}</b><pre>{text}</pre></div>'


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content) if content else ""


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Episodes</title>
<style>
body {{ font: 15px sans-serif; max-width: 60em; margin: 2em auto; color: #222 }}
details {{ border-left: 4px solid #c33; margin: .5em 0; padding-left: .8em }}
details.right {{ border-color: #393 }}
summary {{ cursor: pointer }}
h2 {{ font-size: 1em; margin: 1.5em 0 .5em }}
pre {{ white-space: pre-wrap; margin: .2em 0 .8em }}
.assistant pre {{ background: #eef4ff }} .tool pre {{ background: #f4f4ee }}
</style>
<h1>{count} episodes</h1>
{body}
</html>
"""
