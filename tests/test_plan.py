"""The planner says what the compiled step takes, and what a target lacks."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from configs import models, pretrain_tiny, qad_tiny
from nemotron_jax.compiled import collectives, overlap, summary
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.model.parameters import flatten
from nemotron_jax.plan import _report_file, compile_step, plan
from nemotron_jax.planning.targets import memory_of_program
from nemotron_jax.sharding import make_mesh
from pallas_kernels import absent
from tests.training.runs import changed, small_run

ROOT = Path(__file__).parents[1]
SMALL = (
    "--config.model.pattern=ME",
    "--config.model.vocab_size=512",
    "--config.model.width=64",
    "--config.training.mtp_depths=0",
    "--config.data.sequence_length=64",
    "--config.training.loss_chunk=64",
)


def test_a_step_is_planned_for_eight_devices(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nemotron_jax.plan", "--config=configs/pretrain_tiny.py"),
            *("--target=cpu:8", "--config.mesh.data=2", "--config.mesh.fsdp=4", f"--json={report}"),
            *SMALL,
        ],
        cwd=ROOT,
        # Not the four devices of this process; compiling quickly.
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    size = found["bytes_per_device"]
    assert found["fits"] and size["total"] <= size["available"]
    # A device has a quarter of every matrix and of its two moments; vectors are whole. The MTP
    # block has no loss here, and so no moments.
    count = accounting.parameters(planned_model())
    assert 1 <= size["parameters"] / count.total < 1.05
    assert 1 <= size["optimizer"] / (2 * count.main) < 1.05
    assert size["total"] >= size["parameters"] + size["optimizer"] + size["temporaries"]
    kinds = found["collectives"]
    assert kinds["all-gather"]["count"] > 0 and kinds["all-gather"]["bytes"] > size["parameters"]
    assert (found["mesh"]["data"], found["mesh"]["fsdp"]) == (2, 4)
    assert (found["rows"], found["sequence_length"], found["micro_batches"]) == (8, 64, 1)
    assert (found["remat"], found["precision"], found["why"]) == ("none", "auto", "")
    assert found["compile_seconds"] > 0
    assert "data 2 × fsdp 4" in done.stdout and "fits" in done.stdout


@pytest.mark.parametrize("name", ["", "report.json", "folder", "absent/x.json", "file/x", "\0"])
def test_a_report_that_cannot_be_written_is_found_before_the_step_is_compiled(
    tmp_path, name
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    if not name or name == "report.json":
        path = tmp_path / name if name else None
        assert _report_file(str(path or "")) == path
        return
    with pytest.raises(ValueError, match="--json="):
        _report_file(str(tmp_path / name))


@pytest.mark.parametrize(
    ("target", "mesh", "sentence"),
    [
        ("cpu:4", {}, "has 4 devices, but .* is 1; such as --config.mesh.data=1 --config.mesh.fs"),
        ("cpu:4", {"data": 2}, "--config.mesh.data=2 --config.mesh.fsdp=2"),
        ("cpu:64", {}, r"this process shows \d+ CPU devices; start it with"),
        ("cpu:", {}, "how many devices"),
        ("cpu:0", {}, "how many devices, from cpu:1 to"),
        ("cpu:1000000", {}, "how many devices, from cpu:1 to"),
        ("cpu:\u00b2", {}, "how many devices"),
        ("cpu:" + "9" * 5000, {}, "how many devices"),
        ("h100:8", {}, "must be a TPU with the sides of its topology, such as v5p:8x8x4"),
        ("v5p:2x2", {}, "v5p has 3 sides"),
        ("v5p:0x2x2", {}, "must be a TPU"),
    ],
)
def test_a_wrong_target_is_one_sentence(target: str, mesh: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan(changed(small_run("nowhere"), mesh=mesh), target)


def test_without_libtpu_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[tpu\]'"):
        absent.tpu_devices("v5p:2x2x1")


def test_collectives_are_counted_with_the_trips_of_their_loops() -> None:
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, PartitionSpec(None, "x"))

    def local(part):
        def inner(carry, _):
            whole = jax.lax.all_gather(carry, "x", axis=1, tiled=True)
            return carry + whole[:, :4], None

        def outer(carry, _):
            carry = jax.lax.scan(inner, carry, None, length=3)[0]
            return carry * jax.lax.psum(jnp.sum(carry), "x"), None

        return jax.lax.scan(outer, part, None, length=5)[0]

    run = jax.shard_map(local, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec)
    like = jax.ShapeDtypeStruct((8, 16), np.float32, sharding=sharding)
    table = summary(collectives(jax.jit(run).lower(like).compile().as_text()))
    assert table["all-gather"] == {"count": 15, "bytes": 15 * math.prod((8, 16)) * 4}
    assert table["all-reduce"] == {"count": 5, "bytes": 5 * 4}


def planned_model() -> ModelConfig:
    config = models.tiny()
    return dataclasses.replace(config, pattern="ME", vocab_size=512, width=64)


TPU_TEXT = """
HloModule jit_step

