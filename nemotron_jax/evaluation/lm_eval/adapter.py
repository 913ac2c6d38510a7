"""Our models as lm-eval's: log-likelihoods and greedy answers through one answerer.

Source: lm-eval 0.4.13, `lm_eval.api.model.TemplateLM`; what is cut where is its Hugging Face
backend's, so that both give the same numbers.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemotron_jax.data.chat import jinja_template
from nemotron_jax.data.chat.render import ChatOptions, Piece, render
from nemotron_jax.data.chat.tokens import encode_pieces
from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.evaluation.answers import Answer, Ask
from nemotron_jax.evaluation.suite import Unavailable

_NEW_TOKENS = 256  # of an answer, where a task does not say; lm-eval's own default
_SEEDS = 2**32

Scored = tuple[float, bool]


class Harness(TemplateLM):
    """A model that lm-eval asks. Requests go out together; equal ones go out once.

    `max_length` is the context that texts are cut to, from the left. With `chat`, names of
    reserved tokens in a text are those tokens, as a chat template writes them.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[Ask]], list[Answer]],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._ask, self._tokenizer, self._chat = ask, tokenizer, chat
        self.max_length, self._seed = max_length, seed
        self.written: dict[str, Answer] = {}  # what came of each context, as it was written

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        return self._tokenizer.bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer, for lm-eval's cache of requests."""
        return self._tokenizer.fingerprint()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The family's template."""
        return jinja_template.chat_template() if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, without reasoning."""
        options = ChatOptions(enable_thinking=False)
        return render(chat_history, None, options, generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """A text's tokens; none are added."""
        if self._chat:
            return encode_pieces(self._tokenizer, [Piece(string, markup=True)])
        return self._tokenizer.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """Of each continuation after its context, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        rows = [
            (tuple((context + new)[-(self.max_length + 1) :]), len(new))
            for _, context, new in requests
        ]
        distinct = list(dict.fromkeys(tokens for tokens, _ in rows))
        # A request gives at least one token; it is not looked at.
        asks = [Ask(tokens, max_new_tokens=1, prompt_logprobs=True) for tokens in distinct]
        answers = dict(zip(distinct, self._answers(asks), strict=True))
        found = [_scored(answers[tokens], count) for tokens, count in rows]
        for (key, _, _), one in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, one)
        return found

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Of each whole text, in windows as long as the context where it is longer."""
        windows = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([w for of in windows for w in of]))
        totals = [sum(one for one, _ in itertools.islice(scores, len(of))) for of in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each context, up to its stop strings."""
        asks = [self._generation(request, place) for place, request in enumerate(requests)]
        first = {ask: ask for ask in asks}  # equal ones are asked once
        answers = dict(zip(first, self._answers(list(first)), strict=True))
        texts = [answers[ask].text for ask in asks]
        self.written |= {r.args[0]: answers[ask] for r, ask in zip(requests, asks, strict=True)}
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generation(self, request: Instance, place: int) -> Ask:
        context, given = request.args
        kwargs = normalize_gen_kwargs(given, _NEW_TOKENS)
        room = self.max_length - kwargs["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"lm_eval: a task asks for {kwargs['max_gen_toks']} new tokens, and "
                f"length={self.max_length} leaves no room for its question; raise lm_eval:length"
            )
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        return Ask(
            tuple(self.tok_encode(context)[-room:]) or (self.prefix_token_id,),
            max_new_tokens=kwargs["max_gen_toks"],
            temperature=temperature,
            top_p=float(kwargs.get("top_p", 1.0)) if temperature else 1.0,
            seed=(self._seed * 1_000_003 + place) % _SEEDS if temperature else 0,
            stop=tuple(text for text in kwargs["until"] if text),
        )

    def _answers(self, asks: Sequence[Ask]) -> list[Answer]:
        answers = self._ask(asks)
        if failed := [answer.error for answer in answers if answer.error]:
            raise Unavailable(f"{len(failed)} of {len(asks)} requests failed: {failed[0]}")
        return answers


def _scored(answer: Answer, count: int) -> Scored:
    """The sum over the last `count` tokens of the prompt, and whether all were the likeliest."""
    if len(answer.prompt_logprobs) < count:
        raise Unavailable(
            f"{count} log-probabilities of a prompt are needed and {len(answer.prompt_logprobs)} "
            "came: the prompt had no room, or the server does not answer `echo` with `logprobs`"
        )
    if not count:
        return 0.0, True
    return sum(answer.prompt_logprobs[-count:]), all(answer.prompt_likeliest[-count:])
