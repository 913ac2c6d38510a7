"""Multiple choice: the answer is one letter, or one option's text, however it is given."""

from collections.abc import Callable

from nemotron_jax.environments.answers import final_answer
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.letters import LETTERS, letter_of
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import THINGS, ask

_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
Question = tuple[str, str, list[str]]  # words, right option, wrong options


class ChoiceSession(Session):
    def score(self) -> Verdict:
        letter = letter_of(final_answer(self.text), self.task.data["options"])
        return Verdict(float(letter == self.task.data["answer"]), answer=letter)


class MultipleChoice(Environment):
    """Two to ten options; the wrong ones come from the usual slips."""

    name = "multiple_choice"
    summary = "Answer a question by the letter of the right option"
    reward = "option letter"
    counterpart = "mcqa"
    session = ChoiceSession

    def draw(self, draws: Draws, level: int) -> Draft:
        if level == 0:
            words, right, wrong = _largest(draws, 3)
        else:
            words, right, wrong = draws.choice(_QUESTIONS)(draws, 3 if level == 1 else 9)
        options = draws.shuffled([right, *wrong])
        letter = LETTERS[options.index(right)]
        lines = "\n".join(f"{name}) {option}" for name, option in zip(LETTERS, options))
        if level == 0:
            text = f"{words} " + " ".join(f"{n}) {o}" for n, o in zip(LETTERS, options))
        else:
            text = f"{words}\n{lines}\nGive the letter of the right option in \\boxed{{}}."
        return Draft(ask(text), {"answer": letter, "options": options}, identity=[words, right])

    def oracle(self, task: Task) -> list[Turn | str]:
        letter = task.data["answer"]
        return [letter if task.level == 0 else f"\\boxed{{{letter}}}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        letter, options = task.data["answer"], task.data["options"]
        whole = f"{letter}) {options[LETTERS.index(letter)]}"
        return [[f"It follows.\nAnswer: {letter}"], [f"({letter})"], [f"Answer: {whole}"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        options, letter = task.data["options"], task.data["answer"]
        names = LETTERS[: len(options)]
        other = next(name for name in names if name != letter)
        right = options[names.index(letter)]
        return {
            "every letter": [" ".join(names)],
            "every box": [" or ".join(f"\\boxed{{{name}}}" for name in names)],
            "every line": ["\n".join(f"Answer: {name}" for name in names)],
            "another letter": [f"\\boxed{{{other}}}"],
            "another letter, right text": [f"Answer: {other}) {right}"],
            "in the reasoning": [Turn(reasoning=f"\\boxed{{{letter}}}")],
            "in passing": [f"I think {letter} is likely, though {other} is tempting too."],
        }


def _largest(draws: Draws, wrong: int) -> Question:
    numbers = draws.sample(range(1, 1000), wrong + 1)
    return "Largest?", str(max(numbers)), [str(n) for n in numbers if n != max(numbers)]


def _count(draws: Draws, wrong: int) -> Question:
    words = [draws.choice(THINGS) for _ in range(draws.between(2, 4))]
    letter = draws.choice("aeinrt")
    count = sum(word.count(letter) for word in words)
    others = draws.sample([n for n in range(count + wrong + 3) if n != count], wrong)
    text = f"How often does the letter {letter} occur in “{' '.join(words)}”?"
    return text, str(count), [str(n) for n in others]


def _sequence(draws: Draws, wrong: int) -> Question:
    start, first, growth = draws.between(1, 50), draws.between(2, 20), draws.between(0, 5)
    terms = [start]
    for place in range(5):
        terms.append(terms[-1] + first + growth * place)
    shifts = draws.sample([n for n in range(-9, 10) if n], wrong)
    words = f"Which number goes on: {', '.join(map(str, terms[:-1]))}, …?"
    return words, str(terms[-1]), [str(terms[-1] + shift) for shift in shifts]


def _remainder(draws: Draws, wrong: int) -> Question:
    divisor, number = draws.between(11, 40), draws.between(200, 5000)
    right = number % divisor
    others = draws.sample([n for n in range(divisor) if n != right], wrong)
    words = f"What is the remainder of {number} divided by {divisor}?"
    return words, str(right), [str(n) for n in others]


def _weekday(draws: Draws, wrong: int) -> Question:
    today, days = draws.below(7), draws.between(8, 2000)
    right = _DAYS[(today + days) % 7]
    others = draws.sample([day for day in _DAYS if day != right], min(wrong, 6))
    return f"Today is {_DAYS[today]}. What day is it in {days} days?", right, others


_QUESTIONS: tuple[Callable[[Draws, int], Question], ...] = (
    _count,
    _sequence,
    _remainder,
    _weekday,
)


ENVIRONMENTS = (MultipleChoice(),)
