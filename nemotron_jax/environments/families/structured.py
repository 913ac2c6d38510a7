"""JSON in a given form, checked for its form and for its content."""

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.fences import read_answer
from nemotron_jax.environments.schema import canonical, equal, faults
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, LAST, THINGS, ask


class JsonSession(Session):
    def score(self) -> Verdict:
        try:
            value = read_answer(self.text)
        except ValueError:
            return Verdict(0.0, {"valid": 0.0, "content": 0.0})
        valid = not faults(value, self.task.data["schema"])
        right = valid and equal(value, self.task.data["value"])
        return Verdict(float(right), {"valid": float(valid), "content": float(right)})


class StructuredJson(Environment):
    name = "structured_json"
    summary = "Put what a text says into JSON that fits a schema"
    reward = "schema and content"
    counterpart = "structured_outputs_json"
    session = JsonSession

    def draw(self, draws: Draws, level: int) -> Draft:
        name, age = draws.choice(FIRST), draws.between(1, 99)
        if level == 0:
            city = draws.choice(CITIES)
            value: dict = {"name": name, "age": age, "city": city}
            text = f"As JSON: name {name}, age {age}, city {city}"
            return Draft(ask(text), {"schema": _schema(value), "value": value})
        person = {"first": name, "last": draws.choice(LAST)}
        items = [
            {"item": item, "colour": draws.choice(COLOURS), "count": draws.between(1, 40)}
            for item in draws.sample(THINGS, level + 1)
        ]
        value = {"customer": person, "items": items, "express": draws.chance(1, 2)}
        told = ", ".join(f"{i['count']} {i['colour']} {i['item']}s" for i in items)
        text = f"{name} {person['last']} ordered {told}"
        if level == 2:
            value["address"] = {"city": draws.choice(CITIES), "number": draws.between(1, 300)}
            value["note"] = draws.choice([None, "fragile", "a gift"])
            text += f", to number {value['address']['number']} in {value['address']['city']}"
            text += (
                f"; the note says it is {value['note']}" if value["note"] else "; there is no note"
            )
        text += f". The order is {'' if value['express'] else 'not '}express."
        schema = _schema(value)
        form = "Write this order as JSON, names of items in the singular, to the schema"
        return Draft(
            ask(f"{text}\n{form}\n{canonical(schema)}"),
            {"schema": schema, "value": value},
            identity=text,
        )

    def oracle(self, task: Task) -> list[Turn | str]:
        return [canonical(task.data["value"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        value = task.data["value"]
        backwards = "{" + ", ".join(f'"{k}": {canonical(value[k])}' for k in reversed(value)) + "}"
        return [[f"```json\n{canonical(value)}\n```"], [backwards]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        value = task.data["value"]
        right = canonical(value)
        key = next(iter(value))
        missing = {name: inner for name, inner in value.items() if name != key}
        return {
            "the schema itself": [canonical(task.data["schema"])],
            "right form, other content": [canonical(_altered(value))],
            "a key missing": [canonical(missing)],
            "a key too many": [canonical(value | {"reward": 1})],
            "two candidates": [f"[{right}, {canonical(_altered(value))}]"],
            "inside prose": [f"Here it is: {right} as you asked."],
            "twice": [f"{right}\n{right}"],
            "in the reasoning": [Turn(reasoning=right)],
        }


def _schema(value: object) -> dict:
    """The schema that a value is an example of, every key required and no other allowed."""
    if isinstance(value, dict):
        properties = {key: _schema(inner) for key, inner in value.items()}
        if "note" in value:
            properties["note"] = {"type": ["string", "null"]}
        required = list(properties)
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if isinstance(value, list):
        return {"type": "array", "items": _schema(value[0])}
    kinds = {str: "string", bool: "boolean", int: "integer"}
    return {"type": kinds[type(value)]} if value is not None else {"type": ["string", "null"]}


def _altered(value: object) -> object:
    """A value of the same form and other content."""
    if isinstance(value, dict):
        return {key: _altered(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_altered(inner) for inner in value]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else "changed"


ENVIRONMENTS = (StructuredJson(),)
