"""Byte-level BPE with the family's reserved ids, which no text can encode to."""

import codecs
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, pre_tokenizers, trainers

from nemotron_jax.files import atomic_writer
from nemotron_jax.run_directory import TOKENIZER, RunDirectory

RESERVED_IDS = 16
NAMED_IDS = {
    0: "<pad>",
    1: "<s>",
    2: "</s>",
    10: "<|im_start|>",
    11: "<|im_end|>",
    12: "<think>",
    13: "</think>",
    14: "<tool_call>",
    15: "</tool_call>",
}
RESERVED_TOKENS = tuple(NAMED_IDS.get(i, f"<SPECIAL_{i}>") for i in range(RESERVED_IDS))

# A word takes one leading blank or sign with it; digits stand alone, so that numbers are spelled
# alike wherever they occur; a line end takes the blanks before it, indentation stays apart.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Tokens may span words and lines: a chat template's fixed text takes a third of the tokens.
PHRASE_PATTERN = r"\p{N}|[^\p{N}]+"

# What a document ends with, starts with and is padded with, by the names that hubs give them.
END_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>")
START_NAMES = ("<s>", "<|begin_of_text|>", "<|endoftext|>")
PAD_NAMES = ("<pad>", "<unk>", "<|endoftext|>", "<|end_of_text|>")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, pattern: str = WORD_PATTERN
) -> "Tokenizer":
    """A byte-level BPE of at most `vocab_size` ids learned from the texts.

    Ids 0..15 are RESERVED_TOKENS, the next 256 the bytes; fewer than `vocab_size` ids come out
    when the texts hold too few pairs. The same texts give the same tokenizer. No token reaches
    over the pieces that `pattern`, a regular expression, cuts a text into.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < RESERVED_IDS + len(alphabet):
        raise ValueError(
            f"train_tokenizer: vocab_size={vocab_size} is below the {RESERVED_IDS} reserved ids "
            f"and {len(alphabet)} bytes; use at least {RESERVED_IDS + len(alphabet)}"
        )
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(RESERVED_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    return Tokenizer(learned.to_str(pretty=True), origin="the trained tokenizer")


def fewest_tokens(text: str, pattern: str) -> int:
    """How many tokens a text has at least, whatever a tokenizer of that pattern has learned."""
    cutter = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    return len(cutter.pre_tokenize_str(text)) if text else 0


def check_vocabulary(tokenizer: "Tokenizer", vocab_size: int) -> None:
    """Raise ValueError when the tokenizer has ids that the model's embedding lacks."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.origin} has {tokenizer.vocab_size} ids, more than the model's "
            f"vocab_size={vocab_size}; raise the model's vocab_size or use another tokenizer"
        )


def check_end(tokenizer: "Tokenizer", eos_token: int | None) -> None:
    """Raise ValueError when documents would end with another token than the model's."""
    if eos_token is not None and tokenizer.eos != eos_token:
        raise ValueError(
            f"tokenizer {tokenizer.origin} ends a document with id {tokenizer.eos}, and the model "
            f"with eos_token={eos_token}; set model.eos_token={tokenizer.eos}, or use the "
            "tokenizer that belongs to the model"
        )


