"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.a.b=value].

Several processes train one run with --coordinator=HOST:PORT --process_count=N --process_index=I,
or with --distributed=auto where JAX finds them: docs/scale.md.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from nemotron_jax import command_line, distributed, host
from nemotron_jax.config.convert import from_config_dict, to_json
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; a run in it goes on.")


def main() -> int:
    """Train as the flags say; the exit status."""
    config = from_config_dict(RunConfig, _CONFIG.value)
    directory = RunDirectory(command_line.writable("workdir", _WORKDIR.value))
    if not any("training.schedule" in name for name in command_line.overrides()):
        config = directory.with_saved_schedule(config)  # none was chosen: one that goes on keeps it
    values = {"config": json.loads(to_json(config)), "workdir": str(directory.path.absolute())}
    command_line.join_processes(values, whole=directory.newest_name)
    return train(config, dataclasses.replace(directory, writer=distributed.is_first()))


def train(config: RunConfig, directory: RunDirectory | Path | str) -> int:
    """Train a run in its directory; prints what came out. Gives the exit status."""
    if not isinstance(directory, RunDirectory):
        directory = RunDirectory(Path(directory))
    host.keep_compiled_programs()
    devices = command_line.devices_here(config.mesh.size, config.mesh.named)
    host.show_cpu_devices(devices, distributed.process_count())
    host.overlap_collectives()
    distributed.check_shared("workdir", directory.path)
    # jax reads the environment when it is imported, and a wrong config should not wait for it.
    import jax

    from nemotron_jax import stages
    from nemotron_jax.sharding import make_mesh

    return stages.run(config, directory, make_mesh(config.mesh, jax.devices()))


def run() -> None:
    """The program: parses the command line, and exits with its status."""
    flags.mark_flags_as_required(["config", "workdir"])
    command_line.run("train.py", main)


def start() -> None:
    """The program, its memory in huge pages."""
    host.use_huge_pages()
    run()


if __name__ == "__main__":
    start()
