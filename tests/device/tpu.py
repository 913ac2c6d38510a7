"""What tests/device/tpu.sh runs: kernels checked and timed, ten steps trained, one report."""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORMAT = "nemotron_jax.device"
STEPS = 10
# Seconds that timing may take before the steps are trained; of 480 in all, a first compilation of
# the step takes up to a hundred.
TIMING = 240
TRAIN = [
    *(f"--config.training.steps={STEPS}", "--config.logging.log_every=1"),
    *("--config.logging.evaluate_every=1000", "--config.logging.sample_tokens=0"),
]
SMALL = [
    *("--config.model.pattern=ME", "--config.model.width=64", "--config.model.vocab_size=512"),
    *("--config.training.mtp_depths=0", "--config.data.sequence_length=64"),
    *("--config.data.batch_size=4", "--config.training.loss_chunk=64"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the arguments say; the exit status."""
    parser = argparse.ArgumentParser(prog="tests/device/tpu.sh", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--interpret", action="store_true", help="interpret the kernels on a CPU")
    flags = parser.parse_args(arguments)
    # In a process of its own, and first: a TPU serves one process at a time.
    trained = train(flags.output / "train", flags.interpret)
    report = {"format": FORMAT, "format_version": 1, **kernels(flags.interpret), "train": trained}
    if report["device"] is None:
        print("tpu.sh: no TPU here; run it on a TPU VM, or with --interpret", file=sys.stderr)
        return 2
    (flags.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    text = "\n".join(lines(report))
    (flags.output / "report.txt").write_text(text + "\n", "utf-8")
    print(text)
    return 0 if trained["holds"] and all(row["holds"] for row in report["checks"]) else 1


def train(directory: Path, interpreted: bool) -> dict:
    """Ten steps of the tiny model on one device: finite losses that fall, and how fast."""
    command = [sys.executable, "train.py", "--config=configs/pretrain_tiny.py"]
    command += [f"--workdir={directory}", *TRAIN]
    command += SMALL if interpreted else ["--config.execution.compute_dtype=bfloat16"]
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    row = {"steps": 0, "holds": False, "seconds": round(time.monotonic() - begin, 1), "why": ""}
    if done.returncode:
        return row | {"why": done.stderr.strip()[-500:]}
    records = [json.loads(one) for one in (directory / "metrics.jsonl").read_text().splitlines()]
    records = [one for one in records if "loss" in one]
    losses = [one["loss"] for one in records]
    rates = [one["tokens_per_second"] for one in records if one.get("tokens_per_second")]
    holds = len(losses) == STEPS and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    return row | {
        "steps": len(losses),
        "holds": holds,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_second": max(rates, default=None),
    }


def kernels(interpreted: bool) -> dict:
    """Device and mode, a row for each kernel that was checked, and one for each that was timed."""
    import jax

    from pallas_kernels.devices import DEVICES
    from tests.device.kernels import checked

    if interpreted:
        jax.config.update("jax_platforms", "cpu")
    here = jax.devices()[0]
    if here.platform != "tpu" and not interpreted:
        return {"device": None, "checks": [], "times": []}
    checks = list(checked(interpreted))
    known = [one for one in DEVICES.values() if here.device_kind.startswith(one.kinds)]
    times = [] if interpreted or not known else list(_times(known[0]))
    mode = "interpreted" if interpreted else "compiled"
    return {"device": here.device_kind, "mode": mode, "checks": checks, "times": times}


def _times(device: object) -> Iterator[dict]:
    from pallas_kernels.prove import all_proofs
    from tests.device.kernels import timed

    begin = time.monotonic()
    for proof in all_proofs():
        if time.monotonic() - begin > TIMING:
            yield {"kernel": proof.kernel, "shape": proof.shape, "why": "not reached in time"}
        else:
            yield timed(proof, device)


def lines(report: dict) -> list[str]:
    """A report for a terminal."""
    found = [f"{report['device']}, kernels {report['mode']}"]
    for row in report["checks"]:
        verdict = "holds" if row["holds"] else "FAILS"
        found.append(f"{row['kernel']:40}{row['error']:>10.1e}  {row['of']:24}{verdict}")
    show = lambda value: "-" if value is None else f"{value:.3f}"
    if report["times"]:
        found.append(f"{'milliseconds':64}{'kernel':>10}{'XLA':>10}{'floor':>10}")
    for row in report["times"]:
        name = f"{row['kernel']}, {row.get('direction', '')}, {row['shape']}"
        figures = [f"{show(row.get(key)):>10}" for key in ("ms", "xla_ms", "floor_ms")]
        found.append(f"{name:64}{''.join(figures)}  {row['why']}".rstrip())
    if not report["times"]:
        found.append("nothing was timed: that needs a TPU of a known kind")
    trained = report["train"]
    verdict = "holds" if trained["holds"] else f"FAILS {trained['why']}"
    rate = trained.get("tokens_per_second")
    found.append(
        f"{trained['steps']} steps of training in {trained['seconds']} s with compiling, loss "
        f"{show(trained.get('first_loss'))} to {show(trained.get('last_loss'))}, "
        f"{0 if rate is None else rate:,.0f} tokens/s: {verdict}"
    )
    return found


if __name__ == "__main__":
    sys.exit(main())
