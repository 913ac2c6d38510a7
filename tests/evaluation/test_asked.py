"""The text of --suites means one thing, and everything else is refused with its place."""

import dataclasses

import pytest

from nemotron_jax.evaluation.asked import Asked, parse
from nemotron_jax.evaluation.suites import SUITES, planned, suite_of


def test_items_options_literals_words_and_brackets() -> None:
    text = "perplexity,ruler:lengths=(4096,8192):kinds=(niah_single_1,vt):samples=20,tools:k=1"
    assert parse(text) == [
        Asked("perplexity"),
        Asked("ruler", {"lengths": (4096, 8192), "kinds": ("niah_single_1", "vt"), "samples": 20}),
        Asked("tools", {"k": 1}),
    ]
    assert parse(" a : x = 0.5 : y = None : z = 'b,c:d' ") == [
        Asked("a", {"x": 0.5, "y": None, "z": "b,c:d"})
    ]
    assert parse("a:x=(one,):y=[2,two words,(3,four)]:z=/some/path-1.5")[0].options == {
        "x": ("one",),
        "y": (2, "two words", (3, "four")),
        "z": "/some/path-1.5",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names none"),
        (" , ", "names none"),
        ("a,", "'' is not the name"),
        ("A", "'A' is not the name"),
        ("a:x", "'x' of a is not KEY=VALUE"),
        ("a:=1", "is not KEY=VALUE"),
        ("a:x=", "neither a literal nor a word"),
        ("a:x=1:x=2", "a has x twice"),
        ("a:x=(1", r"'\)' is missing"),
        ("a:x=1)", r"'\)' closes nothing"),
        ("a:x=(1]", "closes nothing"),
        ("a:x='b", "is missing"),
        ("a:x=__import__('os').system('id')", "neither a literal nor a word"),
        ("a:x=" + "(" * 5000 + ")" * 5000, "nested too deep"),
        ("a:x=" + "9" * 30_000, "characters; at most"),
    ],
)
def test_what_means_nothing_is_one_sentence(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_every_suite_has_options_of_literals_and_says_what_it_measures() -> None:
    for name in SUITES:
        suite = suite_of(name)
        assert suite.name == name and suite.about and suite.needs in ("model", "url", "either")
        assert dataclasses.is_dataclass(suite.options)
        parsed = suite.options()  # all have defaults
        for field in dataclasses.fields(parsed):
            value = getattr(parsed, field.name)
            assert isinstance(value, int | float | str | bool | tuple | None), (name, field.name)
        assert (suite.summarise is None) == (suite.score is None)


def test_all_stands_for_the_suites_that_are_not_named_beside_it() -> None:
    plans = planned("perplexity:rows=3,all")
    assert [plan.suite.name for plan in plans] == list(SUITES)
    assert plans[0].options.rows == 3 and plans[0].named
    assert not any(plan.named for plan in plans[1:])
    with pytest.raises(ValueError, match="has no option 'row'; it has rows"):
        planned("perplexity:row=3")
    with pytest.raises(ValueError, match="perplexity.*rows=0"):
        planned("perplexity:rows=0")
    with pytest.raises(ValueError, match="all has no options; name the suite"):
        planned("all:rows=3")


def test_a_single_value_stands_for_one_of_itself() -> None:
    text = (
        "ruler:kinds=vt:lengths=512,acceptance:k=3,environments:names=sql:levels=1,speed:drafts=2"
    )
    ruler, acceptance, environments, speed = (plan.options for plan in planned(text))
    assert (ruler.kinds, ruler.lengths, acceptance.k) == (("vt",), (512,), (3,))
    assert (environments.names, environments.levels, speed.drafts) == (("sql",), (1,), (2,))


@pytest.mark.parametrize(
    "text",
    [
        "ruler:kinds=5",
        "ruler:kinds=[[vt]]",
        "ruler:lengths=(512,512)",
        "ruler:lengths={1:2}",
        "lm_eval:tasks=5",
        "environments:levels=()",
        "environments:levels=1.5",
        "environments:names=(sql,sql)",
        "quantization:formats=5",
        "quantization:formats=.",  # a directory without a model
        "acceptance:k=(1,1)",
        "tools:kinds=5",
        "speed:drafts=(1,1)",
        "serving:streams=1.5",
    ],
)
def test_a_value_of_another_kind_is_one_sentence(text: str) -> None:
    suite, option = text.partition("=")[0].split(":")
    with pytest.raises(ValueError, match=rf"suite '{suite}': \w+\.{option}=.*must be"):
        planned(text)
