"""What a judge's reply says, and that whatever else it is says nothing."""

import time

import pytest

from nemotron_jax.posttraining.verdicts import (
    Comparison,
    NoVerdict,
    reply_text,
    score_verdict,
    word_verdict,
)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1.0),
        ("b", 0.0),
        ("TIE", 0.5),
        ("Both name it, A in short, B at length.\nTie", 0.5),
        ("B is worse than A.\n\n**A**.\n", 1.0),
        ("A is right.\r\n `B` \r\n", 0.0),
        ("tie\nA is longer.\n(B)", 0.0),
        ("- “a”", 1.0),
        ("## Tie:", 0.5),
        ("A?", None),
        ("verdict: A", None),
        ("B\nA is better than B", None),
        ("A sum has one value, and both give it.", None),
        ("B adds nothing.\nA", 1.0),
        ("B\nBoth are A", None),
        ("A, B", None),
        ("not A", None),
        ("A\nI would say A or tie", None),
        ("A or B", None),
        ("AB", None),
        ("answer", None),
        ("", None),
        ("\n \n", None),
        ("**", None),
    ],
)
def test_the_last_lines_one_word_is_the_verdict(text, verdict) -> None:
    if verdict is None:
        with pytest.raises(NoVerdict, match="last line"):
            word_verdict(text)
    else:
        assert word_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"score_1": 4, "score_2": 2.5, "ranking": 1}', (4, 2.5, 1)),
        ('Well.\n```json\n{"score_1": 4,\n "score_2": 4, "ranking": 5}\n```\nDone.', (4, 4, 5)),
        ('{"score_1": "3", "score_2": 3}', (3, 3, 3.5)),
        ('{"overall": {"score_1": 1, "score_2": 5, "ranking": 6}, "why": [1]}', (1, 5, 6)),
        ('{"why": "a {brace} and \\"{", "score_1": 2, "score_2": 1, "ranking": 2}', (2, 1, 2)),
        ('{"score_1": 1, "score_2": 1}\nno:\n{"score_1": 5, "score_2": 2}', (5, 2, 3.5)),
        ('{"score_1": 5, "score_2": 2} {"note": 1} {', (5, 2, 3.5)),
        ('{"score_1": 4}', None),
        ('{"score_1": 4, "score_2": 6}', None),
        ('{"score_1": 0, "score_2": 3}', None),
        ('{"score_1": 4, "score_2": 3, "ranking": 7}', None),
        ('{"score_1": 4, "score_2": 3, "ranking": null}', None),
        ('{"score_1": NaN, "score_2": 3}', None),
        ('{"score_1": true, "score_2": 3}', None),
        ('{"score_1": [4], "score_2": "good"}', None),
        ('{"score_1": 1' + "0" * 400 + ', "score_2": 3}', None),
        ('{"score_1": 4, "score_2": 3, "rank', None),
        ("score_1: 4, score_2: 3", None),
        ("A", None),
        ("", None),
    ],
)
def test_the_last_scores_in_json_are_the_verdict(text, verdict) -> None:
    if verdict is None:
        with pytest.raises(NoVerdict, match="no JSON with"):
            score_verdict(text)
    else:
        assert score_verdict(text) == Comparison(*verdict)


def test_a_text_of_brackets_costs_no_time() -> None:
    began = time.thread_time()
    for unit in ("{", '{"a":', '{"a":[', '{"a":1,', "{}", '{"score_1":{', "}{"):
        with pytest.raises(NoVerdict):
            score_verdict(unit * (200_000 // len(unit)))
    assert time.thread_time() - began < 2  # takes 0.1


def reply(content, **choice) -> dict:
    return {"choices": [{"message": {"content": content}, **choice}]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (reply("A"), "A"),
        (reply("A", finish_reason="stop"), "A"),
        (reply("A", finish_reason=None), "A"),
        (
            reply([{"type": "text", "text": "so:\n"}, {"type": "output_text", "text": "B"}]),
            "so:\nB",
        ),
        (reply([{"type": "image_url"}, {"type": "reasoning", "text": "B"}, {"text": "A"}]), "A"),
        (reply([{"type": "text", "text": None}, 7, None]), ""),
        (reply("<think>\nA or B\n</think>\ntie"), "\ntie"),
        (reply("A or B\n</think>\ntie"), "\ntie"),
        (reply("<think>\nperhaps\nA"), None),
        (reply("A", finish_reason="length"), None),
        (reply("A", finish_reason="content_filter"), None),
        (reply(None), None),
        (reply(7), None),
        (reply({"text": "A"}), None),
        ({"choices": []}, None),
        ({"choices": None}, None),
        ({"choices": [7]}, None),
        ({"choices": [{"message": None}]}, None),
        ({"choices": ["message"]}, None),
        ({"error": "busy"}, None),
        ([], None),
        (None, None),
        ("A", None),
    ],
)
def test_a_replys_text_is_what_follows_its_reasoning(given, text) -> None:
    if text is None:
        with pytest.raises(NoVerdict):
            reply_text(given)
    else:
        assert reply_text(given) == text
