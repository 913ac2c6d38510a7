"""What a run leaves in its directory."""

import json
import subprocess
import sys

import jax
import pytest

from nemotron_jax.config.convert import from_json
from nemotron_jax.model.accounting import training_flops
from nemotron_jax.run_directory import RunDirectory
from nemotron_jax.training import metrics
from nemotron_jax.training.metrics import MetricsLog, SamplesLog, Speed
from nemotron_jax.training.plots import draw_curves, smoothed
from tests.training.runs import LENGTH, ROOT, ROWS, changed, small_run, train

NAMES = {
    "step",
    "tokens",
    "loss",
    "mtp_loss",
    "aux_loss",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
    "mfu",
    "expert_load_max",
    "expert_load_95",
    "expert_load_5",
    "expert_load_min",
    "skipped",
    "seconds",
    "processes",
}
HELD_OUT = {"held_out_loss", "bits_per_byte", "unigram_entropy", "gzip_bits_per_byte"}


def test_every_logged_step_is_one_record(finished_run):
    _, directory, outcome = finished_run
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records == list(outcome.records)
    assert [record["step"] for record in records] == list(range(1, 13))
    for record in records:
        evaluated = record["step"] in (6, 12)
        assert record.keys() == NAMES | (HELD_OUT if evaluated else set())
        assert record["tokens"] == record["step"] * ROWS * LENGTH
        assert record["mfu"] is None  # a CPU's peak is not known
    assert records[-1]["loss"] < records[0]["loss"]
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_records_come_at_their_steps(texts, tmp_path):
    config = small_run(texts, log_every=5, evaluate_every=4)
    records = train(config, tmp_path).records
    assert [record["step"] for record in records] == [4, 5, 8, 10, 12]
    assert [record["step"] for record in records if "held_out_loss" in record] == [4, 8, 12]


def test_the_directory_holds_what_a_run_promises(finished_run):
    config, directory, _ = finished_run
    assert from_json((directory / "config.json").read_text()) == config
    names = {path.name for path in directory.iterdir()}
    assert {"metrics.jsonl", "tensorboard", "checkpoints", "tokenizer.json", "plots"} <= names
    assert list((directory / "tensorboard").glob("events*"))
    assert len(list((directory / "checkpoints").iterdir())) == config.logging.keep_checkpoints
    assert (directory / "plots/loss.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((directory / "plots/loss.json").read_text())
    assert len(data["training loss"]) == 12 and len(data["held-out loss"]) == 2


def test_a_plot_of_nothing_is_drawn_too(tmp_path):
    assert draw_curves([], RunDirectory(tmp_path)).exists()
    for name in ("loss", "reward"):
        records = [{"step": 1, "tokens": 3, name: None}]
        assert draw_curves(records, RunDirectory(tmp_path)) == tmp_path / f"plots/{name}.png"
        assert (tmp_path / f"plots/{name}.png").exists()


def test_a_curve_is_smoothed_by_the_mean_around_each_point():
    noise = [float(n % 2) for n in range(100)]
    calm = smoothed(noise)
    assert calm[0] == 0.0 and calm[-1] == 1.0 and len(calm) == 100  # the ends have no neighbours
    assert max(abs(value - 0.5) for value in calm[5:-5]) < 0.06
    assert smoothed([2.0] * 7) == [2.0] * 7 and smoothed([]) == []
    line = [float(n) for n in range(50)]
    assert smoothed(line) == pytest.approx(line)


def test_a_directory_has_one_owner(finished_run):
    """Another process that trains there is told so, and a dead one is no owner."""
    config, directory, _ = finished_run
    code = (
        "import sys, time; from nemotron_jax.run_directory import RunDirectory\n"
        "from nemotron_jax.training.signals import sole_owner\n"
        "with sole_owner(RunDirectory(sys.argv[1])): print('held', flush=True); time.sleep(99)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], cwd=ROOT, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="being trained by another process"):
            train(config, directory)
        other.kill()
    assert train(config, directory).finished


def test_a_damaged_line_costs_itself_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1}', b"", b'{"step": 2}', b'\xff\xfe{"st', b"[7]", b'{"step": "x"}']
    lines += [b'{"step": 3, "x": {}}', b"[" * 100_000, b'{"step": 2}', b'{"step": 4, "loss": NaN}']
    before = b"\n".join([*lines, b'{"step": 5'])  # the last line was cut off by a kill
    path.write_bytes(before)
    (tmp_path / "metrics.jsonl.damaged").touch()
    with pytest.warns(UserWarning, match="lines 2, 4, 5, 6, 7 are damaged.*jsonl.damaged.1"):
        log = MetricsLog(path, 9)
    assert (tmp_path / "metrics.jsonl.damaged.1").read_bytes() == before
    log.append({"step": 5, "loss": float("inf"), "count": 2})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 4, "loss": None},
        {"step": 5, "loss": None, "count": 2},
    ]
    MetricsLog(path, 9).close()  # whole now: no warning, no copy
    assert not (tmp_path / "metrics.jsonl.damaged.2").exists()


