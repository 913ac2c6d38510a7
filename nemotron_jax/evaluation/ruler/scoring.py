"""What an answer is worth: the share of what was asked for that it names."""

import re
from collections.abc import Mapping
from typing import Any

from nemotron_jax.evaluation.ruler.kinds import KINDS, NUMBER, UUID, Kind
from nemotron_jax.evaluation.ruler.wording import wording
from nemotron_jax.evaluation.suite import Score

# Characters that an answer may have for each token that it may have: no tokenizer's tokens are
# longer on average. Whoever says more than that repeats the text.
CHARACTERS_PER_TOKEN = 8
_FORMS = {
    "number": r"\d{4,}",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}",
    "chain": r"[A-Z]{5}",
}


def says(text: str, answer: str) -> bool:
    """Whether a text names an answer, as a word of its own, in capitals or not."""
    if answer.casefold() not in text.casefold():
        return False
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def score(line: Mapping[str, Any]) -> Score:
    """The score of a line of transcripts whose `kind` and `gold` say what was asked for.

    The share of gold that is named; of alternatives, one is enough. What follows where the answer
    begins to write the next task does not count, and an answer that is longer than there is room
    for names nothing: it repeats the text.
    """
    kind, gold = KINDS[line["kind"]], line["gold"]
    answer = line["answer"].split(wording(kind).opening.strip()[:40])[0]
    if len(answer) > CHARACTERS_PER_TOKEN * kind.new_tokens:
        return Score(0.0, f"{len(answer)} characters: it repeats the text")
    if not re.search(_form(kind), answer):
        return Score(0.0, "nothing of the form that was asked for", answered=False)
    named = [says(answer, one) for one in gold]
    if kind.any_answer:
        return Score(float(any(named)), "named" if any(named) else "not named")
    return Score(sum(named) / len(gold), f"{sum(named)} of {len(gold)} named")


def _form(kind: Kind) -> str:
    """What any answer of the kind holds."""
    if kind.form == "needle":
        return {NUMBER: _FORMS["number"], UUID: _FORMS["uuid"]}[kind.value]
    return _FORMS.get(kind.form, r"\w")
