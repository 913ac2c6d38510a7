"""The model: one pure function for training, prefill, decoding and verification."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nemotron_jax.config.checks import is_integer
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig
from nemotron_jax.layers.init import Init
from nemotron_jax.layers.linear import Linear
from nemotron_jax.layers.norm import RMSNorm
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.layers.router import count_sequences
from nemotron_jax.model.block import make_stack
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.mtp import MTPBlock
from nemotron_jax.model.stack import Stacks, run_stack, split_layers, stay
from nemotron_jax.sharding import local, shard, target_platform
from nemotron_jax.sharding.vocabulary import Vocabulary
from nemotron_jax.sharding.weights import cuts_of, gathered
from nemotron_jax.types import Context, Origin, Output, Rows, Weight
from pallas_kernels import nvfp4


class Nemotron(nnx.Module):
    """Nemotron-H / Nemotron 3: hybrid Mamba-2, attention and (Latent)MoE, with an optional MTP
    block.

    An immutable pytree whose leaves are its parameters; nothing is ever assigned in a forward pass.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: str = "float32") -> None:
        self.config = config
        self.origin: Origin | None = None
        vocabulary, width = config.vocab_size, config.width
        init = Init(rngs, config.init_std, config.init_std, dtype)
        self.embedding = nnx.Param(init.normal(vocabulary, width), axes=("vocabulary", "width"))
        for letter, kind in BLOCK_KINDS.items():
            count = config.pattern.count(letter)
            setattr(self, kind, make_stack(config, letter, count, rngs=rngs, dtype=dtype))
        self.final_norm = RMSNorm(width, config.norm_epsilon)
        self.head = Linear("head", ("width", "vocabulary"), (width, vocabulary), init)
        self.mtp_block = MTPBlock(config, rngs=rngs, dtype=dtype) if config.mtp else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        key: Array | None = None,
        numbers: Int[Array, "B T"] | None = None,
        every_state: bool = False,
        execution: Execution = Execution(),
    ) -> Output:
        """Hidden states of tokens, after those already in `cache`.

        `segment_ids` packs documents into a row (each change starts one; 0 is padding, anywhere);
        `lengths` marks padding at row ends otherwise: padded tokens change no state and no router
        load. A cache's rows are one document each, so it excludes `segment_ids`; it must have room
        for all T tokens of the call, padding included. `key` (jax.random.key, or two words uint32
        [2]) feeds stochastic rounding, which the training recipes in `execution.precision` need for
        gradients; without one the forward pass rounds to the nearest alone. The bits of a token
        are those of its number, by `numbers` or as it stands in the batch.
        Raises ValueError for a token outside the vocabulary where `tokens` are at hand.
        """
        _check_tokens(tokens, self.config.vocab_size)
        _check_call(cache, segment_ids, lengths, tokens.shape)
        return _forward(
            self,
            tokens,
            cache,
            segment_ids,
            lengths,
            numbers,
            key=key,
            every_state=every_state,
            execution=execution,
        )

    def logits(
        self, hidden: Float[Array, "... D"], *, execution: Execution = Execution()
    ) -> Float[Array, "... V"]:
        """float32 logits of the next token."""
        return _logits(self, hidden, execution)

    def mtp(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        depth: int,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        execution: Execution = Execution(),
    ) -> Output:
        """The hidden states of MTP depth `depth`: at t they predict token t+depth+1.

        `hidden` is the backbone's and `tokens` the same row; depth d embeds token t+d, or token 0
        where that lies past the row or in another document. A cache serves depth 1 only; use
        `mtp_step`.
        """
        if depth < 1 or (cache is not None and depth != 1):
            raise ValueError(f"Nemotron.mtp: depth={depth} must be at least 1, and 1 with a cache")
        for d in range(1, depth + 1):
            shifted = shift_tokens(tokens, d, segment_ids)
            output = self.mtp_step(hidden, shifted, segment_ids, cache, execution=execution)
            hidden = output.hidden
        return output

    def mtp_step(
        self,
        hidden: Float[Array, "B T D"],
        next_tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        lengths: Int[Array, "B"] | None = None,
        execution: Execution = Execution(),
    ) -> Output:
        """One application of the MTP block: the previous depth's hidden states and the token to
        embed."""
        if self.mtp_block is None:
            raise ValueError("Nemotron.mtp_step: this model has no MTP block; configure model.mtp")
        _check_call(cache, segment_ids, lengths, next_tokens.shape)
        return _mtp_step(
            self, hidden, next_tokens, segment_ids, cache, lengths=lengths, execution=execution
        )

    def mtp_logits(
        self, hidden: Float[Array, "B T D"], tokens: Int[Array, "B T"], depth: int
    ) -> Float[Array, "B T V"]:
        """float32 logits of token t+depth+1 from hidden t and tokens t+1..t+depth."""
        return self.logits(self.mtp(hidden, tokens, depth).hidden)

    def init_cache(
        self, batch: int, max_length: int, dtype: str | None = None, *, mtp: bool = False
    ) -> Cache:
        """An empty cache for rows of up to `max_length` tokens; recurrent states are always
        float32.

        With `mtp` it holds the MTP block's cache too, which `decoding/step.py` feeds along.
        """
        cache = self._empty_cache(self.config.pattern, batch, max_length, dtype)
        if not mtp:
            return cache
        if self.mtp_block is None:
            raise ValueError(
                "Nemotron.init_cache: mtp=True needs a model with an MTP block; configure model.mtp"
            )
        hidden = jnp.zeros((batch, self.config.width), self.embedding[...].dtype)
        drafts = self.init_mtp_cache(batch, max_length, dtype)
        return dataclasses.replace(cache, mtp=drafts, hidden=hidden)

    def init_mtp_cache(self, batch: int, max_length: int, dtype: str | None = None) -> Cache:
        """An empty cache for the MTP block's own attention."""
        return self._empty_cache(self.config.mtp.pattern, batch, max_length, dtype)

    @property
    def experts_format(self) -> str:
        """How the trunk's routed experts are held: as floats, "dense", or as codes, "nvfp4"."""
        stack = self._stacks()["E"]
        block = stack[0] if isinstance(stack, nnx.List) else stack
        is_packed = block is not None and isinstance(block.mixer.experts.up, PackedMatrix)
        return "nvfp4" if is_packed else "dense"

    @property
    def is_split(self) -> bool:
        """Whether single layers stand in place of stacks."""
        return any(isinstance(stack, nnx.List) for stack in self._stacks().values())

    def split_layers(self) -> "Nemotron":
        """This model with single layers in place of stacks, for loops that run one token at a time,
        and weights that stay where they are.

        Inside a compiled loop a layer of a stack would be copied out at every step, and the parts
        of one gathered.
        """
        model = copy.copy(self)
        for letter, layers in split_layers(self._stacks()).items():
            setattr(model, BLOCK_KINDS[letter], layers)
        return stay(model)

    def _empty_cache(self, pattern: str, batch: int, max_length: int, dtype: str | None) -> Cache:
        if not all(is_integer(size) and size >= 1 for size in (batch, max_length)):
            raise ValueError(
                f"Nemotron.init_cache: batch={batch} and max_length={max_length} must be integers "
                "and at least 1"
            )
        dtype = self.embedding[...].dtype if dtype is None else dtype
        dtype = dtype_name("Nemotron.init_cache", dtype)
        return Cache.zeros(self.config, pattern, batch, max_length, dtype)

    def _stacks(self) -> Stacks:
        return {letter: getattr(self, kind) for letter, kind in BLOCK_KINDS.items()}

    def _context(self, execution: Execution, *, every_state: bool = False) -> Context:
        chosen = execution.compute_dtype
        dtype = self.embedding[...].dtype if chosen == "auto" else jnp.dtype(chosen)
        return Context(execution, dtype, every_state, target=target_platform())


