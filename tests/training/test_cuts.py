"""No loss or gradient depends on how a batch is cut, and what has no loss is not moved."""

import dataclasses

import jax
import numpy as np
import pytest

from nemotron_jax.data.packing import Row, make_batch
from nemotron_jax.model.parameters import flatten
from nemotron_jax.training.prepared import init_state, prepare_run
from nemotron_jax.training.step import make_train_step
from tests.training.runs import changed, small_run


def uneven_batch(depths: int):
    """Rows of 24 tokens that hold 1, 1, 12 and 12 documents."""
    draw, rows, length = np.random.default_rng(0), [], 24 + max(depths, 1) + 1
    for count in (1, 1, 12, 12):
        segments = 1 + np.minimum(np.arange(length) * count // 24, count - 1)
        tokens = draw.integers(3, 64, length).astype(np.int32)
        rows.append(Row(tokens, segments.astype(np.int32)))
    return make_batch(rows, mtp_depths=depths)


@pytest.mark.parametrize("depths", [0, 1])
def test_uneven_documents_and_a_step_without_mtp_may_be_cut(depths):
    results = []
    for parts in (1, 2):
        run = changed(
            small_run("somewhere"),
            model={"pattern": "ME", **({} if depths else {"mtp": None})},
            training={"mtp_depths": depths, "micro_batches": parts, "aux_loss_scale": 1.0},
            data={"sequence_length": 24},
            execution={"aux_loss": "documents"},
        )
        prepared = prepare_run(run)
        _, metrics = make_train_step(prepared)(init_state(prepared), uneven_batch(depths))
        results.append(jax.device_get(metrics))
    for name in ("loss", "mtp_loss", "aux_loss", "grad_norm", "expert_load_max"):
        np.testing.assert_allclose(results[1][name], results[0][name], rtol=3e-5, err_msg=name)


@pytest.mark.parametrize("trains", ["all", "mtp"])
def test_what_has_no_gradient_stays_as_it_is(trains):
    """With mtp_depths=0 the MTP block has no loss; with trains=mtp it alone has one."""
    settings = dataclasses.replace(small_run("x").training.optimizer, weight_decay=0.9)
    run = changed(
        small_run("somewhere"),
        model={"pattern": "ME"},
        training={"mtp_depths": int(trains == "mtp"), "trains": trains, "optimizer": settings},
        data={"sequence_length": 24},
    )
    before = jax.device_get(init_state(prepare_run(run)))
    state = dataclasses.replace(init_state(prepare_run(run)), step=np.int32(5))
    after, _ = make_train_step(prepare_run(run))(state, uneven_batch(run.training.mtp_depths))
    moved = {
        name
        for name, leaf in flatten(after.model).items()
        if not np.array_equal(leaf, flatten(before.model)[name])
    }
    is_mtp = {name for name in flatten(before.model) if name.startswith("mtp_block.")}
    assert moved and (moved <= is_mtp if trains == "mtp" else not moved & is_mtp)
