"""Questions that want a computer, with a Python whose variables live on between calls."""

from nemotron_jax.environments import coding
from nemotron_jax.environments.answers import final_answer, number
from nemotron_jax.environments.base import Draft, Environment, InfraError, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.sandbox import KERNEL_LIMITS, PythonKernel
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling

PYTHON = tool(
    "python",
    "Runs Python and returns what it prints; variables are kept between calls.",
    {"code": {"type": "string", "maxLength": 20_000}},
)
# A statistic of a list: its words, and Python for it.
_FIGURES = (
    ("the sum of the values", "sum({v})"),
    ("the largest value minus the smallest", "max({v}) - min({v})"),
    ("the number of different values", "len(set({v}))"),
    ("the sum of the squares of the values", "sum(x * x for x in {v})"),
    ("the second largest different value", "sorted(set({v}))[-2]"),
)
_CHOICES = (
    ("that leave {r} when divided by {d}", "x % {d} == {r}"),
    ("whose digits add up to a multiple of {d}", "sum(map(int, str(abs(x)))) % {d} == 0"),
    ("greater than {m}", "x > {m}"),
)


class PythonSession(coding.HoldingSession):
    """A kernel is started when the tool is first called."""

    limits = KERNEL_LIMITS
    kernel: PythonKernel | None = None

    def tool_python(self, code: str) -> str:
        """What a cell prints, run in this session's Python, whose variables stay. Raises InfraError
        where no sandbox starts."""
        began = ""
        if self.kernel is None or not self.kernel.alive:
            began = "(a new Python: earlier variables are gone)\n" if self.kernel else ""
            try:
                self.kernel = PythonKernel(coding.sandbox(), slot=self.take_slot())
            except OSError as error:
                raise InfraError(str(error)) from error
            if data := self.task.data["loaded"]:
                self.kernel.execute(f"data = {data!r}", wall_s=coding.CELL_S)
        reply = self.kernel.execute(code, wall_s=coding.CELL_S)
        if reply.ended == "died":
            return f"{began}error: it ran out of its {coding.CELL_S:.0f} s or memory, or ended"
        cut = "\n(cut here)" if reply.ended == "output" else ""
        return f"{began}{reply.output}{cut}" or "(no output)"

    def close(self) -> None:
        if self.kernel is not None:
            self.kernel.close()
        super().close()

    def score(self) -> Verdict:
        self.close()
        answer = number(final_answer(self.text))
        right = answer is not None and answer == self.task.data["answer"]
        return Verdict(float(right), {"used_tool": float(bool(self.calls))}, self.text[:200])


class PythonTool(Environment):
    """A range at level 0, loaded data at level 1, two selections of them at level 2."""

    name = "python_tool"
    summary = "Answer a question by computing, with a stateful Python"
    reward = "exact value"
    counterpart = "ns_tools"
    max_turns = 8
    rate = "code"
    session = PythonSession

    def draw(self, draws: Draws, level: int) -> Draft:
        words, figure = draws.choice(_FIGURES)
        selections = [_selection(draws) for _ in range(2 if level == 2 else 1)]
        if level == 0:
            low, high = draws.between(1, 400), draws.between(1000, 9000)
            loaded: list[int] = []
            source, where = f"range({low}, {high + 1})", f"the integers from {low} to {high}"
        else:
            loaded = [draws.between(-999, 999) for _ in range(draws.between(60, 120))]
            source, where = "data", "the list `data`, which is loaded in Python,"
        conditions = [condition for _, condition in selections]
        chosen = f"[x for x in {source} if {' and '.join(conditions)}]"
        scope: dict = {"data": loaded}
        values = eval(chosen, scope)
        if len(set(values)) < 3:  # too few for every figure to mean something: widen
            selections, conditions, chosen = [], [], f"list({source})"
            values = eval(chosen, scope)
        answer = eval(figure.format(v="values"), {"values": values})
        asked = " and ".join(text for text, _ in selections)
        content = (
            f"Take the values of {where} {asked}. What is {words}? "
            f"Use the tool; end with a line Answer: N."
        )
        # Two lists may differ where the question is the same: the data are part of the identity.
        if loaded:
            content += f" (`data` has {len(loaded)} values and adds up to {sum(loaded)}.)"
        data = {"loaded": loaded, "answer": answer, "chosen": chosen, "figure": figure}
        return Draft([{"role": "user", "content": content}], data, (PYTHON,))

    def oracle(self, task: Task) -> list[Turn | str]:
        data = task.data
        first = calling("python", code=f"values = {data['chosen']}\nlen(values)")
        second = calling("python", code=f"print({data['figure'].format(v='values')})")
        return [first, second, f"Answer: {data['answer']}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        data = task.data
        whole = f"v = {data['chosen']}\nprint({data['figure'].format(v='v')})"
        return [[calling("python", code=whole), f"\\boxed{{{data['answer']}}}"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        answer = task.data["answer"]
        near = range(answer - 2, answer + 3)
        return {
            "every candidate": ["\n".join(f"Answer: {value}" for value in near)],
            "printed, not answered": [
                calling("python", code=f"print('Answer: {answer}')"),
                "Done.",
            ],
            "off by one": [f"Answer: {answer + 1}"],
            "code as answer": [f"Answer: {task.data['figure'].format(v=task.data['chosen'])}"],
            "passed": ["All tests passed."],
            "exit": [calling("python", code="import os; os._exit(0)"), "Answer: passed"],
        }

    def unavailable(self) -> str | None:
        return coding.unavailable()


def _selection(draws: Draws) -> tuple[str, str]:
    words, condition = draws.choice(_CHOICES)
    divisor = draws.between(2, 7)
    values = {"d": divisor, "r": draws.below(divisor), "m": draws.between(-600, 300)}
    return words.format(**values), condition.format(**values)


ENVIRONMENTS = (PythonTool(),)
