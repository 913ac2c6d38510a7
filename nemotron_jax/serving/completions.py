"""/v1/completions: the text that follows a text or ids, with the prompt's own scores if asked."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from nemotron_jax.decoding.wanted import MOST_TOP
from nemotron_jax.serving.answers import Answer, usage_of
from nemotron_jax.serving.driver import Piece, Stream
from nemotron_jax.serving.fields import Fields, is_token_ids
from nemotron_jax.serving.formats import formatted
from nemotron_jax.serving.refusal import Refusal
from nemotron_jax.serving.served import Served
from nemotron_jax.serving.texts import VisibleText, finite, token_text
from nemotron_jax.serving.wishes import (
    Job,
    apart,
    encoded,
    job_of,
    samples_of,
    sampling_of,
    stop_tokens_of,
    wanted_format,
)

MOST_PROMPTS = 1024  # of one body; each takes a place in the queue


@dataclasses.dataclass(frozen=True)
class CompletionRequest:
    """What a client wants of a text."""

    jobs: Sequence[Job]
    echo: bool
    logprobs: bool
    silent: bool  # no new token is wanted: the prompt's scores are the answer


@formatted
def read_completion(fields: Fields, served: Served) -> CompletionRequest:
    """The request of a body; Refusal names the field that is wrong."""
    if fields.get("suffix"):
        raise fields.refuse("suffix", "is not supported; leave it out")
    prompts, n, echo = _prompts(fields, served), samples_of(fields), fields.flag("echo")
    top = fields.get("logprobs")
    top = int(top) if isinstance(top, bool) else fields.integer("logprobs", None, 0, MOST_TOP)
    stops = stop_tokens_of(fields, served, served.stop_tokens)
    form = wanted_format(fields, served, stops)
    sampling = sampling_of(
        fields,
        served,
        stop_tokens=stops,
        top_logprobs=top or 0,
        prompt_logprobs=echo and top is not None,
    )
    name = "max_tokens" if fields.get("max_completion_tokens") is None else "max_completion_tokens"
    jobs = [job_of(fields, served, ids, sampling, n) for ids in prompts]
    return CompletionRequest(
        jobs=[one for job in jobs for one in apart(job, form)],
        echo=echo,
        logprobs=top is not None,
        silent=fields.get(name) == 0,
    )


class CompletionAnswer(Answer):
    """The answer to it."""

    kind, prefix = "text_completion", "cmpl"

    def __init__(self, request: CompletionRequest, served: Served, **options: Any) -> None:
        super().__init__(request.jobs, served, **options)
        self._request = request
        self._choices = [
            _Choice(request, job, served) for job in request.jobs for _ in range(job.n)
        ]

    async def whole(self, stream: Stream) -> dict[str, Any]:
        """The completion."""
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for pieces in stream.rounds():
            for piece in pieces:
                parts[piece.index].append(await self._pushed(piece))
                self.seen(piece)
        choices = []
        for index, rows in enumerate(parts):
            scores = [row["logprobs"] for row in rows if row["logprobs"] is not None]
            names = scores[0] if scores else ()
            choice = {
                "index": index,
                "text": "".join(row["text"] for row in rows),
                "logprobs": {name: sum((s[name] for s in scores), []) for name in names} or None,
                "finish_reason": rows[-1]["finish_reason"],
            }
            ids = self.ids(self.tokens[index])
            if ids:
                ids["prompt_token_ids"] = list(self._choices[index].job.prompt)
            choices.append(choice | ids)
        return self.envelope(self.kind, choices) | {"usage": usage_of(self.last)}

    async def chunks(self, stream: Stream) -> AsyncIterator[list[dict[str, Any]]]:
        """The completion in the chunks of each round."""
        async for pieces in stream.rounds():
            sent = []
            for piece in pieces:
                row = await self._pushed(piece)
                self.seen(piece)
                if row["text"] or row["logprobs"] or row["finish_reason"] or self._with_ids:
                    body = {"index": piece.index, **row, **self.ids(piece.tokens)}
                    sent.append(self.envelope(self.kind, [body]))
            if sent:
                yield sent
        if self.include_usage:
            yield [self.envelope(self.kind, []) | {"usage": usage_of(self.last)}]

    async def _pushed(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds; that of a prompt, which may be long, is made in another thread."""
        choice = self._choices[piece.index]
        return await asyncio.to_thread(choice.push, piece) if choice.echoes else choice.push(piece)


class _Choice:
    """One continuation as text."""

    def __init__(self, request: CompletionRequest, job: Job, served: Served) -> None:
        self.job, self._request, self._tokenizer = job, request, served.tokenizer
        self._text = VisibleText(served.tokenizer, job.wanted, show_special=False)
        self._shown, self._offset, self._begun = served.tokenizer.stream(), 0, False

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes next."""
        return self._request.echo and not self._begun

    def push(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds to the text and to the log-probabilities."""
        text, scores = "", {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        scores["text_offset"] = []
        if self.echoes:
            prompt = self.job.prompt
            text = self._tokenizer.decode(prompt)
            if self._request.logprobs:
                known = [None, *piece.request.prompt_logprobs]
                likeliest = [(one,) for one in piece.request.prompt_likeliest]
                self._score(scores, prompt, known, [None, *likeliest])
        self._begun = True
        if not self._request.silent:
            text += self._text.push(piece.tokens, piece.finish_reason)
            if self._request.logprobs:
                tops = piece.top_logprobs or [()] * len(piece.tokens)
                self._score(scores, piece.tokens, piece.logprobs, tops)
        return {
            "text": text,
            "logprobs": scores if self._request.logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _score(
        self,
        scores: dict[str, list[Any]],
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Sequence[tuple[int, float]] | None],
    ) -> None:
        named = lambda token: token_text(self._tokenizer, token)[0]
        for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
            own = {named(token): logprob} if logprob is not None else {}
            listed = {named(one): finite(value) for one, value in top or ()}
            scores["tokens"].append(named(token))
            scores["token_logprobs"].append(None if logprob is None else finite(logprob))
            entry = listed | {name: finite(value) for name, value in own.items()}
            scores["top_logprobs"].append(None if top is None else entry)
            scores["text_offset"].append(self._offset)
            self._offset += len(self._shown.push(token))


def _prompts(fields: Fields, served: Served) -> list[list[int]]:
    """The ids of every prompt of a body: a text, ids, or a list of either."""
    given = fields.get("prompt")
    rule = "must be a text, a list of token ids, or a list of either, none of them empty"
    several = isinstance(given, list) and given and not is_token_ids(given, served.vocabulary)
    every = given if several else [given]
    if len(every) > MOST_PROMPTS:
        raise fields.refuse("prompt", f"holds more than {MOST_PROMPTS} prompts; send fewer at once")
    check_prompt = lambda one: isinstance(one, str) or is_token_ids(one or None, served.vocabulary)
    if not all(map(check_prompt, every)):
        raise fields.refuse("prompt", f"{rule}; ids are from 0 to {served.vocabulary - 1}")
    prompts = [encoded(served, one, "prompt") if isinstance(one, str) else one for one in every]
    if not all(prompts):
        raise Refusal(f"prompt: {rule}", "prompt")
    return prompts
