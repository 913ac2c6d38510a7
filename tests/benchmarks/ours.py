"""One case in nemotron_jax, float32, on the CPU.

    python -m tests.benchmarks.ours JSON      (JSON: case, config, threads, execution)

Prints one line of JSON. The kinds are the peer's, and `gemm`, `attention` and `rest`: the rates of
a large float32 product and of the attention that a prefill does, alone, and the prefill of the
model without its attention layers.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from nemotron_jax import host
from tests.benchmarks import measure
from tests.benchmarks.cases import Case, case_from_json

LAST_LAYERS_HIGH = 0.15  # of the layers, where precision=nvfp4 asks for the published recipe
GEMM_WIDTH = 1024  # of the square product whose rate stands for the machine's


def main() -> None:
    """Measure the case of the command line."""
    host.use_huge_pages()
    job = json.loads(sys.argv[1])
    measure.use_threads(job["threads"])
    os.environ["JAX_PLATFORMS"] = "cpu"
    case = case_from_json(job["case"])
    execution = job.get("execution", {})
    devices = int(execution.pop("devices", 1))
    host.show_cpu_devices(devices)
    print(json.dumps(run_case(case, job["config"], execution, devices)))


def run_case(
    case: Case, config_file: str, execution: dict[str, str], devices: int = 1
) -> dict[str, Any]:
    """Times, memory and versions of one case; `execution` holds fields of Execution."""
    import flax
    import jax
    import numpy as np
    from flax import nnx

    from nemotron_jax.config.execution import Execution
    from nemotron_jax.config.model import ModelConfig
    from nemotron_jax.config.precision import nemotron3_nvfp4
    from nemotron_jax.model.nemotron import Nemotron
    from nemotron_jax.model.parameters import flatten

    config = ModelConfig.from_hf(config_file)
    if case.kind == "rest":
        config = dataclasses.replace(config, pattern=config.pattern.replace("*", ""))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (case.batch, case.length))
    versions = {"jax": jax.__version__, "flax": flax.__version__}
    result: dict[str, Any] = {"versions": versions}
    if case.kind in _PRIMITIVES:
        run = _PRIMITIVES[case.kind](config, case, result)
        return {**measure.repeat(case, run), **result}
    model = jax.block_until_ready(Nemotron(config, rngs=nnx.Rngs(0)))
    result["parameters"] = sum(leaf.size for leaf in flatten(model).values())
    result["idle_mb"] = measure.resident_mb()
    if case.kind == "train":
        if execution.pop("precision", None):
            layers = round(LAST_LAYERS_HIGH * config.num_layers)
            execution["precision"] = nemotron3_nvfp4(layers)
        run = _train(model, tokens, (Execution(**execution), devices), result)
    else:
        kinds = {"prefill": _prefill, "rest": _prefill, "decode": _decode}
        run = kinds[case.kind](model, tokens, case, result)
    return {**measure.repeat(case, run), **result}


def _train(
    model: Any, tokens: Any, way: tuple[Any, int], result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import jax

    from nemotron_jax.config.run import (
        DataConfig,
        MeshConfig,
        RunConfig,
        ScheduleConfig,
        TrainingConfig,
    )
    from nemotron_jax.sharding import make_mesh, place_batch
    from nemotron_jax.training.prepared import place_state, prepare_run
    from nemotron_jax.training.step import compile_train_step

    batch, length = tokens.shape
    execution, devices = way
    schedule = ScheduleConfig(1e-4, 1e-4, 0, 0, total_tokens=10**9)
    config = RunConfig(
        model=model.config,
        training=TrainingConfig(steps=10**6, schedule=schedule, mtp_depths=0),
        data=DataConfig(sequence_length=length, batch_size=batch),
        execution=execution,
        mesh=MeshConfig(data=devices),
    )
    with jax.set_mesh(make_mesh(config.mesh, jax.devices())):
        prepared = prepare_run(config)
        state = place_state(prepared, model)
        rows = place_batch(whole_rows(tokens))
        start = time.perf_counter()
        step = compile_train_step(prepared, state, rows)
        host.give_back_freed_memory()  # as the training loop does
    result["compile_s"] = time.perf_counter() - start
    result["compile_peak_mb"] = measure.peak_mb()
    result["temporary_mb"] = step.memory_analysis().temp_size_in_bytes / 2**20
    box = [state]
    del state, model  # the step donates the state

    def run() -> None:
        box[0], metrics = step(box[0], rows)
        jax.block_until_ready(box[0])
        result["loss"] = float(metrics["loss"])

    return lambda: measure.timed(run)


def whole_rows(tokens: Any) -> Any:
    """A batch of rows that are one document each; the last token has nothing to predict."""
    import jax.numpy as jnp
    import numpy as np

    from nemotron_jax.types import Batch

    targets = np.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return Batch(
        tokens=jnp.asarray(tokens, jnp.int32),
        targets=jnp.asarray(targets[..., None], jnp.int32),
        mtp_tokens=jnp.zeros((*tokens.shape, 0), jnp.int32),
        segment_ids=jnp.ones(tokens.shape, jnp.int32),
        weights=jnp.asarray(weights[..., None]),
    )


def _prefill(
    model: Any, tokens: Any, case: Case, result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import jax

    from nemotron_jax.decoding.reading import prefill

    rows = tokens.tolist()

    def run() -> None:
        cache, _ = jax.block_until_ready(prefill(model, rows, extra=0))
        result["state_bytes"] = _state_bytes(cache)

    return lambda: measure.timed(run)


def _decode(
    model: Any, tokens: Any, case: Case, result: dict[str, Any]
) -> Callable[[], measure.Duration]:
    import jax
    import numpy as np

    from nemotron_jax.config.execution import Execution
    from nemotron_jax.decoding import lockstep
    from nemotron_jax.decoding.loop import Sizes
    from nemotron_jax.decoding.reading import prefill
    from nemotron_jax.decoding.request import Request
    from nemotron_jax.decoding.rules import Asked, Free
    from nemotron_jax.decoding.step import for_decoding
    from nemotron_jax.decoding.store import FlatModel
    from nemotron_jax.decoding.wanted import Wanted

    rows, model = tokens.tolist(), for_decoding(model)
    weights, sizes = FlatModel.of(model), Sizes(case.new_tokens, 0)
    wanted = Wanted(case.new_tokens)
    requests = {n: Request((0,), wanted, n, lambda: False) for n in range(len(rows))}
    asked = Asked.of(requests, len(rows), Free(model.config.vocab_size))
    flags = np.ones(len(rows), bool)
    rounds = np.int32(case.new_tokens - 1)

    def run() -> measure.Duration:
        cache, logits = jax.block_until_ready(prefill(model, rows, extra=case.new_tokens + 1))
        result["state_bytes"] = _state_bytes(cache)
        hidden = jax.numpy.zeros((len(rows), model.config.width), logits.dtype)
        told = lockstep._DecodeRows(hidden, asked.given, flags, flags, asked)
        decode = lambda: jax.block_until_ready(  # noqa: E731
            lockstep._decode(weights, cache, told, rounds, sizes=sizes, execution=Execution())
        )
        return measure.timed(decode)

    return run


def _state_bytes(cache: Any) -> int:
    import jax

    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def _gemm(config: Any, case: Case, result: dict[str, Any]) -> Callable[[], measure.Duration]:
    import jax
    import jax.numpy as jnp

    matrix = jax.random.normal(jax.random.key(0), (GEMM_WIDTH, GEMM_WIDTH), jnp.float32)
    product = jax.jit(jnp.matmul)
    result["flops"] = 2 * GEMM_WIDTH**3
    return lambda: measure.timed(lambda: jax.block_until_ready(product(matrix, matrix)))


def _attention(config: Any, case: Case, result: dict[str, Any]) -> Callable[[], measure.Duration]:
    """All attention of one layer's prefill, chunk by chunk against a cache as `prefill` does it."""
    import jax
    import numpy as np

    from nemotron_jax.decoding.reading import PREFILL_CHUNK
    from nemotron_jax.model.accounting import forward_flops
    from pallas_kernels import attention

    sizes, length = config.attention, case.length
    chunk = min(PREFILL_CHUNK, length)
    shape = lambda tokens, heads: (case.batch, tokens, heads, sizes.head_dim)  # noqa: E731
    normal = lambda key, shape: jax.random.normal(jax.random.key(key), shape)  # noqa: E731
    q = normal(0, shape(chunk, sizes.num_heads))
    k, v = (normal(key, shape(length, sizes.num_kv_heads)) for key in (1, 2))
    attend = jax.jit(lambda q, k, v, at: attention(q, k, v, q_offset=at))
    offsets = [np.full(case.batch, start, np.int32) for start in range(0, length, chunk)]
    layers = config.pattern.count("*")
    once = forward_flops(dataclasses.replace(config, pattern="*"), length).attention
    result |= {"flops": case.batch * once * length // 2, "layers": layers}

    def run() -> None:
        for at in offsets:
            jax.block_until_ready(attend(q, k, v, at))

    return lambda: measure.timed(run)


_PRIMITIVES = {"gemm": _gemm, "attention": _attention}


if __name__ == "__main__":
    main()
