"""What a model does with tools: shares of tasks solved, by kind, once, ever and every time."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemotron_jax.config.checks import at_least_one, check
from nemotron_jax.data.chat.tokens import encode_chat
from nemotron_jax.environments.base import Task, play
from nemotron_jax.evaluation.answers import Answer, Ask
from nemotron_jax.evaluation.statistics import counts_of, pass_values
from nemotron_jax.evaluation.suite import (
    Result,
    Score,
    Suite,
    Table,
    Unavailable,
    Value,
    as_tuples,
    once_each,
)
from nemotron_jax.evaluation.tool_use.tasks import (
    KINDS,
    TOOL_TASKS,
    always_calls,
    assistant_turns,
    never_calls,
    tool_task,
)

_TOGETHER = 16  # tasks that are played side by side
_SEEDS = 2**32
# Several samples are drawn as the family's released evaluations draw them; one is greedy.
_TEMPERATURE, _TOP_P = 1.0, 0.95
_MEASURED = 8  # conversations whose length says how long a request may be


@dataclasses.dataclass(frozen=True)
class ToolOptions:
    """`tasks` in all, `k` samples of each; a turn has at most `new_tokens`."""

    kinds: tuple[str, ...] = KINDS
    tasks: int = 100
    k: int = 2
    new_tokens: int = 128
    thinking: bool = False

    def __post_init__(self) -> None:
        as_tuples(self, "kinds")
        ok = once_each(self.kinds) and all(kind in KINDS for kind in self.kinds)
        check(self, "kinds", ok, f"must be some of {', '.join(KINDS)}, each once")
        at_least_one(self, "tasks", "k", "new_tokens")
        ok = self.tasks >= len(self.kinds)
        check(self, "tasks", ok, f"must be at least {len(self.kinds)}, one of each kind")
        check(self, "thinking", isinstance(self.thinking, bool), "must be True or False")


class Episode:
    """One task while it is played, by whoever answers."""

    def __init__(self, task: Task, kind: str, sample: int) -> None:
        self.task, self.kind, self.sample = task, kind, sample
        self.session = TOOL_TASKS.start(task)
        self.messages = [dict(message) for message in task.messages]
        self.tokens = 0
        self.last = Answer()

    @property
    def over(self) -> bool:
        """Whether nothing more is to be said."""
        cut = self.last.error or self.last.finish_reason == "length"
        return self.session.over or bool(cut)

    def ask(self, options: ToolOptions, seed: int) -> Ask:
        """What to ask for the next turn."""
        number = (seed * 7919 + self.task.index) * 7919 + self.sample * 31 + len(self.messages)
        greedy = options.k == 1
        return Ask(
            messages=tuple(self.messages),
            tools=self.task.tools,
            max_new_tokens=options.new_tokens,
            temperature=0.0 if greedy else _TEMPERATURE,
            top_p=1.0 if greedy else _TOP_P,
            seed=number % _SEEDS,
            thinking=options.thinking,
        )

    def hear(self, answer: Answer) -> None:
        """Take a turn and what the office and its user say to it."""
        self.last = answer
        self.tokens += answer.tokens
        if answer.error:
            return
        message = answer.message or {"role": "assistant", "content": answer.text}
        self.messages.append(message)
        if not self.over:
            replies = [dict(reply) for reply in self.session.reply(message)]
            calls = message.get("tool_calls") or ()
            for call, reply in zip(calls, replies, strict=False):
                if isinstance(call, Mapping) and call.get("id"):  # as servers match them
                    reply["tool_call_id"] = call["id"]
            self.messages += replies


def tasks_of(options: ToolOptions, seed: int) -> list[tuple[str, Task]]:
    """The tasks with their kinds, which take turns."""
    places = [divmod(number, len(options.kinds)) for number in range(options.tasks)]
    named = [(options.kinds[kind], index) for index, kind in places]
    return [(kind, tool_task(kind, seed, index)) for kind, index in named]


def measure(context: Any, options: ToolOptions) -> Result:
    """Play all samples of all tasks."""
    tasks, done = tasks_of(options, context.seed), 0
    for first in range(0, len(tasks), _TOGETHER):
        block = tasks[first : first + _TOGETHER]
        episodes = [Episode(task, kind, n) for n in range(options.k) for kind, task in block]
        while going := [one for one in episodes if not one.over]:
            # The other samples of a task begin like its first: they are read after it.
            for some in _parts(going, len(block)):
                asks = [one.ask(options, context.seed) for one in some]
                for one, answer in zip(some, context.ask(asks), strict=True):
                    one.hear(answer)
        for place, one in enumerate(episodes):
            _keep(context, one, first + place % len(block))
        done += len(block)
        context.progress.at(done, len(tasks), "tasks")
    return summarise(context.transcripts.lines, options)


def _parts(going: Sequence[Episode], size: int) -> Iterator[Sequence[Episode]]:
    """The first samples, then all others."""
    firsts = [one for one in going if one.sample == 0]
    others = [one for one in going if one.sample > 0]
    yield from (part for part in (firsts, others) if part)


def _keep(context: Any, one: Episode, index: int) -> None:
    context.transcripts.add(
        dataclasses.replace(one.last, tokens=one.tokens),
        task=f"{one.kind}/{one.task.index}",
        index=index,
        sample=one.sample,
        seed=context.seed,
        messages=one.messages,
        gold={
            "kind": one.kind,
            "index": one.task.index,
            "stages": one.task.data["stages"],
        },
        tools=[spec["function"]["name"] for spec in one.task.tools],
    )


def score(line: Mapping[str, Any]) -> Score:
    """What a conversation is worth: the model's own turns are played again, to the state that they
    leave."""
    kind, index = line["gold"]["kind"], line["gold"]["index"]
    task = tool_task(kind, line["seed"], index)
    turns = assistant_turns(line["messages"], task)
    calls = sum(len(turn.get("tool_calls") or ()) for turn in turns)
    spoke = calls > 0 or any((turn.get("content") or "").strip() for turn in turns)
    if line["finish_reason"] == "length":
        return Score(0.0, "cut off", answered=spoke)
    verdict = play(TOOL_TASKS, task, turns)
    right = "the state that was asked for" if verdict.reward else "another state"
    if kind == "irrelevant":
        right = "no call, as is right" if verdict.reward else "a call, or no words"
    return Score(verdict.reward, f"{calls} calls, {right}", answered=spoke)


def summarise(lines: Sequence[Mapping[str, Any]], options: ToolOptions) -> Result:
    """pass@1, pass@k and pass^k over all tasks and by kind."""
    k, values, rows = options.k, {}, []
    kinds = {"": options.kinds} | {f"{kind}_": (kind,) for kind in options.kinds}
    for prefix, names in kinds.items():
        some = [line for line in lines if line["gold"]["kind"] in names]
        chance = sum(line["gold"]["kind"] == "irrelevant" for line in some) / max(len(some), 1)
        found = pass_values(some, k, unit="share of tasks", chance=chance)
        values |= {prefix + name: value for name, value in found.items()}
        if prefix:
            rows.append(_row(names[0], some, found, options))
    if not values:
        raise Unavailable("no task was played to its end; see infra_errors in transcripts.jsonl")
    columns = ("kind", "tasks", "pass@1", f"pass@{k}", f"pass^{k}", "cut off", "calls")
    columns += ("calls always", "never calls")
    title = "Tool use by kind, and what two who do not read score"
    return Result(
        values,
        counts_of(lines),
        tables=(Table(title, columns, tuple(rows)),),
        headline=("pass@1",) if k == 1 else ("pass@1", f"pass^{k}"),
    )


def _row(
    kind: str, lines: Sequence[Mapping[str, Any]], found: Mapping[str, Value], options: ToolOptions
) -> tuple:
    names = ("pass@1", f"pass@{options.k}", f"pass^{options.k}")
    places = sorted({(line["seed"], line["gold"]["index"]) for line in lines})
    tasks = [tool_task(kind, *place) for place in places]
    share = lambda of: sum(play(TOOL_TASKS, task, of(task)).reward for task in tasks) / len(tasks)
    calls = [sum(len(turn.get("tool_calls") or ()) for turn in line["messages"]) for line in lines]
    return (
        kind,
        len(tasks),
        *(found[name].mean if name in found else None for name in names),
        sum(line["finish_reason"] == "length" for line in lines),
        sum(calls) / max(len(calls), 1),
        share(always_calls),
        share(never_calls),
    )


def _ready(subject: Any, options: ToolOptions) -> None:
    if subject.url:
        return
    subject.require_tokens("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")


def _longest(subject: Any, options: ToolOptions) -> int:
    """Twice the tokens of whole right conversations, and the answers that may be longer."""
    tokenizer, longest = subject.tokenizer, 0
    for _, task in tasks_of(options, subject.seed)[: _MEASURED * len(options.kinds)]:
        said: list[dict] = []
        play(
            TOOL_TASKS, task, TOOL_TASKS.oracle(task), lambda _, more, said=said: said.extend(more)
        )
        longest = max(longest, len(encode_chat(tokenizer, said, task.tools).ids))
    return 2 * longest + 4 * options.new_tokens


SUITE = Suite(
    name="tools",
    about="tasks of an office solved by calls of its tools, judged by the state they leave",
    options=ToolOptions,
    measure=measure,
    needs="either",
    ready=_ready,
    longest=_longest,
    untrained=lambda options: dataclasses.replace(
        options, tasks=min(options.tasks, 4 * len(options.kinds)), k=1
    ),
    score=score,
    summarise=summarise,
)
