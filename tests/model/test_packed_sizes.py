"""What experts as codes take: on disk, in buffers, and of the process that holds them."""

import json
import math
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest

import nemotron_jax as nj
from configs import models
from nemotron_jax.config.model import MambaConfig, ModelConfig, MoEConfig
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.model import accounting
from nemotron_jax.model.packing import pack_experts
from nemotron_jax.model.parameters import abstract_model, flatten, unflatten

# 201 million weights of routed experts: 113 MB of codes.
CONFIG = ModelConfig(
    vocab_size=512,
    width=256,
    pattern="MEEE",
    mamba=MambaConfig(num_heads=4, head_dim=32, state_size=16, num_groups=1, chunk=16),
    moe=MoEConfig(
        num_experts=64, experts_per_token=2, expert_width=1024, shared_width=256, latent_width=512
    ),
)
MEASURE = """
import json, sys
import jax, nemotron_jax as nj
jax.devices()[0], jax.numpy.zeros(1).block_until_ready()
pages = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096
nj.load_pretrained(sys.argv[2], experts="nvfp4", dtype="bfloat16")  # what is imported then
before = pages()
model = nj.load_pretrained(sys.argv[1], experts="nvfp4", dtype="bfloat16")
jax.block_until_ready(model)
print(json.dumps({"grown": pages() - before, **nj.bytes_of(model)}))
"""


def test_the_whole_of_super_is_a_third() -> None:
    config = models.super_120b()
    packed = accounting.weight_bytes(config, experts="nvfp4")
    assert packed / accounting.weight_bytes(config) <= 0.34
    model = jax.eval_shape(pack_experts, abstract_model(config, "bfloat16"))
    size = lambda leaf: math.prod(leaf.shape) * leaf.dtype.itemsize
    sizes = {name: size(leaf) for name, leaf in flatten(model).items()}
    experts = sum(size for name, size in sizes.items() if ".mixer.experts." in name)
    floats = accounting.weight_bytes(config) - accounting.weight_bytes(config, experts="nvfp4")
    dense = flatten(abstract_model(config, "bfloat16"))
    was = sum(size(leaf) for name, leaf in dense.items() if ".mixer.experts." in name)
    assert was - experts == floats and experts / was <= 0.30


def random_codes(config: ModelConfig) -> nj.Nemotron:
    """A model whose experts are any codes; nothing is rounded to make them."""
    rng = np.random.default_rng(0)
    model = jax.eval_shape(pack_experts, abstract_model(config, "bfloat16"))

    def drawn(name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if name.endswith(".words"):  # any bits
            return rng.integers(2**32, size=leaf.shape, dtype=np.uint32).view(np.float32)
        if leaf.dtype == ml_dtypes.float8_e4m3fn:
            return rng.integers(8, 120, leaf.shape, np.uint8).view(leaf.dtype)
        return (0.02 * rng.standard_normal(leaf.shape)).astype(leaf.dtype).clip(0)

    return unflatten(model, {name: drawn(name, leaf) for name, leaf in flatten(model).items()})


@pytest.mark.slow
def test_codes_take_what_they_should_on_disk_and_in_memory(tmp_path) -> None:
    for name, config in (("model", CONFIG), ("warm", nj.ModelConfig(**(vars(CONFIG) | SMALL)))):
        nj.save_pretrained(random_codes(config), tmp_path / name, quantization="nvfp4")
    weights = 3 * 64 * 2 * 512 * 1024
    file = SafetensorsFile(tmp_path / "model" / "model.safetensors")
    entries = {n: e for n, e in file.entries.items() if ".mixer.experts." in n}
    disk = sum(math.prod(e.shape) * e.dtype.itemsize for e in entries.values())
    command = [sys.executable, "-c", MEASURE, tmp_path / "model", tmp_path / "warm"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    print(f"{disk / 2 / weights:.4f} of bfloat16 on disk; {found}")
    assert disk <= 0.30 * 2 * weights and found["experts"] <= 0.30 * 2 * weights
    assert found["total"] >= 100e6
    assert abs(found["grown"] - found["total"]) <= 0.1 * found["total"]


SMALL = {"moe": MoEConfig(num_experts=2, experts_per_token=1, expert_width=128, shared_width=128)}
