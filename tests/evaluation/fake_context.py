"""A context without a model: a function answers."""

import types

from nemotron_jax.evaluation.transcripts import Transcripts


class FakeContext:
    """What suites that ask need of a context."""

    def __init__(self, suite, tokenizer, answer, seed=0):
        self.tokenizer, self.seed = tokenizer, seed
        self.transcripts = Transcripts(suite)
        self.subject = types.SimpleNamespace(url="", tokenizer=tokenizer, seed=seed)
        self.progress = types.SimpleNamespace(at=lambda *_: None, note=lambda *_: None)
        self._answer = answer
        self.asked = []  # the requests of each call

    def ask(self, asks):
        """An answer to each."""
        self.asked.append(list(asks))
        return [self._answer(ask) for ask in asks]
