"""Every text round-trips, and none reaches a reserved id."""

import json
import os
import random

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from nemotron_jax.data.tokenizer import (
    PHRASE_PATTERN,
    RESERVED_TOKENS,
    WORD_PATTERN,
    Tokenizer,
    check_vocabulary,
    train_tokenizer,
)

FAMILY_IDS = {
    "<s>": 1,
    "</s>": 2,
    "<|im_start|>": 10,
    "<|im_end|>": 11,
    "<think>": 12,
    "</think>": 13,
    "<tool_call>": 14,
    "</tool_call>": 15,
}
TEXTS = [
    "for value in range(120):\n    print(value)  # <think> and </think>\n" * 3,
    "".join(f"<|im_start|>user {n}<|im_end|>\n" for n in range(50)),
    "naïve état 数学 λx → 🙂\n" * 20,
]


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, 330)


@pytest.fixture(scope="module")
def hub():
    """As hubs write them: special tokens that are not flagged so, whole-word look-up, a template
    that adds bos, padding, and a merge that would spell a special token."""
    plain = json.loads(train_tokenizer(TEXTS, 330)._definition)
    model = plain["model"]
    vocabulary, merges = model["vocab"], model["merges"]
    size = max(vocabulary.values()) + 1
    for place, (left, right) in enumerate([("<", "s"), ("<s", ">")]):
        merges.append([left, right])
        if left + right != "<s>":
            vocabulary[left + right] = size + place
    model.update(ignore_merges=True, unk_token="<unk>")
    byte_level = plain["pre_tokenizer"]["pretokenizers"][1]
    plain["pre_tokenizer"] = byte_level  # a whole text is one word, to be looked up
    del vocabulary["<pad>"]
    vocabulary["<unk>"] = 0
    for token in plain["added_tokens"]:
        token["special"] = token["id"] < 3
        token["content"] = "<unk>" if token["id"] == 0 else token["content"]
    built = tokenizers.Tokenizer.from_str(json.dumps(plain))
    built.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    built.enable_padding(length=64)
    assert built.encode("<think>").ids[:3] == [1, 12, 2]  # what `tokenizers` does by itself
    return Tokenizer(built.to_str(), origin="hub")


def test_reserved_ids_are_the_familys(trained, hub):
    for name, number in FAMILY_IDS.items():
        assert trained.token_id(name) == hub.token_id(name) == number
    assert (trained.pad, trained.bos, trained.eos) == (hub.pad, hub.bos, hub.eos) == (0, 1, 2)
    assert trained.token_id("<pad>") == 0 and trained.token_id("<SPECIAL_9>") == 9
    assert sorted(trained.special_tokens.values()) == list(range(16))
    with pytest.raises(ValueError, match="no special token 'think'"):
        trained.token_id("think")


@pytest.mark.parametrize("which", ["trained", "hub"])
def test_no_text_reaches_a_reserved_id_and_every_text_round_trips(which, request):
    tokenizer = request.getfixturevalue(which)
    generator = random.Random(0)
    pieces = [*RESERVED_TOKENS, "<unk>", " ", "\n", "\t", "\r\n", "\x00", "\x7f", "é", "e\u0301"]
    pieces += ["def", "<", ">", "12", "数", "🙂", "\u2028", "\ufeff", "\U0010ffff", "\ufffd", "a'b"]
    texts = [*pieces, "", "".join(RESERVED_TOKENS), " <s>", "<s", "x<|im_end|>y"]
    texts += ["".join(generator.choices(pieces, k=generator.randrange(60))) for _ in range(300)]
    texts += ["".join(chr(generator.randrange(0xD800)) for _ in range(50)) for _ in range(20)]
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ids == tokenizer.encode(text)
        assert all(number >= len(RESERVED_TOKENS) for number in ids), text
        assert tokenizer.decode(ids) == text
        assert sum(tokenizer.byte_lengths[ids]) == len(text.encode())


def test_special_tokens_are_skipped_or_shown(trained):
    ids = [12, *trained.encode("a plan"), 13, *trained.encode("done"), 2]
    assert trained.decode(ids) == "a plandone"
    assert trained.decode(ids, show_special=True) == "<think>a plan</think>done</s>"


def test_a_stream_never_splits_a_character(trained):
    text = "state λ🙂数 end"
    ids = trained.encode(text)
    stream = trained.stream()
    pieces = [stream.push(number) for number in ids] + [stream.finish()]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    smile = [trained._vocabulary[symbol] for symbol in "ðŁĻĤ"]  # the four bytes of 🙂
    assert trained.decode(smile) == "🙂"
    assert trained.decode(smile[:3]) == "\ufffd" == trained.decode([smile[-1]])
    assert trained.decode([*smile[:3], 13, *smile]) == "\ufffd🙂"  # a special token ends it
    assert trained.decode([*smile[:3], 5000, smile[3]]) == "\ufffd" * 3
    assert trained.decode([*smile, 5000, -1]) == "🙂\ufffd\ufffd"  # ids of a padded vocabulary


