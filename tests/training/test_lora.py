"""A run that trains adapters moves them alone, holds moments of them alone, and goes on from
disk."""

import dataclasses

import jax
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.lora import TARGETS, LoRAConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model.adapters import adapter_names, has_adapters, merge_adapters
from nemotron_jax.model.parameters import abstract_model, flatten
from nemotron_jax.pretrained import begin_run
from nemotron_jax.training.prepared import init_state, prepare_run
from nemotron_jax.training.step import make_train_step
from tests.training.runs import (
    changed,
    comparable,
    random_batch,
    small_run,
    train,
    write_texts,
)


def lora_run(texts, **logging: int) -> RunConfig:
    config = small_run(texts, **logging)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mtp=None),
        training=dataclasses.replace(config.training, trains="lora", mtp_depths=0),
        lora=LoRAConfig(rank=2, targets=TARGETS),
    )


def compiled(config: RunConfig):
    """The run's step, compiled in less time than it takes for speed."""
    state, batch = jax.eval_shape(lambda: init_state(prepare_run(config))), random_batch(config, 0)
    lowered = make_train_step(prepare_run(config)).lower(state, batch)
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def test_only_adapters_change_and_only_they_have_moments() -> None:
    config = changed(lora_run("somewhere"), data={"sequence_length": 48})
    step = compiled(config)
    state = init_state(prepare_run(config))
    before = {name: np.asarray(leaf) for name, leaf in flatten(state.model).items()}
    adapters = adapter_names(state.model)
    assert set(state.optimizer[1].mu) == adapters
    for number in range(3):
        state, metrics = step(state, random_batch(config, number))
    assert float(metrics["grad_norm"]) > 0
    for name, leaf in flatten(state.model).items():
        assert np.array_equal(leaf, before[name]) != (name in adapters), name


def test_the_compiled_step_holds_no_gradient_of_the_base() -> None:
    """Its temporaries are smaller than those of full training by what the gradients take."""
    # Few tokens, so that activations do not hide what parameters take.
    config = changed(lora_run("somewhere"), data={"sequence_length": 8, "batch_size": 2})
    training = dataclasses.replace(config.training, trains="all")
    full = dataclasses.replace(config, training=training, lora=None)
    held = {run.lora is None: compiled(run).memory_analysis() for run in (config, full)}
    base = sum(leaf.size * 4 for leaf in flatten(abstract_model(config.model)).values())
    assert held[True].temp_size_in_bytes - held[False].temp_size_in_bytes > 0.5 * base


def test_adapters_and_their_training_belong_together() -> None:
    with pytest.raises(ValueError, match="belong together"):
        dataclasses.replace(small_run("somewhere"), lora=LoRAConfig())
    with pytest.raises(ValueError, match="belong together"):
        changed(small_run("somewhere"), training={"trains": "lora"})


def test_targets_that_no_library_loads_are_told_of_before_the_training() -> None:
    config = lora_run("somewhere")
    run = prepare_run(dataclasses.replace(config, init_from="nowhere"))
    assert "mamba_out" in config.lora.targets and "mamba_out" not in LoRAConfig().targets
    with pytest.warns(UserWarning, match="PEFT loads no adapter with mamba_out"):
        with pytest.raises(ValueError, match="holds no config.json"):
            begin_run(run)


def test_targets_that_the_model_lacks_are_refused() -> None:
    config = lora_run("somewhere")
    model = dataclasses.replace(config.model, pattern="*")
    with pytest.raises(ValueError, match="lora.targets=.*must name a matrix of the model"):
        dataclasses.replace(config, model=model, lora=LoRAConfig(targets=("mamba_in", "latent")))


@pytest.mark.slow
def test_a_resumed_run_is_one_that_never_stopped_and_loads_merges_and_saves(tmp_path) -> None:
    texts = write_texts(tmp_path / "texts")
    whole = train(lora_run(texts), tmp_path / "whole")
    half = changed(lora_run(texts), training={"steps": 6})
    train(half, tmp_path / "cut")
    resumed = train(lora_run(texts), tmp_path / "cut")
    assert comparable(resumed.records) == comparable(whole.records)
    for name, leaf in flatten(whole.model).items():
        assert np.array_equal(flatten(resumed.model)[name], leaf), name
    loaded = nj.load_pretrained(tmp_path / "cut")
    assert has_adapters(loaded)
    with pytest.raises(ValueError, match="has adapters"):
        nj.save_pretrained(loaded, tmp_path / "hub")
    merged = merge_adapters(loaded)
    nj.save_pretrained(merged, tmp_path / "hub", dtype="float32")
    again = flatten(nj.load_pretrained(tmp_path / "hub"))
    for name, leaf in flatten(merged).items():
        assert np.array_equal(again[name], leaf), name