%all-reduce-scatter.3 (p: f32[64,8]) -> f32[16,8] {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0:T(8,128)} all-reduce(%p), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %slice = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={16,8}
}

%condition (c: (s32[], bf16[16,8])) -> pred[] {
  %end = s32[]{:T(128)} constant(42)
  %c.1 = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%c.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %end), direction=LT
}

%body (c: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %c = (s32[]{:T(128)}, bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[16,8]{1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %ags = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%w), dimensions={0}
  %agd = bf16[64,8]{1,0} all-gather-done(%ags)
  %g = f32[64,8]{1,0} convert(%agd)
  %f = f32[16,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %t = (s32[]{:T(128)}, bf16[16,8]{1,0}) tuple(%c, %w)
}

%some (p: bf16[16,8]) -> bf16[64,8] {
  %p.1 = bf16[16,8]{1,0} parameter(0)
  ROOT %ag = bf16[64,8]{1,0} all-gather(%p.1), dimensions={0}
}

%none (p: bf16[16,8]) -> bf16[64,8] {
  %p.2 = bf16[16,8]{1,0} parameter(0)
  ROOT %z = bf16[64,8]{1,0} broadcast(%p.2), dimensions={}
}

ENTRY %main (w: bf16[16,8], b: s32[]) -> bf16[64,8] {
  %w.1 = bf16[16,8]{1,0} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  %two = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%two)
  %a = (s32[]{:T(128)}, bf16[16,8]{1,0}) tuple(%start, %w.1)
  %loop = (s32[]{:T(128)}, bf16[16,8]) while(%a), condition=%condition, body=%body
  %x = bf16[16,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %r = bf16[64,8]{1,0} conditional(%b, %x, %x), branch_computations={%none, %some}
}
"""


def test_a_tpu_program_is_read_too() -> None:
    found = collectives(TPU_TEXT)
    assert summary(found) == {
        "all-gather": {"count": 41, "bytes": 41 * 64 * 8 * 2},
        "reduce-scatter": {"count": 40, "bytes": 40 * 64 * 8 * 4},
    }
    assert {one.dtype for one in found if one.kind == "all-gather"} == {"bf16"}


def test_rows_that_differ_in_number_are_a_kind_of_their_own() -> None:
    text = TPU_TEXT.replace(
        "bf16[64,8]{1,0} all-gather(%p.1), dimensions={0}",
        "bf16[64,8]{1,0} ragged-all-to-all(%p.1), replica_groups={{0,1,2,3}}",
    )
    assert summary(collectives(text))["ragged-all-to-all"] == {"count": 1, "bytes": 64 * 8 * 2}


# A gather that is started, goes on beside a product and ends: the same instruction three times.
ASYNCHRONOUS = """
HloModule jit_step

%begin (p: bf16[16,8]) -> (bf16[16,8], bf16[64,8]) {
  %p = bf16[16,8]{1,0} parameter(0)
  %ag.1 = bf16[64,8]{1,0} all-gather(%p), backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p: bf16[16,8]) -> bf16[64,8] {
  %p.1 = bf16[16,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[64,8]{1,0} all-gather(%p.1), backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%scatter (p: f32[64,8]) -> f32[16,8] {
  %p.2 = f32[64,8]{1,0} parameter(0)
  ROOT %rs = f32[16,8]{1,0} reduce-scatter(%p.2), to_apply=%add
}

ENTRY %main (w: bf16[16,8], g: f32[64,8]) -> f32[16,8] {
  %w = bf16[16,8]{1,0} parameter(0)
  %g = f32[64,8]{1,0} parameter(1)
  %async-collective-start = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) fusion(%w), kind=kCustom, calls=%begin
  %product = bf16[64,8]{1,0} fusion(%w), kind=kOutput, calls=%beside
  %async-collective-done = bf16[64,8]{1,0} fusion(%w), kind=kCustom, calls=%beside
  %whole = bf16[64,8]{1,0} all-gather(%w), backend_config={"collective_algorithm_config":{"emitter":"1DAllGatherOnMajorDim"}}
  ROOT %f = f32[16,8]{1,0} fusion(%g), kind=kCustom, calls=%scatter, backend_config={"debug":"StrategyRing{colors:2 phases:1}"}
}
"""  # noqa: E501


def test_an_asynchronous_collective_is_one_and_rings_are_the_compilers() -> None:
    found = collectives(ASYNCHRONOUS)
    size = 64 * 8 * 2
    assert summary(found)["all-gather"] == {"count": 2, "bytes": 2 * size}
    assert overlap(found) == {
        "all-gather": {"asynchronous": 1, "bytes": size, "largest": size, "rings": [1]},
        "reduce-scatter": {"asynchronous": 0, "bytes": 0, "largest": 2 * size, "rings": [2]},
    }
    # Those whose start and end are instructions of their own are asynchronous too.
    of_loop = overlap(collectives(TPU_TEXT))["all-gather"]
    assert of_loop["asynchronous"] == 40 and of_loop["rings"] == []


def test_a_loop_whose_end_is_not_a_constant_counts_once() -> None:
    for text in (
        TPU_TEXT.replace("constant(42)", "negate(%counter)"),
        TPU_TEXT.replace("direction=LT", "direction=NE"),
    ):
        assert summary(collectives(text))["reduce-scatter"]["count"] == 1


@pytest.mark.more
def test_a_students_step_is_given_its_teacher(tmp_path: Path) -> None:
    config = from_config_dict(RunConfig, qad_tiny.get_config())
    config = changed(
        config,
        model={"pattern": "M", "vocab_size": 512, "width": 64},
        mesh={"data": 1},
        data={"sequence_length": 64},
        execution={"precision": PrecisionConfig()},
        distill={"teacher": str(tmp_path)},
    )
    size = plan(config, "cpu:1")["bytes_per_device"]
    count = accounting.parameters(config.model)
    assert size["parameters"] == 4 * (count.total + count.main)
    assert size["total"] > size["parameters"] + size["optimizer"]


@pytest.mark.prove_tpu
def test_on_v5p_weights_are_gathered_in_bfloat16_and_gradients_scattered_in_float32() -> None:
    config = from_config_dict(RunConfig, pretrain_tiny.get_config())
    config = changed(
        config,
        model={"pattern": "MEME", "width": 256},
        mesh={"data": 1, "fsdp": 4},
        execution={"compute_dtype": "bfloat16", "remat": "mixers"},
        training={"mtp_depths": 0, "micro_batches": 2},
    )
    mesh = make_mesh(config.mesh, absent.tpu_devices("v5p:2x2x1"))
    program, _, state, _ = compile_step(config, mesh)
    found = collectives(program.as_text())
    gathers, scatters, sums = (
        [one for one in found if one.kind == kind]
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    table = {name: leaf for name, leaf in flatten(state.model).items() if "mtp_" not in name}
    nbytes = {name: 4 * leaf.size for name, leaf in table.items()}
    router = nbytes["moe.mixer.router.weight"] // 2  # of one layer; its logits are float32's
    assert {one.dtype for one in gathers if one.bytes != router} == {"bf16"}
    parts = {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in table.items()}
    cut = sum(nbytes[name] for name, leaf in table.items() if parts[name] != leaf.shape)
    moved = lambda ones: sum(one.count * one.bytes for one in ones)
    assert {one.dtype for one in scatters} == {"f32"} and moved(scatters) > 0.98 * cut
    # Vectors, convolutions, and matrices too thin to scatter: summed whole, in each micro-batch.
    thin = ("dt.weight", "router.weight")
    whole = [n for n, leaf in table.items() if parts[n] == leaf.shape or n.endswith(thin)]
    assert moved(sums) < 1.02 * 2 * sum(nbytes[name] for name in whole) < 0.02 * cut
    # Each micro-batch takes every layer's weights forward and backward, embedding and head once.
    tables = nbytes["embedding"] + nbytes["head.weight"]
    assert moved(gathers) == pytest.approx((4 * (cut - tables) + 2 * tables) / 2, rel=0.02)


@pytest.mark.prove_tpu
def test_an_axis_may_take_half_of_a_torus() -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=128), absent.tpu_devices("v5p:8x8x4"))
    assert mesh.shape["fsdp"] == 128 and len(set(mesh.devices.flat)) == 256


@pytest.mark.prove_tpu
def test_what_a_loop_inside_a_loop_holds_is_counted_once_on_a_tpu() -> None:
    def inner(carry, number):
        return jnp.roll(carry, 1, 0) * number, None

    def outer(carry, number):
        return jax.lax.scan(inner, carry, jnp.arange(3.0) + number)[0] + carry, None

    total = lambda x: jnp.sum(jax.lax.scan(outer, x, jnp.arange(5.0))[0])
    sharding = SingleDeviceSharding(absent.tpu_devices("v6e:2x2")[0])
    x = jax.ShapeDtypeStruct((8192, 8192), np.float32, sharding=sharding)
    temporaries, everything = memory_of_program(jax.jit(total).lower(x).compile(), "v6e:2x2")
    # Both carries and the rolled array: as many allocations as the compiler's own report has.
    array = 4 * math.prod(x.shape)
    assert temporaries == pytest.approx(3 * array, rel=0.01)
    assert everything == pytest.approx(4 * array, rel=0.01)
