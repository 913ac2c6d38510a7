"""Every stage of a small model's life, and one page about it: python -m experiments.speedrun.

    OUTPUT/pretrain/, agent/sft/, agent/grpo/, quantised/, evaluation/    what the stages leave
    OUTPUT/stages/NAME.json    what a stage came to; it is not run again
    OUTPUT/report.html         a row a stage, with pictures and samples

Pre-training is of the standard library's text. The model that is fine-tuned, rewarded, quantised,
evaluated and served is a smaller one, whose tokens span the chat format: it begins anew. With
--quick every stage takes a few steps, which shows that they work and nothing else.
"""

import argparse
import contextlib
import dataclasses
import json
import resource
import shlex
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemotron_jax import command_line
from nemotron_jax.data.json_lines import read_objects
from nemotron_jax.evaluation.document import (
    Grid,
    Heading,
    Part,
    Picture,
    Quote,
    Sentences,
    page,
    shown,
)
from nemotron_jax.files import atomic_writer
from nemotron_jax.model import accounting
from nemotron_jax.peers import free_port
from nemotron_jax.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
UPDATES = 30  # of reinforcement learning: most of the gain of configs/grpo_tiny.py comes in 25
HEALTHY_WITHIN_S = 600
TURNS = 4  # of the served conversation, at most: two calls and an answer
FEW = ("--config.training.steps=2", "--config.logging.evaluate_every=2")
FEW_TASKS = ("--config.rl.held_out_tasks=2", "--config.rl.result_tasks=2")
FEW_PLAYS = ("--config.sft.oracle_tasks=200", "--config.warm_start.training.steps=2")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row: `run` does the work in the output's directory and gives the figures."""

    name: str
    about: str
    run: Callable[[Path, bool], Mapping[str, Any]]
    pictures: tuple[str, ...] = ()  # below the output's directory


def main() -> int:
    """Run the stages that are missing and write the page; the exit status."""
    parser = argparse.ArgumentParser(prog="experiments.speedrun", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/speedrun"))
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage")
    flags = parser.parse_args()
    try:
        output = command_line.writable("output", flags.output).absolute()
        for stage in STAGES:
            _finish(stage, output, flags.quick)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"speedrun: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"report: {write_page(output)}")
    return 0


def _finish(stage: Stage, output: Path, quick: bool) -> None:
    """Run a stage unless it was: what it came to is kept when it is done."""
    kept = output / "stages" / f"{stage.name}.json"
    if kept.is_file():
        print(f"{stage.name}: is there")
        return
    print(f"{stage.name}: {stage.about}", flush=True)
    began, before = time.monotonic(), _cpu_seconds()
    figures = dict(stage.run(output, quick))
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - before}
    with atomic_writer(kept) as file:
        file.write(json.dumps({"quick": quick, "figures": figures, **spent}, indent=1).encode())


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _python(output: Path, *words: str) -> None:
    """Run a front door of the checkout; raises CalledProcessError where it fails."""
    output.mkdir(parents=True, exist_ok=True)
    print("  python", shlex.join(words), flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def pretrain(output: Path, quick: bool) -> dict[str, Any]:
    """Tiny Super on source text."""
    where = output / "pretrain"
    few = FEW if quick else ()
    _python(output, "train.py", "--config=configs/pretrain_tiny.py", f"--workdir={where}", *few)
    last = _last(RunDirectory(where))
    names = ("step", "tokens", "whole_held_out_loss", "whole_bits_per_byte", "held_out_loss")
    return {name: last[name] for name in names if last.get(name) is not None}


def fine_tune(output: Path, quick: bool) -> dict[str, Any]:
    """Fine-tuning and reinforcement learning are one run of two parts; this is the first."""
    few = (*FEW[1:], "--config.training.steps=1", *FEW_TASKS, *FEW_PLAYS) if quick else ()
    steps = () if quick else (f"--config.training.steps={UPDATES}",)
    command = ("train.py", "--config=configs/grpo_tiny.py", f"--workdir={output / 'agent'}")
    _python(output, *command, *steps, *few)
    last = _last(RunDirectory(output / "agent").part("sft"))
    return {name: last[name] for name in ("step", "loss", "held_out_loss") if name in last}


def reinforce(output: Path, quick: bool) -> dict[str, Any]:
    """What the second part came to: success on held-out tasks before and after."""
    result = json.loads(RunDirectory(output / "agent").result.read_text("utf-8"))
    low, high = result["interval"]
    gain = {"gain, 95 % interval": f"{low:.2f} … {high:.2f}", "tasks": result["n"]}
    return {"success before": result["before"], "success after": result["after"], **gain}


def quantise(output: Path, quick: bool) -> dict[str, Any]:
    """Routed experts as NVFP4 codes, with the loss on text before and after."""
    source, target = output / "agent" / "grpo", output / "quantised"
    command = ("-m", "nemotron_jax.quantize", f"--checkpoint={source}", f"--output={target}")
    text = output / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "questions.txt").write_text(_questions(), "utf-8")
    _python(output, *command, f"--calibration={text}")
    return quantised(output)