class Tokenizer:
    """Text to ids and back; a thin, immutable face of one `tokenizer.json`.

    `encode` knows ordinary tokens only: a text that spells `<think>` becomes the tokens of those
    seven characters. Special ids come from `token_id` alone. `eos`, `bos` and `pad` are the ids
    that end a document, start one and fill a row; `special_tokens` maps each added token's name
    to its id. `decode(encode(text)) == text`, unless the definition normalises text.
    """

    def __init__(self, definition: str, *, origin: str) -> None:
        """Takes the text of a tokenizer.json; `origin` names it in errors.

        Raises ValueError when the text is no byte-level BPE in the format of `tokenizers`.
        """
        self.origin = origin
        self._definition = definition
        try:
            parsed = json.loads(definition)
            whole = tokenizers.Tokenizer.from_str(definition)
            self._vocabulary: dict[str, int] = whole.get_vocab(with_added_tokens=True)
            added = parsed["added_tokens"]
            self.special_tokens = {t["content"]: t["id"] for t in added if _is_special(t)}
            self._texts = {t["id"]: t["content"] for t in added if not _is_special(t)}
            _check_byte_level(parsed)
            ordinary = json.dumps(_without_special_tokens(parsed))
            self._encoder = tokenizers.Tokenizer.from_str(ordinary)
        except Exception as error:  # `tokenizers` raises bare Exception on a bad definition
            raise ValueError(
                f"tokenizer {origin} cannot be used: {error}; give a byte-level BPE "
                "tokenizer.json, or set data.tokenizer='train'"
            ) from error
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eos = self._first_of(END_NAMES)
        self.bos = self._first_of(START_NAMES)
        self.pad = self._first_of(PAD_NAMES)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a tokenizer.json, or of the one in a directory."""
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER
        try:
            definition = file.read_text("utf-8")
        except FileNotFoundError:
            raise ValueError(
                f"tokenizer {file} does not exist; name a tokenizer.json or its directory"
                f"{_copy_of(file)}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"tokenizer {file} cannot be read ({error}); name a tokenizer.json{_copy_of(file)}"
            ) from error
        try:
            return cls(definition, origin=str(file))
        except ValueError as error:
            raise ValueError(f"{error}{_copy_of(file)}") from None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes tokenizer.json, into a directory or to a .json path; whole or not at all."""
        file = Path(path)
        if file.suffix != ".json":
            file = file / TOKENIZER
        with atomic_writer(file) as out:
            out.write(self._definition.encode())
        return file

    def fingerprint(self) -> str:
        """SHA-256 of the definition, whatever its indentation."""
        canonical = json.dumps(json.loads(self._definition), separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_id(self, name: str) -> int:
        """The id of a special token such as `<think>`; ValueError for any other name."""
        if name not in self.special_tokens:
            raise ValueError(
                f"tokenizer {self.origin} has no special token {name!r}; "
                f"it has {sorted(self.special_tokens, key=self.special_tokens.__getitem__)}"
            )
        return self.special_tokens[name]

    def encode(self, text: str) -> list[int]:
        """The ordinary ids of a text, without bos or eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:
            if not all(isinstance(text, str) for text in texts):
                raise
            raise ValueError(
                "Tokenizer.encode: the text holds half of a surrogate pair, which is no "
                "character; repair it, e.g. with text.encode('utf-8', 'replace').decode()"
            ) from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsInt], *, show_special: bool = False) -> str:
        """The text of the ids; bytes that are no UTF-8, and unknown ids, read as U+FFFD.

        Special tokens are left out, or shown under their names.
        """
        stream = self.stream(show_special=show_special)
        return "".join(map(stream.push, ids)) + stream.finish()

    def stream(self, *, show_special: bool = False) -> "TextStream":
        """A decoder that takes one id at a time and never splits a character."""
        return TextStream(self, show_special=show_special)

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes | None, ...]:
        """The bytes of each ordinary id; None for special ids and for gaps between ids."""
        special = set(self.special_tokens.values())
        table: list[bytes | None] = [None] * self.vocab_size
        for piece, number in self._vocabulary.items():
            if number not in special:
                text = self._texts.get(number)  # an added token stands for its very characters
                table[number] = _bytes_of(piece) if text is None else text.encode()
        return tuple(table)

    @functools.cached_property
    def byte_lengths(self) -> Int[np.ndarray, "V"]:
        """How many bytes of text each id stands for; 0 for special ids."""
        return np.array([len(piece or b"") for piece in self.token_bytes], np.int32)

    @functools.cached_property
    def special_names(self) -> dict[int, str]:
        """The text of each special token by its id."""
        return {number: name for name, number in self.special_tokens.items()}

    def _first_of(self, names: tuple[str, ...]) -> int:
        for name in names:
            if name in self.special_tokens:
                return self.special_tokens[name]
        raise ValueError(
            f"tokenizer {self.origin} cannot be used: it has no special token named "
            f"{' or '.join(names)}; add one to added_tokens"
        )


class TextStream:
    """Text of ids that arrive one at a time: bytes of an unfinished character wait for the rest."""

    def __init__(self, tokenizer: Tokenizer, *, show_special: bool) -> None:
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: SupportsInt) -> str:
        """The text that became certain with this id; possibly empty."""
        token = int(token)
        name = self._tokenizer.special_names.get(token)
        if name is not None:
            return self.finish() + (name if self._show_special else "")
        known = 0 <= token < self._tokenizer.vocab_size
        piece = self._tokenizer.token_bytes[token] if known else None
        return self.finish() + "\ufffd" if piece is None else self._bytes.decode(piece)

    def finish(self) -> str:
        """What is still unfinished, as U+FFFD; the stream then starts afresh."""
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        return rest


def _check_byte_level(parsed: dict[str, Any]) -> None:
    kind = parsed["model"].get("type", "BPE")
    if kind != "BPE" or "ByteLevel" not in json.dumps(parsed["pre_tokenizer"]):
        raise ValueError(f"its model is {kind} and not a BPE on bytes")


def _copy_of(file: Path) -> str:
    """Where a run keeps a copy of its damaged or lost tokenizer; empty outside a run."""
    run = RunDirectory(file.parent)
    copies = [copy for step in run.steps() if (copy := run.checkpoint(step) / TOKENIZER).exists()]
    return f"; the run keeps a copy in {copies[-1]}" if copies else ""


def _is_special(token: dict[str, Any]) -> bool:
    """Whether an added token is no text: said to be special, or one that the family reserves."""
    return token.get("special", False) or token["content"] in RESERVED_TOKENS


def _without_special_tokens(parsed: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer file without special tokens, which `tokenizers` would find in any text.

    They leave the vocabulary too, with the merges that touch them: models with ignore_merges look
    whole words up there. Added tokens that are text stay, and are named in the vocabulary for their
    ids to hold. Padding and truncation would add or lose tokens.
    """
    special = {token["id"] for token in parsed["added_tokens"] if _is_special(token)}
    texts = [token for token in parsed["added_tokens"] if not _is_special(token)]
    vocabulary = parsed["model"]["vocab"]
    gone = {piece for piece, number in vocabulary.items() if number in special}

    def stays(merge: str | list[str]) -> bool:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        return not gone.intersection((left, right, left + right))

    model = parsed["model"] | {
        "vocab": {piece: number for piece, number in vocabulary.items() if piece not in gone}
        | {token["content"]: token["id"] for token in texts},
        "merges": [merge for merge in parsed["model"]["merges"] if stays(merge)],
    }
    return parsed | {
        "model": model,
        "added_tokens": texts,
        "padding": None,
        "truncation": None,
    }


@functools.cache
def _byte_of_symbol() -> dict[str, int]:
    """Byte-level BPE writes each byte as one visible character: printable Latin-1 bytes as
    themselves, the rest as U+0100 onwards. Source: GPT-2, Radford et al. 2019, released encoder."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    symbols = {chr(byte): byte for byte in shown}
    return symbols | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def _bytes_of(piece: str) -> bytes:
    symbols = _byte_of_symbol()
    if all(character in symbols for character in piece):
        return bytes(symbols[character] for character in piece)
    return piece.encode()  # a vocabulary entry that is no sequence of bytes, spelled out
