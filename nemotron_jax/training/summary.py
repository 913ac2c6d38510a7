"""What a finished run reached, in a few lines."""

from collections.abc import Sequence

from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training.metrics import Record
from nemotron_jax.training.plots import LOSS


def summary(records: Sequence[Record], directory: RunDirectory) -> str:
    """What a finished run reached, as a short table."""
    last = next((record for record in reversed(records) if "held_out_loss" in record), {})
    speeds = [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
    rows = {"held-out loss": "not known: metrics.jsonl holds no evaluation"}
    if last:
        rows |= _held_out_rows(last)
    if "success" in last:
        before = next(record["success"] for record in records if "success" in record)
        rows["success"] = f"{last['success']:.2f} of held-out tasks, {before:.2f} at first"
    rows |= {
        "speed": f"{sorted(speeds)[len(speeds) // 2]:,.0f} tokens/s" if speeds else "not measured",
        "loss curve": directory.plots / LOSS,
        "checkpoints": directory.checkpoints,
    }
    if (samples := directory.samples).exists() and samples.stat().st_size:
        rows["samples"] = samples
    return "\n".join(f"{name:15}{value}" for name, value in rows.items())


def _held_out_rows(last: Record) -> dict[str, str]:
    """Loss and bits beside what they are read against: of the same text, all of it where known."""
    whole = "whole_held_out_loss" in last
    value = lambda name: last.get(f"whole_{name}" if whole else name)
    loss, entropy, bits = map(value, ("held_out_loss", "unigram_entropy", "bits_per_byte"))
    if loss is None:
        return {"held-out loss": "not finite"}
    rows = {"held-out loss": f"{loss:.3f} nats/token"}
    if entropy is not None:
        side = "below" if loss <= entropy else "above"
        rows["held-out loss"] += (
            f", {abs(entropy - loss):.3f} {side} the entropy of single tokens ({entropy:.3f})"
        )
    if bits is not None:
        rows["bits per byte"] = f"{bits:.3f}"
        rows["bits per byte"] += f" (gzip: {value('gzip_bits_per_byte'):.3f})" if whole else ""
    return rows
