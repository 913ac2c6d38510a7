"""A day's calendar, filled over several turns: windows, lengths, nothing at the same time."""

import re

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.fences import read_answer
from nemotron_jax.environments.schema import canonical, faults
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import FIRST, ask

_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)
_EVENT = {
    "type": "object",
    "properties": {key: {"type": "string", "maxLength": 40} for key in ("event", "start", "end")},
    "required": ["event", "start", "end"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": _EVENT, "maxItems": 20}
_DAY = 8 * 60, 18 * 60
_SLOT = 15
# Events asked for at each turn, by level.
_TURNS = ((1,), (2,), (1, 2), (2, 2, 2))
Times = dict[str, tuple[int, int]]


def clock(minutes: int) -> str:
    """Minutes since midnight as HH:MM."""
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def minutes(text: str) -> int | None:
    """Minutes since midnight of a text HH:MM; None for any other text."""
    match = _CLOCK.fullmatch(text)
    return int(match[1]) * 60 + int(match[2]) if match else None


def read_calendar(text: str) -> Times | None:
    """Events with start and end in minutes; None unless the text is such a list and no more."""
    try:
        value = read_answer(text)
    except ValueError:
        return None
    if faults(value, SCHEMA):
        return None
    placed = {item["event"]: (minutes(item["start"]), minutes(item["end"])) for item in value}
    whole = len(placed) == len(value) and all(None not in times for times in placed.values())
    return placed if whole else None


class CalendarSession(Session):
    def answered(self, text: str) -> str | None:
        after = self.task.data["after"]
        place = len(self.turns) - 1
        return after[place] if place < len(after) else None

    def score(self) -> Verdict:
        batches = self.task.data["batches"]
        if len(self.turns) < len(batches):
            return Verdict(0.0, {"turns": len(self.turns) / len(batches)})
        wanted: list[dict] = []
        kept = []
        for turn, batch in zip(self.turns, batches):
            wanted += batch
            kept.append(fits(read_calendar(turn.text), wanted))
        return Verdict(float(all(kept)), {"turns_right": sum(kept) / len(kept)})


def fits(placed: Times | None, wanted: list[dict]) -> bool:
    """Whether a calendar holds just the events wanted, each in its window, none at once."""
    if placed is None or placed.keys() != {event["event"] for event in wanted}:
        return False
    for event in wanted:
        start, end = placed[event["event"]]
        if end - start != event["length"] or start < event["from"] or end > event["to"]:
            return False
    times = sorted(placed.values())
    return all(one[1] <= two[0] for one, two in zip(times, times[1:]))


class Calendar(Environment):
    """The windows are laid around times that work, so a calendar exists at every turn."""

    name = "calendar"
    summary = "Place events in a day over several turns; reply with the whole calendar as JSON"
    reward = "constraints on state"
    counterpart = "calendar"
    levels = 4
    max_turns = 3
    session = CalendarSession

    def draw(self, draws: Draws, level: int) -> Draft:
        total = sum(_TURNS[level])
        names = draws.sample(FIRST, total)
        starts = draws.sample(range(_DAY[0], _DAY[1] - 60, 75), total)
        events = []
        for name, start in zip(names, starts):
            length = draws.choice([15, 30, 45, 60])
            before, behind = _SLOT * draws.below(8), _SLOT * draws.below(8)
            low, high = max(_DAY[0], start - before), min(_DAY[1], start + length + behind)
            event = {"event": name, "length": length, "from": low, "to": high, "start": start}
            events.append(event)
        batches, place = [], 0
        for count in _TURNS[level]:
            batches.append(events[place : place + count])
            place += count
        words = [_told(batch) for batch in batches]
        form = 'Reply with JSON alone: [{"event": …, "start": "HH:MM", "end": "HH:MM"}, …]'
        opening = f"{words[0]}. {form}"
        if level:
            opening += ", all events so far, none at the same time as another."
        data = {"batches": batches, "after": [f"Also: {text}." for text in words[1:]]}
        return Draft(ask(opening), data)  # the side is that of what is shown first

    def oracle(self, task: Task) -> list[Turn | str]:
        return _turns(task, 0)

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        ways = [[f"```json\n{text}\n```" for text in _turns(task, 0)]]
        wanted = [event for batch in task.data["batches"] for event in batch]
        for shift in (-_SLOT, 5, _SLOT):
            turns = _turns(task, shift)
            if fits(read_calendar(turns[-1]), wanted):
                ways.append(turns)
        return ways

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        batches = task.data["batches"]
        right = _turns(task, 0)
        events = [event for batch in batches for event in batch]
        short = [event | {"length": event["length"] - 5} for event in events]
        outside = [event | {"start": event["to"]} for event in events]
        cheats: dict[str, list[Turn | str]] = {
            "too short": [*right[:-1], _listed(short)],
            "outside its window": [*right[:-1], _listed(outside)],
            "an event missing": [*right[:-1], _listed(events[1:])],
            "an event twice": [*right[:-1], _listed([*events, events[0]])],
            "an event made up": [*right[:-1], _listed([*events, events[0] | {"event": "x"}])],
            "prose around": [*right[:-1], f"Here: {right[-1]}"],
        }
        if len(events) > 1:
            start = events[0]["start"]
            same = [event | {"start": start} for event in events]
            cheats["all at once"] = [*right[:-1], _listed(same)]
        if len(batches) > 1:
            cheats["one turn for all"] = [right[-1]]
        return cheats


def _told(batch: list[dict]) -> str:
    told = []
    for event in batch:
        window = f"{clock(event['from'])}-{clock(event['to'])}"
        told.append(f"{event['event']}, {event['length']} min, within {window}")
    return "; ".join(told)


def _listed(events: list[dict], shift: int = 0) -> str:
    return canonical(
        [
            {
                "event": event["event"],
                "start": clock(max(0, event["start"] + shift)),
                "end": clock(max(0, event["start"] + shift) + event["length"]),
            }
            for event in events
        ]
    )


def _turns(task: Task, shift: int) -> list[str]:
    known: list[dict] = []
    turns = []
    for batch in task.data["batches"]:
        known = [*known, *batch]
        turns.append(_listed(known, shift))
    return turns


ENVIRONMENTS = (Calendar(),)
