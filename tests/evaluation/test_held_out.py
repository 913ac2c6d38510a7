"""Held-out loss is the plain cross entropy of the scored tokens; bits per byte follows from it."""

import math

import jax
import numpy as np
import optax
import pytest

from nemotron_jax.data.corpus import prepare
from nemotron_jax.data.loader import held_out_batches
from nemotron_jax.evaluation.held_out import held_out_nats, held_out_probe
from nemotron_jax.evaluation.samples import PROMPTS, make_samples
from nemotron_jax.training.prepared import init_state, prepare_run
from tests.training.runs import changed, small_run, write_texts


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(config, tokenizer, corpus, model)"""
    root = tmp_path_factory.mktemp("held_out")
    config = changed(
        small_run(write_texts(root / "texts")),
        data={"held_out_fraction": 0.3, "sequence_length": 40},
        training={"loss_chunk": 33},
        logging={"evaluate_rows": 10**6},
    )
    tokenizer, corpus = prepare(config.data, config.model.vocab_size, root / "run")
    return config, tokenizer, corpus, init_state(prepare_run(config)).model


def test_loss_and_bits_are_those_of_plain_logits(setting):
    config, _, corpus, model = setting
    batches = held_out_batches(corpus, config.data, 0, 10**6)
    nats = tokens = 0
    for batch in batches:
        logits = model.logits(model(batch.tokens, segment_ids=batch.segment_ids).hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets[..., 0])
        scored = batch.weights[..., 0] > 0
        nats += float(np.asarray(losses, np.float64)[scored].sum())
        tokens += scored.sum()
    probe = held_out_probe(corpus, config.data, config.logging.evaluate_rows, 512)
    values = probe(model, config.execution)
    assert values["held_out_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    # Every byte of the held-out text but those of each document's first token.
    starts = corpus.held_out.tokens[corpus.held_out.offsets[:-1]]
    num_bytes = corpus.facts.bytes - corpus.byte_lengths[starts].sum()
    assert values["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert values["unigram_entropy"] == corpus.facts.unigram_entropy


def test_padding_alone_is_an_error(setting):
    config, _, corpus, model = setting
    batch = held_out_batches(corpus, config.data, 0, 4)[0]
    empty = jax.tree.map(np.zeros_like, batch)
    with pytest.raises(ValueError, match="score no token"):
        held_out_nats(model, [empty])


def test_samples_begin_with_their_prompts_and_repeat(setting):
    _, tokenizer, _, model = setting
    sample = make_samples(tokenizer, 8, seed=3)
    text = sample(model)
    place = 0
    for prompt in PROMPTS:
        place = text.index(prompt, place)
    assert sample(model) == text
    assert make_samples(tokenizer, 8, seed=4)(model) != text
