"""Answers, numbers and quantities are read strictly: what is ambiguous is no answer."""

from fractions import Fraction

import pytest

from nemotron_jax.environments import Draws, Turn, equivalence, play, registry, second_opinion
from nemotron_jax.environments.answers import final_answer, number, plain
from nemotron_jax.environments.equivalence import same_answer
from nemotron_jax.environments.families.instructions import one_letter_apart
from nemotron_jax.environments.letters import letter_of
from nemotron_jax.environments.units import quantity


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("Answer: 42", "42"),
        ("It is so.\n**Answer: 42**", "42"),
        ("Final answer = x y", "x y"),
        ("so \\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{7} and again \\boxed{7}", "7"),
        ("\\boxed{7} or \\boxed{8}", None),
        ("\\boxed{7}, $\\boxed{8}$", None),
        ("First \\boxed{7}. No: \\boxed{8}", "8"),
        ("\\boxed{7}\n\n\\boxed 8", "8"),
        ("\\boxed{\\{1,\\, \\text{b}\\}}", "\\{1,\\, \\text{b}\\}"),
        ("Answer: 21\n\nLet me know if you need more or less.", "21"),
        ("Answer: 21\nCheck: 20 + 1 = 21, not 22.", "21"),
        ("Answer: 21\n\n---\nThis matches.", "21"),
        ("Answer: 21\nNo, it is 22.", None),
        ("Answer: 21\nIt could be 22 too.", None),
        ("Answer: 21\n22", None),
        ("So it is.\n### Answer\n5", "5"),
        ("**Answer:**\n$$\n5\n$$", "5"),
        ("First this.\nThe answer is 5.", "5."),
        ("The final answer is: $5$", "$5$"),
        ("The answer to the question is 3.5 m. It was asked for.", "3.5 m"),
        ("It fits.\nTherefore, option (B) is correct.", "(B)"),
        ("It fits.\nOption B is not correct.", None),
        ("Option A is right.\nOr option B is right.", None),
        ("The answer is 5, because 5 is not 6.", "5"),
        ("The answer is 5. Wait, the answer is 6.", None),
        ("The answer is 3 or 4.", "3 or 4."),
        ("The final answer is $5$. I hope it is correct.", "$5$"),
        ("The answer is St. Louis. It lies on a river.", "St. Louis"),
        ("So the answer is 42!", "42"),
        ("1. Answer (in metres): 5", "5"),
        ("Answer: 21. Let me know if you have any questions!", "21"),
        ("Answer: Yes, because it is even.", "Yes"),
        ("Answer: The answer is 7.", "7."),
        ("16 - 3 = 13\n#### 1,013", "1,013"),
        ("She makes **$18** every day.", "$18"),
        ("She makes **$18** or **$19**.\nPerhaps **$20**.", None),
        ("<answer>1</answer>\n<answer>2</answer>", None),
        ("The answer is:\n5\nOr is it 6?", None),
        ("The correct letter is B", "B"),
        ("The answer is Bi, So, Ve.", "Bi, So, Ve."),
        ("One line.\nIt is not **18**.", None),
        ("Answer: 1\nAnswer: 2", None),
        ("Answer: 1\nor so", None),
        ("two\nlines", None),
        ("\\boxed{7", ""),
        ("Answer:", None),
        ("", None),
        ("x" * 3000, None),
    ],
)
def test_a_text_gives_one_answer_or_none(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-3.50", Fraction(-7, 2)), ("1,200", 1200), ("2/3", Fraction(2, 3)),
     ("6.02e3", 6020), (".5", Fraction(1, 2)), ("$7$.", 7), ("\u22124", -4), ("1/0", None),
     ("12,34", None), ("1e9999", None), ("0x10", None), ("\u0663", None), ("\uff11", None),
     (r"\frac{2}{3}", Fraction(2, 3)), (r"-\dfrac23", Fraction(-2, 3)), ("2\u00bd", Fraction(5, 2)),
     (r"\tfrac{-2}{3}", Fraction(-2, 3)), (r"2\frac{1}{2}", Fraction(5, 2)),
     ("2 2/3", Fraction(8, 3)),
     (r"50\%", Fraction(1, 2)), (r"3 \times 10^{-2}", Fraction(3, 100)), ("6 x 10\u00b3", 6000),
     (r"\$1{,}000", 1000), (r"1\,000", 1000), ("$5 million", 5 * 10**6), ("x = 5", 5),
     ("12+9=21", 21), ("21 (exactly)", 21), ("\u2248 4", 4), ("**18**", 18), (r"\text{ 7 }", 7),
     ("3*4+2", None), ("3 or 4", None), ("21 (or so)", None), ("x = 3 or x = 4", None),
     ("x >= 4", None), ("x != 4", None), ("get(ab) = 4", None), ("--4", None), ("2^10", None),
     ("10^10^10", None), ("10**10**10", None), ("1e999999999", None), ("9" * 1999, None),
     (r"\displaystyle 42", 42), (r"\large\bf 42", 42), (r"\textcolor{red}{42}", 42),
     (r"{\color{blue} 42}", 42), (r"-{7 \over 3}", Fraction(-7, 3)), ("-(7/3)", Fraction(-7, 3)),
     (r"\left(-\frac{7}{3}\right)", Fraction(-7, 3)), (r"0.\overline{3}", Fraction(1, 3)),
     (r"1.1\overline{6}", Fraction(7, 6)), (r"x = -\frac{14}{6} = -\frac73", Fraction(-7, 3)),
     (r"-\frac{7}{3} \approx -2.33", Fraction(-7, 3)), ("7/3 (about 2.33)", Fraction(7, 3)),
     ("7 \u2248 8", None), ("7/3 (about 3)", None), ("41 = 42", None), ("x = 41 = 42", None),
     ("1 2", None), ("", None), ("9" * 41, None), ("1_000", None), ("inf", None), ("nan", None)],
)  # fmt: skip
def test_numbers_are_plain_ascii_ones(text: str, value: object) -> None:
    assert number(text) == value


