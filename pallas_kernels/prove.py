"""Compile every TPU kernel for TPUs that are not here, and say what it takes.

python -m pallas_kernels.prove --target=v5p [--json=FILE] [--kernels=NAME,...] [--plain]. The true
compiler runs, so what compiles here compiles there; nothing is run. Times are static: bundles times
trips, or what the matrix units or the memory need where that is more.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.devices import DEVICES, SMALLEST, Device
from pallas_kernels.report import report_file

FOLDERS = ("grouped_matmul", "ssd", "nvfp4", "causal_conv1d", "attention")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove as the arguments say; exit status 1 where a kernel did not compile, 2 where none
    could."""
    flags = _parser().parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rows: list[dict] = []
    try:
        for target in flags.target.split(","):
            print(heading(target), flush=True)
            for row in prove(
                target, flags.kernels.split(",") if flags.kernels else (), flags.plain
            ):
                rows.append(row)
                print(line(row), flush=True)
    except ValueError as error:
        print(f"prove: {error}", file=sys.stderr)
        return 2
    if flags.json:
        Path(flags.json).write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    failed = sum(not row["compiled"] for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} compiled")
    return 1 if failed or not rows else 0


def prove(target: str, kernels: Sequence[str] = (), plain: bool = False) -> Iterator[dict]:
    """One row for each kernel, direction and shape; with `plain`, XLA's own version beside it.

    Raises ValueError for an unknown target and where libtpu is not installed.
    """
    with listings() as folder:
        from pallas_kernels import absent

        if target not in SMALLEST:
            raise ValueError(f"target={target!r}: must be one of {', '.join(SMALLEST)}")
        device = absent.tpu_devices(absent.smallest(target))[0]
        for proof in all_proofs():
            if not kernels or proof.kernel in kernels:
                yield row_of(proof, target, device, folder, plain)


def all_proofs() -> Iterator[Any]:
    """What every folder gives to be proven."""
    for folder in FOLDERS:
        name = f"pallas_kernels.{folder}.proofs"
        if importlib.util.find_spec(name) is not None:
            yield from importlib.import_module(name).proofs()


def row_of(proof: Any, target: str, device: Any, folder: Path | None, plain: bool = False) -> dict:
    """What compiling one kernel for a target tells; `folder` is that of `listings`, or None where
    no cycles are asked for."""
    begin = time.monotonic()
    program, why = _compiled(proof.run, proof.operands, device)
    seconds = time.monotonic() - begin
    row: dict = {
        "kernel": proof.kernel,
        "direction": proof.direction,
        "shape": proof.shape,
        "target": target,
        "compiled": program is not None,
        "why": why,
        "vmem_bytes": None,
        "flops": proof.flops,
        "bytes": proof.bytes,
        "cycles": None,
        "nanoseconds": None,
        "bound": None,
        "spills": None,
        "temporaries": None,
        "seconds": round(seconds, 1),
    }
    if program is not None:
        row["temporaries"] = program.memory_analysis().temp_size_in_bytes
        row["vmem_bytes"] = _vmem(program.as_text(), proof.kernel)
        row |= _static(proof, DEVICES[target], folder) if folder else {}
    _empty(folder)
    if plain and proof.plain is not None:
        other, reason = _compiled(proof.plain, proof.operands, device)
        _empty(folder)
        row["xla"] = {
            "compiled": other is not None,
            "why": reason,
            "temporaries": other and other.memory_analysis().temp_size_in_bytes,
        }
    return row


@contextlib.contextmanager
def listings() -> Iterator[Path]:
    """A folder in which the compiler leaves its listings; it is told once, when it is loaded."""
    folder = Path(os.environ.setdefault(_FOLDER, tempfile.mkdtemp(prefix="prove-")))
    folder.mkdir(exist_ok=True)
    options = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    if options not in (given := os.environ.get("LIBTPU_INIT_ARGS", "")):
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} {options}".strip()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def heading(target: str) -> str:
    """The table's first line."""
    names = ("compiled", "VMEM", "spills", "GFLOP", "MB", "cycles", "µs", "bound", "temporaries")
    return f"{target:60}{'shape':8}" + "".join(f"{name:>12}" for name in names)


