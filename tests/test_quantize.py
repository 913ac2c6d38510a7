"""`python -m nemotron_jax.quantize` writes a directory that loads, and what it cost."""

import json
import re
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax import quantize
from nemotron_jax.interop.safetensors_file import SafetensorsFile
from tests.golden_cases import GOLDEN
from tests.stages.test_old_runs import OLD

SUPER = GOLDEN.parent / "quantised" / "super_nvfp4"


@pytest.fixture
def run(tmp_path):
    with tarfile.open(OLD / "pretrain.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    return tmp_path / "pretrain"


@pytest.mark.more
def test_a_run_is_quantised_with_what_it_costs(run, tmp_path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 80)
    out = tmp_path / "out"
    flags = [f"--checkpoint={run}", f"--output={out}", f"--calibration={text}"]
    assert quantize.main([*flags, "--rows=2", "--method=four_over_six"]) == 0
    report = json.loads((out / "quantize.json").read_text())
    assert report["format"] == "nemotron_jax.quantize" and report["format_version"] == 1
    assert report["modules"] == {"NVFP4": 8, "FP8": 4} and report["method"] == "four_over_six"
    low, high = report["interval"]
    assert low <= report["loss_after"] - report["loss_before"] <= high and high - low < 0.1
    assert 0 < report["n_tokens"] <= 2 * 512
    file = SafetensorsFile(out / "model.safetensors")
    module = "backbone.layers.0.mixer.in_proj"
    # What the first projection is given: the embedding of the text's tokens after the first norm.
    model, tokenizer = nj.load_pretrained(run), nj.load_tokenizer(run)
    ids = jnp.array([*tokenizer.encode(text.read_text()), tokenizer.eos])
    block = model.split_layers().mamba[0]
    largest = float(jnp.abs(block.norm(model.embedding[...][ids])).max())
    assert 0 < file.read(f"{module}.input_scale") <= largest / 448 * (1 + 1e-6)
    np.testing.assert_allclose(file.read(f"{module}.input_scale"), largest / 448, rtol=0.3)
    assert nj.load_pretrained(out).config == nj.load_pretrained(run).config
    assert "8 matrices NVFP4, 4 matrices FP8; loss" in capsys.readouterr().out


def test_without_a_tokenizer_no_loss_is_claimed(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert quantize.main([f"--checkpoint={SUPER}", f"--output={out}", "--recipe=fp8"]) == 0
    report = json.loads((out / "quantize.json").read_text())
    assert report["loss_before"] is None and report["n_tokens"] == 0
    assert report["modules"] == {"FP8": 80} and "no tokenizer" in capsys.readouterr().out


WRONG = {
    "--rows=1": "quantize.rows=1: must be at least 2",
    "--recipe=int4": "argument --recipe: invalid choice: 'int4'",
    "--method=best": "argument --method: invalid choice: 'best'",
    "--calibration=no.txt": "--calibration=no.txt: .* has no tokenizer.json",
    "--output=gs://b/x": "--output=gs://b/x: is a URL",
    f"--output={SUPER}": "is the checkpoint itself",
    "--checkpoint=/nowhere": "/nowhere",
}


@pytest.mark.parametrize("flag", WRONG, ids=lambda flag: flag.partition("/")[0])
def test_a_wrong_flag_is_one_line(flag, tmp_path, capsys) -> None:
    flags = [f"--checkpoint={SUPER}", f"--output={tmp_path / 'out'}", flag]
    try:
        status = quantize.main(flags)
    except SystemExit as error:
        status = error.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert re.search(WRONG[flag], said)
    assert not (tmp_path / "out").exists()
