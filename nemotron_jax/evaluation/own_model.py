"""The model in memory as one that answers: all suites' requests go through one generator."""

import dataclasses
from collections.abc import Callable, Sequence

from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.data.chat.render import ANSWER, END, ChatOptions
from nemotron_jax.data.chat.tokens import encode_prompt
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import default_stop_tokens
from nemotron_jax.decoding.generator import Generator
from nemotron_jax.decoding.request import Request
from nemotron_jax.decoding.wanted import Budget, Wanted
from nemotron_jax.evaluation.answers import Answer, Ask
from nemotron_jax.model.nemotron import Nemotron

Progress = Callable[[int, int], None]


class OwnModel:
    """Answers of a model by a generator that holds its weights."""

    def __init__(
        self,
        model: Nemotron,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        longest: int,
        progress: Progress = lambda done, total: None,
    ) -> None:
        """`longest`: tokens of a prompt and its answer together that the generator has room for;
        `progress` is called with the answers done and all of them."""
        self._model, self._generator, self._tokenizer = model, generator, tokenizer
        self._longest, self._progress = longest, progress
        self._stops = tuple({tokenizer.eos, *default_stop_tokens(model)})

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """An answer to each. A prompt without room for a token more gives an empty answer that was
        cut off; one near it gives a shorter answer."""
        requests = [self._submitted(ask) for ask in asks]
        total = sum(request is not None for request in requests)
        while self._generator.step():
            self._progress(sum(request.done for request in requests if request), total)
        return [
            Answer(finish_reason="length") if request is None else self._answer(ask, request)
            for ask, request in zip(asks, requests, strict=True)
        ]

    def encode(self, ask: Ask) -> tuple[int, ...]:
        """The prompt's tokens."""
        if ask.prompt is None:
            options = ChatOptions(
                enable_thinking=ask.thinking,
                low_effort=ask.low_effort,
                reasoning_budget=ask.budget,
            )
            return tuple(encode_prompt(self._tokenizer, ask.messages, ask.tools or None, options))
        return tuple(
            self._tokenizer.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt
        )

    def _submitted(self, ask: Ask) -> Request | None:
        prompt = self.encode(ask)
        room = self._longest - len(prompt)
        if room < 1:
            return None
        is_chat = ask.prompt is None
        budget = None
        if ask.budget is not None and ask.thinking:
            budget = Budget(ask.budget, self._tokenizer.token_id(ANSWER))
        wanted = Wanted(
            min(ask.max_new_tokens, room),
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
            stop_tokens=(*self._stops, self._tokenizer.token_id(END)) if is_chat else self._stops,
            stop_strings=ask.stop,
            prompt_logprobs=ask.prompt_logprobs,
            budget=budget,
        )
        return self._generator.submit(prompt, wanted)[0]

    def _answer(self, ask: Ask, request: Request) -> Answer:
        likeliest = zip(request.prompt[1:], request.prompt_likeliest, strict=False)
        found = Answer(
            tokens=len(request.tokens),
            finish_reason="stop" if request.finish_reason == "stop" else "length",
            prompt_logprobs=tuple(request.prompt_logprobs or ()),
            prompt_likeliest=tuple(token == best for token, (best, _) in likeliest),
        )
        if ask.prompt is not None:
            text = _before(self._tokenizer.decode(request.tokens), ask.stop)
            return dataclasses.replace(found, text=text)
        text = self._tokenizer.decode(request.tokens, show_special=True)
        turn = parse_turn(text, thinking=ask.thinking, tools=ask.tools or None)
        calls = tuple({"name": call.name, "arguments": call.arguments} for call in turn.calls)
        return dataclasses.replace(
            found,
            text=_before(turn.content, ask.stop),
            reasoning=turn.reasoning,
            calls=calls,
            message=turn.message(),
        )


def _before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=None)]
