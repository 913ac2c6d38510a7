"""Store a model's matrices as codes: python -m nemotron_jax.quantize --checkpoint=DIR --output=DIR.

The checkpoint is a run's directory or a model's in the hub's layout; the output is a directory in
the layout of Model-Optimizer, with quantize.json beside it: the loss on text before and after. The
text is --calibration's, else a run's own held-out text, else the Python library's source; other
rows of it give the scales of activations.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from nemotron_jax import command_line, host
from nemotron_jax.config.checks import check_value, local_path
from nemotron_jax.data.corpus import prepare, tokenize
from nemotron_jax.data.packing import DocumentTokens, make_batch, pack_once
from nemotron_jax.data.sources import FILES_PREFIX, PYTHON_STDLIB, collect
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.evaluation.calibration import largest_inputs
from nemotron_jax.evaluation.held_out import token_nats
from nemotron_jax.evaluation.statistics import value_over
from nemotron_jax.files import atomic_writer
from nemotron_jax.interop.hf_encode import Quantization
from nemotron_jax.interop.hf_presets import RECIPES
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.pretrained import load_pretrained, save_pretrained
from nemotron_jax.quant.calibrate import METHODS
from nemotron_jax.run_directory import TOKENIZER, RunDirectory
from nemotron_jax.types import Batch

FILE = "quantize.json"
# Rows are scored a few at a time: memory is a batch's, and all batches are one program.
_ROWS_A_BATCH = 4
_MOST_LENGTH = 512  # tokens of a row
_FEWEST_TOKENS = 16  # of all text: four rows that predict something
_BYTES_A_TOKEN = 8  # of text, more than any tokenizer's: so much is read of a long one


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows that the loss is measured on, and others that scales of activations come from."""

    tokenizer: Tokenizer
    measured: list[Batch]
    calibrating: list[Batch]


def main(arguments: Sequence[str] | None = None) -> int:
    """Quantise as the arguments say; the exit status."""
    flags = _Parser().parse_args(arguments)
    host.keep_compiled_programs()
    try:
        quantize(
            command_line.path_of("checkpoint", flags.checkpoint),
            command_line.writable("output", flags.output),
            flags.recipe,
            flags.method,
            calibration=flags.calibration,
            rows=flags.rows,
        )
    except (ValueError, OSError) as error:
        return _told(str(error), 2)
    return 0


def quantize(
    checkpoint: Path,
    output: Path,
    recipe: str,
    method: str = "max",
    *,
    calibration: str | None = None,
    rows: int = 16,
) -> dict[str, Any]:
    """Write the quantised directory and its quantize.json, which it returns.

    `interval` is the 95 % interval of the loss after less the loss before, on the same rows. A
    checkpoint without a tokenizer has neither losses nor scales of activations. Raises ValueError
    for a wrong value, for text that is too short, and as loading and saving do.
    """
    check_value("quantize", "rows", rows, rows >= 2, "must be at least 2")
    how = Quantization(recipe, method)
    if output.resolve() == checkpoint.resolve():
        raise ValueError(f"--output={output}: is the checkpoint itself; name another directory")
    text = _text(checkpoint, calibration, rows)
    model = load_pretrained(checkpoint)
    if text is not None:
        check_vocabulary(text.tokenizer, model.config.vocab_size)
    before = None if text is None else _nats(model, text.measured)
    if text is not None:
        how = dataclasses.replace(how, inputs=largest_inputs(model, text.calibrating))
    counts = save_pretrained(model, output, quantization=how)
    del model
    report = {
        "format": "nemotron_jax.quantize",
        "format_version": 1,
        "recipe": recipe,
        "method": method,
        "modules": counts,
    }
    if before is None:
        report |= {"loss_before": None, "loss_after": None, "interval": None, "n_tokens": 0}
    else:
        report |= _compared(before, _nats(load_pretrained(output), text.measured))
    with atomic_writer(output / FILE) as out:
        out.write((json.dumps(report, indent=2) + "\n").encode())
    print(_line(report))
    return report


