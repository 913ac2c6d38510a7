"""The scan over units equals the layers one by one, whatever is recomputed."""

import collections
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.model import BLOCK_KINDS
from nemotron_jax.model import accounting
from nemotron_jax.model.adapters import adapter_sites
from nemotron_jax.model.parameters import flatten
from nemotron_jax.model.stack import UnitTable
from tests.golden_cases import relative_l2
from tests.tiny_models import quick_jit, random_tokens, randomised, tiny_config, tiny_model

LONG = "M*MEE-"  # units M*, ME, E and -: every part is missing somewhere
VARIANTS = [
    (LONG, nj.Execution(remat="none")),
    (LONG, nj.Execution(remat="full")),
    (LONG, nj.Execution(remat="mixers")),
    ("*E", nj.Execution()),
    ("M", nj.Execution()),
]
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0]], [5, 1, 9, 4], axis=1))


def loss(model, tokens, execution):
    """A number that every parameter but the head's moves, and what comes with it."""
    segments = SEGMENTS[:, : tokens.shape[1]]
    output = model(tokens, segment_ids=segments, execution=execution)
    weights = jnp.cos(jnp.arange(output.hidden.size)).reshape(output.hidden.shape)
    total = jnp.sum(weights * output.hidden * (segments > 0)[..., None]) + output.aux_loss
    return total, output


run = quick_jit(jax.value_and_grad(loss, has_aux=True), static_argnames="execution")


@pytest.fixture(scope="module")
def unrolled():
    """Values and gradients of the plain loop over layers, computed once for each pattern."""
    known = {}

    def of(pattern):
        if pattern not in known:
            known[pattern] = run(
                tiny_model(pattern),
                random_tokens(1, *SEGMENTS.shape),
                nj.Execution(layers="unrolled"),
            )
        return known[pattern]

    return of


@pytest.mark.parametrize("pattern, execution", VARIANTS, ids=lambda v: getattr(v, "remat", v))
def test_scan_and_remat_equal_the_plain_loop(pattern, execution, unrolled):
    (_, expected), wanted = unrolled(pattern)
    (_, got), gradient = run(tiny_model(pattern), random_tokens(1, *SEGMENTS.shape), execution)
    assert relative_l2(got.hidden, expected.hidden) < 1e-5
    np.testing.assert_array_equal(got.router_load, expected.router_load)
    np.testing.assert_allclose(got.aux_loss, expected.aux_loss, rtol=1e-5)
    wanted = flatten(wanted)
    for name, leaf in flatten(gradient).items():
        if name == "head.weight" or name.endswith("selection_bias"):
            assert not leaf.any(), f"{name} is outside this loss"
        else:
            assert relative_l2(leaf, wanted[name]) < 5e-5, name


def kept_bytes(pattern, remat, tokens):
    """What the backward pass is handed beside the parameters themselves."""
    model = tiny_model(pattern)
    call = lambda model: loss(model, tokens, nj.Execution(remat=remat))[0]
    kept = jax.eval_shape(lambda model: jax.vjp(call, model)[1], model)
    return stored_bytes(kept) - stored_bytes(model)


def stored_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_remat_keeps_less_for_the_backward_pass():
    tokens = random_tokens(1, *SEGMENTS.shape)
    everything, mixers, full = (kept_bytes("MEME", r, tokens) for r in ("none", "mixers", "full"))
    assert full < mixers < 0.7 * everything


@pytest.mark.parametrize("pattern", ["MEMEME", LONG, "M-M-*-M-"])  # the second lacks some blocks
@pytest.mark.parametrize("remat", ["none", "mixers", "full"])
def test_no_copy_of_a_weight_is_kept(pattern, remat):
    # Twice the tokens are twice the activations; what does not grow with them is weights.
    few, many = (kept_bytes(pattern, remat, random_tokens(1, 1, length)) for length in (8, 16))
    assert 2 * few - many < 0.1 * stored_bytes(tiny_model(pattern))


@pytest.mark.parametrize("pattern", [LONG, pytest.param("M-M-*-M-", marks=pytest.mark.slow)])
def test_compiled_memory_of_remat_is_activations(pattern):
    tokens = random_tokens(1, *SEGMENTS.shape)

    def temporaries(remat):
        compiled = run.lower(tiny_model(pattern), tokens, nj.Execution(remat=remat)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    activations = kept_bytes(pattern, "none", tokens)
    units = len(UnitTable.parse(pattern).index["M"])
    none, mixers, full = (temporaries(remat) for remat in ("none", "mixers", "full"))
    assert none <= full + activations
    assert mixers <= full + activations / units


@pytest.mark.parametrize(
    "pattern, units",
    [
        ("MEM*E", ["ME", "M*E"]),
        ("M*EMME-", ["M*E", "M", "ME", "-"]),
        ("**-E*", ["*", "*-", "E", "*"]),
    ],
)
def test_a_pattern_is_cut_into_units(pattern, units):
    table = UnitTable.parse(pattern).index
    seen = collections.Counter()
    for number, unit in enumerate(units):
        for letter, places in table.items():
            assert places[number] == (seen[letter] if letter in unit else -1)
            seen[letter] += letter in unit
    assert all(len(places) == len(units) for places in table.values())


def test_a_new_kind_of_block_is_in_some_unit_and_a_stray_letter_is_refused(monkeypatch):
    monkeypatch.setitem(BLOCK_KINDS, "G", "gated")
    table = UnitTable.parse("MGE*G-")
    layers = sorted(int(n) for column in table.layer.values() for n in column if n >= 0)
    assert layers == list(range(6))
    for pattern in ("ME?", "?", "M E"):
        with pytest.raises(ValueError, match="leave letters out"):
            UnitTable.parse(pattern)


def test_a_kind_that_a_table_lacks_is_an_error_and_not_the_last_kind_s(monkeypatch):
    config = tiny_config("M-")
    monkeypatch.setitem(BLOCK_KINDS, "G", "gated")
    with pytest.raises(ValueError, match="blocks 'G' have no list of tensors"):
        accounting.hub_tensor_counts(
            SimpleNamespace(pattern="MG", mtp=None, width=8, mamba=config.mamba)
        )
    model = SimpleNamespace(**dict.fromkeys(BLOCK_KINDS.values()))
    model.gated = SimpleNamespace(mixer=None)
    with pytest.raises(ValueError, match="blocks 'G' .* have no list of matrices"):
        list(adapter_sites(model))


def test_eager_calls_compile_once(caplog):
    model = tiny_model("M-", seed=1)

    def call(seed):
        newer = randomised(model, seed)
        output = newer(random_tokens(seed, 2, 11))
        return newer.logits(output.hidden)

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        call(1)
        first = compiled(caplog)
        caplog.clear()
        for seed in (2, 3):
            call(seed)
    assert {"_forward", "_logits"} <= first
    assert not compiled(caplog)


def compiled(caplog) -> set[str]:
    found = (re.match(r"Compiling (?:jit\()?(\w+)", record.message) for record in caplog.records)
    return {match[1] for match in found if match}
