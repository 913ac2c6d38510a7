"""The steps that every way of decoding is made of: prefill a chunk, decode a token, verify drafts.

Pure functions of a model and a cache. A cache with an `mtp` part has it fed along: an MTP entry
needs a token and the hidden state of the one before, which may lie in another chunk.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import EXPERTS
from nemotron_jax.config.execution import Execution
from nemotron_jax.model.cache import Cache
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.packing import pack_experts, unpacked
from nemotron_jax.model.parameters import abstract_model, flatten, laid_out, unflatten


def for_decoding(model: Nemotron, dtype: str | None = None, experts: str | None = None) -> Nemotron:
    """The model with single layers in place of stacks, and its matrices in `dtype`, made once; on
    a mesh, with weights that stay where they are.

    Inside a compiled loop a layer of a stack would be copied, and a master cast, at every step. A
    model that is so already is returned as it is; drop the other one to hold the weights once.
    `experts="nvfp4"` rounds the routed experts to NVFP4 codes, 4.5 bits a weight, before anything
    else is rounded; "dense" makes floats of codes; None leaves them as they are.
    """
    rule = f"must be one of {', '.join(EXPERTS)}, or None"
    check_value("for_decoding", "experts", experts, experts in (None, *EXPERTS), rule)
    if experts is not None and experts != model.experts_format:
        model = pack_experts(model) if experts == "nvfp4" else unpacked(model)
    if dtype is not None and model.embedding[...].dtype != jnp.dtype(dtype):
        if model.is_split:
            raise ValueError(
                f"for_decoding: dtype={dtype!r} for a model that is split already; give the dtype "
                "when it is split"
            )
        wanted = flatten(abstract_model(model.config, dtype))
        leaves = flatten(model)  # codes are in no dtype
        cast = {n: a.astype(wanted[n].dtype) if n in wanted else a for n, a in leaves.items()}
        model = unflatten(model, cast)
    return laid_out(model if model.is_split else model.split_layers())


def for_execution(model: Nemotron, execution: Execution) -> Nemotron:
    """The model as decoding with `execution` reads it: split, and its matrices in the compute dtype
    where it is not split already."""
    wanted = execution.compute_dtype
    return for_decoding(model, None if wanted == "auto" or model.is_split else wanted)


def prefill_chunk(
    model: Nemotron,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    *,
    execution: Execution = Execution(),
) -> tuple[Cache, Float[Array, "B T D"]]:
    """The cache after `lengths` tokens of each row, and the hidden states of all.

    A row of length 0 keeps its states; hidden states past the lengths mean nothing.
    """
    output = model(tokens, cache=cache, lengths=lengths, execution=execution)
    fed = _Fed(output.hidden, tokens, lengths)
    return _with_mtp(model, cache, output.cache, fed, execution), output.hidden


def last_hidden(hidden: Float[Array, "B T D"], lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
    """Each row's hidden state of the last of `lengths` tokens; one of no tokens means nothing."""
    return jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]


def decode_step(
    model: Nemotron, cache: Cache, token: Int[Array, "B"], *, execution: Execution = Execution()
) -> tuple[Cache, Float[Array, "B V"]]:
    """The cache after one more token of each row, and the float32 logits of the next."""
    cache, hidden = feed_token(model, cache, token, execution=execution)
    return cache, model.logits(hidden[:, 0], execution=execution)


def feed_token(
    model: Nemotron, cache: Cache, token: Int[Array, "B"], *, execution: Execution = Execution()
) -> tuple[Cache, Float[Array, "B 1 D"]]:
    """The cache after one more token of each row, and its hidden state."""
    output = model(token[:, None], cache=cache, execution=execution)
    fed = _Fed(output.hidden, token[:, None], jnp.ones_like(token))
    return _with_mtp(model, cache, output.cache, fed, execution), output.hidden


def feed_drafter(
    model: Nemotron,
    before: Cache,
    after: Cache,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    execution: Execution = Execution(),
) -> Cache:
    """`after`, which came of `before` by these tokens without its MTP part, with that part fed:
    what a row was not given of them stands behind its own."""
    fed = _Fed(hidden, tokens, after.length - before.length)
    return _with_mtp(model, before, after, fed, execution)


def verify_step(
    model: Nemotron, cache: Cache, tokens: Int[Array, "B T"], *, execution: Execution = Execution()
) -> tuple[Cache, Float[Array, "B T D"], Float[Array, "B T V"]]:
    """A cache that any number of a few tokens can be kept of, their hidden states and their logits.

    Weights are read once for all of them, and so are states. `commit` turns the cache into one at
    rest.
    """
    output = model(tokens, cache=cache, every_state=True, execution=execution)
    return output.cache, output.hidden, model.logits(output.hidden, execution=execution)


def commit(
    model: Nemotron,
    cache: Cache,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    count: Int[Array, "B"],
    *,
    execution: Execution = Execution(),
) -> Cache:
    """The cache at rest after the first `count` of the tokens just verified.

    A count of 0 is for a row that is finished: it stays as it was before them. Entries that drafts
    left in the MTP cache are discarded, and those of the tokens that stay made of the backbone's
    states.
    """
    chosen = cache.select(count)
    if cache.mtp is None:
        return chosen
    mtp = cache.mtp.truncate(jnp.maximum(cache.start - 1, 0))
    before = dataclasses.replace(cache, length=cache.start, start=None, mtp=mtp)
    return _with_mtp(model, before, chosen, _Fed(hidden, tokens, count), execution)


@dataclasses.dataclass(frozen=True)
class _Fed:
    """Tokens that the model has just been fed: `count` of each row, and their hidden states."""

    hidden: Float[Array, "B T D"]
    tokens: Int[Array, "B T"]
    count: Int[Array, "B"]


def _with_mtp(
    model: Nemotron, before: Cache, after: Cache, fed: _Fed, execution: Execution
) -> Cache:
    """`after`, its MTP cache fed with the tokens of this call but a row's very first."""
    if before.mtp is None:
        return after
    known = jnp.concatenate([before.hidden[:, None], fed.hidden[:, :-1]], axis=1)
    first = before.length == 0  # nothing stands before the row's first token
    moved = lambda a: jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), jnp.roll(a, -1, 1), a)
    count = jnp.maximum(fed.count - first, 0)
    hidden, tokens = moved(known), moved(fed.tokens)
    mtp = model.mtp_step(hidden, tokens, cache=before.mtp, lengths=count, execution=execution).cache
    last = last_hidden(fed.hidden, fed.count)
    last = jnp.where((fed.count > 0)[:, None], last, before.hidden)
    return dataclasses.replace(after, mtp=mtp, hidden=last)
