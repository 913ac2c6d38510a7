"""How prefill grows with the prompt: what attention takes of it, and what is left for a token.

Without its quadratic attention a hybrid's prefill costs the same for each token of any prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.cases import Case


def primitive_cases(lengths: Sequence[int]) -> list[Case]:
    """A large product; one layer's attention, and all but attention, over prompts so long."""
    product = Case("gemm", "gemm", batch=1, length=1, repetitions=20)
    parts = (
        Case(f"{kind}_{length}", kind, 1, length, repetitions=5)
        for length in lengths
        for kind in ("attention", "rest")
    )
    return [product, *parts]


def table(prefills: Mapping[int, Any], primitives: Mapping[str, Any]) -> list[str]:
    """Markdown lines, one row for each prefill whose attention was measured alone too."""
    gemm = _rate(primitives["gemm"])
    lines = [
        "",
        "## Prefill by length",
        "",
        f"A 1024×1024×1024 float32 product runs at {gemm:.1f} GFLOP/s here. Attention is measured "
        "alone, chunk by chunk as the prefill does it, with causal FLOPs counted once; the rest is "
        "the prefill of the model without attention layers. Bytes are those of the filled cache.",
        "",
        "| tokens | µs/token | attention µs/token | rest µs/token | attention GFLOP/s "
        "| of the product's | state bytes | peer's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length, contest in sorted(prefills.items()):
        alone = primitives.get(f"attention_{length}")
        if alone is None:
            continue
        best = min(each["best_s"] for each in contest.ours) / length * 1e6
        attention = alone["best_s"] * alone["layers"] / length * 1e6
        rest = primitives[f"rest_{length}"]["best_s"] / length * 1e6
        peer = f"{contest.peer[-1]['state_bytes']:,}" if contest.peer else "–"
        lines.append(
            f"| {length} | {best:.1f} | {attention:.1f} | {rest:.1f} "
            f"| {_rate(alone):.1f} | {_rate(alone) / gemm:.0%} "
            f"| {contest.ours[-1]['state_bytes']:,} | {peer} |"
        )
    return lines


def _rate(measured: Mapping[str, Any]) -> float:
    return measured["flops"] / measured["best_s"] / 1e9
