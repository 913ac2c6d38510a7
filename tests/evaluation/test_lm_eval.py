"""lm-eval's requests reach the model, and its judgements reach the report."""

import importlib.metadata
import json
import math

import pytest

from nemotron_jax.data.tokenizer import train_tokenizer
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.lm_eval.suite import (
    LOCAL,
    LOCAL_FOLDER,
    SUITE,
    LmEvalOptions,
    row_of,
    summarise,
    task_manager,
)
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.evaluation.transcripts import scored
from tests.evaluation.fake_context import FakeContext

needs_package = pytest.mark.more


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three. Which comes right after it?"] * 3, 300)


def logprob(token, place):
    """Of a token at a place: any, but always the same; every seventh is the likeliest."""
    return -((token * 31 + place) % 97) / 16, (token + place) % 7 == 0


def fake(tokenizer, text=" 7\n8"):
    """Answers as a model that thinks so of tokens, and writes one text up to its stop."""

    def answer(ask):
        if not ask.prompt_logprobs:
            until = min([text.find(stop) for stop in ask.stop if stop in text], default=None)
            return Answer(text[:until], 3, "length" if until is None else "stop")
        found = [logprob(token, place) for place, token in enumerate(ask.prompt)][1:]
        return Answer(prompt_logprobs=[a for a, _ in found], prompt_likeliest=[b for _, b in found])

    return answer


def expected(context, continuation):
    found = [logprob(t, place) for place, t in enumerate((*context, *continuation))]
    new = found[len(context) :]
    return sum(a for a, _ in new), all(b for _, b in new)


def harness(tokenizer, **options):
    adapter = pytest.importorskip("nemotron_jax.evaluation.lm_eval.adapter")
    context = FakeContext(SUITE, tokenizer, fake(tokenizer))
    return adapter.Harness(context.ask, tokenizer, **{"max_length": 64, **options}), context


@needs_package
def test_each_continuation_is_scored_and_equal_requests_go_out_once(tokenizer):
    model, context = harness(tokenizer)
    rows = [([5, 6, 7], [8, 9]), ([5, 6, 7, 8], [9]), ([5, 6, 7], [8, 9]), ([4], [])]
    found = model._loglikelihood_tokens([(None, *row) for row in rows])
    assert found == [expected(*row) for row in rows]
    assert [len(ask.prompt) for ask in context.asked[0]] == [5, 1]  # three of them are one prompt
    long = list(range(20, 120))
    ((score, _),) = model._loglikelihood_tokens([(None, long[:90], long[90:])])
    assert score == expected(long[35:90], long[90:])[0]  # the last 65 tokens


@needs_package
def test_a_long_text_is_scored_once_token_by_token(tokenizer):
    model, context = harness(tokenizer)
    text = " ".join(map(str, range(70)))
    from lm_eval.api.instance import Instance

    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (total,) = model.loglikelihood_rolling([request])
    tokens = [tokenizer.bos, *tokenizer.encode(text)]
    asked = [ask.prompt for ask in context.asked[0]]
    assert [len(prompt) for prompt in asked] == [65] * math.ceil((len(tokens) - 1) / 64)
    assert asked[0] == tuple(tokens[:65]) and asked[-1] == tuple(tokens[-65:])
    score = lambda prompt, count: sum(logprob(t, p)[0] for p, t in [*enumerate(prompt)][-count:])
    counts = [64] * (len(asked) - 1) + [(len(tokens) - 1) % 64]
    assert total == sum(map(score, asked, counts))


@needs_package
def test_answers_end_at_their_stop_and_leave_room(tokenizer):
    from lm_eval.api.instance import Instance

    model, context = harness(tokenizer)
    given = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    requests = [Instance("generate_until", {}, (c, given), 0) for c in ("one " * 99, "two", "two")]
    assert model.generate_until(requests) == [" 7", " 7", " 7"]
    (first, second) = context.asked[0]
    assert len(first.prompt) == 64 - 8 and second.prompt == tuple(tokenizer.encode("two"))
    assert (first.stop, first.temperature, first.max_new_tokens) == (("\n",), 0.0, 8)
    sampled = Instance("generate_until", {}, ("two", given | {"do_sample": True}), 0)
    sampled.args[1]["temperature"] = 0.7
    assert model._generation(sampled, 3).temperature == 0.7
    too_many = Instance("generate_until", {}, ("two", given | {"max_gen_toks": 64}), 0)
    with pytest.raises(ValueError, match="raise lm_eval:length"):
        model.generate_until([too_many])


