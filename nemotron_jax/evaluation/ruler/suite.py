"""Long-context scores by kind, length and depth."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from nemotron_jax.config.checks import at_least_one, check, is_integer
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.evaluation.answers import Ask
from nemotron_jax.evaluation.ruler.kinds import KINDS, Kind
from nemotron_jax.evaluation.ruler.make import NoRoom, Prompt, make
from nemotron_jax.evaluation.ruler.scoring import score
from nemotron_jax.evaluation.statistics import counts_of, items_of, percent, value_over
from nemotron_jax.evaluation.suite import (
    Plot,
    Result,
    Suite,
    Table,
    Unavailable,
    Value,
    as_tuples,
    once_each,
)

MODES = ("completion", "chat")
_SHORTEST, _LONGEST = 512, 1 << 20  # tokens; the family is trained for a million
_TOGETHER = 4  # texts that are read side by side before their other questions come
_UNIT = "% of what was asked for"
_CHAT_MORE = 2  # times the room for an answer: a chat model says a sentence around it


@dataclasses.dataclass(frozen=True)
class RulerOptions:
    """`samples` of each kind at each length; what they ask for stands at `depths` depths in turn.

    `mode`: "completion" starts the answer for the model, "chat" asks it as a user does.
    """

    lengths: tuple[int, ...] = (2048,)
    depths: int = 10
    kinds: tuple[str, ...] = tuple(KINDS)
    samples: int = 20
    mode: str = "completion"

    def __post_init__(self) -> None:
        as_tuples(self, "lengths", "kinds")
        ok = all(is_integer(n) and _SHORTEST <= n <= _LONGEST for n in self.lengths)
        rule = f"must be numbers of tokens from {_SHORTEST} to {_LONGEST:,}, each once"
        check(self, "lengths", ok and once_each(self.lengths), rule)
        ok = once_each(self.kinds) and all(kind in list(KINDS) for kind in self.kinds)
        check(self, "kinds", ok, f"must be some of {', '.join(KINDS)}, each once")
        at_least_one(self, "depths", "samples")
        check(self, "mode", self.mode in MODES, f"must be {' or '.join(MODES)}")


def measure(context: Any, options: RulerOptions) -> Result:
    """Ask every question; the questions of one text come after it was read once."""
    template = _template_tokens(context.tokenizer, options)
    plans = [(length, name) for length in options.lengths for name in options.kinds]
    left_out: list[NoRoom] = []
    for number, (length, name) in enumerate(plans):
        context.progress.at(number, len(plans), "cells")
        kind = KINDS[name]
        try:
            groups = make(
                context.tokenizer,
                kind,
                length,
                options.samples,
                depths=options.depths,
                seed=context.seed,
                reserved=template + _room(kind, options.mode) - kind.new_tokens,
            )
        except NoRoom as error:
            left_out.append(error)
            continue
        for first in range(0, len(groups), _TOGETHER):
            block = groups[first : first + _TOGETHER]
            _ask(context, [group[0] for group in block], options)
            _ask(context, [prompt for group in block for prompt in group[1:]], options)
    if len(left_out) == len(plans):
        raise left_out[0]
    return summarise(context.transcripts.lines, options)


def _ask(context: Any, prompts: Sequence[Prompt], options: RulerOptions) -> None:
    asks = [ask_of(prompt, options.mode) for prompt in prompts]
    for prompt, ask, answer in zip(prompts, asks, context.ask(asks) if asks else (), strict=True):
        shown = {"prompt": ask.prompt} if options.mode == "completion" else {}
        shown |= {"messages": ask.messages} if options.mode == "chat" else {}
        context.transcripts.add(
            answer,
            task=prompt.task,
            index=prompt.index,
            seed=context.seed,
            gold=list(prompt.asked.gold),
            kind=prompt.kind,
            length=prompt.length,
            depth=prompt.asked.depth,
            text=prompt.text,
            chance=round(prompt.asked.chance, 6),
            **shown,
        )


def ask_of(prompt: Prompt, mode: str) -> Ask:
    """A prompt as a request."""
    room = _room(KINDS[prompt.kind], mode)
    if mode == "completion":
        return Ask(prompt.instruction + prompt.begins, max_new_tokens=room)
    message = {"role": "user", "content": prompt.instruction}
    return Ask(messages=(message,), max_new_tokens=room)


def _room(kind: Kind, mode: str) -> int:
    """Tokens that an answer may have."""
    return kind.new_tokens * (_CHAT_MORE if mode == "chat" else 1)


def summarise(lines: Sequence[Mapping[str, Any]], options: RulerOptions) -> Result:
    """Scores of 100 over all kinds, by length, by kind and by both; a grid of length and depth."""
    values = {"score": _value(lines)}
    for length in options.lengths:
        values[f"length_{length}"] = _value([one for one in lines if one["length"] == length])
    for kind in options.kinds:
        values[kind] = _value([one for one in lines if one["kind"] == kind])
    cells = {
        (kind, length): _value([x for x in lines if (x["kind"], x["length"]) == (kind, length)])
        for kind in options.kinds
        for length in options.lengths
    }
    if len(options.lengths) > 1:
        values |= {f"{kind}_{length}": value for (kind, length), value in cells.items()}
    values = {name: value for name, value in values.items() if value is not None}
    if not values:
        raise Unavailable("no question was answered; see infra_errors in transcripts.jsonl")
    return Result(
        values,
        counts_of(lines),
        tables=(_by_kind(cells, options), *_by_depth(lines, options)),
        plots=_plots(lines, options),
        headline=("score",),
        says=_sentences(values["score"], cells, options),
    )


def _value(lines: Sequence[Mapping[str, Any]]) -> Value | None:
    if not (items := items_of(lines)):
        return None
    chance = 100 * sum(line["chance"] for line in lines) / len(lines)
    return percent(value_over(items, unit=_UNIT, chance=chance))


def _by_kind(cells: Mapping[tuple[str, int], Value | None], options: RulerOptions) -> Table:
    mean = lambda value: None if value is None else value.mean
    rows = tuple(
        (kind, *(mean(cells[kind, length]) for length in options.lengths)) for kind in options.kinds
    )
    columns = ("kind", *(f"{length:,} tokens" for length in options.lengths))
    return Table(f"Score by kind and length, {options.samples} questions a cell", columns, rows)


def _by_depth(lines: Sequence[Mapping[str, Any]], options: RulerOptions) -> tuple[Table, ...]:
    grid = _grid(lines)
    depths = sorted({depth for depth, _ in grid})
    rows = tuple(
        (f"{100 * depth:.0f} %", *(_mean(grid.get((depth, n))) for n in options.lengths))
        for depth in depths
    )
    kinds = {line["kind"] for line in lines if line["depth"] is not None}
    title = f"Score by depth and length, over the {len(kinds)} kinds that ask at one depth"
    columns = ("depth", *(f"{length:,} tokens" for length in options.lengths))
    return (Table(title, columns, rows),) if rows else ()


def _grid(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[float, int], list[float]]:
    grid: dict[tuple[float, int], list[float]] = {}
    for line in lines:
        if line["depth"] is not None and line["score"] is not None:
            grid.setdefault((line["depth"], line["length"]), []).append(100 * line["score"])
    return grid


def _mean(found: Sequence[float] | None) -> float | None:
    return sum(found) / len(found) if found else None


def _plots(lines: Sequence[Mapping[str, Any]], options: RulerOptions) -> tuple[Plot, ...]:
    grid = _grid(lines)
    curves = {
        f"{length:,} tokens": [(100 * d, _mean(grid[d, n])) for d, n in sorted(grid) if n == length]
        for length in options.lengths
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ()
    title, x = "RULER-style retrieval by depth", "depth of what is asked for (% of the text)"
    return (Plot("ruler_by_depth", title, x, f"score ({_UNIT})", curves),)


def _sentences(
    score: Value, cells: Mapping[tuple[str, int], Value | None], options: RulerOptions
) -> tuple[str, ...]:
    low, high = score.interval or (score.mean, score.mean)
    lengths = " and ".join(f"{length:,}" for length in options.lengths)
    says = (
        f"Of what {len(options.kinds)} kinds of RULER-style tasks at {lengths} tokens ask for, "
        f"{score.mean:.1f} % was named (95 %: {low:.1f} to {high:.1f}; a guess gives "
        f"{score.chance or 0:.1f}).",
    )
    missing = [f"{kind} at {length:,}" for (kind, length), value in cells.items() if value is None]
    return (*says, f"No room for {', '.join(missing)} tokens.") if missing else says


def _template_tokens(tokenizer: Any, options: RulerOptions) -> int:
    """Tokens that the chat template takes."""
    if options.mode == "completion":
        return 0
    return len(encode_prompt(tokenizer, [{"role": "user", "content": "a"}])) + 1


def _ready(subject: Any, options: RulerOptions) -> None:
    if options.mode == "chat":
        subject.require_tokens("<|im_start|>", way_out="mode=completion")


SUITE = Suite(
    name="ruler",
    about="RULER-style retrieval, tracing, counting and reading in texts that are made here",
    options=RulerOptions,
    measure=measure,
    needs="either",
    ready=_ready,
    longest=lambda subject, options: max(options.lengths),
    untrained=lambda options: dataclasses.replace(
        options, lengths=(min(options.lengths),), samples=min(options.samples, 2)
    ),
    score=score,
    summarise=summarise,
)
