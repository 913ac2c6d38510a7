"""Office work by kind: one call, several at once, none, or a conversation; no jax is needed.

The kinds are those of BFCL (Patil et al. 2025): parallel calls stand in one turn in any order, an
irrelevant request is answered without a call, and in a conversation the state is compared after
each of the user's turns.
"""

from collections.abc import Callable, Sequence

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.families.workplace import drawn_office
from nemotron_jax.environments.office import CUSTOMER_STATES, TASK_STATES, TOOLS, Office, State
from nemotron_jax.environments.turns import ToolCall, Turn
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, THINGS, ask, coined

KINDS = ("single", "parallel", "irrelevant", "multi_turn")
_SHOWN = 8  # tools that a task comes with; all 23 would fill a small model's context
_TURNS = 12  # of an episode: two searches, a call and an answer for each of three requests
_BY_NAME = {spec["function"]["name"]: spec for spec in TOOLS}

Call = list  # name, arguments
# What a tool is asked for with, and where each argument is drawn from: a table's ids, or FIELDS.
_REQUESTS = (
    ("delete_email", "Delete the mail {id}.", {"id": "email"}),
    ("reply_email", "Reply to the mail {id}: “{body}”", {"id": "email", "body": "body"}),
    ("forward_email", "Forward the mail {id} to {to}.", {"id": "email", "to": "address"}),
    (
        "send_email",
        "Send a mail to {to} with the subject “{subject}” and the text “{body}”.",
        {"to": "address", "subject": "title", "body": "body"},
    ),
    ("cancel_event", "Cancel the event {id}.", {"id": "events"}),
    ("rename_event", "Rename the event {id} to “{title}”.", {"id": "events", "title": "title"}),
    (
        "move_event",
        "Move the event {id} to {date} at {time}.",
        {"id": "events", "date": "date", "time": "time"},
    ),
    (
        "add_event",
        "Put “{title}” with {who} into the calendar, on {date} at {time}.",
        {"title": "title", "who": "address", "date": "date", "time": "time"},
    ),
    ("delete_task", "Delete the task {id}.", {"id": "tasks"}),
    (
        "set_task",
        "The task {id} is {status} now. Note it.",
        {"id": "tasks", "status": "work"},
    ),
    ("assign_task", "Give the task {id} to {owner}.", {"id": "tasks", "owner": "address"}),
    (
        "add_task",
        "Add the task “{title}” for {owner}, due on {due}.",
        {"title": "title", "owner": "address", "due": "date"},
    ),
    ("delete_customer", "Remove the customer {id}.", {"id": "customers"}),
    (
        "set_customer",
        "The customer {id} is {status} now. Note it.",
        {"id": "customers", "status": "trade"},
    ),
    (
        "assign_customer",
        "{owner} takes over the customer {id}.",
        {"id": "customers", "owner": "address"},
    ),
    (
        "add_customer",
        "Add the customer {name} in {city}; {owner} looks after it.",
        {"name": "name", "city": "city", "owner": "address"},
    ),
)
# What no tool of an office does.
_ELSEWHERE = (
    "What will the weather be like in {city} on {date}?",
    "Which colour do you get from {colour} and white?",
    "Translate “the {thing} is {colour}” into French.",
    "How far is it from {city} to the sea?",
    "Write one line of verse about a {colour} {thing}.",
    "Play some quiet music in the kitchen.",
    "Turn the lamp above the {thing} {colour}.",
    "Book me a flight to {city} for {date}.",
    "What is {count} times {other}?",
    "Who wrote the song about the {colour} {thing}?",
)


