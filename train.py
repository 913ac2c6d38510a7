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

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; a run in it goes on.")


def main() -> int:
    """Train as the flags say; the exit status."""
    return train(from_config_dict(RunConfig, _CONFIG.value), Path(_WORKDIR.value))


def train(config: RunConfig, workdir: Path) -> int:
    """Prepare the data of a run and train it; prints what came out."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    host.show_cpu_devices(config.mesh.size)
    # jax reads the environment when it is imported, and a wrong config should not wait for it.
    import jax

    from nemotron_jax.data.loader import TrainLoader
    from nemotron_jax.pretrained import begin_run, data_of
    from nemotron_jax.sharding import make_mesh
    from nemotron_jax.training import loop

    mesh = make_mesh(config.mesh, jax.devices())
    loop.check_run(config, workdir)
    prepare = _conversations if config.stage == "sft" else _text
    prepared = dataclasses.replace(config, data=data_of(config, workdir))
    corpus, evaluators, sampler = prepare(prepared, workdir)
    loader = TrainLoader(corpus, config.data, config.seed, config.training.mtp_depths)
    parts = {"data": loader, "evaluators": evaluators, "sampler": sampler, "begin": begin_run}
    with contextlib.closing(loader), jax.set_mesh(mesh):
        outcome = loop.run(config, workdir, **parts)
    if outcome.finished:
        print(summary(outcome.records, workdir))
    return 0


def _text(config: RunConfig, workdir: Path) -> tuple:
    """Corpus, evaluators and sampler of pre-training."""
    from nemotron_jax.data.corpus import prepare
    from nemotron_jax.evaluation.held_out import held_out_evaluator
    from nemotron_jax.evaluation.samples import make_sampler

    tokenizer, corpus = prepare(config.data, config.model.vocab_size, workdir)
    num_samples = config.logging.sample_tokens
    sampler = make_sampler(tokenizer, num_samples, seed=config.seed) if num_samples else None
    return corpus, [held_out_evaluator(corpus, config)], sampler


def _conversations(config: RunConfig, workdir: Path) -> tuple:
    """Corpus, evaluators and sampler of fine-tuning on conversations."""
    from nemotron_jax.data.conversations import prepare_conversations
    from nemotron_jax.evaluation.held_out import learned_evaluator
    from nemotron_jax.posttraining.sft import success_evaluator

    tokenizer, corpus = prepare_conversations(
        config.data, config.sft, config.model.vocab_size, workdir, seed=config.seed
    )
    batches = corpus.held_out_batches(config.data, 0, config.logging.evaluate_rows)
    played = success_evaluator(tokenizer, config)
    return corpus, [learned_evaluator(batches, config), *([played] if played else [])], None


def summary(records: tuple[dict, ...], workdir: Path) -> str:
    """What a finished run reached, as a short table."""
    last = next(record for record in reversed(records) if "held_out_loss" in record)
    speeds = [r["tokens_per_second"] for r in records if r["tokens_per_second"]]
    rows = {"held-out loss": f"{last['held_out_loss']:.3f} nats/token"}
    if "unigram_entropy" in last:
        gain = last["unigram_entropy"] - last["held_out_loss"]
        rows["held-out loss"] += (
            f", {gain:.3f} below the entropy of single tokens ({last['unigram_entropy']:.3f})"
        )
        rows["bits per byte"] = (
            f"{last['bits_per_byte']:.3f} (gzip: {last['gzip_bits_per_byte']:.3f})"
        )
    if "success" in last:
        before = next(record["success"] for record in records if "success" in record)
        rows["success"] = f"{last['success']:.2f} of held-out tasks, {before:.2f} at first"
    rows |= {
        "speed": f"{sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s" if speeds else "not measured",
        "loss curve": workdir / "plots" / "loss.png",
        "checkpoints": workdir / "checkpoints",
    }
    if (workdir / "samples.txt").exists():
        rows["samples"] = workdir / "samples.txt"
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())


def _compilation_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nemotron_jax" / "jax"


if __name__ == "__main__":
    host.use_huge_pages()
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run("train.py", main)
