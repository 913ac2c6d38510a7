"""Token shards are read as the text in memory is, whatever their size and whoever made them."""

import dataclasses
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest

from nemotron_jax.config.run import DataConfig
from nemotron_jax.data import order, shard_maker, shards, sources
from nemotron_jax.data import tokenize as tokenize_module
from nemotron_jax.data.corpus import prepare
from nemotron_jax.data.loader import TrainLoader, held_out_batches
from nemotron_jax.data.packing import DocumentTokens, Stream
from nemotron_jax.data.shards import TokenShards
from nemotron_jax.data.tokenize import Options, main, tokenize

FIELDS = ("tokens", "targets", "mtp_tokens", "segment_ids", "weights")
VOCABULARY = 320


def quietly(data, directory):
    return prepare(data, VOCABULARY, directory, progress=lambda line: None)


def made(folder, output, tokenizer, **options):
    """Token shards of a folder's text, small ones."""
    options = {"shard_tokens": 300, "held_out_fraction": 0.2} | options
    tokenize(
        Options((f"hf:{folder}",), str(tokenizer), output, **options), progress=lambda line: None
    )
    return output


def rows_of(corpus, data, count, depths=2, seed=3):
    loader = TrainLoader(corpus, data, seed, depths)
    try:
        return [loader.global_row(index) for index in range(count)]
    finally:
        loader.close()


def assert_rows_equal(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.segments, other.segments)


def same_files(first, second):
    names = sorted(path.relative_to(first).as_posix() for path in first.rglob("*"))
    assert names == sorted(path.relative_to(second).as_posix() for path in second.rglob("*"))
    files = [name for name in names if (first / name).is_file()]
    return filecmp.cmpfiles(first, second, files, shallow=False)[0] == files


@pytest.fixture(scope="module")
def folder(folders):
    return folders[0]


@pytest.fixture(scope="module")
def data(folder):
    return DataConfig(
        sources=(f"hf:{folder}",), sequence_length=37, batch_size=12, held_out_fraction=0.2
    )


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """(run's directory, corpus in memory) of the folder."""
    run = tmp_path_factory.mktemp("text")
    return run, quietly(data, run)[1]


@pytest.fixture(scope="module")
def tokens(folder, prepared, tmp_path_factory):
    """The folder's token shards."""
    return made(folder, tmp_path_factory.mktemp("shards") / "tokens", prepared[0])


@pytest.fixture
def copy(tokens, tmp_path):
    return shutil.copytree(tokens, tmp_path / "copy")


def sharded(data, *directories, **changes):
    sources = tuple(f"shards:{directory}" for directory in directories)
    return dataclasses.replace(data, sources=sources, **changes)


def test_rows_and_held_out_text_equal_those_in_memory(data, prepared, tokens, tmp_path):
    _, expected = prepared
    corpus = quietly(sharded(data, tokens), tmp_path)[1]
    assert len(TokenShards(f"shards:{tokens}").index.shards) > 5
    assert corpus.facts == expected.facts
    total = 2 * len(expected.train[0].tokens) // 37 + 2  # beyond two epochs
    assert_rows_equal(rows_of(corpus, data, total), rows_of(expected, data, total))
    for one, other in zip(
        held_out_batches(corpus, data, 2, 99), held_out_batches(expected, data, 2, 99), strict=True
    ):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    again = quietly(sharded(data, tokens), tmp_path)[1]  # from the run's own directory
    assert again.fingerprint == corpus.fingerprint and again.facts == corpus.facts


@pytest.mark.parametrize("shard_tokens", [1, 5000, 10**8])
def test_the_size_of_shards_changes_no_row(
    folder, data, prepared, tokens, *, tmp_path, shard_tokens, monkeypatch
):
    monkeypatch.setattr(shard_maker, "PIECE_TOKENS", 64)
    monkeypatch.setattr(shards, "PIECE_TOKENS", 64)
    other = made(folder, tmp_path / "o", prepared[0], shard_tokens=shard_tokens)
    one, two = TokenShards(f"shards:{tokens}").files, TokenShards(f"shards:{other}").files
    assert one == two  # a run goes on with shards of another size
    corpus = quietly(sharded(data, other), tmp_path / "run")[1]
    assert_rows_equal(rows_of(corpus, data, 120), rows_of(prepared[1], data, 120))


