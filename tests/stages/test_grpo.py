"""Fine-tuning, then reinforcement learning: what is done is not done again, in either part."""

import dataclasses
import json

import jax
import pytest

from configs import grpo_tiny
from nemotron_jax.config.convert import from_config_dict
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.resume import check_resumable
from nemotron_jax.config.run import RunConfig
from nemotron_jax.run_directory import RunDirectory, Saved
from nemotron_jax.stages import grpo
from nemotron_jax.training.prepared import Prepared

CONFIG = from_config_dict(RunConfig, grpo_tiny.get_config())


class Parts:
    """Stands for the parts of a run; each is done or is stopped before its end."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.steps: dict[str, int] = {}  # by directory
        self.stops: set[str] = set()
        self.damaged: dict[str, int] = {}  # by directory, the step that is whole before it
        self.asked: list[RunConfig] = []

    def fine_tune(self, config: RunConfig, directory: RunDirectory, *unused: object) -> int:
        self.asked.append(config)
        self.train(config, directory)
        return 0

    def learn(self, run: Prepared, *unused: object) -> bool:
        return self.train(run.config, run.directory)

    def train(self, config: RunConfig, directory: RunDirectory) -> bool:
        name = directory.path.name
        self.done.append(name)
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.metrics.write_text('{"step": 1, "success": 0.5}\n')
        if name in self.stops:
            return False
        self.steps[name] = config.training.steps
        self.damaged.pop(name, None)
        return True

    def result(self, *unused: object) -> dict:
        self.done.append("result")
        part = {"before": 0.0, "after": 0.5, "n": 4, "interval": [0.25, 0.75]}
        return part | {"environments": {"arithmetic": part}}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    made = Parts()
    steps = lambda run: [s] if (s := made.steps.get(run.path.name)) else []
    whole = lambda run: made.damaged.get(run.path.name, max(steps(run), default=0))
    monkeypatch.setattr(grpo.sft, "run", made.fine_tune)
    monkeypatch.setattr(RunDirectory, "steps", steps)
    monkeypatch.setattr(RunDirectory, "whole_step", whole)
    monkeypatch.setattr(RunDirectory, "saved", lambda run: None)
    monkeypatch.setattr(grpo.rl_loop, "check_prompts", lambda *unused: None)
    replaced = {
        "load_tokenizer": lambda *unused: None,
        "load_pretrained": lambda *unused, **options: None,
        "_reinforce": made.learn,
        "result": made.result,
        "draw_result": lambda *unused: None,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(grpo, name, value)
    return made


def run(config: RunConfig, workdir, parts: Parts) -> list[str]:
    """What was done, in order."""
    parts.done.clear()
    mesh = jax.make_mesh((1,), ("data",))
    assert grpo.run(config, RunDirectory(workdir), mesh) == 0
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


def test_a_damaged_end_of_the_fine_tuning_is_made_again(tmp_path, parts, capsys) -> None:
    """And not learned from as it was some steps before."""
    parts.stops = {"grpo"}
    assert run(CONFIG, tmp_path, parts) == ["sft", "grpo"]
    parts.damaged = {"sft": 7}
    parts.stops = {"sft"}
    assert run(CONFIG, tmp_path, parts) == ["sft"]
    last = CONFIG.warm_start.training.steps
    assert f"sft: step {last} is damaged; going on from step 7" in capsys.readouterr().out
    parts.stops = set()
    assert run(CONFIG, tmp_path, parts) == ["sft", "grpo", "result"]
    assert not parts.damaged and run(CONFIG, tmp_path, parts) == []


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[:20],
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "deep": lambda text: "[" * 100_000,
    "its extent alone": lambda text: '{"steps": 100, "result_tasks": 512}',
    "no interval": lambda text: text.replace('"interval"', '"intervals"'),
    "a text for a number": lambda text: text.replace('"before": 0.0', '"before": "0"'),
    "no number": lambda text: text.replace('"after": 0.5', '"after": NaN'),
    "a huge one": lambda text: text.replace('"n": 4', '"n": 1' + "0" * 400),
    "a list of environments": lambda text: text.replace(
        '"environments": {', '"environments": [{'
    ).replace("  }\n", "  }]\n"),
    "half of the easy": lambda text: text.replace('"before"', '"easy_before": 1, "before"', 1),
    "a null character": lambda text: "\0" + text[1:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_result_is_made_again(tmp_path, parts, kind) -> None:
    run(CONFIG, tmp_path, parts)
    file = tmp_path / "result.json"
    whole = json.loads(file.read_text())
    file.write_text(DAMAGE[kind](file.read_text()))
    with pytest.warns(UserWarning, match=r"result.json: is damaged and left out; it is made again"):
        assert run(CONFIG, tmp_path, parts) == ["grpo", "result"]
    again = json.loads(file.read_text())
    assert all(again[name] == whole[name] for name in whole if "seconds" not in name)


@pytest.mark.parametrize("name", ["result.json", "grpo/transcripts.jsonl", "grpo/pools.json"])
def test_a_folder_where_a_file_is_to_be_is_found_before_anything(tmp_path, parts, name) -> None:
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=rf"{name} is a folder and must be a file; move it away"):
        run(CONFIG, tmp_path, parts)
    assert not parts.done


def test_either_part_that_goes_on_keeps_its_schedule(tmp_path, monkeypatch) -> None:
    def longer(config: RunConfig, steps: int) -> RunConfig:
        schedule = dataclasses.replace(config.training.schedule, total_tokens=10**9 + steps)
        training = dataclasses.replace(config.training, steps=steps, schedule=schedule)
        return dataclasses.replace(config, training=training)

    saved = {"grpo": CONFIG, "sft": CONFIG.warm_start_run}
    of_part = lambda run: Saved(saved[run.path.name], 1)
    monkeypatch.setattr(RunDirectory, "saved", of_part)
    first = longer(CONFIG.warm_start_run, 300).training
    asked = longer(CONFIG, 140)
    asked = dataclasses.replace(
        asked, warm_start=dataclasses.replace(asked.warm_start, training=first)
    )
    kept = RunDirectory(tmp_path).with_saved_schedule(asked)
    assert (kept.training.steps, kept.warm_start.training.steps) == (140, 300)
    assert kept.training.schedule == CONFIG.training.schedule
    assert kept.warm_start.training.schedule == CONFIG.warm_start.training.schedule
    check_resumable(CONFIG, dataclasses.replace(kept, warm_start=CONFIG.warm_start), "grpo")
    check_resumable(saved["sft"], kept.warm_start_run, "sft")


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
    assert config.warm_start_run.lora == config.lora


def test_one_process_plays(tmp_path, parts, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"stage='grpo': there are 2 processes"):
        run(CONFIG, tmp_path, parts)
