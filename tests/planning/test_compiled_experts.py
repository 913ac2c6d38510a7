"""Super's experts spread over devices, as a TPU's own compiler places and moves them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import models, pretrain_super_phase1
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import NVFP4
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.latent_moe import LatentMoE
from nemotron_jax.planning.train import Planner
from nemotron_jax.quant.matmul import EXPERT_ROLES
from nemotron_jax.sharding import ROWS, make_mesh, parameter_sharding
from nemotron_jax.types import Context, Rows
from pallas_kernels import absent
from pallas_kernels.devices import slice_of

pytestmark = pytest.mark.prove_tpu
ROOT = Path(__file__).parents[2]
GB = 1e9
TOKENS = 8192  # of a chip
# Super's layers, two units of them, with an eighth of its vocabulary: tables are a tenth of what
# the whole model's step moves, too.
TWIN = (
    "--config.model.pattern=MEME",
    "--config.model.vocab_size=16384",
    "--config.training.mtp_depths=0",
    "--config.execution.precision.num_last_layers_high=0",
    *("--config.mesh.data=2", "--config.mesh.fsdp=16", "--config.mesh.expert=8"),
)


@pytest.mark.parametrize(("format", "factor", "most"), [("", 1.25, 8), (NVFP4, 1.25, 11)])
def test_a_layers_gradient_fits_whatever_the_router_does(format, factor, most) -> None:
    assert peak_of_layer(format, factor) <= most


def peak_of_layer(format: str, factor: float) -> float:
    """GB of a chip for the gradient of one layer's routed experts, bfloat16 but for the sums, eight
    chips that share the experts of 8,192 tokens each."""
    config = models.super_120b()
    mesh = make_mesh(MeshConfig(expert=8), absent.tpu_devices("v5p:2x2x2"))
    make = lambda: LatentMoE(config.moe, config.width, Init(nnx.Rngs(0), 1.0, 1.0, "bfloat16"))
    layer = jax.eval_shape(make)

    def placed(one: nnx.Variable) -> nnx.Variable:
        like = one.get_value()
        sharding = parameter_sharding(mesh, one.axes, like.shape)
        return one.replace(jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding))

    layer = jax.tree.map(placed, layer, is_leaf=lambda one: isinstance(one, nnx.Variable))
    by_row = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(ROWS))
    row = lambda width, dtype: jax.ShapeDtypeStruct((8, TOKENS, width), dtype, sharding=by_row)
    context = Context(
        Execution(expert_rows=factor),
        jnp.bfloat16,
        formats=tuple((role, format) for role in EXPERT_ROLES if format),
        target="tpu",
    )
    rows = Rows(words=jnp.array([1, 2], jnp.uint32))

    def loss(layer: LatentMoE, latent: jax.Array, logits: jax.Array, cotangent: jax.Array):
        mixed, _, _ = layer._routed(latent, logits, rows, context)
        return jnp.sum(mixed.astype(jnp.float32) * cotangent)

    latent = row(config.moe.latent_width, jnp.bfloat16)
    logits, cotangent = row(config.moe.num_experts, jnp.float32), row(latent.shape[2], jnp.float32)
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
        program = gradient.lower(layer, latent, logits, cotangent).compile()
    return program.memory_analysis().peak_memory_in_bytes / GB


def test_gathers_run_beside_products_with_the_flags_of_a_run() -> None:
    own, plain = overlap(), overlap("--plain")
    assert own["all-gather"]["asynchronous"] > 0 == plain["all-gather"]["asynchronous"]
    # Tokens, and a matrix of the experts that a device has: never those of all devices.
    assert own["all-gather"]["largest"] == plain["all-gather"]["largest"] == 2 * 64 * 1024 * 2688
    assert own["all-gather"]["rings"] == [1]


def overlap(*flags: str) -> dict:
    """What tests/planning/gathers.py prints; libtpu reads its flags once a process."""
    environment = {name: one for name, one in os.environ.items() if name != "LIBTPU_INIT_ARGS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.gathers", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_units_of_super_with_experts_that_stay(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "nemotron_jax.plan", "--target=v5p:8x8x4", f"--json={file}"]
    done = subprocess.run(
        [*command, "--config=configs/pretrain_super_phase1.py", *TWIN],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(json.loads(file.read_text()), twin())


def twin() -> RunConfig:
    config = pretrain_super_phase1.get_config()
    config.model.pattern, config.model.vocab_size = "MEME", 16384
    config.training.mtp_depths, config.execution.precision.num_last_layers_high = 0, 0
    return from_config_dict(RunConfig, config)


def check(report: dict, config: RunConfig) -> None:
    """What a compiled step of Super's layers must keep with experts=8 beside fsdp=16."""
    assert report["fits"] and report["mesh"]["expert"] == 8
    moved = sum(
        row["bytes"] * (2 if kind == "all-reduce" else 1)
        for kind, row in report["collectives"].items()
    )
    assert moved <= 0.28 * along_fsdp(config)
    # No gather is as large as the experts' up in bfloat16.
    moe = config.model.moe
    one_matrix = 2 * moe.num_experts * moe.latent_width * moe.expert_width
    assert report["overlap"]["all-gather"]["largest"] < one_matrix / 2
    assert report["overlap"]["all-gather"]["asynchronous"] > 0


def along_fsdp(config: RunConfig) -> float:
    """Bytes that a step moves along data=2 and fsdp=128, as whole arrays, an all-reduce twice; of
    the compiled step within a hundredth (tests/planning/test_estimate.py)."""
    step = Planner(config, slice_of("v5p:8x8x4")).step({"data": 2, "fsdp": 128}, 12)
    rate = {"sums over data": step.layout.data, "tokens": step.layout.expert}
    return sum(
        seconds / rate.get(name, step.layout.weights)
        for name, seconds in step.network.items()
        if seconds
    )
