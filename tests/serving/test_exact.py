"""What a server streams is what `generate` gives for each request alone, whoever else asks."""

import concurrent.futures
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest

import nemotron_jax as nj
from nemotron_jax.data.chat.parse import parse_turn
from nemotron_jax.decoding.wanted import Wanted
from nemotron_jax.serving.grammars import TextGrammar
from nemotron_jax.serving.turns import message_of
from tests.decoding.engines import quick_programs  # noqa: F401
from tests.serving.live import CHAT, TOKENIZER, Live, live
from tests.serving.real import (
    LENGTH,
    PAGE,
    Asked,
    Noting,
    alone,
    copy_of,
    differing,
    is_near_tie,
    make_engine,
    model,
)
from tests.serving.test_formats import BOUNDED, json_schema

pytestmark = pytest.mark.more
pytest.importorskip("llguidance")
TEXT = "/v1/completions"
OFF = {"enable_thinking": False}
NOTHING = {"type": "function", "function": {"name": "f"}}


@pytest.fixture(scope="module")
def engine() -> Noting:
    return make_engine()


@pytest.fixture(scope="module")
def served(engine: Noting) -> Iterator[Live]:
    with live(engine=engine, slots=8, waiting=120) as one:
        yield one


def texts(draw: random.Random, words: int) -> str:
    return " ".join(
        draw.choice(["hello", "there", "four", "two", "é☺", "and"]) for _ in range(words)
    )


def sampling(draw: random.Random) -> dict[str, Any]:
    """A few ways of all that there are."""
    ways = [{"temperature": 0}, {"temperature": 0.8, "top_p": 0.9}, {"min_p": 0.05}, {"top_k": 9}]
    body = {**draw.choice(ways), "seed": draw.randrange(1000)}
    if draw.random() < 0.2:
        body["stop"] = draw.sample(["e", "a", " t", "é", "ou"], 2)
    if draw.random() < 0.15:
        body["logit_bias"] = {str(draw.randrange(20, 290)): draw.choice([-100, 5])}
    return body


