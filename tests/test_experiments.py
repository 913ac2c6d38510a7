"""Runs of an experiment: each is made once, and what they show is said with its uncertainty."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
    carried_over,
    grpo_arms,
    grpo_tiny,
    harness,
    latent_moe,
    mtp_boost_arms,
    nvfp4,
    qad_arms,
)
from experiments.carried_over import KINDS, SUMS
from experiments.harness import Arm, Experiment, Measured
from nemotron_jax.config.distill import MTP_LOSSES, DraftObjective
from nemotron_jax.config.execution import Execution
from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.config.run import RunConfig
from nemotron_jax.environments import play, registry
from nemotron_jax.environments.base import Verdict
from nemotron_jax.model.parameters import abstract_model
from nemotron_jax.playing.rollout import Episode
from nemotron_jax.posttraining.curriculum import held_out_tasks
from nemotron_jax.run_directory import RunDirectory
from tests.tiny_models import tiny_config


class Made:
    """Stands for the processes of runs: notes what is asked for, and runs it here."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails: dict[str, int] = {}
        self.began_after: dict[str, str] = {}

    def run(self, name: str):
        def made(seed: int, directory: Path, before: Path | None) -> Measured | None:
            directory.mkdir(parents=True, exist_ok=True)
            self.began_after[name] = before.name if before else ""
            value = {"base": 0.5, "better": 0.75, "same": 0.5}[name] + seed / 64
            return Measured(2, [[0, 0.25], [2, value]], value, 100)

        return made

    def experiment(self, version: int = 1) -> Experiment:
        arms = {name: Arm(self.run(name), after=after) for name, after in ORDER.items()}
        return Experiment(
            name="toy",
            version=version,
            metric="success",
            arms=arms,
            against="base",
            seeds=(0, 1, 2),
            noise_floor="same",
            positive_control="better",
        )


TASK = registry["arithmetic"].split(0, "train", 0)
NOTHING = Episode(TASK, 0, (), np.zeros(0, np.float32), (), False, Verdict(0.0), ())
ORDER = {"base": "", "better": "base", "same": ""}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    one = Made()

    def start(experiment: Experiment, output: Path, arm: str, seed: int) -> int:
        one.asked.append(f"{arm}-{seed}")
        if status := one.fails.get(f"{arm}-{seed}", 0):
            return status
        return harness.run_one(experiment, output, arm, seed)

    monkeypatch.setattr(harness, "_start", start)
    return one


def evidence(output: Path) -> dict:
    return json.loads((output / "evidence.json").read_text())


def test_each_run_is_made_once_and_the_rest_after_a_failure(tmp_path, made) -> None:
    made.fails = {"better-1": 3}
    flags = [f"--output={tmp_path}"]
    assert harness.main(made.experiment(), arguments=flags) == 3
    assert made.asked == ["base-0", "better-0", "same-0", "base-1", "better-1"]
    assert len(evidence(tmp_path)["runs"]) == 4
    made.fails = {}
    made.asked.clear()
    assert harness.main(made.experiment(), arguments=flags) == 0
    assert made.asked == ["better-1", "same-1", "base-2", "better-2", "same-2"]
    assert harness.main(made.experiment(), arguments=flags) == 0 and len(made.asked) == 5
    assert made.began_after == {"base": "", "better": "base-2", "same": ""}
    # What the evidence holds is finished, with or without its directory.
    (tmp_path / "runs/v1/same-0/measured.json").unlink()
    assert harness.main(made.experiment(), arguments=flags) == 0 and len(made.asked) == 5
    # Another version makes other runs.
    assert (
        harness.main(made.experiment(version=2), arguments=[*flags, "--arms=better", "--seeds=4"])
        == 0
    )
    assert made.asked[5:] == ["base-4", "better-4"]
    assert [run["seed"] for run in evidence(tmp_path)["runs"]] == [4, 4]