def shift_tokens(
    tokens: Int[Array, "B T"], distance: int, segment_ids: Int[Array, "B T"] | None
) -> Int[Array, "B T"]:
    """The token `distance` further on, or 0 where it lies past the row or in another document."""
    pad = ((0, 0), (0, distance))
    shifted = jnp.pad(tokens[:, distance:], pad)
    if segment_ids is None:
        return shifted
    return jnp.where(jnp.pad(segment_ids[:, distance:], pad) == segment_ids, shifted, 0)


# Compiled once for eager callers; inside a caller's own jit these calls are inlined.
@functools.partial(jax.jit, static_argnames=("every_state", "execution"))
def _forward(
    model: Nemotron,
    tokens: Array,
    cache: Cache | None,
    segment_ids: Array | None,
    lengths: Array | None,
    numbers: Array | None,
    *,
    key: Array | None,
    every_state: bool,
    execution: Execution,
) -> Output:
    context = model._context(execution, every_state=every_state)
    rows = _rows(tokens, cache, segment_ids, lengths)
    if key is not None:
        if numbers is None:
            numbers = jnp.arange(tokens.size).reshape(tokens.shape)
        rows = dataclasses.replace(rows, words=nvfp4.key_words(key), numbers=numbers)
    x = _embed(model, tokens, context)
    states = None if cache is None else cache.layers
    x, states, metrics = run_stack(x, model.config, model._stacks(), rows, states, context)
    return Output(
        hidden=model.final_norm(x),
        cache=cache and cache.advance(states, tokens.shape[1], rows.lengths, every_state),
        router_load=metrics.load,
        aux_loss=jnp.sum(metrics.aux_loss) / _sequences(tokens, rows, execution),
    )


