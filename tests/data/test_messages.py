"""Rows in messages format are read or refused in one line; oracles become conversations."""

import json

import pytest

from nemotron_jax.config.rl import RolloutConfig
from nemotron_jax.data.chat.render import ChatOptions, render
from nemotron_jax.data.messages import (
    check_row,
    oracle_conversations,
    oracle_source,
    played_conversation,
    read_messages,
    slip_source,
    split_at_users,
    without_reasoning,
)
from nemotron_jax.posttraining.curriculum import played_environments

USER = {"role": "user", "content": "3*4?"}
CALL = {"function": {"name": "calc", "arguments": {"e": "3*4"}}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ANSWER = {"role": "assistant", "content": "12", "reasoning_content": "easy"}
REPLY = {"role": "tool", "content": "12"}
GOOD = [[USER, ANSWER], [USER, ASKS, REPLY, ANSWER], [USER, ASKS]]
BAD = {
    "role 'robot' is unknown": [USER, {"role": "robot", "content": "x"}, ANSWER],
    "role 3 is unknown": [USER, {"role": 3, "content": "x"}],
    "role None is unknown": [USER, {"content": "x"}],
    "role 'hello' is unknown": ["hello"],
    "a tool reply without a call": [USER, ANSWER, REPLY],
    "message 3: a tool reply without a call": [USER, ASKS, REPLY, REPLY],
    "which no call before it has": [
        USER,
        ASKS | {"tool_calls": [CALL | {"id": "a"}]},
        REPLY | {"tool_call_id": "b"},
    ],
    "the assistant turn is empty": [USER, {"role": "assistant", "content": " \n"}],
    "no assistant turn to learn from": [USER, ANSWER | {"weight": 0}],
    "reads text alone": [{"role": "user", "content": [{"type": "image"}]}, ANSWER],
    "are not JSON": [
        USER,
        ASKS | {"tool_calls": [{"function": {"name": "f", "arguments": "{1"}}]},
    ],
    "needs a name": [USER, ASKS | {"tool_calls": [{"function": {"arguments": {}}}]}],
}


def write(path, rows) -> None:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))


@pytest.mark.parametrize(("words", "messages"), BAD.items(), ids=BAD)
def test_a_bad_row_is_one_line_with_file_and_row(tmp_path, words: str, messages: list) -> None:
    file = tmp_path / "rows.jsonl"
    write(file, [{"messages": GOOD[0]}, {"messages": messages}])
    with pytest.raises(ValueError, match="rows.jsonl: row 2: ") as error:
        read_messages(file, 0.0, "error")
    assert words in str(error.value) and "\n" not in str(error.value)
    found = read_messages(file, 0.0, "drop")
    assert len(found.train) == 1 and len(found.dropped) == 1 and words in found.dropped[0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not an object with a list"),
        ({"messages": "x"}, "not an object with a list"),
        ({"messages": GOOD[0], "tools": [3]}, "`tools`: it is not a list"),
        ({"messages": GOOD[0], "chat_template_kwargs": {"effort": 1}}, "effort: unknown"),
        ({"messages": []}, "no assistant turn"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused(tmp_path, row, words: str) -> None:
    file = tmp_path / "rows.jsonl"
    write(file, [row])
    with pytest.raises(ValueError, match=words):
        read_messages(file, 0.0, "error")


def test_good_rows_keep_tools_and_switches(tmp_path) -> None:
    file, tools = tmp_path / "rows.jsonl", [{"type": "function", "function": {"name": "calc"}}]
    kwargs = {"low_effort": True}
    write(file, [{"messages": m, "tools": tools, "chat_template_kwargs": kwargs} for m in GOOD])
    found = read_messages(file, 0.0, "error")
    assert [list(c.messages) for c in found.train] == GOOD
    assert {c.options for c in found.train} == {ChatOptions(low_effort=True)}
    assert found.train[0].tools == tuple(tools)


def test_the_side_of_a_conversation_depends_on_its_text_alone(tmp_path) -> None:
    rows = [{"messages": [USER | {"content": str(n)}, ANSWER]} for n in range(200)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows[::-1][:150])
    a, b = (read_messages(tmp_path / name, 0.3, "error") for name in ("a.jsonl", "b.jsonl"))
    assert 30 < len(a.held_out) < 90
    digests = lambda conversations: {c.digest() for c in conversations}
    assert digests(b.held_out) < digests(a.held_out)
    assert not digests(a.train) & digests(b.held_out)


def test_a_missing_file_and_an_unknown_oracle_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="nothing.jsonl cannot be read"):
        read_messages(tmp_path / "nothing.jsonl", 0.0, "error")
    with pytest.raises(ValueError, match="no environment is called 'arithmetics'"):
        oracle_source("oracle:arithmetics")
    with pytest.raises(ValueError, match="the level must be 0 to 3"):
        oracle_source("oracle:arithmetic/4")
    with pytest.raises(ValueError, match="^rl.rollout.environments='a': no environment"):
        played_environments(RolloutConfig(environments=("a",)))


def test_an_oracle_becomes_calls_replies_and_an_answer() -> None:
    environment, level = oracle_source("oracle:arithmetic/0")
    for conversation in oracle_conversations(environment, level, 20, split="train"):
        roles = [message["role"] for message in conversation.messages]
        assert roles == ["user", "assistant", "tool", "assistant"]
        assert conversation.messages[2]["content"] == conversation.messages[3]["content"]
        row = {"messages": list(conversation.messages), "tools": list(conversation.tools)}
        assert check_row(row).digest() == conversation.digest()


def test_taking_reasoning_away_leaves_the_answers() -> None:
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n12"}
    for turn in (ANSWER, inline):
        bare = without_reasoning(check_row({"messages": [USER, turn]}))
        assert render(bare.messages).endswith("<think></think>12<|im_end|>\n")


def test_a_conversation_that_reasons_is_split_so_that_each_thought_is_shown_once() -> None:
    second = ANSWER | {"content": "13", "reasoning_content": "again"}
    whole = check_row({"messages": [USER, ASKS, REPLY, ANSWER, USER, second]})
    first, last = split_at_users(whole)
    assert list(first.messages) == [USER, ASKS, REPLY, ANSWER]
    assert [m.get("weight", 1) for m in last.messages if m["role"] == "assistant"] == [0, 0, 1]
    assert "again" in render(last.messages) and "easy" not in render(last.messages)
    kept = check_row(
        {
            "messages": list(whole.messages),
            "chat_template_kwargs": {"truncate_history_thinking": False},
        }
    )
    assert split_at_users(kept) == [kept]
    plain = check_row({"messages": [USER, ASKS, REPLY, USER, ASKS]})
    assert split_at_users(plain) == [plain]


def test_a_slip_is_played_and_named_where_it_is_unknown():
    environment, level, slip = slip_source("slips:arithmetic/1:left_to_right")
    tasks = [environment.split(0, "train", index, level=level) for index in range(40)]
    rewards = [played_conversation(environment, t, environment.slips(t)[slip])[1] for t in tasks]
    heeded = [eval(t.data["expression"]) for t in tasks]  # noqa: S307
    plain = [float(c.messages[-1]["content"].split()[-1]) for c in slips(environment, level, slip)]
    assert rewards == [float(a == b) for a, b in zip(heeded, plain, strict=True)]
    assert 0 < sum(rewards) < 40
    with pytest.raises(ValueError, match="must be one of guess, left_to_right, other"):
        slip_source("slips:arithmetic/1:right_to_left")


def slips(environment, level, slip):
    return oracle_conversations(environment, level, 40, split="train", slip=slip)
