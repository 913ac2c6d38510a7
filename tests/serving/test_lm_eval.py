"""lm-eval's `local-completions` scores and generates by the server as by any other."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.serving.fake_generator import logprob
from tests.serving.live import TOKENIZER, Live, live

pytestmark = pytest.mark.more
pytest.importorskip("lm_eval", "0.4.13", reason="lm-eval >= 0.4.13 is not installed")


@pytest.fixture(scope="module")
def served() -> Iterator[Live]:
    with live() as one:
        one.script = "four and two and four</s>"
        yield one


@pytest.fixture(scope="module")
def model(served: Live) -> Any:
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"http://127.0.0.1:{served.address[1]}/v1/completions"
    return LocalCompletionsAPI(base_url=url, model="tiny", max_retries=1, num_concurrent=1)


def instances(kind: str, rows: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, row, number) for number, row in enumerate(rows)]


def test_what_follows_is_scored_by_the_prompts_own_logprobs(model: Any) -> None:
    assert model.tokenizer_backend == "remote" and model.eot_token_id == TOKENIZER.eos
    rows = [("hello there", " four"), ("two", " and two")]
    found = model.loglikelihood(instances("loglikelihood", rows))
    for (before, after), (total, greedy) in zip(rows, found, strict=True):
        whole, known = TOKENIZER.encode(before + after), TOKENIZER.encode(before)
        own = [logprob(token, place) for place, token in enumerate(whole)][len(known) :]
        assert total == pytest.approx(sum(own)) and not greedy


def test_a_whole_text_is_scored_from_its_first_token(model: Any) -> None:
    (total,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", [("hello there",)]))
    ids = [TOKENIZER.eos, *TOKENIZER.encode("hello there")]
    own = [logprob(token, place) for place, token in enumerate(ids)][1:]
    assert total == pytest.approx(sum(own))


def test_generations_end_at_their_stops(model: Any) -> None:
    rows = [("hello", {"until": [" and"], "max_gen_toks": 50}), ("a", {"until": ["zzz"]})]
    found = model.generate_until(instances("generate_until", rows))
    assert found == ["four", "four and two and four"]
