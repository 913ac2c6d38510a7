"""Instructions that a program can check: some to be followed, some that go against habit."""

import re
import unicodedata
from collections.abc import Iterable

from nemotron_jax.environments.base import Draft, Environment, Session, Task, Verdict
from nemotron_jax.environments.draws import Draws
from nemotron_jax.environments.reading import LONGEST_REPLY, is_prose, lines_of, parts_of, words_of
from nemotron_jax.environments.turns import Turn
from nemotron_jax.environments.words import COLOURS, FILLER, THINGS, ask

# Words that a text can begin and end with whatever stands between.
_ENDS = tuple(
    "bright calm clear deep fine gentle glad green happy high keen light long mild new old open"
    " plain quick quiet round simple small soft still strong sunny tall warm wide young".split()
)


def checks(text: str, rules: dict) -> dict[str, bool]:
    """Each rule of a task by its name, and whether a text keeps it.

    Words are read without the marks beside them, so punctuation and emphasis change nothing.
    """
    words = words_of(text)
    parts = parts_of(words)
    kept = {"words": len(words) == rules["words"]}
    if "lines" in rules:
        kept["lines"] = len(lines_of(text)) == rules["lines"]
    if "keyword" in rules:
        kept["keyword"] = parts.count(rules["keyword"]) == rules["times"]
    if "first" in rules:
        kept["first"] = words[:1] == [rules["first"]]
    if "last" in rules:
        kept["last"] = words[-1:] == [rules["last"]]
    if "case" in rules:
        wrong = str.islower if rules["case"] == "capitals" else str.isupper
        kept["case"] = not any(map(wrong, text))
    if "without" in rules:
        letters = unicodedata.normalize("NFKD", text).casefold()
        kept["without"] = rules["without"] not in letters
    if "topic" in rules:
        kept["topic"] = rules["topic"] in parts
    kept["language"] = is_prose(words)
    return kept


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
        if len(self.text) > LONGEST_REPLY:
            return Verdict(0.0)
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
        first, last = draws.sample(_ENDS, 2)
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
        rules["words"] = rules["lines"] * draws.between(6, 9)
        for choice in draws.sample(choices, level + 1):
            rules |= choice
        if "times" in rules:  # one word in six at most: more leave no room for sentences
            rules["times"] = min(rules["times"], rules["words"] // 6)
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
            "coined words": [_coined(text, task.data["rules"])],
            "a list of words": [_list(text, task.data["rules"])],
            "introduced": [f"Here is the text:\n{text}"],
        }


def _coined(text: str, rules: dict) -> str:
    """A text with every word that no rule asks for exchanged for letters like a word's."""
    asked = {str(value) for value in rules.values()}
    vowel, end = "aeio", [c for c in "lnrst" if c != rules.get("without")]

    def letters(match: re.Match) -> str:
        place = match.start()
        word = vowel[place % 4] * 2 + end[place % len(end)] + vowel[place % 3] + end[0]
        word = word.upper() if match[0].isupper() else word
        return match[0] if match[0].casefold() in asked else word

    return re.sub(r"\w+", letters, text)


def _list(text: str, rules: dict) -> str:
    """The words that the rules ask for, pasted into words side by side."""
    asked = {str(value) for value in rules.values()}
    pool = iter(sorted({*COLOURS, *THINGS} - asked) * 2)
    words = [word if word.casefold() in asked else next(pool) for word in text.split()]
    return " ".join(words) if len(words) > 12 else " ".join(words[:1] * len(words))


def _written(rules: dict, shift: int) -> str:
    """A text that keeps the rules; another one for another shift."""
    words = _sentences(rules, shift)
    if "first" in rules:
        words[0] = rules["first"]
    if "last" in rules:
        words[-1] = rules["last"]
    count = rules.get("lines", 1)
    width = len(words) // count
    rows = [words[row * width : (row + 1) * width] for row in range(count - 1)]
    rows.append(words[(count - 1) * width :])
    text = "\n".join(" ".join(row) for row in rows)
    return text.upper() if rules.get("case") == "capitals" else text


