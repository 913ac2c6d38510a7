"""Compile a run's train step for devices that are not here, or estimate it, and say what it takes.

python -m nemotron_jax.plan --config=configs/NAME.py --target=v5p:8x8x4 [--json=FILE]
[--config.a.b=value]. The step is the one that train.py runs, lowered from shapes: no parameter is
made and no data is read. Targets are TPUs by the sides of their topology, or `cpu:8`; several are
separated by commas. With --estimate nothing is compiled: arithmetic answers at once, of GPUs too
(`h100:8`), of --stage=decode and grpo, and with --target=all of every slice that is rented.
"""

import copy
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from nemotron_jax import command_line, host
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.run import RunConfig
from nemotron_jax.files import atomic_writer
from nemotron_jax.planning import text
from nemotron_jax.planning.estimate import STAGES, Question, estimate, over_slices, precision_of
from nemotron_jax.planning.targets import (
    check_count,
    cpu_device_count,
    devices_of,
    memory_of_program,
    part_bytes,
)
from pallas_kernels.devices import DEVICES, slice_of

if TYPE_CHECKING:
    import jax  # for main, only once it has read how many devices to show

    from nemotron_jax.training.losses import Objective

GB = 1e9


def main() -> int:
    """Plan as the flags say; exit status 0 where the step fits, or one of several, 1 where not."""
    values = flags.FLAGS
    file = _report_file(values["json"].value)
    targets = values["target"].value.split(",")
    reports = _estimated(targets) if values["estimate"].value else _compiled(targets)
    if file is not None:
        answer = reports[0] if len(reports) == 1 else {"reports": reports}
        with atomic_writer(file) as out:
            out.write((json.dumps(answer, indent=2) + "\n").encode())
    if len(reports) == 1:
        print(text.one(reports[0]) if reports[0]["estimated"] else table(reports[0]))
    elif all(report.get("estimated", True) for report in reports):
        print(text.many(reports))
    else:
        print("\n\n".join(map(table, reports)))
    return 0 if any(report.get("fits") for report in reports) else 1


def _compiled(targets: list[str]) -> list[dict]:
    """Reports of the targets, each compiled by its own compiler."""
    config, stage = from_config_dict(RunConfig, flags.FLAGS["config"].value), flags.FLAGS["stage"]
    if stage.value not in ("train", "decode") or "all" in targets:
        asked = "--target=all" if "all" in targets else f"--stage={stage.value}"
        raise ValueError(f"{asked}: is estimated, not compiled; add --estimate")
    for target in targets:
        known = DEVICES.get(target.partition(":")[0])
        if known and known.is_gpu:
            raise ValueError(f"target={target!r}: is estimated, not compiled; add --estimate")
    counts = [count for target in targets if (count := cpu_device_count(target)) is not None]
    for target in targets:
        if (count := cpu_device_count(target)) is not None:
            check_count(config, target, count)  # before so many are made
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # its time is what is asked for
    if counts:
        host.show_cpu_devices(max(counts))
    host.overlap_collectives()  # as train.py does
    if stage.value == "train":
        return [plan(config, target) for target in targets]
    from nemotron_jax import plan_decode  # which needs jax

    asked = {name: flags.FLAGS[name].value for name in ("rows", "context", "experts")}
    wish = Question(config, "decode", speculative=flags.FLAGS["speculative"].value, **asked).wish()
    engine = plan_decode.engine_of(wish.rows, wish.context, wish.speculative)
    return [plan_decode.plan(config, target, engine, wish.experts) for target in targets]


