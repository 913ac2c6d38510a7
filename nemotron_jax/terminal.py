"""A terminal chat: python -m nemotron_jax.chat --checkpoint=DIR [--adapter=DIR].

The checkpoint is a run's directory or a model's in the hub's layout. `/reset` forgets the
conversation, `/quit` or the end of input ends the chat, `/help` says so. Ctrl-C ends an answer.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from nemotron_jax.answer import stop_tokens, thinking_budget
from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import EXPERTS
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.config.mesh_text import mesh_from_text
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
from nemotron_jax.data.chat.parse import turn_events
from nemotron_jax.data.chat.render import END, ChatOptions, Message
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.chat.tools import in_json
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generator import Generator
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.environments.sound import sound_text
from nemotron_jax.host import keep_compiled_programs, show_cpu_devices
from nemotron_jax.interop.peft import load_adapter
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.pretrained import load_rounded, load_tokenizer

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # how a terminal shows the reasoning

HELP = """/reset  forget the conversation
/quit   end the chat; so does the end of input
/help   show this
Ctrl-C  end the answer that is being written
"""

_PREFILL_CHUNK = 256  # tokens of one prefill call, after each of which the prompt is remembered
_PAGE_TOKENS = 64  # prompts are known by whole pages

# Gives a turn's ids for a prompt's.
Writer = Callable[[Sequence[int]], Iterable[int]]


class ConversationFull(ValueError):
    """The conversation has no room for another token."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Chat as the arguments say; the exit status."""
    flags = _parser().parse_args(arguments)
    keep_compiled_programs()
    try:
        wanted = _checked(flags)
        options = ChatOptions(
            enable_thinking=not flags.no_thinking,
            low_effort=flags.low_effort,
            reasoning_budget=flags.budget,
        )
        mesh = mesh_from_text(flags.mesh)
        if mesh is not None:
            show_cpu_devices(mesh.size)
        tokenizer = load_tokenizer(flags.checkpoint)
        layout = "training" if flags.adapter else "decoding"  # adapters go on stacks of layers
        model = load_rounded(
            flags.checkpoint, flags.dtype, mesh=mesh, experts=flags.experts, layout=layout
        )
        if flags.adapter:
            model = load_adapter(model, flags.adapter)
        warn_of_other_template(flags.checkpoint)
        check_vocabulary(tokenizer, model.config.vocab_size)
        wanted = dataclasses.replace(
            wanted,
            stop_tokens=stop_tokens(model, tokenizer),
            budget=None if flags.no_thinking else thinking_budget(tokenizer, flags.budget),
        )
        print(f"{flags.checkpoint}: compiling", flush=True)
        engine = make_engine(model, tokenizer, flags.max_length, flags.speculative)
        writer = engine_writer(engine, wanted, flags.max_length)
        dim, plain = (DIM, PLAIN) if sys.stdout.isatty() else ("", "")
        system = [{"role": "system", "content": flags.system}] if flags.system else []
        reasoning = "off" if flags.no_thinking else "on (--no_thinking turns it off)"
        print(f"reasoning {reasoning}; /help lists commands, /quit ends")
        chat(_lines(), writer, tokenizer, options, system=system, dim=dim, plain=plain)
    except (ValueError, OSError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _checked(flags: argparse.Namespace) -> Wanted:
    """What each turn is to be, as far as the flags say it; raises ValueError for a wrong one."""
    least = {"max_tokens": 1, "max_length": 2, "seed": 0, "budget": 0, "speculative": 0}
    for name, bound in least.items():
        value = getattr(flags, name)
        ok = value is None or bound <= value < 2**31
        check_value("chat", name, value, ok, f"must be from {bound} to {2**31 - 1}")
    return Wanted(
        flags.max_tokens, temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed
    )


def chat(
    lines: Iterable[str],
    writer: Writer,
    tokenizer: Tokenizer,
    options: ChatOptions,
    *,
    system: Sequence[Message] = (),
    dim: str = "",
    plain: str = "",
    show: Callable[[str], object] | None = None,
) -> list[Message]:
    """Answer each line in turn, showing the text as it comes; the conversation at the end."""
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
            turn = _shown_turn(ids, tokenizer, options, _Screen(show, dim, plain))
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
    screen: _Screen,
) -> ParsedTurn:
    """The turn that was written, shown meanwhile, and why it ends where it does not end itself."""
    events: list[Event] = []
    written: list[int] = []
    counted = (written.append(token) or token for token in ids)
    try:
        for event in turn_events(counted, tokenizer, thinking=options.enable_thinking):
            events.append(event)
            screen.show(_as_text(event, screen.dim, screen.plain))
    except KeyboardInterrupt:
        screen.show("\n[interrupted]")
    except ConversationFull as error:
        screen.show(f"[{error}]")
    else:
        if written and written[-1] not in (tokenizer.token_id(END), tokenizer.eos):
            said = f"cut off after {len(written)} tokens; --max_tokens or --max_length allow more"
            screen.show(f"\n[{said}]")
    screen.show("\n")
    return turn_of(events)


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


def make_engine(
    model: Nemotron, tokenizer: Tokenizer, max_length: int, speculative: int = 0
) -> Engine:
    """An engine for one conversation, which knows the beginning of the next turn's prompt."""
    config = EngineConfig(
        slots=1,
        max_length=max_length,
        page_tokens=_PAGE_TOKENS,
        prefix_cache=True,
        speculative=speculative,
        prefill_shapes=((1, _PREFILL_CHUNK),),
    )
    return Engine(model, config, tokenizer=tokenizer)


def engine_writer(engine: Generator, wanted: Wanted, max_length: int) -> Writer:
    """Writes turns with an engine, each with a seed of its own: `wanted.seed` and those after it.
    Together with its prompt a turn is at most `max_length` tokens long."""
    seeds = itertools.count(wanted.seed)

    def write(prompt: Sequence[int]) -> Iterator[int]:
        room = max_length - len(prompt)
        if room < 1:
            raise ConversationFull(
                f"the conversation has {len(prompt)} tokens, which leaves no room to answer; "
                f"/reset forgets it, and --max_length={max_length} can be raised"
            )
        limit = min(wanted.max_new_tokens, room)
        one = dataclasses.replace(wanted, max_new_tokens=limit, seed=next(seeds) % 2**32)
        (request,) = engine.submit(prompt, one)
        try:
            yield from request
        finally:
            request.cancel()  # an interrupt ends the answer

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
    add("--dtype", default="float32", help="of the matrices; bfloat16 takes half the memory")
    add("--experts", default="dense", choices=EXPERTS, help="nvfp4: routed experts are codes")
    add("--mesh", default="", help="axes of the mesh, as in tensor=2,expert=2; empty: one device")
    add("--system", default="", help="the system message")
    add("--no_thinking", action="store_true", help="answer without reasoning")
    add("--low_effort", action="store_true", help="ask for short reasoning")
    add("--budget", type=int, default=None, help="tokens of reasoning, after which it is closed")
    add("--max_tokens", type=int, default=1024, help="new tokens of one turn at most")
    add("--max_length", type=int, default=8192, help="tokens of the whole conversation at most")
    add("--speculative", type=int, default=0, help="tokens drafted at a time by the MTP block")
    add("--temperature", type=float, default=1.0, help="0 is greedy; published: 1.0")
    add("--top_p", type=float, default=0.95, help="published: 0.95")
    add("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main())
