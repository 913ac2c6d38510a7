"""What users of a server get, by how many there are: tokens a second, and the first one's wait."""

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from nemotron_jax.config.checks import at_least_one, at_most, check, is_integer
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.words import FILLER, THINGS, coined
from nemotron_jax.evaluation.suite import (
    Counts,
    Result,
    Suite,
    Table,
    Unanswered,
    Unavailable,
    Value,
    as_tuples,
    once_each,
)
from nemotron_jax.evaluation.url import Url
from nemotron_jax.evaluation.waiting import side_by_side

# A row passes where the median user gets at least so many tokens a second, faster than anybody
# reads and about what agents are used to, and waits less than so long for the first.
LEAST_TOKENS_PER_S, MOST_WAIT_S = 50.0, 5.0
_MOST_STREAMS = 1024  # each is a thread
_COLUMNS = (
    "streams",
    "requests",
    "failed",
    "tokens/s a user, median",
    "slowest 1 %",
    "all tokens/s",
    "first token s, p50",
    "p99",
    "passes",
)
_FIRST_WORDS = 24  # of the request that shows how many tokens a word has
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """`streams` users at a time, each with `requests` one after the other, of about `prompt` tokens
    and `new` new ones. `start`: start this project's own server on the checkpoint."""

    streams: tuple[int, ...] = (1, 4, 16)
    prompt: int = 512
    new: int = 128
    requests: int = 2
    start: bool = False

    def __post_init__(self) -> None:
        as_tuples(self, "streams")
        ok = once_each(self.streams)
        ok = ok and all(is_integer(n) and 1 <= n <= _MOST_STREAMS for n in self.streams)
        check(self, "streams", ok, f"must be numbers from 1 to {_MOST_STREAMS}, each once")
        at_least_one(self, "prompt", "new", "requests")
        check(self, "new", self.new >= 2, "must be at least 2: a rate takes two tokens")
        at_most(self, 1_000_000, "prompt", "new", "requests")
        check(self, "start", isinstance(self.start, bool), "must be True or False")


@dataclasses.dataclass(frozen=True)
class Streamed:
    """One request: seconds to its first token and to its last, and tokens; or why it failed."""

    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    error: str = ""

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first; over all its time, where all came at once."""
        between = self.last_s - self.first_s
        return (self.tokens - 1) / between if between > 0 else self.tokens / self.last_s


@dataclasses.dataclass(frozen=True)
class Asker:
    """How a server is asked: where, with what, and how many of our words a token is."""

    url: Url
    path: str
    words_per_token: float
    options: ServingOptions
    seed: int

    def body(self, *name: int) -> dict[str, Any]:
        """A request that begins like no other, so that nothing of it is known to the server."""
        words = round(self.options.prompt * self.words_per_token)
        return body_of(self.url.model, self.path, prompt_of(words, self.seed, *name), self.options)

    def stream(self, *name: int) -> Streamed:
        """One request, timed as its user sees it."""
        began, first, last, chunks, counted = time.perf_counter(), 0.0, 0.0, 0, 0
        try:
            for chunk in self.url.stream(self.path, self.body(*name)):
                counted = (chunk.get("usage") or {}).get("completion_tokens") or counted
                if _has_text(chunk):
                    last = time.perf_counter() - began
                    first, chunks = first or last, chunks + 1
        except Unavailable as error:
            return Streamed(error=str(error))
        if not chunks:
            return Streamed(error="the answer ended without a token")
        return Streamed(first, last, int(counted) or chunks)


def prompt_of(words: int, *name: int) -> str:
    """So many words, about."""
    draws = Draws("serving", *name)
    begins = f"{coined(draws, 6)}: tell a long story with these words."
    some = [draws.choice(FILLER if draws.chance(2, 3) else THINGS) for _ in range(max(words, 10))]
    return f"{begins} {' '.join(some[9:])}"


def body_of(model: str, path: str, prompt: str, options: ServingOptions) -> dict[str, Any]:
    """A request's JSON; `min_tokens` keeps answers equally long where a server knows it."""
    body: dict[str, Any] = {"model": model, "max_tokens": options.new, "min_tokens": options.new}
    body["temperature"] = 1.0
    if path == CHAT:
        return body | {"messages": [{"role": "user", "content": prompt}]}
    return body | {"prompt": prompt}


def measure(context: Any, options: ServingOptions) -> Result:
    """Ask with each number of streams, fewest first."""
    with _server(context, options) as url:
        asker = _asker(url, options, context.seed)
        rows = {}
        for number, streams in enumerate(sorted(options.streams)):
            context.progress.at(number, len(options.streams), "numbers of streams")
            began = time.perf_counter()
            users = dict(side_by_side(partial(_user, asker, streams), streams, streams))
            found = [one for user in range(streams) for one in users[user]]
            rows[streams] = (found, time.perf_counter() - began)
    return summarise(rows)


