"""What goes along with a model's weights: chat template, tokenizer settings, ids that end a turn.

A run keeps those of the hub directory that it began with in its own folder, completed where it
learns the chat format, and a model that is saved takes them from there.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.untrusted import read_object, shown
from nemotron_jax.data.chat import jinja_template
from nemotron_jax.data.chat.render import END
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.run_directory import CONFIG, TOKENIZER, RunDirectory

GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
FILES = (
    TOKENIZER,
    SETTINGS,
    GENERATION,
    jinja_template.FILE_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_HINT = "download it again, or name the directory of a hub model"


def copy(source: Path, target: Path) -> None:
    """Those of the companions that `source` has, byte for byte; templates of other uses too."""
    for name in (*FILES, *(file.name for file in source.glob("*_parser.py"))):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    templates = "additional_chat_templates"
    if (source / templates).is_dir():
        shutil.copytree(source / templates, target / templates, dirs_exist_ok=True)


def keep(directory: RunDirectory, model: ModelConfig, init_from: str, *, chats: bool) -> None:
    """Keep the companions of a run that begins, once, in its own folder of them.

    They are those of `init_from`, a hub directory or a run that kept its own. A run that learns how
    one `chats` adds what they lack for it: the family's template, and the id that ends a turn.
    """
    target = directory.companions
    if target.exists():
        return
    source = _source(init_from)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-writing-", dir=directory.path))
    try:
        if source is not None:
            copy(source, staging)
        (staging / TOKENIZER).unlink(missing_ok=True)  # the run has its own
        if chats and directory.tokenizer.is_file():
            _complete(staging, model, Tokenizer.load(directory.path))
        if any(staging.iterdir()):
            staging.chmod(0o755)
            _take_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def stop_tokens(directory: Path, vocab_size: int, default: object = None) -> tuple[int, ...]:
    """The end-of-sequence ids of a directory's generation_config.json; where it names none those of
    `default`, what config.json says."""
    file = directory / GENERATION
    eos = read_object(file, _HINT).get("eos_token_id") if file.is_file() else None
    if eos is None:
        file, eos = directory / CONFIG, default
    tokens = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError(
            f"{file}: eos_token_id={shown(eos)} must be a token id below vocab_size={vocab_size} "
            "or a list of them"
        )
    return tuple(dict.fromkeys(tokens))


def write_generation(directory: Path, config: ModelConfig, stops: tuple[int, ...]) -> None:
    """Make generation_config.json say that `stops` end a text: written anew with ids alone, or
    kept, with those ids that it lacks."""
    file = directory / GENERATION
    if not file.exists():
        ids = {
            "bos_token_id": config.bos_token,
            "eos_token_id": list(stops) or [config.eos_token],
            "pad_token_id": config.pad_token,
        }
        _write(file, ids)
        return
    found = stop_tokens(directory, config.vocab_size)
    if missing := [token for token in stops if token not in found]:
        _write(file, read_object(file, _HINT) | {"eos_token_id": [*found, *missing]})


def _source(init_from: str) -> Path | None:
    """Where the companions of a model lie: in its own directory, or in its run's folder of them."""
    if not init_from:
        return None
    path = Path(init_from)
    kept = RunDirectory.named(path).companions
    return kept if kept.is_dir() else path if path.is_dir() else None


def _take_place(staging: Path, target: Path) -> None:
    try:
        os.rename(staging, target)
    except OSError:
        if not target.is_dir():  # another process of the run was first
            raise


def _complete(directory: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    end = tokenizer.special_tokens.get(END)
    if end is None:
        return  # a tokenizer without the family's turns, of which no chat can be made
    if not _has_template(directory):
        text = jinja_template.chat_template()
        (directory / jinja_template.FILE_NAME).write_text(text, "utf-8")
    if not (directory / SETTINGS).exists():
        named = {"bos_token": config.bos_token, "eos_token": end, "pad_token": config.pad_token}
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        settings = {key: names[number] for key, number in named.items() if number in names}
        settings |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_length,
            "clean_up_tokenization_spaces": False,
        }
        _write(directory / SETTINGS, settings)
    stops = stop_tokens(directory, config.vocab_size) or (config.eos_token,)
    write_generation(directory, config, tuple(dict.fromkeys((*stops, end))))


def _has_template(directory: Path) -> bool:
    if any(
        (directory / name).exists() for name in (jinja_template.FILE_NAME, "chat_template.json")
    ):
        return True
    settings = directory / SETTINGS
    return settings.exists() and bool(read_object(settings, _HINT).get("chat_template"))


def _write(file: Path, keys: dict[str, Any]) -> None:
    file.write_text(json.dumps(keys, indent=2) + "\n", "utf-8")
