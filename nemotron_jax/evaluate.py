"""Suites on a checkpoint or a server, from what was asked to the report."""

import argparse
import contextlib
import dataclasses
import functools
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from nemotron_jax import command_line, distributed, host
from nemotron_jax.config.checks import check_value
from nemotron_jax.config.dtypes import dtype_name
from nemotron_jax.config.mesh_text import mesh_from_text
from nemotron_jax.config.model import ModelConfig
from nemotron_jax.config.run import MeshConfig, RunConfig
from nemotron_jax.run_directory import RunDirectory

if TYPE_CHECKING:  # jax reads the environment when it is imported
    from nemotron_jax.evaluation.subject import Subject
    from nemotron_jax.evaluation.suites import Planned

URL = ("http://", "https://")
COMMANDS = ("compare", "rescore")
# Up to so many parameters suites measure the untrained twin too, where they ask for it: it is as
# large as the model, and costs as much again.
MOST_TWIN_PARAMETERS = 10**9


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Where the report is, and the exit status: 1 where a suite failed, or none ran."""

    report: Path
    status: int


def evaluate(
    checkpoint: str | Path,
    suites: str,
    output: Path,
    *,
    config: RunConfig | None = None,
    seed: int = 0,
    dtype: str = "float32",
    mtp: str = "keep",
    mesh: str = "",
    experts: str = "dense",
    tokenizer: str = "",
    model_name: str = "",
) -> Evaluated:
    """Run the suites on a checkpoint or a server and write the report.

    `checkpoint` is a hub model's directory, a run's, one checkpoint of a run, or a URL. Results are
    kept under `output` as each suite ends, and not made again.

    Raises ValueError for a suite or an option that does not exist, a checkpoint that cannot be
    loaded, and a suite that needs what the checkpoint and the configuration lack; nothing is
    written then.
    """
    is_seed = type(seed) is int and 0 <= seed < 2**32
    check_value("evaluate", "seed", seed, is_seed, f"must be an integer from 0 to {2**32 - 1}")
    dtype = dtype_name("evaluate", dtype)
    axes = mesh_from_text(mesh)
    of_model = {"dtype": dtype, "mtp": mtp, "mesh": mesh, "experts": experts}
    _check_flags(str(checkpoint), of_model, model_name)
    _check_processes(str(checkpoint), axes, output)
    if axes is not None:
        devices = command_line.devices_here(axes.size, f"--mesh={mesh}")
        host.show_cpu_devices(devices, distributed.process_count())
    from nemotron_jax.evaluation.suites import planned

    plans = planned(suites)  # before anything slow is imported or read
    command_line.writable("output", output)
    subject = _subject(str(checkpoint), output, config, seed, tokenizer)
    subject = dataclasses.replace(subject, model_name=model_name)
    host.keep_compiled_programs()
    if subject.url:
        return _behind_url(subject, plans, output)
    return _in_memory(subject, plans, output, axes, dtype=dtype, mtp=mtp, experts=experts)


def command(arguments: Sequence[str]) -> int:
    """`compare A B … --output=DIR [--level=0.05]` or `rescore DIR`; the exit status."""
    parser = _Parser(prog="eval.py", description="Compare reports, or score one anew.")
    parts = parser.add_subparsers(dest="command", required=True)
    compare = parts.add_parser("compare", help="which differences are more than chance")
    compare.add_argument("directories", nargs="+", help="reports, or runs")
    compare.add_argument("--output", required=True, help="the comparison's directory")
    compare.add_argument("--level", type=float, default=0.05, help="of significance")
    rescore = parts.add_parser("rescore", help="score a report's transcripts anew")
    rescore.add_argument("directory", help="of a report")
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "rescore":
            from nemotron_jax.evaluation.rescore import rescore as again

            path = again(command_line.path_of("directory", asked.directory))
        else:
            from nemotron_jax.evaluation.compare import compare as against

            output = command_line.writable("output", asked.output)
            sides = [command_line.path_of("directory", side) for side in asked.directories]
            path = against(sides, output, asked.level)
    except (ValueError, OSError) as error:
        return _told(str(error))
    print(f"report: {path.with_suffix('.html')}")
    return 0


class _Parser(argparse.ArgumentParser):
    """A wrong argument is one line."""

    def error(self, message: str) -> NoReturn:
        """One line, status 2."""
        sys.exit(_told(f"{message}; --help says more"))


def _told(reason: str) -> int:
    print(f"eval.py: {' '.join(reason.split())}", file=sys.stderr)
    return 2


# How a model is loaded where no flag says so.
_AS_LOADED = {"dtype": "float32", "mtp": "keep", "mesh": "", "experts": "dense"}


def _check_flags(checkpoint: str, of_model: dict[str, str], model_name: str) -> None:
    """Raise ValueError for a flag that would change nothing."""
    if not checkpoint.startswith(URL):
        if model_name:
            raise ValueError(
                f"--model={model_name}: names a model of a server, and --checkpoint={checkpoint} "
                "is a directory; leave --model out"
            )
        return
    if not _is_server(checkpoint):
        raise ValueError(f"--checkpoint={checkpoint}: names no server; give its http://HOST:PORT")
    for name, value in of_model.items():
        if value != _AS_LOADED[name]:
            raise ValueError(
                f"--{name}={value}: {checkpoint} is a server, which runs its model as it was "
                f"started; leave --{name} out, or name a directory as --checkpoint"
            )


def _is_server(url: str) -> bool:
    """Whether a URL has a host and, if any, a port."""
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0  # ValueError for one that is no number
    except ValueError:
        return False


def _check_processes(checkpoint: str, axes: MeshConfig | None, output: Path) -> None:
    """Raise ValueError for what several processes cannot evaluate together."""
    if (count := distributed.process_count()) == 1:
        return
    if checkpoint.startswith(URL):
        raise ValueError(f"--checkpoint={checkpoint}: one process asks a server; start one")
    if axes is None:
        raise ValueError(
            f"--mesh=: {count} processes evaluate one model on a mesh; name its axes, as in "
            f"--mesh=fsdp={count}"
        )
    distributed.check_shared("output", output)


def _subject(
    checkpoint: str, output: Path, config: RunConfig | None, seed: int, tokenizer: str
) -> "Subject":
    from nemotron_jax.evaluation.subject import Subject
    from nemotron_jax.training.limits import check_kernels

    if checkpoint.startswith(URL):
        facts = {"url": checkpoint, "tokenizer_path": tokenizer}
        return Subject(None, config, output / "data", seed, **facts)
    path = command_line.path_of("checkpoint", checkpoint)
    run = RunDirectory.of_model(path, "--checkpoint")
    own = run and run.read()
    if config or own:
        check_kernels(config or own)
    is_own = own is not None and (config is None or config.data == own.data)
    directory = run.path if run else path
    data_directory = directory if is_own and not tokenizer else output / "data"
    model = own.model if own else ModelConfig.from_hf(path)
    return Subject(
        directory,
        config or own,
        data_directory,
        seed,
        model,
        tokenizer_path=tokenizer,
        loaded_from=path,
    )


def _in_memory(
    subject: "Subject",
    plans: "Sequence[Planned]",
    output: Path,
    axes: MeshConfig | None,
    *,
    dtype: str,
    mtp: str,
    experts: str,
) -> Evaluated:
    import jax

    from nemotron_jax.evaluation.context import Shared
    from nemotron_jax.evaluation.facts import data_sha256, model_facts
    from nemotron_jax.evaluation.runner import Runner, check_ready, longest_request
    from nemotron_jax.pretrained import load_pretrained, load_rounded
    from nemotron_jax.sharding import make_mesh

    why = check_ready(plans, subject)
    placed = None if axes is None else make_mesh(axes, jax.devices())
    with contextlib.nullcontext() if placed is None else jax.set_mesh(placed):
        model = load_rounded(subject.loaded_from, dtype, mtp=mtp, mesh=placed, experts=experts)
        facts = model_facts(subject, model)
        load = functools.partial(load_pretrained, dtype=dtype, mtp=mtp, mesh=placed)
        subject = dataclasses.replace(subject, load=load)
        execution = {} if subject.config is None else {"execution": subject.config.execution}
        longest = longest_request([p for p in plans if p.suite.name not in why], subject)
        shared = Shared(
            model,
            longest=longest,
            tokenizer=subject.tokenizer_if_any,
            seed=subject.seed,
            **execution,
        )
        key = {"model": facts, "seed": subject.seed, "data": data_sha256(subject)}
        twins = facts["parameters"] <= MOST_TWIN_PARAMETERS
        runner = Runner(subject, output, key, shared, twins=twins)
        return _reported(runner, plans, why, facts)


def _behind_url(subject: "Subject", plans: "Sequence[Planned]", output: Path) -> Evaluated:
    from nemotron_jax.evaluation.facts import data_sha256, model_facts
    from nemotron_jax.evaluation.runner import Runner, check_ready
    from nemotron_jax.evaluation.url import Url

    why = check_ready(plans, subject)
    facts = model_facts(subject, None)
    key = {"model": facts, "seed": subject.seed, "data": data_sha256(subject)}
    url = Url(subject.url, subject.model_name)
    return _reported(Runner(subject, output, key, url=url), plans, why, facts)


def _reported(runner, plans: "Sequence[Planned]", why: dict[str, str], model: dict) -> Evaluated:
    """Run the suites and write what they found."""
    from nemotron_jax.evaluation.facts import where_and_when
    from nemotron_jax.evaluation.report import write_report

    facts = {"model": model, "seed": runner.subject.seed, **where_and_when()}
    records = runner.run(plans, why)
    found = {record["status"] for record in records.values()}
    status = int("failed" in found or "ok" not in found)
    if not distributed.is_first():
        return Evaluated(runner.output, status)
    abouts = {plan.suite.name: plan.suite.about for plan in plans}
    path = write_report(runner.output, facts, records, abouts, runner.lines)
    print(f"report: {path.with_suffix('.html')}")
    return Evaluated(path, status)
