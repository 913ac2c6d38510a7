"""The letters of every axis, and the small pytrees that travel between the floors.

B batch, T tokens, S cached tokens, D model width, V vocabulary;
H query heads, K key/value heads, C head channels;
M Mamba heads, P their channels, G groups, N state, Q chunk, W conv width;
E experts, R experts per token, L latent, F expert hidden; Z prediction targets (1 + MTP depths).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jaxtyping import Bool, Float, Int, UInt32

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import HIGH
from pallas_kernels import PackedExperts

Array = jax.Array
Axes = tuple[str | tuple[str, int] | None, ...]  # logical: a name, or a name and its units' size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One packed batch; every shift has been made by data/packing, nothing rolls on a device.

    `targets[..., 0]` is the next token and `targets[..., d]` the token d further on, which MTP
    depth d predicts; `mtp_tokens[..., d - 1]` is the token d further on, which depth d embeds. They
    reach past the row's end while the document goes on; where it does not, they are 0 and their
    weight is 0.
    Segment ids count documents of a row from 1; 0 is padding, always at the row's end.
    """

    tokens: Int[Array, "B T"]
    targets: Int[Array, "B T Z"]
    mtp_tokens: Int[Array, "B T Z-1"]
    segment_ids: Int[Array, "B T"]
    weights: Float[Array, "B T Z"]
    numbers: Int[Array, "B T"] | None = None  # each token's in the whole batch; None: as it stands


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What the model function returns; the structure never depends on values."""

    hidden: Float[Array, "B T D"]  # after the final norm
    cache: Any  # decoding state, or None when none was given
    router_load: Float[
        Array, "layers E"
    ]  # tokens sent to each expert of each MoE layer, padding left out
    aux_loss: Float[Array, ""]  # sum over MoE layers of the mean sequence balance loss, unscaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What every layer is told of the tokens it is given; made once, at the model's door."""

    documents: Int[Array, "B T"] | None = None  # each token's, counted from 0 along its row
    valid: Bool[Array, "B T"] | None = None  # which tokens are no padding; None when none is
    lengths: Int[Array, "B"] | None = None  # valid tokens of each row where padding ends it
    offset: Int[Array, "B"] | None = None  # tokens already in the cache
    numbers: Int[Array, "B T"] | None = None  # each token's among all of the batch
    words: UInt32[Array, "2"] | None = None  # random words of this layer, for stochastic rounding

    # Logical axes of each; the words are the same everywhere.
    AXES: ClassVar[Mapping[str, tuple[str, ...] | None]] = {
        "documents": ("batch",),
        "valid": ("batch",),
        "lengths": ("batch",),
        "offset": ("batch",),
        "numbers": ("batch",),
        "words": None,
    }


@dataclasses.dataclass(frozen=True)
class Context:
    """How every layer is to run: static, so that programs are compiled by it."""

    execution: Execution
    dtype: Any  # compute dtype, resolved
    every_state: bool = False  # keep what the state after each token can be made of
    formats: tuple[tuple[str, str], ...] = ()  # (role, number format) of roles that are not high
    target: str | None = None  # platform that the program is compiled for; None: not known yet

    def kernel(self, op: str) -> str | None:
        """The implementation of an op of pallas_kernels; None follows the target platform."""
        name = self.execution.kernel(op)
        return None if name == "auto" else name

    def format(self, role: str) -> str:
        """The number format of the weight matmul with this role in this layer."""
        return dict(self.formats).get(role, HIGH)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix as its product wants it: the master, and how devices share it.

    The cast to the compute dtype, and the gathering of what other devices hold, are the product's.
    """

    value: Float[Array, "..."]
    axes: Axes = dataclasses.field(metadata={"static": True})  # one an axis
    codes: Any = None  # quant.codes.Codes of the value, where they were made beforehand


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Matrices of experts that stay codes: their products take them apart, and they do not train.

    Devices share them by whole experts, or not at all.
    """

    value: PackedExperts
    name: str = dataclasses.field(metadata={"static": True})  # whose, for errors
    # Whether adapters train beside them, somewhere in the model: gradients of inputs pass then.
    is_base: bool = dataclasses.field(default=False, metadata={"static": True})
    experts: str = dataclasses.field(default="experts", metadata={"static": True})  # their axis

    def axes(self, array: Array) -> Axes:
        """The logical axes of one of the codes' arrays."""
        return (self.experts, *(None,) * (array.ndim - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a model's parameters came from, so that saving gives back the same files.

    All are equal, so that models of two origins (a policy and its reference) map over each other.
    """

    directory: str
    dtype: str  # in which the files store their tensors, but for the exceptions
    dtype_exceptions: tuple[tuple[str, str], ...] = ()
    stop_tokens: tuple[int, ...] = ()  # of generation_config.json
    step: int | None = None  # of a run's checkpoint, which holds float32 throughout
    hub: str = ""  # the directory whose companions, as a chat template, go along when it is saved
    is_part: bool = False  # the text model of that directory's model of text and images

    @property
    def is_run(self) -> bool:
        """Whether the directory is a run's and not a hub model's."""
        return self.step is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)
