"""The step in emulated NVFP4 beside the float32 step, by CPU time, in turns in one process.

    python -m tests.benchmarks.emulated [--batch=2] [--length=512] [--pairs=24]

A pair is a step of each; CPU time of all threads, so that other processes count for little.
"""

import argparse
import os
import statistics
from pathlib import Path

CONFIG = Path(__file__).with_name("config.json")
WARM_UP = 2  # pairs that are not counted


def main() -> None:
    """Print both times and the quartiles of their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"batch": 2, "length": 512, "pairs": 24}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    flags = parser.parse_args()
    from tests.benchmarks import measure, ours

    measure.use_threads(2)
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from flax import nnx

    import nemotron_jax as nj
    from nemotron_jax.config.precision import nemotron3_nvfp4

    config = nj.ModelConfig.from_hf(CONFIG)
    shape = flags.batch, flags.length
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, shape)
    last = round(ours.LAST_LAYERS_HIGH * config.num_layers)
    ways = [nj.Execution(), nj.Execution(precision=nemotron3_nvfp4(last))]
    model = lambda: nj.Nemotron(config, rngs=nnx.Rngs(0))  # each step takes its own
    runs = [ours._train(model(), tokens, (way, 1), {}) for way in ways]
    pairs = []
    for number in range(-WARM_UP, flags.pairs):
        order = (0, 1) if number % 2 else (1, 0)
        seconds = {side: runs[side]().cpu_s for side in order}
        if number >= 0:
            pairs.append((seconds[0], seconds[1]))
    float32, emulated = (statistics.median(side) for side in zip(*pairs))
    low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
    print(f"float32 {float32:.3f} s, emulated {emulated:.3f} s of CPU time a step, medians")
    print(f"ratio {middle:.3f}, quartiles {low:.3f} to {high:.3f}, of {len(pairs)} pairs")


if __name__ == "__main__":
    main()