def test_an_arm_can_have_fewer_of_the_seeds_than_others(tmp_path, made) -> None:
    some = made.experiment()
    arms = some.arms | {"same": dataclasses.replace(some.arms["same"], most_seeds=1)}
    some = dataclasses.replace(some, arms=arms)
    assert harness.main(some, arguments=[f"--output={tmp_path}", "--arms=base,same"]) == 0
    assert made.asked == ["base-0", "same-0", "base-1", "base-2"]
    more = [f"--output={tmp_path}", "--arms=same", "--seeds=0,7"]  # one of no other arm
    assert harness.main(some, arguments=more) == 0 and made.asked[4:] == ["same-7"]


def test_a_quick_experiment_is_another_one(tmp_path, made, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    whole = made.experiment()
    quick = dataclasses.replace(whole, name="toy_quick", seeds=(0,))
    assert harness.main(whole, quick, ["--quick", "--arms=base"]) == 0 and made.asked == ["base-0"]
    found = json.loads((tmp_path / "docs/evidence/toy_quick/evidence.json").read_text())
    assert found["experiment"] == "toy_quick" and not Path("docs/evidence/toy").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"arm": "base"}'])
def test_a_damaged_run_is_made_again(tmp_path, made, text) -> None:
    flags = [f"--output={tmp_path}", "--seeds=0"]
    assert harness.main(made.experiment(), arguments=flags) == 0
    (tmp_path / "runs/v1/base-0/measured.json").write_text(text)
    (tmp_path / "evidence.json").write_text(text)
    assert harness.main(made.experiment(), arguments=flags) == 0
    assert made.asked == ["base-0", "better-0", "same-0", "base-0"]
    assert len(evidence(tmp_path)["runs"]) == 3


def test_the_evidence_says_what_was_found_and_how_surely(tmp_path, made) -> None:
    assert harness.main(made.experiment(), arguments=[f"--output={tmp_path}"]) == 0
    found = evidence(tmp_path)
    assert found["format"] == "nemotron_jax.evidence" and found["experiment_version"] == 1
    assert found["command"] == "python -m experiments.toy" and "jax" in found["versions"]
    assert (tmp_path / "plots/toy.png").exists() and found["cpu_seconds"] > 0
    better, same = found["comparisons"]
    assert (better["arm"], better["against"], better["n"], better["unit"]) == (
        "better",
        "base",
        3,
        "seed",
    )
    assert better["mean"] == 0.25 and better["interval"] == [0.25, 0.25] and better["paired"]
    assert found["noise_floor"] == {"arm": "same", "mean": 0.0, "interval": [0.0, 0.0], "n": 3}
    assert found["positive_control"] == {"arm": "better", "detected": True}
    assert same["interval"] == [0.0, 0.0]


def test_an_interval_is_students_and_none_of_one_seed() -> None:
    one = harness._mean_and_interval([0.1])
    assert one == {"mean": 0.1, "interval": None, "n": 1}
    three = harness._mean_and_interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose(three["interval"], [2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])


def test_relative_differences_are_of_the_arm_that_they_are_compared_with() -> None:
    experiment = dataclasses.replace(Made().experiment(), relative=True)
    run = {"cpu_seconds": 1.0, "device": "", "versions": {}, "seed": 0}
    runs = [run | {"arm": "base", "final": 4.0}, run | {"arm": "better", "final": 5.0}]
    [found] = harness.evidence(experiment, runs)["comparisons"]
    assert found["mean"] == 0.25 and found["relative"]


def test_arms_are_compared_with_a_second_one_where_it_is_named() -> None:
    run = {"cpu_seconds": 1.0, "device": "", "versions": {}, "seed": 0}
    finals = {"base": 4.0, "better": 5.0, "same": 4.0}
    runs = [run | {"arm": arm, "final": final} for arm, final in finals.items()]
    experiment = Made().experiment()
    assert "also_compared" not in harness.evidence(experiment, runs)
    experiment = dataclasses.replace(experiment, also_against="better")
    found = harness.evidence(experiment, runs)
    assert [entry["against"] for entry in found["comparisons"]] == ["base", "base"]
    gaps = {entry["arm"]: (entry["against"], entry["mean"]) for entry in found["also_compared"]}
    assert gaps == {"base": ("better", -1.0), "same": ("better", -1.0)}


