"""One of several processes that do some jobs together: together.py JOBS.json and the flags of
train.py that join it. Each writes what the jobs gave beside the file, under its number.

A start of a process costs as much as a small job: jobs that may share one do.
"""

import argparse
import functools
import hashlib
import importlib
import json
import pathlib
import sys
from unittest import mock

import jax
import numpy as np

from configs import sft_tiny
from nemotron_jax import distributed, host
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.data.loader import TrainLoader
from nemotron_jax.run_directory import RunDirectory
from tests.training.runs import changed, small_run


def pretraining(texts: str, steps: int, mesh: dict, sample_tokens: int = 0) -> RunConfig:
    """A small run with everything that a pre-training writes; its twelve steps, or some of them."""
    config = small_run(pathlib.Path(texts), sample_tokens=sample_tokens, merge_window=2)
    return changed(
        config,
        model={"pattern": "M*E", "mtp": None},
        training={"steps": steps, "mtp_depths": 0},
        data={"sequence_length": 32},
        mesh=mesh,
    )


def fine_tuning(steps: int, mesh: dict) -> RunConfig:
    """A small run that plays tasks."""
    config = from_config_dict(RunConfig, sft_tiny.get_config())
    return changed(
        config,
        model={"width": 32, "pattern": "M*"},
        sft={"oracle_tasks": 40, "success_tasks": 4, "success_tokens": 4},
        training={"steps": steps},
        data={"sequence_length": 160, "batch_size": 4},
        logging={"log_every": 1, "evaluate_every": 50, "checkpoint_every": 50, "evaluate_rows": 4},
        mesh=mesh,
    )


def train(config: RunConfig, workdir: str) -> int:
    """What train.py does with a run."""
    from nemotron_jax import stages
    from nemotron_jax.sharding import make_mesh

    directory = RunDirectory(workdir, writer=distributed.is_first())
    return stages.run(config, directory, make_mesh(config.mesh, jax.devices()))


def pretrain(workdir: str, texts: str, steps: int, mesh: dict, sample_tokens: int = 0) -> int:
    return train(pretraining(texts, steps, mesh, sample_tokens), workdir)


def sft(workdir: str, steps: int, mesh: dict) -> int:
    return train(fine_tuning(steps, mesh), workdir)


def published(name: str, workdir: str, steps: int, mesh: dict) -> dict[str, str]:
    """The first steps of a run of configs/ as it is, not evaluated; a hash of each row that this
    process fed, by its step and number."""
    from nemotron_jax.stages import pretrain as stage

    seen, learn = {}, stage.learn

    class Loader(TrainLoader):
        def __init__(self, *parts: object, rows: list[int]) -> None:
            super().__init__(*parts, rows=rows)
            self._numbers = rows

        def __next__(self):
            batch = super().__next__()
            for place, row in enumerate(self._numbers):
                parts = (batch.tokens, batch.targets, batch.segment_ids, batch.weights)
                whole = hashlib.sha256(b"".join(part[place].tobytes() for part in parts))
                seen[f"{self._step - 1}:{row}"] = whole.hexdigest()
            return batch

    def unevaluated(*parts: object, **options: object) -> int:
        asked = {"probes": [], "final": None, "sampler": None}
        return learn(*parts, **{**options, **asked})

    config = from_config_dict(RunConfig, importlib.import_module(f"configs.{name}").get_config())
    training, logging = {"steps": steps}, {"log_every": 1}
    config = changed(config, training=training, logging=logging, mesh=mesh)
    home = importlib.import_module(f"nemotron_jax.stages.{config.stage}")
    with (
        mock.patch.object(home, "learn", unevaluated),
        mock.patch.object(stage, "TrainLoader", Loader),
    ):
        assert train(config, workdir) == 0
    return {key: one for key, one in seen.items() if int(key.partition(":")[0]) < steps}


