"""Conversations fill rows whole, and each token weighs what its stage of fine-tuning says."""

import dataclasses
import json

import numpy as np
import pytest

from nemotron_jax.config.run import DataConfig
from nemotron_jax.config.sft import SFTConfig
from nemotron_jax.data.chat.tokens import ChatTokens, encode_chat
from nemotron_jax.data.conversations import (
    ConversationStream,
    ConversationTokens,
    cut_reasoning,
    in_modes,
    pack_whole,
    prepare_conversations,
    repetitions,
    token_weights,
)
from nemotron_jax.data.loader import TrainLoader
from nemotron_jax.data.messages import check_row, reasons
from nemotron_jax.data.packing import make_batch

LENGTH = 256


def conversation(number: int, words: int) -> dict:
    thought = " ".join(f"word{place}" for place in range(words))
    answer = {"role": "assistant", "content": str(number), "reasoning_content": thought}
    return {"messages": [{"role": "user", "content": f"say {number}"}, answer]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversations")
    rows = [conversation(number, 1 + number % 17) for number in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        sources=(f"messages:{folder / 'a.jsonl'}", "oracle:arithmetic/1"),
        source_weights=(0.5, 0.5),
        sequence_length=1600,
        batch_size=4,
        held_out_fraction=0.2,
    )
    sft = SFTConfig(oracle_tasks=20)
    told: list[str] = []
    run = lambda: prepare_conversations(data, sft, 600, folder, progress=told.append)
    return data, sft, folder, *run(), told, run


def random_tokens(count: int, seed: int) -> ConversationTokens:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, LENGTH + 1, count)
    parts = tuple(draw.integers(1, 500, size).astype(np.int32) for size in sizes)
    return ConversationTokens(parts, tuple(draw.random(size).astype(np.float32) for size in sizes))


def test_every_conversation_is_once_in_the_rows_of_an_epoch() -> None:
    tokens = random_tokens(97, seed=0)
    lengths = [len(part) for part in tokens.parts]
    stream = ConversationStream(tokens, seed=5)
    rows = stream._epoch(0, LENGTH)
    assert sorted(document for row in rows for document in row) == list(range(97))
    assert all(sum(lengths[d] for d in row) <= LENGTH for row in rows)
    assert len(rows) < 1.25 * sum(lengths) / LENGTH  # first fit leaves little empty
    assert rows != ConversationStream(tokens, seed=6)._epoch(0, LENGTH)
    assert rows != stream._epoch(1, LENGTH)


def test_a_row_is_a_function_of_its_number_alone() -> None:
    tokens = random_tokens(23, seed=1)
    forward = ConversationStream(tokens, seed=3)
    ahead = [forward.row(index, LENGTH, 2) for index in range(60)]  # several epochs
    back = ConversationStream(tokens, seed=3)
    for index in reversed(range(60)):
        for ours, theirs in zip(back.row(index, LENGTH, 2), ahead[index], strict=True):
            assert np.array_equal(ours, theirs)


def test_packed_conversations_have_the_targets_of_conversations_alone() -> None:
    tokens = random_tokens(40, seed=2)
    alone = {}
    for number, (part, weights) in enumerate(zip(tokens.parts, tokens.weights, strict=True)):
        single = ConversationStream(ConversationTokens((part,), (weights,)), seed=0)
        alone[number] = make_batch([single.row(0, LENGTH, 3)], mtp_depths=2)
    stream = ConversationStream(tokens, seed=0)
    for index, documents in enumerate(stream._epoch(0, LENGTH)):
        batch, at = make_batch([stream.row(index, LENGTH, 3)], mtp_depths=2), 0
        for segment, document in enumerate(documents, start=1):
            size = len(tokens.parts[document])
            for name in ("tokens", "targets", "mtp_tokens", "weights"):
                packed, own = getattr(batch, name)[0], getattr(alone[document], name)[0]
                assert np.array_equal(packed[at : at + size], own[:size]), name
            assert (batch.segment_ids[0, at : at + size] == segment).all()
            at += size
        assert not batch.segment_ids[0, at:].any() and not batch.weights[0, at:].any()


