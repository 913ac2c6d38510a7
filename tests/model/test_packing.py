"""Experts held as NVFP4 codes compute what their floats compute, in fewer bytes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import nemotron_jax as nj
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.config.run import MeshConfig, ScheduleConfig, TrainingConfig
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from nemotron_jax.layers.packed import PackedMatrix, _rounded_by_owners
from nemotron_jax.model.adapters import add_adapters, merge_adapters
from nemotron_jax.model.packing import pack_experts
from nemotron_jax.model.parameters import abstract_model, flatten, unflatten
from nemotron_jax.pretrained import load_rounded
from nemotron_jax.training.losses import pretrain_objective
from nemotron_jax.types import Batch, Rows
from tests.golden_cases import GOLDEN
from tests.tiny_models import quick_jit, randomised, tiny_config

SUPER = GOLDEN.parent / "quantised" / "super_nvfp4"
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 144, (2, 9)))


@pytest.fixture(scope="module")
def dense() -> nj.Nemotron:
    return nj.load_pretrained(SUPER)


@pytest.fixture(scope="module")
def stored() -> nj.Nemotron:
    """The experts' codes as the files have them."""
    return nj.load_pretrained(SUPER, experts="nvfp4")


def assert_same(left, right) -> None:
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        np.testing.assert_array_equal(leaf, right[name], err_msg=name)


def test_codes_and_scales_are_the_files_own(stored) -> None:
    file = SafetensorsFile(SUPER / "model.safetensors")
    for part in ("up", "down"):
        matrix = getattr(stored.moe.mixer.experts, part)
        packed = nj.for_decoding(stored).moe[2].mixer.experts
        weight = getattr(packed, part).weight(part).value
        name = f"backbone.layers.6.mixer.experts.5.{part}_proj.weight"  # the third of its kind
        halves = file.read(name)
        codes = np.stack([halves & 15, halves >> 4], axis=-1).reshape(len(halves), -1)
        np.testing.assert_array_equal(weight.codes()[5], codes.T)
        scales = file.read(f"{name}_scale").T
        found = np.asarray(matrix.scales[2, 5])
        np.testing.assert_array_equal(found[: len(scales)], scales)
        assert not found[len(scales) :].astype(np.float32).any()
        assert matrix.factor[2, 5] == file.read(f"{name}_scale_2")


def test_unpacked_codes_are_the_dequantised_floats(dense, stored) -> None:
    assert (dense.experts_format, stored.experts_format) == ("dense", "nvfp4")
    assert_same(nj.unpacked(stored), dense)
    assert_same(nj.for_decoding(stored, experts="dense"), nj.for_decoding(dense))


def test_rounding_what_codes_stand_for_gives_their_values_back(dense) -> None:
    once = nj.unpacked(pack_experts(dense))
    assert_same(nj.unpacked(pack_experts(pack_experts(once))), nj.unpacked(pack_experts(once)))


@pytest.mark.parametrize("layout", ["decoding", "training"])
@pytest.mark.parametrize("axes", [{"expert": 2}, {"fsdp": 2}, {"tensor": 2, "fsdp": 2}], ids=str)
def test_on_a_mesh_each_device_rounds_its_own_experts(dense, tmp_path, axes, layout) -> None:
    nj.save_pretrained(dense, tmp_path, dtype="float32")
    found = load_rounded(tmp_path, mesh=MeshConfig(**axes), experts="nvfp4", layout=layout)
    codes = pack_experts(dense)
    wanted = flatten(codes.split_layers() if layout == "decoding" else codes)
    for name, leaf in flatten(found).items():
        if ".experts." in name:
            np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
            parts = leaf.size // leaf.addressable_shards[0].data.size
            assert parts == (1 if name.endswith("factor") else math.prod(axes.values())), name


def test_matrices_of_a_shape_are_rounded_by_one_program() -> None:
    before = _rounded_by_owners._cache_size()
    for seed in range(3):
        values = jax.random.normal(jax.random.key(seed), (2, 32, 80))
        found = PackedMatrix.of(nnx.Param(values, axes=("experts", "latent", "hidden")))
        assert found.shape == (2, 32, 80)
    assert _rounded_by_owners._cache_size() == before + 1


