"""Arithmetic with a one-operation calculator: the whole expression takes several calls."""

import re
from fractions import Fraction

from nemotron_jax.environments.answers import final_answer, number
from nemotron_jax.environments.base import Draft, Environment, Session, Task, ToolError, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling

CALCULATOR = tool(
    "calc",
    "One operation on two numbers: a+b, a-b, a*b or a/b.",
    {"e": {"type": "string", "description": "for example 12*7", "maxLength": 64}},
)
_OPERATION = re.compile(r"\s*(-?[\d./]+)\s*([-+*/])\s*(-?[\d./]+)\s*", re.ASCII)
_APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
# A result of more digits than this is refused, so that repeated products stay cheap.
MAX_DIGITS = 30


def shown(value: Fraction) -> str:
    """A whole number as such, another as numerator/denominator."""
    return (
        str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    )


def apply(a: Fraction, operator: str, b: Fraction) -> Fraction:
    """One operation, exactly. Raises ToolError for a division by zero and for more than MAX_DIGITS
    digits."""
    if operator == "/" and not b:
        raise ToolError("division by zero")
    result = _APPLY[operator](a, b)
    if max(abs(result.numerator), result.denominator) >= 10**MAX_DIGITS:
        raise ToolError(f"the result has more than {MAX_DIGITS} digits")
    return result


class CalculatorSession(Session):
    def tool_calc(self, e: str) -> str:
        """The result of one operation on two numbers; raises ToolError for any other text."""
        match = _OPERATION.fullmatch(e)
        a, b = (number(match[1]), number(match[3])) if match else (None, None)
        if a is None or b is None:
            raise ToolError("give one operation on two numbers, such as 12*7")
        return shown(apply(a, match[2], b))

    def score(self) -> Verdict:
        answer = number(final_answer(self.text))
        right = answer is not None and answer == number(self.task.data["answer"])
        used = any(not result.startswith("error") for _, _, result in self.calls)
        return Verdict(
            float(right), {"used_tool": float(used)}, None if answer is None else shown(answer)
        )


class Arithmetic(Environment):
    """a?b at level 0, two operations at level 1, nested brackets and larger numbers above."""

    name = "arithmetic"
    summary = "Work out an expression with a calculator that does one operation a call"
    reward = "exact value"
    counterpart = "math_with_judge (judge off)"
    levels = 4
    max_turns = 12
    session = CalculatorSession

    def draw(self, draws: Draws, level: int) -> Draft:
        steps: list[list[str]] = []
        text, value = _expression(draws, level, steps)
        asked = f"{text}=" if level == 0 else _question(text)
        return _draft(asked, text, value, steps)

    def oracle(self, task: Task) -> list[Turn | str]:
        calls = [calling("calc", e=step) for step, _ in task.data["steps"]]
        return [*calls, _final(task, task.data["answer"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        answer = task.data["answer"]
        return [[f"I worked it out in my head.\nAnswer: {answer}"], [f"\\boxed{{{answer}}}"]]

    def slips(self, task: Task) -> dict[str, list[Turn | str]]:
        """`left_to_right` heeds no precedence, `guess` calls no calculator and is wrong."""
        text = task.data["expression"].replace("(", "").replace(")", "")
        first, *rest = re.findall(r"[-+*]?\d+", text)
        value, calls = Fraction(first), []
        for operator, *digits in rest:
            operand = Fraction("".join(digits))
            calls.append(calling("calc", e=f"{shown(value)}{operator}{shown(operand)}"))
            value = apply(value, operator, operand)
        draws = Draws(task.id)
        near = number(task.data["answer"]) + draws.choice((-1, 1)) * draws.between(1, 9)
        return super().slips(task) | {
            "left_to_right": [*calls, _final(task, shown(value))],
            "guess": [_final(task, shown(near))],
        }

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        answer = number(task.data["answer"])
        near = [shown(answer + shift) for shift in (-1, 0, 1)]
        return {
            "every candidate": ["\n".join(f"Answer: {value}" for value in near)],
            "every box": [" ".join(f"\\boxed{{{value}}}" for value in near)],
            "answer in a remark": [Turn(f"Answer: {near[1]}", calling("calc", e="1+1").calls)],
            "answer in the reasoning": [Turn(reasoning=f"Answer: {near[1]}")],
            "expression as answer": [f"Answer: {task.data['expression']}"],
            "off by one": [f"Answer: {near[0]}"],
        }


def flat_sum(draws: Draws, numbers: int, largest: int) -> Draft:
    """A problem of so many numbers from 1 up to the largest, without brackets, asked as from level
    1 on."""
    steps: list[list[str]] = []
    text, value = _operate(draws, [_number(draws, largest) for _ in range(numbers)], steps)
    return _draft(_question(text), text, value, steps)


def _question(text: str) -> str:
    return f"What is {text}? Use the calculator; end with a line Answer: N."


def _draft(asked: str, text: str, value: Fraction, steps: list[list[str]]) -> Draft:
    messages = [{"role": "user", "content": asked}]
    data = {"expression": text, "answer": shown(value), "steps": steps}
    return Draft(messages, data, (CALCULATOR,), identity=text)


def _final(task: Task, answer: str) -> str:
    return answer if task.level == 0 else f"Answer: {answer}"


def _expression(draws: Draws, level: int, steps: list[list[str]]) -> tuple[str, Fraction]:
    """An expression, its value, and each operation with its result in an order that works."""
    if level == 0:
        return _operate(draws, [_number(draws, 99), _number(draws, 99)], steps)
    if level == 1:
        return _operate(draws, [_number(draws, 20) for _ in range(3)], steps)
    parts = []
    for _ in range(2 if level == 2 else 3):
        text, value = _operate(draws, [_number(draws, 50) for _ in range(level)], steps)
        parts.append((f"({text})", value))
    return _operate(draws, parts, steps)


def _number(draws: Draws, largest: int) -> tuple[str, Fraction]:
    value = draws.between(1, largest)
    return str(value), Fraction(value)


def _operate(
    draws: Draws, parts: list[tuple[str, Fraction]], steps: list[list[str]]
) -> tuple[str, Fraction]:
    """Parts joined by + - *, products first."""
    operators = [draws.choice("+-*") for _ in parts[1:]]
    text = parts[0][0] + "".join(op + part for op, (part, _) in zip(operators, parts[1:]))
    values = [value for _, value in parts]
    while operators:
        place = operators.index("*") if "*" in operators else 0
        a, operator, b = values[place], operators.pop(place), values.pop(place + 1)
        values[place] = apply(a, operator, b)
        steps.append([f"{shown(a)}{operator}{shown(b)}", shown(values[place])])
    return text, values[0]


ENVIRONMENTS = (Arithmetic(),)