class ToolSession(Session):
    """The office under a model's hands, and whether each of the user's turns ended right."""

    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self.office = Office(task.data["state"])
        self.ended: list[bool] = []

    def run_tool(self, name: str, arguments: dict) -> str:
        return self.office.call(name, arguments)

    def answered(self, text: str) -> str | None:
        self.ended.append(bool(text.strip()) and self._is_right(len(self.ended)))
        after = self.task.data["after"]
        return after[len(self.ended) - 1] if len(self.ended) <= len(after) else None

    def score(self) -> Verdict:
        kind, stages = self.task.data["kind"], self.task.data["stages"]
        calling = sum(bool(turn.calls) for turn in self.turns)
        parts = {"calls": float(len(self.calls))}
        parts["failed"] = float(sum(result.startswith("error") for *_, result in self.calls))
        if kind == "irrelevant":
            return Verdict(float(not calling and self.ended == [True]), parts)
        reached = len(self.ended) >= len(stages) - 1
        before = all(self.ended[: len(stages) - 1])
        right = reached and before and self._is_right(len(stages) - 1)
        if kind == "parallel":
            right = right and calling == 1
        return Verdict(float(right), parts)

    def _is_right(self, stage: int) -> bool:
        wanted = Office(self.task.data["state"])
        for calls in self.task.data["stages"][: stage + 1]:
            for name, arguments in calls:
                wanted.call(name, arguments)
        return self.office.normal_form() == wanted.normal_form()


class ToolTasks(Environment):
    """Its levels are the KINDS; it is not registered, since nobody trains on what is measured."""

    name = "tool_use"
    summary = "Use some tools of an office: once, several at once, not at all, over several turns"
    reward = "final state"
    counterpart = "none"
    levels = len(KINDS)
    max_turns = _TURNS
    session = ToolSession

    def draw(self, draws: Draws, level: int) -> Draft:
        kind, state = KINDS[level], drawn_office(draws)
        after: list[str] = []
        stages: list[list[Call]] = []
        look: list[list[Call]] = []
        needed: set[str] = set()
        if kind == "irrelevant":
            opening = _elsewhere(draws)
        elif kind == "multi_turn":
            said, look, stages = _conversation(draws, state)
            opening, *after = said
        else:
            requests = _several(draws, state, 1 if kind == "single" else draws.between(2, 4))
            opening = " ".join(words for words, _ in requests)
            stages = [[call for _, call in requests]]
        needed |= {call[0] for calls in (*stages, *look) for call in calls}
        tools = _shown(draws, needed)
        data = {"kind": kind, "state": state, "stages": stages, "look": look, "after": after}
        identity = [kind, opening, after, stages]
        return Draft(ask(opening), data, tools, identity=identity)

    def oracle(self, task: Task) -> list[Turn | str]:
        turns: list[Turn | str] = []
        data = task.data
        if data["kind"] == "irrelevant":
            return ["None of my tools does that."]
        for number, calls in enumerate(data["stages"]):
            for call in data["look"][number] if data["look"] else ():
                turns.append(Turn(calls=(ToolCall(*call),)))
            turns += [Turn(calls=tuple(ToolCall(*call) for call in calls)), "It is done."]
        return turns


def always_calls(task: Task) -> list[Turn | str]:
    """Turns of somebody who calls the first tool whatever is asked, and says that it is done."""
    name = task.tools[0]["function"]["name"]
    known = {"id": "e1000", "to": "ana.adler@example.com", "owner": "ana.adler@example.com"}
    properties = task.tools[0]["function"]["parameters"]["properties"]
    given = {key: rule.get("enum", [known.get(key, "now")])[0] for key, rule in properties.items()}
    answers = [Turn(calls=(ToolCall(name, given),)), "It is done."]
    return answers * (1 + len(task.data["after"]))


def never_calls(task: Task) -> list[Turn | str]:
    """Turns of somebody who only talks."""
    return ["It is done."] * (1 + len(task.data["after"]))


def _shown(draws: Draws, needed: set[str]) -> tuple[dict, ...]:
    """The needed tools among others."""
    others = [name for name in _BY_NAME if name not in needed]
    names = [*sorted(needed), *draws.sample(others, max(_SHOWN - len(needed), 2))]
    return tuple(_BY_NAME[name] for name in draws.shuffled(names))


def _several(draws: Draws, state: State, count: int) -> list[tuple[str, Call]]:
    """Requests on different records, each with its call, which changes something."""
    taken: set[str] = set()
    out = []
    for tool, words, fields in draws.sample(_REQUESTS, count):
        given = {key: _drawn(draws, state, what, taken) for key, what in fields.items()}
        while _changes_nothing(state, tool, given):
            given = {key: _drawn(draws, state, what, taken) for key, what in fields.items()}
        out.append((words.format(**given), [tool, given]))
    return out


