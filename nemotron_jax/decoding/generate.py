"""Text from a model at one call: every prompt continued side by side, in one compiled loop."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nemotron_jax.config.checks import check_value, is_integer
from nemotron_jax.config.engine import MOST_DRAFTS
from nemotron_jax.config.execution import Execution
from nemotron_jax.data.tokenizer import Tokenizer, check_vocabulary
from nemotron_jax.decoding.admission import check_texts
from nemotron_jax.decoding.lockstep import Lockstep
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.sampling import checked_sampling
from nemotron_jax.decoding.speculative import Acceptance
from nemotron_jax.decoding.texts import tokenizer_of
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.model.nemotron import Nemotron


@dataclasses.dataclass(frozen=True)
class Generated:
    """New tokens of each row; what follows a row's stop token is padding."""

    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]  # new tokens of each row, its stop token counted
    logprobs: Float[np.ndarray, "B N"]  # as `logprobs` asked, float32; 0 in padding
    forced: Bool[np.ndarray, "B N"]  # put there by the budget
    acceptance: Acceptance | None = None  # of drafted tokens; None without speculation
    texts: tuple[str, ...] = ()  # new text of each row, where the prompts were texts


def generate(
    model: Nemotron,
    prompt_tokens: Int[Array, "B T"] | Sequence[Sequence[int]] | Sequence[str] | str,
    max_new_tokens: int = 24,
    *,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    min_p: float | Sequence[float] = 0.0,
    stop_tokens: Sequence[int] | int | None = (),
    stop_strings: Sequence[str] | str = (),
    min_tokens: int = 0,
    budget: Budget | None = None,
    logprobs: str = "model",
    speculative: int = 0,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    execution: Execution = Execution(),
) -> Generated:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Prompts are rows of ids, or a text or several, which the tokenizer encodes: the given one, or
    that of the model's own directory. The result's `texts` are then what was written.

    Rows may differ in length and in how they are sampled; each behaves as if it were alone.
    `stop_tokens=None` takes the checkpoint's own end-of-sequence ids, `()` never stops.
    `speculative=k` drafts k tokens at a time with the MTP block and verifies them together: greedy
    tokens stay the same, sampled ones keep their distribution. The other values are those of
    `Wanted`. For many calls pass `for_decoding(model)`, which is made here otherwise. Raises
    ValueError for an empty prompt, a token outside the vocabulary, drafts without an MTP block, or
    values of the wrong kind or out of range.
    """
    texts = _texts_of(prompt_tokens)
    if texts:
        tokenizer = tokenizer or tokenizer_of(model, "generate")
        check_vocabulary(tokenizer, model.config.vocab_size)
        prompt_tokens = tokenizer.encode_batch(texts)
    rows = _checked_rows(model, prompt_tokens)
    _check_drafts(speculative)
    wanted = Wanted(
        max_new_tokens,
        seed=seed,
        stop_tokens=default_stop_tokens(model) if stop_tokens is None else stop_tokens,
        stop_strings=stop_strings,
        min_tokens=min_tokens,
        budget=budget,
        logprobs=logprobs,
    )
    wanted.check_vocabulary(model.config.vocab_size)
    ways = _ways_of_rows(len(rows), (temperature, top_k, top_p, min_p))
    lockstep = Lockstep(model, execution, tokenizer, speculative=int(speculative))
    requests = [
        Request(tuple(row), dataclasses.replace(wanted, **way), branch, lockstep.step)
        for branch, (row, way) in enumerate(zip(rows, ways, strict=True))
    ]
    check_texts(wanted, tokenizer)
    lockstep.enter(requests)
    lockstep.run()
    found = _result(requests, model.config.pad_token, lockstep.stats().acceptance)
    if not texts:
        return found
    written = tuple(tokenizer.decode(request.tokens) for request in requests)
    return dataclasses.replace(found, texts=written)


def default_stop_tokens(model: Nemotron) -> tuple[int, ...]:
    """The end-of-sequence ids of the checkpoint's generation_config, or else the config's."""
    if model.origin is not None and model.origin.stop_tokens:
        return model.origin.stop_tokens
    return (model.config.eos_token,)


def _result(requests: Sequence[Request], pad: int, acceptance: Acceptance | None) -> Generated:
    width = requests[0].wanted.max_new_tokens
    shape = (len(requests), width)
    found = Generated(
        tokens=np.full(shape, pad, np.int32),
        lengths=np.array([len(request.tokens) for request in requests], np.int32),
        logprobs=np.zeros(shape, np.float32),
        forced=np.zeros(shape, bool),
        acceptance=acceptance,
    )
    for row, request in enumerate(requests):
        count = len(request.tokens)
        found.tokens[row, :count], found.logprobs[row, :count] = request.tokens, request.logprobs
        found.forced[row, :count] = request.forced
    return found


def _texts_of(prompts: Sequence) -> list[str]:
    """Prompts that are texts, as a list; nothing where they are tokens."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list | tuple) or not any(isinstance(one, str) for one in prompts):
        return []
    for number, one in enumerate(prompts):
        if not isinstance(one, str):
            raise ValueError(
                f"generate: prompt {number} is {one!r} beside texts; give texts alone, or rows of "
                "tokens alone"
            )
    return list(prompts)


def _checked_rows(model: Nemotron, prompt_tokens: Sequence) -> list[list[int]]:
    if not np.iterable(prompt_tokens):
        raise ValueError(
            f"generate: prompt_tokens={prompt_tokens!r} must be rows of tokens, as in [[1, 17]]"
        )
    rows = [np.asarray(row).tolist() for row in prompt_tokens]
    vocabulary = model.config.vocab_size
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise ValueError(
                f"generate: prompt {number} is {row!r}; each prompt is a row of integer tokens, as "
                "in [[1, 17]]"
            )
    if not rows or not all(rows):
        raise ValueError(
            "generate: every prompt needs at least one token; begin with the bos token"
        )
    for number, row in enumerate(rows):
        outside = [token for token in row if not 0 <= token < vocabulary]
        if outside:
            raise ValueError(
                f"generate: prompt {number} holds token {outside[0]}, outside the model's "
                f"vocabulary of {vocabulary}; was it encoded with this model's tokenizer?"
            )
    return rows


def _check_drafts(speculative: int) -> None:
    ok = is_integer(speculative) and 0 <= speculative <= MOST_DRAFTS
    rule = f"must be an integer from 0 to {MOST_DRAFTS}; it is the number of tokens drafted a time"
    check_value("generate", "speculative", speculative, ok, rule)


def _ways_of_rows(rows: int, values: tuple) -> list[dict[str, float]]:
    """How each row is sampled, of values that are one for all rows or one a row."""
    names = ("temperature", "top_k", "top_p", "min_p")
    arrays = dict(zip(names, checked_sampling(*values), strict=True))
    for name, array in arrays.items():
        if array.ndim > 1 or array.size not in (1, rows):
            raise ValueError(
                f"generate: {name} has {array.size} values for {rows} prompts; give one, or one "
                "for each"
            )
        arrays[name] = np.broadcast_to(array, rows).tolist()
    return [{name: of_rows[row] for name, of_rows in arrays.items()} for row in range(rows)]