def test_weights_go_with_the_token_that_is_predicted_at_every_depth() -> None:
    weights = np.array([0, 0, 0.5, 0, 0.25], np.float32)
    tokens = ConversationTokens((np.arange(1, 6, dtype=np.int32),), (weights,))
    batch = make_batch([ConversationStream(tokens, 0).row(0, 6, 3)], mtp_depths=2)
    expected = [[0, 0.5, 0], [0.5, 0, 0.25], [0, 0.25, 0], [0.25, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert np.array_equal(batch.weights[0], np.array(expected, np.float32))


def test_the_two_stages_weigh_tokens_and_conversations_alike() -> None:
    """By hand: turns of 2 and 4 learned tokens with losses 1, 3 and 2, 2, 2, 6."""
    losses = np.array([0, 1, 3, 0, 2, 2, 2, 6], np.float64)
    short = ChatTokens(np.zeros(3, np.int32), np.array([False, True, True]))
    long = ChatTokens(np.zeros(5, np.int32), np.array([False, True, True, True, True]))
    mean = {}
    for loss in ("tokens", "conversations"):
        weights = np.concatenate([token_weights(chat, loss) for chat in (short, long)])
        mean[loss] = (weights * losses).sum() / weights.sum()
    assert mean["tokens"] == pytest.approx(16 / 6)
    assert mean["conversations"] == pytest.approx((2 + 3) / 2)


def test_rows_that_are_too_long_are_an_error_or_counted(prepared) -> None:
    data, sft, folder, *_ = prepared
    one = {"sources": data.sources[:1], "source_weights": (1.0,)}
    narrow = dataclasses.replace(data, sequence_length=40, **one)
    with pytest.raises(ValueError, match=r"a.jsonl: row \d+: \d+ tokens exceed data.sequence_leng"):
        prepare_conversations(narrow, sft, 600, folder, progress=lambda line: None)
    told: list[str] = []
    dropping = dataclasses.replace(sft, bad_rows="drop")
    _, corpus = prepare_conversations(narrow, dropping, 600, folder, progress=told.append)
    assert max(map(len, corpus.train[0].parts)) <= 40 and "dropped" in told[-1]
    with pytest.raises(ValueError, match="exceed a row of 4"):
        pack_whole([0], [5], 4)


def test_a_run_says_how_often_it_reads_its_conversations(prepared) -> None:
    data, _, _, _, corpus, *_ = prepared
    tokens = sum(map(len, corpus.train[0].parts))
    often, once = repetitions(corpus, data, 100), repetitions(corpus, data, 1)
    share = data.batch_size * data.sequence_length / 2  # of the first source, in a step
    assert f"{100 * share / tokens:,.3g} times over: add conversations" in often[0]
    assert len(often) == 2 and once[1].endswith("times over")


def test_calls_that_the_model_is_not_shown_are_said(prepared, tmp_path) -> None:
    data, sft, *_ = prepared
    call = {"function": {"name": "f", "arguments": {}}}
    rows = [conversation(number, 2) for number in range(40)]
    for row in rows[::2]:
        row["messages"][-1]["tool_calls"] = [call]
    for row in rows[1::2]:  # two turns that reason are two examples
        row["messages"] += conversation(99, 3)["messages"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"sources": (f"messages:{tmp_path / 'a.jsonl'}",), "source_weights": (1.0,)}
    told: list[str] = []
    one = dataclasses.replace(data, **source)
    _, corpus = prepare_conversations(one, sft, 600, tmp_path, progress=told.append)
    assert "20 conversations call tools and have no `tools`" in told[-1]
    train = int(told[0].split(" conversations")[0].split()[-1])
    assert f": {len(corpus.train[0].parts)} examples of {train} " in told[0]
    assert train < len(corpus.train[0].parts) < 2 * train
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(ValueError, match=r"is left; of 1 rows dropped the first: .*ShareGPT"):
        prepare_conversations(one, dataclasses.replace(sft, bad_rows="drop"), 600, tmp_path)


def test_a_tokenizer_of_phrases_shortens_conversations(prepared, tmp_path) -> None:
    data, sft, _, _, corpus, _, _ = prepared
    phrases = dataclasses.replace(data, tokenizer="train_phrases")
    quiet = lambda line: None
    _, short = prepare_conversations(phrases, sft, 1200, tmp_path, progress=quiet)
    task = lambda found: np.mean([len(part) for part in found.train[1].parts])
    assert task(short) < 0.5 * task(corpus)
    learned = [weights[weights > 0].sum() for weights in short.train[1].weights]
    assert min(learned) > 0


def test_a_run_finds_its_conversations_again(prepared) -> None:
    data, sft, folder, tokenizer, corpus, told, run = prepared
    again = run()
    assert again[1].fingerprint == corpus.fingerprint
    assert again[0].fingerprint() == tokenizer.fingerprint()
    assert "learned tokens" in told[0]
    loader = TrainLoader(corpus, data, 0, 2)
    first, position = [next(loader) for _ in range(3)][-1], loader.state()
    later = next(loader)
    loader.close()
    resumed = TrainLoader(again[1], data, 0, 2)
    resumed.restore(position)
    assert np.array_equal(next(resumed).tokens, later.tokens)
    assert not np.array_equal(first.tokens, later.tokens)
    resumed.close()


def test_held_out_conversations_are_on_no_training_row(prepared) -> None:
    _, _, _, _, corpus, *_ = prepared
    shown = {part.tobytes() for tokens in corpus.train for part in tokens.parts}
    assert not shown & {part.tobytes() for part in corpus.held_out.parts}


def test_modes_take_their_shares_of_what_reasons(prepared) -> None:
    tokenizer = prepared[3]
    rows = [check_row(conversation(number, 12)) for number in range(600)]
    plain = [
        check_row(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": str(n)},
                ]
            }
        )
        for n in range(50)
    ]
    sft = SFTConfig(reasoning_off=0.2, truncated_budget=0.3)
    moded = in_modes(rows + plain, sft, tokenizer, seed=1)
    off = [c for c in moded[:600] if not reasons(c)]
    cut = [c for c in moded[:600] if c.options.reasoning_budget is not None]
    assert moded[600:] == plain and moded == in_modes(rows + plain, sft, tokenizer, seed=1)
    assert abs(len(off) - 120) < 40 and abs(len(cut) - 180) < 45  # four standard deviations
    assert in_modes(rows, SFTConfig(), tokenizer, seed=1) == rows
    for one in cut[:20]:
        thought = one.messages[1]["reasoning_content"]
        assert len(tokenizer.encode(thought)) <= one.options.reasoning_budget
        assert rows[0].messages[1]["reasoning_content"].startswith(thought)


def test_a_cut_thought_is_closed_and_its_budget_told(prepared) -> None:
    tokenizer = prepared[3]
    cut = cut_reasoning(check_row(conversation(7, 12)), tokenizer, draw=4)
    tokens = encode_chat(tokenizer, cut.messages, cut.tools, cut.options)
    text = tokenizer.decode(tokens.ids, show_special=True)
    assert "say 7\n\n{thinking token budget: 5}<|im_end|>" in text
    assert text.endswith("\n</think>\n7<|im_end|>\n")


@pytest.mark.parametrize("source", ["python_stdlib", "hf:/data", "messages"])
def test_other_sources_are_refused(prepared, tmp_path, source: str) -> None:
    data = dataclasses.replace(prepared[0], sources=(source,), source_weights=(1.0,))
    with pytest.raises(ValueError, match="fine-tuning reads messages:FILE"):
        prepare_conversations(data, SFTConfig(), 600, tmp_path)
