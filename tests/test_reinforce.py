"""Fine-tuning, then reinforcement learning: what is done is not done again, in either part."""

import dataclasses
import json

import pytest

from configs import grpo_tiny
from nemotron_jax import reinforce
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.run import RunConfig

CONFIG = from_config_dict(RunConfig, grpo_tiny.get_config())


class Parts:
    """Stands for the parts of a run; each is done or is stopped before its end."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.steps: dict[str, int] = {}  # by directory
        self.stops: set[str] = set()
        self.asked: list[RunConfig] = []

    def fine_tune(self, config: RunConfig, workdir) -> int:
        self.asked.append(config)
        return self.train(config, workdir)

    def train(self, config: RunConfig, workdir, *unused: object) -> int:
        self.done.append(workdir.name)
        if workdir.name not in self.stops:
            self.steps[workdir.name] = config.training.steps
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "metrics.jsonl").write_text('{"step": 1, "success": 0.5}\n')
        return 0

    def result(self, *unused: object) -> dict:
        self.done.append("result")
        part = {"before": 0.0, "after": 0.5, "n": 4, "interval": [0.25, 0.75]}
        return part | {"environments": {"arithmetic": part}}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    made = Parts()
    steps = lambda folder: [s] if (s := made.steps.get(folder.parent.name)) else []
    replaced = {
        "checkpoint_steps": steps,
        "load_tokenizer": lambda *unused: None,
        "load_pretrained": lambda *unused, **options: None,
        "_reinforce": made.train,
        "result": made.result,
        "draw_result": lambda *unused: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(reinforce, name, value)
    return made


def run(config: RunConfig, workdir, parts: Parts) -> list[str]:
    """What was done, in order."""
    parts.done.clear()
    mesh = reinforce.jax.make_mesh((1,), ("data",))
    assert reinforce.run(config, workdir, mesh, fine_tune=parts.fine_tune) == 0
    return parts.done.copy()


def test_a_run_goes_on_with_the_part_that_it_was_stopped_in(tmp_path, parts) -> None:
    parts.stops = {"sft"}
    assert run(CONFIG, tmp_path, parts) == ["sft"]
    parts.stops = {"grpo"}
    assert run(CONFIG, tmp_path, parts) == ["sft", "grpo"]
    assert run(CONFIG, tmp_path, parts) == ["grpo"]
    parts.stops = set()
    assert run(CONFIG, tmp_path, parts) == ["grpo", "result"]
    first = (tmp_path / "result.json").read_text()
    assert run(CONFIG, tmp_path, parts) == [] and (tmp_path / "result.json").read_text() == first
    assert json.loads(first)["steps"] == CONFIG.training.steps
    more = dataclasses.replace(CONFIG.rl, result_tasks=CONFIG.rl.result_tasks + 1)
    more = dataclasses.replace(CONFIG, rl=more)
    assert run(more, tmp_path, parts) == ["grpo", "result"]
    longer = dataclasses.replace(CONFIG.training, steps=CONFIG.training.steps + 7)
    longer = dataclasses.replace(CONFIG, training=longer)
    assert run(longer, tmp_path, parts) == ["grpo", "result"]


def test_the_control_goes_on_with_fine_tuning_at_its_last_rate(tmp_path, parts) -> None:
    rollout = dataclasses.replace(CONFIG.rl.rollout, rewards="demonstrations")
    config = dataclasses.replace(CONFIG, rl=dataclasses.replace(CONFIG.rl, rollout=rollout))
    assert run(config, tmp_path, parts) == ["sft", "grpo", "result"]
    first, longer = parts.asked
    assert {first.stage, longer.stage} == {"sft"} and longer.init_from == str(tmp_path / "sft")
    assert longer.training.steps == config.training.steps
    schedule, last = longer.training.schedule, first.training.schedule.final_learning_rate
    assert schedule.peak_learning_rate == schedule.final_learning_rate == last
    assert longer.data.sources == first.data.sources
    assert longer.data.tokenizer == str(tmp_path / "sft")


def test_a_run_needs_a_model_that_can_play(tmp_path, parts) -> None:
    config = dataclasses.replace(CONFIG, warm_start=None)
    with pytest.raises(ValueError, match=r"set warm_start or init_from"):
        run(config, tmp_path, parts)
    assert run(dataclasses.replace(config, init_from="model"), tmp_path, parts) == [
        "grpo",
        "result",
    ]


def test_adapters_may_learn_from_rewards_alone(tmp_path, parts) -> None:
    """Fine-tuning moves the whole model, unless it trains adapters itself."""
    training = dataclasses.replace(CONFIG.training, trains="lora")
    config = dataclasses.replace(CONFIG, training=training, lora=LoRAConfig(rank=2))
    assert run(config, tmp_path, parts) == ["sft", "grpo", "result"]
    assert parts.asked[0].lora is None
    first = dataclasses.replace(CONFIG.warm_start.training, trains="lora")
    warm_start = dataclasses.replace(CONFIG.warm_start, training=first)
    config = dataclasses.replace(config, warm_start=warm_start)
    assert reinforce.warm_start_run(config).lora == config.lora


def test_one_process_plays(tmp_path, parts, monkeypatch) -> None:
    monkeypatch.setattr(reinforce.jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"stage='grpo': there are 2 processes"):
        run(CONFIG, tmp_path, parts)
