"""What an environment is: tasks drawn from a seed, a session played turn by turn, a verdict.

    environment = registry["arithmetic"]
    task = environment.split(seed=0, split="train", index=7)      # pure: the same anywhere
    with environment.start(task) as session:                      # owns every mutable thing
        while not session.over:
            turn = model(task.messages, task.tools, …)            # a Turn, a str, or a message dict
            messages = session.reply(turn)                        # tool results or the user's words
        verdict = session.verify()                                # reward in [0, 1]

A turn is structured (turns.py): text and tool calls, which the chat format of a model turns into
tokens and back. A plain string is a final text. Whatever a model sends, `reply` and `verify` never
raise: a tool's error is text that the model reads, an answer that cannot be read scores 0. When the
machinery fails (a sandbox that does not start), the verdict carries `infra_error` and its reward
means nothing: leave the sample out.
"""

import abc
import dataclasses
import hashlib
import json
import operator
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import canonical, faults, too_large
from nemotron_jax.environments.sound import sound_text
from nemotron_jax.environments.turns import Turn

SPLITS = ("train", "held_out")
# One problem in four is held out, by its hash: which side it is on depends on nothing else.
HELD_OUT_OF = 4
_ALIASES = dict.fromkeys(("held-out", "heldout", "validation", "val", "test", "eval"), "held_out")
# Draws made in search of a problem on the wanted side; a level with at least one on each side and
# dozens in all never comes near.
MAX_ATTEMPTS = 2000
# A turn beyond these ends the episode with reward 0: it bounds what any verifier has to read.
MAX_TEXT, MAX_CALLS = 200_000, 32
# A tool call or its result written out as text is forged: only the chat format writes those.
_FORGED = re.compile(r"</?tool_(?:call|response|result)s?>|<function=|<\|im_(?:start|end)\|>")


class ToolError(Exception):
    """A call that fails by the model's fault; its text is what the model reads."""


class InfraError(Exception):
    """The machinery failed; the episode gets no reward and is left out of training."""


class OutOfTime(BaseException):
    """A turn or a verdict took too long. No `Exception`, so that no tool takes it for its own."""