@functools.partial(jax.jit, static_argnames=("execution",))
def _logits(model: Nemotron, hidden: Array, execution: Execution) -> Array:
    logits = model.head(hidden, model._context(execution), out_dtype=jnp.float32)
    return shard(logits, "batch", *(None,) * (logits.ndim - 2), "vocabulary")


@functools.partial(jax.jit, static_argnames=("execution",))
def _mtp_step(
    model: Nemotron,
    hidden: Array,
    next_tokens: Array,
    segment_ids: Array | None,
    cache: Cache | None,
    *,
    lengths: Array | None,
    execution: Execution,
) -> Output:
    context, rows = model._context(execution), _rows(next_tokens, cache, segment_ids, lengths)
    embedded = _embed(model, next_tokens, context)
    states = None if cache is None else cache.layers
    hidden, states, metrics = model.mtp_block(hidden, embedded, rows, states, context)
    experts = model.config.moe.num_experts if model.config.moe else 0
    loads = [report.load for report in metrics]
    aux_loss = sum((report.aux_loss for report in metrics), jnp.zeros(()))
    return Output(
        hidden=hidden,
        cache=cache and cache.advance(states, next_tokens.shape[1], rows.lengths, False),
        router_load=jnp.stack(loads) if loads else jnp.zeros((0, experts)),
        aux_loss=aux_loss / _sequences(next_tokens, rows, execution),
    )


