"""A small folder of made-up sources, and the corpus made from it."""

import random

import pytest

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data.corpus import prepare

WORDS = "def return value = ( ) : import 12 7 état naïve 数 λ for in range list dict self".split()


def write_folder(folder, count, seed):
    """`count` files of random words, of very different lengths; their texts by name."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for number in range(count):
        size = generator.choice([1, 3, 20, 150, 400])
        text = " ".join(generator.choices(WORDS, k=size)) + "\n"
        texts[f"file_{number}.txt"] = f"{number} {text}"
        (folder / f"file_{number}.txt").write_text(texts[f"file_{number}.txt"], "utf-8")
    return texts


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    write_folder(root / "a", 40, seed=1)
    write_folder(root / "b", 25, seed=2)
    return root / "a", root / "b"


@pytest.fixture(scope="session")
def data(folders):
    return DataConfig(
        sources=tuple(f"hf:{folder}" for folder in folders),
        source_weights=(0.7, 0.3),
        sequence_length=37,
        batch_size=12,
        held_out_fraction=0.2,
        prefetch=3,
    )


@pytest.fixture(scope="session")
def prepared(data, tmp_path_factory):
    """(tokenizer, corpus) of the two folders."""
    return prepare(data, 320, tmp_path_factory.mktemp("run"), progress=lambda line: None)


@pytest.fixture(scope="session")
def corpus(prepared):
    return prepared[1]
