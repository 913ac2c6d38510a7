"""Values behind keys: the smallest task that cannot be done without a tool."""

from nemotron_jax.environments.answers import final_answer, number
from nemotron_jax.environments.base import Draft, Environment, Session, Task, ToolError, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling
from nemotron_jax.environments.words import ask, coined

GET = tool("get", "The value of a key.", {"k": {"type": "string", "maxLength": 20}})


class LookupSession(Session):
    def tool_get(self, k: str) -> str:
        """The value of a key of the task's table; raises ToolError for an unknown key."""
        table = self.task.data["table"]
        if k not in table:
            raise ToolError("no such key")
        return str(table[k])

    def score(self) -> Verdict:
        answer = number(final_answer(self.text))
        looked = sum(not result.startswith("error") for _, _, result in self.calls)
        right = answer == self.task.data["answer"]
        return Verdict(float(right), {"calls": float(looked)}, final_answer(self.text))


class Lookup(Environment):
    """Level 0: one key. 1: a key whose value is a key. 2: the sum of two keys. 3: both."""

    name = "lookup"
    summary = "Answer with the number behind a key, through keys that lead to others"
    reward = "exact value"
    counterpart = "single_step_tool_use (several steps)"
    fidelity = "reduced stand-in"
    levels = 4
    max_turns = 12
    session = LookupSession

    def draw(self, draws: Draws, level: int) -> Draft:
        asked = 2 if level >= 2 else 1
        depth = (1, 2, 1, 3)[level]
        keys: list[str] = []
        while len(keys) < asked * depth + 3:
            key = coined(draws, 3) if len(keys) < asked else coined(draws, 2)
            if key not in keys:
                keys.append(key)
        table: dict[str, str | int] = {key: draws.between(100, 999) for key in keys}
        chains = []
        for start in range(asked):
            chain = [keys[start]] + keys[asked + start :: asked][: depth - 1]
            for key, after in zip(chain, chain[1:]):
                table[key] = after
            chains.append(chain)
        answer = sum(table[chain[-1]] for chain in chains)
        text = "+".join(keys[:asked]) + "?"
        if level:
            text = f"{text} Look up; a value may be a key. End with a line Answer: N."
        data = {"table": table, "chains": chains, "answer": answer}
        return Draft(ask(text), data, (GET,))

    def oracle(self, task: Task) -> list[Turn | str]:
        calls = [calling("get", k=key) for chain in task.data["chains"] for key in chain]
        answer = str(task.data["answer"])
        return [*calls, answer if task.level == 0 else f"Answer: {answer}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        keys = [key for chain in task.data["chains"] for key in chain][::-1]
        calls = tuple(calling("get", k=key).calls[0] for key in keys)
        return [[Turn(calls=calls), f"\\boxed{{{task.data['answer']}}}"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        answer, table = task.data["answer"], task.data["table"]
        first = task.data["chains"][0][0]
        values = [value for value in table.values() if isinstance(value, int)]
        return {
            "answer in a remark": [Turn(f"Answer: {answer}", calling("get", k=first).calls)],
            "every value": ["\n".join(f"Answer: {value}" for value in [*values, answer, 1])],
            "the key": [f"Answer: {first}"],
            "a call written out": [f"get({first}) = {answer}"],
            "off by one": [f"Answer: {answer + 1}"],
        }


ENVIRONMENTS = (Lookup(),)
