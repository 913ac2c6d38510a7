"""How fast three models could decode, by bytes and FLOPs alone: calculated, never measured.

python -m tests.benchmarks.rooflines prints the table of docs/performance.md. A step reads every
weight that some row touches, each row's keys and values, and reads and writes its recurrent state.
What kernels, collectives and scheduling cost is left out, so ratios say what the architectures
allow, not what servers reach.
"""

import dataclasses

from configs import models
from nemotron_jax.model import accounting
from nemotron_jax.model.roofline import experts_touched

# Of one B200: bytes and dense BF16 FLOPs a second, and memory left for weights and states.
BANDWIDTH, FLOPS, MEMORY = 8e12, 2.25e15, 180e9
# Bytes of a weight: NVFP4 has a scale byte for 16 codes, MXFP4 one for 32.
NVFP4, MXFP4, FP8, BF16 = 0.5 + 1 / 16, 0.5 + 1 / 32, 1.0, 2.0
PROMPT, NEW = 8192, 65_536  # tokens of a request
MEAN_CONTEXT = PROMPT + NEW // 2


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What a step of decoding has to move; parameters in units, the rest in bytes."""

    name: str
    expert: int  # parameters of one routed expert
    num_experts: int
    experts_per_token: int
    moe_layers: int
    dense: int  # parameters that every token touches, the embedding left out
    expert_bytes: float  # of a parameter
    dense_bytes: float
    kv_token: float  # bytes that one more token of context adds and a step reads
    kv_fixed: float  # bytes of full sliding windows
    state: float  # bytes of the recurrent state, read and written by a step

    def weights(self, rows: float) -> float:
        """Bytes of what `rows` tokens touch between them."""
        touched = experts_touched(self.num_experts, self.experts_per_token, rows)
        return (
            self.moe_layers * touched * self.expert * self.expert_bytes
            + self.dense * self.dense_bytes
        )

    def row(self, context: int) -> float:
        """Bytes that one sequence keeps."""
        return context * self.kv_token + self.kv_fixed + self.state

    def most_rows(self, devices: int, context: int) -> int:
        """Sequences that fit beside the weights."""
        room = devices * MEMORY - self.weights(1e9)
        return int(room // self.row(context))

    def tokens_per_second(self, rows: int, devices: int, context: int) -> float:
        """Of all rows together."""
        moved = self.weights(rows) + rows * (self.row(context) + self.state)
        active = self.moe_layers * self.experts_per_token * self.expert + self.dense
        flops = 2 * rows * active
        return rows / max(moved / BANDWIDTH / devices, flops / FLOPS / devices)


def nemotron_super(expert_bytes: float, dense_bytes: float, kv_bytes: int) -> Decoder:
    """Super by its own accounting."""
    config = models.super_120b()
    moe, layers = config.moe, config.pattern.count("E")
    expert = 2 * moe.expert_width * moe.latent_width
    active = accounting.active_parameters(config, embedding=False)
    state = accounting.decode_state(config, 1)
    kv = accounting.decode_state(config, 2).kv - state.kv
    return Decoder(
        "Nemotron 3 Super",
        expert,
        moe.num_experts,
        moe.experts_per_token,
        layers,
        active - layers * moe.experts_per_token * expert,
        expert_bytes,
        dense_bytes,
        kv * kv_bytes / 2,
        0.0,
        state.ssm + state.conv,
    )


def gpt_oss_120b() -> Decoder:
    """36 layers of 2,880; 64 query and 8 key heads of 64; every other layer sees 128 tokens.

    Source: openai/gpt-oss-120b, config.json.
    """
    width, layers, heads, kv_heads, head_dim = 2880, 36, 64, 8, 64
    attention = width * head_dim * (heads + 2 * kv_heads) + heads * head_dim * width
    kv_layer = 2 * kv_heads * head_dim * 2  # BF16
    return Decoder(
        "GPT-OSS-120B",
        3 * width * 2880,
        128,
        4,
        layers,
        layers * (attention + 128 * width) + 201_088 * width,
        MXFP4,
        BF16,
        layers // 2 * kv_layer,
        layers // 2 * kv_layer * 128,
        0.0,
    )


def qwen35_122b() -> Decoder:
    """48 layers of 3,072, every fourth with attention (32 query, 2 key heads of 256), the others
    Gated DeltaNet (16 key heads and 64 value heads of 128, a convolution of 4); a shared expert.

    Source: Qwen/Qwen3.5-122B-A10B; its 64 value heads are inferred from its 10B active parameters.
    """
    width, layers, attending = 3072, 48, 12
    keys, values = 16 * 128, 64 * 128
    delta = width * (2 * keys + 2 * values + 2 * 64) + values * width
    attention = width * 256 * (2 * 32 + 2 * 2) + 32 * 256 * width
    expert = 3 * width * 1024
    dense = (layers - attending) * delta + attending * attention
    dense += layers * (expert + 256 * width) + 248_320 * width
    matrix = 64 * 128 * 128 * 4  # float32, as its config says
    convolution = (2 * keys + values) * 3 * 2
    return Decoder(
        "Qwen3.5-122B",
        expert,
        256,
        8,
        layers,
        dense,
        BF16,
        BF16,
        attending * 2 * 2 * 256 * 2,
        0.0,
        (layers - attending) * (matrix + convolution),
    )


DECODERS = (
    ("NVFP4 experts, FP8 rest and KV", nemotron_super(NVFP4, FP8, 1)),
    ("BF16", nemotron_super(BF16, BF16, 2)),
    ("MXFP4 experts, BF16 rest and KV", gpt_oss_120b()),
    ("BF16", qwen35_122b()),
)


def table(devices: int = 8) -> list[str]:
    """Markdown lines: tokens a second of one B200 in a node, by rows and at most rows."""
    rows = (1, 32, 256)
    lines = [
        "| model | formats | GB of weights | MB a sequence | "
        + " | ".join(f"{n} rows" for n in rows)
        + " | most rows | there |",
        "|" + "---|" * (6 + len(rows)),
    ]
    for formats, decoder in DECODERS:
        most = decoder.most_rows(devices, MEAN_CONTEXT)
        speeds = [
            f"{decoder.tokens_per_second(n, devices, MEAN_CONTEXT) / devices:,.0f}"
            for n in (*rows, most)
        ]
        cells = [
            decoder.name,
            formats,
            f"{decoder.weights(1e9) / 1e9:.0f}",
            f"{decoder.row(MEAN_CONTEXT) / 1e6:,.0f}",
            *speeds[:-1],
            f"{most:,}",
            speeds[-1],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
