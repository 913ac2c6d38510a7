"""Instructions that a program can check: some to be followed, some that go against habit."""

import re

from nemotron_jax.environments.answers import number
from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import CITIES, COLOURS, FILLER, FIRST, THINGS, ask

_WORD = re.compile(r"[^\W\d_]+")


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()]


def checks(text: str, rules: dict) -> dict[str, bool]:
    """Each rule of a task by its name, and whether a text keeps it."""
    lines, words = lines_of(text), text.split()
    bare = [word.casefold() for word in _WORD.findall(text)]
    kept = {"words": len(words) == rules["words"]}
    if "lines" in rules:
        kept["lines"] = len(lines) == rules["lines"]
    if "keyword" in rules:
        kept["keyword"] = bare.count(rules["keyword"]) == rules["times"]
    if "first" in rules:
        kept["first"] = bool(words) and words[0].strip("-*").casefold() == rules["first"]
    if "last" in rules:
        kept["last"] = bool(bare) and bare[-1] == rules["last"] and words[-1].casefold() in (
            rules["last"], rules["last"] + ".")  # fmt: skip
    if "case" in rules:
        kept["case"] = text == (text.upper() if rules["case"] == "capitals" else text.lower())
    if "without" in rules:
        kept["without"] = rules["without"] not in text.casefold()
    if "topic" in rules:
        kept["topic"] = rules["topic"] in bare
    # Letters in a row are no text, nor is one word over and over.
    known = sum(map(_is_known, bare))
    kept["language"] = bool(words) and 2 * min(known, len(set(bare))) >= len(words)
    return kept


_KNOWN = frozenset(word.casefold() for word in (*THINGS, *COLOURS, *FILLER, *CITIES, *FIRST))
_COMMON = frozenset(
    "a about all an and are as at be but by can do for from had has have he her his how i if in is"
    " it its made me my no not of on one or our she so some than that the their them then there"
    " they this to two up us was we were what when which who will with you your".split()
)


def _is_known(word: str) -> bool:
    return (
        word in _KNOWN or word in _COMMON or (len(word) > 3 and bool(re.search("[aeiouy]", word)))
    )


def _told(rules: dict) -> str:
    sentences = [
        f"Write about “{rules['topic']}”, with this word, in exactly {rules['words']} words"
    ]
    if "lines" in rules:
        sentences[0] += f" on {rules['lines']} lines"
    if "keyword" in rules:
        sentences.append(f"Use the word “{rules['keyword']}” exactly {rules['times']} times")
    if "first" in rules:
        sentences.append(f"The first word is “{rules['first']}”")
    if "last" in rules:
        sentences.append(f"The last word is “{rules['last']}”")
    if "case" in rules:
        sentences.append(f"Write in {rules['case']} only")
    if "without" in rules:
        sentences.append(f"Do not use the letter “{rules['without']}”")
    return ". ".join(sentences) + "."


class InstructionSession(Session):
    def score(self) -> Verdict:
        kept = checks(self.text, self.task.data["rules"])
        return Verdict(float(all(kept.values())), {name: float(ok) for name, ok in kept.items()})


class InstructionFollowing(Environment):
    """One to six rules at once, of which each is checked by itself."""

    name = "instruction_following"
    summary = "Write a short text that keeps every rule given"
    reward = "all rules kept"
    counterpart = "instruction_following"
    levels = 4
    session = InstructionSession

    def draw(self, draws: Draws, level: int) -> Draft:
        topic, keyword = draws.sample(THINGS, 2)
        first, last = draws.sample(FILLER, 2)
        if level == 0:
            rules = {"words": draws.between(5, 40), "first": topic, "last": last}
            text = f"{rules['words']} words, first “{topic}”, last “{last}”"
            return Draft(ask(text), {"rules": rules})
        choices = [
            {"keyword": keyword, "times": draws.between(2, 4)},
            {"first": first},
            {"last": last},
            {"case": draws.choice(["capitals", "small letters"])},
        ]
        rules: dict = {"topic": topic, "lines": draws.between(2, 3 + level)}
        rules["words"] = rules["lines"] * draws.between(5, 9)
        for choice in draws.sample(choices, level + 1):
            rules |= choice
        if level == 3:
            used = "".join(str(value) for value in rules.values()) + "caps"
            rules["without"] = draws.choice(
                [letter for letter in "bcdfgjkmpqvwxyz" if letter not in used]
            )
        return Draft(ask(_told(rules)), {"rules": rules})

    def oracle(self, task: Task) -> list[Turn | str]:
        return [_written(task.data["rules"], 0)]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[_written(task.data["rules"], 7)]]

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        text = _written(task.data["rules"], 0)
        words = text.split()
        return {
            "a word too many": [text + " " + words[-1]],
            "a word too few": [" ".join(words[1:])],
            "the rules promised": ["I have written the text and kept every rule."],
            "one word over and over": [" ".join([words[0]] * (len(words) - 1) + [words[-1]])],
            "letters for words": [" ".join("zzq" for _ in words)],
            "introduced": [f"Here is the text:\n{text}"],
        }


