"""What is no solution earns about nothing: guesses, lists of everything, denials."""

import collections
import re

import pytest

from nemotron_jax.environments import (
    Draft,
    Draws,
    Environment,
    Session,
    Task,
    Turn,
    Verdict,
    play,
    registry,
)
from nemotron_jax.environments.base import MAX_TEXT
from nemotron_jax.environments.check import check
from nemotron_jax.environments.families.longcontext import listed
from nemotron_jax.environments.families.retention import asserted
from nemotron_jax.environments.fuzz import drawn_texts


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
    "text",
    ["Ab, Cd", "[Ab, Cd]", "Ab; Cd.", "Answer: {Ab, Cd}", "Answer: `Ab` and `Cd`", '["Ab", "Cd"]'],
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
        ("It used to be Lima and is Porto.", {"porto"}), ("I doubt that it is Porto.", set()),
        ("It is Porto (previously Lima).", {"porto"}), ("I don't think it's Porto.", set()),
        ("That it is Porto is false.", set()), ("Don't worry, it is Porto.", {"porto"}),
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


def test_drawn_texts_are_long_and_differ_by_task() -> None:
    one, other = (list(drawn_texts(Draws("fuzz", name), 6)) for name in "ab")
    assert one == list(drawn_texts(Draws("fuzz", "a"), 6)) and one != other
    assert all(MAX_TEXT - 60 <= len(text) <= MAX_TEXT for _, text in one + other)


class Echoing(Environment):
    """Pays the prompt's words in any order, or whatever is short."""

    name, summary, reward, counterpart = "echoing", "Say it", "words", "none"

    def __init__(self, pays: str) -> None:
        self.pays = pays

    class session(Session):  # noqa: N801
        def score(self) -> Verdict:
            data, words = self.task.data, self.text.casefold().split()
            if data["pays"] == "words":
                return Verdict(float(sorted(words) == sorted(data["word"].split())))
            return Verdict(float(0 < len(self.text) < 9 and words != ["?"]))

    def draw(self, draws: Draws, level: int) -> Draft:
        word = f"say {draws.below(10**6)}"
        return Draft([{"role": "user", "content": word}], {"word": word, "pays": self.pays})

    def oracle(self, task: Task) -> list[Turn | str]:
        return [task.data["word"][-6:]] if self.pays == "short" else [task.data["word"]]


@pytest.mark.parametrize(
    ("pays", "words"), [("words", "the prompt's words, sorted"), ("short", "always '0' earns 1.00")]
)
def test_the_check_finds_what_a_cheat_is_paid(pays: str, words: str) -> None:
    assert any(words in found for found in check(Echoing(pays), tasks=1, fuzz=0).faults)
