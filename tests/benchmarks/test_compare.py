"""The comparison pairs what belongs together, and its workers still fit the code they measure."""

import json

import pytest

from nemotron_jax.config.hub_writer import to_hf
from tests.benchmarks import compare, ours, paired, scaling
from tests.benchmarks.cases import CASES, SCALING_LENGTHS, Case
from tests.tiny_models import tiny_config


def measured(best_s: float, **fields: float) -> dict:
    tokens = CASES["decode_1x64"].tokens
    usual = {"idle_mb": 300.0, "peak_mb": 400.0, "other_cores": 0.1, "first_run_s": 9.0}
    rates = {"tokens_per_second": tokens / best_s, "tokens_per_cpu_second": tokens / best_s / 2}
    extra = {"versions": {"jax": "1"}, "parameters": 1234, "state_bytes": 77, "best_s": best_s}
    return {**usual, **rates, **extra, **fields}


def contest() -> compare.Contest:
    """Ours is twice as fast in every round, while the machine slows down fourfold."""
    ours = [measured(0.1), measured(0.2, peak_mb=500.0), measured(0.4)]
    peer = [measured(0.2), measured(0.4, peak_mb=250.0), measured(0.8)]
    return compare.Contest(CASES["decode_1x64"], "", ours, peer)


def test_ratios_are_taken_round_by_round() -> None:
    assert contest().ratio("tokens_per_second") == pytest.approx(2.0)
    assert contest().ratio("peak_mb") == pytest.approx(1.0)
    assert compare.Contest(CASES["decode_1x64"], "", [measured(1)], []).ratio("peak_mb") is None


def test_the_table_shows_both_sides_and_the_goal() -> None:
    row = compare._row(contest())
    assert row.startswith("| decode_1x64 | 640 | 320 | 2.00 | 2.00 | ≥ 4 | 500 (300) | 400 (300) |")


def test_attention_and_the_rest_are_shown_by_token() -> None:
    case = CASES["prefill_1x2048"]
    attention = {"flops": 4e9, "best_s": 0.2, "layers": 2}
    primitives = {"gemm": {"flops": 1e9, "best_s": 0.01}, "attention_2048": attention}
    primitives["rest_2048"] = {"best_s": 0.6}
    line = scaling.table({2048: compare.Contest(case, "", [measured(1.0)])}, primitives)[-1]
    cells = [cell.strip() for cell in line.split("|")]
    # 1 s is 488.3 µs a token, two layers of 0.2 s 195.3, 0.6 s 293; 20 of 100 GFLOP/s are 20 %.
    assert cells[1:7] == ["2048", "488.3", "195.3", "293.0", "20.0", "20%"]
    names = [case.name for case in scaling.primitive_cases(SCALING_LENGTHS)]
    assert names[:3] == ["gemm", "attention_2048", "rest_2048"] and len(names) == 7


def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--cases=train_9x9"])
    assert "train_9x9: unknown; the cases are train_8x512" in capsys.readouterr().err


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "config.json"
    path.write_text(json.dumps(to_hf(tiny_config("M*"))))
    return str(path)


@pytest.mark.parametrize("kind", ["train", "prefill", "rest", "decode", "attention", "gemm"])
def test_our_worker_measures_every_kind(kind: str, config_file: str) -> None:
    case = Case("tiny", kind, batch=2, length=16, repetitions=2, new_tokens=4)
    found = ours.run_case(case, config_file, {"layers": "unrolled"} if kind == "train" else {})
    assert len(found["seconds"]) == 2 and found["best_s"] == min(found["seconds"]) > 0
    assert found["tokens_per_second"] == pytest.approx(case.tokens / found["best_s"])
    assert found["peak_mb"] > 50
    if kind in ("prefill", "decode"):
        assert found["state_bytes"] > 0
    if kind == "train":
        assert 2 < found["loss"] < 6 and found["temporary_mb"] > 0  # ln 53 is 3.97


def test_pairs_are_compared_pair_by_pair() -> None:
    """The machine slows down tenfold between the rounds, and ours takes a tenth longer in each."""
    rounds = [[(0.11, 0.10), (0.22, 0.20)], [(1.1, 1.0), (2.4, 2.0)]]
    told = paired.line("engine", rounds)
    assert "of 4 pairs the ratio's median 1.100, of the rounds 1.100, 1.150" in told
    assert told.startswith("engine: 660.0 ms of CPU, the other 600.0")
    with pytest.raises(SystemExit):
        paired.main(["--other=.", "--cases=nothing"])
