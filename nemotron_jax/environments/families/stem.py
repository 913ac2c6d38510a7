"""Science questions with open answers: a number with its unit, in any unit of that kind."""

from fractions import Fraction

from nemotron_jax.environments.answers import final_answer, number
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.units import quantity, unit
from nemotron_jax.environments.words import ask

# An answer may be rounded: one in a hundred of the exact value.
TOLERANCE = Fraction(1, 100)
# Words with places for drawn quantities, their units, the answer's unit, and the law as exponents
# of the quantities (after a factor).
_LAWS = (
    ("{0} at {1}: force?", ("kg", "m/s^2"), "N", Fraction(1), (1, 1)),
    ("{0} over {1}: voltage?", ("A", "ohm"), "V", Fraction(1), (1, 1)),
    ("{0} in {1}: speed?", ("m", "s"), "m/s", Fraction(1), (1, -1)),
    ("{0} in {1}: density?", ("kg", "m^3"), "kg/m^3", Fraction(1), (1, -1)),
    ("{0} on {1}: pressure?", ("N", "m^2"), "Pa", Fraction(1), (1, -1)),
    ("A body of {0} moves at {1}. What is its kinetic energy?", ("kg", "m/s"), "J",
     Fraction(1, 2), (1, 2)),
    ("A force of {0} acts along {1} for {2}. What is the mean power?", ("N", "m", "s"), "W",
     Fraction(1), (1, 1, -1)),
    ("A wave of {0} has a wavelength of {1}. How fast is it?", ("Hz", "m"), "m/s", Fraction(1),
     (1, 1)),
    ("{0} of a substance are dissolved in {1}. What is the concentration?", ("mol", "L"), "mol/L",
     Fraction(1), (1, -1)),
    ("A current of {0} flows through {1} for {2}. How much heat is set free?", ("A", "ohm", "s"),
     "J", Fraction(1), (2, 1, 1)),
    ("A mass of {0} is raised by {1} where gravity is {2}. How much energy does that take?",
     ("kg", "m", "m/s^2"), "J", Fraction(1), (1, 1, 1)),
    ("A gas is at {0} in {1}. What is the pressure in {2}, the temperature being the same?",
     ("Pa", "m^3", "m^3"), "Pa", Fraction(1), (1, 1, -1)),
)  # fmt: skip
_SHORT = 5
# Units that level 2 gives the quantities in instead, and asks back in.
_OTHER = {
    "kg": ("g", "Mg"), "m": ("cm", "km"), "s": ("min", "ms"), "N": ("kN",), "A": ("mA",),
    "ohm": ("kohm",), "J": ("kJ",), "W": ("kW",), "Pa": ("kPa",), "V": ("mV",), "Hz": ("kHz",),
    "L": ("mL",), "mol": ("mmol",), "m^3": ("L",),
}  # fmt: skip


class QuantitySession(Session):
    def score(self) -> Verdict:
        found = quantity(final_answer(self.text))
        wanted = Fraction(self.task.data["answer"])
        _, dimension = unit(self.task.data["unit"])
        right_unit = found is not None and found[1] == dimension
        right = right_unit and abs(found[0] - wanted) <= TOLERANCE * wanted
        return Verdict(float(right), {"unit": float(right_unit)}, final_answer(self.text))


