"""The pages lead where they say, and what a reader copies from them runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from flax import nnx

import nemotron_jax as nj
from configs import models
from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.peers import free_port
from tests.docs.pages import DOCS, GUIDES, REFERENCE, ROOT, blocks, broken_links, script

PAGES = sorted(DOCS.rglob("*.md"))
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
# Blocks of these pages take a model of some stage; the tiny one of the fixture serves.
FEW = (
    "--config.training.steps=2 --config.logging.evaluate_every=2 --config.logging.log_every=1 "
    "--config.logging.evaluate_rows=2 --config.logging.sample_tokens=4 "
    "--config.data.sources=('hf:own',)"
)
FEW_SFT = (
    "--config.training.steps=2 --config.logging.evaluate_every=2 --config.sft.success_tasks=2 "
    "--config.sft.success_tokens=4 --config.sft.oracle_tasks=40"
)
FEW_GRPO = (
    "--config.training.steps=1 --config.rl.held_out_tasks=2 --config.rl.result_tasks=2 "
    "--config.sft.oracle_tasks=200 --config.rl.rollout.slots=8"
)
VALUES = {
    "first_run": {"FLAGS": FEW, "SFT_FLAGS": FEW_SFT},
    "finetune": {
        "MODEL": "tiny",
        "DATA": "own.jsonl",
        "CONFIG": "tiny_lora.py",
        "STEPS": "2",
        "TARGET": "h100:2",
        "FLAGS": "",
    },
    "grpo": {"TASKS": "8", "FLAGS": FEW_GRPO},
    "serve": {"MODEL": "tiny", "FLAGS": "--slots=2 --max_length=256"},
    "pod": {"FLAGS": FEW},
    "preemption": {"FLAGS": FEW, "SECONDS_TO_LIVE": "5"},
    "quantise": {"MODEL": "tiny", "FLAGS": "--calibration=own"},
    "evaluate": {"MODEL": "run", "OTHER": "run", "SUITES": "perplexity:rows=2"},
    "watch": {"FLAGS": FEW, "DRAFTS": "acceptance:k=(1,):prompts=2:new_tokens=4"},
    "settings": {"MODEL": "tiny", "FLAGS": FEW},
    "python": {"MODEL": "tiny"},
}
# In seconds of CPU the cheapest; the others are `more`.
LIGHT = {"slurm", "gpu", "layer", "kernel", "suite", "objective", "config", "commands"}


def test_every_link_leads_to_a_page_or_a_heading() -> None:
    assert not [fault for page in [*PAGES, *FRONT] for fault in broken_links(page)]


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = "# A b, c\n[x](#a-b-c) [y](#d) [z](gone.md) `[q](no.md)`\n"
    (tmp_path / "page.md").write_text(text)
    wrong = list(broken_links(tmp_path / "page.md"))
    assert len(wrong) == 2 and "#d" in wrong[0] and "gone.md" in wrong[1]


def test_the_site_and_the_index_name_every_page() -> None:
    nav = json.dumps(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    there = {str(page.relative_to(DOCS)) for page in PAGES}
    assert set(re.findall(r'"([\w/]+\.md)"', nav)) == there
    index = (DOCS / "index.md").read_text("utf-8")
    assert there - {"index.md"} <= set(re.findall(r"\(([\w/]+\.md)\)", index))


def test_there_is_a_card_for_each_config() -> None:
    cards = (DOCS / "reference" / "verification.md").read_text("utf-8")
    wanted = {file.stem for file in (ROOT / "configs").glob("*.py")} - {"models"}
    assert set(re.findall(r"^\| `(\w+)` \|", cards, re.MULTILINE)) == wanted


@pytest.mark.parametrize("page", [*GUIDES, *REFERENCE], ids=lambda page: page.stem)
def test_a_page_has_a_block_that_runs_and_its_python_is_python(page: Path) -> None:
    kinds = [language for language, _ in blocks(page.read_text("utf-8"))]
    assert {"bash", "python"} & set(kinds) or page.stem == "verification"
    for language, content in blocks(page.read_text("utf-8")):
        if language == "python":
            ast.parse(content)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its tokenizer, in the hub's layout."""
    folder = tmp_path_factory.mktemp("tiny")
    config = models.agent()
    nj.save_pretrained(nj.Nemotron(config, rngs=nnx.Rngs(0)), folder, dtype="float32")
    text = "user assistant system hello there, 2 + 2? What is the capital of France?\n"
    train_tokenizer([text, *map(str, range(300))], config.vocab_size).save(folder)
    return folder


LORA = """
from nemotron_jax.config.convert import to_config_dict
from nemotron_jax.config.lora import LoRAConfig
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import DataConfig, RunConfig, ScheduleConfig, TrainingConfig

def get_config():
    schedule = ScheduleConfig(1e-3, 1e-4, 0, 0, 10**9)
    return to_config_dict(RunConfig(
        model=ModelConfig.from_hf("tiny"),
        training=TrainingConfig(steps=2, schedule=schedule, mtp_depths=0, trains="lora"),
        data=DataConfig(sources=("messages:x",), sequence_length=128, batch_size=2),
        lora=LoRAConfig(rank=2), stage="sft", init_from="tiny"))
"""


@pytest.fixture
def folder(tmp_path: Path, tiny: Path) -> Path:
    """A checkout's front doors, a small model and small data."""
    for name in ("train.py", "eval.py", "configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "tiny_lora.py").write_text(LORA)
    (tmp_path / "own").mkdir()
    for name in ("architecture", "data", "log", "sandbox"):
        text = (DOCS / f"{name}.md").read_text("utf-8")
        (tmp_path / "own" / f"{name}.txt").write_text(text)
    turns = lambda n: [
        {"role": "user", "content": f"{n} + 2?"},
        {"role": "assistant", "content": str(n + 2)},
    ]
    rows = [json.dumps({"messages": turns(n)}) for n in range(120)]
    (tmp_path / "own.jsonl").write_text("\n".join(rows))
    return tmp_path


def run(page: Path, folder: Path) -> None:
    """The blocks of a page, in order, by bash; raises with the last words where one fails."""
    values = {"PORT": str(free_port())} | VALUES.get(page.stem, {})
    commands = script(page.read_text("utf-8"), values)
    before = []
    if page.stem == "evaluate":  # of a run, whose text it reads
        config = ROOT / "configs" / "pretrain_tiny.py"
        before = [f"python train.py --config={config} --workdir=run {quoted(FEW)}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join([*before, commands])],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]


def quoted(flags: str) -> str:
    return " ".join(f'"{flag}"' for flag in flags.split())


@pytest.mark.more
@pytest.mark.parametrize(
    "page",
    [page for page in [*GUIDES, *REFERENCE] if page.stem in LIGHT],
    ids=lambda page: page.stem,
)
def test_a_short_page_runs(page: Path, folder: Path) -> None:
    run(page, folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in [*GUIDES, *REFERENCE] if p.stem not in {*LIGHT, "verification"}],
    ids=lambda page: page.stem,
)
def test_a_page_runs(page: Path, folder: Path) -> None:
    run(page, folder)


@pytest.mark.slow
def test_mkdocs_builds_it_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "index.html").is_file()