def test_windows_are_read_alike_from_shards_and_from_memory(
    folder, data, prepared, tmp_path, monkeypatch
):
    monkeypatch.setattr(order, "UNIT_DOCUMENTS", 4)
    monkeypatch.setattr(order, "WINDOW_UNITS", 3)
    own = made(folder, tmp_path / "o", prepared[0])
    files = TokenShards(f"shards:{own}")
    train = DocumentTokens(prepared[1].train[0].tokens, prepared[1].train[0].offsets)
    assert files.unit_tokens.tolist() == train.unit_tokens.tolist() and len(train.unit_tokens) > 6
    one, two = Stream(files, 5), Stream(train, 5)
    for epoch in range(2):
        read = two.order(epoch)
        assert sorted(read) == list(range(len(train.offsets) - 1))
        np.testing.assert_array_equal(one.order(epoch), read)
    total = 2 * train.token_count // 41
    assert_rows_equal(
        [one.row(r, 41, 3) for r in range(total)], [two.row(r, 41, 3) for r in range(total)]
    )
    joined = np.concatenate([two.row(r, 41, 0).tokens for r in range(total)])
    np.testing.assert_array_equal(
        joined[: train.token_count], two.read(0, train.token_count).tokens
    )


@pytest.mark.parametrize("host_count", [1, 2, 4])
def test_hosts_share_shards_and_text_in_one_order(
    data, folders, prepared, tokens, tmp_path, host_count
):
    mixed = dataclasses.replace(
        data,
        sources=(f"shards:{tokens}", f"hf:{folders[1]}", f"shards:{tokens}"),
        source_weights=(0.5, 0.3, 0.2),
    )
    corpus = quietly(mixed, tmp_path)[1]
    share = mixed.batch_size // host_count
    loaders = [
        TrainLoader(corpus, mixed, 1, 1, rows=range(host * share, (host + 1) * share))
        for host in range(host_count)
    ]
    whole = TrainLoader(corpus, mixed, 1, 1)
    try:
        for step in range(6):
            parts, expected = [next(loader) for loader in loaders], whole.batch_at(step)
            for field in FIELDS:
                joined = np.concatenate([getattr(part, field) for part in parts])
                np.testing.assert_array_equal(joined, getattr(expected, field))
        assert loaders[-1].state()["source_rows"] == [36, 22, 14]
    finally:
        for loader in (*loaders, whole):
            loader.close()


def test_two_workers_write_the_same_bytes_as_one(folder, prepared, tokens, tmp_path):
    assert same_files(tokens, made(folder, tmp_path / "o", prepared[0], workers=2))


def test_a_tokenizer_is_learned_as_for_text_in_memory(folder, prepared, tokens, tmp_path):
    output = made(folder, tmp_path / "o", f"train:{VOCABULARY}")
    names = [path.name for path in (tokens / "shards").iterdir()]
    assert filecmp.cmpfiles(tokens / "shards", output / "shards", names, shallow=False)[0] == names


class Killed(BaseException):
    pass


def test_a_making_that_is_killed_at_any_write_ends_with_the_same_bytes(
    folder, prepared, tokens, tmp_path, monkeypatch
):
    """Every rename is a moment: before and after it."""
    replace, left = os.replace, [0]

    def dying(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)
        if left[0] == -1 and str(target).startswith(str(tmp_path)):
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
    output, kills = tmp_path / "o", 0
    for moment in range(1, 40):
        left[0] = moment // 2 + 1 if moment % 2 else 0
        try:
            made(folder, output, prepared[0])
            break
        except Killed:
            kills += 1
            with pytest.raises(ValueError, match="index.json is missing|goes on"):
                if (output / "index.json").exists():
                    raise ValueError("goes on") from None
                TokenShards(f"shards:{output}")
    left[0] = 10**6
    made(folder, output, prepared[0])
    assert kills > 8 and same_files(tokens, output)


def test_a_process_that_is_killed_leaves_no_worker_and_goes_on(tmp_path, prepared):
    text = tmp_path / "text"
    text.mkdir()
    generator = random.Random(0)
    for number in range(6):
        rows = (" ".join(f"{generator.random():.3f}" for _ in range(200)) for _ in range(150))
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (text / f"{number}.jsonl").write_text(lines)
    flags = [f"--sources=hf:{text}", f"--tokenizer={prepared[0]}", "--shard_tokens=20000"]
    flags += ["--workers=2", "--held_out_fraction=0.01"]
    command = [sys.executable, "-m", "nemotron_jax.data.tokenize", *flags]
    process = subprocess.Popen([*command, f"--output={tmp_path / 'o'}"], start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("o/shards/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("workers outlived the process that began them")
    assert not (tmp_path / "o" / "index.json").exists()
    flags[3] = "--workers=1"
    assert main([*flags, f"--output={tmp_path / 'o'}"]) == 0
    assert main([*flags, f"--output={tmp_path / 'p'}"]) == 0
    assert same_files(tmp_path / "o", tmp_path / "p")


def damage(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if len(content) < 60000 else 200] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["000000-00000", "held_out"])
@pytest.mark.parametrize("fault", ["missing", "short", "changed"])
def test_a_damaged_shard_is_named_before_the_run_begins(copy, name, fault):
    file = copy / "shards" / f"{name}.arrayrecord"
    if fault == "missing":
        file.unlink()
    elif fault == "short":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        damage(file)
    with pytest.raises(ValueError, match=f"{name}.arrayrecord cannot be used: it") as error:
        TokenShards(f"shards:{copy}")
    assert "\n" not in str(error.value) and "restore it" in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "changed", "empty"])
