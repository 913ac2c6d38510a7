"""The training step by its parts: CPU time of each, alone, beside the floor of its products.

    python -m tests.benchmarks.parts [--rows=8] [--length=512] [--repetitions=5] [--output=FILE]

One CPU device, float32, the model of `config.json`. A part is one layer's, compiled alone and
multiplied by the number of its layers: forward, and forward with every gradient. Lines that begin
with a dot are within the line above them. "Floor" is the longer of its products at the rate of a
large product and of its operands and results at the rate of a copy, both measured here first; what
is fused with its neighbours in the whole step costs less there than alone.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax import host
from tests.benchmarks import measure

CONFIG = Path(__file__).parent / "config.json"
_SIZE = 1024  # of the square product and, squared, of the copy that the floors are from
_COPIED = 16  # times that many numbers are copied


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of the step: `run` of one layer, or of `count` layers together."""

    name: str
    run: Callable[..., Any]
    operands: tuple[Any, ...]
    flops: int  # of a layer's products forward; backward costs twice that
    layers: int = 1
    differentiated: bool = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every part and print the table; also as JSON where `--output` names a file."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.parts")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    flags = parser.parse_args(arguments)
    host.use_huge_pages()
    measure.use_threads(flags.threads)
    os.environ["JAX_PLATFORMS"] = "cpu"
    host.show_cpu_devices(1)
    host.keep_compiled_programs()
    found = measured(flags.rows, flags.length, flags.repetitions)
    print("\n".join(table(found)))
    if flags.output:
        flags.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def measured(rows: int, length: int, repetitions: int) -> dict[str, Any]:
    """The machine's rates, and of each part its CPU and wall seconds and its floor."""
    import jax
    import jax.numpy as jnp

    clock = lambda run, *operands: _best(jax.jit(run), operands, repetitions)
    matrix = jax.random.normal(jax.random.key(0), (_SIZE, _SIZE))
    product = clock(jnp.matmul, matrix, matrix)
    many = jnp.ones((_COPIED, _SIZE, _SIZE))
    copied = clock(lambda a: a + 1, many)
    # By CPU time: what one core does in a second, which two do at once in half of it.
    rates = {
        "flops_per_cpu_second": 2 * _SIZE**3 / product.cpu_s,
        "bytes_per_cpu_second": 2 * many.nbytes / copied.cpu_s,
    }
    found = []
    for part in parts(rows, length):
        forward = clock(part.run, *part.operands)
        whole = clock(_with_gradients(part.run), *part.operands) if part.differentiated else forward
        results = jax.eval_shape(part.run, *part.operands)
        moved = _bytes(part.operands) + _bytes(results)
        factor = 3 if part.differentiated else 1
        floor = max(
            part.flops * factor / rates["flops_per_cpu_second"],
            moved * factor / rates["bytes_per_cpu_second"],
        )
        found.append(
            {
                "part": part.name,
                "layers": part.layers,
                "forward_cpu_s": part.layers * forward.cpu_s,
                "cpu_s": part.layers * whole.cpu_s,
                "wall_s": part.layers * whole.wall_s,
                "gflop": part.layers * part.flops * factor / 1e9,
                "moved_mb": part.layers * moved * factor / 1e6,
                "floor_cpu_s": part.layers * floor,
            }
        )
        print(f"  {part.name}: {part.layers * whole.cpu_s:.3f} s of CPU", file=sys.stderr)
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    return {
        "rows": rows,
        "length": length,
        "cpu": _cpu(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **rates,
        "parts": found,
    }


def parts(rows: int, length: int) -> list[Part]:
    """The pieces of a step of `rows` rows, the whole step last."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from nemotron_jax.config.execution import Execution
    from nemotron_jax.config.model import ModelConfig
    from nemotron_jax.layers.norm import RMSNorm
    from nemotron_jax.model.block import Block
    from nemotron_jax.training.losses import weighted_nll
    from nemotron_jax.types import Context, Rows
    from pallas_kernels import attention, causal_conv1d, ssd_scan

    config = ModelConfig.from_hf(str(CONFIG))
    context = Context(Execution(), jnp.float32)
    tokens, width = rows * length, config.width
    keys = iter(jax.random.split(jax.random.key(1), 64))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    block = lambda kind: Block(config, kind, rngs=nnx.Rngs(0), dtype="float32").mixer
    hidden = normal(rows, length, width)
    told = Rows()
    through = lambda layer, x: layer(x, told, None, context)[0]
    count = config.pattern.count

    mamba, of = config.mamba, config.attention
    inner, shared = mamba.inner_width, mamba.num_groups * mamba.state_size
    projections = 2 * tokens * width * (3 * inner + 2 * shared + mamba.num_heads)
    heads = (rows, length, mamba.num_heads, mamba.head_dim)
    groups = (rows, length, mamba.num_groups, mamba.state_size)
    scan = (
        normal(*heads),
        jax.nn.softplus(normal(*heads[:3]) - 3),
        -jnp.exp(normal(mamba.num_heads)),
        normal(*groups),
        normal(*groups),
        jnp.ones(mamba.num_heads),
    )
    scan_flops = tokens * inner * (5 * mamba.state_size + 2)
    channels = mamba.conv_channels
    convolution = (
        normal(rows, length, channels),
        normal(mamba.conv_width, channels),
        normal(channels),
    )

    query_width, key_width = of.num_heads * of.head_dim, of.num_kv_heads * of.head_dim
    heads_of = lambda number: normal(rows, length, number, of.head_dim)
    attended = (heads_of(of.num_heads), heads_of(of.num_kv_heads), heads_of(of.num_kv_heads))
    attention_flops = 2 * tokens * query_width * length  # half of the pairs, twice a product

    moe, experts = config.moe, block("moe")
    latent = moe.latent_width or width
    routed_flops = 4 * tokens * moe.experts_per_token * latent * moe.expert_width
    router_flops = 2 * tokens * width * moe.num_experts
    shared_flops = 4 * tokens * width * moe.shared_width
    latent_flops = 4 * tokens * width * latent if moe.latent_width else 0
    routed = lambda layer, x, logits: layer._routed(x, logits, told, context)[0]

    head = normal(width, config.vocab_size) * width**-0.5
    targets = jax.random.randint(next(keys), (tokens,), 0, config.vocab_size)
    weights = jnp.full(tokens, 1 / tokens)
    losses = lambda hidden, head: weighted_nll(hidden, head, targets, weights, 512)
    table = normal(config.vocab_size, width)
    ids = jax.random.randint(next(keys), (rows, length), 0, config.vocab_size)
    step, state, batch, optimizer, gradients, moments, parameters = _training(config, rows, length)
    update = lambda g, m, p: optimizer.update(g, m, p)
    return [
        Part(
            "Mamba-2 layers",
            through,
            (block("mamba"), hidden),
            projections + scan_flops + 2 * tokens * channels * mamba.conv_width,
            count("M"),
        ),
        Part(". selective scan", lambda *a: ssd_scan(*a)[0], scan, scan_flops, count("M")),
        Part(
            ". convolution",
            lambda x, w, b: causal_conv1d(x, w, b)[0],
            convolution,
            2 * tokens * channels * mamba.conv_width,
            count("M"),
        ),
        Part(
            "attention layers",
            through,
            (block("attention"), hidden),
            4 * tokens * width * (query_width + key_width) + attention_flops,
            count("*"),
        ),
        Part(". attention alone", attention, attended, attention_flops, count("*")),
        Part(
            "MoE layers",
            through,
            (experts, hidden),
            routed_flops + router_flops + shared_flops + latent_flops,
            count("E"),
        ),
        Part(
            ". routed experts",
            routed,
            (experts, normal(rows, length, latent), normal(rows, length, moe.num_experts)),
            routed_flops,
            count("E"),
        ),
        Part(". shared expert", through, (experts.shared, hidden), shared_flops, count("E")),
        Part(
            "norms",
            lambda norm, x: x + norm(x),
            (RMSNorm(width, config.norm_epsilon), hidden),
            0,
            len(config.pattern) + 1,
        ),
        Part("embedding", lambda table: table[ids], (table,), 0),
        Part(
            "head and loss",
            losses,
            (hidden.reshape(tokens, width), head),
            2 * tokens * width * config.vocab_size,
        ),
        Part("optimizer", update, (gradients, moments, parameters), 0, differentiated=False),
        Part("the whole step", step, (state, batch), _step_flops(config, tokens, length), 1, False),
    ]


def _step_flops(config: Any, tokens: int, length: int) -> int:
    from nemotron_jax.model.accounting import training_flops

    return tokens * training_flops(config, length).total


def _training(config: Any, rows: int, length: int) -> tuple[Any, ...]:
    """A run's step, state and batch; its optimizer, gradients, moments and parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from nemotron_jax.config.run import DataConfig, RunConfig, ScheduleConfig, TrainingConfig
    from nemotron_jax.model.nemotron import Nemotron
    from nemotron_jax.model.parameters import flatten
    from nemotron_jax.training.prepared import first_state, prepare_run
    from nemotron_jax.training.step import train_step
    from tests.benchmarks.ours import _whole_rows

    schedule = ScheduleConfig(1e-4, 1e-4, 0, 0, total_tokens=10**9)
    run = prepare_run(
        RunConfig(
            model=config,
            training=TrainingConfig(steps=10**6, schedule=schedule, mtp_depths=0),
            data=DataConfig(sequence_length=length, batch_size=rows),
        )
    )
    state = first_state(run, Nemotron(config, rngs=nnx.Rngs(0)))
    batch = _whole_rows(np.random.default_rng(0).integers(3, config.vocab_size, (rows, length)))
    objective = run.objective(run.config.execution)
    step = lambda state, batch: train_step(state, batch, run, objective)
    parameters = run.trained.select(flatten(state.model))
    gradients = jax.tree.map(jnp.ones_like, parameters)
    return step, state, batch, run.optimizer, gradients, state.optimizer, parameters


def _with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """Results and the cotangents of all operands that have one, for cotangents of ones."""
    import jax
    import jax.numpy as jnp

    def both(*operands: Any) -> Any:
        results, pull = jax.vjp(run, *operands)
        return results, pull(jax.tree.map(jnp.ones_like, results))

    return both


def _best(run: Callable[..., Any], operands: tuple[Any, ...], repetitions: int) -> measure.Duration:
    """The least CPU time and the least wall time of some calls, after one that compiles."""
    import jax

    call = lambda: jax.block_until_ready(run(*operands))
    call()
    times = [measure.timed(call) for _ in range(repetitions)]
    return measure.Duration(min(t.wall_s for t in times), min(t.cpu_s for t in times))


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _cpu() -> str:
    """The model that the processor says it is."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


def table(found: dict[str, Any]) -> list[str]:
    """Markdown lines; shares are of the whole step's CPU time."""
    step = found["parts"][-1]["cpu_s"]
    lines = [
        f"{found['rows']} rows of {found['length']} tokens on {found['cpu']}, "
        f"jax {found['versions']['jax']}. A core does "
        f"{found['flops_per_cpu_second'] / 1e9:.0f} GFLOP/s in a product of {_SIZE}³ and copies "
        f"{found['bytes_per_cpu_second'] / 1e9:.1f} GB/s.",
        "",
        "| part | layers | forward, CPU ms | with gradients | of the step | GFLOP | MB "
        "| floor, CPU ms | times it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["parts"]:
        floor = row["floor_cpu_s"]
        lines.append(
            f"| {row['part']} | {row['layers']} | {1e3 * row['forward_cpu_s']:.0f} "
            f"| {1e3 * row['cpu_s']:.0f} | {row['cpu_s'] / step:.0%} | {row['gflop']:.1f} "
            f"| {row['moved_mb']:.0f} | {1e3 * floor:.0f} | {row['cpu_s'] / floor:.1f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
