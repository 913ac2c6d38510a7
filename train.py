"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.a.b=value]."""

import contextlib
import dataclasses
import os
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from nemotron_jax import command_line, host
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.environments.catalogue import search_folder

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; a run in it goes on.")


def main() -> int:
    """Train as the flags say; the exit status."""
    config = from_config_dict(RunConfig, _CONFIG.value)
    # Environments of one's own may lie beside the file that names them.
    search_folder(os.path.dirname(flags.FLAGS["config"].config_filename or ""))
    workdir = command_line.writable("workdir", _WORKDIR.value)
    follows = not any("training.schedule" in name for name in command_line.overrides())
    return train(config, workdir, schedule_follows=follows)


def train(config: RunConfig, workdir: Path, *, schedule_follows: bool = False) -> int:
    """Prepare the data of a run and train it; prints what came out.

    `schedule_follows`: no schedule was chosen, so that a run that goes on keeps its own.
    """
    host.keep_compiled_programs()
    host.show_cpu_devices(config.mesh.size)
    # jax reads the environment when it is imported, and a wrong config should not wait for it.
    import jax

    from nemotron_jax.data.loader import TrainLoader
    from nemotron_jax.pretrained import begin_run, data_of
    from nemotron_jax.run_directory import RunDirectory
    from nemotron_jax.sharding import make_mesh
    from nemotron_jax.training import limits, loop
    from nemotron_jax.training.prepared import prepare_run
    from nemotron_jax.training.summary import summary

    mesh = make_mesh(config.mesh, jax.devices())
    if config.stage == "grpo":
        from nemotron_jax import reinforce

        follow = schedule_follows
        return reinforce.run(config, workdir, mesh, fine_tune=train, schedules_follow=follow)
    directory = RunDirectory(workdir)
    config = directory.with_saved_schedule(config) if schedule_follows else config
    run = prepare_run(config, directory)
    limits.check_kernels(config)
    limits.check_memory(config)
    read = _conversations if config.stage == "sft" else _text
    given = dataclasses.replace(config, data=data_of(config, directory))
    corpus, parts = read(given, workdir)
    loader = TrainLoader(corpus, config.data, config.seed, config.training.mtp_depths)
    with contextlib.closing(loader), jax.set_mesh(mesh):
        outcome = loop.run(run, data=loader, begin=begin_run, **parts)
    if outcome.finished:
        print(summary(outcome.records, directory))
    return 0


def _text(config: RunConfig, workdir: Path) -> tuple:
    """The corpus of pre-training; its evaluators and sampler, by the loop's names."""
    from nemotron_jax.data.corpus import prepare, repetitions
    from nemotron_jax.evaluation.held_out import held_out_evaluator, whole_evaluator
    from nemotron_jax.evaluation.samples import make_sampler

    vocabulary, eos = config.model.vocab_size, config.model.eos_token
    tokenizer, corpus = prepare(config.data, vocabulary, workdir, eos_token=eos)
    for line in repetitions(corpus, config.data, config.training.steps):
        print(f"note: {line}")
    num_samples = config.logging.sample_tokens
    return corpus, {
        "evaluators": [held_out_evaluator(corpus, config)],
        "final": whole_evaluator(corpus, config),
        "sampler": make_sampler(tokenizer, num_samples, seed=config.seed) if num_samples else None,
    }


def _conversations(config: RunConfig, workdir: Path) -> tuple:
    """The same of fine-tuning on conversations."""
    from nemotron_jax.data.conversations import prepare_conversations, repetitions
    from nemotron_jax.evaluation.held_out import learned_evaluator
    from nemotron_jax.posttraining.sft import success_evaluator

    options = {"eos_token": config.model.eos_token, "seed": config.seed}
    tokenizer, corpus = prepare_conversations(
        config.data, config.sft, config.model.vocab_size, workdir, **options
    )
    for line in repetitions(corpus, config.data, config.training.steps):
        print(f"note: {line}")
    batches = corpus.held_out_batches(config.data, 0, config.logging.evaluate_rows)
    played = success_evaluator(tokenizer, config)
    return corpus, {
        "evaluators": [learned_evaluator(batches, config), *([played] if played else [])]
    }


def run() -> None:
    """The program: parses the command line, and exits with its status."""
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run("train.py", main)


if __name__ == "__main__":
    host.use_huge_pages()
    run()