QUANTITIES = (
    ("3 k\u2126", "3 \\mathrm{k}\\Omega", "3000\\,\\Omega", "3 kilo-ohms"), ("18 kph", "5 mps"),
    ("2 M", "2 mol/L", "2 molar"), ("4 kg-m/s**2", "4 N", "4 kg.m.s^-2", "F \u2248 4 N",
     "F = 2*2 = 4 N"),
    ("0.5 kN", "500 kg*m/s^2"), ("1 L", "1000 cm^3", "1000 ml", "1 l"), ("36 km/h", "10 m/s"),
    ("1 V", "1 J/C"), ("2 W", "2000 mJ/s"), ("1 Pa", "1 N/m^2"), ("3 kohm", "3000 V/A"),
    ("1.5e3 m", "1.5 km", "1,500 m", "1 500 metres"), ("2 x 10^3 J", "2 kJ",
     "2 \u00d7 10\u00b3 joules"),
    ("4 m\u00b2", "40000 cm^2", "4 square meters", "4 metres squared"), ("1 kWh", "3.6 MJ"),
    ("12 N", "12 Newtons", "12N", "\u2248 12 N", "about 12 N", "F = 12 N", r"12\ \text{N}",
     "$12$ N",
     r"12\,\mathrm{N}", "12 N (newtons)"),
    ("9.8 m/s^2", "9.8 m/s/s", "9.8 m s^{-2}", "9.8 m\u00b7s\u207b\u00b2", "9.8 m s^-2",
     "9.8 meters per second squared", r"9.8 \frac{\text{m}}{\text{s}^2}"),
    ("1/2 N", "0.5 N", r"\frac{1}{2} N"), ("2 kilowatt-hours", "2 kWh"), ("3 ohms", "$3$ \u03a9"),
    (r"3 \times 10^{8}\,\mathrm{m/s}", "3e8 m/s"), ("1.2 kg m^2 s^-2", "1.2 N\u22c5m", "1.2 J"),
    ("5 moles per litre", "5 mol/L"), ("5 \u00b5m", "5 \u03bcm", "5 um"),
)  # fmt: skip


def test_equal_quantities_are_equal() -> None:
    for first, *others in QUANTITIES:
        for other in others:
            assert quantity(first) == quantity(other) is not None, (first, other)


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "5 q",
        "kg",
        "5 kg/",
        "5 m/s/",
        "5 kkg",
        "5 N or 6 N",
        "5 (N)q",
        "5 per",
        "5 square",
        "5 m^99",
        "5 " + "m*" * 30,
        "1e999999 m",
    ],
)
def test_what_is_no_quantity_is_none(text: str) -> None:
    assert quantity(text) is None