def test_no_sample_looks_like_a_heading_to_a_run_that_goes_on(tmp_path):
    """Whatever characters it holds, and where a kill has cut the last one short."""
    path = tmp_path / "samples.txt"
    texts = ["a\u2028step 9\nb", "a\x85step 9\x85", "step 9\r\nstep 9\x1c", "\u2029step 99999"]
    log = SamplesLog(path, 0)
    for step, text in enumerate(texts, start=1):
        log.append(step, text)
    before = path.read_bytes()
    path.write_bytes(before + b"step 5\n  cut")
    SamplesLog(path, 4)
    assert path.read_bytes() == before
    path.write_bytes(before[:-3])
    SamplesLog(path, 4).append(5, "x")
    assert path.read_bytes() == before[:-3] + b"\nstep 5\n  x\n"
    SamplesLog(path, 1)
    assert path.read_text("utf-8") == "step 1\n  a\u2028step 9\n  b\n"


def test_utilisation_is_flops_over_the_peak(texts, monkeypatch):
    config = small_run(texts)
    clock = iter([10.0, 12.0, 12.0, 20.0, 50.0, 51.0, 51.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda: 1e9)
    flops = training_flops(config.model, LENGTH, mtp_depths=2).total
    speed = Speed(ROWS * LENGTH, flops, 0)
    speed.resume()
    read = speed.read(4)
    assert read["tokens_per_second"] == 4 * ROWS * LENGTH / 2
    assert read["mfu"] == pytest.approx(2 * ROWS * LENGTH * flops / 1e9)
    speed.pause()  # at 20 s, and until 50 s the run evaluates
    speed.resume()
    assert speed.read(5)["seconds"] == 2 + 8 + 1


def test_peaks_are_found_by_the_kind_of_device(monkeypatch):
    class Device:
        def __init__(self, kind):
            self.device_kind = kind

    for kind, peak in {
        "TPU v5 lite": 197e12,
        "TPU v5": 459e12,
        "TPU v5p": 459e12,
        "TPU7x": 1153e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H200": 989e12,
        "cpu": None,
    }.items():
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [Device(kind)] * 4)
        assert metrics.peak_flops() == (None if peak is None else 4 * peak)


def test_an_evaluator_and_a_sampler_see_the_model(texts, tmp_path):
    seen = []

    def samples(model):
        seen.append(float(model.embedding[...][0, 0]))
        return f"sample {len(seen)}"

    config = changed(small_run(texts), training={"steps": 6}, logging={"evaluate_every": 3})
    outcome = train(config, tmp_path, samples=samples)
    assert (tmp_path / "samples.txt").read_text() == "step 3\n  sample 1\nstep 6\n  sample 2\n"
    assert seen[0] != seen[1] == float(outcome.model.embedding[...][0, 0])
