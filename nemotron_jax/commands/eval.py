"""Evaluate a model: python eval.py --checkpoint=DIR|URL --suites=TEXT --output=DIR [--config=FILE].

The checkpoint is a run's directory, a model's in the hub's layout, or the http://HOST:PORT of an
OpenAI-compatible server. TEXT names suites with their options, as in perplexity,ruler:samples=20,
or all of them: all. A second call with the same output goes on where the first was stopped.
Several processes evaluate one model on a --mesh with the flags of train.py: docs/scale.md.

python eval.py compare A B … --output=DIR   tests which differences of reports are more than chance
python eval.py rescore DIR                  scores a report's transcripts anew
"""

import json
import sys

from absl import flags
from ml_collections import config_flags

from nemotron_jax import command_line, evaluate
from nemotron_jax.config.convert import from_config_dict, to_json
from nemotron_jax.config.run import RunConfig

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Data and sizes: a file of configs/; a run's directory brings its own."
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A directory, or a server's URL.")
_SUITES = flags.DEFINE_string("suites", None, "NAME:KEY=VALUE:…,NAME,… or all.")
_OUTPUT = flags.DEFINE_string("output", None, "The report's directory.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling and of random inputs.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Of the model's matrices.")
_MTP = flags.DEFINE_enum("mtp", "keep", ["keep", "drop"], "drop: leave the MTP block out.")
_MESH = flags.DEFINE_string("mesh", "", "Axes of the mesh, as in data=1,fsdp=2; empty: none.")
_EXPERTS = flags.DEFINE_string("experts", "dense", "nvfp4: routed experts are codes.")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "A directory; the checkpoint's own by default.")
_MODEL = flags.DEFINE_string("model", "", "What a server calls the model; its first by default.")


def main() -> int:
    """Evaluate as the flags say; the exit status: 1 where a suite failed."""
    if not _CHECKPOINT.value:
        raise ValueError("--checkpoint=: is empty; name a run's or a hub model's directory")
    output = command_line.writable("output", _OUTPUT.value)
    config = _CONFIG.value and from_config_dict(RunConfig, _CONFIG.value)
    asked = {
        "seed": _SEED.value,
        "dtype": _DTYPE.value,
        "mtp": _MTP.value,
        "mesh": _MESH.value,
        "experts": _EXPERTS.value,
        "tokenizer": _TOKENIZER.value,
        "model_name": _MODEL.value,
    }
    files = {"checkpoint": _CHECKPOINT.value, "output": str(output.absolute())}
    given = {"config": config and json.loads(to_json(config)), "suites": _SUITES.value}
    command_line.join_processes(asked | files | given)
    return evaluate.evaluate(
        _CHECKPOINT.value, _SUITES.value, output, config=config, **asked
    ).status


def run() -> None:
    """The program: parses the command line, and exits with its status."""
    if sys.argv[1:2] and sys.argv[1] in evaluate.COMMANDS:
        sys.exit(evaluate.command(sys.argv[1:]))
    flags.mark_flags_as_required(["checkpoint", "suites", "output"])
    command_line.run("eval.py", main)


if __name__ == "__main__":
    run()
