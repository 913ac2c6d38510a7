"""Questions to a generated database, answered by a query that must hold on another one too."""

import json
import re
import sqlite3
from typing import Any

from nemotron_jax.environments import coding
from nemotron_jax.environments.base import Draft, Environment, Task, ToolError, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling

QUERY = tool(
    "query",
    "Runs one SELECT on the database (SQLite) and returns its rows as JSON.",
    {"sql": {"type": "string", "maxLength": 5000}},
)
# Owner table, its things, the number that things carry, and a category.
_THEMES = (
    ("customers", "orders", "amount", "city", ("Oslo", "Lima", "Bonn", "Cork", "Nara")),
    ("authors", "books", "pages", "country", ("Chile", "Kenya", "Japan", "Spain", "Peru")),
    ("farms", "harvests", "tons", "region", ("north", "south", "east", "west", "coast")),
    ("teams", "matches", "goals", "league", ("first", "second", "third", "youth", "indoor")),
    ("ships", "voyages", "miles", "port", ("Accra", "Busan", "Genoa", "Haifa", "Quito")),
)
_NAMES = ("Ada", "Ben", "Cleo", "Dov", "Eva", "Finn", "Gita", "Hugo", "Iris", "Jan", "Kim", "Lea")
# By level: the question, a query, and another one that is as right.
_QUESTIONS = (
    (
        (
            "How many {things} have {number} of at least {m}?",
            "SELECT COUNT(*) FROM {things} WHERE {number} >= {m}",
            "SELECT SUM(CASE WHEN {number} < {m} THEN 0 ELSE 1 END) FROM {things}",
        ),
        (
            "What is the total {number} of the {things} of the years {y} and later?",
            "SELECT SUM({number}) FROM {things} WHERE year >= {y}",
            "SELECT SUM(s) FROM (SELECT SUM({number}) AS s FROM {things} WHERE year >= {y} "
            "GROUP BY year)",
        ),
    ),
    (
        (
            "For each year with more than {k} {things}, give the year and the total {number}, "
            "by year.",
            "SELECT year, SUM({number}) FROM {things} GROUP BY year HAVING COUNT(*) > {k} "
            "ORDER BY year",
            "SELECT year, s FROM (SELECT year, SUM({number}) AS s, COUNT(*) AS n FROM {things} "
            "GROUP BY year) WHERE n > {k} ORDER BY year",
        ),
        (
            "Give the names of the {owners} whose {category} is '{c}' and that have some of "
            "the {things} "
            "with {number} above {m}, each once, in alphabetical order.",
            "SELECT DISTINCT o.name FROM {owners} o JOIN {things} t ON t.owner_id = o.id "
            "WHERE o.{category} = '{c}' AND t.{number} > {m} ORDER BY o.name",
            "SELECT name FROM {owners} WHERE {category} = '{c}' AND id IN "
            "(SELECT owner_id FROM {things} WHERE {number} > {m}) ORDER BY name",
        ),
    ),
    (
        (
            "For each {category}, give it and the total {number} of its {owners}' {things} of "
            "years "
            "from {y} with {number} above {m} (0 if there are none), by {category}.",
            "SELECT o.{category}, COALESCE(SUM(t.{number}), 0) FROM {owners} o LEFT JOIN "
            "{things} t "
            "ON t.owner_id = o.id AND t.year >= {y} AND t.{number} > {m} GROUP BY o.{category} "
            "ORDER BY o.{category}",
            "SELECT c, (SELECT COALESCE(SUM({number}), 0) FROM {things} WHERE year >= {y} AND "
            "{number} > {m} AND owner_id IN (SELECT id FROM {owners} WHERE {category} = c)) "
            "FROM (SELECT DISTINCT {category} AS c FROM {owners}) ORDER BY c",
        ),
        (
            "Give the names of the {owners} without any of the {things} in {y} or with "
            "{number} above "
            "{m}, in alphabetical order.",
            "SELECT name FROM {owners} WHERE id NOT IN (SELECT owner_id FROM {things} "
            "WHERE year = {y} OR {number} > {m}) ORDER BY name",
            "SELECT o.name FROM {owners} o WHERE NOT EXISTS (SELECT 1 FROM {things} t WHERE "
            "t.owner_id = o.id AND (t.year = {y} OR t.{number} > {m})) ORDER BY o.name",
        ),
    ),
)
MOST_ROWS = 200
# Inside the sandbox: the query on each database, read-only and with a step limit.
_RUNNER = """
import json, sqlite3, sys
order = json.loads(sys.stdin.read())
for script in order["databases"]:
    base = sqlite3.connect(":memory:")
    base.executescript(script)
    base.execute("PRAGMA query_only = 1")
    try:
        rows = base.execute(order["sql"]).fetchmany(order["most"] + 1)
        print(json.dumps({"rows": rows}))
    except Exception as error:
        print(json.dumps({"error": str(error)[:300]}))
"""


