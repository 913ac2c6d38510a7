"""A student learns its teacher's predictions: the loss in chunks is the plain one, and a student
that is its teacher has nothing to learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.config.distill import DistillConfig, DraftObjective
from nemotron_jax.config.precision import NVFP4Config, PrecisionConfig
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten
from nemotron_jax.training.chunked import Chunked, Divergence, weighted_loss
from nemotron_jax.training.distillation import Backbone, distill_objective
from nemotron_jax.training.losses import pretrain_objective
from nemotron_jax.training.prepared import init_state, prepare_run
from nemotron_jax.training.step import make_train_step
from tests.training.runs import changed, random_batch, small_run

WIDTH, TEACHERS_WIDTH, VOCABULARY = 12, 9, 37


def operands(count: int, seed: int = 0) -> tuple:
    generator = np.random.default_rng(seed)
    draw = lambda *shape: generator.normal(size=shape).astype(np.float32)
    weights = np.where(generator.random(count) < 0.3, 0, generator.random(count))
    student = draw(count, WIDTH), draw(WIDTH, VOCABULARY)
    teacher = draw(count, TEACHERS_WIDTH), draw(TEACHERS_WIDTH, VOCABULARY)
    return *student, *teacher, weights.astype(np.float32)


def plain(hidden, head, fixed, teachers, weights, temperature: float) -> jax.Array:
    """T^2 KL(teacher || student), as the definition has it."""
    dot = functools.partial(jnp.dot, precision="highest")
    p, q = jax.nn.softmax(dot(fixed, teachers) / temperature), dot(hidden, head) / temperature
    divergence = jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(q)), axis=-1)
    return temperature**2 * jnp.sum(weights * divergence)


def chunked(temperature: float, chunk: int):
    how = Chunked(Divergence(temperature), chunk)
    return lambda *operands: weighted_loss(*operands, how)


@pytest.mark.parametrize(("count", "chunk", "temperature"), [(7, 3, 1.0), (50, 16, 2.0)])
def test_the_chunked_divergence_is_the_plain_one(count, chunk, temperature) -> None:
    given = operands(count)
    both = lambda function: jax.jit(jax.value_and_grad(function, argnums=(0, 1)))
    ours = both(lambda *a: 1.7 * chunked(temperature, chunk)(*a))(*given)
    theirs = both(lambda *a: 1.7 * plain(*a, temperature))(*given)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    np.testing.assert_allclose(1.7 * chunked(temperature, chunk)(*given), theirs[0], rtol=1e-6)


def test_a_student_that_is_its_teacher_has_loss_and_gradient_of_zero() -> None:
    hidden, head, _, _, weights = operands(20)
    value, gradients = jax.value_and_grad(chunked(2.0, 8), argnums=(0, 1))(
        1e3 * hidden, head, 1e3 * hidden, head, weights
    )
    assert value == 0 and not any(np.any(gradient) for gradient in gradients)


@pytest.fixture(scope="module")
def config():
    return changed(
        small_run("somewhere"),
        model={"pattern": "M*E"},
        training={"aux_loss_scale": 0.0, "mtp_depths": 0, "router_bias_rate": 0.0},
        data={"sequence_length": 32},
    )


def model_of(config, seed: int) -> Nemotron:
    return init_state(prepare_run(dataclasses.replace(config, seed=seed))).model


def evaluated(objective, model, batch):
    """Loss, sums and gradients by name."""

    def loss(model, batch, *given):
        return objective.loss(model, batch, objective.totals(batch), None, *given)

    function = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, sums), gradient = function(model, batch, *objective.given)
    return value, sums, flatten(gradient)


@pytest.mark.more  # gradients of whole models to compile
def test_a_whole_student_that_is_its_teacher_has_nothing_to_learn(config) -> None:
    model, batch = model_of(config, 0), random_batch(config, 3)
    objective = distill_objective(config.training, DistillConfig(), model, config.execution)
    value, sums, gradients = evaluated(objective, model, batch)
    assert value == sums["loss"] == 0
    assert not any(np.any(gradient) for gradient in gradients.values())


def test_what_is_minimised_is_the_divergence_and_its_share_of_cross_entropy(config) -> None:
    student, teacher, batch = model_of(config, 0), model_of(config, 1), random_batch(config, 3)
    teaching = DistillConfig(temperature=2.0, weight=0.25)
    objective = distill_objective(config.training, teaching, teacher, config.execution)
    value, _, gradients = evaluated(objective, student, batch)

    def wanted(model):
        logits = [
            one.logits(one(batch.tokens, segment_ids=batch.segment_ids).hidden)
            for one in (teacher, model)
        ]
        weights = batch.weights[..., 0] / jnp.sum(batch.weights[..., 0])
        p, q = (jax.nn.log_softmax(logit / 2.0) for logit in logits)
        divergence = 4.0 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
        labels = batch.targets[..., 0, None]
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits[1]), labels, axis=-1)[..., 0]
        return jnp.sum(weights * (0.25 * divergence + 0.75 * nll))

    expected, theirs = jax.jit(jax.value_and_grad(wanted))(student)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for name, gradient in flatten(theirs).items():
        scale = np.linalg.norm(gradient) + 1e-7
        assert np.linalg.norm(gradients[name] - gradient) / scale < 5e-4, name


@pytest.mark.more
def test_the_teacher_stays_high_and_as_it_is_while_a_quantised_student_learns(config) -> None:
    """And micro-batches change nothing."""
    precision = PrecisionConfig(nvfp4_roles=("expert_up", "mamba_in"), nvfp4=NVFP4Config("nearest"))
    run = changed(config, execution={"precision": precision})
    teacher, batch = model_of(config, 0), random_batch(config, 3)
    before = {name: np.array(leaf) for name, leaf in flatten(teacher).items()}
    found = []
    for parts in (1, 2):
        run = changed(run, training={"micro_batches": parts})
        objective = functools.partial(distill_objective, run.training, DistillConfig(), teacher)
        prepared = prepare_run(run, objective=objective)
        step = make_train_step(prepared)
        state = dataclasses.replace(init_state(prepared), model=jax.tree.map(jnp.copy, teacher))
        state, metrics = step(state, batch, teacher)
        found.append((step(state, batch, teacher)[0], metrics))  # the first one's rate is 0
    for name, leaf in flatten(teacher).items():
        np.testing.assert_array_equal(leaf, before[name], name)
    (state, metrics), (_, in_parts) = found
    assert 0 < metrics["loss"] < 0.5  # of rounding alone: the parameters are the teacher's
    np.testing.assert_allclose(in_parts["loss"], metrics["loss"], rtol=2e-2)
    moved = flatten(state.model)
    assert any(np.any(moved[name] != leaf) for name, leaf in before.items())


def test_a_sampled_state_has_read_the_tokens_before_the_one_to_embed(config) -> None:
    """Whichever depth it is of; and all of them come, of the own document alone."""
    batch, depth = random_batch(config, 3), 5
    places, segments = np.broadcast_to(np.arange(32), (4, 32)), batch.segment_ids
    state = lambda of: np.stack([places + of, np.full_like(places, of), segments], -1)
    hiddens = [jnp.asarray(state(of), jnp.float32) for of in range(depth)]
    read = Backbone(DraftObjective("kl")).read(hiddens, batch, jax.random.key(0))
    np.testing.assert_array_equal(read[..., 0], places + depth - 1)
    np.testing.assert_array_equal(read[..., 2], segments)
    counts = np.bincount(np.asarray(read[..., 1], int).ravel(), minlength=depth)
    assert counts[0] == 0 and counts[1:].min() > 10
    # A part of the batch draws what the whole did: its tokens keep their numbers.
    whole = dataclasses.replace(batch, numbers=np.arange(4 * 32).reshape(4, 32))
    part = jax.tree.map(lambda a: a[::2], whole)
    rows = [hidden[::2] for hidden in hiddens]
    of_part = Backbone(DraftObjective("kl")).read(rows, part, jax.random.key(0))
    np.testing.assert_array_equal(of_part, read[::2])
    last = Backbone(DraftObjective("kl", mtp_hidden="last")).read(hiddens, batch, None)
    assert last is hiddens[-1]


@pytest.mark.more  # gradients of whole models to compile
def test_drafts_are_compared_with_what_the_backbone_predicts_there(config) -> None:
    config = changed(config, training={"mtp_depths": 2, "mtp_loss_scale": 1.0})
    model, batch = model_of(config, 0), random_batch(config, 3)
    against = Backbone(DraftObjective("kl", mtp_hidden="last"))
    objective = pretrain_objective(config.training, config.execution, against)
    _, sums, _ = evaluated(objective, model, batch)

    @jax.jit
    def wanted(model):
        hidden = model(batch.tokens, segment_ids=batch.segment_ids).hidden
        means = []
        for depth in (1, 2):
            drafted = model.mtp(hidden, batch.tokens, depth, batch.segment_ids).hidden[:, :-depth]
            p, q = (
                jax.nn.log_softmax(model.logits(states) / 2.0)
                for states in (hidden[:, depth:], drafted)
            )
            divergence = 4.0 * jnp.sum(jnp.exp(p) * (p - q), axis=-1)
            same = batch.segment_ids[:, depth:] == batch.segment_ids[:, :-depth]
            weights = same * batch.weights[:, :-depth, depth]
            means.append(jnp.sum(weights * divergence) / jnp.sum(weights))
        return sum(means) / 2

    np.testing.assert_allclose(sums["mtp_loss"], wanted(model), rtol=2e-5)
