"""On a mesh, experts that stay NVFP4 codes decode to the tokens of the floats they stand for."""

import functools

import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.decoding.generate import Generated
from nemotron_jax.model.parameters import flatten
from tests.decoding.engines import make, quick_programs, submit  # noqa: F401
from tests.golden_cases import GOLDEN

SUPER = GOLDEN.parent / "quantised" / "super_nvfp4"
MESHES = {
    "one device": None,
    "crossed": MeshConfig(tensor=2, expert=2),
    "all": MeshConfig(tensor=2, expert=2, data=2),  # rows are shared too, and experts with them
}
PROMPTS = [np.random.default_rng(n).integers(0, 144, 3 + 2 * n).tolist() for n in range(2)]
LIMIT = 1e-5  # of log-probabilities: float32 sums made in another order
NEW = 8


@functools.cache
def loaded(experts: str, mesh: str = "one device") -> nj.Nemotron:
    return nj.load_pretrained(SUPER, experts=experts, mesh=MESHES[mesh])


@functools.cache
def of_the_floats() -> Generated:
    """What the dequantised twin generates on one device; drafts do not change greedy tokens."""
    return nj.generate(loaded("dense"), PROMPTS, NEW, speculative=2)


@pytest.mark.more
@pytest.mark.parametrize("mesh", ["crossed", "all"])
def test_codes_and_scales_are_cut_together_by_whole_experts(mesh: str) -> None:
    model = loaded("nvfp4", mesh)
    leaves = flatten(model)
    parts = [leaf for name, leaf in leaves.items() if name.endswith((".words", ".scales"))]
    assert len(parts) == 4 * model.config.pattern.count("E")
    assert len({leaf.sharding.spec[0] for leaf in parts}) == 1
    for leaf in parts:
        own = leaf.sharding.shard_shape(leaf.shape)
        assert own == (leaf.shape[0] // MESHES[mesh].size, *leaf.shape[1:])


@pytest.mark.more
@pytest.mark.parametrize("k", [0, 2])
def test_generate_gives_the_floats_tokens(k: int) -> None:
    expected = of_the_floats()
    found = nj.generate(loaded("nvfp4", "crossed"), PROMPTS, NEW, speculative=k)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=LIMIT)
    if k:
        assert found.acceptance == expected.acceptance


@pytest.mark.more
def test_an_engine_with_drafts_gives_the_floats_tokens() -> None:
    engine = make(loaded("nvfp4", "all"), 2)
    requests = [submit(engine, prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    engine.run()
    for row, request in enumerate(requests):
        assert request.tokens == of_the_floats().tokens[row].tolist()
        np.testing.assert_allclose(request.logprobs, of_the_floats().logprobs[row], atol=LIMIT)
