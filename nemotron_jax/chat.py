"""A terminal chat: python -m nemotron_jax.chat --checkpoint=DIR [--adapter=DIR].

The checkpoint is a run's directory or a model's in the hub's layout. `/reset` forgets the
conversation, `/quit` or the end of input ends the chat, `/help` says so. Ctrl-C ends an answer.
"""

import argparse
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from nemotron_jax.config.checks import check_value
from nemotron_jax.data.chat.events import (
    CallEnded,
    Content,
    Event,
    Malformed,
    ParsedTurn,
    Reasoning,
    turn_of,
)
from nemotron_jax.data.chat.hub_template import warn_of_other_template
from nemotron_jax.data.chat.parse import TurnParser
from nemotron_jax.data.chat.render import ANSWER, END, ChatOptions, Message
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.chat.tools import in_json
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.decoding.sampling import Sampling
from nemotron_jax.decoding.stream import stream_tokens
from nemotron_jax.environments.sound import sound_text
from nemotron_jax.interop.peft import load_adapter
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.pretrained import load_pretrained, load_tokenizer

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # how a terminal shows the reasoning

HELP = """/reset  forget the conversation
/quit   end the chat; so does the end of input
/help   show this
Ctrl-C  end the answer that is being written
"""

# Gives a turn's ids for a prompt's.
Writer = Callable[[Sequence[int]], Iterable[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat as the arguments say; the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        for name, least in (("max_tokens", 1), ("seed", 0), ("budget", 0)):
            value = getattr(flags, name)
            ok = value is None or least <= value < 2**31
            check_value("chat", name, value, ok, f"must be from {least} to {2**31 - 1}")
        options = ChatOptions(
            enable_thinking=not flags.no_thinking,
            low_effort=flags.low_effort,
            reasoning_budget=flags.budget,
        )
        sampling = Sampling.create(flags.temperature, top_p=flags.top_p)
        tokenizer = load_tokenizer(flags.checkpoint)
        model = load_pretrained(flags.checkpoint, flags.dtype)
        if flags.adapter:
            model = load_adapter(model, flags.adapter)
        warn_of_other_template(flags.checkpoint)
        check_vocabulary(tokenizer, model.config.vocab_size)
        writer = _writer(model, tokenizer, sampling, flags)
        dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
        system = [{"role": "system", "content": flags.system}] if flags.system else []
        reasoning = "off" if flags.no_thinking else "on (--no_thinking turns it off)"
        print(f"{flags.checkpoint}: reasoning {reasoning}; /help lists commands, /quit ends")
        limit, marks = flags.max_tokens, {"dim": dim, "plain": plain}
        chat(_lines(), writer, tokenizer, options, system=system, max_tokens=limit, **marks)
    except (ValueError, OSError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def chat(
    lines: Iterable[str],
    writer: Writer,
    tokenizer: Tokenizer,
    options: ChatOptions,
    *,
    system: Sequence[Message] = (),
    max_tokens: int | None = None,
    dim: str = "",
    plain: str = "",
    show: Callable[[str], object] | None = None,
) -> list[Message]:
    """Answer each line in turn, showing the text as it comes; the conversation at the end.

    `max_tokens` is where the writer stops of itself: an answer that is cut off there says so.
    """
    show = show or _show
    messages = list(system)
    for line in lines:
        command = line.strip()
        if command == "/quit":
            break
        if command == "/reset":
            messages = list(system)
        elif command == "/help":
            show(HELP)
        elif command:
            asked = [*messages, {"role": "user", "content": sound_text(line.rstrip("\n"))}]
            ids = writer(encode_prompt(tokenizer, asked, options=options))
            turn = _shown_turn(ids, tokenizer, options, max_tokens, _Screen(show, dim, plain))
            if turn.reasoning or turn.content or turn.calls or turn.closed:
                messages = [*asked, turn.message()]
    return messages


@dataclasses.dataclass(frozen=True)
class _Screen:
    """Where text goes, and how reasoning is marked there."""

    show: Callable[[str], object]
    dim: str
    plain: str


def _shown_turn(
    ids: Iterable[int],
    tokenizer: Tokenizer,
    options: ChatOptions,
    max_tokens: int | None,
    screen: _Screen,
) -> ParsedTurn:
    """The turn that was written, shown meanwhile, and why it ends where it does not end itself."""
    events: list[Event] = []
    written: list[int] = []
    counted = (written.append(token) or token for token in ids)
    try:
        for event in turn_events(counted, tokenizer, options):
            events.append(event)
            screen.show(_as_text(event, screen.dim, screen.plain))
    except KeyboardInterrupt:
        screen.show("\n[interrupted]")
    else:
        ended = written and written[-1] in (tokenizer.token_id(END), tokenizer.eos)
        if max_tokens is not None and len(written) >= max_tokens and not ended:
            screen.show(f"\n[cut off after {max_tokens} tokens; --max_tokens allows more]")
    screen.show("\n")
    return turn_of(events)


def turn_events(ids: Iterable[int], tokenizer: Tokenizer, options: ChatOptions) -> Iterator[Event]:
    """A turn's events while its ids arrive."""
    parser, text = TurnParser(thinking=options.enable_thinking), tokenizer.stream(show_special=True)
    for token in ids:
        yield from parser.push(text.push(token))
    yield from parser.push(text.finish())
    yield from parser.finish()


def _as_text(event: Event, dim: str, plain: str) -> str:
    if isinstance(event, Reasoning):
        return f"{dim}{event.text}{plain}"
    if isinstance(event, Content):
        return event.text
    if isinstance(event, CallEnded):
        return f"\n[calls {event.name} {in_json(event.arguments)}]\n"
    if isinstance(event, Malformed):
        return f"\n[{event.reason}]{event.text}\n"
    return ""


def _writer(
    model: Nemotron, tokenizer: Tokenizer, sampling: Sampling, flags: argparse.Namespace
) -> Writer:
    stops = (tokenizer.token_id(END), tokenizer.eos, *default_stop_tokens(model))
    answer = tokenizer.token_id(ANSWER)
    seed = flags.seed

    def write(prompt: Sequence[int]) -> Iterator[int]:
        nonlocal seed
        seed += 1
        return stream_tokens(
            model,
            prompt,
            flags.max_tokens,
            sampling=sampling,
            stop_tokens=stops,
            seed=seed,
            budget=flags.budget if not flags.no_thinking else None,
            budget_token=answer,
        )

    return write


def _lines() -> Iterator[str]:
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # input() then edits its line and has a history
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m nemotron_jax.chat", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's or a hub model's directory")
    add("--adapter", default="", help="a folder of adapters in PEFT's layout")
    add("--dtype", default="float32", help="of the model's matrices")
    add("--system", default="", help="the system message")
    add("--no_thinking", action="store_true", help="answer without reasoning")
    add("--low_effort", action="store_true", help="ask for short reasoning")
    add("--budget", type=int, default=None, help="tokens of reasoning, after which it is closed")
    add("--max_tokens", type=int, default=1024, help="new tokens of one turn at most")
    add("--temperature", type=float, default=1.0, help="0 is greedy; published: 1.0")
    add("--top_p", type=float, default=0.95, help="published: 0.95")
    add("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
