"""A run finds its own corpus again, and notices every change of it."""

import dataclasses
import gzip
import json
import math
from collections import Counter

import numpy as np
import pytest

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data import corpus as module
from nemotron_jax.data.corpus import prepare, repetitions
from nemotron_jax.data.loader import held_out_batches, held_out_row_count
from nemotron_jax.data.tokenizer import Tokenizer, train_tokenizer


def quietly(data, vocab_size, directory):
    return prepare(data, vocab_size, directory, progress=lambda line: None)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(30):
        text = "".join(f"{number} état {number * n}\n" for n in range(40))
        (folder / f"{number}.txt").write_text(text, "utf-8")
    return folder


@pytest.fixture
def config(folder):
    return DataConfig(sources=(f"hf:{folder}",), held_out_fraction=0.2, sequence_length=32)


def assert_same(first, second):
    assert first.fingerprint == second.fingerprint and first.facts == second.facts
    pairs = zip((*first.train, first.held_out), (*second.train, second.held_out), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.offsets, other.offsets)


def test_the_corpus_is_the_texts(data, prepared, folders):
    tokenizer, corpus = prepared
    texts = [path.read_text("utf-8") for folder in folders for path in folder.iterdir()]
    decoded = []
    for documents in (*corpus.train, corpus.held_out):
        for begin, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
            own = documents.tokens[begin:end]
            assert own[-1] == tokenizer.eos and tokenizer.eos not in own[:-1]
            decoded.append(tokenizer.decode(own))
    assert Counter(decoded) == Counter(texts)
    assert len(corpus.train) == 2 and corpus.train[0].tokens.dtype == np.uint16


def test_bytes_and_facts_equal_a_plain_count(data, prepared):
    tokenizer, corpus = prepared
    bounds = zip(corpus.held_out.offsets[:-1], corpus.held_out.offsets[1:], strict=True)
    documents = [corpus.held_out.tokens[begin:end] for begin, end in bounds]
    texts = [tokenizer.decode(own) for own in documents]
    assert corpus.facts.bytes == sum(len(text.encode()) for text in texts)
    assert corpus.facts.tokens == sum(len(own) for own in documents)
    packed = gzip.compress("".join(texts).encode(), 9, mtime=0)
    assert corpus.facts.gzip_bits_per_byte == 8 * len(packed) / corpus.facts.bytes
    counts = Counter(token for part in corpus.train for token in part.tokens.tolist())
    total = sum(counts.values()) + tokenizer.vocab_size
    nats = [-math.log((counts[t] + 1) / total) for own in documents for t in own.tolist()]
    assert corpus.facts.unigram_entropy == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    # a document's first token is never a target, so its bytes are not scored
    scored = sum(len(tokenizer.decode(own).encode()) for own in (d[1:] for d in documents))
    unscored_bytes = sum(corpus.byte_lengths[own[0]] for own in documents)
    assert scored == corpus.facts.bytes - unscored_bytes
    batches = held_out_batches(corpus, data, 2, held_out_row_count(corpus, data))
    assert sum(corpus.bytes_of(batch).sum() for batch in batches) == scored
    assert batches[0].tokens.shape == (data.batch_size, data.sequence_length)


def test_a_second_call_finds_the_first_ones_work(config, tmp_path, monkeypatch):
    tokenizer, corpus = quietly(config, 300, tmp_path / "run")
    other_tokenizer, other_corpus = quietly(config, 300, tmp_path / "other")
    assert tokenizer.fingerprint() == other_tokenizer.fingerprint()
    assert_same(corpus, other_corpus)

    def never(*arguments):
        raise AssertionError("made again")

    for name in ("train_tokenizer", "tokenize", "split_sources"):
        monkeypatch.setattr(module, name, never)
    again_tokenizer, again = quietly(config, 300, tmp_path / "run")
    assert again_tokenizer.fingerprint() == tokenizer.fingerprint()
    assert_same(corpus, again)


@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped"])
def test_damaged_arrays_are_made_again(config, tmp_path, damage):
    _, corpus = quietly(config, 300, tmp_path / "run")
    path = tmp_path / "run" / "corpus" / "train_0.tokens.npy"
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-10])
    else:
        content[-3] ^= 1
        path.write_bytes(content)
    lines = []
    _, again = prepare(config, 300, tmp_path / "run", progress=lines.append)
    assert any("missing or damaged" in line for line in lines)
    assert_same(corpus, again)
    _, third = quietly(config, 300, tmp_path / "run")
    assert_same(corpus, third)


def test_a_killed_first_call_is_repeated(config, tmp_path, monkeypatch):
    _, expected = quietly(config, 300, tmp_path / "expected")
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quietly(config, 300, tmp_path / "run")
    assert not list((tmp_path / "run" / "corpus").glob("*"))
    _, corpus = quietly(config, 300, tmp_path / "run")
    assert_same(corpus, expected)


