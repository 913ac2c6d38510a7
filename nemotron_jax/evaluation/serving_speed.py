"""What the engine gives: throughput and latency against concurrency and context, and how its
throughput compares with `generate`."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.generate import generate
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.suite import Table
from nemotron_jax.model.nemotron import Nemotron

COLUMNS = (
    "requests",
    "context",
    "new tokens/s",
    "first token ms, median",
    "first token ms, longest",
    "between tokens ms, median",
)

_MORE = 16  # tokens that a prompt has more when it is sent again


@dataclasses.dataclass(frozen=True)
class ServingSpeed:
    """Greedy requests of random tokens, all submitted at once to an engine with as many slots as
    the highest concurrency.

    Three more numbers are ratios of speed: as many requests with prompts of mixed lengths over
    `generate` of one after another, requests that are all alike over `generate` of them as one
    batch, and the first token of a prompt of the longest context that is sent again with a few
    tokens more, over that of the first time.
    """

    concurrency: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (64, 512)
    new_tokens: int = 64
    repetitions: int = 3
    seed: int = 0

    def run(self, model: Nemotron) -> tuple[dict[str, float], Table]:
        """Values `serving_*`, and a table of concurrency and context."""
        model = for_decoding(model)
        longest = max(self.contexts) + self.new_tokens + _MORE
        sizes = EngineConfig(max(self.concurrency), longest)
        engine = Engine(model, sizes)
        programs, rows, values = engine.stats().programs, [], {}
        for context in self.contexts:
            for count in self.concurrency:
                prompts = self._prompts(model, [context] * count)
                runs = [self._serve(engine, prompts) for _ in range(self.repetitions)]
                best = min(runs, key=lambda run: run.seconds)
                rows.append((count, context, *best.figures()))
                values[f"serving_{count}x{context}_tokens_per_second"] = rows[-1][2]
        values |= self._ratios(model, engine)
        # In the same programs.
        known = Engine(model, dataclasses.replace(sizes, prefix_cache=True))
        values["serving_first_token_of_a_known_prefix"] = self._known_prefix(model, known)
        values["serving_compiled_later"] = engine.stats().programs - programs
        return values, Table("Serving", COLUMNS, tuple(rows))

    def _ratios(self, model: Nemotron, engine: Engine) -> dict[str, float]:
        count, context = max(self.concurrency), self.contexts[0]
        lengths = np.random.default_rng(self.seed).integers(context // 4 + 1, context + 1, count)
        mixed = self._prompts(model, lengths.tolist())
        alike = self._prompts(model, [context] * count)
        one_by_one = lambda: [generate(model, [prompt], self.new_tokens) for prompt in mixed]
        seconds = {
            "one_by_one": self._best(one_by_one),
            "batched": self._best(lambda: generate(model, alike, self.new_tokens)),
            "mixed": self._best(lambda: self._serve(engine, mixed)),
            "alike": self._best(lambda: self._serve(engine, alike)),
        }
        return {
            "serving_over_one_by_one": seconds["one_by_one"] / seconds["mixed"],
            "serving_over_batched": seconds["batched"] / seconds["alike"],
        }

    def _known_prefix(self, model: Nemotron, engine: Engine) -> float:
        ratios = []
        for prompt in self._prompts(model, [max(self.contexts) + _MORE] * self.repetitions):
            first, again = prompt[:-_MORE], prompt
            seconds = [self._serve(engine, [tokens]).first[0] for tokens in (first, again)]
            ratios.append(seconds[0] / seconds[1])
        return statistics.median(ratios)

    def _best(self, run: Callable[[], object]) -> float:
        """Seconds of the fastest repetition, after one that compiles."""
        seconds = []
        for _ in range(1 + self.repetitions):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    def _serve(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> "Run":
        start = time.perf_counter()
        wanted = Wanted(self.new_tokens)
        requests = [request for prompt in prompts for request in engine.submit(prompt, wanted)]
        first: dict[Request, float] = {}
        last: dict[Request, float] = {}
        going = True
        while going:
            going = engine.step()
            now = time.perf_counter() - start
            for request in requests:
                if request.tokens:
                    first.setdefault(request, now)
                if request.done:
                    last.setdefault(request, now)
        gaps = [(last[r] - first[r]) / max(len(r.tokens) - 1, 1) for r in requests]
        total = sum(len(request.tokens) for request in requests)
        return Run(time.perf_counter() - start, total, tuple(first.values()), tuple(gaps))

    def _prompts(self, model: Nemotron, lengths: Sequence[int]) -> list[list[int]]:
        generator = np.random.default_rng(self.seed)
        return [generator.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of some requests: seconds until each one's first token, and between its tokens."""

    seconds: float
    tokens: int
    first: tuple[float, ...]
    between: tuple[float, ...]

    def figures(self) -> tuple[float, float, float, float]:
        """The table's columns after the sizes."""
        milliseconds = (statistics.median(self.first), max(self.first))
        milliseconds += (statistics.median(self.between),)
        return (self.tokens / self.seconds, *(1e3 * value for value in milliseconds))
