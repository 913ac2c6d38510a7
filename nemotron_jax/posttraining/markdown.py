"""How much of a text is style: headers, list items, bold words and emoji, outside of code."""

import re

# Each takes time in proportion to the text: no two neighbouring parts of one can match the same
# character, so nothing is read again.
_CODE = re.compile(r"```.*?```", re.DOTALL)
_MARKS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^#{1,6}\s",
        r"^[^\S\n]*\d+\.\s",
        r"^[^\S\n]*[-*+]\s",
        r"\*\*[^*\n]+\*\*",
        r"__[^_\n]+__",
        # Emoji, by code points. Gym's range of enclosed characters, U+24C2 on, takes in every
        # Chinese, Japanese and Korean character as well; here it is the emoji of it alone.
        "[\U0001f300-\U0001f64f\U0001f680-\U0001f6ff\U0001f900-\U0001f9ff\U0001fa00-\U0001faff"
        "\U0001f170-\U0001f251\u2600-\u27bf\u24c2\u25aa\u25ab\u25b6\u25c0\u25fb-\u25fe\u2934\u2935"
        "\u2b05-\u2b07\u2b1b\u2b1c\u2b50\u2b55\u3030\u303d\u3297\u3299]",
    )
)


def style_density(text: str) -> float:
    """Marks of style a character, code blocks left out of both; 0 for an empty text.

    Source: NeMo Gym, genrm_compare, after Arena-Hard's control of style.
    """
    prose = _CODE.sub("", text)
    length = len(prose.strip())
    return sum(len(mark.findall(prose)) for mark in _MARKS) / length if length else 0.0
