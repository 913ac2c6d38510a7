"""The next action alone: one call with the right arguments, or words where no call is due."""

from nemotron_jax.environments.answers import bare, final_answer, plain
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import canonical, same_arguments, tool
from nemotron_jax.environments.turns import ToolCall, Turn, calling
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, THINGS, ask, coined_names

_TEXT, _COUNT = {"type": "string", "maxLength": 200}, {"type": "integer", "minimum": 0}
# A search of more words than this finds everything and so says nothing.
MAX_QUERY_WORDS = 8


class StepSession(Session):
    """The tools record what they are given; nothing is run."""

    def run_tool(self, name: str, arguments: dict) -> str:
        return "noted"

    def score(self) -> Verdict:
        expected, turn = self.task.data["expected"], self.turns[0]
        if expected["kind"] == "text":
            given = bare(final_answer(turn.text) or "")
            right = not turn.calls and plain(given) == plain(expected["text"])
            return Verdict(float(right), {"called": float(bool(turn.calls))}, turn.text[:200])
        if len(turn.calls) != 1 or self.calls[0][2] != "noted":
            return Verdict(0.0, {"called": float(bool(turn.calls))})
        call = turn.calls[0]
        name = call.name == expected["name"]
        if expected["kind"] == "search":
            words = plain(call.arguments.get("query", "")).replace(",", " ").split()
            known = set(expected["terms"]) <= set(words) and len(words) <= MAX_QUERY_WORDS
            right = name and known
        else:
            right = name and same_arguments(call.arguments, expected["arguments"])
        return Verdict(float(right), {"called": 1.0, "tool": float(name)}, call.name)


