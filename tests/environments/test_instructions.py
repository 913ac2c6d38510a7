"""Rules about words: marks beside a word change nothing, and no list of letters is a text."""

import pytest

from nemotron_jax.environments import play, registry
from nemotron_jax.environments.families.instructions import checks
from nemotron_jax.environments.reading import echoes, is_prose, lines_of, sentences_of, words_of

RULES = {"words": 5, "topic": "cedar", "first": "amber", "last": "basil"}


@pytest.mark.parametrize(
    "text",
    [
        "Amber, cedar with some basil.",
        "Amber: cedar with some basil?!",
        "“Amber” cedar with some ‘basil’…",
        "**Amber** cedar with _some_ *basil*!",
        "Amber cedar – with some basil",
        "Amber—cedar with some basil)",
        "- amber cedar -- with some basil.",
        "1. Amber cedar,\r\n \t\r\nwith some basil.",
        "Amber... cedar with some basil 🙂",
        "\u200bAmber\u00a0cedar with some basil;",
    ],
)
def test_marks_beside_words_change_no_rule(text: str) -> None:
    assert all(checks(text, RULES).values()), checks(text, RULES)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("An amber cedar with basil.", "first"),
        ("Amber's cedar with some basil", "first"),
        ("Amber-like cedar with some basil", "first"),
        ("Amber cedar with basil leaves", "last"),
        ("Amber cedar with some dried basil", "words"),
        ("Amber pine with some basil", "topic"),
        ("Amber cedar cedar cedar basil", "language"),
    ],
)
def test_another_word_is_not_taken_for_the_one_asked(text: str, broken: str) -> None:
    assert not checks(text, RULES)[broken]


def test_words_are_counted_as_people_count_them() -> None:
    for text, count in {
        "a well-known don’t": 3, "3.5 and 1,200 e.g. U.S.": 5, "— ! ** ”": 0, "one,two;three": 3,
        "yes/no": 1, "so…then": 2, "2. two\n* three\n+ four\n• five": 4, "don't stop": 2,
        "": 0, "\x00": 0, "\ud800": 0,
    }.items():  # fmt: skip
        assert len(words_of(text)) == count, text
    assert lines_of("one\r\n  \n---\n\ttwo \n") == ["one", "two"]
    assert sentences_of("One. Two: three\nfour?!") == [["one"], ["two"], ["three"], ["four"]]


def test_case_and_letters_are_those_that_are_written() -> None:
    rules = {"words": 3, "case": "capitals", "without": "c"}
    assert checks("THE 2 DRUMS", rules)["case"] and not checks("THE 2 DRUMs", rules)["case"]
    assert checks("the 2 drums", rules | {"case": "small letters"})["case"]
    for hidden in ("c", "C", "ç", "\uff23"):
        assert not checks(f"the drum {hidden}", rules)["without"]


PROSE = (
    "Kettle whispers, steam rises gently, morning light spills over quiet kitchen tiles.",
    "The old violin sang softly in the hall, and every child who heard it began to dance.",
    "I bought a lantern at the market yesterday because our garden is dark after sunset.",
    "ORANGE LEAVES FALL WHILE THE WIND SINGS. WE WALK HOME, GLAD AND WARM.",
    "Apple pie isn't hard to bake: peel the fruit, roll the dough, then wait until it's golden.",
    "My grandmother's quilt has seen four winters; nobody could ever sew a warmer one, she'd say.",
    "Under tall pines a small wagon waits. Its wheels are broken, but its paint is still bright.",
    "Why does the drum matter? It calls us together, it keeps the rhythm, and it never lies.",
)  # fmt: skip
NO_PROSE = (
    "aaaalle aaaanre kettle ooootsu aaaalse drum aaaatre ooooseu bright",
    "kettle lorem ipsum dolor amet consectetur adipiscing elit sed eiusmod drum",
    "kettle kettle kettle drum drum drum bright bright",
    "the of the a kettle to a the of an and the of drum",
    "apple basket candle drum engine feather guitar hammer island jacket kettle ladder mirror",
    "zzq zzq zzq zzq zzq",
    "of and to in is it that was for on are as with his they at be this",
)


def test_sentences_are_told_from_letters_and_lists() -> None:
    assert [text for text in PROSE if not is_prose(words_of(text))] == []
    assert [text for text in NO_PROSE if is_prose(words_of(text))] == []


def test_an_echo_is_one_whatever_its_marks() -> None:
    said = ["How do I open a jar? I need it today."]
    for text in ("HOW DO I OPEN  A JAR", "You say: how do I (open a jar)!", "I need it today..."):
        assert echoes(text, said)
    assert not echoes("You open a jar by its lid.", said)


def test_no_number_is_wrong_enough_for_every_copy() -> None:
    environment = registry["inverse_instructions"]
    tasks = [environment.split(0, "train", index, level=0) for index in range(30)]
    for constant in ("0", "1", "42", "12345", "99999", "1" * 9, "-1", ""):
        assert sum(play(environment, task, [constant]).reward for task in tasks) <= 1
    for task in tasks:
        told = task.data["number"]
        wrong = str((int(told[0]) + 1) % 10) + told[1:]
        assert play(environment, task, [f"**{wrong}**."]).reward == 1
        assert play(environment, task, [told]).reward == 0


def test_a_misspelling_is_another_letter_and_a_reply_may_stand_in_marks() -> None:
    environment = registry["inverse_instructions"]
    drawn = [environment.split(0, "train", index, level=1) for index in range(40)]
    misspelt = next(task for task in drawn if task.data["kind"] == "misspelt")
    words, count = misspelt.data["sentence"].split(), misspelt.data["count"]
    for change, reward in (
        (lambda w: w + "z", 1),
        (str.capitalize, 0),
        (lambda w: w + "\u0430", 0),
    ):
        told = " ".join([*map(change, words[:count]), *words[count:]])
        for text in (told, told[0].upper() + told[1:], f"{told}.", f"**{told}**"):
            assert play(environment, misspelt, [text]).reward == reward, text
    exact = next(task for task in drawn if task.data["kind"] == "exactly")
    for mark in ("**", "`", "```\n", "_"):
        assert play(environment, exact, [f"{mark}{exact.data['text']}{mark[::-1]}"]).reward == 1
