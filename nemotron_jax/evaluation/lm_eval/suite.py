"""Tasks of EleutherAI's lm-evaluation-harness, five of which are here and need no network."""

import contextlib
import dataclasses
import importlib.metadata
import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemotron_jax.config.checks import at_least_one, check, counts
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.statistics import counts_of, items_of, value_over
from nemotron_jax.evaluation.suite import (
    Result,
    Score,
    Suite,
    Table,
    Unavailable,
    Value,
    as_tuples,
    once_each,
)

LOCAL_FOLDER = Path(__file__).parent / "tasks"
LOCAL = ("local_next", "local_kinds", "local_cloze", "local_prose", "local_sums")
_OLDEST = (0, 4, 13)  # earlier ones need torch
MORE = 2  # tokens that a request has beyond the context: the last that is scored, and a new one
ROLLING, CHOICE, WRITTEN = "loglikelihood_rolling", "multiple_choice", "generate_until"
_EQUALITY = ("acc", "exact_match")  # lm-eval's measures that say no more than equality does
_UNTRAINED = 32  # rows of a task that the untrained twin answers


@dataclasses.dataclass(frozen=True)
class LmEvalOptions:
    """`tasks` by name; `limit` rows of each (None: all); `fewshot` worked examples before each
    (None: as the task says); `chat`: through the chat template; `include`: a folder of the user's
    own tasks, whose Python runs; `length`: the context in tokens."""

    tasks: tuple[str, ...] = LOCAL
    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    include: str = ""
    length: int = 2048

    def __post_init__(self) -> None:
        as_tuples(self, "tasks")
        ok = once_each(self.tasks) and all(isinstance(one, str) and one for one in self.tasks)
        check(self, "tasks", ok, "must be names, each once")
        if self.limit is not None:
            at_least_one(self, "limit")
        if self.fewshot is not None:
            counts(self, "fewshot")
        check(self, "chat", isinstance(self.chat, bool), "must be True or False")
        ok = isinstance(self.include, str) and (not self.include or Path(self.include).is_dir())
        check(self, "include", ok, "must be a folder that exists")
        at_least_one(self, "length")
        check(self, "length", self.length >= 64, "must be at least 64 tokens")


def measure(context: Any, options: LmEvalOptions) -> Result:
    """Ask all rows of the tasks; lm-eval makes requests of them, and judges the answers."""
    _require_package()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of its defaults at length
    from lm_eval.evaluator import simple_evaluate

    from nemotron_jax.evaluation.lm_eval.adapter import Harness

    model = Harness(
        context.ask,
        context.tokenizer,
        max_length=options.length,
        chat=options.chat,
        seed=context.seed,
    )
    manager = task_manager(options)
    with contextlib.redirect_stderr(io.StringIO()):  # its own bars; progress is shown on stdout
        found = simple_evaluate(
            model=model,
            tasks=list(options.tasks),
            num_fewshot=options.fewshot,
            limit=options.limit,
            bootstrap_iters=0,  # intervals are this project's own, over rows
            apply_chat_template=options.chat,
            task_manager=manager,
        )
    for name, samples in found["samples"].items():
        kind = found["configs"][name]["output_type"]
        rows = {int(one["doc_id"]): one for one in reversed(samples)}  # its first filter's
        for index in sorted(rows):
            row = row_of(kind, rows[index])
            answer = Answer(row.pop("answer"))
            if kind == WRITTEN:
                whole = model.written.get(row["prompt"], answer)
                answer = dataclasses.replace(whole, text=answer.text)
            context.transcripts.add(
                answer,
                task=f"{name}/{index}",
                index=index,
                seed=context.seed,
                prompt=row.pop("prompt"),
                gold=row.pop("gold"),
                of=name,
                **row,
            )
    return summarise(context.transcripts.lines, options)