def test_damage_that_shows_while_a_row_is_read_is_named(copy, fault, monkeypatch):
    monkeypatch.setattr(shards, "MOST_HASHED_BYTES", 0)
    files = TokenShards(f"shards:{copy}")
    for file in (copy / "shards").iterdir():
        if fault == "missing":
            file.unlink()
        elif fault == "empty":
            file.write_bytes(b"")
        else:
            file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
    with pytest.raises(ValueError, match=r"000\d+-0\d+.arrayrecord cannot be used") as error:
        Stream(files, 0).read(0, 10)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="held_out.arrayrecord cannot be used"):
        files.held_out()


def test_a_wrong_index_or_tokenizer_is_named(copy, tmp_path, data, folder):
    index = copy / "index.json"
    text = index.read_text()
    for wrong in (text[:-7], "[]", text.replace('"tokens":', '"tokens": 1', 1), "{}", "[" * 10**5):
        index.write_text(wrong)
        with pytest.raises(ValueError, match="index.json cannot be used"):
            TokenShards(f"shards:{copy}")
    index.write_text(text)
    other = made(folder, tmp_path / "other", "train:300")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        quietly(sharded(data, copy, other, source_weights=(1.0, 1.0)), tmp_path / "r")
    with pytest.raises(ValueError, match="made with another tokenizer"):
        quietly(sharded(data, copy, tokenizer=str(other)), tmp_path / "s")
    shutil.copy(other / "tokenizer.json", copy / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer that the shards were made with"):
        TokenShards(f"shards:{copy}")
    for source in ("shards:", f"shards:{tmp_path}/absent", f"shards:{folder}"):
        with pytest.raises(ValueError, match="names no directory|index.json is missing"):
            TokenShards(source)


def test_a_run_notices_other_shards(data, tokens, folder, prepared, tmp_path):
    quietly(sharded(data, tokens), tmp_path / "run")
    other = made(folder, tmp_path / "o", prepared[0], held_out_fraction=0.3)
    with pytest.raises(ValueError, match="changed since it began"):
        quietly(sharded(data, other), tmp_path / "run")


def test_much_text_asks_for_shards(data, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MOST_TEXT_BYTES", 1000)
    with pytest.raises(ValueError, match="up to 1,000; make token shards .*data.tokenize"):
        quietly(data, tmp_path)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sources=hf:absent"], "no file or folder absent"),
        (["--sources=wikipedia"], "is unknown"),
        (["--sources=python_stdlib,"], "names an empty source"),
        (["--sources=hf:gs://bucket/text"], "is a URL"),
        (["--tokenizer=absent"], "does not exist"),
        (["--tokenizer=train:many"], "names no number of ids"),
        (["--tokenizer=train:5"], "use at least 272"),
        (["--shard_tokens=0"], "must be at least 1"),
        (["--shard_tokens=lots"], "invalid"),
        (["--shard_tokens=inf"], "invalid"),
        (["--workers=-1"], "must be at least 1"),
        (["--held_out_fraction=nan"], "must lie between 0 and 1"),
        (["--nonsense"], "unrecognized"),
    ],
)
def test_a_wrong_flag_is_one_line(folder, prepared, tmp_path, capsys, flags, words):
    good = [f"--sources=hf:{folder}", f"--tokenizer={prepared[0]}", f"--output={tmp_path / 'o'}"]
    assert main([*good, "--workers=1", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_directory_of_other_settings_is_refused(folder, folders, prepared, copy, tmp_path):
    with pytest.raises(ValueError, match="begun with other shard_tokens"):
        made(folder, copy, prepared[0], shard_tokens=301)
    (copy / "index.json").unlink()
    with pytest.raises(ValueError, match="of another making"):
        made(folder, copy, prepared[0])
    with pytest.raises(ValueError, match="use --held_out_fraction=0.0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokenize_module, "MOST_HELD_OUT_BYTES", 100)
            made(folder, tmp_path / "o", prepared[0])


def test_memory_does_not_grow_with_the_text(prepared, tmp_path):
    """Of making and of reading, at one and at four times the text."""
    peaks, generator = [], random.Random(0)
    for size in (1, 4):
        text = tmp_path / f"{size}.jsonl"
        with text.open("w") as file:
            for _ in range(100 * size):
                words = " ".join(f"{generator.random():.3f}" for _ in range(600))
                file.write(json.dumps({"text": words}) + "\n")
        tracemalloc.start()
        options = {"held_out_fraction": 1e-9, "shard_tokens": 100_000}
        output = made(text, tmp_path / f"o{size}", prepared[0], **options)
        stream = Stream(TokenShards(f"shards:{output}"), 0)
        for row in range(0, 4000, 400):
            stream.row(row, 64, 1)
        assert stream._documents.token_count > 200_000 * size
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0], peaks
