"""Stage `sft`: fine-tuning on conversations."""

from jax.sharding import Mesh

from nemotron_jax import distributed
from nemotron_jax.config.run import RunConfig
from nemotron_jax.data.conversations import prepare_conversations, repetitions
from nemotron_jax.evaluation.held_out import learned_probe
from nemotron_jax.posttraining.success import success_of_oracles
from nemotron_jax.pretrained import data_of
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.stages.pretrain import checked, learn


def run(config: RunConfig, directory: RunDirectory, mesh: Mesh) -> int:
    """Prepare a run's conversations and train on what answers say; the exit status."""
    prepared = checked(config, directory)
    data, model = data_of(config.data, config.init_from, directory), config.model
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
        notes=repetitions(corpus, data, config.training.steps),
        probes=[learned_probe(batches, config.training.loss_chunk), *([played] if played else [])],
    )
