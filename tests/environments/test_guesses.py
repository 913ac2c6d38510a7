"""What is no solution earns about nothing: guesses, lists of everything, denials."""

import collections
import re

import pytest

from nemotron_jax.environments import Task, play, registry
from nemotron_jax.environments.longcontext import listed
from nemotron_jax.environments.retention import asserted


def favourites(task: Task, count: int) -> str:
    """The nodes that most edges lead to."""
    led_to = collections.Counter(re.findall(r">(\w+)", task.messages[0]["content"]))
    return "Answer: " + ", ".join(name for name, _ in led_to.most_common(count))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_guess_at_a_walk_earns_about_nothing(count: int) -> None:
    environment = registry["graph_walk"]
    for level in range(3):
        tasks = [environment.split(0, "train", index, level=level) for index in range(30)]
        earned = [play(environment, task, [favourites(task, count)]).reward for task in tasks]
        assert sum(earned) / len(earned) < 0.1


def test_a_walk_of_which_most_is_found_earns_a_part() -> None:
    environment = registry["graph_walk"]
    tasks = (environment.split(0, "train", index, level=3) for index in range(9))
    task = next(task for task in tasks if len(task.data["nodes"]) > 5)
    nodes = task.data["nodes"]
    rewards = [
        play(environment, task, ["Answer: " + ", ".join(nodes[:count])]).reward
        for count in range(1, len(nodes) + 1)
    ]
    assert rewards == sorted(rewards) and rewards[0] == 0 and 0.5 < rewards[-2] < rewards[-1] == 1


@pytest.mark.parametrize(
    "text", ["Ab, Cd", "[Ab, Cd]", "Ab; Cd.", "Answer: {Ab, Cd}", "`Ab` and **Cd**", '["Ab", "Cd"]']
)
def test_a_list_is_read_with_and_without_brackets(text: str) -> None:
    assert listed(text) == ["Ab", "Cd"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("It is Porto.", {"porto"}), ("**Porto**!", {"porto"}), ("Porto, not Lima", {"porto"}),
        ("It's Porto now, no longer Lima.", {"porto"}), ("Not Lima but Porto", {"porto"}),
        ("It was Lima, now it's Porto", {"porto"}), ("Porto instead of Lima", {"porto"}),
        ("It is not Porto.", set()), ("It isn’t Porto", set()), ("Neither Porto nor Lima", set()),
        ("Porto or Lima", {"porto", "lima"}), ("Lima, Porto", {"porto", "lima"}),
        ("You changed it from Lima to Porto.", {"porto"}), ("Portobello", set()),
    ],
)  # fmt: skip
def test_a_denied_value_is_not_named(text: str, named: set[str]) -> None:
    assert asserted(text, {"porto", "lima"}) == named


def test_every_number_at_once_remembers_none() -> None:
    environment = registry["retention"]
    task = environment.split(0, "train", 0, level=0)
    number = task.data["answer"]

    def reward(last: str) -> float:
        return play(environment, task, ["Yes.", last]).reward

    assert reward(" ".join(map(str, range(100, 30_000))) + f" {number}") == 0
    for right in (number, f"It is {number}!", f"You told me to remember {int(number):,}."):
        assert reward(right) == 1
    for wrong in (f"Not {number}", f"{number} or 7", f"Remember {number}.", f"{number}7", "Yes."):
        assert reward(wrong) == 0


def test_the_rules_word_ends_a_reply_whatever_marks_follow() -> None:
    environment = registry["retention"]
    task = environment.split(0, "train", 0, level=1)
    sign, answer = task.data["sign"], task.data["answer"]
    count = len(task.data["after"])
    for end in (f"{sign}", f"{sign}…", f"**{sign}**", f"“{sign}”.", f"{sign.capitalize()}?!"):
        assert play(environment, task, [f"Hm, {end}"] * count + [f"{answer}. {end}"]).reward == 1
    for end in (f"un{sign}", f"{sign}s", f"{sign} now", ""):
        assert play(environment, task, [f"Hm {end}"] * count + [f"{answer} {end}"]).reward == 0
