"""Continuations of a few prompts, to be read while a model learns."""

from collections.abc import Callable, Sequence

from nemotron_jax.data.tokenizer import Tokenizer
from nemotron_jax.decoding.generate import generate
from nemotron_jax.model.nemotron import Nemotron

PROMPTS = ("def ", "import ", "class ")
TEMPERATURE = 0.8


def make_samples(
    tokenizer: Tokenizer, num_tokens: int, *, seed: int = 0, prompts: Sequence[str] = PROMPTS
) -> Callable[[Nemotron], str]:
    """A function of a model: each prompt with `num_tokens` tokens more, one below the other."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]

    def sample(model: Nemotron) -> str:
        result = generate(
            model,
            rows,
            num_tokens,
            temperature=TEMPERATURE,
            stop_tokens=(tokenizer.eos,),
            seed=seed,
        )
        texts = (
            tokenizer.decode([*row, *new[:length]])
            for row, new, length in zip(rows, result.tokens, result.lengths, strict=True)
        )
        return "\n\n".join(texts)

    return sample
