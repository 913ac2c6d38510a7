"""Attention over pages equals attention over the same keys in rows, and reads nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

from pallas_kernels import attention
from pallas_kernels.attention import few, paged_tpu, reference
from pallas_kernels.attention.keys import Paged
from pallas_kernels.attention.masks import Masks
from tests.marks import slow_but_for


@dataclasses.dataclass(frozen=True)
class Call:
    """Rows that hold `offset` tokens and are given `tokens` more, `lengths` of them valid."""

    name: str
    tokens: int
    offset: tuple[int, ...]
    lengths: tuple[int, ...] | None = None
    page: int = 16
    width: int = 24  # pages of the table
    heads: int = 4
    kv_heads: int = 2
    channels: int = 32

    def __str__(self) -> str:
        return self.name

    def operands(self, dtype: str = "float32") -> tuple[dict, dict]:
        """The call over pages and over rows. Whatever no row holds is NaN: pages that are nobody's,
        those that lie past a row's end, and what follows its end in its last page."""
        rng = np.random.default_rng(0)
        rows, size = len(self.offset), self.width * self.page
        q = rng.standard_normal((rows, self.tokens, self.heads, self.channels), np.float32)
        both = rng.standard_normal((rows, size, self.kv_heads, 2, self.channels), np.float32)
        both = np.asarray(jnp.asarray(both, dtype).astype(jnp.float32))
        valid = self.lengths or (self.tokens,) * rows
        numbers = rng.permutation(np.arange(1, rows * self.width + 1)).reshape(rows, self.width)
        shape = (rows * self.width + 1, self.page, 2 * self.kv_heads, self.channels)
        pool = np.full(shape, np.nan, np.float32)
        for row, (start, more) in enumerate(zip(self.offset, valid, strict=True)):
            for token in range(start + more):
                place = numbers[row, token // self.page], token % self.page
                pool[place] = both[row, token].reshape(shape[2:])
        common = {"q_offset": jnp.asarray(self.offset, jnp.int32)}
        if self.lengths is not None:
            common["lengths"] = jnp.asarray(self.lengths, jnp.int32)
        pages = {"k": jnp.asarray(pool, dtype), "pages": jnp.asarray(numbers, jnp.int32)}
        dense = {"k": both[..., 0, :], "v": both[..., 1, :]}
        return {"q": q, **pages, **common}, {"q": q, **dense, **common}


CALLS = (
    Call("rows alike", 1, (300, 301, 310)),
    Call("one long row among many short", 1, (0, 17, 380, 3, 50, 16, 15, 31, 63)),
    Call("drafts and an idle row", 5, (0, 120, 379, 33, 7), (5, 2, 5, 0, 1)),
    Call("a page that no block divides", 3, (0, 55, 90, 12, 100), page=5, width=21),
    Call("pages larger than a block", 1, (0, 700), page=384, width=2),
    Call("a chunk", 40, (0, 300), (40, 13)),
    Call("a chunk over wide blocks", 32, (800, 20), page=64, width=16),
)


FAST = slow_but_for(CALLS, *(str(CALLS[number]) for number in (1, 2, 5)), mark=pytest.mark.more)


@pytest.mark.parametrize("call", FAST)
def test_pages_equal_rows_and_nothing_else_is_read(call: Call) -> None:
    paged, dense = call.operands()
    out = attention(**paged)
    np.testing.assert_allclose(out, reference.attention(**dense), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", pytest.param("bfloat16", marks=pytest.mark.more)]
)
def test_pages_in_few_bits_are_numbers_of_that_dtype(dtype: str) -> None:
    paged, dense = CALLS[2].operands(dtype)
    np.testing.assert_allclose(
        attention(**paged), reference.attention(**dense), rtol=1e-5, atol=2e-6
    )
    defined = attention(**paged, implementation="reference")
    np.testing.assert_allclose(defined, reference.attention(**dense), rtol=1e-6, atol=1e-6)


def test_a_short_row_in_a_wide_table_computes_with_its_own_pages_alone(monkeypatch) -> None:
    """Rows × pages that blocks are made of: what the loops ran over, and not the table's size."""
    call = dataclasses.replace(CALLS[1], width=256, offset=(4000, *(20,) * 15))
    blocks = []
    of_rows = Paged.of_rows

    def counted(self: Paged, key: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda: blocks.append(self.rows * width))
        return of_rows(self, key, width)

    monkeypatch.setattr(Paged, "of_rows", counted)
    paged, _ = call.operands()
    jax.block_until_ready(attention(**paged))
    jax.effects_barrier()
    longest = -(-4001 // few.BLOCK)
    assert sum(blocks) == few.BLOCK * (16 + 4 * (longest - 1))  # and not 16 rows in all of them


def test_a_dead_row_poisons_no_other() -> None:
    """A row whose own keys are NaN gives NaN, and leaves the others as they are."""
    paged, dense = CALLS[1].operands()
    own = paged["pages"][2]
    poisoned = attention(**{**paged, "k": paged["k"].at[own].set(jnp.nan)})
    expected = reference.attention(**dense)
    assert np.isnan(poisoned[2]).all()
    others = np.arange(len(expected)) != 2
    np.testing.assert_allclose(poisoned[others], expected[others], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_offset": None}, "pages go with q_offset"),
        ({"causal": False}, "pages go with q_offset"),
        ({"v": jnp.zeros((3, 9, 2, 32))}, "without v"),
        ({"pages": jnp.zeros((2, 24), int)}, r"pages has shape \(2, 24\), but B"),
        ({"pages": jnp.zeros((3, 24))}, "pages are float32"),
        ({"k": jnp.zeros((73, 16, 3, 32))}, "the pool has 3 heads"),
        ({"k": jnp.zeros((73, 16, 6, 32))}, "H=4 query heads do not divide over K=3"),
        ({"pages": None}, "v is missing"),
        ({"implementation": "pallas_tpu"}, "cannot run here: C=32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "call",
)
def test_calls_that_cannot_be_right_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=f"attention: .*{words}"):
        attention(**{**CALLS[0].operands()[0], **change})


def test_gradients_over_pages_are_refused() -> None:
    paged, _ = CALLS[0].operands()
    q = paged.pop("q")
    with pytest.raises(ValueError, match="over pages it has no gradient"):
        jax.grad(lambda q: attention(q, **paged).sum())(q)


@pytest.mark.parametrize(
    ("q", "pool", "reason"),
    [
        ("bfloat16", (9, 16, 4, 128, "bfloat16"), None),
        ("bfloat16", (9, 16, 4, 128, "float8_e4m3fn"), None),
        ("bfloat16", (9, 16, 2, 128, "float8_e4m3fn"), "K=1 kv heads in float8_e4m3fn"),
        ("bfloat16", (9, 16, 6, 128, "bfloat16"), "K=3 kv heads in bfloat16"),
        ("float16", (9, 16, 4, 128, "bfloat16"), "q is float16"),
        ("bfloat16", (9, 16, 4, 128, "float16"), "the pages are float16"),
    ],
)
def test_what_the_kernel_of_a_tpu_takes(q: str, pool: tuple, reason: str | None) -> None:
    shape = jax.ShapeDtypeStruct((1, 1, 32, 128), q), jax.ShapeDtypeStruct(pool[:-1], pool[-1])
    found = paged_tpu.unsupported(*shape, None, None)
    assert found is None if reason is None else reason in found


@pytest.mark.more
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_this_op_adds_to_the_kernel_of_a_tpu(monkeypatch, number: int, dtype: str) -> None:
    """With JAX's own definition in the kernel's place: no interpreter takes the kernel itself."""
    taken = ("sm_scale", "k_scale", "v_scale")

    def defined(*operands: jax.Array, **options: object) -> jax.Array:
        options = {name: options[name] for name in taken}
        return kernel.ref_ragged_paged_attention(*operands, **options)

    monkeypatch.setattr(paged_tpu.ragged, "ragged_paged_attention", defined)
    paged, dense = CALLS[number].operands(dtype)
    masks = Masks(paged["q_offset"], paged.get("lengths"))
    # Padding has no place in the kernel's queries: the definition would not take NaN beside it.
    out = paged_tpu.outputs(jnp.asarray(paged["q"]), paged["k"], paged["pages"], masks)
    np.testing.assert_allclose(out, reference.attention(**dense), rtol=1e-4, atol=1e-5)
