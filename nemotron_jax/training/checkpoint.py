"""Checkpoints: saved while training goes on, sealed with checksums, checked when restored.

    checkpoints/step_00000200/   arrays/model/      the parameters by dotted name (orbax): all, or
                                                    the adapters alone where there are some
                                 arrays/optimizer/  moments and counters by dotted name (orbax)
                                 state.json  config.json  tokenizer.json
                                 base.json          what adapters were trained on
                                 manifest.json      size and SHA-256 of each file; written last

A checkpoint is made under another name and renamed when its manifest is on disk, so whatever has
the plain name was whole once. Directories of saves that were killed are removed by the next run.
"""

import dataclasses
import errno
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from nemotron_jax import distributed
from nemotron_jax.config.run import RunConfig
from nemotron_jax.manifest import sync_directory, write_manifest
from nemotron_jax.model.adapters import abstract_adapted, adapter_names
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, model_shardings, unflatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.state import TrainState

FORMAT_VERSION = 1  # of state.json; raise it where an older reader would go on wrongly
STATE, ARRAYS = "state.json", "arrays"  # in a step's folder
MODEL, OPTIMIZER = "model", "optimizer"  # the two trees inside ARRAYS
_COUNTERS = ("step", "skipped", "skipped_in_a_row")
# What a kill leaves of a folder that was being written, or taken away.
_LEFTOVER = re.compile(r"step_\d{8,}\.(partial|removed)")

Table = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A run's state as it was after `step` steps."""

    step: int
    state: TrainState
    data_position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory, of which the `keep` newest are kept.

    A context manager: leaving it waits for the save under way. Of several processes all call every
    method, and the first one alone renames and removes.
    """

    def __init__(self, directory: RunDirectory, keep: int) -> None:
        self._run = RunDirectory(directory.path.absolute())
        self.folder = self._run.checkpoints
        self._keep = keep
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finalizer: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest: int | None = None  # restored or saved by this object, so known to be whole
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self._join()
        self._writer.close()
        # After a failed write orbax may still be writing other arrays: what then stays behind is
        # removed by the next run.
        self._remove_leftovers(ignore_errors=True)
        if error is None:
            self.check()

    def save(
        self,
        state: TrainState,
        data_position: Mapping[str, Any],
        files: Mapping[str, str],
    ) -> None:
        """Begin to save; returns once the arrays are copied to the host, and may then be donated.

        `files` are further texts by name, `config.json` among them. Raises what the previous save
        raised, OSError when the disk is full among it.
        """
        self.wait()
        step = int(state.step)
        if step == self._newest:
            return
        partial = self._partial(step)
        partial.mkdir(exist_ok=True)
        arrays = {MODEL: kept(state.model), OPTIMIZER: optimizer_table(state.optimizer)}
        meta = {
            "format_version": FORMAT_VERSION,
            **{name: int(getattr(state, name)) for name in _COUNTERS},
            "data": dict(data_position),
            "arrays": {part: _describe(table) for part, table in arrays.items()},
        }
        texts = {**files, STATE: json.dumps(meta, indent=1)}
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        items = {name: ocp.args.StandardSave(table) for name, table in arrays.items()}
        try:
            self._writer.save(partial / ARRAYS, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            raise self._explained(error, step, needed) from error
        self._finalizer = threading.Thread(
            target=self._finalize, args=(step, texts, needed), name=f"checkpoint {step}"
        )
        self._finalizer.start()

    def wait(self) -> None:
        """Return when no save is under way; raises what the last one raised."""
        self._join()
        self.check()

    def check(self) -> None:
        """Raise what a save has raised in the background."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def restore(
        self, like: TrainState, base: Callable[[], Nemotron] | None = None
    ) -> Restored | None:
        """The newest whole checkpoint as a state of the shapes and shardings of `like`; `base`
        makes the model whose adapters the checkpoint holds, where it holds them alone.

        None where there is no checkpoint. A damaged one is named in a warning and an older one is
        taken; raises ValueError when none is whole, or when the arrays do not fit `like`.
        """
        step = distributed.from_first(self._run.newest_whole)
        if step is None:
            return None
        path = self._run.checkpoint(step)
        meta = _read_state(path)
        shapes = {MODEL: kept(like.model), OPTIMIZER: optimizer_table(like.optimizer)}
        arrays = _read_arrays(path, shapes)
        alone = len(shapes[MODEL]) < len(flatten(like.model))
        rest = flatten(base()) if alone else {}
        leaves, structure = jax.tree.flatten(like.optimizer)
        assert len(leaves) == len(arrays[OPTIMIZER])
        counters = {}
        for name in _COUNTERS:
            leaf = getattr(like, name)
            counters[name] = jax.device_put(np.asarray(meta[name], leaf.dtype), _placement(leaf))
        state = TrainState(
            model=unflatten(like.model, rest | arrays[MODEL]),
            optimizer=structure.unflatten(arrays[OPTIMIZER][n] for n in shapes[OPTIMIZER]),
            **counters,
        )
        self._newest = meta["step"]
        return Restored(meta["step"], state, meta["data"])

    def _finalize(self, step: int, texts: Mapping[str, str], needed: int) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                self._commit(step, texts)
            # All may look for the checkpoint under its name once this is over.
            distributed.meet("checkpoint")
            self._newest = step
        except Exception as error:
            self._error = self._explained(error, step, needed)

    def _commit(self, step: int, texts: Mapping[str, str]) -> None:
        final, partial = self._run.checkpoint(step), self._partial(step)
        for name, text in texts.items():
            (partial / name).write_text(text, "utf-8")
        write_manifest(partial)
        _remove(final)  # a damaged one of this step: restore() fell back past it
        partial.rename(final)
        sync_directory(self.folder)
        steps = self._run.steps()
        # What lies after this step was damaged when the run resumed before it.
        past = [other for other in steps if other > step]
        old = [other for other in steps if other <= step][: -self._keep]
        for other in past + old:
            _remove(self._run.checkpoint(other))

    def _partial(self, step: int) -> Path:
        """Where a checkpoint is made before it has its name."""
        return self._run.checkpoint(step).with_suffix(".partial")

    def _remove_leftovers(self, ignore_errors: bool = False) -> None:
        """Remove what saves left that were killed or failed."""
        if jax.process_index() == 0:
            for path in self.folder.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=ignore_errors)
                    else:
                        path.unlink(missing_ok=True)

    def _explained(self, error: Exception, step: int, needed: int) -> Exception:
        """A full disk in plain words; any other error as it is."""
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = ("No space left", "ENOSPC", "EDQUOT", "Disk quota", "EFBIG", "File too large")
        if getattr(error, "errno", None) not in full and not any(w in str(error) for w in words):
            return error
        path = self._run.checkpoint(step)
        free = shutil.disk_usage(self.folder).free
        return OSError(
            errno.ENOSPC,
            f"checkpoint {path} could not be saved: it needs about {needed:,} bytes and {free:,} "
            "are free; make room and start again, the checkpoints before it are whole",
        )

    def _join(self) -> None:
        if self._finalizer is not None:
            self._finalizer.join()
            self._finalizer = None