def test_filled_columns_are_of_no_matter(tmp_path) -> None:
    """Up's 496 columns lie as 512: bytes, values and tokens are the same."""
    small = tiny_config("ME")
    moe = dataclasses.replace(small.moe, expert_width=496, shared_width=32, latent_width=32)
    config = dataclasses.replace(small, width=32, moe=moe)
    nj.save_pretrained(
        randomised(abstract_model(config), 0), tmp_path / "first", quantization="nvfp4"
    )
    held, plain = (nj.load_pretrained(tmp_path / "first", experts=e) for e in ("nvfp4", "dense"))
    up = held.moe.mixer.experts.up
    assert up.words.shape[-1] == up.scales.shape[-1] == 512 and up.shape[-1] == 496
    assert_same(nj.unpacked(held), plain)
    hidden = [model(TOKENS % 50).hidden for model in (held, plain)]
    np.testing.assert_allclose(*hidden, atol=1e-5)
    shared = nj.load_pretrained(tmp_path / "first", experts="nvfp4", mesh=MeshConfig(expert=2))
    np.testing.assert_array_equal(shared.moe[0].mixer.experts.up.words, up.words[0])
    nj.save_pretrained(held, tmp_path / "again", quantization="nvfp4")
    for file in (tmp_path / "first").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_layer_of_codes_computes_what_its_floats_compute(stored, dense) -> None:
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 9, 48)), jnp.float32)
    context = stored._context(nj.Execution())
    run = quick_jit(lambda mixer: mixer(x, Rows(), None, context)[0])
    found, expected = (run(nj.for_decoding(m).moe[1].mixer) for m in (stored, dense))
    # A factor multiplies the products' sums here and the weights there: float32's last digits.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 2])
def test_generated_tokens_are_those_of_the_floats(stored, dense, k) -> None:
    options = {"max_new_tokens": 6, "speculative": k}
    found = nj.generate(stored, TOKENS[:, :5], **options)
    expected = nj.generate(dense, TOKENS[:, :5], **options)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_bytes_are_those_of_the_buffers(stored, dense) -> None:
    found, floats = nj.bytes_of(stored), nj.bytes_of(dense)
    assert floats["total"] == sum(leaf.nbytes for leaf in flatten(dense).values())
    # Less here than at a real size: a block's rows are filled up, and the MTP block holds floats.
    assert found["other"] == floats["other"] and found["experts"] < floats["experts"]
    wide = nnx.Param(jnp.ones((2, 256, 40), jnp.bfloat16), axes=("experts", "latent", "hidden"))
    packed = jax.eval_shape(PackedMatrix.of, wide)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    assert size == wide[...].size * 9 // 16 + 2 * 4  # 4.5 bits of 16, and a factor each


def test_gradients_through_codes_are_refused_by_name(stored) -> None:
    leaves = flatten(stored)

    def loss(embedding):
        model = unflatten(stored, leaves | {"embedding": embedding})
        return jnp.sum(model(TOKENS).hidden)

    with pytest.raises(ValueError, match="experts.up are NVFP4 codes, through which no gradient"):
        jax.eval_shape(jax.grad(loss), leaves["embedding"])


@pytest.mark.parametrize("name", ["the whole model", "the loss of a step"])
def test_a_gradient_of_the_whole_model_is_refused_in_one_line(stored, name) -> None:
    """With the weight's name and the way out."""
    weights = jnp.ones((*TOKENS.shape, 1))
    batch = Batch(TOKENS, TOKENS[..., None], TOKENS[..., None], jnp.ones_like(TOKENS), weights)
    training = TrainingConfig(steps=1, schedule=ScheduleConfig(1e-3, 0, 1, 1, 2), mtp_depths=0)
    objective = pretrain_objective(training, nj.Execution())
    loss = {
        "the whole model": lambda model: jnp.sum(model(TOKENS).hidden),
        "the loss of a step": lambda model: objective.loss(
            model, batch, totals=objective.totals(batch), key=None
        )[0],
    }[name]
    with pytest.raises(ValueError) as caught:
        jax.grad(loss)(stored)
    assert str(caught.value) == (
        "experts.up are NVFP4 codes, through which no gradient is computed; train "
        "adapters beside them, or unpacked(model)"
    )


def test_what_codes_cannot_do_is_refused_by_name(stored, dense, tmp_path) -> None:
    with pytest.raises(ValueError, match="save_pretrained: .* NVFP4 codes.*unpacked"):
        nj.save_pretrained(stored, tmp_path / "out")
    with pytest.raises(ValueError, match="merge_adapters: moe.mixer.experts.up are NVFP4 codes"):
        lora = LoRAConfig(targets=("experts",))
        merge_adapters(add_adapters(stored, lora, jax.random.key(0)))
    with pytest.raises(ValueError, match="for_decoding.experts='fp4': must be one of"):
        nj.for_decoding(dense, experts="fp4")
    floats = GOLDEN / "hybrid_moe_latent" / "checkpoint"
    with pytest.raises(ValueError, match="experts.0.up_proj.weight in another way"):
        nj.load_pretrained(floats, experts="nvfp4")
    with pytest.raises(ValueError, match="has no routed experts"):
        nj.for_decoding(nj.load_pretrained(GOLDEN / "dense" / "checkpoint"), experts="nvfp4")


def test_codes_are_not_quantised_again(stored) -> None:
    execution = nj.Execution(precision=nemotron3_nvfp4(num_last_layers_high=0))
    with pytest.raises(ValueError, match="NVFP4 codes, and the precision recipe would quantise"):
        jax.eval_shape(lambda: stored(TOKENS, key=jax.random.key(0), execution=execution))
