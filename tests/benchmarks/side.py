"""One side of a paired measurement: does a case whenever a line comes, and prints its CPU seconds.

    PYTHONPATH=CHECKOUT python tests/benchmarks/side.py JSON      (JSON: case, config, n)

The package and `tests.benchmarks.ours` are those of the checkout, which may be older than this
file: what both know is called by the old names where there are no new ones.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

SEED = 3


def main() -> None:
    """Serve the case of the command line until the input ends."""
    sys.path.pop(0)  # this file's folder, whose neighbours are not the checkout's
    from nemotron_jax import host
    from tests.benchmarks import measure, ours
    from tests.benchmarks.cases import Case

    host.use_huge_pages()
    job = json.loads(sys.argv[1])
    measure.use_threads(2)
    os.environ["JAX_PLATFORMS"] = "cpu"
    host.show_cpu_devices(job["n"])
    run = _runs(Case(**job["case"]), job["config"], job["n"], ours, measure)
    for _ in sys.stdin:
        print(run().cpu_s, flush=True)


def _runs(case: Any, config_file: str, devices: int, ours: Any, measure: Any) -> Callable:
    import jax
    import numpy as np
    from flax import nnx

    import nemotron_jax as nj
    from nemotron_jax.config.execution import Execution
    from nemotron_jax.config.model import ModelConfig

    config = ModelConfig.from_hf(config_file)
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (case.batch, case.length))
    model = jax.block_until_ready(nj.Nemotron(config, rngs=nnx.Rngs(0)))
    if case.kind == "train":
        return ours._train(model, tokens, (Execution(), devices), {})
    if case.kind == "prefill":
        return ours._prefill(model, tokens, case, {})
    made = {"generate": _generate, "engine": _engine, "chat": _chat}[case.kind]
    run = made(nj, model, tokens, case)
    return lambda: measure.timed(run)


def _generate(nj: Any, model: Any, tokens: Any, case: Any) -> Callable[[], None]:
    rows = tokens.tolist()
    return lambda: nj.generate(model, rows, case.new_tokens, seed=SEED)


def _engine(nj: Any, model: Any, tokens: Any, case: Any) -> Callable[[], None]:
    """Requests that come at once, prompts from a quarter of the length to all of it."""
    rows = [row[: len(row) * (1 + n % 4) // 4].tolist() for n, row in enumerate(tokens)]
    sizes = {"slots": 8, "max_length": 128}
    if hasattr(nj, "EngineConfig"):
        engine = nj.Engine(model, nj.EngineConfig(**sizes))
        wanted = nj.Wanted(max_new_tokens=case.new_tokens, temperature=0.0)
        submit = lambda row: engine.submit(row, wanted)
    else:
        from nemotron_jax.decoding.engine import Engine

        engine = Engine(model, **sizes)
        options = {"max_new_tokens": case.new_tokens, "temperature": 0.0}
        submit = lambda row: engine.submit(row, **options)

    def run() -> None:
        for row in rows:
            submit(row)
        engine.run()

    return run


def _chat(nj: Any, model: Any, tokens: Any, case: Any) -> Callable[[], None]:
    """A turn of a conversation as the terminal's chat writes it, sampled and never stopped."""
    (prompt,) = tokens.tolist()
    if hasattr(nj, "EngineConfig"):
        from nemotron_jax import terminal

        wanted = nj.Wanted(case.new_tokens, temperature=1.0, top_p=0.95, seed=SEED)
        length = 512
        write = terminal.engine_writer(terminal.make_engine(model, None, length), wanted, length)
    else:
        from nemotron_jax.decoding.sampling import Sampling

        stream_tokens = importlib.import_module("nemotron_jax.decoding.stream").stream_tokens
        sampling = Sampling.create(1.0, top_p=0.95)
        write = lambda row: stream_tokens(
            model, row, case.new_tokens, sampling=sampling, stop_tokens=(), seed=SEED
        )

    turns = iter(range(3, 1 << 20))

    def run() -> None:  # another prompt each time: nothing of it is known from before
        count = sum(1 for _ in write([next(turns) % model.config.vocab_size, *prompt]))
        assert count == case.new_tokens

    return run


if __name__ == "__main__":
    main()