def test_changed_data_is_an_error_naming_the_file(config, folder, tmp_path):
    quietly(config, 300, tmp_path / "run")
    content = (folder / "7.txt").read_bytes()
    (folder / "7.txt").write_bytes(content.replace(b"7", b"8", 1))
    with pytest.raises(ValueError, match=r"7.txt has other contents; restore the data"):
        quietly(config, 300, tmp_path / "run")
    (folder / "7.txt").write_bytes(content)
    quietly(config, 300, tmp_path / "run")
    with pytest.raises(ValueError, match="held_out_fraction 0.2 became 0.3"):
        quietly(dataclasses.replace(config, held_out_fraction=0.3), 300, tmp_path / "run")


def test_a_changed_tokenizer_is_an_error(config, tmp_path):
    tokenizer, _ = quietly(config, 300, tmp_path / "run")
    train_tokenizer(["other text"], 290).save(tmp_path / "foreign")
    given = dataclasses.replace(config, tokenizer=str(tmp_path / "foreign"))
    with pytest.raises(ValueError, match="foreign.* is not the one"):
        quietly(given, 300, tmp_path / "run")
    Tokenizer.load(tmp_path / "foreign").save(tmp_path / "run")
    with pytest.raises(ValueError, match="is not the one that the corpus"):
        quietly(config, 300, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has a corpus and no tokenizer.json"):
        quietly(config, 300, tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    quietly(config, 300, tmp_path / "run")
    tokenizer.save(tmp_path / "new")
    with pytest.raises(ValueError, match="data.tokenizer=.*foreign' differs from"):
        quietly(given, 300, tmp_path / "new")


def test_an_existing_tokenizer_is_used_and_kept_with_the_run(config, tmp_path):
    given = train_tokenizer(["état 12 34"] * 3, 280)
    given.save(tmp_path / "given")
    config = dataclasses.replace(config, tokenizer=str(tmp_path / "given" / "tokenizer.json"))
    tokenizer, _ = quietly(config, 300, tmp_path / "run")
    assert tokenizer.fingerprint() == given.fingerprint()
    assert Tokenizer.load(tmp_path / "run").fingerprint() == given.fingerprint()
    with pytest.raises(ValueError, match="more than the model's vocab_size=275"):
        quietly(config, 275, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_an_unreadable_manifest_is_an_error(config, tmp_path):
    quietly(config, 300, tmp_path / "run")
    path = tmp_path / "run" / "corpus" / "manifest.json"
    stored = json.loads(path.read_text())
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="manifest.json cannot be read.*remove the folder"):
        quietly(config, 300, tmp_path / "run")
    path.write_text(json.dumps(stored | {"format_version": 99}))
    with pytest.raises(ValueError, match="format_version=99"):
        quietly(config, 300, tmp_path / "run")


def test_the_standard_library_becomes_a_corpus(tmp_path):
    lines = []
    tokenizer, corpus = prepare(DataConfig(), 1024, tmp_path, progress=lines.append)
    assert tokenizer.vocab_size == 1024
    assert len(corpus.train[0].tokens) > 1_000_000
    assert 0.01 < corpus.facts.tokens / len(corpus.train[0].tokens) < 0.12
    assert 4 < corpus.facts.unigram_entropy < math.log(1024)
    assert 1 < corpus.facts.gzip_bits_per_byte < 4
    assert any("training tokens" in line for line in lines)


def test_a_tokenizer_trained_for_another_vocabulary_is_refused(config, tmp_path):
    quietly(config, 512, tmp_path / "run")
    with pytest.raises(ValueError, match="trained for model.vocab_size=512, not 600"):
        quietly(config, 600, tmp_path / "run")
    quietly(config, 512, tmp_path / "run")


def test_the_tokenizer_ends_documents_with_the_model_s_token(config, tmp_path):
    for _ in range(2):  # a new tokenizer, and one that is there
        with pytest.raises(ValueError, match="ends a document with id 2.*eos_token=7"):
            prepare(config, 512, tmp_path / "run", eos_token=7, progress=lambda line: None)
        assert quietly(config, 512, tmp_path / "run")[0].eos == 2


def test_a_text_that_is_read_many_times_over_is_told(config, tmp_path):
    corpus = quietly(config, 512, tmp_path / "run")[1]
    assert repetitions(corpus, config, 1) == []
    [line] = repetitions(corpus, config, 100_000)
    assert "times over" in line and config.sources[0] in line
    assert len(repetitions(corpus, dataclasses.replace(config, sequence_length=10**6), 1)) == 1


@pytest.mark.parametrize("key", ["manifest", "held_out_facts", "arrays", "tokenizer"])
@pytest.mark.parametrize("value", [None, {}, 7])
def test_a_manifest_without_its_keys_is_named(config, tmp_path, key, value):
    quietly(config, 512, tmp_path / "run")
    path = tmp_path / "run" / "corpus" / "manifest.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, key: value}))
    if key == "arrays" and value == {}:
        quietly(config, 512, tmp_path / "run")  # whole, and made anew
        return
    with pytest.raises(ValueError, match="manifest.json cannot be read.*made anew"):
        quietly(config, 512, tmp_path / "run")