def quantised(output: Path) -> dict[str, Any]:
    """What the codes take. The loss on plain text says nothing: this model has seen chats alone."""
    target = output / "quantised"
    report = json.loads((target / "quantize.json").read_text("utf-8"))
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    config = RunDirectory(output / "agent" / "grpo").read().model
    before = 4 * accounting.parameters(config).total
    codes = ", ".join(f"{count} matrices {kind}" for kind, count in report["modules"].items())
    return {"megabytes in float32": before / 1e6, "stored": size / 1e6, "codes": codes}


def evaluate(output: Path, quick: bool) -> dict[str, Any]:
    """The quantised model on held-out tasks, its experts as codes."""
    tasks = 4 if quick else 128
    options = f"names=(arithmetic/1):tasks={tasks}:max_tokens=104:max_turn_tokens=24"
    model = (f"--checkpoint={output / 'quantised'}", "--experts=nvfp4")
    where = output / "evaluation"
    _python(output, "eval.py", *model, f"--suites=environments:{options}", f"--output={where}")
    return evaluated(output)


def evaluated(output: Path) -> dict[str, Any]:
    """Success of the codes, with its 95 % interval."""
    report = json.loads((output / "evaluation" / "report.json").read_text("utf-8"))
    (suite,) = report["suites"].values()
    found = suite["values"]["reward"]
    low, high = found["interval"]
    return {
        "success of the codes": found["mean"],
        "95 % interval": f"{low:.2f} … {high:.2f}",
        "tasks": found["n"],
    }


def serve(output: Path, quick: bool) -> dict[str, Any]:
    """Start the server on the quantised model, ask it one question, stop it.

    It is a held-out task; the calculator that the model calls is the environment's own.
    """
    from nemotron_jax.environments import registry
    from nemotron_jax.environments.families.arithmetic import CalculatorSession

    task = registry["arithmetic"].split(0, "held_out", 0, level=1)
    calculator, messages, called = CalculatorSession(task), list(task.messages), []
    with _server(output) as address:
        began = time.monotonic()
        for _ in range(TURNS):
            body = {
                "messages": messages,
                "tools": task.tools,
                "max_tokens": 24,
                "temperature": 0,
                "chat_template_kwargs": {"enable_thinking": False},
            }
            message = _asked(f"{address}/v1/chat/completions", body)["choices"][0]["message"]
            messages.append(message)
            for call in message.get("tool_calls") or ():
                said = _called(calculator, call["function"])
                called.append(f"{call['function']['arguments']} → {said}")
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
            if not message.get("tool_calls"):
                break
        seconds = time.monotonic() - began
    answered = message["content"] or "nothing"
    calls = "; ".join(called)
    return {
        "asked": task.messages[-1]["content"],
        "called": calls,
        "answered": answered,
        "right answer": task.data["answer"],
        "seconds": seconds,
    }


def _called(calculator: Any, function: Mapping[str, str]) -> str:
    """What the calculator says to a call, whatever the model wrote."""
    from nemotron_jax.environments.base import ToolError

    try:
        return calculator.tool_calc(**json.loads(function["arguments"]))
    except (ToolError, TypeError, ValueError) as error:
        return f"error: {error}"


@contextlib.contextmanager
def _server(output: Path) -> Iterator[str]:
    """The address of a server that is healthy, for as long as the block takes."""
    port = free_port()
    command = [sys.executable, "-m", "nemotron_jax.serve", f"--port={port}", "--experts=nvfp4"]
    command += [f"--checkpoint={output / 'quantised'}", "--slots=2", "--max_length=256"]
    with (output / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + HEALTHY_WITHIN_S
        while not _is_healthy(address):
            if server.poll() is not None or time.monotonic() > until:
                raise ValueError(f"serve: it is not healthy; {output / 'server.log'} says why")
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def _is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _asked(url: str, body: Mapping[str, Any]) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HEALTHY_WITHIN_S) as reply:
        return json.load(reply)


def _questions() -> str:
    """Text in the model's own tokens, for the loss before and after."""
    from nemotron_jax.environments import registry

    tasks = [registry["arithmetic"].split(0, "held_out", n, level=1) for n in range(400)]
    return "\n".join(str(task.messages[-1]["content"]) for task in tasks)


def _last(directory: RunDirectory) -> dict[str, Any]:
    """The newest value of everything that metrics.jsonl has."""
    lines = directory.metrics.read_text("utf-8").splitlines()
    return {name: value for line in lines for name, value in json.loads(line).items()}


