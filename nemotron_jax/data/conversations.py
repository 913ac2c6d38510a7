"""A run's conversations as token arrays, packed whole into rows, with the weight of each token."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from nemotron_jax.config.run import DataConfig
from nemotron_jax.config.sft import SFTConfig
from nemotron_jax.data import messages as sources_of
from nemotron_jax.data.chat.tokens import RESERVED, ChatTokens, encode_chat, ordinary_texts
from nemotron_jax.data.corpus import MANY_TIMES, TRAIN_TOKENIZER, times_read
from nemotron_jax.data.held_out import mix64
from nemotron_jax.data.messages import (
    MESSAGES,
    SLIPS,
    Conversation,
    Conversations,
    oracle_conversations,
    oracle_source,
    read_messages,
    reasons,
    slip_source,
    split_at_users,
    without_reasoning,
)
from nemotron_jax.data.packing import Row, empty_row, lookahead_of, make_batch
from nemotron_jax.data.tokenizer import (
    PHRASE_PATTERN,
    WORD_PATTERN,
    Tokenizer,
    check_end,
    check_vocabulary,
    train_tokenizer,
)
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.types import Batch

Progress = Callable[[str], None]

# Rows that are open for a conversation at one time: more fill rows better and mix lengths less.
OPEN_ROWS = 32
# Values of DataConfig.tokenizer that ask for a new one: what its tokens may not reach over.
PATTERNS = {TRAIN_TOKENIZER: WORD_PATTERN, "train_phrases": PHRASE_PATTERN}
HELD_OUT_TASKS = 64  # of each oracle source


@dataclasses.dataclass(frozen=True)
class ConversationTokens:
    """The ids of conversations and the weight of each token in the loss; 0 is not learned."""

    parts: tuple[Int[np.ndarray, "N"], ...]
    weights: tuple[Float[np.ndarray, "N"], ...]


class ConversationStream:
    """An endless stream of rows of whole conversations, newly shuffled and packed at each epoch.

    Row r is a function of (conversations, seed, source, row length, r). A row is filled up with
    padding where no open conversation fits.
    """

    def __init__(self, tokens: ConversationTokens, seed: int, source: int = 0) -> None:
        self._tokens = tokens
        self._key = mix64(mix64(np.array([seed % 2**64], np.uint64)) ^ np.uint64(source))
        self._starts: list[int] = [0]  # the first row of each epoch seen so far
        self._packed: tuple[int, int, list[list[int]]] = (-1, -1, [])

    def row(self, index: int, length: int, lookahead: int) -> Row:
        """Row `index` of rows of `length` tokens."""
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        rows = self._epoch(epoch, length)
        while index - self._starts[epoch] >= len(rows):
            if len(self._starts) == epoch + 1:
                self._starts.append(self._starts[epoch] + len(rows))
            epoch += 1
            rows = self._epoch(epoch, length)
        return fill_row(self._tokens, rows[index - self._starts[epoch]], length, lookahead)

    def _epoch(self, epoch: int, length: int) -> list[list[int]]:
        if self._packed[:2] != (epoch, length):
            count = len(self._tokens.parts)
            key = mix64(self._key ^ np.uint64(epoch))
            order = np.argsort(mix64(np.arange(count, dtype=np.uint64) ^ key), kind="stable")
            lengths = [len(part) for part in self._tokens.parts]
            self._packed = (epoch, length, pack_whole(order.tolist(), lengths, length))
        return self._packed[2]


@dataclasses.dataclass(frozen=True)
class ChatCorpus:
    """Tokenised conversations of each source to train on, and held-out ones of all."""

    train: tuple[ConversationTokens, ...]
    held_out: ConversationTokens
    fingerprint: str

    def streams(self, seed: int) -> list[ConversationStream]:
        """The rows of each source."""
        return [ConversationStream(tokens, seed, n) for n, tokens in enumerate(self.train)]

    def held_out_batches(self, data: DataConfig, mtp_depths: int, rows: int) -> list[Batch]:
        """The first `rows` held-out rows in batches, the same in every run of this data."""
        length, lookahead = data.sequence_length, lookahead_of(mtp_depths)
        order = list(range(len(self.held_out.parts)))
        packed = pack_whole(order, [len(part) for part in self.held_out.parts], length)[:rows]
        filled = [fill_row(self.held_out, row, length, lookahead) for row in packed]
        filled += [empty_row(length, lookahead)] * (-len(filled) % data.batch_size)
        cuts = range(0, len(filled), data.batch_size)
        return [make_batch(filled[at : at + data.batch_size], mtp_depths) for at in cuts]


def prepare_conversations(
    data: DataConfig,
    sft: SFTConfig,
    vocab_size: int,
    directory: str | Path,
    *,
    eos_token: int | None = None,
    seed: int = 0,
    progress: Progress = print,
) -> tuple[Tokenizer, ChatCorpus]:
    """The tokenizer and the conversations of a run; writes directory/tokenizer.json.

    A tokenizer in the directory is used again. Raises ValueError for a source that cannot be read,
    a bad row, and a conversation longer than a row (dropped and counted where `bad_rows` says so).
    """
    sources_of.source_names(data.sources)
    found = [_collect(source, data, sft, seed) for source in data.sources]
    tokenizer = _tokenizer(data, found, vocab_size, Path(directory))
    check_end(tokenizer, eos_token)
    train, held_out, dropped = [], [], []
    for number, (source, conversations) in enumerate(zip(data.sources, found, strict=True)):
        moded = in_modes(conversations.train, sft, tokenizer, seed=seed + number)
        examples = [part for c in moded for part in split_at_users(c)]
        train.append(_tokenized(examples, tokenizer, data, sft, dropped))
        held_out += [part for c in conversations.held_out for part in split_at_users(c)]
        dropped += conversations.dropped
        learned = sum(int(np.count_nonzero(weights)) for weights in train[-1].weights)
        split = f"examples of {len(moded)} " if len(examples) != len(moded) else ""
        progress(
            f"{source}: {len(train[-1].parts)} {split}conversations, {learned:,} learned tokens of "
            f"{sum(map(len, train[-1].parts)):,}"
        )
        if not train[-1].parts:
            why = f"; of {len(dropped)} rows dropped the first: {dropped[0]}" if dropped else ""
            raise ValueError(f"data.sources={source!r}: no conversation to train on is left{why}")
        if conversations.untold_calls:
            progress(
                f"note: {source}: {conversations.untold_calls} conversations call tools and have "
                "no `tools`: the model is not shown what it may call"
            )
    kept = _tokenized(held_out, tokenizer, data, sft, dropped)
    if not kept.parts:
        raise ValueError("data.held_out_fraction: no conversation is held out; raise it")
    if dropped:
        progress(f"dropped {len(dropped)} rows, the first: {dropped[0]}")
    return tokenizer, ChatCorpus(tuple(train), kept, _fingerprint(train, kept, tokenizer))


def repetitions(corpus: ChatCorpus, data: DataConfig, steps: int) -> list[str]:
    """How often a run reads the conversations of each source, a line for each."""
    sizes = [sum(map(len, tokens.parts)) for tokens in corpus.train]
    lines = []
    for source, size, times in zip(
        data.sources, sizes, times_read(sizes, data, steps), strict=True
    ):
        advice = ": add conversations, or lower training.steps" if times >= MANY_TIMES else ""
        lines.append(
            f"the run reads the {size:,} tokens of {source} about {times:,.3g} times over{advice}"
        )
    return lines


def in_modes(
    conversations: Sequence[Conversation], sft: SFTConfig, tokenizer: Tokenizer, *, seed: int
) -> list[Conversation]:
    """The conversations, some without their reasoning and some with a budget that cuts it.

    Which ones depends on the seed and a conversation's text alone.
    """
    out = []
    for conversation in conversations:
        number = mix64(np.array([int(conversation.digest()[:16], 16)], np.uint64) ^ np.uint64(seed))
        share, draw = float(number[0] >> np.uint64(32)) / 2**32, int(number[0]) & 0xFFFFFFFF
        if not reasons(conversation):
            out.append(conversation)
        elif share < sft.reasoning_off:
            out.append(without_reasoning(conversation))
        elif share < sft.reasoning_off + sft.truncated_budget:
            out.append(cut_reasoning(conversation, tokenizer, draw))
        else:
            out.append(conversation)
    return out


def cut_reasoning(conversation: Conversation, tokenizer: Tokenizer, draw: int) -> Conversation:
    """The reasoning of every turn cut at one budget, drawn from 1 to the longest one's tokens."""
    ids = {
        place: tokenizer.encode(message["reasoning_content"])
        for place, message in enumerate(conversation.messages)
        if message.get("reasoning_content")
    }
    budget = 1 + draw % max(map(len, ids.values()))
    messages = list(conversation.messages)
    for place, tokens in ids.items():
        text = tokenizer.decode(tokens[:budget]) if len(tokens) > budget else None
        if text is not None:
            messages[place] = {**messages[place], "reasoning_content": text.rstrip("\ufffd")}
    options = dataclasses.replace(conversation.options, reasoning_budget=budget)
    return dataclasses.replace(conversation, messages=tuple(messages), options=options)


