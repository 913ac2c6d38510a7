"""Agents that read the prompt and solve nothing: what every environment has to leave unpaid."""

import re
from collections.abc import Callable

from nemotron_jax.environments.base import Environment, Task
from nemotron_jax.environments.reading import words_of

# A constant may be right by chance: half of the time where there are two answers.
CHANCE = 0.5
_EVERY_NUMBER = " ".join(map(str, range(100, 33_000)))
_EVERY_FORM = 'Answer: 1\n\\boxed{1}\n```\n1\n```\n{"answer": 1}\n1'


def _prompt(task: Task) -> str:
    return "\n".join(message["content"] for message in task.messages)


def _sentences(task: Task) -> list[str]:
    parts = re.split(r"(?<=[.!?:])\s+|\n+", task.messages[-1]["content"].strip())
    return [part for part in parts if part] or [""]


# Never right, whatever is asked. Each text is sent in every turn of an episode.
NEVER_RIGHT: dict[str, Callable[[Task], str]] = {
    "the prompt after a refusal": lambda task: f"I can't: {_prompt(task)}",
    "the prompt's words, sorted": lambda task: " ".join(sorted(words_of(_prompt(task)))),
    "the prompt with another blank": lambda task: _prompt(task).replace(" ", "  ", 1),
    "the prompt in other marks": lambda task: re.sub(r"[?.!,]", " !", _prompt(task)).upper(),
    "the prompt quoted": lambda task: f"You say: “{_prompt(task)}”",
    "the prompt without its end": lambda task: _prompt(task)[: len(_prompt(task)) * 7 // 10],
    "every number": lambda task: _EVERY_NUMBER,
}
# May be right by chance, so judged by their mean over the tasks of a level.
LUCKY: dict[str, Callable[[Task], str]] = {
    **{f"always {text!r}": (lambda task, text=text: text)
       for text in ("0", "Answer: 1", "A", "\\boxed{B}", "Yes.", "No.", "Done.",
                    "I can't help with that.")},
    "an answer in every form": lambda task: _EVERY_FORM,
    "the prompt's first sentence": lambda task: _sentences(task)[0],
    "the prompt's last sentence": lambda task: _sentences(task)[-1],
}  # fmt: skip


def never_right(environment: Environment, task: Task) -> dict[str, list]:
    """Episodes that score 0, by the name of the trick; where code is run, two of them."""
    names = list(NEVER_RIGHT)[: 2 if environment.rate == "code" else None]
    return {name: [NEVER_RIGHT[name](task)] * environment.max_turns for name in names}


def luck(tasks: int) -> float:
    """The mean reward that chance stays under, but for one constant in fifty."""
    return CHANCE + 2 * (CHANCE * (1 - CHANCE) / tasks) ** 0.5
