"""Arms of an experiment: each is run once, controls start where the first one did."""

import json
import subprocess
from pathlib import Path

import pytest

from nemotron_jax import arms


class Trained:
    """Stands for train.py: notes what it is told, writes what a run leaves."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.fails: set[str] = set()

    def __call__(self, command: list[str], **unused: object) -> subprocess.CompletedProcess:
        flags = command[2:]
        directory = Path(flags[1].removeprefix("--workdir="))
        self.told.append([directory.name, *flags[2:]])
        if directory.name in self.fails:
            return subprocess.CompletedProcess(command, 3)
        for part in ("sft", "grpo"):
            (directory / part).mkdir(parents=True, exist_ok=True)
        if not (directory / "sft/model").exists():
            (directory / "sft/model").write_text(f"of {directory.name}")
        records = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": 0.5, "success": 0.75}]
        lines = [json.dumps(record) + "\n" for record in records]
        (directory / "grpo/metrics.jsonl").write_text("".join(lines))
        result = {"before": 0.125, "after": 0.875, "n": 64, "interval": [0.5, 1.0]}
        result |= {"environments": {"arithmetic": dict(result)}}
        (directory / "result.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    made = Trained()
    monkeypatch.setattr(arms.subprocess, "run", made)
    return made


def experiment(output: Path, *more: str) -> int:
    return arms.main(["--config=c.py", f"--output={output}", *more])


def test_each_arm_is_run_once_and_the_rest_after_a_failure(tmp_path, trained) -> None:
    trained.fails = {"seed_1"}
    assert experiment(tmp_path, "--config.rl.held_out_tasks=8") == 3
    assert list(json.loads((tmp_path / "arms.json").read_text())) == ["seed_0"]
    trained.fails = set()
    assert experiment(tmp_path, "--config.rl.held_out_tasks=8") == 0
    assert [name for name, *_ in trained.told] == ["seed_0", "seed_1", *list(arms.ARMS)[1:]]
    for name, *flags in trained.told:
        assert flags == [*arms.ARMS[name], "--config.rl.held_out_tasks=8"]
    before = len(trained.told)
    assert experiment(tmp_path) == 0 and len(trained.told) == before
    found = json.loads((tmp_path / "arms.json").read_text())
    assert list(found) == list(arms.ARMS) and (tmp_path / "plots/arms.png").exists()
    assert found["seed_1"]["success"] == [[0, 0.125], [2, 0.75]]
    assert found["seed_1"]["reward"] == [[1, 0.25], [2, 0.5]]
    # Fine-tuning evaluates itself on other tasks: its curve is before and after alone.
    assert found["longer_fine_tuning"]["success"] == [[0, 0.125], [2, 0.875]]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, "\0"])
def test_an_arm_whose_result_is_damaged_is_run_again(tmp_path, trained, monkeypatch, text) -> None:
    """train.py makes its result again, and nothing else."""
    monkeypatch.setattr(arms, "draw_arms", lambda *unused: None)
    assert experiment(tmp_path, "--arms", "seed_0", "longer_fine_tuning") == 0
    (tmp_path / "seed_0/result.json").write_text(text)
    (tmp_path / "longer_fine_tuning/grpo/metrics.jsonl").write_text('{"step": 1, "rew')
    with pytest.warns(UserWarning, match="result.json: is damaged"):
        assert experiment(tmp_path, "--arms", "seed_0", "longer_fine_tuning") == 0
    assert [name for name, *_ in trained.told] == ["seed_0", "longer_fine_tuning", "seed_0"]
    found = arms.read_arms(tmp_path)
    assert found["seed_0"]["reward"] == [[1, 0.25], [2, 0.5]]
    assert found["longer_fine_tuning"]["success"] == [[0, 0.125], [0, 0.875]]


@pytest.mark.parametrize("name", ["file", "file/below", "of", "plotted", "\0", "/proc/x"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, trained, capsys, name) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "of/arms.json").mkdir(parents=True)
    (tmp_path / "plotted").mkdir()
    (tmp_path / "plotted/plots").touch()
    assert experiment(tmp_path / name) == 2 and not trained.told
    said = capsys.readouterr().err
    assert said.startswith("arms: --output=") and said.count("\n") == 1


def test_controls_start_with_the_first_arms_fine_tuning(tmp_path, trained, monkeypatch) -> None:
    monkeypatch.setattr(arms, "draw_arms", lambda *unused: None)
    (tmp_path / ".permuted_rewards/sft").mkdir(parents=True)
    (tmp_path / ".permuted_rewards/sft/half").touch()  # as a kill leaves it
    assert experiment(tmp_path) == 0
    models = {name: (tmp_path / name / "sft/model").read_text() for name in arms.ARMS}
    assert models.pop("seed_1") == "of seed_1" and set(models.values()) == {"of seed_0"}
    assert not (tmp_path / "permuted_rewards/sft/half").exists()


def test_the_arms_differ_in_seed_or_rewards_alone() -> None:
    changes = {flag.split("=")[0] for flags in arms.ARMS.values() for flag in flags}
    assert changes == {"--config.seed", "--config.rl.rollout.rewards"}