@needs_package
def test_its_own_cache_answers_the_second_time(tokenizer, tmp_path):
    options = LmEvalOptions(tasks=("local_next", "local_sums"), limit=2)
    evaluator = pytest.importorskip("lm_eval.evaluator")
    runs = []
    for _ in range(2):
        model, context = harness(tokenizer, max_length=256)
        found = evaluator.simple_evaluate(
            model=model,
            use_cache=str(tmp_path / "answers"),
            tasks=list(options.tasks),
            limit=2,
            bootstrap_iters=0,
            task_manager=task_manager(options),
        )
        runs.append((found["results"], len(context.asked)))
    assert runs[0] == (runs[1][0], 2) and runs[1][1] == 0


@needs_package
def test_scores_are_the_harnesss_own_and_are_found_again(tokenizer, monkeypatch):
    import lm_eval.evaluator

    kept, run = [], lm_eval.evaluator.simple_evaluate
    keep = lambda **given: kept.append(run(**given)) or kept[0]
    monkeypatch.setattr(lm_eval.evaluator, "simple_evaluate", keep)
    context = FakeContext(SUITE, tokenizer, fake(tokenizer, " 76\n"))
    options = LmEvalOptions(limit=9)
    result = SUITE.measure(context, options)
    own = kept[0]["results"]
    for task, name in (("local_next", "acc,none"), ("local_kinds", "acc,none")):
        assert result.values[task].mean == pytest.approx(own[task][name])
        assert result.values[task].chance == 0.25 and result.values[task].n == 9
    assert result.values["local_sums"].mean == own["local_sums"]["exact_match,stripped"]
    assert result.values["local_cloze"].mean == own["local_cloze"]["acc,none"]
    bits = result.values["local_prose_bits_per_byte"]
    assert bits.mean == pytest.approx(own["local_prose"]["bits_per_byte,none"])
    again = [scored(SUITE, line) for line in context.transcripts.lines]
    assert summarise(json.loads(json.dumps(again)), options) == result
    right = [scored(SUITE, line | {"answer": line["gold"]}) for line in again]
    assert summarise(right, options).values["local_sums"].mean == 1


@needs_package
def test_unknown_tasks_and_failing_servers_are_one_sentence(tokenizer):
    pytest.importorskip("lm_eval")
    context = FakeContext(SUITE, tokenizer, lambda ask: Answer(error="gone"))
    with pytest.raises(Unavailable, match="2 of 2 requests failed: gone"):
        SUITE.measure(context, LmEvalOptions(tasks="local_cloze", limit=2))
    with pytest.raises(ValueError, match="lm-eval knows no 'locol_cloze'"):
        SUITE.measure(context, LmEvalOptions(tasks="locol_cloze"))


def test_without_the_package_the_suite_says_what_to_install(monkeypatch, tokenizer):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    subject = FakeContext(SUITE, tokenizer, None).subject
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(Unavailable, match=r"not installed; pip install -e '.\[eval\]'"):
        SUITE.ready(subject, LmEvalOptions())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.9.2")
    with pytest.raises(Unavailable, match=r"0\.4\.9\.2 is older than 0\.4\.13"):
        SUITE.ready(subject, LmEvalOptions())


def test_another_way_of_judging_is_kept():
    sample = {"target": "12", "arguments": [("6 + 6 =", {})], "filtered_resps": ["twelve"]}
    sample |= {"metrics": ["exact_match"], "exact_match": 1.0}
    line = row_of("generate_until", sample)
    assert line["lm_eval"] == {"exact_match": 1.0} and SUITE.score(line).score == 1
    same = row_of("generate_until", sample | {"filtered_resps": ["12"]})
    assert "lm_eval" not in same and SUITE.score(same).score == 1
    assert SUITE.score(same | {"answer": "13"}).score == 0
    empty = row_of("generate_until", sample | {"filtered_resps": [""], "exact_match": 0.0})
    assert not SUITE.score(empty).answered


def test_local_tasks_have_their_rows():
    for name in LOCAL:
        rows = [json.loads(x) for x in (LOCAL_FOLDER / f"{name}.jsonl").read_text().splitlines()]
        assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows) >= 28
        assert (LOCAL_FOLDER / f"{name}.yaml").read_text().startswith(f"task: {name}\n")
        for row in rows:
            if "choices" in row:
                assert len(set(row["choices"])) == 4 and row["label"] in range(4)


@pytest.mark.parametrize(
    "wrong",
    [{"tasks": ()}, {"limit": 0}, {"fewshot": -1}, {"include": "/none"}, {"length": 8}],
    ids=str,
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"LmEvalOptions.{next(iter(wrong))}"):
        LmEvalOptions(**wrong)
