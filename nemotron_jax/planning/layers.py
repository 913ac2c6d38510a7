"""The matrix products of each kind of block: which role, how wide, how often for a token."""

import dataclasses

from nemotron_jax.config.model import ModelConfig

_LAST = ("mamba_out", "attention_out", "mlp_down", "shared_down", "latent_up")


@dataclasses.dataclass(frozen=True)
class Product:
    """One weight matmul of a block; `copies` matrices, of which a token takes `used`."""

    role: str
    given: int  # columns that it sums over
    made: int
    copies: int = 1
    used: int = 1

    @property
    def size(self) -> int:
        """Parameters of all copies."""
        return self.copies * self.given * self.made

    @property
    def flops(self) -> int:
        """Of one token, forward."""
        return 2 * self.used * self.given * self.made

    @property
    def ends_block(self) -> bool:
        """Whether it makes what the block adds: no gradient needs that, so it is not made again."""
        return self.role in _LAST

    @property
    def is_expert(self) -> bool:
        """Whether it is a product of routed experts, whose rows are a token's choices."""
        return self.role.startswith("expert_")


def products_of(config: ModelConfig, letter: str) -> tuple[Product, ...]:
    """The products of one block of a pattern's letter; the router's is not among them."""
    width = config.width
    if letter == "M":
        mamba = config.mamba
        made = mamba.inner_width + mamba.conv_channels + mamba.num_heads
        return (
            Product("mamba_in", width, made),
            Product("mamba_out", mamba.inner_width, width),
        )
    if letter == "*":
        attention = config.attention
        queries = attention.num_heads * attention.head_dim
        keys = attention.num_kv_heads * attention.head_dim
        return (
            Product("attention_q", width, queries),
            Product("attention_k", width, keys),
            Product("attention_v", width, keys),
            Product("attention_out", queries, width),
        )
    if letter == "-":
        hidden = config.mlp.width
        return (Product("mlp_up", width, hidden), Product("mlp_down", hidden, width))
    moe = config.moe
    inside = moe.latent_width or width
    every, used = moe.num_experts, moe.experts_per_token
    found = [
        Product("expert_up", inside, moe.expert_width, copies=every, used=used),
        Product("expert_down", moe.expert_width, inside, copies=every, used=used),
        Product("shared_up", width, moe.shared_width),
        Product("shared_down", moe.shared_width, width),
    ]
    if moe.latent_width:
        found += [Product("latent_down", width, inside), Product("latent_up", inside, width)]
    return tuple(found)


def blocks_of(config: ModelConfig, depths: int) -> list[tuple[str, int | None]]:
    """Every block of a training step by letter, with its layer; None for those of MTP's depths."""
    draft = config.mtp.pattern if config.mtp and depths else ""
    return [
        *((letter, layer) for layer, letter in enumerate(config.pattern)),
        *((letter, None) for letter in depths * draft),
    ]
