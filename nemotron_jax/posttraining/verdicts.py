"""What a judge says of two answers, read from a server's reply; silence where it says nothing.

A reply is a chat completion. Its text may think aloud first; a verdict is what it ends with.
"""

import dataclasses
import json
from typing import Any

from nemotron_jax.data.chat.render import ANSWER, THINK

TIE = 3.5  # the middle of a ranking, and the score of either answer in a tie
GOOD, BAD = 4.5, 2.5  # scores of an answer that is right or preferred, and of one that is not
# JSON objects at the end of a text that are tried: a text of brackets alone stays cheap.
_OBJECTS_TRIED = 64
# What may stand around a verdict's one word; a question mark would be a doubt.
_MARKS = " \t*_`#<>|\"'“”‘’«»()[]{}.,:;!。•–—-"


class NoVerdict(Exception):
    """A reply from which no verdict can be read; its text says why."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How helpful each of two answers is, 1 to 5, and how they compare.

    `ranking` goes from 1, the first is much better, to 6, the second is; it breaks ties of the
    scores. The scale is that of NVIDIA's generative reward models.
    """

    first: float
    second: float
    ranking: float = TIE

    def scores(self) -> tuple[float, float]:
        """Those of the two, ties broken."""
        shift = TIE - self.ranking if self.first == self.second else 0.0
        return self.first + shift, self.second - shift

    @classmethod
    def preferring(cls, share: float) -> "Comparison":
        """Of a judge that says only which is better: 1 for the first, 0 for the second, 1/2 for
        neither."""
        return cls(BAD + (GOOD - BAD) * share, GOOD - (GOOD - BAD) * share)


def reply_text(reply: Any) -> str:
    """The text of a chat completion, after its reasoning; NoVerdict where there is none, or where
    it was cut off."""
    try:
        choice = reply["choices"][0]
        content, ended = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise NoVerdict("no choices[0].message.content in the reply") from None
    if isinstance(content, list):
        content = "".join(map(_part_text, content))
    if not isinstance(content, str):
        raise NoVerdict(f"a content that is no text but {type(content).__name__}")
    if ended in ("length", "content_filter"):
        raise NoVerdict(f"a text that is cut off (finish_reason={ended!r})")
    said = content.rpartition(ANSWER)[2]
    if THINK in said:
        raise NoVerdict("a text that ends within its reasoning")
    return said


def word_verdict(text: str) -> float:
    """1 for A, 0 for B, 1/2 for a tie, whichever is the last line's one word, marks and case aside;
    NoVerdict for any other line."""
    line = text.replace("\r", "\n").strip().rpartition("\n")[2]
    found = {"a": 1.0, "b": 0.0, "tie": 0.5}.get(line.strip(_MARKS).lower())
    if found is None:
        raise NoVerdict(f"a last line that is neither A, B nor tie: {line[-80:]!r}")
    return found


def score_verdict(text: str) -> Comparison:
    """The last JSON object with score_1, score_2 and, for ties, ranking; NoVerdict without one."""
    place, decoder = len(text), json.JSONDecoder()
    for _ in range(_OBJECTS_TRIED):
        place = text.rfind("{", 0, place)
        if place < 0:
            break
        try:
            found, _ = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        scores = _number(found, "score_1", 5), _number(found, "score_2", 5)
        ranking = _number({"ranking": TIE} | found, "ranking", 6)
        if None not in (*scores, ranking):
            return Comparison(*scores, ranking)
    raise NoVerdict("no JSON with score_1 and score_2 of 1 … 5 and a ranking of 1 … 6")


def _part_text(part: Any) -> str:
    """The text of one part of a content that is a list; none of an image, or of reasoning."""
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
    text = part.get("text") if is_text else None
    return text if isinstance(text, str) else ""


def _number(values: dict[str, Any], name: str, most: int) -> float | None:
    """A number of 1 … most, also one written as text; None for anything else."""
    value = values.get(name)
    if isinstance(value, str) and len(value) < 32:
        try:
            value = float(value)
        except ValueError:
            return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 1 <= value <= most else None
