"""What drafts cost: a draft, a verification and a whole round against a plain step of decoding."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from nemotron_jax.decoding.generate import generate
from nemotron_jax.decoding.reading import prefill
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.rules import Asked, Free, Rules
from nemotron_jax.decoding.sampling import sample
from nemotron_jax.decoding.speculative import Standing, accept, finish_round, run_round
from nemotron_jax.decoding.step import commit, decode_step, for_decoding, verify_step
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.suite import Table
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron

COLUMNS = (
    "rows",
    "k",
    "mean length",
    "tokens/s",
    "speed-up",
    "predicted",
    "draft cost",
    "verify cost",
)


def draft_speed(
    model: Nemotron,
    prompts: Sequence[Sequence[int]],
    drafts: Sequence[int],
    *,
    new_tokens: int,
    repetitions: int,
    seed: int = 0,
) -> Table:
    """A line for each k: tokens a second sampled at temperature 1, beside plain decoding of the
    same rows, and what a draft and a verification cost in plain steps."""
    model = for_decoding(model)
    measure = functools.partial(_tokens_per_second, model, prompts, new_tokens, seed)
    lines = []
    for k in drafts:
        # Side by side, so that both meet the same state of a shared machine.
        rounds = [(measure(0), measure(k)) for _ in range(repetitions)]
        plain, (speed, length) = max(a[0] for a, _ in rounds), max(b for _, b in rounds)
        costs = measure_costs(model, prompts, k, repetitions=repetitions)
        line = (len(prompts), k, length, speed, speed / plain, costs.speed_up(length))
        lines.append((*line, costs.draft, costs.verification))
    return Table("Speculation", COLUMNS, tuple(lines))


def _tokens_per_second(
    model: Nemotron, prompts: Sequence[Sequence[int]], new_tokens: int, seed: int, k: int
) -> tuple[float, float]:
    """Of a loop that is compiled already, the prompt's prefill taken off; and the mean length."""
    run = functools.partial(generate, model, prompts, temperature=1.0, seed=seed, speculative=k)
    run(max_new_tokens=new_tokens)  # compiles
    seconds = []
    for tokens in (1, new_tokens):
        start = time.perf_counter()
        result = run(max_new_tokens=tokens)
        seconds.append(time.perf_counter() - start)
    length = result.acceptance.mean_length if k else 1.0
    return len(prompts) * (new_tokens - 1) / (seconds[1] - seconds[0]), length


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of one plain step of all rows, of one round, and of a round's verification."""

    step: float
    round: float
    verify: float
    drafts: int

    @property
    def draft(self) -> float:
        """Of one draft, in plain steps."""
        return (self.round - self.verify) / self.drafts / self.step

    @property
    def verification(self) -> float:
        """Of verifying all drafts and the token before them, in plain steps."""
        return self.verify / self.step

    def speed_up(self, mean_length: float) -> float:
        """Over plain decoding, when a round gives `mean_length` tokens."""
        return mean_length * self.step / self.round


def measure_costs(
    model: Nemotron,
    prompts: Sequence[Sequence[int]],
    k: int,
    *,
    repetitions: int = 3,
    rounds: int = 24,
) -> Costs:
    """What sampled decoding at temperature 1 spends, each kind of work in a loop of its own.

    Every round keeps one token, so that caches grow alike whatever the model accepts.
    """
    drawn = Wanted(max_new_tokens=1, temperature=1.0)
    requests = {n: Request(tuple(row), drawn, n, lambda: False) for n, row in enumerate(prompts)}
    asked = Asked.of(requests, len(prompts), Free(model.config.vocab_size))
    rules, never = Rules.create(asked, model.config.pad_token), jnp.zeros(len(prompts), bool)

    def plain(model: Nemotron, cache: Cache, token: Array) -> tuple[Cache, Array]:
        cache, logits = decode_step(model, cache, token)
        return cache, sample(logits, rules.row_keys, rules.sampling)

    def whole(model: Nemotron, cache: Cache, token: Array) -> tuple[Cache, Array]:
        round = run_round(model, Standing(cache, token, 0 * token, never), k, rules)
        kept = dataclasses.replace(round, accepted=0 * round.accepted)
        return finish_round(model, kept, round.accepted >= 0), round.given.tokens[:, 0]

    def verified(model: Nemotron, cache: Cache, token: Array) -> tuple[Cache, Array]:
        fed = (token[:, None] + jnp.arange(k + 1)) % model.config.vocab_size
        checked, hidden, logits = verify_step(model, cache, fed)
        accepted, own = accept(logits, fed[:, 1:], logits[:, :k], cache.length, rules)
        return commit(model, checked, hidden, fed, jnp.minimum(accepted, 0) + 1), own

    works = {"step": plain, "round": whole, "verify": verified}
    caches = {
        name: prefill(model, prompts, rounds + k + 2, mtp=name != "step")[0] for name in works
    }
    token = jnp.zeros(len(prompts), jnp.int32)
    loops = {name: _loop(work, rounds) for name, work in works.items()}
    best = dict.fromkeys(works, float("inf"))
    for repetition in range(repetitions + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            jax.block_until_ready(loop(model, caches[name], token))
            if repetition:  # the first compiles
                best[name] = min(best[name], (time.perf_counter() - start) / rounds)
    return Costs(**best, drafts=k)


def _loop(work: Callable, rounds: int) -> Callable:
    @jax.jit
    def run(model: Nemotron, cache: Cache, token: Array) -> tuple[Cache, Array]:
        step = lambda _, carry: work(model, *carry)
        return jax.lax.fori_loop(0, rounds, step, (cache, token))

    return run
