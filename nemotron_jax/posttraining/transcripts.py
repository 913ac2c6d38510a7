"""Episodes written down: JSONL for programs, a page of HTML for people."""

import dataclasses
import html
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_jax.data.atomic import atomic_writer
from nemotron_jax.posttraining.rollout import Episode

JSONL, PAGE = "transcripts.jsonl", "transcripts.html"
_SHOWN = 200  # episodes of the page, the newest
_ANSWER_LETTERS = 80  # of a last turn that stand in the line of a folded episode


class Transcripts:
    """The first `keep` episodes of every batch, each batch once.

    A run that goes on drops what a killed one wrote of batches that are to be played again. A line
    is also a row of conversations, as `data.sources` reads them.
    """

    def __init__(self, directory: Path, keep: int, *, thinking: bool = False) -> None:
        """`thinking`: whether the prompts opened the reasoning."""
        self._path, self._keep, self._thinking = directory / JSONL, keep, thinking
        self._begun = False

    def add(self, number: int, episodes: Sequence[Episode], rewards: Sequence[float]) -> None:
        """Write down a batch's episodes and what they were paid."""
        if not self._begun:
            self._drop_from(number)
            self._begun = True
        with self._path.open("a", encoding="utf-8") as out:
            for episode, reward in list(zip(episodes, rewards, strict=True))[: self._keep]:
                values = transcript(number, episode, reward, thinking=self._thinking)
                out.write(json.dumps(values, ensure_ascii=False) + "\n")

    def _drop_from(self, number: int) -> None:
        kept = [line for line in read_transcripts(self._path) if line["batch"] < number]
        with atomic_writer(self._path) as out:
            for line in kept:
                out.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def transcript(
    number: int, episode: Episode, reward: float, *, thinking: bool = False
) -> dict[str, Any]:
    """An episode as JSON values."""
    switches = {"enable_thinking": thinking, "low_effort": episode.low_effort}
    return {
        "batch": number,
        "group": episode.group,
        "task": episode.task.id,
        "messages": list(episode.messages),
        "tools": list(episode.task.tools),
        # An episode keeps what it has thought: it is never rendered again.
        "chat_template_kwargs": switches | {"truncate_history_thinking": False},
        "reward": reward,
        "verdict": dataclasses.asdict(episode.verdict),
        "truncated": episode.truncated,
        "turns": [dataclasses.asdict(turn) for turn in episode.turns],
    }


def read_transcripts(path: Path) -> list[dict[str, Any]]:
    """The episodes of a file, up to a line that a kill has cut short."""
    found: list[dict[str, Any]] = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def write_page(directory: Path) -> Path:
    """transcripts.html beside transcripts.jsonl: its newest episodes, one below the other."""
    newest = read_transcripts(directory / JSONL)[-_SHOWN:]
    path = directory / PAGE
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
    kind = "right" if one["reward"] > 0.5 else "wrong"
    notes += [str(said[-1])[:_ANSWER_LETTERS]] if said and said[-1] else []
    heading = html.escape(" · ".join(notes))
    return f'<details class="{kind}"><summary>{heading}</summary>{messages}</details>'


def _message(message: dict[str, Any]) -> str:
    parts = [message.get("reasoning_content") or "", message.get("content") or ""]
    for call in message.get("tool_calls") or ():
        function = call["function"]
        parts.append(f"{function['name']}({json.dumps(function['arguments'])})")
    text = html.escape("\n".join(part for part in parts if part))
    role = html.escape(message["role"])
    return f'<div class="{role}"><b>{role}</b><pre>{text}</pre></div>'


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