def test_names_are_compared_without_case_and_marks() -> None:
    assert plain(' "The  Answer". ') == plain("the answer")


def test_one_letter_apart_is_a_distance_of_one() -> None:
    """Against the recurrence for the distance with swaps of neighbours."""

    def distance(a: str, b: str) -> int:
        rows = {
            (i, j): max(i, j) for i in range(len(a) + 1) for j in range(len(b) + 1) if not i * j
        }
        for i in range(1, len(a) + 1):
            for j in range(1, len(b) + 1):
                change = rows[i - 1, j - 1] + (a[i - 1] != b[j - 1])
                rows[i, j] = min(rows[i - 1, j] + 1, rows[i, j - 1] + 1, change)
                if i > 1 and j > 1 and a[i - 2 : i] == b[j - 2 : j][::-1]:
                    rows[i, j] = min(rows[i, j], rows[i - 2, j - 2] + 1)
        return rows[len(a), len(b)]

    draws, near = Draws("letters"), 0
    for _ in range(2000):
        a, b = ("".join(draws.choice("abc") for _ in range(draws.between(1, 4))) for _ in "ab")
        if a != b:
            assert one_letter_apart(a, b) == (distance(a, b) == 1), (a, b)
            near += one_letter_apart(a, b)
    assert near > 100


