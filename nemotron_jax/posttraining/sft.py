"""Supervised fine-tuning: tasks of an environment played by the model, to see what it learned."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import END, ChatOptions, Message
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.messages import ORACLE, oracle_source
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import generate
from nemotron_jax.environments.base import Environment, Task, Verdict
from nemotron_jax.environments.sound import sound_value
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.playing.players import Here, Reply, failure

# Oracles do not think aloud, so the model is asked not to.
NO_THINKING = ChatOptions(enable_thinking=False)

Played = tuple[list[Message], Verdict]


def success_evaluator(
    tokenizer: Tokenizer, config: RunConfig
) -> Callable[[Nemotron, Execution], dict[str, float]] | None:
    """A function of a model: `success`, its mean reward on held-out tasks of the oracle sources.

    None where the config plays no tasks or no source is an oracle. Tasks are those that the oracle
    sources hold out, `sft.success_tasks` of each, decoded greedily.
    """
    sources = [source for source in config.data.sources if source.startswith(ORACLE)]
    if not sources or not config.sft.success_tasks:
        return None
    tasks = [
        (environment, environment.split(config.seed, "held_out", index, level=level))
        for environment, level in map(oracle_source, sources)
        for index in range(config.sft.success_tasks)
    ]

    def evaluate(model: Nemotron, execution: Execution) -> dict[str, float]:
        played = play_tasks(model, tokenizer, tasks, max_new_tokens=config.sft.success_tokens)
        # Where the environment failed, nothing is known of the model.
        counted = [verdict.reward for _, verdict in played if verdict.infra_error is None]
        return {"success": sum(counted) / max(len(counted), 1)}

    return evaluate


def play_tasks(
    model: Nemotron,
    tokenizer: Tokenizer,
    tasks: Sequence[tuple[Environment, Task]],
    *,
    options: ChatOptions = NO_THINKING,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Played]:
    """Each task's messages and verdict, all tasks played side by side, a turn at a time.

    A turn is parsed as it was written: a malformed call, or a turn that does not end within
    `max_new_tokens`, is what the environment gets. What fails in one task costs no other.
    """
    rows = [encode_prompt(tokenizer, t.messages, t.tools, options) for _, t in tasks]
    places = [_Place(task, list(task.messages)) for _, task in tasks]
    with contextlib.closing(Here()) as players:
        players.start_with(tasks)
        turn = 0
        while going := {n: one for n, one in enumerate(places) if not one.over}:
            asked: dict[int, Message | None] = {n: None for n, o in going.items() if o.waiting}
            if len(asked) < len(going):  # rows that are over stay: every call has one shape
                texts = _turns(model, tokenizer, rows, max_new_tokens, temperature, seed + turn)
                written = {n: one for n, one in going.items() if n not in asked}
                asked |= {n: one.write(texts[n], options) for n, one in written.items()}
            asked = {n: message for n, message in asked.items() if not places[n].over}
            for n, reply in players.reply(asked).items():
                rows[n] = places[n].hear(reply, tokenizer, options) or rows[n]
            players.end([n for n, one in going.items() if one.failed])
            turn += 1
        verdicts = players.verify()
    return [(one.messages, one.failed or v) for one, v in zip(places, verdicts, strict=True)]


@dataclasses.dataclass
class _Place:
    """A task while it is played. What fails in it costs no other."""

    task: Task
    messages: list[Message]
    over: bool = False
    waiting: bool = False  # for a sandbox, and so for the answer to its last turn
    failed: Verdict | None = None

    def write(self, text: str, options: ChatOptions) -> Message:
        """The message of a turn that the model wrote."""
        with self._failing():
            turn = parse_turn(text, thinking=options.enable_thinking, tools=self.task.tools)
            self.messages.append(sound_value(turn.message()))
        return self.messages[-1]

    def hear(self, reply: Reply, tokenizer: Tokenizer, options: ChatOptions) -> list[int]:
        """The prompt of the next turn; empty where there is none."""
        self.over, self.waiting = reply.over, reply.waiting
        if self.waiting:
            return []
        with self._failing():
            self.messages += sound_value(reply.messages)
            if self.over:
                return []
            if not reply.messages:
                raise ValueError("it goes on and says nothing")
            return encode_prompt(tokenizer, self.messages, self.task.tools, options)
        return []

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed, self.over = failure(self.task, error), True


def _turns(
    model: Nemotron,
    tokenizer: Tokenizer,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    result = generate(
        model,
        rows,
        max_new_tokens,
        temperature=temperature,
        stop_tokens=(tokenizer.token_id(END),),
        seed=seed,
    )
    found = zip(result.tokens, result.lengths, strict=True)
    return [tokenizer.decode(new[:length], show_special=True) for new, length in found]
