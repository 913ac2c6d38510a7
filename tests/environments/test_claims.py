"""A reply is paid for what it says of each thing, in whatever plain sentence it says so."""

import pytest

from nemotron_jax.environments import play, registry
from nemotron_jax.environments.claims import Reader

KNOWN = {"please", "note", "that", "all", "of", "this", "is", "said", "with", "care"}
RIGHT = {("bado", "price", "5")}


def claims(text: str) -> set | None:
    return Reader({"bado", "kimo"}, {"drum"}, KNOWN).claims(text)


@pytest.mark.parametrize(
    "text",
    [
        "The price of Bado is 5.", "Bado costs 5.", "Bado’s price is 5!", "The drum Bado costs 5",
        "Bado has a price of 5.", "Bado is priced at 5.", "5 is the price of Bado.",
        "Bado sells for 5.", "For Bado, the price is 5.", "Bado: it's priced at 5.",
        "Hello! The price of Bado is 5. Let me know if you need more.", "The cost of Bado is 5.",
        "Bado comes at a price of 5.", "The price of Bado's 5.", "The price of **Bado** is 5.",
        "- Bado costs 5.", "Here are the facts: Bado currently costs exactly 5.",
    ],
)  # fmt: skip
def test_a_fact_may_be_said_in_many_ways(text: str) -> None:
    assert claims(text) == RIGHT


def test_clauses_share_a_name_a_kind_and_a_verb() -> None:
    for text, count in {
        "Bado costs 5, weighs 7 and is 9 long; Kimo costs 6.": 4,
        "Bado has a price of 5, a weight of 7, and 12 in stock.": 3,
        "The price of Bado is 5 and its weight is 7. Kimo's price is 6.": 3,
        "The price of Bado is 5, that of Kimo is 6.": 2,
        "There are 12 units of Bado in stock. It weighs 4, and its length is 3.": 3,
    }.items():
        found = claims(text)
        assert found is not None and len(found) == count, text


@pytest.mark.parametrize(
    "text",
    [
        "The price of Bado is not 5.", "The price of Bado isn’t 5.", "The price of Bado was 5.",
        "The price of Bado is never 5.", "The price of Bado is above 5.", "Bado price 5",
        "The price of Bado is 5 euros.", "The price of Bado is 5 or 7.", "Bado, price 5",
        "It is false that the price of Bado is 5.", "The price of Bado is -5.", "Bado is 5.",
        "The price of Bado is 5?",
        "The price of Bado is 5.5.", "The price of Bado is 5%.", "is is Bado price 5",
        "The price of Bado is 5. That is a lie.", "The price of Bado is 5. Not so.",
        "The price of Bado is \uff15.", "The price of Bado is 5²", "The price of Bado is 5 times 2",
        "Price the of Bado is 5 the", "The price of Bado is 5 if you pay at once.",
        "The price of Bado and Kimo is 5.", "The price of Kimo is 5.", "Bado costs 5, it is red.",
    ],
)  # fmt: skip
def test_what_is_denied_doubted_or_made_up_is_no_claim(text: str) -> None:
    assert claims(text) != RIGHT


def test_facts_exchanged_among_things_earn_nothing() -> None:
    environment = registry["preference"]
    for index in range(20):
        task = environment.split(0, "train", index, level=1 + index % 2)
        facts = task.data["facts"]
        values = [value for _, _, value in facts]
        told = ["{1} of {0} is {2}", "{0} has a {1} of {2}", "{0}'s {1} is {2}"][index % 3]
        for shift in range(len(facts)):
            moved = zip(facts, values[shift:] + values[:shift])
            text = ", ".join(told.format(name, kind, value) for (name, kind, _), value in moved)
            right = values[shift:] + values[:shift] == values
            assert play(environment, task, [text + "."]).reward == float(right)
