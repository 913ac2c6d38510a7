"""Verifiers against something independent: models of the axioms, brute force, arithmetic."""

import itertools

import pytest

from nemotron_jax.environments import Draws, Turn, calling, play, registry
from nemotron_jax.environments.families.calendar import fits
from nemotron_jax.environments.families.proof import AXIOMS, follows, parse, written
from nemotron_jax.environments.families.wiki import facts, search
from nemotron_jax.environments.office import TOOLS, Office

TASKS = range(30)


def value(term: object, at: dict[str, int]) -> int:
    """A term's value where * is addition and e is 0: a model of every axiom."""
    return at[term] if isinstance(term, str) else value(term[0], at) + value(term[1], at)


def test_a_step_that_is_accepted_holds_in_a_model_of_the_axioms() -> None:
    draws = Draws("model")
    at = {letter: draws.below(10**6) for letter in "abcdfg"} | {"e": 0}
    accepted = 0
    terms = ["a", "e", ("a", "b"), ("b", "a"), ("a", "e"), (("a", "b"), "c"), ("a", ("b", "c")),
             (("a", "b"), ("c", "d")), (("a", "c"), ("b", "d")), (("a", "b"), ("d", "c")),
             (("a", "e"), "b"), ("b", ("a", "e")), ("b", "b"), (("c", "b"), "a")]  # fmt: skip
    for one, other in itertools.product(terms, repeat=2):
        if follows(one, other, list(AXIOMS)):
            accepted += 1
            assert value(one, at) == value(other, at), (one, other)
    assert accepted >= 12
    assert not follows(("a", "b"), ("b", "a"), ["regroup"])
    assert not follows((("a", "b"), "c"), ("c", ("b", "a")), ["swap"])  # two uses, not one


def test_terms_are_read_back() -> None:
    for index in TASKS:
        for line in registry["equational_proof"].split(0, "train", index).data["path"]:
            assert written(parse(line)) == line
    for text in ("a*b*c", "a*", "(a", "a)", "", "A", "a+b", "(" * 290):
        with pytest.raises(ValueError):
            parse(text)


def test_arithmetic_answers_are_pythons_own() -> None:
    for index in TASKS:
        data = registry["arithmetic"].split(0, "train", index).data
        assert eval(data["expression"]) == int(data["answer"])


def test_equations_hold_at_their_answers() -> None:
    from fractions import Fraction

    for index in TASKS:
        task = registry["equations"].split(0, "train", index, level=1)
        left, right = task.messages[0]["content"].split(" End")[0][6:].rstrip(".").split(" = ")
        x = Fraction(task.data["answer"])
        sides = [eval(side.replace("x", "*x"), {"x": x}) for side in (left, right)]
        assert sides[0] == sides[1]


def test_a_calendar_fits_when_no_pair_overlaps_and_each_is_in_its_window() -> None:
    draws, right = Draws("calendar"), 0
    for _ in range(500):
        wanted, placed = [], {}
        for name in "ab":
            start, length = draws.between(0, 8), draws.between(1, 3)
            wanted.append({"event": name, "length": length, "from": 1, "to": 9})
            placed[name] = (start, start + length)
        apart = placed["a"][1] <= placed["b"][0] or placed["b"][1] <= placed["a"][0]
        inside = all(1 <= start and end <= 9 for start, end in placed.values())
        assert fits(placed, wanted) == (apart and inside)
        right += apart and inside
    assert 50 < right < 450


def test_a_graph_walks_answer_is_the_matrix_powers_own() -> None:
    environment = registry["graph_walk"]
    for index in range(10):
        task = environment.split(0, "train", index, level=2)
        told = task.messages[0]["content"].splitlines()[1].split()
        edges = [tuple(edge.split(">")) for edge in told]
        start = task.data["start"]
        walks = [{start}]
        for _ in range(2):
            walks.append({b for a, b in edges if a in walks[-1]})
        assert set(task.data["nodes"]) == walks[2] - walks[1] - {start}
        verdict = play(environment, task, [f"Answer: {task.data['nodes'][0]}"])
        found, wanted = 1, len(task.data["nodes"])
        f1 = 2 * found / (found + wanted)
        assert verdict.parts["f1"] == pytest.approx(f1)
        assert verdict.reward == pytest.approx(max(0, 3 * f1 - 2))


def test_search_finds_the_page_that_is_named() -> None:
    for title in facts(5):
        assert title in search(5, f"where is {title} from")
    assert search(5, "zzzz") == [] and len(search(5, "a city on the river")) == 5


def test_every_office_tool_has_its_method_and_arguments() -> None:
    state = registry["workplace"].split(0, "train", 0).data["state"]
    ids = {table: next(iter(rows)) for table, rows in state.items()}
    email = next(iter(state["people"].values()))["email"]
    other = "someone@example.com"  # owner of nothing yet, so that every change is one
    state["people"]["p99"] = {"name": "Someone Else", "team": "sales", "email": other}
    values = {"to": email, "owner": other, "who": email, "status": "new"}
    tables = {"email": "email", "event": "events", "task": "tasks", "customer": "customers"}
    for spec in (tool["function"] for tool in TOOLS):
        arguments = {key: values.get(key, "x") for key in spec["parameters"]["properties"]}
        if "id" in arguments:
            arguments["id"] = ids[tables[spec["name"].split("_")[1]]]
        office = Office(state)
        before = office.normal_form()
        assert isinstance(office.call(spec["name"], arguments), str)
        reads = spec["name"].split("_")[0] in ("find", "list", "search", "read")
        assert (office.normal_form() == before) == reads, spec["name"]


def test_the_order_of_new_records_does_not_matter_but_their_number_does() -> None:
    task = registry["workplace"].split(0, "train", 0)
    email = next(iter(task.data["state"]["people"].values()))["email"]

    def after(*bodies: str) -> str:
        office = Office(task.data["state"])
        for body in bodies:
            office.send_email(email, "s", body)
        return office.normal_form()

    assert after("a", "b") == after("b", "a") != after("a", "b", "b")


def test_a_conversation_goes_on_until_its_last_question() -> None:
    environment = registry["retention"]
    task = environment.split(0, "train", 0, level=3)
    with environment.start(task) as session:
        sign = task.data["sign"]
        said = [session.reply(f"Yes, {sign}") for _ in range(len(task.data["after"]) + 1)]
        assert [words[0]["content"] for words in said[:-1]] == task.data["after"]
        assert said[-1] == () and session.over and session.verify().reward == 0


def test_the_calculator_does_one_operation() -> None:
    environment = registry["arithmetic"]
    with environment.start(environment.split(0, "train", 0)) as session:
        results = {e: session.call("calc", {"e": e}) for e in
                   ("12*7", "2--3", "1/4", "1/0", "1+2+3", "9**9", "-4*-5", "1/2+1/3")}  # fmt: skip
    assert results == {
        "12*7": "84", "2--3": "5", "1/4": "1/4", "1/0": "error: division by zero",
        "-4*-5": "20", "1/2+1/3": "5/6",
        **dict.fromkeys(["1+2+3", "9**9"],
                        "error: give one operation on two numbers, such as 12*7"),
    }  # fmt: skip


def test_a_reward_needs_no_tool_but_a_tool_alone_earns_none() -> None:
    environment = registry["lookup"]
    task = environment.split(0, "train", 0, level=0)
    get = calling("get", k=task.data["chains"][0][0])
    assert play(environment, task, [get]).reward == 0
    assert play(environment, task, [get, Turn(str(task.data["answer"]))]).reward == 1