class SqlSession(coding.CodeSession):
    def tool_query(self, sql: str) -> str:
        """Rows of a query on the task's first database, as JSON, at most MOST_ROWS of them and
        8,000 characters. Raises ToolError with the database's own sentence."""
        (reply,) = run_query(sql, self.task.data["databases"][:1])
        if "rows" not in reply:
            raise ToolError(str(reply.get("error", "no rows")))
        rows = reply["rows"][:MOST_ROWS]
        cut = f"\n(more than {MOST_ROWS} rows)" if len(reply["rows"]) > MOST_ROWS else ""
        return json.dumps(rows)[:8000] + cut

    def score(self) -> Verdict:
        data = self.task.data
        sql = coding.code_of(self.text)
        # SQLite runs an empty statement without complaint, and gives no rows.
        replies = run_query(sql, data["databases"]) if sql.strip() else [{}] * len(data["expected"])
        right = [same(reply.get("rows"), rows) for reply, rows in zip(replies, data["expected"])]
        parts = {"seen_database": float(right[0]), "used_tool": float(bool(self.calls))}
        return Verdict(float(all(right)), parts, sql[:200])


class Sql(Environment):
    """Level 0 filters one table, level 1 groups or joins, level 2 needs outer joins or negation."""

    name = "sql"
    summary = "Write a query that answers a question to a database"
    reward = "rows equal on a seen and on a hidden database"
    counterpart = "none"
    max_turns = 6
    rate = "code"
    session = SqlSession

    def draw(self, draws: Draws, level: int) -> Draft:
        owners, things, number, category, kinds = draws.choice(_THEMES)
        question, query, other = draws.choice(_QUESTIONS[level])
        values = {"owners": owners, "things": things, "number": number, "category": category}
        values |= {"m": draws.between(150, 850), "y": draws.between(2016, 2022)}
        values |= {"k": draws.between(2, 4), "c": draws.choice(kinds)}
        words, query, other = (text.format(**values) for text in (question, query, other))
        tables = (
            f"CREATE TABLE {owners} (id INTEGER PRIMARY KEY, name TEXT, {category} TEXT);\n"
            f"CREATE TABLE {things} (id INTEGER PRIMARY KEY, owner_id INTEGER REFERENCES {owners}, "
            f"year INTEGER, {number} INTEGER);"
        )
        databases = [_fill(draws, tables, owners, things, kinds) for _ in range(3)]
        expected = [_rows(database, query) for database in databases]
        if not all(expected) or expected[0] in expected[1:]:
            return self.draw(draws, level)  # no rows, or the seen ones, would be right there too
        sample = _rows(databases[0], f"SELECT * FROM {things} ORDER BY id LIMIT 3")
        content = (
            f"A database has these tables:\n{tables}\nThe first rows of {things}: {sample}\n\n"
            f"{words}\n\nYou can try queries with the tool. End with one SELECT in a block of "
            f"code; "
            f"it is also run on other data in the same tables."
        )
        data = {"databases": databases, "expected": expected, "query": query, "other": other}
        return Draft([{"role": "user", "content": content}], data, (QUERY,))

    def oracle(self, task: Task) -> list[Turn | str]:
        query = task.data["query"]
        return [calling("query", sql=query), f"```sql\n{query};\n```"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[f"Here it is:\n```sql\n{task.data['other']}\n```"], [task.data["query"]]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        rows = data["expected"][0]
        fixed = ", ".join(f"({', '.join(map(_literal, row))})" for row in rows)
        query = data["query"]
        return {
            "the seen rows written out": [f"VALUES {fixed}" if rows else "SELECT 1 WHERE 0"],
            "the rows as answer": [json.dumps(rows)],
            "changes the data": [f"DELETE FROM {_table(query)}; {query}"],
            "two queries": [f"```sql\n{query}\n```\n```sql\nSELECT 1\n```"],
            "in a call only": [calling("query", sql=query), "See above."],
            "everything": [f"SELECT * FROM {_table(query)}"],
            "attaches a file": ["ATTACH '/etc/passwd' AS x"],
            "passed": ["SELECT 'passed'"],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable()


def run_query(sql: str, databases: list[str]) -> list[dict]:
    """The rows, or the error, of a query on each database, from inside the sandbox."""
    order = json.dumps({"sql": sql, "databases": databases, "most": MOST_ROWS})
    result = coding.checked(coding.sandbox().run(_RUNNER, stdin=order, limits=coding.LIMITS))
    replies = [json.loads(line) for line in result.stdout.splitlines()] if result.ok else []
    ended = {"error": "the query took too long or too much memory"}
    return replies + [ended] * (len(databases) - len(replies))


def same(rows: Any, expected: list[list]) -> bool:
    """Whether rows are the expected ones in their order; 3 and 3.0 are the same number."""
    if not isinstance(rows, list) or len(rows) != len(expected):
        return False
    return all(list(row) == right for row, right in zip(rows, expected))


def _rows(database: str, query: str) -> list[list]:
    base = sqlite3.connect(":memory:")
    base.executescript(database)
    rows = [list(row) for row in base.execute(query)]
    base.close()
    return rows


def _fill(draws: Draws, tables: str, owners: str, things: str, kinds: tuple[str, ...]) -> str:
    people = draws.sample(_NAMES, draws.between(7, 11))
    lines = [
        f"INSERT INTO {owners} VALUES ({place}, '{name}', '{draws.choice(kinds)}');"
        for place, name in enumerate(people, 1)
    ]
    for place in range(1, draws.between(24, 36)):
        owner, year = draws.between(1, len(people)), draws.between(2014, 2023)
        lines.append(
            f"INSERT INTO {things} VALUES ({place}, {owner}, {year}, {draws.between(10, 999)});"
        )
    return "\n".join([tables, *lines])


def _table(query: str) -> str:
    return re.findall(r"FROM (\w+)", query)[0]


def _literal(value: Any) -> str:
    return "NULL" if value is None else repr(value)


ENVIRONMENTS = (Sql(),)