def _written(rules: dict, shift: int) -> str:
    """A text that keeps the rules; another one for another shift."""
    banned = {rules.get("keyword"), rules.get("first"), rules.get("last")}
    pool = [w for w in FILLER if w not in banned and rules.get("without", "?") not in w]
    inner = [pool[(place + shift) % len(pool)] for place in range(rules["words"])]
    if "first" in rules:
        inner[0] = rules["first"]
    if "last" in rules:
        inner[-1] = rules["last"]
    missing = rules.get("times", 0) - inner.count(rules.get("keyword"))
    for place in range(1, 1 + missing):
        inner[place] = rules["keyword"]
    if "topic" in rules:
        inner[-2] = rules["topic"]
    count = rules.get("lines", 1)
    width = len(inner) // count
    rows = [inner[row * width : (row + 1) * width] for row in range(count - 1)]
    rows.append(inner[(count - 1) * width :])
    text = "\n".join(" ".join(row) for row in rows)
    return text.upper() if rules.get("case") == "capitals" else text


class InverseSession(Session):
    def score(self) -> Verdict:
        data, text = self.task.data, self.text.strip()
        kept = getattr(self, f"_{data['kind']}")(text, data)
        return Verdict(float(kept), answer=text[:200])

    def _wrong_sum(self, text: str, data: dict) -> bool:
        value = number(text) if re.fullmatch(r"-?\d{1,6}", text, re.ASCII) else None
        return value is not None and value != data["sum"]

    def _misspelt(self, text: str, data: dict) -> bool:
        told, given = data["sentence"].split(), text.split()
        if len(told) != len(given):
            return False
        changed = [(a, b) for a, b in zip(told, given) if a != b]
        return len(changed) == data["count"] and all(one_letter_apart(a, b) for a, b in changed)

    def _exactly(self, text: str, data: dict) -> bool:
        return " ".join(text.split()) == data["text"]


def one_letter_apart(one: str, other: str) -> bool:
    """Whether one letter put in, left out, exchanged or swapped with the next tells them apart."""
    if not other.isalpha() or abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


class InverseInstructions(Environment):
    """The instruction goes against habit: a wrong answer, misspellings, the reverse order."""

    name = "inverse_instructions"
    summary = "Do what is asked although habit says otherwise"
    reward = "criterion met"
    counterpart = "inverse_if"
    session = InverseSession

    def draw(self, draws: Draws, level: int) -> Draft:
        if level == 0:
            a, b = draws.between(2, 99), draws.between(2, 99)
            return Draft(ask(f"{a}+{b}? Wrong number only."), {"kind": "wrong_sum", "sum": a + b})
        words = draws.sample([*THINGS, *FILLER], 5 + 2 * level)
        listed = ", ".join(words)
        kind = draws.choice(["misspelt", "backwards", "unsorted", "quoted"])
        if kind == "misspelt":
            count, sentence = draws.between(1, 2 * level), " ".join(words)
            text = f"Repeat, with exactly {count} words misspelt by one letter each: {sentence}"
            return Draft(ask(text), {"kind": kind, "sentence": sentence, "count": count})
        if kind == "backwards":
            text = f"Write only these words in the reverse order, with spaces between: {listed}"
            answer = " ".join(reversed(words))
        elif kind == "unsorted":
            text = f"Sort from z to a, not from a to z; spaces between, nothing else: {listed}"
            answer = " ".join(sorted(words, reverse=True))
        else:
            text = (
                f"Do not answer the question “What is {len(words)} + {draws.between(2, 99)}?”. "
                f"Reply with the third of these words and nothing else: {listed}"
            )
            answer = words[2]
        return Draft(ask(text), {"kind": "exactly", "text": answer})

    def oracle(self, task: Task) -> list[Turn | str]:
        return [self._answer(task, "x")]

    def alternatives(self, task: Task) -> list[list[Turn | str]]:
        return [[self._answer(task, "q")]]

    def _answer(self, task: Task, letter: str) -> str:
        data = task.data
        if data["kind"] == "wrong_sum":
            return str(data["sum"] + ord(letter) - 100)
        if data["kind"] == "exactly":
            return data["text"]
        words = data["sentence"].split()
        spoilt = [word[:1] + letter + word[1:] for word in words[: data["count"]]]
        return " ".join(spoilt + words[data["count"] :])

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        if data["kind"] == "wrong_sum":
            return {"habit": [str(data["sum"])], "many": [f"{data['sum'] + 1} {data['sum'] + 2}"]}
        if data["kind"] == "exactly":
            return {"chatty": [f"Sure! {data['text']}"], "quoted": [f"“{data['text']}”"]}
        return {
            "habit": [data["sentence"]],
            "all misspelt": [" ".join(word + "x" for word in data["sentence"].split())],
            "gibberish": [" ".join("qqq" for _ in data["sentence"].split())],
        }


ENVIRONMENTS = (InstructionFollowing(), InverseInstructions())
