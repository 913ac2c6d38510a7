"""Tool use is judged by the state that is left: the right way scores, habits do not."""

import copy

import pytest

from nemotron_jax.environments.base import play
from nemotron_jax.environments.schema import faults
from nemotron_jax.environments.turns import ToolCall, Turn
from nemotron_jax.evaluation.answers import Answer
from nemotron_jax.evaluation.tool_use.suite import SUITE, ToolOptions, summarise
from nemotron_jax.evaluation.tool_use.tasks import (
    KINDS,
    TOOL_TASKS,
    always_calls,
    assistant_turns,
    never_calls,
    tool_task,
)
from nemotron_jax.evaluation.transcripts import scored
from nemotron_jax.evaluation.url import read_answer
from tests.evaluation.fake_context import FakeContext

MANY = 25


def reward(task, turns):
    return play(TOOL_TASKS, task, turns).reward


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_way_scores_and_habits_do_not(kind):
    tasks = [tool_task(kind, 3, index) for index in range(MANY)]
    assert len({task.content_hash for task in tasks}) == MANY
    assert all(reward(task, TOOL_TASKS.oracle(task)) == 1 for task in tasks)
    assert not any(reward(task, always_calls(task)) for task in tasks)
    never = {reward(task, never_calls(task)) for task in tasks}
    assert never == {1.0 if kind == "irrelevant" else 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_calls_fit_their_schemas_and_tools_are_shown(kind):
    for index in range(MANY):
        task = tool_task(kind, 0, index)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in task.tools}
        turns = [turn for turn in TOOL_TASKS.oracle(task) if isinstance(turn, Turn)]
        for call in (call for turn in turns for call in turn.calls):
            assert not faults(call.arguments, schemas[call.name])
        assert 8 <= len(schemas) <= 9


def test_order_and_other_ways_are_free_and_one_turn_is_asked_of_parallel_calls():
    task = tool_task("parallel", 0, 0)
    calls = TOOL_TASKS.oracle(task)[0].calls
    assert reward(task, [Turn(calls=calls[::-1]), "Done."]) == 1
    one_by_one = [Turn(calls=(call,)) for call in calls]
    assert reward(task, [*one_by_one, "Done."]) == 0
    assert reward(task, [Turn(calls=calls[:-1]), "Done."]) == 0
    wrong = ToolCall(calls[0].name, calls[0].arguments | {"id": "none", "to": "nobody"})
    assert reward(task, [Turn(calls=(*calls[1:], wrong)), "Done."]) == 0


def test_in_a_conversation_every_turn_of_the_user_ends_right():
    task = next(t for i in range(9) if len((t := tool_task("multi_turn", 0, i)).data["after"]) == 2)
    right = TOOL_TASKS.oracle(task)
    assert reward(task, right) == 1
    # All that was asked for in the end, and at the wrong time.
    late = [turn for turn in right if isinstance(turn, Turn)]
    assert reward(task, ["Later.", "Later.", *late, "Done."]) == 0
    assert reward(task, right[: right.index("It is done.") + 1]) == 0


def player(tasks, of):
    """Answers by the turns that `of` gives each task, whose opening it knows it by."""
    turns = {task.messages[0]["content"]: list(of(task)) for task in tasks}

    def answer(ask):
        said = sum(message["role"] == "assistant" for message in ask.messages)
        way = turns[ask.messages[0]["content"]]
        message = Turn.of(way[min(said, len(way) - 1)]).message()
        return Answer(message["content"], 5, message=message)

    return answer


def result_of(of, **options):
    options = ToolOptions(**options)
    tasks = [tool_task(kind, 0, i) for kind in KINDS for i in range(options.tasks)]
    context = FakeContext(SUITE, None, player(tasks, of))
    return SUITE.measure(context, options), context, options


def test_the_suite_reports_what_two_who_do_not_read_score():
    result, context, options = result_of(never_calls, tasks=20, k=3)
    assert result.values["pass@1"].mean == result.values["pass^3"].mean == 0.25
    assert result.values["pass@1"].chance == 0.25 and result.values["pass@1"].n == 20
    (table,) = result.tables
    baselines = {row[0]: row[-2:] for row in table.rows}
    assert baselines == {kind: (0, float(kind == "irrelevant")) for kind in KINDS}
    again = [scored(SUITE, line) for line in context.transcripts.lines]
    assert summarise(again, options) == result
    # Later samples of a task come after its first was read.
    assert len(context.asked[0]) == 16 and len(context.asked[1]) == 32


def test_a_right_player_scores_and_its_transcripts_are_scored_again():
    result, context, options = result_of(TOOL_TASKS.oracle, tasks=12, k=1)
    assert {value.mean for value in result.values.values()} == {1.0}
    line = next(x for x in context.transcripts.lines if x["gold"]["kind"] == "single")
    other = copy.deepcopy(line)
    own = assistant_turns(other["messages"], tool_task("single", 0, line["gold"]["index"]))
    call = own[0]["tool_calls"][0]["function"]
    call["arguments"] = call["arguments"] | {"id": "e1"} | {"title": "x", "name": "x", "to": "x"}
    assert SUITE.score(line).score == 1 and SUITE.score(other).score == 0


def test_what_fails_or_is_cut_off_is_counted_apart():
    task = tool_task("irrelevant", 0, 0)
    broken = lambda ask: Answer(error="the server is gone", finish_reason="error")
    context = FakeContext(SUITE, None, broken)
    options = ToolOptions(kinds="irrelevant", tasks=2, k=1)
    with pytest.raises(Exception, match="infra_errors"):
        SUITE.measure(context, options)
    assert all(line["score"] is None for line in context.transcripts.lines)
    cut = lambda ask: Answer("words without", 9, "length", message={"role": "assistant"})
    result = SUITE.measure(FakeContext(SUITE, None, cut), options)
    assert result.counts.truncated == 2 and result.values["pass@1"].mean == 0
    assert task.messages


@pytest.mark.parametrize(
    "wrong", [{"kinds": ()}, {"kinds": ("double",)}, {"tasks": 3}, {"k": 0}], ids=str
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=f"ToolOptions.{next(iter(wrong))}"):
        ToolOptions(**wrong)


def test_arguments_that_are_no_json_are_the_models_fault():
    function = {"name": "delete_task", "arguments": '{"id": "t1'}
    message = {"content": None, "tool_calls": [{"id": "c1", "function": function}]}
    answer = read_answer({"choices": [{"message": message, "finish_reason": "tool_calls"}]})
    assert not answer.error and answer.calls[0]["arguments"] == function["arguments"]
    session = TOOL_TASKS.start(tool_task("single", 0, 0))
    (reply,) = session.reply(answer.message)
    assert reply["content"].startswith("error") and session.verify().reward == 0