def optimizer_table(state: Any) -> Table:
    """Leaves of an optimizer state by name, such as `mu.final_norm.weight`, in tree order.

    A transformation's place in its chain is left out, so that adding one without state keeps names.
    """
    table = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        keys = (getattr(key, "name", getattr(key, "key", None)) for key in path)
        name = ".".join(str(key) for key in keys if key is not None)
        assert name not in table, f"two leaves of the optimizer state are called {name}"
        table[name] = leaf
    return table


def kept(model: Nemotron) -> Table:
    """The parameters that a checkpoint holds: all, or of a model with adapters these alone."""
    table = flatten(model)
    adapters = adapter_names(model)
    return {name: table[name] for name in table if name in adapters} if adapters else table


def load_parameters(
    directory: RunDirectory, *, mesh: Mesh | None = None
) -> tuple[RunConfig, int, Table]:
    """A run's configuration, step and parameters by name, those of adapters alone where it trains
    some: of the checkpoint that was named, or of the newest one that they can be read from.

    `mesh` lays them out on its devices; by default they are on one. Raises ValueError when there is
    no such checkpoint or none is whole.
    """
    step = distributed.from_first(directory.model_step)
    run = directory.at(step).read()
    model = abstract_adapted(run.model, run.lora)
    like = kept(model)
    for name, sharding in ({} if mesh is None else model_shardings(model, mesh)).items():
        if name not in like:
            continue
        like[name] = jax.ShapeDtypeStruct(like[name].shape, like[name].dtype, sharding=sharding)
    path = directory.checkpoint(step).absolute()
    return run, step, _read_arrays(path, {MODEL: like})[MODEL]


def _remove(path: Path) -> None:
    """Take a checkpoint's name away first: one half removed must not look like one."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.removed")))
    elif path.exists():  # not a checkpoint, but it has the name of one
        path.unlink()


def _read_state(path: Path) -> dict[str, Any]:
    meta = json.loads((path / STATE).read_text("utf-8"))
    version = meta["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path / STATE}: format_version={version}, this code reads {FORMAT_VERSION}; "
            "use the nemotron_jax that wrote it"
        )
    return meta


def _read_arrays(path: Path, wanted: Mapping[str, Table]) -> dict[str, Table]:
    """The tables of these names and shapes; raises ValueError naming what does not fit."""
    stored = _read_state(path)["arrays"]
    for part, table in wanted.items():
        _check_fit(path / ARRAYS / part, stored[part], _describe(table))
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_placement(leaf))
    items = {
        part: ocp.args.StandardRestore({name: place(leaf) for name, leaf in table.items()})
        for part, table in wanted.items()
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return dict(reader.restore(path / ARRAYS, args=ocp.args.Composite(**items)).items())


def _placement(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _describe(table: Table) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in table.items()}


def _check_fit(folder: Path, stored: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    wrong = [
        f"{name} is {stored.get(name, 'missing')}, needed is {wanted.get(name, 'nothing')}"
        for name in sorted(stored.keys() | wanted.keys())
        if stored.get(name) != wanted.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{folder} does not fit the model: {'; '.join(wrong[:5])}"
            f"{' …' if len(wrong) > 5 else ''}; restore the run's configuration"
        )
