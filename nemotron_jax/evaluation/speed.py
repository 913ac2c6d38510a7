"""Tokens per second of training, prefill and decoding of one model on the present device."""

import dataclasses
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from nemotron_jax.config.checks import at_least_one, check, is_integer
from nemotron_jax.config.engine import MOST_DRAFTS
from nemotron_jax.config.run import RunConfig, ScheduleConfig, TrainingConfig
from nemotron_jax.data.packing import Row, lookahead_of, make_batch
from nemotron_jax.decoding.generate import generate
from nemotron_jax.decoding.reading import prefill
from nemotron_jax.evaluation.acceptance import prompts_of
from nemotron_jax.evaluation.context import Context
from nemotron_jax.evaluation.draft_speed import draft_speed
from nemotron_jax.evaluation.serving_speed import ServingSpeed
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Result, Suite, Table, Value, as_tuples, once_each
from nemotron_jax.model.adapters import merge_adapters
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.training.prepared import Prepared, first_state, prepare_run
from nemotron_jax.training.state import TrainState
from nemotron_jax.training.step import make_train_step

DRAFT_ROWS = (1, 8)  # one, which reads every weight for a token, and as many as a small server's
COLUMNS = ("what", "rows", "tokens a row", "best tokens/s", "median tokens/s", "compile s")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Repetitions of one piece of work after a first one that compiled it."""

    seconds: tuple[float, ...]
    compile_s: float  # how much longer the first run took than the fastest
    tokens: int

    @property
    def best(self) -> float:
        """Tokens per second of the fastest repetition."""
        return self.tokens / min(self.seconds)

    @property
    def median(self) -> float:
        """Tokens per second of the middle repetition."""
        return self.tokens / statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class SpeedTest:
    """Times a model at the sizes of `config.data` (or the default ones), on random tokens.

    Training counts the tokens of one optimizer step, prefill those of one row of a training row's
    length, decoding the new greedy tokens of 1 and of `batch_size` rows. Their prompt is a single
    token, whose prefill is timed with them: it is too short to be told from noise and taken off.
    `serving` measures the engine.
    """

    config: RunConfig | None
    repetitions: int = 3
    new_tokens: int = 128
    seed: int = 0
    serving: ServingSpeed | None = ServingSpeed()
    name: str = "speed"

    def run(self, model: Nemotron) -> Result:
        """Values `*_tokens_per_second` (best repetition), `*_compile_s`, `peak_memory_mb`, and the
        engine's `serving_*`."""
        config = _config_of(model, self.config)
        rows, length = config.data.batch_size, config.data.sequence_length
        timings = {
            "prefill": (1, length, self._prefill(model, 1, length)),
            "decode_1_row": (1, self.new_tokens, self._decode(model, 1)),
            f"decode_{rows}_rows": (rows, self.new_tokens, self._decode(model, rows)),
            "train": (rows, length, self._train(model, config)),
        }
        table = tuple(
            (name, batch, tokens, timing.best, timing.median, timing.compile_s)
            for name, (batch, tokens, timing) in timings.items()
        )
        values = {f"{name}_tokens_per_second": t.best for name, (_, _, t) in timings.items()}
        memory = peak_memory_mb()  # of these kinds of work; the engine's follows
        tables = [Table("Speed", COLUMNS, table), Table("Memory", ("peak, MB",), ((memory,),))]
        if self.serving is not None:
            found, of_engine = self.serving.run(model)
            values |= {name: v for name, v in found.items() if name.endswith("_per_second")}
            rest = [item for item in found.items() if item[0] not in values]
            tables += [of_engine, Table("The engine", ("ratio of speeds", ""), tuple(rest))]
        each = {
            name: Value(value, n=self.repetitions, unit="tokens/s")
            for name, value in values.items()
        }
        return Result(each, timed=tuple(tables), headline=("decode_1_row_tokens_per_second",))

    def _train(self, model: Nemotron, config: RunConfig) -> Timing:
        data, depths = config.data, config.training.mtp_depths
        length = data.sequence_length
        tokens = self._tokens(model, data.batch_size, length + lookahead_of(depths))
        batch = make_batch([Row(row, np.ones_like(row)) for row in tokens], depths)
        prepared = prepare_run(config)
        step = make_train_step(prepared)
        box = [_fresh_state(prepared, model)]

        def run() -> float:
            start = time.perf_counter()
            box[0], metrics = step(box[0], batch)
            jax.block_until_ready((box[0], metrics))
            return time.perf_counter() - start

        return self._timed(run, data.batch_size * length)

    def _prefill(self, model: Nemotron, rows: int, length: int) -> Timing:
        prompt = self._tokens(model, rows, length).tolist()

        def run() -> float:
            start = time.perf_counter()
            jax.block_until_ready(prefill(model, prompt, extra=1))
            return time.perf_counter() - start

        return self._timed(run, rows * length)

    def _decode(self, model: Nemotron, rows: int) -> Timing:
        prompt = self._tokens(model, rows, 1).tolist()

        def run() -> float:
            start = time.perf_counter()
            generate(model, prompt, self.new_tokens)
            return time.perf_counter() - start

        return self._timed(run, rows * self.new_tokens)

    def _timed(self, run: Callable[[], float], tokens: int) -> Timing:
        first, *seconds = (run() for _ in range(1 + self.repetitions))
        return Timing(tuple(seconds), max(first - min(seconds), 0.0), tokens)

    def _tokens(self, model: Nemotron, rows: int, length: int) -> Int[np.ndarray, "B T"]:
        generator = np.random.default_rng(self.seed)
        return generator.integers(0, model.config.vocab_size, (rows, length)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Options:
    """`repetitions` of each kind of work are timed, the best of them counts; `serving`: whether the
    engine is timed too; `drafts`: numbers of drafts that are timed beside plain decoding."""

    repetitions: int = 3
    new_tokens: int = 128
    serving: bool = True
    drafts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        as_tuples(self, "drafts")
        ok = all(is_integer(k) and 1 <= k <= MOST_DRAFTS for k in self.drafts)
        ok = ok and (not self.drafts or once_each(self.drafts))
        rule = f"must be numbers from 1 to {MOST_DRAFTS}, each once, as in (1,3)"
        check(self, "drafts", ok, rule)
        at_least_one(self, "repetitions", "new_tokens")
        check(self, "serving", isinstance(self.serving, bool), "must be True or False")


def measure(context: Context, options: Options) -> Result:
    """The suite at the sizes of the subject's configuration, or at the default ones."""
    found = SpeedTest(
        context.subject.config,
        repetitions=options.repetitions,
        new_tokens=options.new_tokens,
        seed=context.seed,
        serving=ServingSpeed(repetitions=options.repetitions) if options.serving else None,
    ).run(context.model)
    tables = [
        draft_speed(
            context.model,
            [prompt for part in prompts_of(context.subject, rows).values() for prompt in part][
                :rows
            ],
            options.drafts,
            new_tokens=options.new_tokens,
            repetitions=options.repetitions,
            seed=context.seed,
        )
        for rows in (DRAFT_ROWS if options.drafts else ())
    ]
    return dataclasses.replace(found, timed=(*found.timed, *tables))


def _ready(subject: Subject, options: Options) -> None:
    if options.drafts:
        subject.require_mtp()
        prompts_of(subject, max(DRAFT_ROWS))


SUITE = Suite(
    name="speed",
    about="tokens a second of training, reading, decoding and serving on this device",
    options=Options,
    measure=measure,
    ready=_ready,
    one_process=True,
)


def peak_memory_mb() -> float:
    """The most that the device held since the program began; of the process, where it is a CPU."""
    statistics_of_device: dict[str, Any] = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics_of_device:
        return statistics_of_device["peak_bytes_in_use"] / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _config_of(model: Nemotron, config: RunConfig | None) -> RunConfig:
    """The run's configuration with this model in it; one of default sizes where there is none."""
    if config is not None:
        depths = config.training.mtp_depths if model.config.mtp else 0
        training = dataclasses.replace(config.training, mtp_depths=depths)
        return dataclasses.replace(config, model=model.config, training=training)
    schedule = ScheduleConfig(1e-4, 1e-4, warmup_tokens=0, decay_tokens=0, total_tokens=1 << 40)
    depths = 1 if model.config.mtp else 0
    training = TrainingConfig(steps=1, schedule=schedule, mtp_depths=depths)
    return RunConfig(model=model.config, training=training)


def _fresh_state(run: Prepared, model: Nemotron) -> TrainState:
    """A run's first state with its own copy of the parameters: the step takes the state over."""
    model = model if run.config.lora is None else merge_adapters(model)  # the state has its own
    return first_state(run, jax.tree.map(jnp.copy, model))
