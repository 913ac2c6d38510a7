"""An office assistant with 23 tools over five tables, judged by the state it leaves behind."""

from collections.abc import Callable

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.office import CUSTOMER_STATES, TASK_STATES, TOOLS, Office
from nemotron_jax.environments.office import State as Tables
from nemotron_jax.environments.turns import ToolCall, Turn, calling
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, LAST, THINGS, ask, coined

# A request: its words, the searches that find what it needs, and the calls that fulfil it.
Request = tuple[str, list[list], list[list]]
_PEOPLE, _ROWS = 6, 14


class OfficeSession(Session):
    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self.office = Office(task.data["state"])

    def run_tool(self, name: str, arguments: dict) -> str:
        return self.office.call(name, arguments)

    def score(self) -> Verdict:
        wanted = Office(self.task.data["state"])
        for name, arguments in self.task.data["gold"]:
            wanted.call(name, arguments)
        right = self.office.normal_form() == wanted.normal_form()
        failed = sum(result.startswith("error") for _, _, result in self.calls)
        return Verdict(float(right), {"calls": float(len(self.calls)), "failed": float(failed)})


class Workplace(Environment):
    """Level 0 names a record by its id; then it must be found; then several; then two requests."""

    name = "workplace"
    summary = "Do office work with 23 tools over mail, calendar, tasks, customers and people"
    reward = "final state"
    counterpart = "workplace_assistant"
    levels = 4
    max_turns = 16
    session = OfficeSession

    def draw(self, draws: Draws, level: int) -> Draft:
        state = drawn_office(draws)
        if level == 0:
            requests = [draws.choice(_BY_ID)(draws, state)]
        elif level < 3:
            requests = [draws.choice(_FOUND if level == 1 else _SEVERAL)(draws, state)]
        else:  # of different tables, so that the order does not matter
            makers = [draws.choice(_FOUND[:2]), draws.choice(_SEVERAL[1:])]
            requests = [maker(draws, state) for maker in draws.shuffled(makers)]
        text = " Then: ".join(words for words, _, _ in requests)
        look = [call for _, calls, _ in requests for call in calls]
        gold = [call for _, _, calls in requests for call in calls]
        data = {"state": state, "look": look, "gold": gold}
        return Draft(ask(text), data, TOOLS)

    def oracle(self, task: Task) -> list[Turn | str]:
        turns: list[Turn | str] = [calling(name, **given) for name, given in task.data["look"]]
        return [*turns, Turn(calls=_calls(task.data["gold"])), "Done."]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        backwards = _calls(task.data["gold"])[::-1]
        return [[Turn(calls=backwards), "All is done."], [Turn(calls=backwards)]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        gold, state = task.data["gold"], task.data["state"]
        touched = {given.get("id") for _, given in gold}
        other = next(id for id in state["customers"] if id not in touched)
        more = Turn(calls=(*_calls(gold), ToolCall("delete_customer", {"id": other})))
        mail = {"to": _address(state, 0), "subject": "x", "body": "x"}
        told = f"I called {gold[0][0]} and everything is done."
        return {
            "says done": ["Done. Every request was fulfilled."],
            "says what it called": [told],
            "looks only": [*(calling(n, **g) for n, g in task.data["look"]), "Done."],
            "one call short": [Turn(calls=_calls(gold[:-1])), "Done."],
            "deletes more": [more, "Done."],
            "mails besides": [Turn(calls=(*_calls(gold), ToolCall("send_email", mail))), "Done."],
        }


def _calls(calls: list[list]) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(name, given) for name, given in calls)


def _address(state: Tables, place: int) -> str:
    return list(state["people"].values())[place]["email"]


def drawn_office(draws: Draws) -> Tables:
    """People, and rows of every other table that belong to them."""
    people: dict[str, dict] = {}
    for first, last in zip(draws.sample(FIRST, _PEOPLE), draws.sample(LAST, _PEOPLE)):
        team = draws.choice(["sales", "design", "support"])
        email = f"{first}.{last}@example.com".lower()
        people[f"p{len(people) + 1}"] = {"name": f"{first} {last}", "team": team, "email": email}
    emails = [person["email"] for person in people.values()]
    things = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    tables: Tables = {"people": people, "email": {}, "events": {}, "tasks": {}, "customers": {}}
    for table in ("email", "events", "tasks", "customers"):
        ids = draws.sample(range(1000, 10000), _ROWS)
        for place, (id, thing) in enumerate(zip(ids, draws.sample(things, _ROWS))):
            owner = emails[place % _PEOPLE]
            tables[table][f"{table[0]}{id}"] = _row(draws, table, thing, owner)
    return tables


def _row(draws: Draws, table: str, thing: str, owner: str) -> dict:
    if table == "email":
        body = f"The {thing} arrives on the {draws.between(2, 28)}th."
        return {"from": owner, "to": "me", "subject": thing, "body": body}
    if table == "events":
        return {
            "title": f"Review of the {thing}",
            "who": owner,
            "date": _date(draws),
            "time": _time(draws),
        }
    if table == "tasks":
        return {"title": f"Order the {thing}", "owner": owner, "due": _date(draws),
                "status": draws.choice(TASK_STATES)}  # fmt: skip
    name = f"{coined(draws, 3).capitalize()} {draws.choice(['Ltd', 'Inc', 'AG'])}"
    return {"name": name, "city": draws.choice(CITIES), "owner": owner,
            "status": draws.choice(CUSTOMER_STATES)}  # fmt: skip


