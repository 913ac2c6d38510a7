"""The letters of every axis, and the small pytrees that travel between the floors.

B batch, T tokens, S cached tokens, D model width, V vocabulary;
H query heads, K key/value heads, C head channels;
M Mamba heads, P their channels, G groups, N state, Q chunk, W conv width;
E experts, R experts per token, L latent, F expert hidden; Z prediction targets (1 + MTP depths).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from nemotron_jax.config.execution import Execution
from nemotron_jax.config.precision import HIGH

Array = jax.Array


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What the model function returns; the structure never depends on values."""

    hidden: Float[Array, "B T D"]  # after the final norm
    cache: Any  # decoding state, or None when none was given
    router_load: Float[
        Array, "layers E"
    ]  # tokens sent to each expert of each MoE layer, padding left out
    aux_loss: Float[Array, ""]  # sum over MoE layers of the sequence balance loss, unscaled


@dataclasses.dataclass(frozen=True)
class Context:
    """What one call of the model function tells every layer."""

    execution: Execution
    dtype: Any  # compute dtype, resolved
    lengths: Int[Array, "B"] | None = None  # valid tokens of each row; None means all
    offset: Int[Array, "B"] | None = None  # tokens already in the cache
    every_state: bool = False  # keep the recurrent state after each token
    words: UInt32[Array, "2"] | None = None  # random words of this layer, for stochastic rounding
    first_token: Int[Array, ""] | int = 0  # the number of the first token here among all devices'
    formats: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of roles not high

    @property
    def implementation(self) -> str | None:
        """Kernel name for pallas_kernels; None follows the target platform."""
        return None if self.execution.kernels == "auto" else self.execution.kernels

    def format(self, role: str) -> str:
        """The number format of the weight matmul with this role in this layer."""
        return self.formats.get(role, HIGH)

    def valid(self, num_tokens: int) -> Array | None:
        """bool [B, T]: which tokens are not padding; None when all are."""
        if self.lengths is None:
            return None
        return jnp.arange(num_tokens) < self.lengths[:, None]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a model's parameters came from, so that saving gives back the same files."""

    directory: str
    dtype: str  # in which the files store their tensors, but for the exceptions
    dtype_exceptions: tuple[tuple[str, str], ...] = ()
    stop_tokens: tuple[int, ...] = ()  # of generation_config.json
