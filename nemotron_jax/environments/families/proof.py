"""Equational proofs: each line follows from the one before by one use of one axiom."""

import functools
import re

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import ask

# A term is a letter or (left, right), written a*b with brackets around what is inside.
Term = str | tuple
MAX_LINE, MAX_LINES = 300, 40
AXIOMS = {
    "swap": "x*y = y*x",
    "regroup": "(x*y)*z = x*(y*z)",
    "unit": "x*e = x",
    "middle": "(x*y)*(z*w) = (x*z)*(y*w)",
}
_TOKEN = re.compile(r"\s*([a-z()*])", re.ASCII)
_VARIABLES = "xyzw"


def parse(text: str) -> Term:
    """The term that a text states; ValueError where it states none."""
    if len(text) > MAX_LINE:
        raise ValueError(f"a term of {len(text)} characters; at most {MAX_LINE} are read")
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ValueError(f"{text[place]!r} is not part of a term")
        tokens.append(match[1])
        place = match.end()
    term, rest = _product(tokens, 0)
    if rest != len(tokens):
        raise ValueError("more follows after the term")
    return term


def _product(tokens: list[str], place: int) -> tuple[Term, int]:
    """One factor, or two: a*b*c without brackets is ambiguous and refused."""
    left, place = _factor(tokens, place)
    if place < len(tokens) and tokens[place] == "*":
        right, place = _factor(tokens, place + 1)
        return (left, right), place
    return left, place


def _factor(tokens: list[str], place: int) -> tuple[Term, int]:
    if place < len(tokens) and tokens[place].isalpha():
        return tokens[place], place + 1
    if place < len(tokens) and tokens[place] == "(":
        term, place = _product(tokens, place + 1)
        if place < len(tokens) and tokens[place] == ")":
            return term, place + 1
    raise ValueError("a letter or a bracketed term is missing")


def written(term: Term, inner: bool = False) -> str:
    """A term as text; products inside another stand in parentheses."""
    if isinstance(term, str):
        return term
    text = f"{written(term[0], True)}*{written(term[1], True)}"
    return f"({text})" if inner else text


def match(pattern: Term, term: Term, bound: dict[str, Term]) -> bool:
    """Whether a term has a pattern's form; what its variables stand for is put into `bound`."""
    if isinstance(pattern, str):
        if pattern in _VARIABLES:
            return bound.setdefault(pattern, term) == term
        return pattern == term
    if isinstance(term, str):
        return False
    return match(pattern[0], term[0], bound) and match(pattern[1], term[1], bound)


@functools.cache
def _sides(name: str) -> tuple[Term, Term]:
    left, _, right = AXIOMS[name].partition("=")
    return parse(left), parse(right)


def follows(one: Term, other: Term, axioms: list[str]) -> bool:
    """Whether one use of one axiom, either way, at one place leads from one term to the other."""
    for name in axioms:
        left, right = _sides(name)
        for a, b in ((left, right), (right, left)):
            bound: dict[str, Term] = {}
            if match(a, one, bound) and match(b, other, bound):
                return True
    if isinstance(one, str) or isinstance(other, str):
        return False
    if one[0] == other[0]:
        return one[1] != other[1] and follows(one[1], other[1], axioms)
    return one[1] == other[1] and follows(one[0], other[0], axioms)


class ProofSession(Session):
    def score(self) -> Verdict:
        data = self.task.data
        lines = [line for line in self.text.splitlines() if line.strip()]
        if len(lines) > MAX_LINES:
            return Verdict(0.0, {"read": 0.0})
        try:
            terms = [parse(line.strip().removeprefix("=")) for line in lines]
        except ValueError as error:
            return Verdict(0.0, {"read": 0.0}, str(error))
        ends = len(terms) > 1 and terms[0] == parse(data["start"])
        ends = ends and terms[-1] == parse(data["goal"])
        steps = [follows(a, b, data["axioms"]) for a, b in zip(terms, terms[1:])]
        parts = {"read": 1.0, "ends": float(ends), "steps": sum(steps) / max(1, len(steps))}
        return Verdict(float(ends and all(steps)), parts)


