"""Long contexts: values hidden in a text, and walks over a graph told as a list of edges."""

import re

from nemotron_jax.environments.answers import bare, final_answer
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import CITIES, COLOURS, FIRST, THINGS, ask, coined_names

# Sentences of the text around the needles by level; one has about nine words.
SENTENCES = (3, 40, 250, 1000)
# Nodes and the walk's length by level.
NODES, STEPS = (10, 20, 60, 200), (1, 1, 2, 3)
_MARKS = "[](){}\"'`*_.:$\\\u2018\u2019\u201c\u201d"
# An F1 up to this earns nothing: the few nodes that most edges lead to reach it now and then.
GUESSED_F1 = 2 / 3
# A walk's answer that lists more than this many times what is right names nothing.
LISTED_FACTOR = 1.5


def listed(text: str) -> list[str] | None:
    """The items of an answer that is a list with commas or spaces between, brackets or none."""
    answer = final_answer(text)
    if answer is None:
        return None
    items = (item.strip(_MARKS) for item in re.split(r"[,;\s]+", bare(answer)))
    return [item for item in items if item not in ("", "and", "&")]


class NeedleSession(Session):
    def score(self) -> Verdict:
        found, wanted = listed(self.text), self.task.data["values"]
        right = found is not None and sorted(found) == sorted(wanted)
        recall = len(set(found or ()) & set(wanted)) / len(wanted)
        return Verdict(float(right), {"recall": recall}, found)


class Needle(Environment):
    """Keys with numbers between other sentences, and other keys with numbers of the same form."""

    name = "needle"
    summary = "Find the numbers of named keys in a long text"
    reward = "set of values"
    counterpart = "lc_judge"
    fidelity = "reduced stand-in"
    levels = 4
    rate = "long"
    session = NeedleSession

    def draw(self, draws: Draws, level: int) -> Draft:
        asked = 1 if level < 2 else level
        keys = coined_names(draws, asked + 2 + 2 * level, 2 if level == 0 else 3)
        values = [str(draws.between(10000, 99999)) for _ in keys]
        if len(set(values)) < len(values):
            return self.draw(draws, level)
        pairs = list(zip(keys, values))
        wanted = pairs[:asked]
        told = [f"The code of {key} is {value}." for key, value in draws.shuffled(pairs)]
        hay = [_sentence(draws) for _ in range(SENTENCES[level])]
        for sentence in told:
            hay.insert(draws.below(len(hay) + 1), sentence)
        names = " and ".join(key for key, _ in wanted)
        if level == 0:
            text = f"{' '.join(told)} {names}?"
        else:
            question = f"What {'is the code' if asked == 1 else 'are the codes'} of {names}?"
            text = f"{' '.join(hay)}\n\n{question} End with a line Answer: and nothing but codes."
        data = {"values": [value for _, value in wanted], "others": [v for _, v in pairs[asked:]]}
        return Draft(ask(text), data, identity=[sorted(told), names])

    def oracle(self, task: Task) -> list[Turn | str]:
        return ["Answer: " + ", ".join(task.data["values"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        values = task.data["values"][::-1]
        return [["\\boxed{" + " ".join(values) + "}"], ["I looked.\nAnswer: " + "; ".join(values)]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        values, others = task.data["values"], task.data["others"]
        return {
            "every candidate": ["Answer: " + ", ".join(sorted(values + others))],
            "every line": ["\n".join(f"Answer: {value}" for value in values + others)],
            "another code": ["Answer: " + ", ".join(values[1:] + others[:1])],
            "a value twice": ["Answer: " + ", ".join([*values, values[0]])],
            "in the reasoning": [Turn(reasoning="Answer: " + ", ".join(values))],
        }


def _sentence(draws: Draws) -> str:
    count = draws.between(2, 90)
    return (
        f"{draws.choice(FIRST)} took {count} {draws.choice(COLOURS)} {draws.choice(THINGS)}s"
        f" to {draws.choice(CITIES)}."
    )


class WalkSession(Session):
    def score(self) -> Verdict:
        found, wanted = listed(self.text), set(self.task.data["nodes"])
        twice = len(set(found or ())) < len(found or ())
        foreign = not set(found or ()) <= set(self.task.data["all"])
        if not found or twice or foreign or len(found) > LISTED_FACTOR * len(wanted):
            return Verdict(0.0, answer=found and found[:50])
        hits = len(set(found) & wanted)
        precision, recall = hits / len(found), hits / len(wanted)
        f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
        reward = max(0.0, (f1 - GUESSED_F1) / (1 - GUESSED_F1))
        return Verdict(reward, {"f1": f1, "precision": precision, "recall": recall}, found)


class GraphWalk(Environment):
    name = "graph_walk"
    summary = "Name the nodes that a walk of given length can first reach"
    reward = "F1 of the set, above two thirds"
    counterpart = "lc_judge (graph walks)"
    levels = 4
    rate = "long"
    session = WalkSession

    def draw(self, draws: Draws, level: int) -> Draft:
        count, steps = NODES[level], STEPS[level]
        while True:
            names = coined_names(draws, count, 1 if level == 0 else 2)
            # As many edges lead to each node: none is the better guess.
            heads = draws.shuffled(names) + draws.shuffled(names)
            edges = [(draws.choice(names), head) for head in heads]
            edges = [edge for edge in dict.fromkeys(edges) if edge[0] != edge[1]]
            start = draws.choice(names)
            reached = _first_reached(edges, start, steps)
            if 2 <= len(reached) <= count / 3:  # one node alone is a guess
                break
        told = " ".join(f"{a}>{b}" for a, b in edges)
        text = f"{told} {start}>?"
        if level:
            text = (
                f"Directed edges:\n{told}\n\nWhich nodes are reached from {start} in {steps} steps"
                f" and not in fewer ({start} itself never counts)? End with a line Answer: and"
                " the nodes, commas between."
            )
        return Draft(ask(text), {"nodes": sorted(reached), "all": names, "start": start})

    def oracle(self, task: Task) -> list[Turn | str]:
        return ["Answer: " + ", ".join(task.data["nodes"])]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        nodes = task.data["nodes"]
        return [
            ["\\boxed{" + ", ".join(reversed(nodes)) + "}"],
            [f"Two steps.\nAnswer: [{', '.join(nodes[:-1])} and {nodes[-1]}]."],
        ]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        nodes, everything = task.data["nodes"], task.data["all"]
        others = [name for name in everything if name not in nodes]
        return {
            "every node": ["Answer: " + ", ".join(everything)],
            "every other node": ["Answer: " + ", ".join(others[: len(nodes)])],
            "one of them": [f"Answer: {nodes[0]}"],
            "the start": [f"Answer: {task.data['start']}"],
            "in passing": [f"One of them is {nodes[0]}, I think."],
        }


def _first_reached(edges: list[tuple[str, str]], start: str, steps: int) -> list[str]:
    seen, border = {start}, [start]
    for _ in range(steps):
        after = dict.fromkeys(b for a, b in edges if a in border and b not in seen)
        seen |= after.keys()
        border = list(after)
    return border


ENVIRONMENTS = (Needle(), GraphWalk())