def _user(asker: Asker, streams: int, user: int) -> list[Streamed]:
    return [asker.stream(streams, user, number) for number in range(asker.options.requests)]


def summarise(rows: dict[int, tuple[Sequence[Streamed], float]]) -> Result:
    """Figures of each number of streams, from what its requests took and the whole time."""
    values, table, says, failed = {}, [], [], []
    for streams, (found, seconds) in rows.items():
        good = [one for one in found if not one.error]
        failed += [one.error for one in found if one.error]
        if not good:
            table.append((streams, len(found), len(found), *[None] * 5, "no"))
            continue
        rates, waits = [one.tokens_per_s for one in good], [one.first_s for one in good]
        rate, wait = statistics.median(rates), statistics.median(waits)
        passes = rate >= LEAST_TOKENS_PER_S and wait < MOST_WAIT_S
        whole = sum(one.tokens for one in good) / seconds
        slowest, longest = float(np.percentile(rates, 1)), float(np.percentile(waits, 99))
        figures = (rate, slowest, whole, wait, longest, "yes" if passes else "no")
        table.append((streams, len(found), len(found) - len(good), *figures))
        users = len(good)
        values[f"user_of_{streams}_tokens_per_second"] = Value(rate, n=users, unit="tokens/s")
        values[f"all_of_{streams}_tokens_per_second"] = Value(whole, n=users, unit="tokens/s")
        says.append(
            f"{streams} at a time: {rate:.1f} tokens/s a user, the first after {wait:.2f} s (p99 "
            f"{longest:.2f} s), {len(found) - len(good)} of {len(found)} failed: "
            f"{'passes' if passes else 'does not pass'}."
        )
    if not values:
        raise Unanswered(f"every request failed: {failed[0]}")
    title = f"Serving; a row passes at {LEAST_TOKENS_PER_S:g} tokens/s and a wait under "
    return Result(
        values,
        Counts(infra_errors=len(failed)),
        timed=(Table(f"{title}{MOST_WAIT_S:g} s", _COLUMNS, tuple(table)),),
        says=tuple(says),
    )


def _asker(url: Url, options: ServingOptions, seed: int) -> Asker:
    """By chat where the server can, else by completions; a request of each is made to see."""
    words, failures = _FIRST_WORDS, []
    small = dataclasses.replace(options, new=2)
    for path in (CHAT, COMPLETIONS):
        body = body_of(url.model, path, prompt_of(words, seed, 0), small)
        try:
            tokens = url.call("POST", path, body)["usage"]["prompt_tokens"]
            return Asker(url, path, words / max(int(tokens), 1), options, seed)
        except Unavailable as error:
            failures.append(str(error))
        except (KeyError, TypeError, ValueError):
            return Asker(url, path, 0.75, options, seed)  # English words a token, about
    raise Unanswered("; ".join(failures))


def _has_text(chunk: dict[str, Any]) -> bool:
    choices = chunk.get("choices") or [{}]
    delta = choices[0].get("delta") or choices[0]
    names = ("content", "reasoning_content", "reasoning", "text", "tool_calls")
    return any(delta.get(name) for name in names)


@contextlib.contextmanager
def _server(context: Any, options: ServingOptions) -> Iterator[Url]:
    """The server that is measured, or ours on the checkpoint for as long as it is."""
    if context.url is not None:
        yield context.url
        return
    # Our words' tokens are reckoned from those of the first prompt, which is not bounded by them.
    room = 2 * (options.prompt + options.new) + 16 * _FIRST_WORDS
    command = [sys.executable, "-m", "nemotron_jax.serve", "--port=0", f"--max_length={room}"]
    command += [f"--checkpoint={context.subject.loaded_from}", f"--slots={max(options.streams)}"]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = process.stdout.readline()
            if " on http://" not in line:
                errors.seek(0)
                last = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
                raise Unavailable(f"our own server did not start: {last[:300]}")
            yield Url(line.split(" on ")[1].strip())
        finally:
            process.terminate()
            process.wait()
            process.stdout.close()


def _ready(subject: Any, options: ServingOptions) -> None:
    if not subject.url and not options.start:
        raise Unavailable(
            "it measures a server: give its URL as --checkpoint, or serving:start=True, which "
            "starts ours on the checkpoint"
        )


SUITE = Suite(
    name="serving",
    about="what users of a server get by how many there are, and how long the first token takes",
    options=ServingOptions,
    measure=measure,
    needs="either",
    ready=_ready,
)
