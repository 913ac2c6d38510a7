"""One turn of a model at one call: a question or a conversation in, what the model says out."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.execution import Execution
from nemotron_jax.data.chat.events import CallEnded
from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import ANSWER, END, ChatOptions, Message
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.texts import tokenizer_of
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.model.nemotron import Nemotron


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a model says to a conversation. `finish_reason`: "stop", or "length" where it was cut
    off."""

    content: str
    reasoning: str
    calls: tuple[CallEnded, ...]  # of tools, each with `name` and `arguments`
    finish_reason: str


def chat(
    model: Nemotron,
    messages: str | Sequence[Message],
    tokenizer: Tokenizer | None = None,
    tools: Sequence[dict[str, Any]] = (),
    *,
    max_new_tokens: int = 1024,
    enable_thinking: bool = True,
    low_effort: bool = False,
    budget: int | None = None,
    speculative: int = 0,
    execution: Execution = Execution(),
    **sampling: Any,
) -> Turn:
    """The model's turn in a conversation; a text is the user's one question.

    Without a tokenizer that of the model's directory is read. `tools` are in the format of OpenAI's
    functions. `budget` closes the reasoning after so many tokens, and the prompt says so.
    `sampling` are values of `Wanted`, as in `temperature=1.0, top_p=0.95`; greedy without. Raises
    ValueError for a model of no known directory without a tokenizer, a tokenizer that is not the
    model's, or values out of range.
    """
    options = ChatOptions(
        enable_thinking=enable_thinking, low_effort=low_effort, reasoning_budget=budget
    )
    rule = "must be None with enable_thinking=False: there is no reasoning to bound"
    check_value("chat", "budget", budget, budget is None or enable_thinking, rule)
    tokenizer = tokenizer or tokenizer_of(model, "chat")
    check_vocabulary(tokenizer, model.config.vocab_size)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    prompt = encode_prompt(tokenizer, messages, tools or None, options)
    stops = {"stop_tokens": stop_tokens(model, tokenizer)} | sampling
    wanted = Wanted(max_new_tokens, budget=thinking_budget(tokenizer, budget), **stops)
    lockstep = Lockstep(model, execution, tokenizer, speculative=speculative)
    request = lockstep.submit(prompt, wanted)[0].wait()
    text = tokenizer.decode(request.tokens, show_special=True)
    turn = parse_turn(text, thinking=enable_thinking, tools=tools or None)
    return Turn(turn.content, turn.reasoning, turn.calls, request.finish_reason)


def stop_tokens(model: Nemotron, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What ends a turn."""
    return tuple({tokenizer.token_id(END), tokenizer.eos, *default_stop_tokens(model)})


def thinking_budget(tokenizer: Tokenizer, tokens: int | None) -> Budget | None:
    """The bound of a reasoning."""
    return None if tokens is None else Budget(tokens, tokenizer.token_id(ANSWER))
