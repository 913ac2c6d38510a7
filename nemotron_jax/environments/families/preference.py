"""Better than a given reply, by rules: facts first, then length and plainness.

The released environment compares replies with a reward model and adds terms for length and style.
The model is left out; what it cannot do without, the facts, and the terms that are rules, are kept.
"""

import re

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.claims import Reader
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.reading import words_of
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import THINGS, ask, coined_names

_MARKS = re.compile(r"[*#`_|]|^[ \t]*[-\u2022]", re.MULTILINE)
_PADDING = (
    "Thank you so much for asking this great question!",
    "I hope that this finds you well.",
    "**Please note** that all of this is said with care.",
    "In conclusion, these are the facts as they were told.",
)
_KINDS = ("price", "weight", "length", "stock")


def style_density(text: str) -> float:
    """Marks of markdown a word."""
    return len(_MARKS.findall(text)) / max(1, len(text.split()))


class PreferenceSession(Session):
    """0 unless every fact stands, none is made up and it is shorter; half of 1 unless plainer.

    What cannot be read as a plain claim (claims.py) counts as made up.
    """

    def score(self) -> Verdict:
        facts, reference = self.task.data["facts"], self.task.data["reference"]
        text = self.text
        words = len(text.split())
        if words >= len(reference.split()) or len(text) > 2 * len(reference):
            return Verdict(0.0, {"shorter": 0.0})
        wanted = {(name.casefold(), kind, str(value)) for name, kind, value in facts}
        reader = Reader({name for name, _, _ in wanted}, set(THINGS), set(words_of(reference)))
        claims = reader.claims(text)
        said = len(wanted & (claims or set())) / len(wanted)
        sound = claims == wanted
        plainer = style_density(text) < style_density(reference)
        parts = {"facts": said, "shorter": 1.0, "plainer": float(plainer)}
        return Verdict((1 + plainer) / 2 if sound else 0.0, parts)


class Preference(Environment):
    name = "preference"
    summary = "Write a reply that is better than a given one: as true, shorter, plainer"
    reward = "preferred by rules"
    counterpart = "genrm_compare"
    fidelity = "reduced stand-in"
    session = PreferenceSession

    def draw(self, draws: Draws, level: int) -> Draft:
        names = coined_names(draws, 1 + level, 2)
        thing = draws.choice(THINGS)
        facts = [
            [name, kind, draws.between(2, 999)]
            for name in names
            for kind in draws.sample(_KINDS, 1 + level)
        ]
        told = " ".join(_said(fact) for fact in facts)
        padding = _PADDING[2:3] if level == 0 else _PADDING
        reference = " ".join([*padding[:-1], f"*The {thing}:*", told, padding[-1]])
        if level == 0:
            text = f"Say it better: {reference}"
        else:
            text = (
                "A customer got the reply below. Write a better one: a sentence for every fact, no"
                f" fact of your own, fewer words, no markdown.\n\n{reference}"
            )
        return Draft(ask(text), {"facts": facts, "reference": reference}, identity=[thing, told])

    def oracle(self, task: Task) -> list[Turn | str]:
        return [" ".join(_said(fact) for fact in task.data["facts"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        facts = task.data["facts"][::-1]
        verb = {"price": "costs {v}", "weight": "weighs {v}", "length": "is {v} long"}
        return [
            [" ".join(f"The {kind} of {name} is {value}!" for name, kind, value in facts)],
            [", ".join(f"{name}’s {kind} is {value}" for name, kind, value in facts) + "."],
            [" ".join(f"{n} {verb.get(k, 'has {v} in stock').format(v=v)}." for n, k, v in facts)],
        ]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        facts, reference = task.data["facts"], task.data["reference"]
        told = " ".join(_said(fact) for fact in facts)
        values = [value for _, _, value in facts]
        rotated = [[n, k, v] for (n, k, _), v in zip(facts, [*values[1:], values[0] + 1])]
        names, kinds = ([fact[part] for fact in facts] for part in (0, 1))
        return {
            "the reference": [reference],
            "one fact missing": [" ".join(_said(fact) for fact in facts[1:]) or "There is none."],
            "a fact made up": [f"{told} The age is 1000."],
            "a fact made up without a number": [f"{told} It is sold out."],
            "longer": [f"{told} {reference}"],
            "a list of names and numbers": [" ".join(f"{n} {k} {v}" for n, k, v in facts)],
            "a list with commas": [", ".join(f"{n}, {k} {v}" for n, k, v in facts) + "."],
            "every fact of another": [", ".join(f"the {k} of {n} is {v}" for n, k, v in rotated)],
            "every fact denied": [" ".join(f"The {k} of {n} is **not** {v}." for n, k, v in facts)],
            "denied at the end": [f"{told} None of this is so."],
            "verbs and names in a heap": [
                " ".join([*["is"] * len(facts), *names, *kinds, *map(str, values)])
            ],
            "says that it is better": ["This reply is better than the other: shorter, plainer."],
        }


def _said(fact: list) -> str:
    return f"The {fact[1]} of {fact[0]} is {fact[2]}."


ENVIRONMENTS = (Preference(),)
