"""What this op adds around JAX's kernel, interpreted, equals the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, dispatch
from pallas_kernels.attention import op, reference, specs, splash
from pallas_kernels.attention.masks import Masks
from pallas_kernels.testing import assert_close, check

CASE = specs.Case(
    *("segments and lengths", 2, 150),
    **{"heads": 4, "kv_heads": 2, "head_dim": 128},
    starts=((1, 30, 128, 140), (60,)),
    lengths=(150, 70),
)


def test_whole_rows_and_gradients_equal_the_definition(monkeypatch):
    run, outputs = (
        functools.partial(function, interpret=True) for function in (splash.forward, splash.outputs)
    )
    entry = dispatch.Implementation(run, splash.backward, outputs=outputs)
    monkeypatch.setitem(op.ATTENTION.implementations, "interpreted", entry)
    kernel = functools.partial(attention, implementation="interpreted")
    arrays = {**CASE.arrays(), **CASE.rows()}
    check(kernel, reference.attention, arrays, tolerance=1e-5)


def test_a_kernel_that_sees_all_documents_is_caught(monkeypatch):
    ids = splash.splash.SegmentIds
    monkeypatch.setattr(splash.splash, "SegmentIds", lambda q, kv: ids(q=0 * q, kv=0 * kv))
    case = specs.Case("blind", 1, 128, heads=2, kv_heads=1, head_dim=128, starts=((30,),))
    q, k, v = case.arrays().values()
    rows = {name: jnp.asarray(array) for name, array in case.rows().items()}
    masks = Masks(jnp.zeros(1, jnp.int32), jnp.full(1, 128), rows["segment_ids"], None)
    out = splash.outputs(q, k, v, masks, causal=True, interpret=True)
    with pytest.raises(AssertionError, match="out"):
        assert_close(out, reference.attention(q, k, v, **rows), 1e-5, "out")


def sharp_error(out, q, k, v):
    expected = reference.attention(*(a.astype(jnp.float32) for a in (q, k, v)))
    return float(jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("channels", [128, 256])
def test_sharp_heads_are_as_exact_as_in_plain_xla(channels, monkeypatch):
    """Scores of some hundreds: a query that is rounded once more moves them by tenths."""
    case = specs.Case("sharp", 1, 129, heads=2, kv_heads=1, head_dim=channels)
    q, k, v = (jnp.asarray(a) for a in case.arrays(dtype=jnp.bfloat16).values())
    q *= 30
    run = functools.partial(splash.outputs, q, k, v, Masks(None, None), causal=True, interpret=True)
    assert sharp_error(run(), q, k, v) < 1.6e-3  # outputs are rounded by 2^-9 each
    if channels == 128:  # 256^-1/2 is a power of two, which rounds nothing
        rounded = lambda q, k: ((q.astype(jnp.float32) * 128**-0.5).astype(q.dtype), k)
        monkeypatch.setattr(splash, "_scaled", rounded)
        assert sharp_error(run(), q, k, v) > 5e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 64}, "C=64"),
        ({"causal": False}, "causal rows without a cache"),
        ({"keys": 512, "q_offset": (3,)}, "causal rows without a cache"),
        ({"q_offset": (100,)}, "causal rows without a cache"),
        ({"dtype": np.float32}, "it takes bfloat16"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(change, reason):
    dtype = change.pop("dtype", jnp.bfloat16)
    sizes = {"batch": 1, "tokens": 256, "heads": 4, "kv_heads": 2, "head_dim": 128}
    case = specs.Case("shape", **(sizes | change))
    arrays = {**case.arrays(dtype=dtype), **case.rows()}
    call = functools.partial(attention, causal=case.causal, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=f"attention: .*cannot run here: .*{reason}"):
        jax.eval_shape(call, **arrays)


def test_a_scanned_recomputed_program_for_a_tpu_holds_the_kernels():
    case = specs.Case("shape", 1, 256, heads=4, kv_heads=2, head_dim=128)
    arrays = case.arrays(dtype=jnp.bfloat16)
    ids = jnp.zeros((1, 256), jnp.int32)

    def loss(q, k, v):
        @jax.checkpoint
        def layer(q, _):
            return attention(q, k, v, segment_ids=ids, target="tpu"), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32))

    program = str(jax.make_jaxpr(jax.grad(loss))(*arrays.values()))
    assert "splash_mha_fwd" in program and "splash_mha_dkv" in program
