"""Formats side by side: rounding costs what it must, and a scale that is off is found by name."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from nemotron_jax.evaluation import quantization, rounded
from nemotron_jax.evaluation.context import Context, Shared
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.quantization import Options, measure
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.transcripts import Transcripts
from nemotron_jax.model.parameters import flatten, unflatten
from tests.tiny_models import tiny_model

ASKED = Options(tokens=200, answers=3, new_tokens=8)
SHIFTED = "moe.mixer.shared.up.weight"


def shifted(model, by=1.25):
    """The model with one matrix too large, as one is whose scale is off."""
    table = flatten(model)
    return unflatten(model, {**table, SHIFTED: table[SHIFTED] * by})


@pytest.mark.more
def test_formats_cost_what_they_must_and_a_shifted_scale_is_found(
    run_directory, run_config, model, tmp_path
):
    subject = Subject(run_directory, run_config, run_directory, model=model.config)
    wrong = shifted(rounded.rounded(model, "nvfp4"))
    subject = dataclasses.replace(subject, load=lambda path: wrong)
    progress = Progress("quantization")
    context = Context(subject, Transcripts(quantization.SUITE), progress, Shared(model))
    (tmp_path / "config.json").touch()  # which makes it a model's directory
    asked = dataclasses.replace(ASKED, formats=(*ASKED.formats, str(tmp_path)))
    result = measure(context, asked)
    value = lambda name, form: result.values[f"{name}/{form}"].mean
    assert value("kl", "float32") == 0 and value("same_token", "float32") == 1
    kls = [value("kl", form) for form in ("bfloat16", "fp8", "nvfp4", tmp_path.name)]
    assert 0 < kls[0] < kls[1] < kls[2] < kls[3]
    assert value("same_token_of_answers", "float32") == 1
    assert value("tokens_an_answer", "float32") == 8
    said = dict(zip(asked.formats, result.says, strict=True))
    assert [form for form, text in said.items() if "WRONG" in text] == [str(tmp_path)]
    assert SHIFTED in said[str(tmp_path)]
    documents = result.values["bits_per_byte/nvfp4"].n
    assert documents == result.values["kl/nvfp4"].n > 1


@pytest.mark.more
def test_rounding_moves_matrices_as_far_as_their_formats_say():
    model = tiny_model("M*E", mtp="*")
    names = rounded.matrices_of(model)
    assert SHIFTED in names and "mamba.mixer.x.weight" in names
    for part in ("router", "conv", "norm", "embedding", "head", "mtp_block", "A_log"):
        assert not any(part in name for name in names)
    for form in ("bfloat16", "fp8", "nvfp4"):
        after = rounded.rounded(model, form)
        worst, off = rounded.change(model, after).worst
        assert 0 < off < rounded.LIMITS[form], (form, worst)
        wrong, off = rounded.change(model, shifted(after)).worst
        assert wrong == SHIFTED and off > rounded.LIMITS[form]
    assert rounded.rounded(model, "float32") is model
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(24, 10)), jnp.float32)
    kept = rounded._nvfp4(matrix)
    blocks = np.abs(np.asarray(kept)[:16]).max(axis=0)  # along the summed axis
    np.testing.assert_allclose(blocks, np.abs(np.asarray(matrix)[:16]).max(axis=0), rtol=0.13)
