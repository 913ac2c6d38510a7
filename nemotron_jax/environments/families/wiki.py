"""A generated wiki with a search tool; questions take one page or up to five."""

import functools
import math
import re

from nemotron_jax.environments.answers import bare, final_answer, plain
from nemotron_jax.environments.base import Draft, Environment, Session, Task, ToolError, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.schema import tool
from nemotron_jax.environments.turns import Turn, calling
from nemotron_jax.environments.words import THINGS, ask, coined_names

_QUERY = {"type": "string", "maxLength": 200}
TOOLS = (
    tool("search", "Titles of the pages that fit words best.", {"query": _QUERY}),
    tool("read", "The text of a page.", {"title": _QUERY}),
)
# Companies, people and cities in one wiki, and what a search shows.
_OF_A_KIND, _SHOWN = 8, 5
# The usual constants of BM25: how soon repetition stops counting, how much length does.
_SATURATION, _LENGTH = 1.2, 0.75
_WORD = re.compile(r"[a-z]+")


@functools.lru_cache(maxsize=64)
def facts(seed: int) -> dict[str, dict[str, str]]:
    """What each page's subject is related to, by the name of the relation."""
    draws = Draws("wiki", seed)
    names = coined_names(draws, 5 * _OF_A_KIND, 3)
    companies, people, cities, rivers, mayors = (
        names[kind * _OF_A_KIND : (kind + 1) * _OF_A_KIND] for kind in range(5)
    )
    known: dict[str, dict[str, str]] = {}
    for place, company in enumerate(companies):
        known[company] = {"founder": people[place], "seat": draws.choice(cities)}
        known[company]["product"] = draws.choice(THINGS)
    for place, person in enumerate(people):
        known[person] = {
            "birthplace": cities[(place + 3) % _OF_A_KIND],
            "home": draws.choice(cities),
        }
    for city, river, mayor in zip(cities, rivers, mayors):
        known[city] = {"river": river, "mayor": mayor}
    return known


def page(title: str, known: dict[str, str]) -> str:
    """The text of a page from what is known of it: a company, a person or a city."""
    if "founder" in known:
        return (f"{title} is a company that makes the {known['product']}. It was founded by"
                f" {known['founder']} and has its seat in {known['seat']}.")  # fmt: skip
    if "birthplace" in known:
        return f"{title} was born in {known['birthplace']} and lives in {known['home']}."
    return f"{title} is a city on the river {known['river']}. Its mayor is {known['mayor']}."


@functools.lru_cache(maxsize=64)
def _index(seed: int) -> dict[str, list[str]]:
    return {
        title: _WORD.findall(page(title, known).casefold()) for title, known in facts(seed).items()
    }


def search(seed: int, query: str) -> list[str]:
    """Titles by BM25, best first; none that share no word with the query."""
    index = _index(seed)
    mean = sum(map(len, index.values())) / len(index)
    scores = dict.fromkeys(index, 0.0)
    for word in dict.fromkeys(_WORD.findall(query.casefold())[:20]):
        holding = [title for title, words in index.items() if word in words]
        rarity = math.log(1 + (len(index) - len(holding) + 0.5) / (len(holding) + 0.5))
        for title in holding:
            count, length = index[title].count(word), len(index[title]) / mean
            norm = count + _SATURATION * (1 - _LENGTH + _LENGTH * length)
            scores[title] += rarity * count * (_SATURATION + 1) / norm
    found = sorted((title for title in scores if scores[title]), key=lambda t: (-scores[t], t))
    return found[:_SHOWN]


class WikiSession(Session):
    def tool_search(self, query: str) -> str:
        """Titles of pages that a query finds, one a line."""
        seed = self.task.data["wiki"]
        found = search(seed, query)
        return "\n".join(found) if found else "nothing found"

    def tool_read(self, title: str) -> str:
        """The page of a title; raises ToolError where there is none."""
        known = facts(self.task.data["wiki"])
        if title not in known:
            raise ToolError(f"no page is called {title[:60]!r}; search for it")
        return page(title, known[title])

    def score(self) -> Verdict:
        answer = final_answer(self.text)
        right = answer is not None and plain(bare(answer)) == plain(self.task.data["answer"])
        return Verdict(float(right), {"calls": float(len(self.calls))}, answer)


class WikiSearch(Environment):
    name = "wiki_search"
    summary = "Search and read a small wiki to answer a question that takes up to five pages"
    reward = "exact answer"
    counterpart = "search agents (search_pivot, played to the end)"
    levels = 4
    max_turns = 16
    session = WikiSession

    def draw(self, draws: Draws, level: int) -> Draft:
        seed = draws.below(10**9)
        known = facts(seed)
        company = draws.choice([title for title in known if "founder" in known[title]])
        if level == 0:
            path, answer, text = [company], known[company]["founder"], f"Founder of {company}?"
        else:
            path, text = [company], f"the founder of {company}"
            path.append(known[company]["founder"])
            place = known[path[-1]]["birthplace"]
            answer, text = place, f"the birthplace of {text}"
            if level >= 2:
                path.append(place)
                relation = draws.choice(["river", "mayor"])
                answer, text = known[place][relation], f"the {relation} of {text}"
            if level == 3:
                path, answer, text = _longest(draws, known, company)
            text = f"Name {text}. End with a line Answer: and the name."
        data = {"wiki": seed, "path": path, "answer": answer}
        return Draft(ask(text), data, TOOLS)

    def oracle(self, task: Task) -> list[Turn | str]:
        turns: list[Turn | str] = []
        for title in task.data["path"]:
            turns += [calling("search", query=title), calling("read", title=title)]
        answer = task.data["answer"]
        return [*turns, answer if task.level == 0 else f"Answer: {answer}"]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        reads = tuple(calling("read", title=title).calls[0] for title in task.data["path"])
        return [[Turn(calls=reads), f"I read it.\n**Answer: {task.data['answer']}.**"]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        answer, titles = task.data["answer"], list(facts(task.data["wiki"]))
        return {
            "every page": ["\n".join(f"Answer: {title}" for title in [*titles, answer])],
            "all names": ["Answer: " + ", ".join([*titles, answer])],
            "the question's name": [f"Answer: {task.data['path'][0]}"],
            "answer in a remark": [Turn(f"Answer: {answer}", calling("search", query="a").calls)],
            "in passing": [f"It may be {answer}, or not."],
        }


def _longest(
    draws: Draws, known: dict[str, dict[str, str]], company: str
) -> tuple[list[str], str, str]:
    """Two chains of five pages in all: path, answer, and the words for what is asked."""
    founder = known[company]["founder"]
    birthplace = known[founder]["birthplace"]
    other = draws.choice([title for title in known if "founder" in known[title]])
    seat = known[other]["seat"]
    relation = draws.choice(["river", "mayor"])
    path = [company, founder, birthplace, other, seat]
    answer = f"{known[birthplace][relation]} and {known[seat][relation]}"
    text = (
        f"the {relation} of the birthplace of the founder of {company} and the {relation} of the"
        f" seat of {other}, in this order with “and” between"
    )
    return path, answer, text


ENVIRONMENTS = (WikiSearch(),)