def _date(draws: Draws) -> str:
    return f"2026-{draws.between(1, 12):02d}-{draws.between(1, 28):02d}"


def _time(draws: Draws) -> str:
    return f"{draws.between(8, 17):02d}:{draws.choice(['00', '15', '30', '45'])}"


def _some(draws: Draws, state: Tables, table: str) -> tuple[str, dict]:
    return draws.choice(list(state[table].items()))


def _person(draws: Draws, state: Tables, but: str = "") -> dict:
    return draws.choice([p for p in state["people"].values() if p["email"] != but])


def _named(state: Tables, email: str) -> str:
    return next(p["name"] for p in state["people"].values() if p["email"] == email)


_REMOVALS = (
    ("email", "Delete mail", "delete_email"),
    ("events", "Cancel", "cancel_event"),
    ("tasks", "Delete task", "delete_task"),
    ("customers", "Delete customer", "delete_customer"),
)


def _remove(draws: Draws, state: Tables) -> Request:
    table, verb, call = draws.choice(_REMOVALS)
    id, _ = _some(draws, state, table)
    return f"{verb} {id}", [], [[call, {"id": id}]]


def _mark(draws: Draws, state: Tables) -> Request:
    id, row = _some(draws, state, "tasks")
    status = draws.choice([status for status in TASK_STATES if status != row["status"]])
    return f"Task {id}: {status}", [], [["set_task", {"id": id, "status": status}]]


def _give_task(draws: Draws, state: Tables) -> Request:
    id, row = _some(draws, state, "tasks")
    to = _person(draws, state, row["owner"])
    look = [["search_tasks", {"query": row["title"]}], ["find_person", {"name": to["name"]}]]
    text = f"Give the task “{row['title']}” to {to['name']}."
    return text, look, [["assign_task", {"id": id, "owner": to["email"]}]]


def _move_event(draws: Draws, state: Tables) -> Request:
    id, row = _some(draws, state, "events")
    when = {"date": _date(draws), "time": _time(draws)}
    if when == {"date": row["date"], "time": row["time"]}:
        return _move_event(draws, state)
    text = f"Move “{row['title']}” to {when['date']} at {when['time']}."
    return text, [["search_events", {"query": row["title"]}]], [["move_event", {"id": id} | when]]


def _forward(draws: Draws, state: Tables) -> Request:
    id, row = _some(draws, state, "email")
    to = _person(draws, state)
    look = [["search_email", {"query": row["subject"]}], ["find_person", {"name": to["name"]}]]
    text = f"Forward the mail about the {row['subject']} to {to['name']}."
    return text, look, [["forward_email", {"id": id, "to": to["email"]}]]


def _write(draws: Draws, state: Tables) -> Request:
    to, body = _person(draws, state), f"Meet me at {_time(draws)} in room {draws.between(2, 40)}."
    mail = {"to": to["email"], "subject": "Meeting", "body": body}
    text = f"Mail {to['name']} with the subject “Meeting” and the text “{body}”."
    return text, [["find_person", {"name": to["name"]}]], [["send_email", mail]]


def _status(draws: Draws, state: Tables) -> Request:
    id, row = _some(draws, state, "customers")
    status = draws.choice([status for status in CUSTOMER_STATES if status != row["status"]])
    look = [["search_customers", {"query": f"{row['name']} {row['city']}"}]]
    text = f"The customer {row['name']} in {row['city']} is {status} now. Put that down."
    return text, look, [["set_customer", {"id": id, "status": status}]]


def _hand_over(draws: Draws, state: Tables) -> Request:
    _, row = _some(draws, state, "tasks")
    owner, to = row["owner"], _person(draws, state, row["owner"])
    ids = [id for id, one in state["tasks"].items() if one["owner"] == owner]
    look = [["find_person", {"name": to["name"]}], ["search_tasks", {"query": owner}]]
    gold = [["assign_task", {"id": id, "owner": to["email"]}] for id in ids]
    return f"{to['name']} takes over every task of {_named(state, owner)}.", look, gold


def _clear_mail(draws: Draws, state: Tables) -> Request:
    _, row = _some(draws, state, "email")
    ids = [id for id, one in state["email"].items() if one["from"] == row["from"]]
    name = _named(state, row["from"])
    look = [["search_email", {"query": row["from"]}]]
    return f"Delete every mail from {name}.", look, [["delete_email", {"id": id}] for id in ids]


def _leave(draws: Draws, state: Tables) -> Request:
    _, row = _some(draws, state, "customers")
    owner, to = row["owner"], _person(draws, state, row["owner"])
    ids = [id for id, one in state["customers"].items() if one["owner"] == owner]
    look = [["find_person", {"name": to["name"]}], ["search_customers", {"query": owner}]]
    gold = [["assign_customer", {"id": id, "owner": to["email"]}] for id in ids]
    return f"Give the customers of {_named(state, owner)} to {to['name']}.", look, gold


_BY_ID: tuple[Callable[[Draws, Tables], Request], ...] = (_remove, _mark)
_FOUND = (_give_task, _move_event, _forward, _write, _status)
_SEVERAL = (_hand_over, _clear_mail, _leave)
ENVIRONMENTS = (Workplace(),)