def test_evidence_names_the_commit_that_made_its_runs(tmp_path, made, monkeypatch) -> None:
    flags = [f"--output={tmp_path}"]
    for commit, arms, named in (
        ("a", "base", "a"),
        ("b", "base", "a"),
        ("c", "base,better", "c"),
    ):
        monkeypatch.setattr(harness, "_commit", lambda commit=commit: commit)
        assert harness.main(made.experiment(), arguments=[*flags, f"--arms={arms}"]) == 0
        assert evidence(tmp_path)["commit"] == named


@pytest.mark.parametrize("name", ["file", "file/below", "of", "plotted", "\0", "/proc/x"])
def test_an_output_that_cannot_be_written_is_one_line(tmp_path, made, capsys, name) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "of/evidence.json").mkdir(parents=True)
    (tmp_path / "plotted").mkdir()
    (tmp_path / "plotted/plots").touch()
    assert harness.main(made.experiment(), arguments=[f"--output={tmp_path / name}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("toy: --output=") and said.count("\n") == 1 and not made.asked


def test_an_arm_that_is_not_there_is_one_line(tmp_path, made, capsys) -> None:
    assert harness.main(made.experiment(), arguments=[f"--output={tmp_path}", "--arms=bettr"]) == 2
    assert "there is no 'bettr'; choose from base, better, same" in capsys.readouterr().err


def test_arms_begin_with_the_first_arms_fine_tuning(tmp_path) -> None:
    (tmp_path / "earned-0/sft").mkdir(parents=True)
    (tmp_path / "earned-0/sft/model").write_text("of earned")
    (tmp_path / ".permuted-0/sft").mkdir(parents=True)
    (tmp_path / ".permuted-0/sft/half").touch()  # as a kill leaves it
    for _ in range(2):
        run = grpo_arms._begun(tmp_path / "permuted-0", tmp_path / "earned-0")
        assert [file.name for file in run.part("sft").path.iterdir()] == ["model"]


def test_the_longer_fine_tuning_goes_on_at_its_last_rate() -> None:
    config = grpo_tiny.config_of(3)
    longer = grpo_arms.longer_run(config, "runs/first")
    assert longer.stage == "sft" and longer.init_from == longer.data.tokenizer == "runs/first"
    tokens = lambda run: run.training.steps * run.data.batch_size * run.data.sequence_length
    step = longer.data.batch_size * longer.data.sequence_length
    assert abs(tokens(longer) - tokens(config)) <= step / 2 and longer.seed == 3
    schedule, last = longer.training.schedule, config.warm_start.training.schedule
    assert schedule.peak_learning_rate == schedule.final_learning_rate == last.final_learning_rate


def test_arms_of_nvfp4_differ_from_the_recipe_in_one_thing() -> None:
    changed = {
        "nvfp4": set(),
        "no_stochastic_gradients": {"gradient_rounding"},
        "no_hadamard": {"hadamard"},
        "weights_1d": {"weight_block"},
        "stochastic_activations": {"activation_rounding"},
        "last_15_bf16": {"switch_step", "switch_roles"},
    }
    arms = {"float32", "float32_reordered", "all_layers", "unprotected", *changed}
    assert set(nvfp4.experiment().arms) == arms
    configs = {arm: nvfp4.config_of(arm, 300, 2) for arm in arms}

    def values(arm: str) -> dict:
        precision = dataclasses.asdict(configs[arm].execution.precision)
        return precision | precision.pop("nvfp4")

    recipe = values("nvfp4")
    for arm, fields in changed.items():
        assert {name for name, value in values(arm).items() if value != recipe[name]} == fields
    for config in configs.values():
        plain = {"mesh": configs["nvfp4"].mesh, "execution": Execution()}
        assert dataclasses.replace(config, **plain) == nvfp4.config_of("float32", 300, 2)
    at = lambda step: configs["last_15_bf16"].execution.at_step(step).precision.emulated
    assert at(254) and not at(255)
    assert configs["float32_reordered"].mesh.data == 2 and configs["float32"].mesh.size == 1


def test_every_arm_of_nvfp4_can_be_evaluated() -> None:
    tokens, model = jnp.zeros((1, 16), jnp.int32), abstract_model(tiny_config("ME*"))
    for arm in nvfp4.experiment().arms:
        execution = nvfp4.config_of(arm, 300, 0).execution
        for way in {execution.at_step(0), execution.at_step(299)}:
            jax.eval_shape(lambda model, way=way: model(tokens, execution=way).hidden, model)


def test_latent_experts_cost_what_their_twin_costs() -> None:
    latent, twin = (latent_moe.config_of(arm, 300, 0) for arm in ("latent", "full_width"))
    assert latent.model.moe.num_experts == 4 * twin.model.moe.num_experts
    assert latent.model.width == 4 * latent.model.moe.latent_width
    assert twin.model.moe.latent_width is None
    sizes = [latent_moe.size_of(config) for config in (latent, twin)]
    for name in ("active_flops_per_token", "parameters"):
        assert abs(sizes[0][name] / sizes[1][name] - 1) <= 0.02
    schedule = latent.training.schedule
    assert schedule.total_tokens == 300 * 2048 and schedule.decay_tokens == 105 * 2048


@pytest.mark.more
@pytest.mark.parametrize("name, arm", [("nvfp4", "nvfp4"), ("latent_moe", "latent")])
def test_a_quick_arm_runs(tmp_path, name, arm) -> None:
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", f"--arms={arm}"]
    for _ in range(2):  # the second does nothing
        subprocess.run([*command, f"--output={tmp_path}"], check=True, cwd=harness.ROOT)
    [run] = evidence(tmp_path)["runs"]
    assert run["experiment"] == f"{name}_quick" and run["steps"] == 6 and len(run["curve"]) == 6
    assert 0 < run["final"] < 10 and run["n_tokens"] == 6 * 2048
    assert name == "nvfp4" or run["more"]["active_flops_per_token"] > 1e6


@pytest.mark.more
@pytest.mark.parametrize("name, arm", [("qad", "distilled"), ("mtp_boost", "kl")])
def test_a_quick_arm_that_goes_on_from_another_runs(tmp_path, name, arm) -> None:
    command = [sys.executable, "-m", f"experiments.{name}", "--quick", f"--arms={arm}"]
    subprocess.run([*command, f"--output={tmp_path}"], check=True, cwd=harness.ROOT)
    start, run = evidence(tmp_path)["runs"]
    assert (start["steps"], start["n_tokens"]) == (6, 0) and run["arm"] == arm
    assert run["steps"] == 4 and run["n_tokens"] == 4 * 1024
    found, before = run["more"]["result"], start["more"]["result"]
    if name == "qad":
        kl = found["teacher_kl"]
        assert kl["student_after"] == run["final"] > 0
        assert kl["student_before"] == pytest.approx(start["final"], rel=1e-3)
        assert found["loss"]["teacher"] == pytest.approx(before["loss"]["teacher"], rel=1e-6)
    else:
        assert found["temperatures"]["1"]["after"] == run["final"] >= 1
        assert found["backbone_sha256_after"] == before["backbone_sha256_before"]


def test_arms_of_distillation_differ_in_what_they_learn_from(tmp_path) -> None:
    student = qad_arms.config_of((150, 40), 1, tmp_path)
    assert (student.stage, student.distill.teacher) == ("distill", str(tmp_path))
    assert student.init_from == str(tmp_path) and student.seed == 1
    assert student.execution.at_step(0).precision.emulated
    tokens = student.training.steps * student.data.batch_size * student.data.sequence_length
    assert student.training.schedule.total_tokens == tokens == 40 * 1024
    arms = [mtp_boost_arms.config_of((150, 24), 0, tmp_path, mtp) for mtp in MTP_LOSSES]
    plain = [dataclasses.replace(arm, objective=DraftObjective()) for arm in arms]
    assert plain[0] == plain[1] and {arm.objective.text for arm in arms} == {"own"}
    assert arms[0].training.trains == "mtp" and arms[0].training.mtp_depths == 3


def test_permuted_rewards_are_the_same_ones_dealt_out() -> None:
    verdicts = [Verdict(float(reward)) for reward in np.linspace(0, 1, 40)]
    verdicts[3] = Verdict(0.0, infra_error="gone")
    episodes = [dataclasses.replace(NOTHING, verdict=verdict) for verdict in verdicts]
    rollout = RolloutConfig()
    earned = grpo_arms.shaped_rewards(episodes, rollout, 0, 5)
    dealt = grpo_arms.dealt_out(episodes, rollout, 0, 5)
    assert sorted(dealt) == sorted(earned) and np.any(dealt != earned) and dealt[3] == 0
    np.testing.assert_array_equal(dealt, grpo_arms.dealt_out(episodes, rollout, 0, 5))
    assert np.any(dealt != grpo_arms.dealt_out(episodes, rollout, 0, 6))


def test_a_run_is_measured_once_it_has_a_result(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(grpo_arms, "_known", lambda config, run: {"known_after": "much"})
    config, run = grpo_tiny.config_of(0), RunDirectory(tmp_path)
    assert isinstance(config, RunConfig) and grpo_arms._measured(config, run) is None
    found = {"before": 0.125, "after": 0.875, "n": 64, "interval": [0.5, 1.0]}
    run.result.write_text(json.dumps(found | {"environments": {"arithmetic": found}}))
    part = run.part("grpo")
    part.path.mkdir()
    records = [{"step": 1, "tokens": 8, "surprise": 0.5}]
    records += [{"step": 2, "tokens": 16, "surprise": 0.25, "success": 0.75}]
    earns = [record | {"reward": 0.5} for record in records]
    for lines, curve in (
        (earns, [[0, 0.125], [2, 0.75]]),
        (records, [[0, 0.125], [2, 0.875]]),
    ):
        part.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        measured = grpo_arms._measured(config, run)
        assert measured.curve == curve and (measured.final, measured.n_tokens) == (0.875, 16)
        assert measured.steps == 2 and measured.more["entropy"] == [[1, 0.5], [2, 0.25]]
        assert measured.more["known_after"] == "much"


def test_other_kinds_of_tasks_are_what_they_are_called() -> None:
    for name, kind in KINDS.items():
        tasks = held_out_tasks(RolloutConfig(environments=(kind,)), 0, 20)
        for task in tasks:
            environment = registry[task.environment]
            assert play(environment, task, environment.oracle(task)).reward == 1
            if name in SUMS:
                numbers = [int(n) for n in re.findall(r"\d+", task.data["expression"])]
                count, largest = SUMS[name]
                assert len(numbers) == count and max(numbers) <= largest
        assert len({task.data["expression"] for task in tasks}) > 15


def test_what_is_known_is_the_mean_of_tries_and_the_best_of_them(monkeypatch) -> None:
    """Of a model that solves a task of its own kind once in eight tries, and no other ever."""

    def played(model, tokenizer, rollout, tasks, *, seed, sampler, execution):
        trained = rollout.environments == ("arithmetic/1",)
        return [
            dataclasses.replace(NOTHING, verdict=Verdict(float(trained and n % 8 == 0)))
            for n in range(len(tasks))
        ]

    monkeypatch.setattr(carried_over, "play_tasks_once", played)
    rollout = RolloutConfig(environments=("arithmetic/1",))
    known = carried_over.carried_over(None, None, rollout, Execution())
    assert known["pass_at_1"] == {"mean": 0.125, "interval": [0.125, 0.125], "n": 128}
    assert known["pass_at_8"]["mean"] == 1.0
    assert {part["mean"] for part in known["other_kinds"].values()} == {0.0}
