"""What arithmetic says of a run: compiled facts it agrees with, and laws that it keeps."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from configs import (
    models,
    nano,
    pretrain_super_phase1,
    qad_tiny,
    rlhf_super,
    rlvr_super,
    sft_nano,
    sft_super,
)
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.precision import PrecisionConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.model import accounting
from nemotron_jax.planning import slices, text
from nemotron_jax.planning.estimate import Question, estimate, over_slices
from nemotron_jax.planning.train import Planner
from pallas_kernels.devices import slice_of
from tests.planning import test_compiled_experts

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs/evidence"
SUPER = from_config_dict(RunConfig, pretrain_super_phase1.get_config())
BF16 = dataclasses.replace(
    SUPER, execution=dataclasses.replace(SUPER.execution, precision=PrecisionConfig())
)
V5P = slice_of("v5p:8x8x4")
ALONG_FSDP = {"data": 2, "fsdp": 128}


def of(config: RunConfig, mesh: dict | None, links: int | None = None, target: str = "v5p:8x8x4"):
    return estimate(Question(config, mesh=mesh, links=links), slice_of(target))


@pytest.mark.parametrize(
    ("build", "target", "mesh", "gigabytes"),
    [
        (pretrain_super_phase1, "v5p:8x8x4", ALONG_FSDP, 66.6),
        (pretrain_super_phase1, "v5p:8x8x4", {"data": 2, "fsdp": 16, "expert": 8}, 49.8),
        (sft_super, "v5p:8x8x4", ALONG_FSDP, 59.0),
        (nano, "v6e:8x8", {"fsdp": 64}, 22.2),
        (sft_nano, "v6e:4x4", {"fsdp": 16}, 18.3),
    ],
)
def test_bytes_are_near_those_of_the_compiled_step(build, target, mesh, gigabytes) -> None:
    config = from_config_dict(RunConfig, build.get_config())
    if config.lora:  # as it was compiled
        config = with_base(config, "float32")
    report = of(config, mesh, target=target)
    size = report["bytes_per_device"]
    assert size["total"] / 1e9 == pytest.approx(gigabytes, rel=0.2)
    parts = [n for name, n in size.items() if name not in ("total", "available")]
    assert sum(parts) == size["total"] and report["fits"]


@pytest.mark.parametrize(
    ("name", "experts", "rows"),
    [
        ("lora_nano_v6e", "dense", 1.25),
        ("lora_nano_v6e_one_load", "dense", 1.0),
        ("lora_nano_packed_v6e", "nvfp4", 1.25),
    ],
)
def test_what_experts_exchange_is_counted_in_bytes(name: str, experts: str, rows: float) -> None:
    compiled = json.loads((EVIDENCE / f"{name}.json").read_text())
    values = sft_nano.get_config()
    values.mesh.update(compiled["mesh"])
    values.data.batch_size, values.execution.expert_rows = compiled["rows"], rows
    config = with_base(from_config_dict(RunConfig, values), "bfloat16", experts)
    found = of(config, compiled["mesh"], target=compiled["target"])["bytes_per_device"]["total"]
    assert found == pytest.approx(compiled["bytes_per_device"]["total"], rel=0.1)


def with_base(config: RunConfig, dtype: str, experts: str = "dense") -> RunConfig:
    base = dataclasses.replace(config.lora, base_dtype=dtype, base_experts=experts)
    return dataclasses.replace(config, lora=base)


def test_the_base_of_adapters_is_counted_in_its_own_format() -> None:
    config = from_config_dict(RunConfig, sft_nano.get_config())
    size = {
        base: of(with_base(config, *base), {"fsdp": 16}, target="v6e:4x4")["bytes_per_device"]
        for base in (("float32",), ("bfloat16",), ("bfloat16", "nvfp4"))
    }
    whole, half, codes = (one["parameters"] for one in size.values())
    assert half == whole // 2 and codes < 0.4 * half
    # Float32 is cast to compute with, and the cast is kept; bfloat16 is what is computed with.
    kept = size["float32",]["temporaries"] - size["bfloat16",]["temporaries"]
    assert kept == pytest.approx(half, abs=2)


def test_a_teacher_and_a_reference_are_counted_beside_the_run() -> None:
    """A teacher that is not here is taken to be like the student, without its drafts."""
    student = from_config_dict(RunConfig, qad_tiny.get_config())
    alone = dataclasses.replace(student, stage="pretrain")
    parameters = lambda config: of(config, {"fsdp": 8}, target="v6e:2x4")["bytes_per_device"][
        "parameters"
    ]
    main = accounting.parameters(student.model).main
    assert parameters(student) - parameters(alone) == pytest.approx(4 * main / 8, abs=2)
    half = dataclasses.replace(student.distill, dtype="bfloat16")
    half = parameters(dataclasses.replace(student, distill=half)) - parameters(alone)
    assert half == pytest.approx(2 * main / 8, abs=2)

    config = from_config_dict(RunConfig, rlhf_super.get_config())
    objective = dataclasses.replace(config.rl.objective, kl_weight=0.0)
    without = dataclasses.replace(config, rl=dataclasses.replace(config.rl, objective=objective))
    sizes = [Planner(one, V5P).size(ALONG_FSDP, 1)["parameters"] for one in (config, without)]
    assert sizes[0] == 2 * sizes[1]


def test_super_moves_over_links_what_its_compiled_step_gathers_and_scatters() -> None:
    step = Planner(SUPER, V5P).step(ALONG_FSDP, 12)
    # 6.05 TB gathered, 6.14 TB scattered: whole arrays, of which a device lacks 127/128.
    weights = sum(
        seconds / step.layout.weights
        for name, seconds in step.network.items()
        if name != "sums over data"
    )
    assert weights == pytest.approx(12.19e12, rel=0.01)


def test_supers_seconds_are_those_worked_out_by_hand() -> None:
    report = of(SUPER, ALONG_FSDP)
    seconds = report["estimated_step_seconds"]
    assert report["constants"]["links"] == 5 and 60 <= seconds["total"] <= 72
    assert seconds["network"] == pytest.approx(26.9, rel=0.05)
    assert seconds["products"] + seconds["memory"] == pytest.approx(40.2, rel=0.05)
    assert of(SUPER, ALONG_FSDP, links=2)["estimated_step_seconds"]["total"] == pytest.approx(
        107, rel=0.03
    )
    parts = [seconds[name] for name in ("products", "memory", "network")]
    assert seconds["total"] == pytest.approx(sum(parts) - seconds["network_hidden"], rel=1e-4)
    assert sum(report["estimated_parts"].values()) == pytest.approx(seconds["total"], rel=1e-4)


@pytest.mark.parametrize(
    ("expert", "milliseconds", "tokens"),
    [(1, 1675, 0), (4, 778, 95), (8, 608, 222), (16, 606, 238)],
)
def test_the_network_of_a_micro_batch_by_experts_over_six_links(
    expert, milliseconds, tokens
) -> None:
    mesh = {"data": 2, "fsdp": 128 // expert, "expert": expert}
    network = Planner(SUPER, V5P, 6).step(mesh, 12).network
    own = sum(seconds for name, seconds in network.items() if name != "sums over data")
    # Worked out with 100 GB/s a link, the sheet's sum; the book's 90 are slower by a ninth. And
    # with tokens' sums made twice, in float32: of 18 bytes of a number 4 are no longer moved.
    by_hand = milliseconds - tokens * 4 / 18
    assert own / 12 * 1e3 == pytest.approx(by_hand * 100 / 90, rel=0.03)
    assert sum(network.values()) / 12 * 1e3 == pytest.approx(milliseconds, rel=0.15)


def test_experts_that_stay_pay_over_five_links() -> None:
    mesh = {"data": 2, "fsdp": 16, "expert": 8}
    for config, least in ((SUPER, 0.36), (BF16, 0.43)):
        report = of(config, mesh)
        assert report["mfu"] >= least and report["constants"]["links"] == 5
        assert (
            report["link_bytes_per_device"] < 0.28 * of(config, ALONG_FSDP)["link_bytes_per_device"]
        )


def test_twice_the_rows_are_twice_the_products_and_the_same_weights() -> None:
    data = dataclasses.replace(SUPER.data, batch_size=2 * SUPER.data.batch_size)
    twice = Planner(dataclasses.replace(SUPER, data=data), V5P).step(ALONG_FSDP, 12)
    once = Planner(SUPER, V5P).step(ALONG_FSDP, 12)
    for part, seconds in once.products.items():
        assert twice.products[part] == pytest.approx(2 * seconds)
    assert twice.network == once.network


def test_no_slice_needs_more_than_the_mesh_that_is_chosen() -> None:
    place = slice_of("v5p:4x4x8")
    chosen = slices.best(SUPER, place)
    assert chosen.fits(place) and math.prod(chosen.mesh.values()) == place.size
    planner = Planner(SUPER, place)
    for data in (1, 2, 4):
        mesh = {"data": data, "fsdp": 128 // data}
        step = planner.step(mesh, 24)
        fits = sum(step.size.values()) <= 0.9 * place.device.memory
        assert not fits or step.seconds >= chosen.step.seconds


def test_all_slices_are_one_table_and_the_small_ones_do_not_fit() -> None:
    reports = over_slices(Question(SUPER))
    assert {report["target"] for report in reports} == set(slices.RENTED)
    fits = {report["target"] for report in reports if report.get("fits")}
    assert "v5p:8x8x4" in fits and not {"v6e:2x4", "h100:8"} & fits
    for report in reports:
        size = report["bytes_per_device"]
        assert report["fits"] == (size["total"] <= 0.9 * size["available"])
        assert 0 < report["mfu"] < 0.7


def test_gpus_are_estimated_and_hosts_are_slower_than_a_switch() -> None:
    for target in ("h100:8", "b200:8", "h200:64"):
        report = of(SUPER, None, target=target)
        assert report["devices"] == slice_of(target).size
        assert not report["constants"]["static_kernels"]
    one, many = (of(BF16, {"fsdp": n}, target=f"h100:{n}") for n in (8, 64))
    share = [r["estimated_step_seconds"]["network"] / r["micro_batches"] for r in (one, many)]
    assert share[1] > share[0]


def test_decoding_counts_rows_states_and_drafts() -> None:
    ask = Question(SUPER, stage="decode", rows=64, context=32_768, experts="nvfp4")
    place = slice_of("b200:8")
    plain = estimate(ask, place)
    rates = plain["decode"]
    assert plain["estimated"] and plain["stage"] == "decode" and plain["fits"]
    total = plain["estimated_step_seconds"]["total"]
    assert rates["tokens_per_second"] == pytest.approx(64 / total, rel=1e-3)
    assert rates["tokens_per_second_user"] == pytest.approx(1 / total, rel=1e-3)
    assert rates["speculative"] is None and rates["rows_that_fit"] >= 64
    full = estimate(dataclasses.replace(ask, rows=rates["rows_that_fit"]), place)
    more = estimate(dataclasses.replace(ask, rows=rates["rows_that_fit"] + 64), place)
    assert full["fits"] and not more["fits"]
    drafts = dataclasses.replace(ask, speculative=3, acceptance=2.7)
    fast = estimate(drafts, place)["decode"]["speculative"]
    assert (fast["k"], fast["mean_length"]) == (3, 2.7)
    none = dataclasses.replace(drafts, acceptance=1.0)
    slow = estimate(none, place)["decode"]["speculative"]["tokens_per_second"]
    assert slow < rates["tokens_per_second"] < fast["tokens_per_second"]
    assert fast["tokens_per_second"] == pytest.approx(2.7 * slow, rel=1e-3)
    dense = estimate(dataclasses.replace(ask, experts="dense"), place)
    ratio = [r["bytes_per_device"]["parameters"] for r in (plain, dense)]
    assert ratio[0] < 0.4 * ratio[1]


def test_reinforcement_is_rollout_scoring_and_step() -> None:
    config = from_config_dict(RunConfig, rlvr_super.get_config())
    report = estimate(Question(config, stage="grpo", mesh=ALONG_FSDP), V5P)
    parts = report["grpo"]
    assert set(parts) == {"rollout", "scoring", "step"}
    seconds = [part["seconds"] for part in parts.values()]
    assert sum(seconds) == pytest.approx(report["estimated_step_seconds"]["total"], rel=1e-3)
    assert parts["rollout"]["tokens"] == 4096 * 49_152
    alone = estimate(Question(config, mesh=ALONG_FSDP), V5P)["estimated_step_seconds"]["total"]
    assert parts["step"]["seconds"] == pytest.approx(alone, rel=1e-3)
    # A pass forward is less than a third of one with remat and a backward pass.
    assert parts["scoring"]["seconds"] < alone / 3


@pytest.mark.parametrize(
    ("changes", "target", "sentence"),
    [
        ({"mesh": {"data": 2, "fsdp": 64}}, "v5p:8x8x4", "has 256 devices, but .* is 128"),
        ({"mesh": {"fsdp": 128, "tensor": 2}}, "v5p:8x8x4", "mesh.tensor=2"),
        ({"mesh": {"fsdp": 5}}, "h100:5", "batch_size=3072: must be a multiple of"),
        ({"mesh": {"expert": 3}}, "h100:3", "must divide the model's 512 experts"),
        ({}, "h100:7", "is not a multiple of its 7 devices"),
        ({}, "cpu:8", "must be a TPU with the sides"),
        ({}, "v6e:8x8x8", "v6e has 2 sides"),
        ({}, "v5p:99999x99999x9", "no slice is that large"),
        ({"stage": "serve"}, "h100:8", "--stage=serve: must be one of train, decode, grpo"),
        ({"experts": "fp4"}, "h100:8", "--experts=fp4: must be one of dense, nvfp4"),
        ({"speculative": 33}, "h100:8", "--speculative=33"),
        ({"speculative": 2, "acceptance": 3.5}, "h100:8", "--acceptance=3.5: .* 1 and 3"),
        ({"rows": 0}, "h100:8", "--rows=0"),
        ({"links": 0}, "h100:8", "--links=0"),
    ],
)
def test_what_cannot_be_estimated_is_one_sentence(changes, target, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        estimate(Question(SUPER, **changes), slice_of(target))


def test_it_answers_without_jax_and_takes_experts_on_the_mesh(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('nemotron_jax.plan', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    arguments = ["--estimate", "--target=v5p:8x8x4", "--config=configs/pretrain_super_phase1.py"]
    arguments += [f"--json={file}", "--config.mesh.fsdp=16", "--config.mesh.expert=8"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["mesh"]["expert"] == 8 and report["estimated"] and report["stage"] == "train"
    assert report["constants"] == {
        **{"flops": 4.59e14, "hbm": 2.765e12, "link": 9e10, "links": 5},
        **{"dense_products": 0.9, "static_kernels": True},
    }
    assert "459 TFLOP/s, 2.765 TB/s, 90 GB/s a link, 5 links" in done.stdout


def test_a_model_alone_is_asked_which_slice_serves_it() -> None:
    run = from_config_dict(RunConfig, models.get_config("super_120b"))
    assert run.model == SUPER.model
    ask = Question(run, stage="decode", speculative=3, acceptance=2.7)
    places = [slice_of(target) for target in ("v6e:2x4", "h100:8")]
    table = text.many([estimate(ask, place) for place in places])
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "rows that fit" in lines[0] and lines[0].endswith("with drafts")
    assert "35 of 32 no" in lines[1] and "35 of 80 fits" in lines[2]
    plain = text.many(
        [estimate(dataclasses.replace(ask, speculative=0, acceptance=None), places[1])]
    )
    assert plain.splitlines()[0].endswith("tokens/s")
    with pytest.raises(ValueError, match=r"configs/models\.py:nano: must be one of super_120b"):
        models.get_config("nano")


@pytest.mark.parametrize(
    ("name", "config"),
    [("super_v5p", SUPER), ("super_two_units_v5p", test_compiled_experts.twin())],
)
def test_super_as_compiled_keeps_what_experts_that_stay_promise(name, config) -> None:
    file = ROOT / "docs" / "evidence" / f"{name}.json"
    test_compiled_experts.check(json.loads(file.read_text()), config)