def line(row: dict) -> str:
    """A row as a line for a terminal."""
    show = lambda value, scale, digits: "" if value is None else f"{value / scale:,.{digits}f}"
    cells = (
        f"{row['seconds']:.0f} s" if row["compiled"] else "no",
        show(row["vmem_bytes"], 2**20, 1),
        show(row["spills"], 1, 0),
        show(row["flops"], 1e9, 1),
        show(row["bytes"], 1e6, 1),
        show(row["cycles"], 1, 0),
        show(row["nanoseconds"], 1e3, 1),
        row["bound"] or "",
        show(row["temporaries"], 1e6, 1),
    )
    text = f"{row['kernel'] + ' ' + row['direction']:60}{row['shape']:8}"
    text += "".join(f"{cell:>12}" for cell in cells)
    if "xla" in row:
        xla = row["xla"]
        text += f"\n{'  in plain XLA':68}" + "".join(
            f"{cell:>12}" for cell in ("yes" if xla["compiled"] else "no", *[""] * 7)
        )
        text += f"{show(xla['temporaries'], 1e6, 1):>12}"
    return text + (f"\n    {row['why']}" if row["why"] else "")


def _compiled(run: Any, operands: Sequence[Any], device: Any) -> tuple[Any, str]:
    """The program, or None and in one line why there is none. It is traced on a mesh of the device,
    whose kind some kernels ask for."""
    import jax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh, whole = Mesh([device], ("chip",), axis_types=(AxisType.Auto,)), PartitionSpec()
    place = NamedSharding(mesh, whole)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in operands]
    local = jax.shard_map(run, in_specs=whole, out_specs=whole, check_vma=False)
    try:
        with jax.set_mesh(mesh):
            return jax.jit(local).lower(*shapes).compile(), ""
    except Exception as error:  # noqa: BLE001  whatever the compiler says is the row's answer
        text = " ".join(str(error).split()) or type(error).__name__
        return None, text[:400]


def _vmem(text: str, kernel: str) -> int | None:
    """Bytes of fast memory that the compiler gave to a kernel."""
    for entry in text.splitlines():
        if "tpu_custom_call" in entry and re.match(rf"\s*(ROOT )?%{kernel}[. ]", entry):
            sizes = re.search(r'"used_scoped_memory_configs":(\[[^\]]*\])', entry)
            return sum(int(one["size"]) for one in json.loads(sizes[1])) if sizes else None
    return None


def _static(proof: Any, chip: Device, folder: Path) -> dict:
    """Static cycles of one core, spills, and what bounds the time."""
    from pallas_kernels import bundles

    name = re.compile(rf"-{proof.kernel}(\.\d+)?-\d+-(final_bundles|final_hlo-static.*)\.txt$")
    files = {m[2]: file for file in folder.iterdir() if (m := name.search(file.name))}
    listing = next((f for key, f in files.items() if key == "final_bundles"), None)
    slots = next((f for key, f in files.items() if key != "final_bundles"), None)
    found: dict = {"spills": slots and _spills(slots.read_text())}
    multiplied = proof.flops if proof.multiplied_flops is None else proof.multiplied_flops
    needs = {
        "matrix unit": 1e9 * multiplied / chip.flops,
        "memory": 1e9 * proof.bytes / chip.hbm,
    }
    if listing is not None and proof.steps:
        parts = bundles.parts(listing.read_text())
        try:
            cycles = bundles.cycles(parts, proof.steps, proof.branches) / chip.cores
        except ValueError as error:
            return {**found, "why": str(error)}
        found["cycles"] = round(cycles)
        needs["bundles"] = cycles / chip.clock_ghz
        found["bound"] = max(needs, key=needs.get)
        found["nanoseconds"] = round(needs[found["bound"]])
    return found


def _spills(slots: str) -> int:
    """Stores of registers that did not suffice, in the program's text."""
    lines = slots.splitlines()
    column = [name.strip() for name in lines[1].split(",")].index("VSTORE:SPILL")
    rows = (entry.split() for entry in lines[4:])
    return sum(int(row[column]) for row in rows if len(row) > column)


_FOLDER = "PALLAS_KERNELS_LISTINGS"


def _empty(folder: Path | None) -> None:
    for file in folder.iterdir() if folder else ():
        file.unlink()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.prove", description=__doc__)
    add = parser.add_argument
    add("--target", required=True, help=f"of {', '.join(SMALLEST)}, one or several with commas")
    add("--json", default="", type=report_file, help="a file for the rows")
    add("--kernels", default="", help="names of kernels, with commas; all by default")
    add("--plain", action="store_true", help="compile XLA's version of each too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
