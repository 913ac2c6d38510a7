"""Stage `pretrain`: next tokens of a corpus."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
from jax.sharding import Mesh

from nemotron_jax import distributed
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.conversations import ChatCorpus
from nemotron_jax.data.corpus import Corpus, prepare, repetitions
from nemotron_jax.data.loader import TrainLoader, held_out_batches
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.evaluation.held_out import held_out_probe, whole_probe
from nemotron_jax.evaluation.probe import suite_probes
from nemotron_jax.evaluation.samples import make_samples
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.posttraining.own_text import OwnText
from nemotron_jax.pretrained import begin_run, data_of
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.sharding import own_rows
from nemotron_jax.stages import boosting
from nemotron_jax.training import limits, loop
from nemotron_jax.training.coverage import coverage
from nemotron_jax.training.losses import Objective
from nemotron_jax.training.prepared import Prepared, prepare_run
from nemotron_jax.training.report import Probe, Samples
from nemotron_jax.training.summary import summary
from nemotron_jax.types import Batch


class Lesson(Protocol):
    """What a stage learns from in place of its text's own tokens: stages.distill.Lesson."""

    def objective(self, execution: Execution) -> Objective:
        """The loss that is minimised in place of the text's own."""

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ValueError for a tokenizer that the teacher does not share."""

    def probe(self, batches: Sequence[Batch]) -> Probe:
        """What is measured while the run goes on, on held-out batches."""

    def end(self, run: Prepared, last: Nemotron, batches: Sequence[Batch]) -> str:
        """Measure the last model, write the run's result, and say it in a sentence."""


def run(
    config: RunConfig, directory: RunDirectory, mesh: Mesh, lesson: Lesson | None = None
) -> int:
    """Prepare a run's text and train on it; prints what came out. Gives the exit status."""
    prepared = checked(config, directory, lesson)
    model, logging = config.model, config.logging
    data = data_of(config.data, config.tokenizer_from, directory)
    eos = model.eos_token
    made = lambda: prepare(data, model.vocab_size, directory.path, eos_token=eos)
    tokenizer, corpus = distributed.first_alone(made)
    tokens, chunk = logging.sample_tokens, config.training.loss_chunk
    return learn(
        prepared,
        mesh,
        corpus,
        tokenizer=tokenizer,
        held_out=lambda rows: held_out_batches(corpus, data, 0, rows),
        notes=repetitions(corpus, config.data, config.training.steps),
        probes=[held_out_probe(corpus, data, logging.evaluate_rows, chunk)],
        final=whole_probe(corpus, data, chunk) if lesson is None else None,
        samples=make_samples(tokenizer, tokens, seed=config.seed) if tokens else None,
        lesson=lesson,
    )


def checked(config: RunConfig, directory: RunDirectory, lesson: Lesson | None = None) -> Prepared:
    """The run, where its directory is its own and this machine can take its steps."""
    prepared = prepare_run(config, directory, objective=lesson and lesson.objective)
    limits.check_kernels(config)
    limits.check_memory(config)
    if line := coverage(config.model, config.lora):
        print(f"note: {line}")
    return prepared


def learn(
    run: Prepared,
    mesh: Mesh,
    corpus: Corpus | ChatCorpus,
    *,
    tokenizer: Tokenizer,
    held_out: Callable[[int], Sequence[Batch]],
    notes: Sequence[str],
    probes: Sequence[Probe],
    final: Probe | None = None,
    samples: Samples | None = None,
    lesson: Lesson | None = None,
) -> int:
    """Train on the rows of a corpus and say what a finished run reached; the exit status.

    `held_out` gives batches of so many held-out rows.
    """
    for line in notes:
        print(f"note: {line}")
    config = run.config
    probes = [*probes, *suite_probes(config, run.directory)]
    if lesson is not None:
        lesson.check_tokenizer(tokenizer)
        probes.append(lesson.probe(held_out(config.logging.evaluate_rows)))
    rows = own_rows(mesh, config.data.batch_size)
    depths = config.training.mtp_depths
    loader = TrainLoader(corpus, config.data, config.seed, depths, rows=rows)
    own = config.objective.text == "own"
    with contextlib.closing(loader), jax.set_mesh(mesh):
        outcome = loop.run(
            run,
            data=OwnText(loader, config) if own else loader,
            begin=begin_run,
            probes=probes,
            final=final,
            samples=samples,
        )
        if outcome.finished:
            print(summary(outcome.records, run.directory))
            if lesson is not None:
                print(lesson.end(run, outcome.model, held_out(config.distill.result_rows)))
            elif config.objective.mtp == "kl":
                prompts = held_out(config.objective.result_prompts)
                print(boosting.end(config, run.directory, prompts, mesh))
    return 0
