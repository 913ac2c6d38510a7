"""Stage `sft`: fine-tuning on conversations."""

from jax.sharding import Mesh

from nemotron_jax import distributed
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.conversations import prepare_conversations, repetitions
from nemotron_jax.evaluation.held_out import learned_probe
from nemotron_jax.posttraining.success import success_of_oracles
from nemotron_jax.pretrained import data_of
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages.pretrain import Lesson, checked, learn


def run(
    config: RunConfig, directory: RunDirectory, mesh: Mesh, lesson: Lesson | None = None
) -> int:
    """Prepare a run's conversations and train on what answers say; the exit status."""
    prepared, model = checked(config, directory, lesson), config.model
    data = data_of(config.data, config.tokenizer_from, directory)
    made = lambda: prepare_conversations(
        data,
        config.sft,
        model.vocab_size,
        directory.path,
        eos_token=model.eos_token,
        seed=config.seed,
    )
    tokenizer, corpus = distributed.first_alone(made)
    batches = corpus.held_out_batches(data, 0, config.logging.evaluate_rows)
    played = success_of_oracles(tokenizer, data, config.sft, config.seed)
    return learn(
        prepared,
        mesh,
        corpus,
        tokenizer=tokenizer,
        held_out=lambda rows: corpus.held_out_batches(data, 0, rows),
        notes=repetitions(corpus, data, config.training.steps),
        probes=[learned_probe(batches, config.training.loss_chunk), *([played] if played else [])],
        lesson=lesson,
    )