def _sentences(rules: dict, shift: int) -> list[str]:
    """Words in the order of "the drum is near the old kettle and …", the asked ones among them."""
    banned = rules.get("without", "?")
    asked = [rules.get("keyword"), rules.get("topic"), rules.get("first"), rules.get("last")]

    def pool(words: Iterable[str]) -> list[str]:
        return [word for word in words if banned not in word and word not in asked]

    nouns, sizes = pool(THINGS), pool(_ENDS)
    links = pool(("near", "under", "by", "with", "above", "behind"))
    joints = pool(("and", "while", "so", "but"))
    own = [rules["topic"]] if "topic" in rules else []
    own += [rules.get("keyword", "")] * rules.get("times", 0)
    words: list[str] = []
    for place in range(rules["words"]):
        at, turn = place % 8, place // 8 + shift
        noun = own.pop() if own and at in (1, 6) else nouns[(2 * turn + at // 4) % len(nouns)]
        link, joint = links[turn % len(links)], joints[turn % len(joints)]
        size = sizes[turn % len(sizes)]
        words.append(("the", noun, "is", link, "the", size, noun, joint)[at])
    return words


# Marks and blanks that stand around a whole reply.
_AROUND = "*`_. \t\r\n"


class InverseSession(Session):
    def score(self) -> Verdict:
        data, text = self.task.data, self.text.strip()
        kept = getattr(self, f"_{data['kind']}")(text, data)
        return Verdict(float(kept), answer=text[:200])

    def _digit(self, text: str, data: dict) -> bool:
        told, given = data["number"], text.strip(_AROUND)
        return (
            len(given) == len(told)
            and set(given) <= set("0123456789")
            and sum(a != b for a, b in zip(told, given)) == 1
        )

    def _misspelt(self, text: str, data: dict) -> bool:
        # A capital is no misspelling, whoever writes it.
        told, given = data["sentence"].casefold().split(), text.strip(_AROUND).casefold().split()
        if len(told) != len(given):
            return False
        changed = [(a, b) for a, b in zip(told, given) if a != b]
        return len(changed) == data["count"] and all(one_letter_apart(a, b) for a, b in changed)

    def _exactly(self, text: str, data: dict) -> bool:
        return " ".join(text.strip(_AROUND).split()) == data["text"]


def one_letter_apart(one: str, other: str) -> bool:
    """Whether one letter put in, left out, exchanged or swapped with the next tells them apart."""
    if not other.isalpha() or not other.isascii() or abs(len(one) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


class InverseInstructions(Environment):
    """The instruction goes against habit: a wrong copy, misspellings, the reverse order."""

    name = "inverse_instructions"
    summary = "Do what is asked although habit says otherwise"
    reward = "criterion met"
    counterpart = "inverse_if"
    session = InverseSession

    def draw(self, draws: Draws, level: int) -> Draft:
        if level == 0:
            told = str(draws.between(1000, 99_999))
            text = f"Copy {told} with one digit wrong, the number only."
            return Draft(ask(text), {"kind": "digit", "number": told})
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
        if data["kind"] == "digit":
            told = data["number"]
            return told[:-1] + str((int(told[-1]) + 1 + (letter == "q")) % 10)
        if data["kind"] == "exactly":
            return data["text"]
        words = data["sentence"].split()
        spoilt = [word[:1] + letter + word[1:] for word in words[: data["count"]]]
        return " ".join(spoilt + words[data["count"] :])

    def cheats(self, task: Task) -> dict[str, list[Turn | str]]:
        data = task.data
        if data["kind"] == "digit":
            told = data["number"]
            several = " ".join(told[:-1] + digit for digit in "0123456789")
            other = "".join(str(9 - int(digit)) for digit in told)
            return {"habit": [told], "many": [several], "another number": [other]}
        if data["kind"] == "exactly":
            return {"chatty": [f"Sure! {data['text']}"], "quoted": [f"“{data['text']}”"]}
        return {
            "habit": [data["sentence"]],
            "all misspelt": [" ".join(word + "x" for word in data["sentence"].split())],
            "gibberish": [" ".join("qqq" for _ in data["sentence"].split())],
        }


ENVIRONMENTS = (InstructionFollowing(), InverseInstructions())
