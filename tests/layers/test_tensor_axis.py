"""Heads, groups, hidden units and a vocabulary that devices share give one device's numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import AttentionConfig, MambaConfig
from nemotron_jax.config.run import MeshConfig
from nemotron_jax.layers.attention import Attention, held_heads
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.mamba2 import Mamba2
from nemotron_jax.layers.mlp import MLP
from nemotron_jax.sharding import local, make_mesh
from nemotron_jax.sharding.vocabulary import Vocabulary
from nemotron_jax.sharding.weights import cuts_of
from nemotron_jax.training.chunked import Chunked, Divergence, cross_entropy
from nemotron_jax.training.losses import over_rows, token_nll
from nemotron_jax.types import Context, Rows, Weight
from tests.tiny_models import quick_jit

WIDTH, LENGTH, ROWS, WORDS = 32, 12, 2, 24
LIMIT = 2e-6  # float32 sums made in another order
AXES = ("width", "vocabulary")
CONTEXT = Context(Execution(), jnp.float32, target="cpu")


def attention(kv_heads: int = 2) -> Attention:
    config = AttentionConfig(num_heads=8, num_kv_heads=kv_heads, head_dim=8)
    return Attention(config, WIDTH, Init(nnx.Rngs(0), 0.2, 0.2))


def mamba() -> Mamba2:
    config = MambaConfig(num_heads=8, head_dim=8, state_size=8, num_groups=4, chunk=8)
    return Mamba2(config, WIDTH, Init(nnx.Rngs(0), 0.2, 0.2), epsilon=1e-5)


LAYERS = {
    "attention": attention,
    "mamba": mamba,
    "mlp": lambda: MLP("mlp", WIDTH, 16, Init(nnx.Rngs(0), 0.2, 0.2)),
}
more = lambda *values: pytest.param(*values, marks=pytest.mark.more)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("attention", 4),
        more("attention", 2),
        more("attention", 8),
        more("mamba", 2),
        more("mamba", 4),
        more("mlp", 4),
    ],
)
def test_a_layer_whose_heads_are_shared_equals_one_device(name, tensor):
    assert_close(of_layer(name, tensor), of_layer(name, 1))


@pytest.mark.parametrize(("heads", "tensor", "held"), [(2, 1, 2), (2, 4, 4), (4, 2, 4), (1, 8, 8)])
def test_key_heads_are_repeated_until_each_device_has_its_own(heads, tensor, held):
    with on(tensor):
        assert held_heads(attention(heads).config) == held


@pytest.mark.parametrize("tensor", [4, more(2), more(5)])  # 5 divides no vocabulary of 24
def test_losses_over_a_shared_vocabulary_equal_one_device(tensor):
    assert_close(of_losses(tensor), of_losses(1))


def test_a_part_of_a_vocabulary_taken_for_the_whole_is_found(monkeypatch):
    monkeypatch.setattr(Vocabulary, "of", staticmethod(lambda cuts, axis: Vocabulary()))
    with pytest.raises(AssertionError):
        assert_close(of_losses.__wrapped__(4), of_losses(1))


def assert_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        gap = np.linalg.norm(got[name] - value) / np.linalg.norm(value)
        assert np.linalg.norm(value) > 0 and gap < LIMIT, (name, gap)


def on(tensor: int):
    return jax.set_mesh(make_mesh(MeshConfig(tensor=tensor), jax.devices()))


@functools.cache
def of_layer(name: str, tensor: int) -> dict[str, np.ndarray]:
    """The layer's output and every gradient by name."""
    x, cotangent = normal(0, 2, ROWS, LENGTH, WIDTH)
    starts = np.random.default_rng(1).random((ROWS, LENGTH)) < 0.3
    rows = Rows(documents=jnp.cumsum(jnp.asarray(starts), axis=1))

    def loss(layer: nnx.Module, x: jax.Array) -> tuple:
        y = layer(x, rows, None, CONTEXT)[0]
        return jnp.sum(y * cotangent), y

    with on(tensor):
        run = quick_jit(jax.grad(loss, (0, 1), has_aux=True))
        (of_layer, of_x), y = jax.device_get(run(LAYERS[name](), x))
    state = nnx.to_flat_state(nnx.state(of_layer, nnx.Param))
    found = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
    return found | {"x": of_x, "y": y}


@functools.cache
def of_losses(tensor: int) -> dict[str, np.ndarray]:
    """An embedding's rows, and both losses, with every gradient of a sum of all of them."""
    draw = np.random.default_rng(9)
    tokens = jnp.asarray(draw.integers(0, WORDS, (4, 6)), jnp.int32)
    weights = jnp.asarray(draw.random((4, 6)), jnp.float32)
    (hidden, cotangent), (table,) = normal(0, 2, 4, 6, WIDTH), normal(1, 1, WORDS, WIDTH)
    (head,) = normal(2, 1, WIDTH, WORDS)
    by_row = ("batch",)

    def loss(table: jax.Array, hidden: jax.Array, head: jax.Array) -> tuple:
        embedding, matrix = Weight(table, ("vocabulary", "width")), Weight(head, AXES)
        words = Vocabulary.of(cuts_of(embedding), 0)
        rows = local(words.look_up, (embedding, by_row), by_row)(table, tokens)

        total = over_rows(matrix, hidden, tokens, weights, Chunked(cross_entropy, 16))
        nll = token_nll(hidden, matrix, tokens, chunk=16)
        how, teachers = Chunked(Divergence(2.0), 16), Weight(jnp.flip(head, 1), AXES)
        kl = over_rows(matrix, hidden, jax.lax.stop_gradient(-hidden), weights, how, teachers)
        parts = {"rows": rows, "nll": nll, "total": total, "kl": kl}
        learned = 0.5 * total + 0.3 * kl + jnp.sum(nll * weights)
        return learned + jnp.sum(rows * cotangent), parts

    with on(tensor):
        run = quick_jit(jax.grad(loss, (0, 1, 2), has_aux=True))
        gradients, parts = jax.device_get(run(table, hidden, head))
    return parts | dict(zip(("of_table", "of_hidden", "of_head"), gradients))


def normal(seed: int, count: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *shape)), jnp.float32)