@dataclasses.dataclass(frozen=True)
class Draft:
    """A task before it has a name: what `Environment.draw` makes.

    messages: the opening, {"role", "content"} each.
    data: what sessions, verifier and oracle need; JSON values only.
    identity: what makes two problems the same although worded differently; None = the messages.
    """

    messages: list[dict]
    data: dict
    tools: tuple[dict, ...] = ()
    identity: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
    """One problem. Nothing in it is ever changed: a session copies what it alters."""

    id: str
    environment: str
    messages: tuple[dict, ...]
    tools: tuple[dict, ...]
    data: dict
    level: int
    seed: int = 0
    split: str = "train"
    index: int = 0

    @property
    def content_hash(self) -> str:
        """A name for what the model is shown: messages and tools."""
        return _digest([self.messages, self.tools])

    def json(self) -> str:
        """The task as one line of JSON; `from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The task whose `json` this is."""
        fields = json.loads(text)
        return cls(**fields | {key: tuple(fields[key]) for key in ("messages", "tools")})


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an episode earned. With `infra_error` set the reward means nothing."""

    reward: float
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    answer: Any = None
    infra_error: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.reward <= 1.0:
            raise ValueError(f"Verdict: reward={self.reward} is outside [0, 1]")


# Is called with a session and what its conversation has gained.
Hear = Callable[["Session", Sequence[dict]], object]


class Session:
    """One episode. Subclasses give `score`, and what they need of `tool_NAME`, `answered`."""

    # Seconds for a turn's calls together; later ones are answered "out of time". Half of what a
    # worker has by default (rl.rollout.timeout_s), so that the last call begun can end in time.
    turn_s: float = 30.0
    # Whether it has something of the machine's that other sessions may be waiting for.
    holds: bool = False

    def __init__(self, task: Task, max_turns: int = 1) -> None:
        self.task = task
        self.max_turns = max_turns
        self.turns: list[Turn] = []
        self.calls: list[tuple[str, Any, str]] = []  # name, arguments, result of each call made
        self.over = False
        self.refused: str | None = None  # why a turn ended the episode with reward 0
        self.infra_error: str | None = None
        self.faults: list[str] = []  # errors of the environment's own, which its check reports
        self._specs = {spec["function"]["name"]: spec["function"] for spec in task.tools}

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the session holds; called once more does no harm."""

    def ready(self, turn: Turn | None) -> bool:
        """Whether this turn can be played now, or the verdict found (None); never raises.

        False while other sessions hold what it needs. A loop asks again later; one that does not
        ask makes the turn wait for it.
        """
        return True

    # What a subclass fills in.

    def answered(self, text: str) -> str | None:
        """The user's next words after a turn without calls; None ends the episode."""
        return None

    def run_tool(self, name: str, arguments: dict) -> str:
        """A tool's result for arguments that fit its schema; raises ToolError for the model."""
        return getattr(self, f"tool_{name}")(**arguments)

    def score(self) -> Verdict:
        """The verdict, given that every turn was well formed."""
        raise NotImplementedError

    # What a loop calls.

    @property
    def text(self) -> str:
        """The final answer: the text of the last turn, if it called no tool."""
        return self.turns[-1].text if self.turns and not self.turns[-1].calls else ""

    def call(self, name: str, arguments: Any) -> str:
        """A tool's result, or its error as text that begins with "error:"; never raises."""
        result = self._result(name, arguments)
        self.calls.append((name, arguments, result))
        return result

    def reply(self, turn: Turn | str | dict) -> tuple[dict, ...]:
        """Play one turn: the messages that the model reads next, none when the episode is over."""
        if self.over:
            return ()
        turn = Turn.of(turn)
        self.turns.append(turn)
        self.refused = _refusal(turn)
        if self.refused:
            self.over = True
            return ()
        if turn.calls:
            results = self._results(turn)
            messages = tuple({"role": "tool", "content": sound_text(r)} for r in results)
        else:
            words = self._guarded(lambda: self.answered(turn.text))
            messages = () if words is None else ({"role": "user", "content": words},)
        self.over = self.over or not messages or len(self.turns) >= self.max_turns
        return () if self.infra_error else messages

    def verify(self) -> Verdict:
        """The verdict on the turns so far; asking again gives the same."""
        if self.infra_error:
            return Verdict(0.0, infra_error=self.infra_error)
        if self.refused:
            return Verdict(0.0, {"malformed": 1.0}, self.refused)
        if not self.turns:
            return Verdict(0.0)
        verdict = self._guarded(self.score)
        return verdict or Verdict(0.0, infra_error=self.infra_error)

    def _results(self, turn: Turn) -> list[str]:
        ends, late = time.monotonic() + self.turn_s, "error: out of time: it was not called; "
        late += f"the calls of a turn have {self.turn_s:g} s together"
        return [
            self.call(call.name, call.arguments) if time.monotonic() < ends else late
            for call in turn.calls
        ]

    def _result(self, name: str, arguments: Any) -> str:
        if name not in self._specs:
            return f"error: no tool is called {name[:60]!r}; there are {sorted(self._specs)}"
        if not isinstance(arguments, dict):
            return "error: the arguments are not a JSON object"
        if wrong := faults(arguments, self._specs[name]["parameters"]):
            return "error: " + "; ".join(wrong[:5])
        try:
            return self.run_tool(name, arguments)
        except ToolError as error:
            return f"error: {error}"
        except InfraError as error:
            self.infra_error, self.over = str(error), True
        except Exception as error:  # a model must not be able to stop the loop
            self.faults.append(f"{name}: {error!r}")
            return f"error: {type(error).__name__}: {error}"
        return "error: the tool is not available"

    def _guarded(self, step: Any) -> Any:
        try:
            return step()
        except InfraError as error:
            self.infra_error = str(error)
        except Exception as error:  # a fault of the environment, so no reward can be trusted
            self.faults.append(repr(error))
            self.infra_error = f"{self.task.environment}: {error!r}"
        self.over = True
        return None


