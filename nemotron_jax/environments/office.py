"""The office of the workplace tasks: five tables and the tools that read and change them."""

import copy
from typing import Any

from nemotron_jax.environments.base import ToolError
from nemotron_jax.environments.schema import canonical, tool

State = dict[str, dict[str, dict]]
_TEXT = {"type": "string", "maxLength": 200}
_DATE = {"type": "string", "description": "YYYY-MM-DD", "maxLength": 10}
_TIME = {"type": "string", "description": "HH:MM", "maxLength": 5}
TASK_STATES, CUSTOMER_STATES = ["open", "doing", "done"], ["lead", "active", "lost"]
# A search shows no more than this, so that a result stays short.
MAX_SHOWN = 20


def _of(**names: str | dict) -> dict[str, dict]:
    return {name: dict(_TEXT, description=rule) if isinstance(rule, str) else rule
            for name, rule in names.items()}  # fmt: skip


TOOLS = (
    tool("find_person", "People by part of a name.", _of(name="part of a name")),
    tool("list_team", "People of a team.", _of(team="team")),
    tool("search_email", "Mails holding a text.", _of(query="text")),
    tool("read_email", "One mail.", _of(id="id")),
    tool("send_email", "Send a mail.", _of(to="address", subject="subject", body="text")),
    tool("reply_email", "Reply to a mail.", _of(id="id", body="text")),
    tool("forward_email", "Forward a mail.", _of(id="id", to="address")),
    tool("delete_email", "Delete a mail.", _of(id="id")),
    tool("search_events", "Events holding a text.", _of(query="text")),
    tool("add_event", "Add an event.", _of(title="title", who="address", date=_DATE, time=_TIME)),
    tool("move_event", "Move an event.", _of(id="id", date=_DATE, time=_TIME)),
    tool("rename_event", "Rename an event.", _of(id="id", title="title")),
    tool("cancel_event", "Cancel an event.", _of(id="id")),
    tool("search_tasks", "Tasks holding a text.", _of(query="text")),
    tool("add_task", "Add a task.", _of(title="title", owner="address", due=_DATE)),
    tool("assign_task", "Give a task to someone.", _of(id="id", owner="address")),
    tool("set_task", "Set a task's status.", _of(id="id", status={"enum": TASK_STATES})),
    tool("delete_task", "Delete a task.", _of(id="id")),
    tool("search_customers", "Customers holding a text.", _of(query="text")),
    tool("add_customer", "Add a customer.", _of(name="name", city="city", owner="address")),
    tool(
        "set_customer", "Set a customer's status.", _of(id="id", status={"enum": CUSTOMER_STATES})
    ),
    tool("assign_customer", "Give a customer to someone.", _of(id="id", owner="address")),
    tool("delete_customer", "Delete a customer.", _of(id="id")),
)


class Office:
    """The tables under a session's hands; each tool is a method."""

    def __init__(self, state: State) -> None:
        self.tables = copy.deepcopy(state)
        self._known = {table: frozenset(rows) for table, rows in state.items()}
        self._made = 0

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """What a tool of TOOLS, whose description it has there, answers to its arguments."""
        return getattr(self, name)(**arguments)

    def normal_form(self) -> str:
        """The state as text; records made in the session count by content, not by id or order."""
        tables = {}
        for table, rows in self.tables.items():
            made = [canonical(row) for id, row in rows.items() if id not in self._known[table]]
            kept = {id: row for id, row in rows.items() if id in self._known[table]}
            tables[table] = [kept, sorted(made)]
        return canonical(tables)

    def find_person(self, name: str) -> str:
        return self._search("people", name)

    def list_team(self, team: str) -> str:
        return self._search("people", team)

    def search_email(self, query: str) -> str:
        return self._search("email", query)

    def read_email(self, id: str) -> str:
        return canonical(self._row("email", id))

    def send_email(self, to: str, subject: str, body: str) -> str:
        self._person(to)
        return self._add("email", {"from": "me", "to": to, "subject": subject, "body": body})

    def reply_email(self, id: str, body: str) -> str:
        mail = self._row("email", id)
        return self.send_email(mail["from"], f"Re: {mail['subject']}", body)

    def forward_email(self, id: str, to: str) -> str:
        mail = self._row("email", id)
        return self.send_email(to, f"Fwd: {mail['subject']}", mail["body"])

    def delete_email(self, id: str) -> str:
        return self._delete("email", id)

    def search_events(self, query: str) -> str:
        return self._search("events", query)

    def add_event(self, title: str, who: str, date: str, time: str) -> str:
        self._person(who)
        return self._add("events", {"title": title, "who": who, "date": date, "time": time})

    def move_event(self, id: str, date: str, time: str) -> str:
        return self._set("events", id, {"date": date, "time": time})

    def rename_event(self, id: str, title: str) -> str:
        return self._set("events", id, {"title": title})

    def cancel_event(self, id: str) -> str:
        return self._delete("events", id)

    def search_tasks(self, query: str) -> str:
        return self._search("tasks", query)

    def add_task(self, title: str, owner: str, due: str) -> str:
        self._person(owner)
        return self._add("tasks", {"title": title, "owner": owner, "due": due, "status": "open"})

    def assign_task(self, id: str, owner: str) -> str:
        self._person(owner)
        return self._set("tasks", id, {"owner": owner})

    def set_task(self, id: str, status: str) -> str:
        return self._set("tasks", id, {"status": status})

    def delete_task(self, id: str) -> str:
        return self._delete("tasks", id)

    def search_customers(self, query: str) -> str:
        return self._search("customers", query)

    def add_customer(self, name: str, city: str, owner: str) -> str:
        self._person(owner)
        row = {"name": name, "city": city, "owner": owner, "status": "lead"}
        return self._add("customers", row)

    def set_customer(self, id: str, status: str) -> str:
        return self._set("customers", id, {"status": status})

    def assign_customer(self, id: str, owner: str) -> str:
        self._person(owner)
        return self._set("customers", id, {"owner": owner})

    def delete_customer(self, id: str) -> str:
        return self._delete("customers", id)

    def _search(self, table: str, query: str) -> str:
        words = query.casefold().split()
        found = [
            {"id": id, **row}
            for id, row in self.tables[table].items()
            if all(word in " ".join([id, *row.values()]).casefold() for word in words)
        ]
        return canonical(found[:MAX_SHOWN]) if found else "nothing found"

    def _row(self, table: str, id: str) -> dict:
        if id not in self.tables[table]:
            raise ToolError(f"there is no {id[:40]!r} in {table}")
        return self.tables[table][id]

    def _person(self, address: str) -> None:
        if all(person["email"] != address for person in self.tables["people"].values()):
            raise ToolError(f"{address[:60]!r} is nobody's address; find_person knows them")

    def _set(self, table: str, id: str, changes: dict) -> str:
        self._row(table, id).update(changes)
        return "done"

    def _add(self, table: str, row: dict) -> str:
        self._made += 1
        id = f"{table[0]}new{self._made}"
        self.tables[table][id] = row
        return f"done: {id}"

    def _delete(self, table: str, id: str) -> str:
        self._row(table, id)
        del self.tables[table][id]
        return "done"