def _estimated(targets: list[str]) -> list[dict]:
    """Reports of the targets by arithmetic alone."""
    values, names = flags.FLAGS, ("rows", "context", "experts", "speculative", "acceptance")
    tree = copy.deepcopy(values["config"].value)
    mesh = {axis: _positive(axis, size) for axis, size in tree.mesh.items()}
    for axis in mesh:  # of which the estimate takes any, and a run so far not all
        tree.mesh[axis] = 1
    asked = any(name.startswith("mesh.") for name in command_line.overrides())
    question = Question(
        from_config_dict(RunConfig, tree),
        stage=values["stage"].value,
        mesh=mesh if asked else None,
        links=values["links"].value,
        **{name: values[name].value for name in names},
    )
    if targets == ["all"]:
        return over_slices(question)
    for target in targets:
        if cpu_device_count(target) is not None:
            raise ValueError(
                f"target={target!r}: a CPU has no published figures; compile for it, without "
                "--estimate"
            )
    found = []
    for target in targets:
        place = slice_of(target)
        own = asked or math.prod(mesh.values()) == place.size
        found.append(estimate(dataclasses.replace(question, mesh=mesh if own else None), place))
    return found


def _positive(axis: str, size: object) -> int:
    if type(size) is not int or size < 1:
        raise ValueError(f"MeshConfig.{axis}={size!r}: must be an integer of at least 1")
    return size


def plan(config: RunConfig, target: str) -> dict:
    """What the run's step takes on a target, compiled by the target's own compiler.

    Bytes are one device's. Where the compiler itself finds that the step does not fit, `why` is its
    sentence and `temporaries` what it says is used beside the state. Raises ValueError for a target
    that does not exist or has another number of devices than the mesh.
    """
    import jax

    from nemotron_jax import compiled
    from nemotron_jax.sharding import make_mesh

    devices, memory = devices_of(target)
    check_count(config, target, len(devices))
    mesh = make_mesh(config.mesh, devices)
    begin = time.monotonic()
    program, why, state, given = compile_step(config, mesh)
    seconds = time.monotonic() - begin
    found = compiled.collectives(program.as_text()) if program else []
    parameters, optimizer = part_bytes((state.model, given)), part_bytes(state.optimizer)
    if program is None:
        used = _bytes_used(why)
        total, temporaries = used, max(0, used - parameters - optimizer)
    else:
        temporaries, total = memory_of_program(program, target)
    return {
        "target": target,
        "stage": "train",
        "estimated": False,
        "fits": program is not None and total <= memory,
        "bytes_per_device": {
            "parameters": parameters,
            "optimizer": optimizer,
            "temporaries": temporaries,
            "total": total,
            "available": int(memory),
        },
        "collectives": compiled.summary(found),
        "overlap": compiled.overlap(found),
        "compile_seconds": round(seconds, 1),
        "mesh": dataclasses.asdict(config.mesh),
        "rows": config.data.batch_size,
        "sequence_length": config.data.sequence_length,
        "micro_batches": config.training.micro_batches,
        "remat": config.execution.remat,
        "precision": precision_of(config),
        "trains": config.training.trains,
        "jax": jax.__version__,
        "why": why,
    }


def compile_step(config: RunConfig, mesh: "jax.sharding.Mesh") -> tuple:
    """The compiled step, or None and the compiler's sentence why not; the abstract state, and what
    the step is given beside it and the batch."""
    import jax

    from nemotron_jax.training.prepared import abstract_state, prepare_run
    from nemotron_jax.training.step import make_train_step

    run = prepare_run(config)
    state = abstract_state(run, mesh)
    objective = _objective(config, mesh)
    given = objective.given if objective else ()
    with jax.set_mesh(mesh):
        step = make_train_step(run, objective)
        lowered = step.lower(state, _abstract_batch(config, mesh), *given)
    try:
        return lowered.compile(), "", state, given
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, " ".join(str(error).splitlines()[0].split()), state, given


def _objective(config: RunConfig, mesh: "jax.sharding.Mesh") -> "Objective | None":
    """What a student's step minimises, its teacher in shapes alone; None for other stages, whose
    run knows it."""
    from nemotron_jax.model.beside import model_beside
    from nemotron_jax.model.parameters import abstract_model, abstract_on
    from nemotron_jax.training.distillation import distill_objective

    if config.stage != "distill":
        return None
    beside = model_beside(config)
    teacher = abstract_on(abstract_model(beside.model, beside.dtype), mesh)
    return distill_objective(config.training, config.distill, teacher, config.execution)


