"""transformers reads what is exported here, and what it writes is read here; both say the same."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import nemotron_jax as nj
from nemotron_jax.interop.hf_export import save_hub
from tests.golden_cases import CASES, GOLDEN, model
from tests.tiny_models import VOCABULARY, tiny_config, tiny_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from tests.hf.theirs import (  # noqa: E402
    NEW,
    load_theirs,
    our_logits,
    some_tokens,
    their_greedy,
    their_logits,
)

pytestmark = pytest.mark.hf
PATTERN = "ME*-M"


def assert_both_say_the_same(ours, network, vocabulary):
    tokens = some_tokens(vocabulary, 2, 21)
    np.testing.assert_allclose(our_logits(ours, tokens), their_logits(network, tokens), atol=1e-4)
    prompts = tokens[:, :9]
    np.testing.assert_array_equal(
        nj.generate(ours, prompts, NEW).tokens, their_greedy(network, prompts)
    )


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_an_exported_checkpoint(case, tmp_path):
    nj.save_pretrained(model(case), tmp_path / "out")
    assert_both_say_the_same(
        model(case), load_theirs(tmp_path / "out"), model(case).config.vocab_size
    )


def test_transformers_reads_a_new_model(tmp_path):
    new = tiny_model(PATTERN, mtp="*E")
    nj.save_pretrained(new, tmp_path / "out", dtype="float32")
    assert_both_say_the_same(new, load_theirs(tmp_path / "out"), VOCABULARY)


def test_transformers_reads_a_freshly_initialised_model_in_shards(tmp_path):
    config = dataclasses.replace(tiny_config(PATTERN), init_std=0.3)
    new = nj.Nemotron(config, rngs=nnx.Rngs(0))
    save_hub(new, tmp_path / "out", dtype="float32", shard_bytes=20_000)
    assert len(list(tmp_path.glob("out/*.safetensors"))) > 2
    assert_both_say_the_same(new, load_theirs(tmp_path / "out"), VOCABULARY)


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_saves_is_read_here(case, tmp_path):
    network = load_theirs(GOLDEN / case / "checkpoint")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.sin(torch.arange(parameter.numel())).view_as(parameter)
    network.save_pretrained(tmp_path / "out", max_shard_size="200KB")
    if network.config.num_nextn_predict_layers:  # kept in the config, but mtp.* was dropped
        with pytest.raises(ValueError, match="mtp='drop'"):
            nj.load_pretrained(tmp_path / "out")
    ours = nj.load_pretrained(tmp_path / "out", mtp="drop")
    assert_both_say_the_same(ours, network, ours.config.vocab_size)
