"""Marks of style are counted outside of code, and in time in proportion to the text."""

import time

import pytest

from nemotron_jax.posttraining.markdown import style_density


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("plain words, 3.5 of them; a_b_c, x*y, a - b, #tag, <i>", 0),
        ("# One\n### Two\ntext\n####### seven", 2),
        ("- a\n* b\n  + c\n\n1. d\n  22. e\n1.5 is none\n-none", 5),
        ("**bold** and __bold__ and *not* and ** not\n** either", 2),
        ("good \U0001f600\U0001f680 \u2b50 \u2705 \U0001f1eb", 5),
        ("\u6f22\u5b57\u304b\u306a\ud55c\uae00", 0),
        ("", 0),
        ("\n \n", 0),
    ],
)
def test_headers_lists_bold_words_and_emoji_are_marks(text, marks) -> None:
    density = style_density(text)
    assert round(density * len(text.strip())) == marks and (marks or density == 0)


def test_code_has_no_style() -> None:
    code = "```py\n# a comment\n- **1**\n```"
    assert style_density(f"Look:\n{code}\n# Head") == 1 / len("Look:\n\n# Head")
    assert style_density(code) == 0
    assert style_density("```\n- not closed") > 0


UNITS = (
    "\n",
    "\n \n",
    " ",
    "\t \n",
    "1",
    "1\n",
    "# ",
    "#",
    "- ",
    "*",
    "**",
    "**a",
    "*\n",
    "_",
    "__a",
)
UNITS += ("`", "``", "```", "```\n", "```a\n", "1. ", " -", "\u2028", "**a*", "__a_", "\U0001f600")


def test_no_text_takes_long() -> None:
    for unit in UNITS:
        for text in (unit * (200_000 // len(unit)), "x" + unit * (200_000 // len(unit)) + "y"):
            began = time.thread_time()
            style_density(text)
            assert time.thread_time() - began < 1, unit  # each takes up to 0.05