class ScienceUnits(Environment):
    name = "science_units"
    summary = "Answer a question of physics or chemistry with a number and its unit"
    reward = "equal quantity within 1 %"
    counterpart = "equivalence_llm_judge (STEM)"
    fidelity = "reduced stand-in"
    session = QuantitySession

    def draw(self, draws: Draws, level: int) -> Draft:
        laws = _LAWS[:_SHORT] if level == 0 else _LAWS
        words, units, answer_unit, factor, powers = draws.choice(laws)
        value, told = factor, []
        for name, power in zip(units, powers):
            stated = draws.choice(_OTHER.get(name, (name,))) if level == 2 else name
            amount = draws.between(2, 99 if level == 0 else 999)
            value *= (amount * unit(stated)[0]) ** power
            told.append(f"{amount} {stated}")
        text = words.format(*told)
        if level:
            text += " Give the number and its unit on a last line Answer: …"
        data = {"answer": str(value), "unit": answer_unit}
        return Draft(ask(text), data, identity=[words, told])

    def oracle(self, task: Task) -> list[Turn | str]:
        return [f"Answer: {_stated(task, task.data['unit'])}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        own = task.data["unit"]
        ways = [[f"\\boxed{{{_stated(task, own)}}}"], [_stated(task, own)]]
        return ways + [[f"Answer: {_stated(task, other)}"] for other in _OTHER.get(own, ())]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        own = task.data["unit"]
        right = _stated(task, own)
        digits = right.split()[0]
        other = "V" if own != "V" else "J"
        lines = [f"Answer: {digits} {name}" for name in ("N", "J", "V", "m/s", "Pa", "kg/m^3")]
        return {
            "no unit": [f"Answer: {digits}"],
            "another kind of unit": [f"Answer: {digits} {other}"],
            "a thousand times as much": [f"Answer: {digits} {'kg*' if '/' in own else 'k'}{own}"],
            "every unit": ["\n".join(lines)],
            "two percent off": [f"Answer: {_stated(task, own, Fraction(102, 100))}"],
            "negative": [f"Answer: -{right}"],
            "in passing": [f"Perhaps it is {right}, perhaps not."],
        }


def _stated(task: Task, name: str, times: Fraction = Fraction(1)) -> str:
    """The answer in a unit, to six digits."""
    value = Fraction(task.data["answer"]) * times / unit(name)[0]
    return f"{float(value):.6g} {name}"


class LinearEquation(Environment):
    """Equations with one unknown, without a tool: the answer is exact, as a fraction if need be."""

    name = "equations"
    summary = "Solve a linear equation, or two, exactly"
    reward = "exact value"
    counterpart = "math_with_judge (judge off)"

    class session(Session):  # noqa: N801
        def score(self) -> Verdict:
            answer = number(final_answer(self.text))
            right = answer is not None and answer == Fraction(self.task.data["answer"])
            return Verdict(float(right), answer=final_answer(self.text))

    def draw(self, draws: Draws, level: int) -> Draft:
        a, x, c = draws.between(2, 19), draws.between(-60, 60), draws.between(1, 99)
        if level == 0:
            return Draft(ask(f"{a}x+{c}={a * x + c}"), {"answer": str(x)})
        b = draws.between(20, 60)
        value = Fraction(draws.between(-200, 200), 1)
        if level == 1:
            text = f"Solve {a}x + {c} = {b}x + {draws.between(100, 999)}."
            right = int(text.split("+ ")[-1].rstrip("."))
            value = Fraction(c - right, b - a)
        else:
            y, d = draws.between(-50, 50), draws.between(2, 19)
            first, second = a * x + b * y, d * x - c * y
            text = f"Find x: {a}x + {b}y = {first} and {d}x - {c}y = {second}."
            value = Fraction(first * c + second * b, a * c + d * b)
        return Draft(ask(f"{text} End with a line Answer: x = …"), {"answer": str(value)})

    def oracle(self, task: Task) -> list[Turn | str]:
        return [task.data["answer"] if task.level == 0 else f"Answer: x = {task.data['answer']}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        value = Fraction(task.data["answer"])
        doubled = f"{2 * value.numerator}/{2 * value.denominator}"
        return [[f"\\boxed{{{value}}}"], [f"Answer: {doubled}"], [f"x = {value}"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        value = Fraction(task.data["answer"])
        return {
            "every candidate": ["\n".join(f"Answer: {value + shift}" for shift in (-1, 0, 1))],
            "another sign": [f"Answer: {-value - 1}"],
            "in the reasoning": [Turn(reasoning=f"Answer: {value}")],
        }


ENVIRONMENTS = (ScienceUnits(), LinearEquation())
