"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.a.b=value]."""

import contextlib
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
    host.show_cpu_devices(config.mesh.data)
    # jax reads the environment when it is imported, and a wrong config should not wait for it.
    from nemotron_jax.data.corpus import prepare
    from nemotron_jax.data.loader import TrainLoader
    from nemotron_jax.evaluation.held_out import held_out_evaluator
    from nemotron_jax.evaluation.samples import make_sampler
    from nemotron_jax.training import loop

    loop.check_run(config, workdir)
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, workdir)
    num_samples = config.logging.sample_tokens
    loader = TrainLoader(corpus, config.data, config.seed, config.training.mtp_depths)
    with contextlib.closing(loader):
        outcome = loop.run(
            config,
            workdir,
            data=loader,
            evaluators=[held_out_evaluator(corpus, config)],
            sampler=make_sampler(tokenizer, num_samples, seed=config.seed) if num_samples else None,
        )
    if outcome.finished:
        print(summary(outcome.records, workdir))
    return 0


def summary(records: tuple[dict, ...], workdir: Path) -> str:
    """What a finished run reached, as a short table."""
    last = next(record for record in reversed(records) if "held_out_loss" in record)
    speeds = [r["tokens_per_second"] for r in records if r["tokens_per_second"]]
    gain = last["unigram_entropy"] - last["held_out_loss"]
    rows = {
        "held-out loss": f"{last['held_out_loss']:.3f} nats/token, {gain:.3f} below the entropy of "
        f"single tokens ({last['unigram_entropy']:.3f})",
        "bits per byte": f"{last['bits_per_byte']:.3f} (gzip: {last['gzip_bits_per_byte']:.3f})",
        "speed": f"{sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s" if speeds else "not measured",
        "samples": workdir / "samples.txt",
        "loss curve": workdir / "plots" / "loss.png",
        "checkpoints": workdir / "checkpoints",
    }
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())


def _compilation_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nemotron_jax" / "jax"


if __name__ == "__main__":
    host.use_huge_pages()
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run("train.py", main)