STAGES = (
    Stage(
        "pretrain",
        "2.9 M parameters on source text",
        pretrain,
        ("pretrain/plots/loss.png", "pretrain/plots/router.png"),
    ),
    Stage(
        "sft_and_grpo",
        f"0.55 M parameters: fine-tuned, on wrong guesses mostly; then {UPDATES} updates of GRPO",
        fine_tune,
        ("agent/sft/plots/loss.png",),
    ),
    Stage(
        "grpo",
        "what the rewards changed (its time is in the row above)",
        reinforce,
        ("agent/grpo/plots/reward.png",),
    ),
    Stage("quantise", "routed experts as NVFP4 codes", quantise),
    Stage("evaluate", "held-out tasks, experts as codes", evaluate),
    Stage("serve", "served, and asked one question", serve),
)


# What figures are called on the page; those of no name here are called as they are.
NAMES = {
    "step": "steps",
    "whole_held_out_loss": "held-out loss (nats a token)",
    "whole_bits_per_byte": "bits a byte",
    "held_out_loss": "held-out loss meanwhile",
    "loss": "training loss of the last batch",
    "success before": "success on held-out tasks before",
    "success after": "after",
}


def write_page(output: Path) -> Path:
    """report.html of what the stages came to."""
    kept = {s.name: json.loads((output / "stages" / f"{s.name}.json").read_text()) for s in STAGES}
    figures = {name: one["figures"] for name, one in kept.items()}
    total = lambda unit: sum(one[unit] for one in kept.values()) / 60
    parts = [
        Heading("A small model, from text to a served answer", 1),
        Sentences(
            (
                f"make speedrun took {total('seconds'):.0f} minutes on this machine's CPU,",
                f"{total('cpu_seconds'):.0f} minutes of one core's work.",
                *(
                    ["It had other work beside it."]
                    if total("cpu_seconds") < total("seconds") / 2
                    else []
                ),
            )
        ),
    ]
    if any(one["quick"] for one in kept.values()):
        parts.append(Sentences(("A few steps of each stage: nothing was learned.",)))
    rows = [
        [s.name, s.about, _words(figures[s.name]), *map(_minutes, map(kept[s.name].get, UNITS))]
        for s in STAGES
    ]
    parts.append(Grid("", ("stage", "what", "figures", "minutes", "CPU minutes"), rows))
    for stage in STAGES:
        there = [one for one in stage.pictures if (output / one).is_file()]
        parts += [Heading(stage.name)] if there else []
        parts += [Picture(f"{stage.name}, {Path(one).stem}", one) for one in there]
    parts += [Heading("What it says"), *_samples(output, figures)]
    with atomic_writer(output / "report.html") as file:
        file.write(page("speedrun", parts, output).encode())
    return output / "report.html"


UNITS = ("seconds", "cpu_seconds")


def _minutes(seconds: float) -> float | None:
    """Of a stage that did nothing by itself, none."""
    return round(seconds / 60, 1) if seconds >= 1 else None


def _samples(output: Path, figures: Mapping[str, Mapping[str, Any]]) -> Iterator[Part]:
    """What the pre-trained model writes, what the rewarded one does, and the served answer."""
    served = figures["serve"]
    if "asked" in served:
        lines = [served["asked"], *filter(None, [served.get("called")]), served["answered"]]
        yield Quote("the quantised model, served", "\n".join(lines), True)
    samples = RunDirectory(output / "pretrain").samples
    if samples.is_file():
        last = samples.read_text("utf-8").rpartition("\nstep ")[2].partition("\n")[2]
        yield Quote("the pre-trained model goes on with Python", textwrap.dedent(last)[:1500], True)
    file = output / "agent" / "grpo" / "transcripts.jsonl"
    if file.is_file():
        episodes = [record for _, record in read_objects(file) if record is not None]
        for title, one in (("first", episodes[0]), ("last", episodes[-1])):
            yield Quote(f"the {title} episode with rewards: {one['reward']:g}", _played(one), True)


def _played(episode: Mapping[str, Any]) -> str:
    """The words of an episode, by who says them."""
    lines = []
    for message in episode["messages"]:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        said = [message.get("content") or "", *(f"{c['name']}({c['arguments']})" for c in calls)]
        lines.append(f"{message['role']:10} {' '.join(said).strip()}")
    return "\n".join(lines)


def _words(figures: Mapping[str, Any]) -> str:
    named = {NAMES.get(name, name): value for name, value in figures.items()}
    digits = lambda value: f"{value:.3g}" if isinstance(value, float) else shown(value)
    return "; ".join(f"{name} {digits(value)}" for name, value in named.items())


if __name__ == "__main__":
    raise SystemExit(main())
