"""Suites one after the other: each is kept when it ends, and none costs the others their report."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_jax import distributed
from nemotron_jax.evaluation import kept
from nemotron_jax.evaluation.context import Context, Shared
from nemotron_jax.evaluation.progress import Progress
from nemotron_jax.evaluation.subject import Subject
from nemotron_jax.evaluation.suite import Result, Suite, Unanswered, Unavailable
from nemotron_jax.evaluation.suites import Planned
from nemotron_jax.evaluation.transcripts import Line, Transcripts, read_lines, write_lines
from nemotron_jax.evaluation.url import Url

Record = dict[str, Any]


def check_ready(plans: Sequence[Planned], subject: Subject) -> dict[str, str]:
    """Why suites cannot run on the subject, by name: those of `all`, and those that lack something.

    Raises ValueError for one that was named and asks for what makes no sense here.
    """
    why = {}
    for plan in plans:
        try:
            _check_needs(plan.suite, subject)
            plan.suite.ready(subject, plan.options)
        except Unavailable as error:
            why[plan.suite.name] = str(error)
        except (ValueError, OSError) as error:
            if plan.named:
                raise
            why[plan.suite.name] = str(error)
    return why


def _check_needs(suite: Suite, subject: Subject) -> None:
    if suite.needs == "model" and subject.url:
        raise ValueError(
            f"suite {suite.name!r}: needs a model in memory, and {subject.url} is a server; name a "
            "directory as --checkpoint"
        )
    if suite.needs == "url" and not subject.url:
        raise ValueError(
            f"suite {suite.name!r}: needs a server; give its http://HOST:PORT as --checkpoint"
        )
    if suite.one_process and distributed.process_count() > 1:
        raise ValueError(
            f"suite {suite.name!r}: one process measures it, and there are "
            f"{distributed.process_count()}; evaluate it with one"
        )


def longest_request(plans: Sequence[Planned], subject: Subject) -> int:
    """Tokens of the longest request of all suites; 0 where none makes any."""
    asked = [p.suite.longest(subject, p.options) for p in plans if p.suite.longest is not None]
    return max(asked, default=0)


@dataclasses.dataclass
class Runner:
    """Runs suites on one subject and keeps their results under `output`.

    `facts` is what results depend on beside suite and options: with it they are found again.
    `twins`: whether suites measure the untrained twin too, where they ask for it.
    """

    subject: Subject
    output: Path
    facts: Mapping[str, Any]
    shared: Shared | None = None
    url: Url | None = None
    twins: bool = True
    lines: list[Line] = dataclasses.field(default_factory=list)  # of all transcripts

    def run(self, plans: Sequence[Planned], why: Mapping[str, str]) -> dict[str, Record]:
        """A record of each suite by name; `why` are those that cannot run, as `check_ready` says.

        A suite's own failure is a record with a sentence.
        """
        return {plan.suite.name: self._one(plan, why.get(plan.suite.name)) for plan in plans}

    def _one(self, plan: Planned, why: str | None) -> Record:
        suite, progress = plan.suite, Progress(plan.suite.name)
        options = kept.finite(dataclasses.asdict(plan.options))
        key = {"suite": suite.name, "options": options, **self.facts}
        path = kept.path_of(self.output, suite.name, key)
        if (found := distributed.from_first(lambda: kept.read(path))) is not None:
            progress.note(f"as kept in {path.name}")
            self.lines += read_lines(path.with_suffix(".jsonl"))
            return found
        record: Record = {"options": options, "status": "ok", "why": "", "kept": path.name}
        record |= {"seconds": 0.0, "cpu_seconds": 0.0}
        empty = kept.record_of(Result({}))
        if why is not None:
            status = "failed" if plan.named else "skipped"
            progress.note(f"{status}: {why}")
            return record | {"status": status, "why": why} | empty
        progress.note("running")
        start, cpu = time.perf_counter(), time.process_time()
        transcripts = Transcripts(suite)
        try:
            result, twin = self._measured(plan, transcripts, progress)
        except Exception as error:  # whatever it is, other suites are measured
            if distributed.process_count() > 1 and not isinstance(error, Unavailable | ValueError):
                raise  # the others may not have met it, and would wait for this one
            why = self._told(error, path)
            skips = isinstance(error, Unavailable) and not isinstance(error, Unanswered)
            skips = skips and not plan.named
            status = "skipped" if skips else "failed"
            progress.note(f"{status}: {why}")
            return record | {"status": status, "why": why} | empty
        record["seconds"] = round(time.perf_counter() - start, 3)
        record["cpu_seconds"] = round(time.process_time() - cpu, 3)
        record |= kept.record_of(result, twin)
        self.lines += transcripts.lines
        if distributed.is_first():
            if transcripts.lines:
                write_lines(path.with_suffix(".jsonl"), transcripts.lines)
            kept.keep(path, key, record)
        progress.note(f"done in {record['seconds']:.0f} s")
        return record

    def _measured(
        self, plan: Planned, transcripts: Transcripts, progress: Progress
    ) -> tuple[Result, Result | None]:
        suite = plan.suite
        context = Context(self.subject, transcripts, progress, self.shared, url=self.url)
        result, twin = suite.measure(context, plan.options), None
        if self.twins and suite.untrained is not None and self.shared is not None:
            with contextlib.suppress(Unavailable):
                other = dataclasses.replace(context, transcripts=Transcripts(suite), is_twin=True)
                twin = suite.measure(other, suite.untrained(plan.options))
        return result, twin

    def _told(self, error: Exception, path: Path) -> str:
        """A failure as a sentence; where it is none of ours, its traceback goes beside the
        result."""
        text = " ".join(str(error).split())
        if isinstance(error, Unavailable | ValueError | OSError):
            return text or type(error).__name__
        trace = path.with_suffix(".traceback.txt")
        kept.write_text(trace, "".join(traceback.format_exception(error)))
        first = text[:300] or "no message"
        return f"{type(error).__name__}: {first}; its traceback is in suites/{trace.name}"
