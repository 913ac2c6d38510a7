"""How a continuation is wanted, by the fields that all endpoints share."""

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from nemotron_jax.decoding.wanted import MOST_BIASES, MOST_NEW_TOKENS, MOST_STOP_TOKENS, Wanted
from nemotron_jax.serving.fields import Fields
from nemotron_jax.serving.grammars import Format, format_of
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served

# OpenAI allows 4 stop strings; agents send more. Each is looked for at every token.
MOST_STOPS, LONGEST_STOP = 16, 256
MOST_SAMPLES = 128  # of one prompt
# Fields of vLLM's that change tokens or what is said of them, and that nothing here follows.
_LACKING = ("allowed_token_ids", "bad_words", "include_stop_str_in_output", "logits_processors")
_LACKING += ("prompt_logprobs", "truncate_prompt_tokens", "use_beam_search")


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt, how it is to be continued, and how often."""

    prompt: tuple[int, ...]
    wanted: Wanted
    n: int = 1


def sampling_of(fields: Fields, served: Served, **more: Any) -> dict[str, Any]:
    """Values of `Wanted` but for the number of tokens, which depends on the prompt."""
    check_lacking(fields, _LACKING)
    for name in ("frequency_penalty", "presence_penalty"):
        if fields.number(name, 0.0, -2, 2):
            raise fields.refuse(name, "penalties are not supported; leave it out")
    if fields.number("repetition_penalty", 1.0, 0, 10) != 1:
        raise fields.refuse("repetition_penalty", "penalties are not supported; leave it out")
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    return {
        "temperature": fields.number("temperature", served.temperature, 0, 100),
        "top_p": _top_p(fields, served),
        "top_k": max(fields.integer("top_k", 0, -1, 2**31 - 1), 0),  # -1 is vLLM's word for all
        "min_p": fields.number("min_p", 0.0, 0, 1),
        "min_tokens": fields.integer("min_tokens", 0, 0, served.context),
        "seed": secrets.randbits(32) if seed is None else seed % 2**32,
        "stop_strings": _stops(fields),
        "logit_bias": _bias(fields, served),
        **more,
    }


def check_lacking(fields: Fields, names: Sequence[str]) -> None:
    """Raise Refusal for a wish that would go unheard: the answer would be another one than asked
    for. Values that wish for nothing pass, as clients send them."""
    for name in names:
        if fields.get(name) not in (None, False, "", [], {}):
            raise fields.refuse(name, "is not supported; leave it out")


def wanted_format(
    fields: Fields, served: Served, stops: tuple[int, ...], *, thinking: bool = False
) -> Format | None:
    """What `response_format` holds the text to; it has no room for some other wishes."""
    form = format_of(fields, served.tokenizer, served.vocabulary, stops, thinking=thinking)
    return None if form is None else checked_format(fields, form)


def checked_format(fields: Fields, form: Format) -> Format:
    """The format; Refusal for a wish that cannot be kept beside it."""
    for name in ("min_tokens", "ignore_eos"):
        if fields.get(name):
            raise fields.refuse(name, "cannot be kept together with a format or held calls")
    return form


def samples_of(fields: Fields) -> int:
    """How many continuations of each prompt."""
    n = fields.integer("n", 1, 1, MOST_SAMPLES)
    if fields.integer("best_of", n, 1, MOST_SAMPLES) != n:
        raise fields.refuse("best_of", "is not supported; ask for n samples and choose among them")
    return n


def stop_tokens_of(fields: Fields, served: Served, own: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that end a continuation: the checkpoint's, unless it goes on past them, and the
    request's."""
    own = () if fields.flag("ignore_eos") else own
    given = fields.token_ids("stop_token_ids", served.vocabulary) or ()
    kept = tuple(dict.fromkeys((*own, *given)))
    if len(kept) > MOST_STOP_TOKENS:
        rule = f"must be at most {MOST_STOP_TOKENS - len(own)} tokens"
        raise fields.refuse("stop_token_ids", rule)
    return kept


def job_of(
    fields: Fields, served: Served, prompt: list[int], sampling: dict[str, Any], n: int
) -> Job:
    """The job of a prompt, which fits. `max_tokens` left out is what is left of the context."""
    names = ("max_completion_tokens", "max_tokens")
    name = next((name for name in names if fields.get(name) is not None), "max_tokens")
    left = served.context - len(prompt)
    if left < 1:
        raise Refusal(
            f"{_context(served)}, prompt and answer together, and the prompt alone has "
            f"{len(prompt)}; shorten it",
            "messages" if fields.get("messages") is not None else "prompt",
            code="context_length_exceeded",
        )
    most = fields.integer(name, left, 0, MOST_NEW_TOKENS)
    if most > left:
        raise Refusal(
            f"{name}={most}: {_context(served)}, prompt and answer together, and the prompt has "
            f"{len(prompt)}; ask for at most {left}",
            name,
            code="context_length_exceeded",
        )
    if most == 0 and not fields.flag("echo"):
        raise fields.refuse(name, "must be at least 1")
    try:
        wanted = Wanted(max_new_tokens=max(most, 1), **sampling)
    except ValueError as error:
        raise Refusal(str(error).removeprefix("Wanted."), str(error)[7:].split("=")[0]) from None
    return Job(tuple(prompt), wanted, n)


def apart(job: Job, form: Format | None) -> list[Job]:
    """The job, or one for each sample where each follows a grammar of its own."""
    if form is None:
        return [job]
    seeds = ((job.wanted.seed + number) % 2**32 for number in range(job.n))
    each = lambda seed: dataclasses.replace(job.wanted, seed=seed, grammar=form.grammar())
    return [Job(job.prompt, each(seed)) for seed in seeds]


def encoded(served: Served, text: str, param: str) -> list[int]:
    """A text's ids; refused where it is longer than any that fits."""
    check_size(served, len(text), param)
    return served.tokenizer.encode(text)


def check_size(served: Served, characters: int, param: str) -> None:
    """Raise Refusal for a text that is too long whatever its tokens are."""
    if characters > served.most_bytes:
        raise Refusal(
            f"{param}: {_context(served)}, which {characters} characters exceed; shorten it",
            param,
            code="context_length_exceeded",
        )


def _context(served: Served) -> str:
    """The words by which clients tell that a conversation has grown too long."""
    return f"This model's maximum context length is {served.context} tokens"


def _top_p(fields: Fields, served: Served) -> float:
    top_p = fields.number("top_p", served.top_p, 0, 1)
    if top_p == 0:
        raise fields.refuse("top_p", "must be above 0; temperature 0 is greedy")
    return top_p


def _stops(fields: Fields) -> tuple[str, ...]:
    stops = fields.get("stop")
    stops = [stops] if isinstance(stops, str) else stops or []
    rule = f"must be a string, or at most {MOST_STOPS} of them, of up to {LONGEST_STOP} characters"
    ok = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not ok or not all(isinstance(s, str) and len(s) <= LONGEST_STOP for s in stops):
        raise fields.refuse("stop", rule)
    return tuple(dict.fromkeys(stop for stop in stops if stop))


def _bias(fields: Fields, served: Served) -> dict[int, float]:
    given, bias = fields.part("logit_bias"), {}
    values = given.values()
    if len(values) > MOST_BIASES:
        raise fields.refuse("logit_bias", f"must name at most {MOST_BIASES} tokens")
    for name in values:
        if not (name.isascii() and name.isdigit() and int(name[:12]) < served.vocabulary):
            raise fields.refuse(
                "logit_bias", f"{name[:20]!r} is no token id of the {served.vocabulary}"
            )
        bias[int(name)] = given.number(name, 0.0, -100, 100)
    return bias
