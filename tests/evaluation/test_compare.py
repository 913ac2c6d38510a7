"""Comparisons find what is there, and nothing where there is nothing."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy import stats

from nemotron_jax import evaluate
from nemotron_jax.evaluation import kept
from nemotron_jax.evaluation.compare import Side, compare, compare_sides, difference_of, flipped
from nemotron_jax.evaluation.report import write_report
from nemotron_jax.evaluation.statistics import (
    counts_of,
    items_of,
    pass_all,
    pass_at,
    pass_items,
    percent,
    value_over,
    wilson,
)
from nemotron_jax.evaluation.suite import Result, Value
from tests.evaluation.test_report import FACTS


def answers(chance, tasks, seed):
    """Right or wrong, by task, each task with a difficulty of its own."""
    generator = np.random.default_rng(seed)
    right = generator.random(len(tasks)) < np.clip(chance + tasks, 0, 1)
    return {f"task_{n}": (float(one), 1.0) for n, one in enumerate(right)}


def test_better_models_are_told_and_a_model_is_not_told_from_itself() -> None:
    difficulty = np.random.default_rng(0).normal(0, 0.2, 128)
    drawn = lambda chance, seed: answers(chance, difficulty, seed)
    found = [difference_of(drawn(0.3, seed), drawn(0.6, 99 + seed)) for seed in range(20)]
    assert sum(one["p"] < 0.05 for one in found) == 20
    itself = [difference_of(drawn(0.5, seed), drawn(0.5, 50 + seed)) for seed in range(20)]
    assert sum(one["p"] < 0.05 for one in itself) <= 3
    assert all(one["paired"] and one["n"] == 128 for one in found + itself)


def test_chance_finds_differences_as_often_as_the_level_says() -> None:
    """Also of ratios, whose items differ in size."""
    generator = np.random.default_rng(1)
    sizes, level = generator.integers(5, 200, 40), generator.normal(3, 0.5, 40)

    def losses(shift):
        each = level + shift + generator.normal(0, 0.2, 40)
        return {str(n): (float(e * s), float(s)) for n, (e, s) in enumerate(zip(each, sizes))}

    by_chance = np.mean([difference_of(losses(0), losses(0))["p"] < 0.05 for _ in range(200)])
    assert by_chance == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / 200))
    shifted = difference_of(losses(0), losses(-0.3))
    assert shifted["p"] < 0.001 and shifted["difference"] == pytest.approx(-0.3, abs=0.15)
    low, high = shifted["interval"]
    assert low < -0.3 < high < 0


def test_sign_flips_are_mcnemar_s_test() -> None:
    gained, lost, same = 9, 2, 30
    each = np.array([1.0] * gained + [-1.0] * lost + [0.0] * same)
    expected = stats.binomtest(lost, gained + lost, 0.5).pvalue
    assert flipped(each) == pytest.approx(expected)
    many = np.array([1.0] * 40 + [-1.0] * 20)
    assert flipped(many) == pytest.approx(stats.binomtest(20, 60, 0.5).pvalue, abs=0.003)
    assert flipped(np.zeros(5)) == 1.0 and flipped(np.ones(1)) == 1.0
    assert flipped(np.ones(10)) == pytest.approx(2 / 1024)


def test_items_in_common_are_paired_and_others_are_not() -> None:
    a = {f"a{n}": (float(n % 2), 1.0) for n in range(50)}
    b = {f"b{n}": (1.0, 1.0) for n in range(50)}
    apart = difference_of(a, b)
    assert not apart["paired"] and apart["n"] == 100 and apart["p"] < 1e-6
    assert difference_of(a, {**a, "c": (0.0, 1.0)})["n"] == 50 and difference_of(a, a)["p"] == 1.0


def test_shares_and_passes() -> None:
    low, high = wilson(8, 10)
    expected = stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0
    assert pass_at(1, 2, 1) == 0.5 and pass_at(1, 2, 2) == 1 and pass_all(1, 2, 2) == 0
    assert pass_at(0, 4, 2) == 0 and pass_all(4, 4, 3) == 1
    none = percent(value_over({str(n): (0.0, 1.0) for n in range(20)}))
    assert none.mean == 0 and none.interval == pytest.approx((0, 100 * wilson(0, 20)[1]))
    half = {"a": (0.5, 1.0), "b": (0.25, 1.0)}
    assert percent(value_over(half)).interval == pytest.approx(
        [100 * one for one in value_over(half).interval]
    )
    assert percent(value_over(half)).items == {"a": (50.0, 1.0), "b": (25.0, 1.0)}
    line = lambda task, score, **more: {
        "task": task,
        "score": score,
        "answered": score is not None,
        "finish_reason": "stop",
        **more,
    }
    lines = [line("a", 1.0), line("a", 0.0), line("c", None)]
    lines.append(line("b", 0.5, finish_reason="length"))
    lines.append(line("d", 0.0) | {"answered": False})
    assert items_of(lines) == {"a": (0.5, 1.0), "b": (0.5, 1.0), "d": (0.0, 1.0)}
    assert pass_items(lines, 1) == {"a": (0.5, 1.0), "b": (0.0, 1.0), "d": (0.0, 1.0)}
    assert pass_items(lines, 2) == {"a": (1.0, 1.0)}
    assert pass_items(lines, 2, every=True) == {"a": (0.0, 1.0)}
    assert dataclasses.astuple(counts_of(lines)) == (1, 1, 1)
    with pytest.raises(ValueError, match="no item"):
        value_over({})


def report(directory, values, *, suites=("toy",), metric="accuracy"):
    records = {}
    for name in suites:
        path = directory / "suites" / f"{name}-0.json"
        result = Result({metric: value_over(values), "speed_tokens_per_second": Value(3.0)})
        record = {"options": {}, "status": "ok", "why": "", "seconds": 0.0, "kept": path.name}
        records[name] = record | kept.record_of(result)
        kept.keep(path, {}, records[name])
    write_report(directory, FACTS, records, {})
    return directory


def test_reports_and_runs_are_compared_from_the_command_line(tmp_path, capsys) -> None:
    tasks = np.zeros(200)
    a = report(tmp_path / "a", answers(0.2, tasks, 0), suites=("toy", "gone"))
    b = report(tmp_path / "b", answers(0.8, tasks, 1))
    c = report(tmp_path / "c", answers(0.8, tasks, 1), metric="other")
    for side, last in ((a, 5.0), (b, 3.0)):
        records = [{"step": s, "tokens": 100 * s, "held_out_loss": last + 1 / s} for s in (1, 2)]
        (side / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    command = ["compare", str(a), str(b), str(c), f"--output={tmp_path / 'out'}"]
    assert evaluate.command(command) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["format"] == "nemotron_jax.compare"
    (pair,) = found["pairs"]
    assert (pair["suite"], pair["metric"]) == ("toy", "accuracy")
    assert (pair["a"], pair["b"], pair["n"]) == ("a", "b", 200)
    assert pair["significant"] and pair["paired"] and 0 < pair["p"] < 0.05
    assert pair["difference"] == pytest.approx(pair["b_mean"] - pair["a_mean"])
    assert {"suite": "gone", "metric": "", "lacks": "b"} in found["missing"]
    assert {"suite": "toy", "metric": "accuracy", "lacks": "c"} in found["missing"]
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "1 of 1 comparisons differ" in page and "data:image/png" in page
    curves = json.loads((tmp_path / "out" / "plots" / "runs_held_out_loss.json").read_text())
    assert set(curves["curves"]) == {"a", "b"}
    assert evaluate.command([*command, "--level=0.0000001"]) == 0
    strict = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert not strict["pairs"][0]["significant"]
    capsys.readouterr()
    for wrong, words in (
        ([command[0], str(a), command[-1]], "two directories or more"),
        ([*command, "--level=2"], "level=2"),
        (["compare", str(a), str(tmp_path / "none"), command[-1]], "neither a report nor a run"),
        (["rescore", str(tmp_path)], "holds no report.json"),
    ):
        assert evaluate.command(wrong) == 2
        said = capsys.readouterr().err
        assert words in said and len(said.splitlines()) == 1


def test_a_suite_that_failed_is_missing(tmp_path) -> None:
    assert compare_sides(Side("a", {}, ()), Side("b", {}, ()), 0.05) == ([], [])
    side = report(tmp_path / "a", answers(0.5, np.zeros(8), 0))
    data = json.loads((side / "report.json").read_text())
    data["suites"]["toy"]["kept"] = "../../../etc/passwd"
    (side / "report.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="neither a report"):
        compare([side, side], tmp_path / "out")


def test_runs_without_reports_show_their_balance_and_drafts_in_one_picture_each(tmp_path) -> None:
    drafts = {"acceptance/mean_length_3": 1.5, "acceptance/mean_length_3/code": 2.0}
    for name, steps in (("a", 30), ("b", 3)):
        records = [{"step": s, "tokens": 9 * s, "loss": 1.0, "expert_load_max": 2.0 + s % 2}
                   for s in range(1, steps + 1)]  # fmt: skip
        records[-1] |= drafts
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    read = lambda name: json.loads((tmp_path / "out" / "plots" / f"{name}.json").read_text())
    balance = read("runs_expert_load_max")
    assert [len(points) for points in balance["curves"].values()] == [30, 3]
    assert max(value for _, value in balance["curves"]["a"][5:-5]) < 2.8  # smoothed
    assert read("runs_acceptance_mean_length_3")["curves"] == {"a": [[270, 1.5]], "b": [[27, 1.5]]}
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "none has a report" in page and page.count("data:image/png") == 3  # and the loss
