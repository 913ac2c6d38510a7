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
_LOSS_CHUNK = 512  # tokens whose logits stand at once, as in a run
_COPIED = 16  # times that many numbers are copied, more than caches hold
_COPIES = 8  # in one program, since fresh memory costs more than what is written to it


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
    import jax

    from nemotron_jax.config.run import MeshConfig
    from nemotron_jax.sharding import make_mesh

    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices())):  # as a run has it
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
    copied = clock(lambda a: jax.lax.fori_loop(0, _COPIES, lambda _, b: b + 1, a), many)
    # By CPU time: what one core does in a second, which two do at once in half of it.
    rates = {
        "flops_per_cpu_second": 2 * _SIZE**3 / product.cpu_s,
        "bytes_per_cpu_second": 2 * _COPIES * many.nbytes / copied.cpu_s,
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
    given = _Given(rows, length)
    return [*_mamba(given), *_attention(given), *_moe(given), *_ends(given), *_step(given)]


class _Given:
    """What the parts are made of: sizes, and random operands."""

    def __init__(self, rows: int, length: int) -> None:
        import jax
        import jax.numpy as jnp

        from nemotron_jax.config.execution import Execution
        from nemotron_jax.config.model import ModelConfig
        from nemotron_jax.types import Context, Rows

        self.config = ModelConfig.from_hf(str(CONFIG))
        self.rows, self.length, self.tokens = rows, length, rows * length
        self.width = self.config.width
        self._keys = iter(jax.random.split(jax.random.key(1), 64))
        self._context, self._rows = Context(Execution(), jnp.float32), Rows()
        self.hidden = self.normal(rows, length, self.width)

    def normal(self, *shape: int) -> Any:
        import jax

        return jax.random.normal(next(self._keys), shape)

    def ids(self, *shape: int) -> Any:
        import jax

        return jax.random.randint(next(self._keys), shape, 0, self.config.vocab_size)

    def mixer(self, kind: str) -> Any:
        from flax import nnx

        from nemotron_jax.model.block import Block

        return Block(self.config, kind, rngs=nnx.Rngs(0), dtype="float32").mixer

    def through(self, layer: Any, x: Any) -> Any:
        """What a layer makes of hidden states."""
        return layer(x, self._rows, None, self._context)[0]

    def routed(self, layer: Any, x: Any, logits: Any) -> Any:
        """What a layer's routed experts make of latents, by the router's logits."""
        return layer._routed(x, logits, self._rows, self._context)[0]


def _mamba(given: _Given) -> list[Part]:
    import jax
    import jax.numpy as jnp

    from pallas_kernels import causal_conv1d, ssd_scan

    sizes, layers, normal = given.config.mamba, given.config.pattern.count("M"), given.normal
    inner, shared = sizes.inner_width, sizes.num_groups * sizes.state_size
    heads = (given.rows, given.length, sizes.num_heads, sizes.head_dim)
    groups = (given.rows, given.length, sizes.num_groups, sizes.state_size)
    steps, decays = jax.nn.softplus(normal(*heads[:3]) - 3), -jnp.exp(normal(sizes.num_heads))
    scanned = (normal(*heads), steps, decays, normal(*groups), normal(*groups))
    scanned += (jnp.ones(sizes.num_heads),)
    rows, width = (given.rows, given.length, sizes.conv_channels), sizes.conv_channels
    convolved = (normal(*rows), normal(sizes.conv_width, width), normal(width))
    projected = 2 * given.tokens * given.width * (3 * inner + 2 * shared + sizes.num_heads)
    scan = given.tokens * inner * (5 * sizes.state_size + 2)
    convolution = 2 * given.tokens * width * sizes.conv_width
    whole = (given.mixer("mamba"), given.hidden)
    return [
        Part("Mamba-2 layers", given.through, whole, projected + scan + convolution, layers),
        Part(". selective scan", lambda *a: ssd_scan(*a)[0], scanned, scan, layers),
        Part(". convolution", lambda *a: causal_conv1d(*a)[0], convolved, convolution, layers),
    ]


def _attention(given: _Given) -> list[Part]:
    from pallas_kernels import attention

    sizes, layers = given.config.attention, given.config.pattern.count("*")
    query_width = sizes.num_heads * sizes.head_dim
    key_width = sizes.num_kv_heads * sizes.head_dim
    heads = lambda count: given.normal(given.rows, given.length, count, sizes.head_dim)
    alone = (heads(sizes.num_heads), heads(sizes.num_kv_heads), heads(sizes.num_kv_heads))
    scores = 2 * given.tokens * query_width * given.length  # half of the pairs, two products
    projected = 4 * given.tokens * given.width * (query_width + key_width)
    whole = (given.mixer("attention"), given.hidden)
    return [
        Part("attention layers", given.through, whole, projected + scores, layers),
        Part(". attention alone", attention, alone, scores, layers),
    ]


def _moe(given: _Given) -> list[Part]:
    sizes, layers, tokens = given.config.moe, given.config.pattern.count("E"), given.tokens
    latent, layer = sizes.latent_width or given.width, given.mixer("moe")
    routed = 4 * tokens * sizes.experts_per_token * latent * sizes.expert_width
    shared = 4 * tokens * given.width * sizes.shared_width
    others = 2 * tokens * given.width * sizes.num_experts
    others += 4 * tokens * given.width * latent if sizes.latent_width else 0
    shape = (given.rows, given.length)
    operands = (layer, given.normal(*shape, latent), given.normal(*shape, sizes.num_experts))
    whole = (layer, given.hidden)
    return [
        Part("MoE layers", given.through, whole, routed + shared + others, layers),
        Part(". routed experts", given.routed, operands, routed, layers),
        Part(". shared expert", given.through, (layer.shared, given.hidden), shared, layers),
    ]


def _ends(given: _Given) -> list[Part]:
    import jax.numpy as jnp

    from nemotron_jax.layers.norm import RMSNorm
    from nemotron_jax.training.chunked import Chunked, cross_entropy, weighted_loss

    config, tokens, width = given.config, given.tokens, given.width
    norm = RMSNorm(width, config.norm_epsilon)
    ids, targets = given.ids(given.rows, given.length), given.ids(tokens)
    weights = jnp.full(tokens, 1 / tokens)
    how = Chunked(cross_entropy, _LOSS_CHUNK)
    loss = lambda hidden, head: weighted_loss(hidden, head, targets, None, weights, how)
    head = given.normal(width, config.vocab_size) * width**-0.5
    of_head = (given.hidden.reshape(tokens, width), head)
    table = (given.normal(config.vocab_size, width),)
    return [
        Part("norms", lambda n, x: x + n(x), (norm, given.hidden), 0, len(config.pattern) + 1),
        Part("embedding", lambda table: table[ids], table, 0),
        Part("head and loss", loss, of_head, 2 * tokens * width * config.vocab_size),
    ]


def _step(given: _Given) -> list[Part]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from nemotron_jax.config.execution import Execution
    from nemotron_jax.config.run import DataConfig, RunConfig, ScheduleConfig, TrainingConfig
    from nemotron_jax.model.accounting import training_flops
    from nemotron_jax.model.nemotron import Nemotron
    from nemotron_jax.model.parameters import flatten
    from nemotron_jax.training.prepared import first_state, prepare_run
    from nemotron_jax.training.step import train_step
    from tests.benchmarks.ours import whole_rows

    schedule = ScheduleConfig(1e-4, 1e-4, 0, 0, total_tokens=10**9)
    training = TrainingConfig(steps=10**6, schedule=schedule, mtp_depths=0, loss_chunk=_LOSS_CHUNK)
    data = DataConfig(sequence_length=given.length, batch_size=given.rows)
    run = prepare_run(RunConfig(model=given.config, training=training, data=data))
    state = first_state(run, Nemotron(given.config, rngs=nnx.Rngs(0)))
    batch, objective = whole_rows(given.ids(given.rows, given.length)), run.objective(Execution())
    step = lambda state, batch: train_step(state, batch, run, objective)
    parameters = run.trained.select(flatten(state.model))
    moved = (jax.tree.map(jnp.ones_like, parameters), state.optimizer, parameters)
    flops = given.tokens * training_flops(given.config, given.length).total
    return [
        Part("optimizer", run.optimizer.update, moved, 0, differentiated=False),
        Part("the whole step", step, (state, batch), flops, differentiated=False),
    ]


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
