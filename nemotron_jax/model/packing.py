"""A model whose experts are NVFP4 codes, and the same with floats."""

from collections.abc import Callable, Iterator

import jax
from flax import nnx

from nemotron_jax.config.model import BLOCK_KINDS
from nemotron_jax.layers.experts import Experts
from nemotron_jax.layers.packed import PackedMatrix
from nemotron_jax.model.nemotron import Nemotron
from nemotron_jax.model.parameters import flatten, mesh_of
from nemotron_jax.sharding import on_mesh


def pack_experts(model: Nemotron, *, mtp: bool = True) -> Nemotron:
    """The model with its experts' matrices rounded to NVFP4, for decoding; what is packed already
    stays.

    `mtp=False` leaves the MTP block's as they are, as published checkpoints do. Raises ValueError
    for a model without experts and for one with adapters.
    """
    if not any(True for _ in experts_of(model)):
        raise ValueError(
            f"experts='nvfp4': the model of pattern {model.config.pattern!r} has no routed experts"
        )

    def packed(experts: Experts, name: str) -> PackedMatrix | nnx.Param:
        if experts.up_adapter is not None or experts.down_adapter is not None:
            raise ValueError(
                "experts='nvfp4': the experts have adapters, which their codes could not hold; "
                "merge_adapters(model) first"
            )
        matrix = getattr(experts, name)
        return matrix if isinstance(matrix, PackedMatrix) else PackedMatrix.of(matrix)

    is_traced = isinstance(model.embedding[...], jax.core.Tracer)
    with on_mesh(None if is_traced else mesh_of(model)):
        return _replaced(model, packed, mtp=mtp)


def unpacked(model: Nemotron) -> Nemotron:
    """The model with floats in place of codes, in the dtype of its other matrices."""
    dtype = model.embedding[...].dtype

    def dense(experts: Experts, name: str) -> PackedMatrix | nnx.Param:
        matrix = getattr(experts, name)
        return matrix.unpacked(dtype) if isinstance(matrix, PackedMatrix) else matrix

    return _replaced(model, dense)


def bytes_of(model: Nemotron) -> dict[str, int]:
    """Bytes of the buffers that hold the routed experts' parameters, the others', and all."""
    sizes = dict.fromkeys(("experts", "other"), 0)
    for name, leaf in flatten(model).items():
        part = "experts" if ".mixer.experts." in name else "other"
        sizes[part] += sum(shard.data.nbytes for shard in leaf.addressable_shards)
    return sizes | {"total": sum(sizes.values())}


def _replaced(
    model: Nemotron,
    new: Callable[[Experts, str], PackedMatrix | nnx.Param],
    *,
    mtp: bool = True,
) -> Nemotron:
    """A copy of the model, each of its experts' two matrices what `new` makes of them."""
    model = jax.tree.unflatten(*reversed(jax.tree.flatten(model)))
    for experts in experts_of(model, mtp=mtp):
        for name in ("up", "down"):
            setattr(experts, name, new(experts, name))
    return model


def experts_of(model: Nemotron, *, mtp: bool = True) -> Iterator[Experts]:
    """The routed experts of the trunk's layers, those of a stack as one, and of the MTP block."""
    stack = getattr(model, BLOCK_KINDS["E"])
    blocks = list(stack) if isinstance(stack, nnx.List) else [] if stack is None else [stack]
    if mtp and model.mtp_block is not None:
        blocks += list(model.mtp_block.blocks)
    for block in blocks:
        experts = getattr(block.mixer, "experts", None)
        if isinstance(experts, Experts):
            yield experts