def test_phrases_span_words_but_no_digit():
    text = "You may call a function. Value 1 or 22 is a number.\n"
    words, phrases = (
        train_tokenizer([text] * 9, 400, pattern=pattern)
        for pattern in (WORD_PATTERN, PHRASE_PATTERN)
    )
    found = phrases.encode(text)
    assert phrases.decode(found) == text
    assert len(found) < 0.6 * len(words.encode(text))
    assert [phrases.decode([i]) for i in found if phrases.decode([i]).isdigit()] == ["1", "2", "2"]


def test_training_is_deterministic_and_learns_pairs(trained):
    again = train_tokenizer(iter(TEXTS), 330)
    assert again.fingerprint() == trained.fingerprint()
    assert trained.vocab_size == 330
    assert train_tokenizer(TEXTS[:2], 330).fingerprint() != trained.fingerprint()
    assert len(trained.encode(TEXTS[0])) < 0.6 * len(TEXTS[0])
    assert len(trained.encode("1234567")) == 7  # each digit stands alone
    assert train_tokenizer(["ab"], 5000).vocab_size < 300  # no more pairs to learn
    with pytest.raises(ValueError, match="vocab_size=271 .* at least 272"):
        train_tokenizer(TEXTS, 271)


def test_save_and_load_keep_everything(trained, hub, tmp_path):
    for number, tokenizer in enumerate((trained, hub)):
        folder = tmp_path / str(number)
        assert tokenizer.save(folder) == folder / "tokenizer.json"
        assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]
        for path in (folder, folder / "tokenizer.json", str(folder)):
            loaded = Tokenizer.load(path)
            assert loaded.fingerprint() == tokenizer.fingerprint()
            assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    # other readers of the format find the special tokens at their ids
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "0" / "tokenizer.json"))
    assert [whole.token_to_id(name) for name in RESERVED_TOKENS] == list(range(16))
    assert whole.encode("<think>").ids == [12]
    assert whole.decode(trained.encode(TEXTS[2])) == TEXTS[2]


def test_the_fingerprint_ignores_indentation_only(trained):
    definition = json.loads(trained._definition)
    compact = Tokenizer(json.dumps(definition), origin="compact")
    assert compact.fingerprint() == trained.fingerprint()
    definition["model"]["merges"].pop()
    assert Tokenizer(json.dumps(definition), origin="x").fingerprint() != trained.fingerprint()


def test_unusable_definitions_are_errors_that_name_the_file(trained, tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json does not exist"):
        Tokenizer.load(tmp_path)
    other = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    unnamed = json.loads(trained._definition)
    unnamed["added_tokens"] = [t for t in unnamed["added_tokens"] if t["id"] != 2]
    characters = tokenizers.Tokenizer(models.BPE())
    characters.pre_tokenizer = pre_tokenizers.Whitespace()
    cases = {
        "cannot be used": trained._definition[: len(trained._definition) // 2],
        "not a BPE on bytes": other.to_str(),
        "BPE and not": characters.to_str(),
        "no special token named </s>": json.dumps(unnamed),
        "cannot": "[]",
    }
    for words, definition in cases.items():
        (tmp_path / "bad.json").write_text(definition)
        with pytest.raises(ValueError, match=words) as error:
            Tokenizer.load(tmp_path / "bad.json")
        assert "bad.json" in str(error.value)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bad.json cannot be read"):
        Tokenizer.load(tmp_path / "bad.json")


def test_a_vocabulary_larger_than_the_models_is_an_error(trained):
    check_vocabulary(trained, 330)
    check_vocabulary(trained, 512)
    with pytest.raises(ValueError, match="330 ids, more than the model's vocab_size=329"):
        check_vocabulary(trained, 329)


def test_half_a_surrogate_pair_is_an_error(trained):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        trained.encode("a\ud83d")
    with pytest.raises(TypeError):
        trained.encode(None)


def test_a_killed_save_leaves_the_old_file(trained, hub, tmp_path, monkeypatch):
    trained.save(tmp_path)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        hub.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert Tokenizer.load(tmp_path).fingerprint() == trained.fingerprint()


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    """Runs of blanks and tags of other families: the library's ids, and their own characters."""
    train_tokenizer(["def f(x):\n        return x\n"] * 9, 300).save(tmp_path)
    file = tmp_path / "tokenizer.json"
    definition = json.loads(file.read_text())
    size = max(definition["model"]["vocab"].values()) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    for number, text in enumerate(("        ", "<tool_response>", "état")):
        definition["added_tokens"].append({"id": size + number, "content": text, **flags})
    file.write_text(json.dumps(definition))
    ours, library = Tokenizer.load(file), tokenizers.Tokenizer.from_file(str(file))
    text = "def f(x):\n        return <tool_response>état<|im_end|>"
    ids = ours.encode(text)
    assert ours.decode(ids) == text and not set(ids) & set(ours.special_tokens.values())
    plain = text.removesuffix("<|im_end|>")
    assert ours.encode(plain) == library.encode(plain, add_special_tokens=False).ids
    assert ours.byte_lengths[size:].tolist() == [8, 15, 5]