def wish(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of any kind."""
    kind = draw.choice(["chat", "chat", "think", "text", "scored", "form", "call"])
    body = {**sampling(draw), "max_tokens": draw.randint(4, 40), "return_token_ids": True}
    if kind in ("text", "scored"):
        more = {"echo": True, "logprobs": 2} if kind == "scored" else {}
        return TEXT, {**body, **more, "prompt": texts(draw, draw.randint(1, 30))}
    body["messages"] = [{"role": "user", "content": texts(draw, draw.randint(1, 12))}]
    body["chat_template_kwargs"] = dict(OFF)
    if kind == "think":
        body["chat_template_kwargs"] = {"reasoning_budget": draw.randint(0, 12)}
    elif kind == "form":
        body["response_format"] = json_schema(BOUNDED)
        body.pop("stop", None)
    elif kind == "call":
        body |= {"tools": [NOTHING], "tool_choice": "required"}
    elif draw.random() < 0.3:
        body["n"] = 2
    return CHAT, body


def streamed(one: Live, path: str, body: dict[str, Any]) -> dict[int, list[int]]:
    """The token ids of each choice of a stream, whose text they are."""
    choices: dict[int, list[dict[str, Any]]] = {}
    for chunk in one.events(path, **body):
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], []).append(choice)
    ids = {n: sum((c.get("token_ids", []) for c in own), []) for n, own in choices.items()}
    if "stop" in body or "response_format" in body or "tools" in body:
        return ids
    for index, own in choices.items():
        tokens = ids[index]
        ended = own[-1]["finish_reason"] == "stop"
        tokens = tokens[:-1] if ended else tokens  # the token that ends it has no text
        if path == TEXT:
            before = body["prompt"] if body.get("echo") else ""
            text = "".join(choice["text"] for choice in own)
            assert text == before + TOKENIZER.decode(tokens)
            continue
        message = message_of([choice["delta"] for choice in own])
        shown = TOKENIZER.decode(tokens, show_special=True)
        turn = parse_turn(shown, thinking="reasoning_budget" in body["chat_template_kwargs"])
        broken = "".join(one.text for one in turn.malformed)
        assert (message["reasoning"] or "") == turn.reasoning
        if not broken and not turn.calls:
            assert message["content"] == turn.content
    return ids


def test_64_mixed_requests_in_flight_are_as_each_alone(served: Live, engine: Noting) -> None:
    draw = random.Random(0)
    engine.asked.clear()
    wishes = [wish(draw) for _ in range(64)]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda one: streamed(served, *one), wishes))
    given = sorted(ids for each in found for ids in each.values())
    own = sorted(r.tokens for one in engine.asked for r in one.requests)
    assert given == own and len(engine.asked) >= 64
    assert any(r.accepted_drafts for one in engine.asked for r in one.requests)
    assert not differing(engine.asked)
    empty(engine)


def test_a_request_is_what_generate_gives(served: Live) -> None:
    """The reference of the others is `generate` itself."""
    body = {"prompt": "hello there", "temperature": 0.8, "seed": 5, "max_tokens": 20}
    found = streamed(served, TEXT, {**body, "return_token_ids": True})[0]
    ids = TOKENIZER.encode("hello there")
    ways = {"temperature": 0.8, "seed": 5, "stop_tokens": (TOKENIZER.eos,), "speculative": 2}
    own = nj.generate(model(), [ids], 20, **ways)
    assert found == own.tokens[0, : own.lengths[0]].tolist()


def test_masks_renormalise_and_logprobs_are_the_models(served: Live, engine: Noting) -> None:
    """Against one pass of the model over the whole text, and the grammar asked anew."""
    engine.asked.clear()
    body = {"tools": [NOTHING], "tool_choice": "required", "seed": 4, "max_tokens": 60}
    answer = served.post(**body, logprobs=True, chat_template_kwargs=OFF, n=3).json()
    for choice, one in zip(answer["choices"], engine.asked, strict=True):
        (request,) = one.requests
        assert [row["logprob"] for row in choice["logprobs"]["content"]] == request.logprobs
        drawn = alone(dataclasses.replace(one, wanted=with_drawn(one.wanted)))
        assert drawn.tokens == request.tokens
        whole = np.array([[*request.prompt, *request.tokens]])
        logits = np.asarray(model().logits(model()(whole).hidden), np.float64)[0]
        logits = logits[len(request.prompt) - 1 : -1]
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        own = np.take_along_axis(logits, np.array(request.tokens)[:, None], -1)[:, 0]
        np.testing.assert_allclose(request.logprobs, own, atol=5e-5)
        masks = list(allowed(one.wanted.grammar, request.tokens))
        shares = [np.log(np.exp(row[mask]).sum()) for row, mask in zip(logits, masks, strict=True)]
        np.testing.assert_allclose(drawn.logprobs, own - shares, atol=5e-5)
        assert min(shares) < -1  # the masks do forbid


def with_drawn(wanted: Wanted) -> Wanted:
    return dataclasses.replace(wanted, logprobs="drawn", grammar=copy_of(wanted.grammar))


def allowed(grammar: TextGrammar, tokens: Sequence[int]) -> Iterator[np.ndarray]:
    """The tokens that may come at each place of a text, as flags."""
    for place, token in enumerate(tokens):
        if place:
            grammar.accept(tokens[place - 1])
        bits = np.unpackbits(grammar.mask().view(np.uint8), bitorder="little")
        flags = bits[: TOKENIZER.vocab_size].astype(bool)
        assert flags[token]
        yield flags


def empty(engine: Noting) -> None:
    """Nothing is left of any request; entries of the prefix cache are whole."""
    scheduler = engine._scheduler
    scheduler.check_sums()
    assert not any(scheduler.running()) and not scheduler.waiting
    scheduler.expire()
    stats = engine.stats()
    assert stats.free_pages == stats.pages and stats.free_snapshots == engine.config.snapshots


def played(one: Live, seed: int, turns: int) -> list[tuple[int, int, bool]]:
    """A conversation: of each turn how many tokens were new and how many read, and whether the turn
    before can be found."""
    draw, counts = random.Random(seed), []
    messages = [{"role": "system", "content": texts(random.Random(seed % 3), 8)}]
    text: list[int] | None = None
    found = False
    for _ in range(turns):
        messages.append({"role": "user", "content": texts(draw, draw.randint(1, 4))})
        body = {**sampling(draw), "max_tokens": draw.randint(2, 16), "return_token_ids": True}
        body |= {"messages": messages, "chat_template_kwargs": dict(OFF)}
        if draw.random() < 0.1:
            body["response_format"] = {"type": "regex", "regex": "[a-z ]{1,20}"}
        body |= {} if text is None else {"required_prefix_token_ids": text}
        if draw.random() < 0.05:  # a client that goes in the middle
            leave(one, body)
        answer = one.post(**body)
        if answer.status_code == 400:  # no room is left
            assert "context_length" in answer.text
            return counts
        answer = answer.json()
        choice, usage = answer["choices"][0], answer["usage"]
        known = len(text or ())
        read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
        counts.append((usage["prompt_tokens"] - known, read, found))
        text = answer["prompt_token_ids"] + choice["token_ids"]
        messages.append({"role": "assistant", "content": choice["message"]["content"]})
        found = "stop" not in body  # a text that ends at a stop string is not kept
    return counts


def leave(one: Live, body: dict[str, Any]) -> None:
    url = f"http://127.0.0.1:{one.address[1]}{CHAT}"
    content = json.dumps({**body, "stream": True})
    with httpx.stream("POST", url, content=content, timeout=120) as answer:
        next(answer.iter_bytes(), None)


def test_a_later_turn_reads_its_new_tokens_alone(served: Live, engine: Noting) -> None:
    engine.asked.clear()
    for seed in range(4):
        for new, read, found in played(served, seed, 5):
            assert not found or read <= new + PAGE
    assert not differing(engine.asked)


def told(one: Asked, branch: int) -> str:
    """What to look for where a turn differs."""
    own, other = one.requests[branch].tokens, alone(one, branch).tokens
    return f"{one.prompt} {one.wanted} served {own} alone {other}"


@pytest.mark.parametrize("turns", [pytest.param(n, marks=pytest.mark.slow) for n in (1000, 10_000)])
def test_random_conversations_are_exact_and_leave_nothing(
    served: Live, engine: Noting, turns: int
) -> None:
    engine.asked.clear()
    checked = ties = wrong = cancelled = 0
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        for start in range(0, turns, 200):
            seeds = range(start, start + 200, 5)
            list(pool.map(lambda seed: played(served, seed, 5), seeds))
            checked += len(engine.asked)
            every = [r for one in engine.asked for r in one.requests]
            cancelled += sum(r.finish_reason == "cancelled" for r in every)
            for pair in differing(engine.asked):
                near = is_near_tie(*pair)
                ties, wrong = ties + near, wrong + (not near)
                print(f"near tie: {near}", told(*pair), flush=True)
            engine.asked.clear()
            if not start % 1000:
                print(f"{checked} turns, {cancelled} cancelled, {ties} near ties, {wrong} differ")
    assert checked > 0.95 * turns and not wrong and ties <= 0.001 * turns
    empty(engine)
    assert LENGTH % PAGE == 0