class EquationalProof(Environment):
    name = "equational_proof"
    summary = "Prove that two terms are equal, one axiom a line"
    reward = "proof checked"
    counterpart = "math_formal_lean"
    fidelity = "reduced stand-in"
    levels = 4
    session = ProofSession

    def draw(self, draws: Draws, level: int) -> Draft:
        axioms = ["swap"] if level == 0 else list(AXIOMS)[: level + 1]
        while True:
            letters = draws.sample("abcdfghijklmnopqrstuv", 3 + level)
            path = [_random_term(draws, letters)]
            for _ in range((1, 2, 4, 6)[level]):
                path.append(_rewritten(draws, path[-1], axioms))
            # The way must be needed: no loop, and no shorter way of one step.
            if len(set(path)) == len(path) and (
                len(path) == 2 or not follows(path[0], path[-1], axioms)
            ):
                break
        lines = [written(term) for term in path]
        told = "; ".join(AXIOMS[name] for name in axioms)
        text = f"{told}. Prove {lines[0]} = {lines[-1]}."
        if level:
            text += (
                " Write one term a line, the first side first, the second last; each line follows"
                " from the one before by one axiom at one place. Write nothing else."
            )
        data = {"axioms": axioms, "start": lines[0], "goal": lines[-1], "path": lines}
        return Draft(ask(text), data, identity=[axioms, lines[0], lines[-1]])

    def oracle(self, task: Task) -> list[Turn | str]:
        return ["\n".join(task.data["path"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        path = task.data["path"]
        left, right = parse(path[0])
        detour = [path[0], written((right, left)), *path]
        return [["\n".join(detour)], ["\n= ".join(path)]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        path, data = task.data["path"], task.data
        cheats: dict[str, list[Turn | str]] = {
            "the goal alone": [path[-1]],
            "the start alone": [path[0]],
            "the claim": [f"{path[0]} = {path[-1]}"],
            "backwards": ["\n".join(reversed(path))],
            "claimed": ["\n".join([*path[:1], "by swap", *path[1:]])],
            "axioms listed": ["\n".join(AXIOMS[name] for name in data["axioms"])],
            "in the reasoning": [Turn(reasoning="\n".join(path))],
        }
        if len(path) > 2:
            cheats["straight to the goal"] = [f"{path[0]}\n{path[-1]}"]
            cheats["the last step missing"] = ["\n".join(path[:-1])]
        return cheats


def _random_term(draws: Draws, letters: list[str]) -> Term:
    if len(letters) == 1:
        return letters[0]
    cut = draws.between(1, len(letters) - 1)
    return _random_term(draws, letters[:cut]), _random_term(draws, letters[cut:])


def _rewritten(draws: Draws, term: Term, axioms: list[str]) -> Term:
    """A term that follows from this one, by a random axiom at a random place."""
    return draws.choice(list(dict.fromkeys(_neighbours(term, axioms))))


def _neighbours(term: Term, axioms: list[str]) -> list[Term]:
    found = []
    for name in axioms:
        left, right = _sides(name)
        for a, b in ((left, right), (right, left)):
            bound: dict[str, Term] = {}
            if match(a, term, bound):
                found.append(_filled(b, bound))
    if not isinstance(term, str):
        found += [(inner, term[1]) for inner in _neighbours(term[0], axioms)]
        found += [(term[0], inner) for inner in _neighbours(term[1], axioms)]
    return found


def _filled(pattern: Term, bound: dict[str, Term]) -> Term:
    if isinstance(pattern, str):
        return bound.get(pattern, pattern)
    return _filled(pattern[0], bound), _filled(pattern[1], bound)


ENVIRONMENTS = (EquationalProof(),)
