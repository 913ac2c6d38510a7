"""Evaluate a model: python eval.py --checkpoint=DIR --suites=a,b --output=DIR [--config=FILE].

The checkpoint is a run's directory or a model's in the hub's layout; the latter needs a --config
for suites that read held-out text.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from nemotron_jax import command_line, host
from nemotron_jax.config.checks import check_value
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Data and sizes: a file of configs/; a run's directory brings its own."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's or a hub model's directory.")
_SUITES = flags.DEFINE_list("suites", None, "Names of suites, separated by commas.")
_OUTPUT = flags.DEFINE_string("output", None, "The report's directory.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling and of random inputs.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the model's matrices.")
_MTP = flags.DEFINE_enum("mtp", "keep", ["keep", "drop"], "drop: leave the MTP block out.")


def main() -> int:
    """Evaluate as the flags say; the exit status."""
    config = _CONFIG.value and from_config_dict(RunConfig, _CONFIG.value)
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint=: is empty; name a run's or a hub model's directory")
    output = command_line.writable("output", _OUTPUT.value)
    options = {"config": config, "seed": _SEED.value, "dtype": _DTYPE.value, "mtp": _MTP.value}
    checkpoint = command_line.path_of("checkpoint", _CHECKPOINT.value)
    report = evaluate(checkpoint, _SUITES.value, output, **options)
    print(f"report: {report.with_suffix('.md')}")
    return 0


def evaluate(
    checkpoint: Path,
    suites: Sequence[str],
    output: Path,
    *,
    config: RunConfig | None = None,
    seed: int = 0,
    dtype: str = "float32",
    mtp: str = "keep",
) -> Path:
    """Run the suites on a checkpoint and write the report; returns the path of its JSON.

    `checkpoint` is a hub model's directory, a run's, or one checkpoint of a run.

    Raises ValueError for an unknown suite, a checkpoint that cannot be loaded, and a suite that
    needs what the checkpoint and the configuration lack; nothing is written then.
    """
    from nemotron_jax.evaluation.suites import check_names

    check_names(suites)  # before anything slow is imported or read
    dtype = dtype_name("evaluate", dtype)
    is_seed = type(seed) is int and 0 <= seed < 2**32
    check_value("evaluate", "seed", seed, is_seed, f"must be an integer from 0 to {2**32 - 1}")
    command_line.writable("output", output)
    run = RunDirectory.of_model(checkpoint, "--checkpoint")
    own = run and run.read()
    host.keep_compiled_programs()
    from nemotron_jax.evaluation.evaluator import Subject
    from nemotron_jax.evaluation.report import SuiteRun, metadata, write_report
    from nemotron_jax.evaluation.suites import make_evaluators
    from nemotron_jax.pretrained import load_pretrained
    from nemotron_jax.training.limits import check_kernels

    if config or own:
        check_kernels(config or own)
    is_own = own is not None and (config is None or config.data == own.data)
    directory = run.path if run else checkpoint
    data_directory = directory if is_own else output / "data"
    model_config = own.model if own else ModelConfig.from_hf(checkpoint)
    subject = Subject(directory, config or own, data_directory, seed, model_config)
    evaluators = make_evaluators(suites, subject)
    model = load_pretrained(checkpoint, dtype, mtp=mtp)
    runs = {}
    for evaluator in evaluators:
        print(f"{evaluator.name}: compiling and running", flush=True)
        start = time.perf_counter()
        result = evaluator.run(model)
        runs[evaluator.name] = SuiteRun(result, time.perf_counter() - start)
        values = ", ".join(f"{name} {value:.4g}" for name, value in result.values.items())
        print(f"{evaluator.name}: {values}", flush=True)
    return write_report(output, metadata(model, subject), runs)


def run() -> None:
    """The program: parses the command line, and exits with its status."""
    flags.mark_flags_as_required(["checkpoint", "suites", "output"])
    command_line.run("eval.py", main)


if __name__ == "__main__":
    run()