def table(report: dict) -> str:
    """A report as lines for a terminal."""
    size = {name: value / GB for name, value in report["bytes_per_device"].items()}
    mesh = " × ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1)
    parts = ", ".join(f"{n} {size[n]:.2f}" for n in ("parameters", "optimizer", "temporaries"))
    verdict = "fits" if report["fits"] else "does not fit"
    rows = {
        "target": f"{report['target']}, {mesh or 'one device'}",
        "step": f"{report['rows']} rows of {report['sequence_length']} tokens in "
        f"{report['micro_batches']} micro-batches, remat {report['remat']}",
        "precision": report["precision"],
        "trains": report["trains"],
        "a device": f"{size['total']:.2f} of {size['available']:.1f} GB: {verdict}",
        "of which": f"{parts} GB",
        **{
            kind: f"{row['count']:,} a step, {row['bytes'] / GB:,.2f} GB"
            f"{_overlap(report['overlap'][kind])}"
            for kind, row in report["collectives"].items()
        },
        "compiled in": f"{report['compile_seconds']} s, jax {report['jax']}",
    }
    if report["why"]:
        rows["why"] = report["why"]
    return "\n".join(f"{name:20}{value}" for name, value in rows.items())


def _overlap(row: dict) -> str:
    """What a line of the table says of how a kind of collective runs."""
    parts = [f"{row['asynchronous']:,} asynchronous: {row['bytes'] / GB:,.2f} GB"]
    if row["rings"]:
        parts.append("rings: " + " or ".join(map(str, row["rings"])))
    return "; " + ", ".join(parts)


def _report_file(name: str) -> Path | None:
    """The file that the report is written to; ValueError where it cannot be."""
    if not name:
        return None
    path = command_line.path_of("json", name)
    if "\0" in name:
        raise ValueError(f"--json={name!r}: no file can have that name; name another")
    command_line.writable("json", path.absolute().parent)
    if path.is_dir():
        raise ValueError(f"--json={path}: is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--json={path}: its folder does not exist; make it, or name another")
    return path


def _abstract_batch(config: RunConfig, mesh):
    """Shapes and placement of the run's batches, as its loader makes them."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from nemotron_jax.sharding import activation_spec
    from nemotron_jax.types import Batch

    rows, depths = config.data.batch_size, config.training.mtp_depths
    sharding = NamedSharding(mesh, activation_spec(("batch",), (rows,), mesh.shape))

    def array(dtype, *last: int) -> jax.ShapeDtypeStruct:
        shape = (rows, config.data.sequence_length, *last)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    ids = lambda *last: array(jnp.int32, *last)
    weights = array(jnp.float32, 1 + depths)
    return Batch(ids(), ids(1 + depths), ids(depths), ids(), weights)


def _bytes_used(why: str) -> int:
    """What the TPU's compiler says that the program would use of its memory."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", why)
    return int(float(found[1]) * 2 ** (10 * " KMGT".index(found[2] or " "))) if found else 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run: a file of configs/.")
    flags.DEFINE_string("target", None, "The devices: v5p:8x8x4, h100:8, cpu:8; commas, or all.")
    flags.DEFINE_bool("estimate", False, "Answer by arithmetic, without compiling.")
    flags.DEFINE_enum("stage", "train", STAGES, "What runs there; all but train are estimated.")
    flags.DEFINE_integer("rows", None, "Rows that decode at a time, on the whole slice (64).")
    flags.DEFINE_integer("context", None, "Tokens of context of each of them (32,768).")
    flags.DEFINE_string("experts", "dense", "Format of the experts that decode: dense, nvfp4.")
    flags.DEFINE_integer("speculative", 0, "Drafts of a round of decoding.")
    flags.DEFINE_float("acceptance", None, "Mean tokens of such a round, the sure one included.")
    flags.DEFINE_integer("links", None, "Links that weights move over; by default the mesh's own.")
    flags.DEFINE_string("json", "", "A file for the report.")
    flags.mark_flags_as_required(["config", "target"])
    command_line.run("plan", main)
