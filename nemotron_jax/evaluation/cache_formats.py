"""What it costs to keep less: bits per byte of held-out text by the formats of the cache."""

import dataclasses
import math

import numpy as np

from nemotron_jax.config.cache import KV_FORMATS, STATE_FORMATS, CacheConfig
from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.data.corpus import Corpus
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.decoding.step import for_decoding
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.evaluation.evaluator import Result, Subject, Table
from nemotron_jax.evaluation.perplexity import ratio_over_documents
from nemotron_jax.model.nemotron import Nemotron

COLUMNS = ("keys and values", "states", "bits per byte", "more than float32", "standard error")
_ROWS = 8  # documents that are read at a time


@dataclasses.dataclass(frozen=True)
class CacheFormats:
    """The beginnings of held-out documents, read token by token as decoding does, so that states
    are rounded after each.

    Each row of the table differs in one format from float32; errors are of the differences, with
    documents as the independent things.
    """

    corpus: Corpus
    documents: int = 16
    tokens: int = 512  # of each document, at most
    name: str = "cache_formats"

    def run(self, model: Nemotron) -> Result:
        """Values `bits_per_byte` of float32 and `*_more_bits_per_byte` of the other formats."""
        model = for_decoding(model)
        texts = self._texts()
        sizes = np.array([self.corpus.byte_lengths[text[1:]].sum() for text in texts])
        document = np.arange(len(texts))
        exact = self._bits(model, texts, CacheConfig("float32"))
        whole, error = ratio_over_documents(exact, sizes, document)
        rows = [("float32", "float32", whole, 0.0, error)]
        values = {"bits_per_byte": whole}
        others = [CacheConfig(kv=kv) for kv in KV_FORMATS if kv not in ("auto", "float32")]
        others += [CacheConfig("float32", states) for states in STATE_FORMATS[1:]]
        for formats in others:
            bits = self._bits(model, texts, formats)
            more, error = ratio_over_documents(bits - exact, sizes, document)
            rows.append((formats.kv, formats.states, whole + more, more, error))
            changed = formats.kv if formats.states == "float32" else f"states_{formats.states}"
            values[f"{changed}_more_bits_per_byte"] = more
        table = Table("Formats of the cache", COLUMNS, tuple(rows))
        return Result(values, n=len(texts), tables=(table,), counted="documents")

    def _texts(self) -> list[list[int]]:
        held_out = self.corpus.held_out
        starts, ends = held_out.offsets[:-1], held_out.offsets[1:]
        texts = [
            np.asarray(held_out.tokens[start : min(end, start + self.tokens)]).tolist()
            for start, end in zip(starts, ends, strict=True)
        ]
        return [text for text in texts if len(text) > 1][: self.documents]

    def _bits(self, model: Nemotron, texts: list, formats: CacheConfig) -> np.ndarray:
        """Bits that each text's tokens take after its first."""
        longest = max(map(len, texts)) + 1
        shapes = ((_ROWS, 1),)
        engine = Engine(model, EngineConfig(_ROWS, longest, prefill_shapes=shapes, cache=formats))
        wanted = Wanted(max_new_tokens=1, prompt_logprobs=True)
        requests = [request for text in texts for request in engine.submit(text, wanted)]
        engine.run()
        return np.array([-sum(request.prompt_logprobs) / math.log(2) for request in requests])


def make(subject: Subject) -> CacheFormats:
    """The suite on the subject's held-out text."""
    subject.require_config("cache_formats")
    return CacheFormats(subject.corpus)
