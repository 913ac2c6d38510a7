"""RULER's kinds have the paper's counts, and only who reads the whole text scores."""

import collections
import dataclasses
import json
import math
import pathlib
import re

import pytest

from nemotron_jax.config.engine import EngineConfig
from nemotron_jax.data.tokenizer import PHRASE_PATTERN, Tokenizer, train_tokenizer
from nemotron_jax.decoding.engine import Engine
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.own_model import OwnModel
from nemotron_jax.evaluation.ruler.kinds import KINDS
from nemotron_jax.evaluation.ruler.make import NoRoom, make
from nemotron_jax.evaluation.ruler.suite import SUITE, RulerOptions, summarise
from nemotron_jax.evaluation.ruler.texts import REFRAIN, plain_words
from nemotron_jax.evaluation.transcripts import scored
from tests.evaluation.fake_context import FakeContext

TABLE = json.loads(pathlib.Path(__file__).with_name("ruler_counts.json").read_text())["kinds"]
NEEDLE = re.compile(r"The secret (number|code) of (\S+) is ([0-9a-f-]+)\.")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
LETTERS = [REFRAIN * 40, "The secret numbers of the towns are in documents. " * 40]
LETTERS += [" ".join(plain_words()) * 2]
# Above 4,096 a list's words come as often as the paper says.
LENGTH = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LETTERS, 1500)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Some prompts of each kind, by kind."""
    made = {kind: make(tokenizer, KINDS[kind], LENGTH, 3, depths=3) for kind in KINDS}
    return {kind: [one for group in groups for one in group] for kind, groups in made.items()}


def form_of(text):
    return "uuid" if UUID.fullmatch(text) else "number" if text.isdigit() else "word"


def counted_needles(prompt):
    """What a text hides, counted in the text itself."""
    body, question = prompt.asked.body, prompt.asked.question(KINDS[prompt.kind])
    found = NEEDLE.findall(body)
    values = collections.defaultdict(list)
    for _, key, value in found:
        values[key].append(value)
    rest = [line for line in re.split(r"\n", NEEDLE.sub("", body)) if line.strip()]
    asked = [key for key in values if key in question]
    assert sorted(prompt.asked.gold) == sorted(v for key in asked for v in values[key])
    (per_key,) = {len(of) for of in values.values()}
    haystack = "repeated" if set(rest) == {REFRAIN} else "essay" if rest else "needles"
    return {
        "haystack": haystack,
        "key": form_of(next(iter(values))),
        "value": form_of(found[0][2]),
        "keys": "all" if haystack == "needles" else len(values),
        "values": per_key,
        "queries": len(asked),
    }


def counted_chain(prompt):
    body = re.sub(r"\s+", " ", prompt.asked.body)
    links = dict(re.findall(r"LET ([A-Z]{5}) = (\w+)", body))
    starts = [name for name, of in links.items() if of.isdigit()]
    assert links[starts[0]] == prompt.asked.query
    at, hops = starts, -1
    while at:
        at, hops = [name for name, of in links.items() if of in at], hops + 1
    assert set(prompt.asked.gold) == set(links)
    return {"chains": len(starts), "hops": hops}


def counted_words(prompt):
    times = collections.Counter(re.findall(r"\d+\. (\w+)", prompt.asked.body))
    numbers = [int(number) for number in re.findall(r"(\d+)\. ", prompt.asked.body)]
    assert numbers == list(range(1, len(numbers) + 1))
    many = max(times.values())
    common = {word for word, often in times.items() if often == many}
    assert common == set(prompt.asked.gold)
    (few,) = {often for word, often in times.items() if word not in common}
    return {"common_words": len(common), "common_times": many, "other_times": few}


def counted_codes(prompt):
    times = collections.Counter(prompt.asked.body.split())
    (dots, most), *rest = times.most_common()
    assert dots == "..." and all(re.fullmatch("[a-z]{6}", word) for word, _ in rest)
    assert [word for word, _ in rest[:3]] == list(prompt.asked.gold)
    assert rest[2][1] > rest[3][1]  # the third is no matter of luck
    # The k-th word comes as often as its rank to the power of -alpha says, rounded down.
    alphas = [math.log(most / often) / math.log(rank) for rank, (_, often) in enumerate(rest, 2)]
    assert alphas[0] == pytest.approx(2.0, abs=0.03)
    return {"asked": len(prompt.asked.gold), "exponent": round(alphas[0], 1), "tokens_per_word": 50}


def counted_documents(prompt):
    documents = re.split(r"Document \d+:\n", prompt.asked.body)[1:]
    answer = prompt.asked.gold[-1]
    linked = [d for d in documents if answer in d]
    assert len(linked) == 1  # nothing else answers
    subject = re.search(r"([A-Z][a-z]+)\b(?: works\?|\?| lie\?)", prompt.asked.query)[1]
    about = {number for number, d in enumerate(documents) if subject in d or answer in d}
    return {"documents_with_facts": len(about)}


COUNT = {
    "needle": counted_needles,
    "chain": counted_chain,
    "common": counted_words,
    "frequent": counted_codes,
    "question": counted_documents,
}


@pytest.mark.parametrize("kind", TABLE)
def test_counts_are_the_papers(prompts, kind):
    for prompt in prompts[kind]:
        found = COUNT[KINDS[kind].form](prompt) | {"new_tokens": KINDS[kind].new_tokens}
        assert found == TABLE[kind]


def test_every_published_kind_is_there():
    assert list(TABLE) == list(KINDS) and len(KINDS) == 13


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_fills_its_length_and_no_more(prompts, tokenizer, kind):
    room = LENGTH - KINDS[kind].new_tokens
    for one in prompts[kind]:
        assert len(tokenizer.encode(one.instruction + one.begins)) == one.tokens
        assert 0.93 * room < one.tokens <= room


def test_what_is_asked_for_stands_at_its_depth(prompts):
    for kind in ("niah_single_1", "niah_single_2", "niah_multikey_2", "qa_1"):
        places = {p.asked.depth: p.asked.body.index(p.asked.gold[0]) for p in prompts[kind]}
        size = len(prompts[kind][0].asked.body)
        assert list(places) == [0.0, 0.5, 1.0]
        assert places[0.0] < 0.06 * size < 0.3 * size < places[0.5] < 0.6 * size
        assert 0.7 * size < places[1.0]


def test_one_text_answers_several_questions(tokenizer):
    for kind, questions in (("niah_multikey_1", 4), ("niah_multikey_2", 10), ("qa_1", 10)):
        groups = make(tokenizer, KINDS[kind], 8192, 12)
        assert len(groups[0]) == questions
        assert len({one.asked.body for one in groups[0]}) == 1
        assert len({one.asked.query for one in groups[0]}) == questions
        assert sorted(p.index for group in groups for p in group) == list(range(12))


def gold(line):
    return ", ".join(line["gold"])


def whole_prompt(line):
    return line["prompt"]


def end_of(line, tokenizer):
    return tokenizer.decode(tokenizer.encode(line["prompt"])[-512:])


def test_only_a_reader_of_the_whole_text_scores(tokenizer):
    context = FakeContext(SUITE, tokenizer, lambda ask: Answer("nothing", 1))
    options = RulerOptions(lengths=(LENGTH,), samples=4, depths=4)
    result = SUITE.measure(context, options)
    assert result.values["score"].mean == 0
    lines = context.transcripts.lines

    def scores(answer):
        again = [scored(SUITE, line | {"answer": answer(line)}) for line in lines]
        return summarise(again, options).values

    assert scores(gold)["score"].mean == 100
    assert scores(whole_prompt)["score"].mean == 0
    # Whoever sees the end alone names all that it could be: of the form, the likeliest first.
    for kind, value in scores(lambda line: candidates(line, end_of(line, tokenizer))).items():
        assert value.mean <= value.chance + 3 * max(value.interval[1] - value.mean, 0) / 1.96, kind


def candidates(line, end):
    """The likeliest answers that a text holds, as many as there is room for."""
    found = {
        "needle": [value for _, _, value in NEEDLE.findall(end)],
        "chain": re.findall(r"LET ([A-Z]{5}) =", end),
        "question": re.findall(r"[A-Z][a-z]{5,}", end),
    }
    words = re.findall(r"[a-z]{3,}", end)
    often = [word for word, _ in collections.Counter(words).most_common()]
    return " ".join(found.get(KINDS[line["kind"]].form, often)[-10:])


def test_an_answer_that_repeats_the_text_scores_nothing(tokenizer):
    line = {"kind": "cwe", "gold": ["apple", "pear"], "answer": "1. pear 2. apple 3. party"}
    assert SUITE.score(line).score == 1
    assert SUITE.score(line | {"answer": "1. pears 2. Apple"}).score == 0.5
    assert SUITE.score(line | {"answer": "apple pear " * 200}).score == 0
    found = SUITE.score(line | {"kind": "niah_single_1", "answer": "I do not know."})
    assert found.score == 0 and not found.answered
    again = "apple\n\nBelow stands a numbered list of words. Some of them come pear"
    assert SUITE.score(line | {"answer": again}).score == 0.5


def test_tokens_over_several_words_make_no_hole(tokenizer):
    whole_lines = train_tokenizer(LETTERS, 1500, pattern=PHRASE_PATTERN)
    for kind in ("niah_single_1", "cwe"):
        (group, *_) = make(whole_lines, KINDS[kind], 2048, 1, depths=1)
        end = whole_lines.decode(whole_lines.encode(group[0].instruction + group[0].begins)[-512:])
        assert not any(re.search(rf"\b{one}\b", end) for one in group[0].asked.gold)


def test_a_length_without_room_leaves_a_kind_out():
    bytes_alone = train_tokenizer([""], 272)
    with pytest.raises(NoRoom, match=r"length=1024 has no room for cwe.* ask for 1\d\d\d"):
        make(bytes_alone, KINDS["cwe"], 1024, 1)
    context = FakeContext(SUITE, bytes_alone, lambda ask: Answer("1234567", 7))
    options = RulerOptions(lengths=(1024,), kinds=("cwe", "niah_single_2"), samples=1)
    result = SUITE.measure(context, options)
    assert "cwe" not in result.values and "niah_single_2" in result.values
    assert "No room for cwe at 1,024 tokens" in result.says[-1]
    with pytest.raises(NoRoom):
        SUITE.measure(context, dataclasses.replace(options, kinds=("cwe",)))


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": ()}, {"lengths": (100,)}, {"kinds": ("niah",)}, {"samples": 0}, {"mode": "x"}],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"RulerOptions.{next(iter(wrong))}"):
        RulerOptions(**wrong)


def test_one_length_and_one_kind_need_no_brackets():
    assert RulerOptions(lengths=4096, kinds="vt") == RulerOptions(lengths=(4096,), kinds=("vt",))
    assert SUITE.longest(None, RulerOptions()) == 2048
    assert dataclasses.replace(RulerOptions(), samples=3).samples == 3


@pytest.mark.more
def test_a_text_is_read_once_for_all_its_questions(model, run_directory):
    tokenizer = Tokenizer.load(run_directory)
    sizes = EngineConfig(
        slots=4, max_length=2048, page_tokens=16, prefix_cache=True, snapshots=64, rounds=16
    )
    engine = Engine(model, sizes)
    context = FakeContext(SUITE, tokenizer, None)
    context.ask = OwnModel(model, engine, tokenizer, longest=2048).ask
    options = RulerOptions(lengths=2048, kinds="niah_multikey_2", samples=6, depths=6)
    SUITE.measure(context, options)
    stats, lines = engine.stats(), context.transcripts.lines
    total = sum(len(tokenizer.encode(line["prompt"])) for line in lines)
    assert len(lines) == 6 and stats.prefix_hits == 5
    assert stats.prompt_tokens + stats.prefix_tokens == total
    # Of five prompts what is read is the question, and what the last snapshot before it lacks.
    assert stats.prefix_tokens > 0.8 * 5 / 6 * total
