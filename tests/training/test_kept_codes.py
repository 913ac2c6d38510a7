"""A step quantises each weight once, before its micro-batches, and computes the same."""

import collections
import re
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from nemotron_jax import compiled
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import MoEConfig
from nemotron_jax.config.precision import nemotron3_nvfp4
from nemotron_jax.model.kept_codes import with_codes
from nemotron_jax.model.parameters import flatten
from nemotron_jax.training import step
from nemotron_jax.training.prepared import init_state, prepare_run
from tests.training.runs import changed, random_batch, small_run

PARTS = 4
RECIPE = nemotron3_nvfp4(num_last_layers_high=0)


def a_run(**model: object):
    """Rows of 112 tokens: seven blocks of 16, as no weight has along a side."""
    config = changed(
        small_run("somewhere"),
        model={"pattern": "MEME", "mtp": None, **model},
        training={"micro_batches": PARTS, "mtp_depths": 0},
        data={"batch_size": PARTS, "sequence_length": 112},
    )
    return prepare_run(changed(config, execution=vars(Execution(precision=RECIPE))))


def searches(jaxpr, inside: bool = False) -> Iterator[tuple[bool, tuple[int, ...]]]:
    """Every search for largest magnitudes, as scales of blocks begin: whether inside the loop over
    the micro-batches, and the result's shape without axes of 1."""
    for equation in jaxpr.eqns:
        here = inside
        if equation.primitive.name == "scan" and equation.params["length"] == PARTS:
            here = True
        out = equation.outvars[0].aval if equation.outvars else None
        if equation.primitive.name == "reduce_max":
            yield here, tuple(size for size in out.shape if size > 1)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from searches(value, here)


def kept_codes(state) -> list[tuple]:
    """Shapes of the codes and the scales that a step keeps."""
    kept = flatten(jax.eval_shape(lambda model: with_codes(model, RECIPE), state.model))
    codes = [leaf for name, leaf in kept.items() if name.endswith("_codes.codes")]
    scales = [leaf for name, leaf in kept.items() if name.endswith("_codes.scales")]
    return list(zip(codes, scales, strict=True))


def of_weights(shapes: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """Their sides but 1, of all layers and of one, and where an expert follows another."""
    wanted = {tuple(n for n in shape[drop:] if n > 1) for shape in shapes for drop in (0, 1)}
    return wanted | {(shape[1] * shape[2], *shape[3:]) for shape in shapes if len(shape) == 4}


def made(run, batch) -> tuple[collections.Counter, collections.Counter]:
    """How often scales of weights are made inside the loop and outside of it, by shape."""
    state = jax.eval_shape(lambda: init_state(run))
    shapes = [scales.shape for _, scales in kept_codes(state)]
    assert len(shapes) == 5 + 2 + 2  # Mamba's input projections, experts, shared expert
    wanted = of_weights(shapes)
    objective = run.objective(run.config.execution)
    program = jax.make_jaxpr(lambda s, b: step.train_step(s, b, run, objective))(state, batch)
    found = [one for one in searches(program.jaxpr) if one[1] in wanted - {()}]
    count = lambda where: collections.Counter(shape for here, shape in found if here == where)
    return count(True), count(False)


def test_no_weight_is_quantised_in_the_loop(monkeypatch) -> None:
    run = a_run()
    batch = random_batch(run.config, 0)
    inside, outside = made(run, batch)
    assert not inside and sum(outside.values()) >= 6
    monkeypatch.setattr(step, "with_codes", lambda model, precision: model)
    inside, outside = made(run, batch)
    # A sum of two loads, as small as the smallest matrix, is searched outside too.
    assert sum(inside.values()) >= 6 and sum(outside.values()) <= 1


@pytest.mark.more
def test_a_step_with_kept_codes_is_the_step_without(monkeypatch) -> None:
    run, results = a_run(), []
    state, batch = jax.eval_shape(lambda: init_state(run)), random_batch(run.config, 0)
    for kept in (step.with_codes, lambda model, precision: model):
        monkeypatch.setattr(step, "with_codes", kept)
        lowered = step.make_train_step(run).lower(state, batch)
        program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
        results.append(jax.device_get(program(init_state(run), batch)[1]))
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-6, err_msg=name)


@pytest.mark.more
def test_the_optimised_program_quantises_each_weight_once(monkeypatch) -> None:
    """Of a model of 17 million weights in NVFP4, compiled and not run: scales of weights are
    made before the loop over micro-batches alone, and the memory that a step takes beside its state
    grows by little more than the codes."""
    run = a_run(width=256, moe=MoEConfig(32, 2, 512, shared_width=256, latent_width=256))
    state, batch = jax.eval_shape(lambda: init_state(run)), random_batch(run.config, 0)
    kept = kept_codes(state)
    wanted = of_weights([scales.shape for _, scales in kept])
    programs = []
    for with_kept in (True, False):
        if not with_kept:
            monkeypatch.setattr(step, "with_codes", lambda model, precision: model)
        lowered = step.make_train_step(run).lower(state, batch)
        programs.append(lowered.compile(compiler_options={"xla_backend_optimization_level": 0}))

    def runs(program) -> list[int]:
        """How often each search for the largest magnitudes of a weight's blocks is reached."""
        return [
            one.count
            for one in compiled.instructions(program.as_text())
            if one.opcode == "reduce" and "reduce_max" in one.source
            if sides(one.type, "f32") in wanted
        ]

    layers = 2  # of each kind
    assert set(runs(programs[0])) == {1} and set(runs(programs[1])) == {PARTS * layers}
    weights = sum(2 * codes.size for codes, _ in kept)
    grown = programs[0].memory_analysis().temp_size_in_bytes
    grown -= programs[1].memory_analysis().temp_size_in_bytes
    print(f"{grown / weights:.3f} bytes a weight more, of {weights:,}")
    assert weights > 17e6 and grown <= 0.57 * weights


def sides(kind: str, dtype: str) -> tuple[int, ...]:
    """The sides but 1 of an array's type as a compiled program writes it, if it is of the dtype."""
    found = re.match(rf"{dtype}\[([\d,]+)\]", kind)
    return tuple(int(n) for n in found[1].split(",") if n != "1") if found else ()
