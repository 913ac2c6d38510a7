"""Parameters, hub tensors, FLOPs and decoding bytes of a model, from its configuration alone.

Everything follows from the tensors of a hub checkpoint, listed once in `_mixer_tensors`. "Active"
is what one token touches: of the routed experts only `experts_per_token`.
"""

import dataclasses
import functools
import math

from nemotron_jax.config.checks import check_value
from nemotron_jax.config.model import BLOCK_KINDS, ModelConfig, MoEConfig

# Of an element, by the dtypes that states of decoding may have.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Parameters of each part; a block's pre-norm is counted with its mixer."""

    embedding: int
    head: int
    final_norm: int
    mamba: int
    attention: int
    moe: int
    mlp: int
    mtp: int

    @property
    def main(self) -> int:
        """All but the MTP block."""
        return self.total - self.mtp

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token; a multiply-add counts two."""

    weights: int  # matrix products with parameters, the convolution among them
    attention: int  # scores and weighted values, proportional to the context
    scan: int  # the Mamba-2 recurrence

    @property
    def total(self) -> int:
        """FLOPs of the token: products with weights, attention and scan."""
        return self.weights + self.attention + self.scan


@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Bytes that decoding keeps for one sequence."""

    kv: int
    ssm: int
    conv: int
    mtp_kv: int

    @property
    def total(self) -> int:
        """Bytes of all kinds of state together."""
        return sum(dataclasses.astuple(self))


@functools.lru_cache(maxsize=64)
def parameters(config: ModelConfig) -> ParameterCount:
    """Parameters by part, the router's selection biases included."""
    kinds = {
        kind: config.pattern.count(letter) * _block_size(config, letter)
        for letter, kind in BLOCK_KINDS.items()
    }
    return ParameterCount(
        embedding=config.vocab_size * config.width,
        head=config.vocab_size * config.width,
        final_norm=config.width,
        mtp=sum(tensor.total for tensor in _mtp_tensors(config)),
        **kinds,
    )


def weight_bytes(config: ModelConfig, *, experts: str = "dense", bytes_each: int = 2) -> int:
    """Bytes of a model's weights of `bytes_each`; with `experts="nvfp4"` the routed experts', of
    the MTP block too, are codes: 9/16 of a byte each and a float32 a matrix."""
    total = bytes_each * parameters(config).total
    if experts == "dense" or config.moe is None:
        return total
    layers = (config.pattern + (config.mtp.pattern if config.mtp else "")).count("E")
    weights = layers * config.moe.num_experts * _expert_size(config)
    matrices = 2 * layers * config.moe.num_experts
    return total - bytes_each * weights + weights * 9 // 16 + 4 * matrices


def active_parameters(config: ModelConfig, *, embedding: bool = True, head: bool = True) -> int:
    """Parameters of the main model that one token touches, with or without the vocabulary's."""
    count = parameters(config)
    idle = 0
    if config.moe:
        idle_experts = config.moe.num_experts - config.moe.experts_per_token
        idle = config.pattern.count("E") * idle_experts * _expert_size(config)
    return count.main - idle - (0 if embedding else count.embedding) - (0 if head else count.head)


def hub_tensor_counts(config: ModelConfig) -> tuple[int, int]:
    """Tensors of a hub checkpoint: those of the main model, and those of the MTP block."""
    main = 3 + sum(_num_tensors(_block_tensors(config, letter)) for letter in config.pattern)
    return main, _num_tensors(_mtp_tensors(config))


@functools.lru_cache(maxsize=64)
def forward_flops(config: ModelConfig, context: int, *, mtp_depths: int = 0) -> TokenFlops:
    """FLOPs of one token's forward pass when it attends to `context` tokens, itself included.

    Each of the `mtp_depths` adds its block and the vocabulary projection. The scan counts the
    recurrence (decay, input, output), the least that computes it: a chunked scan does more work, in
    matrix products. Norms, activations, softmax and routing's sort are left out.
    """
    _check_depths(config, mtp_depths)
    blocks = config.pattern + mtp_depths * (config.mtp.pattern if config.mtp else "")
    weights = (1 + mtp_depths) * 2 * config.vocab_size * config.width
    weights += mtp_depths * 2 * 2 * config.width * config.width  # the MTP block's eh_proj
    weights += sum(_weight_flops(config, letter) for letter in blocks)
    attention = scan = 0
    if config.attention:
        width = config.attention.num_heads * config.attention.head_dim
        attention = blocks.count("*") * 4 * width * context
    if config.mamba:
        # State: two products and a sum an entry; output: a product and a sum; D: two a channel.
        per_channel = 5 * config.mamba.state_size + 2
        scan = blocks.count("M") * config.mamba.inner_width * per_channel
    return TokenFlops(weights=weights, attention=attention, scan=scan)