def pack_whole(order: Sequence[int], lengths: Sequence[int], length: int) -> list[list[int]]:
    """Rows of at most `length` tokens that hold every document of `order` once, none cut.

    Each goes to the first of the newest OPEN_ROWS rows that has room. A document longer than a row
    raises ValueError.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for document in order:
        if lengths[document] > length:
            raise ValueError(f"pack_whole: {lengths[document]} tokens exceed a row of {length}")
        first = max(0, len(rows) - OPEN_ROWS)
        fits = (n for n in range(first, len(rows)) if room[n] >= lengths[document])
        place = next(fits, None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(document)
        room[place] -= lengths[document]
    return rows


def fill_row(
    tokens: ConversationTokens, documents: Sequence[int], length: int, lookahead: int
) -> Row:
    """A row of whole conversations; nothing of them lies past its end."""
    row = empty_row(length, lookahead)
    weights, at = np.zeros(length + lookahead, np.float32), 0
    for segment, document in enumerate(documents, start=1):
        stop = at + len(tokens.parts[document])
        row.tokens[at:stop] = tokens.parts[document]
        row.segments[at:stop] = segment
        weights[at:stop] = tokens.weights[document]
        at = stop
    return Row(row.tokens, row.segments, weights)


def token_weights(chat: ChatTokens, loss: str) -> Float[np.ndarray, "N"]:
    """Each token's weight, of which a batch's loss is the weighted mean.

    Stage one, `tokens`: 1 for a learned token. Stage two, `conversations`: one over the learned
    tokens of its conversation, so that conversations weigh alike.
    """
    count = int(np.count_nonzero(chat.learned))
    return chat.learned.astype(np.float32) / (1 if loss == "tokens" else max(count, 1))


def _collect(source: str, data: DataConfig, sft: SFTConfig, seed: int) -> Conversations:
    if source.startswith(MESSAGES):
        path = source.removeprefix(MESSAGES)
        return read_messages(path, data.held_out_fraction, sft.bad_rows)
    slip = ""
    if source.startswith(SLIPS):
        environment, level, slip = slip_source(source)
    else:
        environment, level = oracle_source(source)
    made = lambda split, count: tuple(
        oracle_conversations(environment, level, count, split=split, seed=seed, slip=slip)
    )
    return Conversations(made("train", sft.oracle_tasks), made("held_out", HELD_OUT_TASKS))


def _tokenizer(
    data: DataConfig, found: Sequence[Conversations], vocab_size: int, directory: Path
) -> Tokenizer:
    own = RunDirectory(directory).tokenizer
    if own.exists():
        tokenizer = Tokenizer.load(directory)
    elif data.tokenizer not in PATTERNS:
        tokenizer = Tokenizer.load(data.tokenizer)
    else:
        every = [c for part in found for c in part.train]
        texts = [t for c in every for t in ordinary_texts(c.messages, c.tools, c.options)]
        tokenizer = train_tokenizer(texts, vocab_size, pattern=PATTERNS[data.tokenizer])
    check_vocabulary(tokenizer, vocab_size)
    for name in RESERVED:
        tokenizer.token_id(name)  # a tokenizer without the family's names is told here
    if not own.exists():
        tokenizer.save(directory)
    return tokenizer


def _tokenized(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    data: DataConfig,
    sft: SFTConfig,
    dropped: list[str],
) -> ConversationTokens:
    parts, weights = [], []
    for one in conversations:
        chat = encode_chat(tokenizer, one.messages, one.tools, one.options)
        if len(chat.ids) > data.sequence_length:
            line = (
                f"{one.origin}: {len(chat.ids)} tokens exceed "
                f"data.sequence_length={data.sequence_length}"
            )
            if sft.bad_rows == "error":
                raise ValueError(f"{line}; raise it, or set sft.bad_rows='drop'")
            dropped.append(line)
            continue
        parts.append(chat.ids)
        weights.append(token_weights(chat, sft.loss))
    return ConversationTokens(tuple(parts), tuple(weights))


def _fingerprint(
    train: Sequence[ConversationTokens], held_out: ConversationTokens, tokenizer: Tokenizer
) -> str:
    digest = hashlib.sha256(tokenizer.fingerprint().encode())
    for tokens in (*train, held_out):
        digest.update(str(len(tokens.parts)).encode())
        for ids, weights in zip(tokens.parts, tokens.weights, strict=True):
            digest.update(ids.tobytes() + weights.tobytes())
    return digest.hexdigest()