def task_manager(options: LmEvalOptions) -> Any:
    """lm-eval's index of tasks: the local ones, the user's own, and its own where one is asked for.

    Raises ValueError for a task that none of them has.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(LOCAL_FOLDER), *([options.include] if options.include else [])]
    for others in (False, True):  # its own are 14,000 files: they are looked at when needed
        manager = TaskManager(include_path=folders, include_defaults=others)
        unknown = [name for name in options.tasks if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise ValueError(
        f"lm_eval:tasks: lm-eval knows no {unknown[0]!r}; the local ones are {', '.join(LOCAL)}, "
        "and `lm-eval ls tasks` lists its own"
    )


def row_of(kind: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One of lm-eval's samples: prompt, answer, gold and what else a score needs.

    Of choices the answer is the likeliest, of a continuation it is that where it is the greedy
    one, and a text that is only scored has none.
    """
    requests, responses = sample["arguments"], sample["filtered_resps"]
    prompt, measures = str(requests[0][0]), sample["metrics"]
    row: dict[str, Any] = {"kind": kind, "prompt": prompt, "gold": str(sample["target"]).strip()}
    if kind == ROLLING:
        nats = float(np.ravel(responses[0])[0])
        return row | {"answer": "", "gold": "", "nats": nats, "bytes": len(prompt.encode())}
    if kind == CHOICE:
        texts = [str(text).strip() for _, text in requests]
        scores = [float(score) for score, _ in responses]
        target = sample["target"]
        gold = texts[target] if isinstance(target, int) and target in range(len(texts)) else target
        answer = texts[max(range(len(scores)), key=scores.__getitem__)]
        row |= {"answer": answer, "gold": str(gold).strip(), "choices": texts}
        row |= {"loglikelihoods": scores, "chance": 1 / len(texts)}
    elif kind == WRITTEN:
        text = responses[0] if isinstance(responses[0], str) else responses[0][0]
        row["answer"] = str(text).strip()
    else:
        (nats, greedy), text = responses[0], str(requests[0][1]).strip()
        row |= {"answer": text if greedy else "", "gold": text, "nats": float(nats)}
    numbers = {name: sample[name] for name in measures if isinstance(sample[name], int | float)}
    own = {name: float(value) for name, value in numbers.items()}
    equal = float(row["answer"] == row["gold"])
    judged = own if not any(own.get(name) == equal for name in _EQUALITY) else {}
    return row | ({"lm_eval": judged} if judged else {})


def score(line: Mapping[str, Any]) -> Score:
    """Whether the answer is the right one, as text; where lm-eval judges in another way, its first
    measure of the row; nothing for a text that is only scored."""
    if line["kind"] == ROLLING:
        bits = -line["nats"] / math.log(2) / max(line["bytes"], 1)
        return Score(0.0, f"{bits:.4f} bits a byte")
    answered = line["kind"] != WRITTEN or bool(line["answer"])
    if judged := line.get("lm_eval"):
        name, value = next(iter(judged.items()))
        return Score(min(max(value, 0.0), 1.0), f"lm-eval: {name} {value:.4g}", answered)
    equal = line["answer"].strip() == line["gold"].strip()
    return Score(float(equal), "the right text" if equal else "another text", answered)


def summarise(lines: Sequence[Mapping[str, Any]], options: LmEvalOptions) -> Result:
    """A value or two of each task, and their table."""
    values: dict[str, Value] = {}
    for task in dict.fromkeys(line["of"] for line in lines):
        values |= _values(task, [line for line in lines if line["of"] == task])
    if not values:
        raise Unavailable("no row was answered")
    rows = [
        (name, one.n, one.mean, *(one.interval or (None, None)), one.chance, one.unit)
        for name, one in values.items()
    ]
    columns = ("task", "rows", "value", "95 % from", "to", "a guess", "unit")
    written = [line for line in lines if line["kind"] == WRITTEN]
    return Result(
        values,
        counts_of(written),
        tables=(Table("lm-evaluation-harness", columns, tuple(rows)),),
        headline=tuple(name for name, one in values.items() if one.better == "higher"),
    )


def _values(task: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Value]:
    kind = lines[0]["kind"]
    if kind == ROLLING:
        bits = {x["task"]: (-x["nats"] / math.log(2), float(x["bytes"])) for x in lines}
        return {f"{task}_bits_per_byte": value_over(bits, unit="bits a byte", better="lower")}
    values = {}
    if any("lm_eval" in line for line in lines):
        for name in next(line["lm_eval"] for line in lines if "lm_eval" in line):
            items = {x["task"]: (x.get("lm_eval", {}).get(name, x["score"]), 1.0) for x in lines}
            values[f"{task}_{name}"] = value_over(items, unit=name)
    else:
        chances = [line["chance"] for line in lines if "chance" in line]
        chance = sum(chances) / len(chances) if chances else None
        values[task] = value_over(items_of(lines), unit="share of rows", chance=chance)
    if "nats" in lines[0]:
        nats = {line["task"]: (-line["nats"], 1.0) for line in lines}
        values[f"{task}_nats"] = value_over(nats, unit="nats an answer", better="lower")
    return values


def _require_package() -> None:
    """Raise Unavailable where lm-eval is missing or needs torch."""
    way_out = "pip install -e '.[eval]'"
    try:
        version = importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"the package lm-eval is not installed; {way_out}") from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < _OLDEST:
        least = ".".join(map(str, _OLDEST))
        raise Unavailable(f"lm-eval {version} is older than {least}; {way_out}")


def _ready(subject: Any, options: LmEvalOptions) -> None:
    _require_package()
    if options.chat:
        subject.require_tokens("<|im_start|>", way_out="chat=False")


SUITE = Suite(
    name="lm_eval",
    about="tasks of EleutherAI's lm-evaluation-harness, by default five that are here",
    options=LmEvalOptions,
    measure=measure,
    needs="either",
    ready=_ready,
    longest=lambda subject, options: options.length + MORE,
    untrained=lambda options: dataclasses.replace(
        options, limit=min(options.limit or _UNTRAINED, _UNTRAINED)
    ),
    score=score,
    summarise=summarise,
)