def training_flops(config: ModelConfig, sequence_length: int, *, mtp_depths: int = 0) -> TokenFlops:
    """FLOPs of one token's forward and backward pass, averaged over a row of `sequence_length`.

    The mean context of a row is (sequence_length + 1) / 2. The backward pass costs twice the
    forward; what rematerialisation recomputes is not counted, as usual for model FLOPs utilisation.
    """
    once = forward_flops(config, sequence_length + 1, mtp_depths=mtp_depths)
    return TokenFlops(3 * once.weights, 3 * once.attention // 2, 3 * once.scan)


def decode_state(
    config: ModelConfig,
    context: int,
    *,
    kv_dtype: str = "bfloat16",
    ssm_dtype: str = "float32",
    conv_dtype: str = "bfloat16",
) -> DecodeState:
    """Bytes that one sequence of `context` tokens keeps; only keys and values grow with it."""
    for name, dtype in (("kv", kv_dtype), ("ssm", ssm_dtype), ("conv", conv_dtype)):
        rule = f"must be one of {', '.join(BYTES)}"
        check_value("decode_state", f"{name}_dtype", dtype, dtype in BYTES, rule)
    kv_layer = ssm_layer = conv_layer = 0
    if config.attention:
        kv_width = 2 * config.attention.num_kv_heads * config.attention.head_dim
        kv_layer = kv_width * context * BYTES[kv_dtype]
    if config.mamba:
        ssm_layer = config.mamba.inner_width * config.mamba.state_size * BYTES[ssm_dtype]
        past = config.mamba.conv_width - 1
        conv_layer = past * config.mamba.conv_channels * BYTES[conv_dtype]
    return DecodeState(
        kv=config.pattern.count("*") * kv_layer,
        ssm=config.pattern.count("M") * ssm_layer,
        conv=config.pattern.count("M") * conv_layer,
        mtp_kv=config.mtp.pattern.count("*") * kv_layer if config.mtp else 0,
    )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """`copies` hub tensors of one shape; `matrix` says that a token multiplies with it."""

    shape: tuple[int, ...]
    copies: int = 1
    used: int | None = None  # copies that one token touches; None means all
    matrix: bool = True

    @property
    def total(self) -> int:
        return self.copies * math.prod(self.shape)

    @property
    def flops(self) -> int:
        used = self.copies if self.used is None else self.used
        return 2 * used * math.prod(self.shape) if self.matrix else 0


def _vector(size: int) -> _Tensor:
    return _Tensor((size,), matrix=False)


def _mixer_tensors(config: ModelConfig, letter: str) -> list[_Tensor]:
    width = config.width
    if letter == "M":
        mamba = config.mamba
        projected = mamba.inner_width + mamba.conv_channels + mamba.num_heads
        tensors = [
            *_linear(projected, width, mamba.projection_bias),
            _Tensor((mamba.conv_channels, 1, mamba.conv_width)),
            *(_vector(mamba.num_heads) for _ in ("A_log", "D", "dt_bias")),
            _vector(mamba.inner_width),
            *_linear(width, mamba.inner_width, mamba.projection_bias),
        ]
        return tensors + ([_vector(mamba.conv_channels)] if mamba.conv_bias else [])
    if letter == "*":
        attention = config.attention
        queries = attention.num_heads * attention.head_dim
        keys = attention.num_kv_heads * attention.head_dim
        return [_Tensor((rows, width)) for rows in (queries, keys, keys, queries)]
    if letter == "-":
        return _two_layers(config.mlp.width, width, config.mlp.projection_bias)
    if letter == "E":
        return _moe_tensors(config.moe, width)
    raise ValueError(f"accounting: blocks {letter!r} have no list of tensors; add it here")


def _moe_tensors(moe: MoEConfig, width: int) -> list[_Tensor]:
    expert = (moe.expert_width, moe.latent_width or width)
    tensors = [
        _Tensor((moe.num_experts, width)),
        _vector(moe.num_experts),
        _Tensor(expert, copies=2 * moe.num_experts, used=2 * moe.experts_per_token),
        *_two_layers(moe.shared_width, width, moe.projection_bias),
    ]
    if moe.latent_width:
        tensors += _two_layers(moe.latent_width, width, moe.projection_bias)
    return tensors


def _linear(rows: int, columns: int, bias: bool) -> list[_Tensor]:
    return [_Tensor((rows, columns)), *([_vector(rows)] if bias else [])]


def _two_layers(hidden: int, width: int, bias: bool) -> list[_Tensor]:
    return _linear(hidden, width, bias) + _linear(width, hidden, bias)


def _block_tensors(config: ModelConfig, letter: str) -> list[_Tensor]:
    return [_vector(config.width), *_mixer_tensors(config, letter)]


def _mtp_tensors(config: ModelConfig) -> list[_Tensor]:
    if config.mtp is None:
        return []
    width = config.width
    ends = [_vector(width), _vector(width), _Tensor((width, 2 * width)), _vector(width)]
    return ends + [t for letter in config.mtp.pattern for t in _block_tensors(config, letter)]


def _num_tensors(tensors: list[_Tensor]) -> int:
    return sum(tensor.copies for tensor in tensors)


def _block_size(config: ModelConfig, letter: str) -> int:
    if getattr(config, BLOCK_KINDS[letter]) is None:
        return 0
    return sum(tensor.total for tensor in _block_tensors(config, letter))


def _expert_size(config: ModelConfig) -> int:
    return 2 * config.moe.expert_width * (config.moe.latent_width or config.width)


def _weight_flops(config: ModelConfig, letter: str) -> int:
    return sum(tensor.flops for tensor in _mixer_tensors(config, letter))


def _check_depths(config: ModelConfig, mtp_depths: int) -> None:
    valid = mtp_depths == 0 or (mtp_depths > 0 and config.mtp is not None)
    rule = "must not be negative, and needs a model with mtp when positive"
    check_value("forward_flops", "mtp_depths", mtp_depths, valid, rule)