class StepEnvironment(Environment):
    """What the three environments of this kind share."""

    reward = "next action"
    session = StepSession

    def oracle(self, task: Task) -> list[Turn | str]:
        expected = task.data["expected"]
        if expected["kind"] == "text":
            return [expected["text"]]
        return [calling(expected["name"], **expected["arguments"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        expected = task.data["expected"]
        if expected["kind"] == "text":
            return [[f"Answer: {expected['text']}"]]
        other = {
            key: f" {value.upper()}" if isinstance(value, str) else value
            for key, value in expected["arguments"].items()
        }
        call = {"function": {"name": expected["name"], "arguments": canonical(other)}}
        return [[{"role": "assistant", "content": "One moment.", "tool_calls": [call]}]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        expected = task.data["expected"]
        names = [spec["function"]["name"] for spec in task.tools]
        if expected["kind"] == "text":
            call = calling(names[0], expected["text"], **{})
            return {
                "a call besides": [call],
                "chatty": [f"You asked for {expected['text']}, or perhaps for another."],
            }
        right = ToolCall(expected["name"], expected["arguments"])
        written = f"{right.name}({canonical(right.arguments)})"
        cheats: dict[str, list[Turn | str]] = {
            "the call twice": [Turn(calls=(right, right))],
            "every tool": [Turn(calls=tuple(ToolCall(n, right.arguments) for n in [*names, "x"]))],
            "no arguments": [calling(right.name)],
            "an argument too many": [calling(right.name, **right.arguments, reward=1)],
            "written out": [written],
            "in the reasoning": [Turn(reasoning=written)],
        }
        key = next(iter(right.arguments))
        cheats["another argument"] = [calling(right.name, **(right.arguments | {key: "qq"}))]
        return cheats


# Name, what it does, arguments, and the words of a request.
_CITY, _TO, _ITEM, _COLOUR = ({key: _TEXT} for key in ("city", "to", "item", "colour"))
_DAYS, _HOW_MANY = {"day": _COUNT}, {"count": _COUNT}
_FUNCTIONS = (
    ("get_weather", "Weather of a day.", _CITY | _DAYS, "Weather in {city} in {day} days"),
    ("send_money", "Send euros.", {"euros": _COUNT} | _TO, "Send {euros} euros to {to}"),
    ("book_table", "Book a table.", _CITY | {"people": _COUNT}, "Table in {city} for {people}"),
    ("buy", "Buy something.", _ITEM | _HOW_MANY, "Buy {count} of: {item}"),
    ("paint", "Paint a thing.", _ITEM | _COLOUR, "Paint the {item} {colour}"),
    ("invite", "Invite a guest.", _TO | _CITY | _DAYS, "Invite {to} to {city} in {day} days"),
    ("ship", "Ship a thing.", _ITEM | _CITY | _HOW_MANY, "Ship {count} of: {item}, to {city}"),
)


class ToolChoice(StepEnvironment):
    """One tool at level 0; then several; then an earlier call stands before, or words are due."""

    name = "tool_choice"
    summary = "Make the one call that a request needs, or answer where no call is due"
    counterpart = "single_step_tool_use_with_argument_comparison"

    def draw(self, draws: Draws, level: int) -> Draft:
        functions = draws.sample(_FUNCTIONS, (1, 4, 7)[level])
        specs = tuple(tool(name, what, rules) for name, what, rules, _ in functions)
        name, _, rules, words = functions[0]
        given = {key: _argument(draws, key) for key in rules}
        text = words.format(**given)
        expected: dict = {"kind": "call", "name": name, "arguments": given}
        messages = ask(text)
        if level == 2:
            before = {key: _argument(draws, key) for key in rules}
            messages = [
                *ask(words.format(**before) + "."),
                calling(name, **before).message(),
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": "It is done."},
                {"role": "user", "content": f"Now this: {text}."},
            ]
            if draws.chance(1, 3):
                key = draws.choice(list(rules))
                question = f"Before this: {text}: which {key} did I name first? The {key} alone."
                messages[-1] = {"role": "user", "content": question}
                expected = {"kind": "text", "text": str(before[key])}
        return Draft(messages, {"expected": expected}, draws.shuffled(specs), identity=messages)


def _argument(draws: Draws, key: str) -> str | int:
    texts = {"city": CITIES, "to": FIRST, "item": THINGS, "colour": COLOURS}
    return draws.choice(texts[key]) if key in texts else draws.between(2, 500)


_SEARCH = tool("search", "Search the web.", {"query": _TEXT})
_OPEN = tool("open", "Open a result.", {"id": _TEXT})


class SearchPivot(StepEnvironment):
    """After a search: open the result that helps, search better, or answer from the page read."""

    name = "search_pivot"
    summary = "Decide the next step of a search: open a result, search again, or answer"
    counterpart = "search_pivot_single_step_tool_use"

    def draw(self, draws: Draws, level: int) -> Draft:
        place, *others = coined_names(draws, 3 + 2 * level)
        what = draws.choice(["mayor", "river", "bridge", "museum"])
        value = coined_names(draws, 1, 4)[0]
        ids = [f"d{number}" for number in draws.sample(range(100, 1000), len(others) + 1)]
        results = [f"{id}: {name}, its {what} and its squares" for id, name in zip(ids[1:], others)]
        kind = draws.choice(["open", "search", "answer"])
        if kind != "search":
            results.append(f"{ids[0]}: {place}, its {what} and its squares")
        question = f"{what} of {place}?" if level == 0 else f"What is the {what} of {place} called?"
        messages = [
            *ask(question),
            calling("search", query=what).message(),
            {"role": "tool", "content": "\n".join(draws.shuffled(results))},
        ]
        expected: dict = {"kind": "call", "name": "open", "arguments": {"id": ids[0]}}
        if kind == "search":
            query = f"{what} {place}".casefold()
            expected = {"kind": "search", "name": "search", "arguments": {"query": query}}
            expected["terms"] = query.split()
        elif kind == "answer":
            page = f"{place} has a {what} called {value}. {others[0]} has none."
            messages.append(calling("open", id=ids[0]).message())
            messages.append({"role": "tool", "content": page})
            expected = {"kind": "text", "text": value}
        return Draft(messages, {"expected": expected}, (_SEARCH, _OPEN))


class ToolSchema(StepEnvironment):
    """One tool whose arguments are nested; level by level deeper and with more of them."""

    name = "tool_schema"
    summary = "Fill the nested arguments of one call exactly to its schema"
    counterpart = "toolcall_schema_single_step_tool_use"

    def draw(self, draws: Draws, level: int) -> Draft:
        name = coined_names(draws, 1)[0].casefold()
        told: list[str] = []
        properties, value = _fields(draws, level, told, "")
        text = f"{name}: " if level == 0 else f"Call {name} with "
        messages = ask(text + "; ".join(told) + ".")
        expected = {"kind": "call", "name": name, "arguments": value}
        spec = tool(name, "Takes what it is told.", properties)
        return Draft(messages, {"expected": expected}, (spec,))


def _fields(draws: Draws, depth: int, told: list[str], path: str) -> tuple[dict, dict]:
    """Properties and values of an object, told one by one by their paths."""
    properties, value = {}, {}
    keys = [key.casefold() for key in coined_names(draws, 2 + (depth > 0), 2)]
    for place, key in enumerate(keys):
        where = f"{path}{key}"
        if place == 0 and depth:
            inner, value[key] = _fields(draws, depth - 1, told, f"{where}.")
            properties[key] = {
                "type": "object",
                "properties": inner,
                "required": list(inner),
                "additionalProperties": False,
            }
            continue
        kind = draws.choice(["text", "count", "flag", "list"] if depth else ["text", "count"])
        properties[key], value[key] = _leaf(draws, kind)
        told.append(f"{where} = {canonical(value[key])}")
    return properties, value


def _leaf(draws: Draws, kind: str) -> tuple[dict, object]:
    if kind == "text":
        return _TEXT, draws.choice(COLOURS)
    if kind == "count":
        return _COUNT, draws.between(2, 999)
    if kind == "flag":
        return {"type": "boolean"}, draws.chance(1, 2)
    items = draws.sample(THINGS, draws.between(1, 3))
    return {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": 5}, items


ENVIRONMENTS = (ToolChoice(), SearchPivot(), ToolSchema())
