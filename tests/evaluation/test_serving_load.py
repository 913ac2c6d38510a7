"""Streams are timed as their users see them, and what fails is counted."""

import types

import pytest

from nemotron_jax.evaluation.serving_load import (
    CHAT,
    COMPLETIONS,
    SUITE,
    Asker,
    ServingOptions,
    Streamed,
    prompt_of,
    summarise,
)
from nemotron_jax.evaluation.suite import Unavailable
from nemotron_jax.evaluation.url import Url
from tests.serving.live import live

OPTIONS = ServingOptions(streams=(1, 3), prompt=40, new=4, requests=2)


def context_of(url, seed=0):
    progress = types.SimpleNamespace(at=lambda *_: None)
    return types.SimpleNamespace(url=url, seed=seed, progress=progress, subject=None)


@pytest.fixture(scope="module")
def server():
    with live(script="four and two<|im_end|>") as one:
        host, port = one.address
        one.url = f"http://{host}:{port}"
        yield one


def test_every_request_of_every_stream_is_timed(server):
    result = SUITE.measure(context_of(Url(server.url)), OPTIONS)
    rows = {row[0]: row for row in result.timed[0].rows}
    assert [(row[1], row[2]) for row in rows.values()] == [(2, 0), (6, 0)]
    assert set(result.values) == {
        f"{who}_of_{streams}_tokens_per_second" for who in ("user", "all") for streams in (1, 3)
    }
    assert all(value.mean > 0 for value in result.values.values())
    assert result.counts.infra_errors == 0
    # Nobody's prompt begins like another's, and all are about as long as was asked for.
    prompts = [request.prompt for request in server.generator.seen[-8:]]
    assert len({prompt[:20] for prompt in prompts}) == 8
    assert all(20 < len(prompt) < 80 for prompt in prompts)


def test_what_fails_is_counted_and_the_rest_is_timed(server):
    asker = Asker(Url(server.url), CHAT, 0.5, OPTIONS, 0)
    good = asker.stream(1)
    wrong = Asker(Url(server.url, "another model"), CHAT, 0.5, OPTIONS, 0).stream(1)
    assert not good.error and good.tokens > 1 and 0 < good.first_s <= good.last_s
    assert "status 404" in wrong.error
    result = summarise({4: ([good, wrong, good], 1.0), 8: ([wrong], 1.0)})
    assert result.counts.infra_errors == 2
    assert [row[:3] for row in result.timed[0].rows] == [(4, 3, 1), (8, 1, 1)]
    assert "1 of 3 failed" in result.says[0]
    with pytest.raises(Unavailable, match="every request failed.*404"):
        summarise({4: ([wrong], 1.0)})


def test_a_server_without_chat_is_asked_for_completions(server):
    class NoChat(Url):
        def call(self, method, path, body=None):
            if path == CHAT:
                raise Unavailable("status 404: no chat")
            return super().call(method, path, body)

    seen = len(server.generator.seen)
    SUITE.measure(context_of(NoChat(server.url)), ServingOptions(streams=1, prompt=20, new=3))
    assert len(server.generator.seen) == seen + 3  # the probe and two requests
    assert COMPLETIONS != CHAT
    with pytest.raises(Unavailable, match="is the server running"):
        SUITE.measure(context_of(Url("http://127.0.0.1:9")), OPTIONS)


@pytest.mark.parametrize(
    ("tokens", "between", "wait", "passes"),
    [(101, 2.0, 1.0, "yes"), (100, 2.0, 1.0, "no"), (101, 2.0, 5.0, "no"), (101, 1.0, 4.9, "yes")],
)
def test_a_row_passes_by_both_bars(tokens, between, wait, passes):
    found = [Streamed(wait, wait + between, tokens)] * 3
    row = summarise({1: (found, 9.0)}).timed[0].rows[0]
    assert row[-1] == passes and row[3] == pytest.approx((tokens - 1) / between)
    assert row[6] == row[7] == wait


def test_a_directory_is_measured_where_its_server_may_be_started():
    subject = types.SimpleNamespace(url="")
    with pytest.raises(Unavailable, match="serving:start=True"):
        SUITE.ready(subject, ServingOptions())
    SUITE.ready(subject, ServingOptions(start=True))
    assert len(prompt_of(30, 1).split()) == pytest.approx(30, abs=3)


@pytest.mark.parametrize(
    "wrong", [{"streams": ()}, {"streams": (0,)}, {"new": 1}, {"prompt": 0}], ids=str
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"ServingOptions.{next(iter(wrong))}"):
        ServingOptions(**wrong)


@pytest.mark.more
def test_our_own_server_is_started_on_a_checkpoint_and_ends(run_directory):
    context = context_of(None)
    context.subject = types.SimpleNamespace(loaded_from=run_directory)
    options = ServingOptions(streams=(1, 2), prompt=60, new=8, requests=1, start=True)
    result = SUITE.measure(context, options)
    assert result.counts.infra_errors == 0 and len(result.values) == 4
    context.subject.loaded_from = run_directory / "none"
    with pytest.raises(Unavailable, match="our own server did not start: .*none"):
        SUITE.measure(context, options)