def _text(checkpoint: Path, calibration: str | None, rows: int) -> Text | None:
    """The text in rows; None without a tokenizer, which a named text needs."""
    run = RunDirectory.of_model(checkpoint, "--checkpoint")
    directory = checkpoint if run is None else run.path
    if not (directory / TOKENIZER).exists():
        if calibration is not None:
            raise ValueError(
                f"--calibration={calibration}: {directory} has no {TOKENIZER} to read it with"
            )
        return None
    tokenizer = Tokenizer.load(directory)
    if run is not None and calibration is None:
        documents = _held_out(run)
    else:
        documents = _read(calibration, tokenizer, 2 * rows * _MOST_LENGTH)
    count = len(documents.tokens)
    if count < _FEWEST_TOKENS:
        raise ValueError(
            f"--calibration={calibration}: its text has {count} tokens; give at least "
            f"{_FEWEST_TOKENS}"
        )
    length = min(_MOST_LENGTH, count // 4)
    packed = pack_once(documents, length, 1, min(2 * rows, count // length))
    return Text(tokenizer, _batches(packed[::2]), _batches(packed[1::2]))


def _held_out(run: RunDirectory) -> DocumentTokens:
    config = run.read()
    quiet, eos = (lambda line: None), config.model.eos_token
    vocabulary = config.model.vocab_size
    return prepare(config.data, vocabulary, run.path, eos_token=eos, progress=quiet)[1].held_out


def _read(calibration: str | None, tokenizer: Tokenizer, tokens: int) -> DocumentTokens:
    """The first documents of a file, or of the Python library, that spell about so many tokens."""
    if calibration is not None:
        local_path("", "calibration", calibration)
    source = PYTHON_STDLIB if calibration is None else FILES_PREFIX + calibration
    chosen, size = [], 0
    for document in collect(source).documents:
        chosen.append(document)
        size += len(document.text)
        if size > tokens * _BYTES_A_TOKEN:
            break
    return tokenize(chosen, tokenizer)


def _batches(rows: list) -> list[Batch]:
    """Full batches where there are so many rows, and the rest as one."""
    cut = range(0, len(rows), _ROWS_A_BATCH)
    return [make_batch(rows[start : start + _ROWS_A_BATCH], 0) for start in cut]


def _nats(model: Nemotron, batches: list[Batch]) -> list[np.ndarray]:
    """Each row's cross entropies of its scored tokens."""
    found = []
    for batch in batches:
        nats = token_nats(model, batch).astype(np.float64)
        found += [row[scored > 0] for row, scored in zip(nats, batch.weights[..., 0])]
    return found


def _compared(before: list[np.ndarray], after: list[np.ndarray]) -> dict[str, Any]:
    first, last = np.concatenate(before), np.concatenate(after)
    rows = enumerate(zip(before, after, strict=True))
    gains = {str(n): (float((b - a).sum()), float(len(a))) for n, (a, b) in rows if len(a)}
    return {
        "loss_before": float(first.mean()),
        "loss_after": float(last.mean()),
        "interval": list(value_over(gains).interval),
        "n_tokens": len(first),
        "rows": len(before),
    }


def _line(report: dict[str, Any]) -> str:
    stored = ", ".join(f"{count} matrices {kind}" for kind, count in report["modules"].items())
    if report["loss_before"] is None:
        return f"{stored}; no tokenizer, so no loss was measured and no activation's scale"
    low, high = report["interval"]
    return (
        f"{stored}; loss {report['loss_before']:.4f} before, {report['loss_after']:.4f} after: "
        f"{low:+.4f} to {high:+.4f} (95 %, {report['n_tokens']} tokens of {report['rows']} rows)"
    )


def _told(reason: str, status: int) -> int:
    print(f"quantize: {' '.join(reason.split())}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """The flags; a wrong one is one line."""

    def __init__(self) -> None:
        super().__init__(prog="python -m nemotron_jax.quantize", description=__doc__)
        add = self.add_argument
        add("--checkpoint", required=True, help="a run's or a hub model's directory")
        add("--output", required=True, help="the directory to be written")
        add("--recipe", default="released", choices=RECIPES, help="which matrices become codes")
        add("--method", default="max", choices=METHODS, help="how NVFP4's scales are chosen")
        add("--calibration", default=None, help="a text file (.txt, .md, .py, .jsonl, .parquet)")
        add("--rows", type=int, default=16, help="rows to measure on, and as many to calibrate on")

    def error(self, message: str) -> NoReturn:
        """One line, status 2."""
        sys.exit(_told(f"{message}; --help lists the flags", 2))


if __name__ == "__main__":
    sys.exit(main())