def number_documents(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Documents of each row, counted from 0: every change of segment id starts one."""
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(starts, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _rows(
    tokens: Array, cache: Cache | None, segment_ids: Array | None, lengths: Array | None
) -> Rows:
    """What the layers are told of tokens: documents are numbered here, once for all of them.

    Padding between documents is a document of its own, so nothing reaches across it.
    """
    offset, places = None if cache is None else cache.length, jnp.arange(1, tokens.shape[1] + 1)
    if segment_ids is not None:
        valid = segment_ids != 0
        lengths = jnp.max(jnp.where(valid, places, 0), axis=1).astype(jnp.int32)
        return Rows(number_documents(segment_ids), valid, lengths, offset)
    valid = None if lengths is None else places <= lengths[:, None]
    return Rows(None, valid, lengths, offset)


def _sequences(tokens: Array, rows: Rows, execution: Execution) -> Float[Array, ""]:
    """Sequences over which the balance loss is a mean; at least 1."""
    valid = jnp.ones(tokens.shape, bool) if rows.valid is None else rows.valid
    documents = None if execution.aux_loss == "rows" else rows.documents
    return jnp.maximum(count_sequences(documents, valid), 1)


def _embed(model: Nemotron, tokens: Int[Array, "B T"], context: Context) -> Float[Array, "B T D"]:
    """The tokens' rows of the embedding table, looked up by each device for its own tokens."""
    table = Weight(model.embedding[...], model.embedding.axes)
    cuts = cuts_of(table)
    vocabulary = Vocabulary.of(cuts, 0)

    def look_up(part: Array, tokens: Array) -> Array:
        return vocabulary.look_up(gathered(part, cuts, context.dtype), tokens).astype(context.dtype)

    x = local(look_up, (table, ("batch",)), ("batch",))(table.value, tokens)
    return shard(x, "batch", "tokens", "width")


def _check_call(
    cache: Cache | None, segment_ids: Array | None, lengths: Array | None, shape: tuple[int, int]
) -> None:
    batch, num_tokens = shape
    for name, array, wanted in (
        ("segment_ids", segment_ids, shape),
        ("lengths", lengths, shape[:1]),
    ):
        if array is not None and not (_is_integer(array) and array.shape == tuple(wanted)):
            raise ValueError(
                f"Nemotron: {name} are {_kind(array)} and must be an array of integers of shape "
                f"{tuple(wanted)}, beside tokens of shape {tuple(shape)}"
            )
    if lengths is not None and not isinstance(lengths, jax.core.Tracer):
        wrong = [int(n) for n in np.asarray(lengths) if not 0 <= n <= num_tokens]
        if wrong:
            raise ValueError(
                f"Nemotron: lengths hold {wrong[0]}, and rows have {num_tokens} tokens; a length "
                "counts a row's tokens before its padding"
            )
    if cache is not None and cache.length.shape[0] != batch:
        raise ValueError(
            f"Nemotron: {batch} rows of tokens and a cache of {cache.length.shape[0]} rows; make "
            f"it by init_cache({batch}, …)"
        )
    if segment_ids is not None and (cache is not None or lengths is not None):
        raise ValueError(
            "Nemotron: segment_ids come with a cache or lengths; a cache holds one document "
            "per row, and segment id 0 marks padding, so pass segment_ids alone"
        )
    if cache is None or cache.capacity is None or isinstance(cache.length, jax.core.Tracer):
        return  # inside jit, `Cache.overflowed` tells
    filled = cache.length.shape[0] and int(jnp.max(cache.length))
    if filled and filled + num_tokens > cache.capacity:
        raise ValueError(
            f"Nemotron: T={num_tokens} tokens after {filled} exceed the cache's capacity of "
            f"{cache.capacity}; give init_cache a larger max_length"
        )


def _check_tokens(tokens: Array, vocabulary: int) -> None:
    """Raise ValueError for what are no tokens, and for one outside the vocabulary; the values of
    traced tokens cannot be looked at."""
    if not _is_integer(tokens) or tokens.ndim != 2:
        raise ValueError(
            f"Nemotron: tokens are {_kind(tokens)} and must be an array of integers [batch, tokens]"
        )
    if isinstance(tokens, jax.core.Tracer) or not np.size(tokens):
        return
    found = np.asarray(tokens)
    wrong = found[(found < 0) | (found >= vocabulary)]
    if wrong.size:
        raise ValueError(
            f"Nemotron: token {int(wrong[0])} lies outside the model's vocabulary of {vocabulary}; "
            "was the text encoded with this model's tokenizer?"
        )


def _is_integer(array: object) -> bool:
    """Whether it is an array, traced or not, of integers."""
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.integer)


def _kind(value: object) -> str:
    """What an argument is, in a sentence about it."""
    is_array = hasattr(value, "dtype")
    return f"{value.dtype} of shape {value.shape}" if is_array else repr(value)
