"""What the model's own drafts are worth: how many stand, and what a round of them costs."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nemotron_jax.data.corpus import Corpus
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.decoding.generate import generate
from nemotron_jax.decoding.reading import prefill
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.rules import Asked, Free, Rules
from nemotron_jax.decoding.sampling import sample
from nemotron_jax.decoding.speculative import Standing, accept, finish_round, run_round
from nemotron_jax.decoding.step import (
    commit,
    decode_step,
    for_decoding,
    verify_step,
)
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.evaluator import Plot, Result, Subject, Table
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.types import Batch

COLUMNS = ("rows", "k", "AL", "tokens/s", "speed-up", "predicted", "draft cost", "verify cost")


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


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """Drafts on held-out text: teacher-forced, sampled at temperature 1, and greedy.

    Teacher-forced, the draft of depth d at each place stands with probability sum(min(p, q)) of
    what model and draft give the same next token; the acceptance length of k drafts is
    1 + sum over d <= k of the mean product of the first d. Greedy text repeats itself in small
    models and flatters drafts, so the share of 4-grams that came before stands beside it.
    """

    corpus: Corpus
    batches: tuple[Batch, ...]
    drafts: tuple[int, ...] = (1, 2, 3, 5, 7)
    batch_sizes: tuple[int, ...] = (1, 8)
    prompts: int = 16
    prompt_tokens: int = 64
    new_tokens: int = 128
    repetitions: int = 3
    seed: int = 0
    name: str = "acceptance"

    def run(self, model: Nemotron) -> Result:
        """Values `al_*_k` by k, `speed_up_*`, `draft_cost` and `verify_4_cost` of one row."""
        if model.mtp_block is None:
            raise ValueError("suite 'acceptance': this model has no MTP block to draft with")
        overlaps = self.teacher_forced(model)
        model = for_decoding(model)
        lengths = {k: acceptance_length(overlaps[:, :k]) for k in self.drafts}
        values = {f"al_teacher_forced_{k}": length for k, length in lengths.items()}
        sampled, greedy = self._generated(model)
        for name, rows in (("sampled", sampled), ("greedy", greedy)):
            values |= {f"al_{name}_{k}": found.mean_length for k, (found, _) in rows.items()}
        values["repeated_4_grams_greedy"] = greedy[self.drafts[0]][1]
        values["repeated_4_grams_sampled"] = sampled[self.drafts[0]][1]
        speeds = [self._speed(model, rows, sampled) for rows in self.batch_sizes]
        for row in (row for table in speeds for row in table):
            values[f"speed_up_{row[0]}_rows_{row[1]}"] = row[4]
            values[f"predicted_speed_up_{row[0]}_rows_{row[1]}"] = row[5]
            values[f"draft_cost_{row[0]}_rows_{row[1]}"] = row[6]
            values[f"verify_cost_{row[0]}_rows_{row[1] + 1}_tokens"] = row[7]
        by_position = _by_position(overlaps, sampled, greedy)
        return Result(
            values=values,
            n=len(overlaps),
            counted="places of held-out text",
            tables=(
                by_position,
                Table("Speed by rows and drafts", COLUMNS, tuple(r for t in speeds for r in t)),
            ),
            plots=(_plot(lengths, sampled, greedy),),
        )

    def teacher_forced(self, model: Nemotron) -> Float[np.ndarray, "N k"]:
        """By place and depth, the chance that a draft stands where all that follows is the text."""
        deepest = max(self.drafts)
        found = [np.asarray(_overlaps(model, batch, deepest)) for batch in self.batches]
        whole = [_whole(np.asarray(batch.segment_ids), deepest) for batch in self.batches]
        kept = [overlap[mask] for overlap, mask in zip(found, whole, strict=True)]
        return np.concatenate(kept)

    def _generated(self, model: Nemotron) -> tuple[dict, dict]:
        """By k, acceptance and the share of repeated 4-grams: sampled, and greedy."""
        prompts = self._prompts(self.prompts)
        found: tuple[dict, dict] = ({}, {})
        for table, temperature in zip(found, (1.0, 0.0), strict=True):
            for k in self.drafts:
                options = {"temperature": temperature, "speculative": k, "seed": self.seed}
                result = generate(model, prompts, self.new_tokens, **options)
                table[k] = (result.acceptance, repeated(result.tokens, 4))
        return found

    def _speed(self, model: Nemotron, rows: int, sampled: dict) -> list[tuple]:
        """A line for each k: sampled tokens a second, beside plain decoding of the same rows."""
        prompts = self._prompts(rows)
        measure = functools.partial(self._tokens_per_second, model, prompts)
        lines = []
        for k in self.drafts:
            # Side by side, so that both meet the same state of a shared machine.
            rounds = [(measure(0), measure(k)) for _ in range(self.repetitions)]
            plain, (speed, length) = max(a[0] for a, _ in rounds), max(b for _, b in rounds)
            costs = measure_costs(model, prompts, k, repetitions=self.repetitions)
            line = (rows, k, length, speed, speed / plain, costs.speed_up(length))
            lines.append((*line, costs.draft, costs.verification))
        return lines

    def _tokens_per_second(
        self, model: Nemotron, prompts: list[list[int]], k: int
    ) -> tuple[float, float]:
        """Of a loop that is compiled already, the prompt's prefill taken off; and the AL."""
        options = {"temperature": 1.0, "seed": self.seed, "speculative": k}
        generate(model, prompts, self.new_tokens, **options)  # compiles
        seconds = []
        for tokens in (1, self.new_tokens):
            start = time.perf_counter()
            result = generate(model, prompts, tokens, **options)
            seconds.append(time.perf_counter() - start)
        length = result.acceptance.mean_length if k else 1.0
        return len(prompts) * (self.new_tokens - 1) / (seconds[1] - seconds[0]), length

    def _prompts(self, count: int) -> list[list[int]]:
        rows = np.concatenate([np.asarray(batch.tokens) for batch in self.batches])
        segments = np.concatenate([np.asarray(batch.segment_ids) for batch in self.batches])
        length = min(self.prompt_tokens, rows.shape[1])
        alone = np.flatnonzero(segments[:, 0] == segments[:, length - 1])
        if not len(alone):
            raise ValueError(
                f"suite 'acceptance': no held-out row begins with {length} tokens of one document; "
                "give more held-out text or a smaller prompt_tokens"
            )
        return [rows[alone[n % len(alone)], :length].tolist() for n in range(count)]