class Environment(abc.ABC):
    """A family of tasks. The class attributes fill its row of the table."""

    name: ClassVar[str]
    summary: ClassVar[str]  # what is asked, in one line
    reward: ClassVar[str]  # the kind of reward
    counterpart: ClassVar[str]  # the released environment whose reward kind it has, or "none"
    fidelity: ClassVar[str] = "same reward kind"  # or "reduced stand-in", "templates"
    levels: ClassVar[int] = 3
    max_turns: ClassVar[int] = 1
    rate: ClassVar[str] = "plain"  # or "long", "code": slower by nature
    session: ClassVar[type[Session]]

    @abc.abstractmethod
    def draw(self, draws: Draws, level: int) -> Draft:
        """A random problem; a function of the draws and the level alone."""

    @abc.abstractmethod
    def oracle(self, task: Task) -> list[Turn | str]:
        """Turns whose playing through scores 1."""

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        """Other turns that are as right as the oracle's and score 1 as well."""
        return []

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        """Turns that this family invites to and that score 0, by the name of the trick."""
        return {}

    def slips(self, task: Task) -> dict[str, list[Turn | str]]:
        """What a learner does that has the form and not yet the way, by name; may score by luck.

        `other` plays the way through another task of the same level.
        """
        other = self.split(task.seed, task.split, task.index + 1, level=task.level)
        return {"other": self.oracle(other)}

    def unavailable(self) -> str | None:
        """Why no session can start here and what to do about it; None when one can. Cheap."""
        return None

    def start(self, task: Task) -> Session:
        """A fresh session of one of this environment's tasks."""
        if task.environment != self.name:
            raise ValueError(f"{self.name}: task {task.id!r} belongs to {task.environment!r}")
        if reason := self.unavailable():
            raise ValueError(f"{self.name}: {reason}")
        return self.session(task, self.max_turns)

    def split(self, seed: int, split: str, index: int, *, level: int | None = None) -> Task:
        """Task number `index` of a split: a pure function of the arguments.

        split: "train" or "held_out"; no problem is in both, whatever the seeds.
        level: 0 (easiest) … levels - 1; None mixes them all.
        """
        split = split_name(split, self.name)
        seed, index = operator.index(seed), operator.index(index)  # of numpy's kinds too
        if index < 0:
            raise ValueError(f"{self.name}: index={index!r} is not an integer of 0 or more")
        if level is not None and level not in range(self.levels):
            raise ValueError(f"{self.name}: level={level!r} is not one of 0 … {self.levels - 1}")
        for attempt in range(MAX_ATTEMPTS):
            draws = Draws(self.name, seed, split, index, level, attempt)
            chosen = draws.below(self.levels) if level is None else level
            draft = self.draw(draws, chosen)
            identity = draft.messages if draft.identity is None else draft.identity
            if side(identity) == split:
                name = f"{self.name}/{split}/{seed}/{index}"
                name += "" if level is None else f"/level{level}"
                shown = tuple(draft.messages), tuple(draft.tools)
                return Task(name, self.name, *shown, draft.data, chosen, seed, split, index)
        raise RuntimeError(
            f"{self.name}: level {level} has no {split} problem in {MAX_ATTEMPTS} draws; "
            f"make the level's problems more varied"
        )


def split_name(split: str, who: str) -> str:
    """The split that a name means; ValueError for none."""
    split = _ALIASES.get(split, split)
    if split not in SPLITS:
        raise ValueError(f"{who}: split={split!r} is unknown; use one of {SPLITS}")
    return split


def side(identity: Any) -> str:
    """The split that a problem belongs to, by its hash alone."""
    return "train" if int(_digest(identity)[:8], 16) % HELD_OUT_OF else "held_out"


def play(
    environment: Environment,
    task: Task,
    turns: Iterable[Turn | str | dict],
    hear: Hear | None = None,
) -> Verdict:
    """The verdict on a task played with these turns; those after its end are not asked for.

    `hear` gets the session and the conversation as it grows: the task's messages, then each turn's
    with what is said to it.
    """
    with environment.start(task) as session:
        if hear is not None:
            hear(session, task.messages)
        turns = iter(turns)
        while not session.over and (turn := next(turns, None)) is not None:
            said = session.reply(turn)
            if hear is not None:
                hear(session, (Turn.of(turn).message(), *said))
        return session.verify()


def _refusal(turn: Turn) -> str | None:
    size = len(turn.text) + len(turn.reasoning)
    if size > MAX_TEXT:
        return f"a turn of {size} characters; at most {MAX_TEXT} are read"
    if len(turn.calls) > MAX_CALLS:
        return f"{len(turn.calls)} tool calls in one turn; at most {MAX_CALLS} are made"
    if any(_oversized(call.arguments) for call in turn.calls):
        return "tool arguments nested too deep or too large"
    if _FORGED.search(turn.text):
        return "tool markup written as text"
    return None


def _oversized(arguments: Any) -> bool:
    if isinstance(arguments, str):
        return len(arguments) > MAX_TEXT
    return too_large(arguments) or _text_size(arguments) > MAX_TEXT


def _text_size(value: Any) -> int:
    """Characters in the strings of a value that is known not to be too large."""
    if isinstance(value, dict):
        return sum(len(str(key)) + _text_size(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(_text_size(item) for item in value)
    return len(value) if isinstance(value, str) else 1


def _digest(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()