def _changes_nothing(state: State, tool: str, given: dict) -> bool:
    office = Office(state)
    office.call(tool, given)
    return office.normal_form() == Office(state).normal_form()


def _drawn(draws: Draws, state: State, what: str, taken: set[str]) -> str:
    if what in state:
        record = draws.choice([id for id in state[what] if id not in taken])
        taken.add(record)
        return record
    return _FIELDS[what](draws, state)


def _address(draws: Draws, state: State) -> str:
    return draws.choice([person["email"] for person in state["people"].values()])


def _date(draws: Draws, state: State) -> str:
    return f"2027-{draws.between(1, 12):02d}-{draws.between(1, 28):02d}"


def _time(draws: Draws, state: State) -> str:
    return f"{draws.between(6, 20):02d}:{draws.choice(['05', '20', '35', '50'])}"


_FIELDS: dict[str, Callable[[Draws, State], str]] = {
    "address": _address,
    "date": _date,
    "time": _time,
    "title": lambda draws, state: f"{draws.choice(COLOURS)} {draws.choice(THINGS)} day",
    "body": lambda draws, state: f"Bring {draws.between(2, 40)} {draws.choice(THINGS)}s.",
    "work": lambda draws, state: draws.choice(TASK_STATES),
    "trade": lambda draws, state: draws.choice(CUSTOMER_STATES),
    "name": lambda draws, state: f"{coined(draws, 3).capitalize()} Ltd",
    "city": lambda draws, state: draws.choice(CITIES),
}


def _conversation(
    draws: Draws, state: State
) -> tuple[list[str], list[list[Call]], list[list[Call]]]:
    """What the user says, turn by turn, the searches that each turn takes, and its calls."""
    if draws.chance(1, 2):
        id, row = draws.choice(list(state["events"].items()))
        first, second = ({"date": _date(draws, state), "time": _time(draws, state)} for _ in "ab")
        said = [
            f"Move “{row['title']}” to {first['date']} at {first['time']}.",
            f"I was wrong: make it {second['date']} at {second['time']}.",
        ]
        look = [[["search_events", {"query": row["title"]}]], []]
        stages = [[["move_event", {"id": id} | first]], [["move_event", {"id": id} | second]]]
    else:
        id, row = draws.choice(list(state["tasks"].items()))
        others = [one for one in state["people"].values() if one["email"] != row["owner"]]
        first, second = draws.sample(others, 2)
        said = [
            f"Give the task “{row['title']}” to {first['name']}.",
            f"No, let {second['name']} have it after all.",
        ]
        find = [["find_person", {"name": one["name"]}] for one in (first, second)]
        look = [[["search_tasks", {"query": row["title"]}], find[0]], [find[1]]]
        give = [["assign_task", {"id": id, "owner": one["email"]}] for one in (first, second)]
        stages = [[give[0]], [give[1]]]
    if draws.chance(1, 2):
        last = [one for one in _several(draws, state, 4) if one[1][1].get("id") != id]
        words, call = last[0]
        said.append(f"One more thing. {words}")
        look.append([])
        stages.append([call])
    return said, look, stages


def _elsewhere(draws: Draws) -> str:
    return draws.choice(_ELSEWHERE).format(
        city=draws.choice(CITIES),
        colour=draws.choice(COLOURS),
        thing=draws.choice(THINGS),
        date=f"the {draws.between(2, 28)}th",
        count=draws.between(12, 99),
        other=draws.between(12, 99),
        first=draws.choice(FIRST),
    )


def tool_task(kind: str, seed: int, index: int) -> Task:
    """Held-out task number `index` of a kind."""
    return TOOL_TASKS.split(seed, "held_out", index, level=KINDS.index(kind))


def assistant_turns(messages: Sequence[dict], task: Task) -> list[dict]:
    """A model's own messages of a conversation that began with the task's."""
    said = messages[len(task.messages) :]
    return [message for message in said if message.get("role") == "assistant"]


TOOL_TASKS = ToolTasks()
