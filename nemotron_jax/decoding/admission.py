"""What an engine takes: sizes that fit something, and requests that will be served one day."""

from nemotron_jax.config.checks import is_integer
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.scheduler import Scheduler
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.model.nemotron import Nemotron


class QueueFull(RuntimeError):
    """As many requests wait as the engine was told to let; step it, or try again later."""


class Standstill(RuntimeError):
    """Requests wait, nothing runs, and none can start: the engine's books are wrong."""


def check_drafts(owner: str, model: Nemotron, speculative: int) -> None:
    """Raise ValueError for drafts of a model without an MTP block."""
    if speculative and model.mtp_block is None:
        raise ValueError(
            f"{owner}: speculative={speculative} needs an MTP block to draft with, and this model "
            "has none; use 0"
        )


def check_samples(wanted: Wanted, n: int) -> None:
    """Raise ValueError for a number of samples that there cannot be."""
    if not is_integer(n) or n < 1:
        raise ValueError(f"submit: n={n!r} must be an integer of at least 1")
    if wanted.grammar is not None and n > 1:
        raise ValueError(
            f"submit: n={n} samples cannot share a grammar, which follows one text; submit each "
            "with a grammar of its own"
        )


def check_fits(
    prompt: tuple[int, ...], wanted: Wanted, scheduler: Scheduler, max_length: int
) -> None:
    """Raise ValueError for what would not fit even alone."""
    total = len(prompt) + wanted.max_new_tokens
    need = f"{len(prompt)} prompt tokens and max_new_tokens={wanted.max_new_tokens}"
    if total > max_length:
        raise ValueError(
            f"Engine.submit: {need} exceed max_length={max_length}; ask for fewer, or "
            "make the engine with a larger max_length"
        )
    if scheduler.pages_for(total) > scheduler.pages.count:
        raise ValueError(
            f"Engine.submit: {need} need {scheduler.pages_for(total)} pages, and the engine "
            f"has {scheduler.pages.count}; ask for fewer, or make the engine with more pages"
        )


def check_texts(wanted: Wanted, tokenizer: Tokenizer | None) -> None:
    """Raise ValueError for stop strings where nobody knows the tokens' texts."""
    if wanted.stop_strings and tokenizer is None:
        raise ValueError(
            "submit: stop_strings need the tokens' texts; make the engine with a tokenizer"
        )


def check_queue(n: int, waiting: int, most: int) -> None:
    """Raise ValueError where n requests never find room in the queue, QueueFull where not now."""
    if n > most:
        raise ValueError(
            f"Engine.submit: n={n} samples never wait together where max_waiting={most}; ask for "
            "fewer at a time, or make the engine with a larger max_waiting"
        )
    if waiting + n > most:
        raise QueueFull(
            f"Engine.submit: {waiting} requests wait and {n} more would exceed "
            f"max_waiting={most}; step the engine, or try again later"
        )


def check_moves(scheduler: Scheduler) -> None:
    """Raise Standstill where requests wait and nothing runs, after all that can start has."""
    if not scheduler.waiting or any(scheduler.running()):
        return
    job, pages = scheduler.waiting[0], scheduler.pages
    raise Standstill(
        f"Engine.step: nothing runs and {job.request!r} cannot start: it needs "
        f"{scheduler.pages_of(job)} pages, and {pages.free} of {pages.count} are free; step again "
        "to begin with all of them, or cancel it"
    )
