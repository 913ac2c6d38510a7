"""A run of adapters keeps its base apart: named in base.json, in no checkpoint, never float32."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.model.adapters import adapter_names
from nemotron_jax.model.parameters import flatten
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.checkpoint import load_parameters
from nemotron_jax.training.coverage import coverage
from nemotron_jax.training.prepared import abstract_state, prepare_run
from tests.training.runs import changed, small_run, train, write_texts
from tests.training.test_lora import lora_run

OTHER = {"parameters_sha256": 64 * "0"}
LORA = LoRAConfig(rank=2, base_experts="nvfp4")


def test_a_base_of_codes_is_never_float32() -> None:
    config = dataclasses.replace(lora_run("somewhere"), lora=LORA)
    model = abstract_state(prepare_run(config)).model
    dtypes = {name: leaf.dtype.name for name, leaf in flatten(model).items()}
    assert dtypes["moe.mixer.experts.up.words"] == "float32"
    assert dtypes["attention.mixer.q.weight"] == dtypes["embedding"] == "bfloat16"
    large = {n for n, leaf in flatten(model).items() if leaf.dtype == "float32" and leaf.size > 600}
    words = {name for name in large if name.endswith(".words")}  # of codes, as bits
    assert large - words <= adapter_names(model), large


def test_the_first_line_says_what_trains() -> None:
    config = lora_run("somewhere")
    line = coverage(config.model, LoRAConfig(rank=4, targets=("attention", "latent")))
    attention, latent = 4 * (4 * (32 + 32) - 2 * 16), 2 * 2 * 4 * (32 + 16)
    total = attention + latent
    assert line.startswith(f"adapters of rank 4 train {total:,} parameters beside ")
    assert f"attention {attention:,}, latent projections {latent:,}, shared experts 0;" in line
    assert "Mamba 0" in line and line.endswith("; routed experts: no")
    assert "routed experts: no" not in coverage(config.model, LoRAConfig(targets=("experts",)))
    assert coverage(config.model, None) is None


@pytest.mark.more
def test_checkpoints_hold_adapters_and_a_run_goes_on_with_the_same_base(tmp_path) -> None:
    texts = write_texts(tmp_path / "texts")
    short = {"training": {"steps": 4}}
    first = changed(small_run(texts, checkpoint_every=4), training={"steps": 1})
    model = dataclasses.replace(first.model, mtp=None)
    parts = {"model": model, "training": dataclasses.replace(first.training, mtp_depths=0)}
    train(dataclasses.replace(first, **parts), tmp_path / "base")
    config = changed(lora_run(texts, checkpoint_every=2), **short)
    config = dataclasses.replace(config, lora=LORA, init_from=str(tmp_path / "base"))
    whole = train(config, tmp_path / "whole")
    train(changed(config, training={"steps": 2}), tmp_path / "cut")
    resumed = train(config, tmp_path / "cut")
    values = lambda outcome: [(r["step"], r["loss"], r["grad_norm"]) for r in outcome.records]
    assert values(resumed) == values(whole) and len(whole.records) == 4

    run = RunDirectory(tmp_path / "cut")
    _, step, table = load_parameters(run)
    assert table.keys() == adapter_names(whole.model)
    record = json.loads((run.checkpoint(step) / "base.json").read_text())
    assert record["format"] == "nemotron_jax.base" and len(record["parameters_sha256"]) == 64
    assert (record["dtype"], record["experts"]) == ("bfloat16", "nvfp4")
    assert record["path"] == str((tmp_path / "base" / "checkpoints" / "step_00000001").absolute())
    loaded = nj.load_pretrained(run.path, None, experts="nvfp4")
    assert loaded.experts_format == "nvfp4"
    for name, leaf in flatten(whole.model).items():
        # Codes are bits, some of which would be NaN as numbers.
        assert np.asarray(flatten(loaded)[name]).tobytes() == np.asarray(leaf).tobytes(), name
    codes, dense = nj.load_pretrained(run.path, experts="nvfp4"), nj.load_pretrained(run.path)
    dense = flatten(dense)
    for name, leaf in flatten(nj.unpacked(codes)).items():
        assert np.array_equal(dense[name], leaf), name

    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"base.json: the adapters' base .* is not there; put it"):
        nj.load_pretrained(run.path)
    file = run.checkpoint(step) / "base.json"
    file.write_text(json.dumps(record | {"path": str(tmp_path / "elsewhere")}))
    assert adapter_names(nj.load_pretrained(run.path)) == table.keys()
    file.write_text(json.dumps(record | {"path": str(tmp_path / "elsewhere")} | OTHER))
    with pytest.raises(ValueError, match=r"base.json: the adapters are trained on parameters of"):
        nj.load_pretrained(run.path)
