"""Conversations in which what was said early holds to the end, changes included."""

import re
from collections.abc import Set

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.reading import LONGEST_REPLY, parts_of, repeats, words_of
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, THINGS, ask, coined

_FACTS = {"city": CITIES, "colour": COLOURS, "present": THINGS, "guest": FIRST}
_CLAUSE = re.compile(r"[.,;:!?\n\u2013\u2014](?!\d)")
# What follows these in a clause is denied or past, until one of the others. "isn't" is "isn", "t".
_DENYING = frozenset(
    "not no never neither nor isn wasn aren longer instead than was were from before forget"
    " previously formerly originally initially earlier".split()
)
# What follows these in a clause is not said at all, and nothing is in a clause with the others.
_DOUBTING = frozenset("doubt doubtful unlikely don doesn didn cannot wonder whether if".split())
_REJECTING = frozenset("wrong false incorrect untrue".split())
_AFFIRMING = frozenset("but now is are to s".split())
_SMALL_TALK = (
    "What a day. Say something kind.",
    "By the way, are you well?",
    "I am thinking. Say something.",
)


def asserted(text: str, values: Set[str] | None) -> set[str]:
    """Which values a text names and does not deny; without values, which numbers.

    "It is Porto, no longer Lima" names Porto, and "it is not Porto" nothing.
    """
    found = set()
    for clause in _CLAUSE.split(text):
        denied = doubted = False
        words = parts_of(words_of(clause.casefold().replace("used to", "was")))
        for word in () if _REJECTING.intersection(words) else words:
            doubted = word != "but" and (doubted or word in _DOUBTING)
            denied = doubted or (word not in _AFFIRMING and (denied or word in _DENYING))
            word = word.replace(",", "")
            if not denied and (word in values if values is not None else word.isdecimal()):
                found.add(word)
    return found


class RetentionSession(Session):
    def answered(self, text: str) -> str | None:
        after = self.task.data["after"]
        place = len(self.turns) - 1
        return after[place] if place < len(after) else None

    def score(self) -> Verdict:
        data = self.task.data
        texts = [turn.text.strip() for turn in self.turns]
        if any(len(text) > LONGEST_REPLY for text in texts):
            return Verdict(0.0)
        complete = len(texts) == len(data["after"]) + 1 and all(texts)
        sign = data["sign"]
        kept = [words_of(text)[-1:] == [sign] for text in texts] if sign else []
        values = {value.casefold() for value in (data["answer"], *data["stale"])}
        named = asserted(texts[-1], values if sign else None) == {data["answer"].casefold()}
        said = [message["content"] for message in self.task.messages]
        right = complete and all(kept) and named and not repeats(texts[-1], said)
        parts = {"rule": sum(kept) / max(1, len(kept)), "value": float(named)}
        return Verdict(float(right), parts, texts[-1][:200])


class Retention(Environment):
    name = "retention"
    summary = "Keep a rule and the newest of several facts over the turns of a conversation"
    reward = "programmatic rubric"
    counterpart = "multichallenge"
    fidelity = "reduced stand-in"
    levels = 4
    max_turns = 8
    session = RetentionSession

    def draw(self, draws: Draws, level: int) -> Draft:
        if level == 0:
            value = str(draws.between(100, 99999))
            data = {"after": ["Number?"], "sign": "", "answer": value, "stale": []}
            return Draft(ask(f"Remember {value}."), data)
        sign = coined(draws, 3)
        kinds = draws.sample(list(_FACTS), 1 + level)
        asked = kinds[0]
        values = draws.sample(_FACTS[asked], level + 1)
        told = ", ".join(f"the {kind} is {_value(draws, kind, values[0], asked)}" for kind in kinds)
        opening = f"End every reply with the word {sign}. For my trip: {told}. Say that you know."
        after = []
        for value in values[1:]:
            after.append(draws.choice(_SMALL_TALK))
            after.append(f"I changed my mind: the {asked} is {value} now. Say that you know.")
        after = after[-5:] + [f"What is the {asked} now?"]
        others = [v for v in _FACTS[asked] if v != values[-1]]
        data = {"after": after, "sign": sign, "answer": values[-1], "stale": others}
        return Draft(ask(opening), data)

    def oracle(self, task: Task) -> list[Turn | str]:
        data = task.data
        if not data["sign"]:
            return ["Yes.", data["answer"]]
        known = [f"I know, {data['sign']}"] * len(data["after"])
        return [*known, f"It is {data['answer']}. {data['sign']}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        data = task.data
        if not data["sign"]:
            answer = data["answer"]
            return [["I will.", f"It is {answer}."], ["OK!", f"You told me {int(answer):,}"]]
        kind = [f"You are kind. {data['sign']}."] * len(data["after"])
        answer, sign, stale = data["answer"], data["sign"], data["stale"][0]
        return [
            [*kind, f"{answer} {sign}"],
            [*kind, f"It's **{answer}**, no longer {stale}!\n\n{sign.capitalize()}…"],
        ]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data, right = task.data, [Turn.of(turn).text for turn in self.oracle(task)]
        cheats: dict[str, list[Turn | str]] = {
            "answered at once and no more": [right[-1]],
            "answered in the wrong turn": [right[-1], *right[:-1]],
            "cut short": list(right[:-1]),
            "every number": [" ".join(map(str, range(100, 33_000)))] * len(right),
            "the opening again": [task.messages[0]["content"]] * len(right),
            "denied": [*right[:-1], f"It is not {data['answer']}. {data['sign']}"],
            "silent before": [*[""] * len(data["after"]), right[-1]],
        }
        if data["sign"]:
            stale = data["stale"][0]
            every = " ".join([*data["stale"], data["answer"], data["sign"]])
            cheats["a stale value"] = [*right[:-1], f"It is {stale}. {data['sign']}"]
            cheats["every value"] = [*right[:-1], every]
            cheats["the rule forgotten"] = [*right[:-1], f"It is {data['answer']}."]
            cheats["the rule forgotten once"] = ["I know.", *right[1:]]
        return cheats


def _value(draws: Draws, kind: str, own: str, asked: str) -> str:
    return own if kind == asked else draws.choice(_FACTS[kind])


ENVIRONMENTS = (Retention(),)