# Expected, then right forms, then wrong ones.
FORMS = (
    ("\\frac{1}{2}", ("1/2", "\\dfrac12", "0.5", "\u00bd", "50\\%", "$\\tfrac{1}{2}$"),
     ("1/3", "2", "5%")),
    ("1/3", ("\\frac13", "2/6"), ("0.3333", "0.33333333333")),
    ("18", ("$18", "\\$18.00", "18\\text{ dollars}", "18 red apples", "x = 18", "18%", "18 cm"),
     ("19", "$19", "18x", "18 thousand", "18 or 19", "18, 19", "-18 dollars", "18 dozen",
     "18 squared", "18 is wrong",
      "1 8", "9+9")),
    ("50\\%", ("50", "0.5", "50 percent"), ("5", "500%", "0.05")),
    ("5000000", ("5 million", "5,000,000", "5\\,000\\,000", "5 \\times 10^6"), ("5 billion",)),
    ("1024", ("1,024",), ("2^{10}", "1000+24")),
    ("2^{10}", ("1024", "2^10"), ("2^9", "1025")),
    ("x^2+1", ("1+x^2", "$x\u00b2 + 1$", "f(x) = x^{2} + 1"), ("x^2-1", "x^2", "1", "y^2+1")),
    ("2\\sqrt{3}", ("2 \\sqrt 3", "\\sqrt{12}", "2\u221a3"), ("3\\sqrt{2}", "3.4641", "2*3")),
    ("\\frac{\\sqrt{2}}{2}", ("\\frac{1}{\\sqrt2}",), ("0.7071", "\\sqrt2")),
    ("(1,2)", ("\\left( 1,\\; 2 \\right)", "(1.0, 2)"), ("(2,1)", "[1,2]", "(1,2]", "(1,2,3)",
     "1")),
    ("\\{1, 2\\}", ("{2,1}", "2, 1"), ("\\{1\\}", "\\{1,2,3\\}", "[1,2]", "\\{1,1\\}")),
    ("2, 3", ("3, 2", "x = 2 or x = 3", "2 and 3"), ("2", "2, 3, 4", "x=2, y=3, z=4")),
    ("x=1, y=2", ("y=2,x=1",), ("x=2, y=1",)),
    ("(-\\infty, 0]", ("x \\in (-\u221e, 0]",), ("(-\\infty,0)", "(\\infty, 0]")),
    ("x = 5", ("5", "$x=5$"), ("y = 5", "x \\ge 5", "6")),
    ("y = 2x + 3", ("2x+3", "y=3+2x", "2x+3=y"), ("y=2x-3", "z=2x+3")),
    ("30^\\circ", ("30", "30\u00b0", "30 degrees"), ("31", "30 times")),
    ("5 cm", ("0.05 m", "5", "5\\text{ cm}", "5 centimeters"), ("5 m", "5 dollars", "6 cm")),
    ("Paris", ("paris.", "**Paris**", "\\text{Paris}", "\u201cParis\u201d"),
     ("Rome", "not Paris", "Paris or Rome")),
    ("stop", ("Stop",), ("spot", "tops")),
    ("x \\le 3", ("x \u2264 3", "x<=3"), ("x \\ge 3", "x < 3", "x=3")),
    ("\\text{(B)}", ("(b)",), ("(C)",)),
    ("\\pm 2", ("\u00b12", "2, -2", "x = \\pm 2", "x=2 or x=-2"), ("2", "2, 2", "\\pm 3")),
    ("1 \\pm \\sqrt{2}", ("1+\\sqrt2, 1-\\sqrt2",), ("1+\\sqrt2", "1-\\sqrt2, 1-\\sqrt2")),
    ("x \\in (-\\infty, 3) \\cup (5, \\infty)", ("(-\u221e,3)\u222a(5,\u221e)",), ("(-\u221e,3)",)),
    ("12:30", ("12 : 30",), ("30:12",)),
    ("\\frac{1}{2x}", ("1/(2x)", "\\frac{1}{x\\cdot 2}", "1/2/x"), ("x/2", "\\frac{x}{2}")),
    ("\\frac{3}{2\\pi}", ("3/(2\\pi)",), ("\\frac{3\\pi}{2}",)),
    ("\\frac{1}{2\\sqrt{3}}", ("\\frac{\\sqrt3}{6}",), ("\\frac{\\sqrt3}{2}",)),
    ("x^{2n}", ("(x^n)^2", "x^{n}x^{n}"), ("n x^2", "x^2 n")),
    ("e^{2x}", ("\\exp(2x)", "(e^x)^2"), ("x e^2",)),
    ("\\sin 2x", ("2\\sin x\\cos x", "\\sin(2x)"), ("x\\sin 2", "\\sin(2)x")),
    ("x\\sqrt2", ("\\sqrt{2}x",), ("2\\sqrt x",)),
    ("\\frac{1}{n!}", ("1/n!", "\\frac{n+1}{(n+1)!}"), ("n!", "1/(n+1)!")),
    ("16\\pi \\text{ cm}^2", ("16\\pi", "16\\pi\\text{ cm}^2"), ("16\\pi\\text{ m}^2", "16")),
    ("2\\sqrt2", ("2\\sqrt{2} \\approx 2.83",), ("3\\sqrt2 \\approx 2.83", "2.83")),
    ("x", ("$x$",), ("x \u2248 5", "5")),
    ("Facts about 5", ("facts about 5",), ("Facts", "5")),
    ("16\\pi", ("16\\pi\\text{ square units}",), ("16\\pi x", "16")),
)  # fmt: skip


def test_an_answer_counts_in_every_form_and_another_in_none(monkeypatch) -> None:
    monkeypatch.setattr(second_opinion, "agrees", lambda *texts: False)
    monkeypatch.setattr(equivalence, "agrees", lambda *texts: False)
    for expected, right, wrong in FORMS:
        for text in (expected, *right):
            assert same_answer(expected, text), (expected, text)
            assert same_answer(expected, f"${text}$") or "$" in text or "text" in text
        for text in (*wrong, "", "?", "\\frac", "\\text{}"):
            assert not same_answer(expected, text), (expected, text)
    assert not any(same_answer(nothing, nothing) for nothing in ("", " ", "$$", "\\text{}", "**"))


STUB = """
import time
def parse(text, **options):
    while "(han" in text:
        time.sleep(1)
    return [] if "none" in text else [text]
def verify(one, other, **options):
    if "(die" in other[0]:
        raise SystemExit(3)
    return sorted(one[0]) == sorted(other[0])
"""


