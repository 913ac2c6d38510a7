"""Conversations as token ids, and which of them the model learns to write."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from nemotron_jax.data.chat.render import (
    ANSWER,
    CALL,
    CALL_END,
    DEFAULT,
    END,
    THINK,
    TURN,
    ChatOptions,
    Message,
    Piece,
    pieces,
)
from nemotron_jax.data.tokenizer import Tokenizer, fewest_tokens

RESERVED = (TURN, END, THINK, ANSWER, CALL, CALL_END)
_RESERVED = re.compile("(" + "|".join(map(re.escape, RESERVED)) + ")")


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """A conversation's ids, and for each whether it is a word of a turn that is learned."""

    ids: Int[np.ndarray, "N"]
    learned: Bool[np.ndarray, "N"]


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
    *,
    learned_turns: Sequence[int] | None = None,
) -> ChatTokens:
    """The ids of a whole conversation for training.

    `learned_turns` are indices of assistant messages; None means every one whose message has no
    `"weight": 0`. Learned is what the model writes itself: after a generation prompt, which holds
    the turn's `<think>` (with reasoning) or `<think></think>` (without), up to and with
    `<|im_end|>`. The prompt's and the turn's ids are made apart, as they are when it generates.
    """
    if learned_turns is None:
        learned_turns = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight", 1) != 0
        ]
    ids: list[int] = []
    learned: list[bool] = []
    for own, run in _runs(pieces(messages, tools, options), frozenset(learned_turns)):
        part = encode_pieces(tokenizer, run)
        ids += part
        learned += [own] * len(part)
    return ChatTokens(np.array(ids, np.int32), np.array(learned, bool))


def encode_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
) -> list[int]:
    """The ids that a model goes on from: the conversation and the opening of its next turn.

    Past turns are encoded as `encode_chat` does, so a prompt is a prefix of the conversation.
    """
    every = frozenset(index for index, m in enumerate(messages) if m["role"] == "assistant")
    runs = _runs(pieces(messages, tools, options, generation_prompt=True), every)
    return [token for _, run in runs for token in encode_pieces(tokenizer, run)]


def prompt_length(
    tokenizer: Tokenizer | str,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
) -> int:
    """The ids of a prompt, or how many they are at least where the tokenizer is yet to be trained.

    Of such a one the pattern is given in its place.
    """
    if isinstance(tokenizer, Tokenizer):
        return len(encode_prompt(tokenizer, messages, tools, options))
    parts = _parts(pieces(messages, tools, options, generation_prompt=True))
    return sum(1 if reserved else fewest_tokens(text, tokenizer) for text, reserved in parts)


def encode_pieces(tokenizer: Tokenizer, run: Sequence[Piece]) -> list[int]:
    """The ids of adjoining pieces: reserved ids where the template wrote their names, else none.

    Text between two reserved tokens is encoded as one, wherever its pieces meet.
    """
    parts = _parts(run)
    texts = iter(tokenizer.encode_batch([text for text, reserved in parts if not reserved]))
    ids = ([tokenizer.token_id(t)] if reserved else next(texts) for t, reserved in parts)
    return [token for part in ids for token in part]


def ordinary_texts(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: ChatOptions = DEFAULT,
) -> list[str]:
    """The texts of a conversation that are encoded one by one, for a tokenizer to learn from."""
    every = frozenset(index for index, m in enumerate(messages) if m["role"] == "assistant")
    runs = _runs(pieces(messages, tools, options), every)
    parts = [part for _, run in runs for part in _parts(run)]
    return [text for text, reserved in parts if text and not reserved]


def _parts(run: Sequence[Piece]) -> list[tuple[str, bool]]:
    """Adjoining pieces as texts, each with whether it is a reserved token's name."""
    parts = [("", False)]
    for piece in run:
        for text in _RESERVED.split(piece.text) if piece.markup else (piece.text,):
            if piece.markup and text in RESERVED:
                parts += [(text, True), ("", False)]
            else:
                parts[-1] = parts[-1][0] + text, False
    return parts


def _runs(whole: Sequence[Piece], turns: frozenset[int]) -> list[tuple[bool, list[Piece]]]:
    """The pieces cut where the model's words begin and end, with whether they are learned.

    Turns that are not learned are cut too: which turns are learned changes no id.
    """
    runs: list[tuple[int | None, list[Piece]]] = []
    for piece in whole:
        if not runs or runs[-1][0] != piece.turn:
            runs.append((piece.turn, []))
        runs[-1][1].append(piece)
    return [(turn in turns, run) for turn, run in runs]
