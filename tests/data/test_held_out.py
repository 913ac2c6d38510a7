"""Held-out text is disjoint from training text, near-duplicates included."""

import random

import pytest

from nemotron_jax.data.held_out import shared_gram_fractions, split_documents
from nemotron_jax.data.sources import Collection, Document


def random_text(seed, words=200, vocabulary=5000):
    generator = random.Random(seed)
    return " ".join(f"w{generator.randrange(vocabulary)}" for _ in range(words))


def collection(documents, source="made up"):
    return Collection(source, tuple(documents), ())


def test_the_split_depends_on_names_alone_and_holds_out_about_the_fraction():
    documents = [Document(random_text(n), f"file_{n}") for n in range(400)]
    split = split_documents([collection(documents)], 0.1)
    held_out = {d.name for d in split.held_out}
    assert 20 <= len(held_out) <= 60 and not split.dropped
    assert held_out.isdisjoint(d.name for d in split.train[0])
    assert len(held_out) + len(split.train[0]) == 400
    changed = [Document(random_text(n + 1000), f"file_{n}") for n in reversed(range(0, 400, 2))]
    again = {d.name for d in split_documents([collection(changed)], 0.1).held_out}
    assert again == {name for name in held_out if int(name.split("_")[1]) % 2 == 0}


def test_near_duplicates_of_training_text_are_dropped():
    documents = [Document(random_text(n), f"file_{n}") for n in range(100)]
    split = split_documents([collection(documents)], 0.2)
    first, second, third = (d.name for d in split.held_out[:3])
    source = split.train[0][0].text.split()
    parts = {
        first: " ".join(["changed", *source[1:], "end"]),  # all but the first gram shared
        second: " ".join(source[:100] + random_text(1001, 100).split()),  # 88 of 188 grams
        third: " ".join(source[:40] + random_text(1002, 160).split()),  # 28 of 188 grams: 15 %
    }
    changed = [Document(parts.get(d.name, d.text), d.name) for d in documents]
    again = split_documents([collection(changed)], 0.2)
    assert set(again.dropped) == {first, second}
    assert {d.name for d in again.held_out} == {d.name for d in split.held_out} - {first, second}
    assert again.train == split.train


def test_shared_fractions_equal_a_plain_count():
    generator = random.Random(0)
    base = random_text(7, 600, vocabulary=30).split()
    training = [Document(" ".join(base[i : i + 90]), "t") for i in (0, 120, 300, 471)]
    training += [Document("a short one", "t"), Document("", "t")]
    candidates = [Document("a short one", "c"), Document("another short one", "c")]
    for _ in range(20):
        start, size = generator.randrange(500), generator.randrange(1, 100)
        candidates.append(Document(" \n".join(base[start : start + size]), "c"))

    def grams(text):
        words = text.split()
        return {tuple(words[i : i + 13]) for i in range(max(1, len(words) - 12))}

    known = set().union(*(grams(d.text) for d in training))
    expected = [len(grams(d.text) & known) / len(grams(d.text)) for d in candidates]
    assert 0 < sum(expected) < len(expected)
    assert list(shared_gram_fractions(candidates, training)) == pytest.approx(expected)


def test_duplicates_across_sources_are_seen():
    mine = [Document(random_text(n), f"file_{n}") for n in range(30)]
    held_out = split_documents([collection(mine)], 0.2).held_out[0]
    other = [Document(random_text(n + 99), f"other_{n}") for n in range(30)]
    trained = split_documents([collection(other)], 0.2).train[0][0]
    copied = [Document(held_out.text if d == trained else d.text, d.name) for d in other]
    split = split_documents([collection(mine), collection(copied)], 0.2)
    assert held_out.name in split.dropped


def test_no_part_of_a_source_is_empty():
    for n in range(20):
        pair = [Document(random_text(n), f"a{n}"), Document(random_text(n + 50), f"b{n}")]
        split = split_documents([collection(pair)], 0.01)
        assert len(split.train[0]) == len(split.held_out) == 1
        split = split_documents([collection(pair)], 0.99)
        assert len(split.train[0]) == len(split.held_out) == 1


def test_a_lone_document_is_cut_at_a_line_end():
    text = "".join(f"line {n} {random_text(n, 20)}\n" for n in range(50))
    split = split_documents([collection([Document(text, "long.txt")])], 0.1)
    (train,), held_out = split.train[0], split.held_out[0]
    assert train.text + held_out.text == text and train.text.endswith("\n")
    assert 0.08 * len(text) < len(held_out.text) < 0.15 * len(text)
    with pytest.raises(ValueError, match="long.txt has no line end.*at least two documents"):
        split_documents([collection([Document("one line only", "long.txt")])], 0.1)


def test_held_out_text_that_is_all_duplicates_is_an_error():
    same = [Document(random_text(1), f"file_{n}") for n in range(10)]
    with pytest.raises(ValueError, match="all . candidates share more than 20%"):
        split_documents([collection(same)], 0.2)