def test_a_second_opinion_is_asked_only_after_a_no_and_costs_no_verdict(
    tmp_path, monkeypatch
) -> None:
    """Against a stub of the package, which takes anagrams for equal, hangs and crashes."""
    (tmp_path / "math_verify.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(second_opinion, "installed", lambda: True)
    monkeypatch.setattr(second_opinion, "LIMIT_S", 0.3)
    judge = second_opinion._Judge()
    monkeypatch.setattr(second_opinion, "_judge", judge)
    one, other = "a@1", "1@a"  # no expression that is read here
    assert same_answer(one, one) and judge._process is None
    for expected, given in (("21", "12"), ("stop", "spot"), ("1@a", "a@1 or 1@a"), ("12", "1+2"),
                            ("\\sqrt{2}", "2.1"), ("2, 3", "2, 3, 4")):  # fmt: skip
        assert not same_answer(expected, given) and judge._process is None
    assert same_answer(one, other) and not same_answer(one, "b@1")
    assert not same_answer(one, "(han") and judge.failures == 1
    assert same_answer(one, other) and not same_answer(one, "(die") and judge.failures == 1
    judge.failures = second_opinion.MOST_FAILURES
    assert not same_answer(one, other) and judge._process is None


OPTIONS = ["Rome", "Paris", "A cat", "3.5", "\\frac{1}{2}", "3"]
LETTERED = {
    "B": ("B", "(B)", "[B]", "b", "B.", "B)", "**B**", "`B`", "$B$", "\\text{B}", "\\mathbf{B}",
          "B) Paris.", "B. paris", "B) **Paris**", "**B. Paris**", "B: Paris", "B - Paris",
          "Option B",
          "option (B)",          "\\textbf{(B) } Paris", "Paris", "PARIS.", "B, because it is.",
          "B) Paris (the capital)", "Paris (B)", "Paris, option B", "\uff22",
          "The correct option is B.", "B is correct."),
    "C": ("a cat", "C) A cat"), "D": ("3.5", "D) 3.5"),
    "E": ("1/2", "\\dfrac12", "E. $\\frac12$"),
    None: ("G", "B) Rome", "Rome (B)", "Rome, option B", "A or B",
           "A B", "A, B", "B) Paris, or A) Rome", "not B", "Bob",
     "D) 3", "",
           "A) Rome B) Paris", "both A and B", "I think B", "B) P", "Paris or Rome", "D) 3.6"),
}  # fmt: skip


def test_letters_and_options_are_read_in_every_form() -> None:
    for letter, texts in LETTERED.items():
        for text in texts:
            assert letter_of(final_answer(f"Answer: {text}"), OPTIONS) == letter, text
    many = [f"option number {n}" for n in range(26)]
    for place, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        assert letter_of(letter, many) == letter_of(many[place], many) == letter
    assert letter_of("x", ["x", "X"]) is None  # two options have the text


ANSWERED = ("arithmetic", "lookup", "equations", "science_units", "multiple_choice", "wiki_search",
            "needle", "graph_walk", "search_pivot")  # fmt: skip
WAYS = ("\\boxed{@}", "$\\boxed{\\text{@}}$", "The answer is @.", "So the final answer is **@**.",
        "Answer: @\n\nLet me know if you need more or less.", "**Answer:** @", "### Answer\n\n@",
        "It is so.\n#### @", "<answer>@</answer>", "<answer>\nAnswer: @\n</answer>",
        "So the answer is:\n\n@\n\nThis was asked for.",
        "First \\boxed{~}, then \\boxed{@}.", "Answer: $@$")  # fmt: skip


def test_every_environment_reads_its_answer_in_every_way() -> None:
    """The oracle's answer in other words is as right, and another task's in them is not."""
    for name in ANSWERED:
        environment = registry[name]
        tasks = [environment.split(0, "train", index, level=1) for index in range(12)]
        spoken = [[Turn.of(turn) for turn in environment.oracle(task)] for task in tasks]
        said = [(t, turns) for t, turns in zip(tasks, spoken) if not turns[-1].calls][:2]
        (task, turns), (_, others) = said
        right, wrong = (
            last[-1].text.removeprefix("Answer:").strip().removeprefix("\\boxed{").removesuffix("}")
            for last in (turns, others)
        )
        assert right != wrong
        for way in WAYS:
            for answer, reward in ((right, 1), (wrong, 0), (f"{right} or {wrong}", 0)):
                other = wrong if answer == right else right
                text = way.replace("~", other).replace("@", answer)
                paid = play(environment, task, [*turns[:-1], text]).reward
                assert (paid == 1) == (reward == 1), (name, text, paid)