def make(subject: Subject) -> Acceptance:
    """The suite on the subject's held-out text."""
    config = subject.require_config("acceptance")
    rows = min(held_out_row_count(subject.corpus, config.data), 32)
    batches = tuple(held_out_batches(subject.corpus, config.data, 0, rows))
    return Acceptance(subject.corpus, batches, seed=subject.seed)


def acceptance_length(overlaps: Float[np.ndarray, "N k"]) -> float:
    """Tokens that a verification gives on average, the model's own counted."""
    return 1 + float(np.cumprod(overlaps, axis=1).mean(axis=0).sum())


def repeated(tokens: Int[np.ndarray, "B N"], length: int) -> float:
    """Share of the n-grams of each row that stand earlier in the row."""
    grams = np.lib.stride_tricks.sliding_window_view(tokens, length, axis=1)
    distinct = sum(len({tuple(gram) for gram in row.tolist()}) for row in grams)
    return 1 - distinct / (grams.shape[0] * grams.shape[1])


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


@functools.partial(jax.jit, static_argnames="deepest")
def _overlaps(model: Nemotron, batch: Batch, deepest: int) -> Float[Array, "B T k"]:
    """By depth d, sum(min(p, q)) of the token d + 1 further on; meaningless at a document's end."""
    hidden = model(batch.tokens, segment_ids=batch.segment_ids).hidden
    probabilities = jax.nn.softmax(model.logits(hidden))
    found = []
    for depth in range(1, deepest + 1):
        drafted = model.mtp(hidden, batch.tokens, depth, batch.segment_ids).hidden
        q = jax.nn.softmax(model.logits(drafted))
        p = jnp.pad(probabilities[:, depth:], ((0, 0), (0, depth), (0, 0)))
        found.append(jnp.sum(jnp.minimum(p, q), axis=-1))
    return jnp.stack(found, axis=-1)


def _whole(segments: Int[np.ndarray, "B T"], deepest: int) -> np.ndarray:
    """Places whose next `deepest` tokens stand in the same row and document."""
    later = np.pad(segments[:, deepest:], ((0, 0), (0, deepest)))
    return (segments > 0) & (later == segments)


def _by_position(overlaps: np.ndarray, sampled: dict, greedy: dict) -> Table:
    deepest = max(sampled)
    columns = zip(
        range(1, deepest + 1),
        overlaps.mean(axis=0).tolist(),
        _conditional(sampled[deepest][0].by_position),
        _conditional(greedy[deepest][0].by_position),
        strict=True,
    )
    return Table(
        f"Chance that a draft stands when those before it did, k = {deepest}",
        ("position", "teacher-forced", "sampled", "greedy"),
        tuple(columns),
    )


def _conditional(by_position: Sequence[float]) -> list[float]:
    before = (1.0, *by_position[:-1])
    return [rate / max(last, 1e-9) for rate, last in zip(by_position, before, strict=True)]


def _plot(lengths: dict, sampled: dict, greedy: dict) -> Plot:
    curve = lambda found: tuple((k, found[k][0].mean_length) for k in found)
    return Plot(
        name="acceptance_length",
        title="Tokens that one verification gives",
        x_label="drafts k",
        y_label="tokens",
        curves={
            "teacher-forced": tuple(lengths.items()),
            "sampled": curve(sampled),
            "greedy": curve(greedy),
        },
        baselines={"plain decoding": 1.0},
    )
