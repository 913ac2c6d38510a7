"""Supervised fine-tuning: tasks of an environment played by the model, to see what it learned."""

import contextlib
from collections.abc import Callable, Sequence

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import END, ChatOptions, Message
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.messages import ORACLE, oracle_source
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import generate
from nemotron_jax.environments.base import Environment, Session, Task, Verdict
from nemotron_jax.environments.sound import sound_value
from nemotron_jax.model.nemotron import Nemotron

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
    failed: dict[int, Verdict] = {}
    sessions = [environment.start(task) for environment, task in tasks]
    try:
        messages = [list(task.messages) for _, task in tasks]
        rows = [
            encode_prompt(tokenizer, m, t.tools, options) for m, (_, t) in _zip(messages, tasks)
        ]
        turn = 0
        while not all(s.over or place in failed for place, s in enumerate(sessions)):
            texts = _turns(model, tokenizer, rows, max_new_tokens, temperature, seed + turn)
            for place, (session, (_, task)) in enumerate(_zip(sessions, tasks)):
                if session.over or place in failed:  # its row stays: every call has one shape
                    continue
                try:
                    messages[place] += _exchanged(session, texts[place], options)
                    if not session.over:
                        rows[place] = encode_prompt(tokenizer, messages[place], task.tools, options)
                except Exception as error:
                    failed[place] = _failure(task, error)
            turn += 1
        verdicts = (failed.get(place) or _judged(one) for place, one in enumerate(sessions))
        return [(m, verdict) for m, verdict in _zip(messages, verdicts)]
    finally:
        for session in sessions:
            with contextlib.suppress(Exception):
                session.close()


def _exchanged(session: Session, text: str, options: ChatOptions) -> list[Message]:
    """A turn that the model wrote, and what the environment says to it."""
    turn = parse_turn(text, thinking=options.enable_thinking, tools=session.task.tools)
    message = sound_value(turn.message())
    return [message, *sound_value(session.reply(message))]


def _judged(session: Session) -> Verdict:
    try:
        return session.verify()
    except Exception as error:
        return _failure(session.task, error)


def _failure(task: Task, error: Exception) -> Verdict:
    return Verdict(0.0, infra_error=f"{task.environment}: {error!r}")


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


def _zip(first: Sequence, second: Sequence) -> zip:
    return zip(first, second, strict=True)