def sums(workdir: str, mesh: dict, texts: str) -> str:
    """A hash of every leaf of the newest checkpoint, restored on a mesh."""
    from nemotron_jax.sharding import make_mesh
    from nemotron_jax.sharding.hosts import on_host
    from nemotron_jax.training.checkpoint import Checkpoints
    from nemotron_jax.training.prepared import prepare_run

    config, whole = pretraining(texts, 12, mesh), hashlib.sha256()
    with jax.set_mesh(make_mesh(config.mesh, jax.devices())):
        run = prepare_run(config, RunDirectory(workdir))
        with Checkpoints(run.directory, keep=9) as checkpoints:
            restored = checkpoints.restore(run.shapes)
        leaves = jax.tree_util.tree_flatten_with_path(restored.state)[0]
        for path, leaf in sorted(leaves, key=lambda pair: str(pair[0])):
            whole.update(f"{path} {leaf.shape} {leaf.dtype}".encode() + on_host(leaf).tobytes())
    return whole.hexdigest()


def rows(texts: str, workdir: str) -> list:
    """Which rows this process holds on meshes that share them, or not; every row of the batch as
    the mesh has it must be the run's."""
    from jax.sharding import Mesh

    from nemotron_jax.data.corpus import prepare
    from nemotron_jax.data.loader import TrainLoader
    from nemotron_jax.sharding import MESH_AXES, own_rows, place_batch
    from nemotron_jax.sharding.hosts import on_host

    config, found = small_run(pathlib.Path(texts)), []
    _, corpus = prepare(config.data, 512, workdir, progress=lambda line: None)
    for shape in ((2, 1, 1, 1, 1), (1, 1, 2, 1, 1), (1, 1, 1, 2, 1), (1, 1, 1, 1, 2)):
        mesh = Mesh(np.array(jax.devices()[:2]).reshape(shape), MESH_AXES)
        own = own_rows(mesh, config.data.batch_size)
        loader = TrainLoader(corpus, config.data, 7, 1, rows=own)
        whole = TrainLoader(corpus, config.data, 7, 1).batch_at(3)
        with jax.set_mesh(mesh):
            placed = place_batch(loader.batch_at(3), config.data.batch_size)
            again = place_batch(whole)
        for one in (placed, again):
            for name in ("tokens", "targets", "segment_ids", "weights"):
                np.testing.assert_array_equal(on_host(getattr(one, name)), getattr(whole, name))
        loader.close()
        found.append(own)
    return found


def hub(workdir: str, output: str, mesh: dict) -> list[str]:
    """A run's model written as a hub directory, and read from it: hashes of both."""
    import nemotron_jax as nj
    from nemotron_jax.evaluation.facts import parameters_sha256
    from nemotron_jax.sharding import make_mesh

    placed = make_mesh(MeshConfig(**mesh), jax.devices())
    read = functools.partial(nj.load_pretrained, mesh=placed, layout="training")
    model = read(workdir)
    nj.save_pretrained(model, output, dtype="float32")
    assert (pathlib.Path(output) / "config.json").exists()
    return [parameters_sha256(m) for m in (model, read(output))]


def evaluate(workdir: str, output: str, mesh: str) -> int:
    from nemotron_jax.evaluate import evaluate as evaluated

    return evaluated(workdir, "perplexity", pathlib.Path(output), mesh=mesh).status


JOBS = {job.__name__: job for job in (pretrain, sft, published, sums, rows, hub, evaluate)}


def do(jobs: list[dict]) -> list:
    """What the jobs give, one after the other."""
    return [JOBS[job["do"]](**{k: v for k, v in job.items() if k != "do"}) for job in jobs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=pathlib.Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--process_count", type=int)
    parser.add_argument("--process_index", type=int)
    given = parser.parse_args()
    devices = json.loads(given.jobs.read_text())["devices"]
    host.show_cpu_devices(devices // given.process_count, given.process_count)
    distributed.join(given.coordinator, given.process_count, given.process_index, {})
    found = do(json.loads(given.jobs.read_text())["jobs"])
    given.jobs.with_suffix(f".{given.process_index}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    distributed.leave(0)


if __name__ == "__main__":
    main()
